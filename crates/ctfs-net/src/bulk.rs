//! Bulk transfers: a stream each, below small calls in priority.
//!
//! QUIC hands out connection credit when bytes are *buffered* for sending, not when they leave. So
//! bulk data could use up the credit of the whole connection and a small call would wait for it
//! behind megabytes. Therefore bulk bytes that are written but not yet acknowledged are bounded
//! ([`crate::link::BULK_WINDOW_BYTES`]) to half of the peer's connection window.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use quinn::{RecvStream, SendStream, VarInt};
use tokio::time::timeout;

use crate::{
    BULK_BODY_BYTES_MAX, BULK_HEADER_BYTES_MAX, Handler,
    link::{BULK_WINDOW_BYTES, Broken, Link},
    wire::{self, BulkLengths, Status, StreamKind, WireError},
};

/// Transfers from one connection in the hands of our handler; twice what a peer of ours has under
/// way, because its given-up ones still run here. Over that: "busy" at once.
pub(crate) const SERVED_MAX: usize = 32;
const PRIORITY: i32 = -1;
/// A sender that delivers nothing for so long has given up without saying so.
const STALL_MAX: Duration = Duration::from_secs(30);

/// How a transfer ended.
pub(crate) enum BulkAnswer {
    Done(Vec<u8>, Bytes),
    Refused(String),
    Busy,
    /// The connection is gone. `sent`: the request may have reached the peer.
    Lost { sent: bool },
}

/// A stream that is reset, not finished, when its writer leaves in the middle: else the peer would
/// take half a message for a whole one.
struct Resetting(Option<SendStream>);

impl Resetting {
    fn stream(&mut self) -> Result<&mut SendStream, Broken> {
        self.0.as_mut().ok_or(Broken::Lost)
    }
}

impl Drop for Resetting {
    fn drop(&mut self) {
        if let Some(mut send) = self.0.take() {
            // Refused when the stream is closed already.
            let _ = send.reset(VarInt::from_u32(0));
        }
    }
}

/// Sends one transfer and waits for its answer. The caller has checked the lengths.
pub(crate) async fn transfer(link: &Link, service: u16, header: Bytes, body: Bytes) -> BulkAnswer {
    let Ok((send, recv)) = link.connection.open_bi().await else { return BulkAnswer::Lost { sent: false } };
    let mut head = BytesMut::from(&wire::preamble(StreamKind::Bulk)[..]);
    head.extend_from_slice(&wire::bulk_request(service, BulkLengths { header: header.len(), body: body.len() }));
    match exchange(link, Resetting(Some(send)), recv, [head.freeze(), header, body]).await {
        Ok(answer) => answer,
        Err(Broken::Lost) => BulkAnswer::Lost { sent: true },
        Err(Broken::Wire(error)) => {
            link.protocol_error(&error);
            BulkAnswer::Lost { sent: true }
        }
    }
}

async fn exchange(
    link: &Link,
    mut send: Resetting,
    mut recv: RecvStream,
    parts: [Bytes; 3],
) -> Result<BulkAnswer, Broken> {
    // A peer that is busy answers before it has read everything and stops our stream: the answer
    // counts then, not the failed write.
    let written = write(link, &mut send, parts).await;
    let mut head = [0; wire::BULK_REPLY_BYTES];
    match recv.read_exact(&mut head).await {
        Ok(()) => {}
        Err(error) => return Err(written.err().unwrap_or(error.into())),
    }
    let (status, len) = wire::decode_bulk_reply(head)?;
    let header = read(&mut recv, len.header).await?;
    let body = read(&mut recv, len.body).await?;
    end(&mut recv).await?;
    Ok(match status {
        Status::Done => BulkAnswer::Done(header.to_vec(), body),
        Status::Refused => BulkAnswer::Refused(String::from_utf8_lossy(&header).into_owned()),
        Status::Busy => BulkAnswer::Busy,
    })
}

/// Writes a whole message and ends the stream. The window is given back when the peer has
/// acknowledged all of it, which is after this returns.
async fn write(link: &Link, send: &mut Resetting, parts: [Bytes; 3]) -> Result<(), Broken> {
    let stream = send.stream()?;
    // Refused only on a closed stream, which the write will tell.
    let _ = stream.set_priority(PRIORITY);
    let bytes: usize = parts.iter().map(Bytes::len).sum();
    let share = bytes.min(BULK_WINDOW_BYTES) as u32;
    let window = link.bulk_window.clone().acquire_many_owned(share).await.map_err(|_| Broken::Lost)?;
    for part in parts {
        if !part.is_empty() {
            stream.write_chunk(part).await?;
        }
    }
    stream.finish().map_err(|_| Broken::Lost)?;
    if let Some(stream) = send.0.take() {
        tokio::spawn(async move {
            // Ends at the latest with the connection.
            let _ = stream.stopped().await;
            drop(window);
        });
    }
    Ok(())
}

/// Reads exactly `len` bytes, which the caller has checked against a limit.
async fn read(recv: &mut RecvStream, len: usize) -> Result<Bytes, Broken> {
    let mut bytes = BytesMut::with_capacity(len);
    while bytes.len() < len {
        let chunk = timeout(STALL_MAX, recv.read_chunk(len - bytes.len(), true)).await.map_err(|_| Broken::Lost)??;
        bytes.extend_from_slice(&chunk.ok_or(WireError::Truncated)?.bytes);
    }
    Ok(bytes.freeze())
}

async fn end(recv: &mut RecvStream) -> Result<(), Broken> {
    match timeout(STALL_MAX, recv.read_chunk(1, true)).await.map_err(|_| Broken::Lost)?? {
        None => Ok(()),
        Some(_) => Err(WireError::Trailing.into()),
    }
}

/// Answers the transfer on this stream.
pub(crate) async fn serve(
    link: &Arc<Link>,
    handler: &Arc<dyn Handler>,
    send: SendStream,
    mut recv: RecvStream,
) -> Result<(), Broken> {
    let mut send = Resetting(Some(send));
    let Ok(_turn) = link.transfers.clone().try_acquire_owned() else {
        return answer(link, &mut send, Status::Busy, Bytes::new(), Bytes::new()).await;
    };
    let mut head = [0; wire::BULK_REQUEST_BYTES];
    timeout(STALL_MAX, recv.read_exact(&mut head)).await.map_err(|_| Broken::Lost)??;
    let (service, len) = wire::decode_bulk_request(head)?;
    let header = read(&mut recv, len.header).await?;
    let body = read(&mut recv, len.body).await?;
    end(&mut recv).await?;

    let handled = AssertUnwindSafe(handler.bulk(link.node, service, header.to_vec(), body)).catch_unwind().await;
    let (status, header, body) = match handled.unwrap_or_else(|_| Err("the request made its handler panic".into())) {
        Ok((header, body)) if header.len() > BULK_HEADER_BYTES_MAX || body.len() > BULK_BODY_BYTES_MAX => {
            let why = format!("a reply of {} and {} bytes is over the limit", header.len(), body.len());
            (Status::Refused, wire::refusal(why), Bytes::new())
        }
        Ok((header, body)) => (Status::Done, header, body),
        Err(why) => (Status::Refused, wire::refusal(why), Bytes::new()),
    };
    answer(link, &mut send, status, Bytes::from(header), body).await
}

async fn answer(
    link: &Link,
    send: &mut Resetting,
    status: Status,
    header: Bytes,
    body: Bytes,
) -> Result<(), Broken> {
    let head = wire::bulk_reply(status, BulkLengths { header: header.len(), body: body.len() });
    write(link, send, [Bytes::copy_from_slice(&head), header, body]).await
}
