//! Small calls: many at once over one long-lived stream per class.
//!
//! The side that asks opens the stream; requests go one way, answers come back in any order. A
//! writer task gathers queued frames into one write, a reader task hands answers to whoever waits.
//!
//! Bounds. Asking: [`CALLS_MAX`] calls and [`QUEUED_BYTES_MAX`] bytes per stream; the next caller
//! waits, up to its deadline. Answering: the same number of calls per stream and
//! [`REQUEST_BYTES_MAX`] per connection; over that a request is answered "busy" at once, because a
//! reader that stopped reading would hold up the whole connection.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use parking_lot::Mutex;
use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt, WriteError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::{
    Handler,
    link::{Broken, Link, PROTOCOL},
    wire::{self, CALL_BYTES_MAX, FrameHeader, FrameKind, StreamKind, WireError},
};

/// Calls under way on one stream in one direction.
pub(crate) const CALLS_MAX: usize = 1024;
/// Bytes of requests of ours that wait to be written on one stream; eight of the largest.
const QUEUED_BYTES_MAX: usize = 16 << 20;
/// Bytes of requests of one connection in the hands of our handler.
pub(crate) const REQUEST_BYTES_MAX: usize = 64 << 20;
/// Frames gathered into one write: beyond this a write fills packets well enough.
const BATCH_BYTES: usize = 256 << 10;
/// Payloads from this size on are passed by reference; below, copying is cheaper.
const COPY_BYTES_MAX: usize = 16 << 10;
/// Small calls before bulk (which has -1) whenever a packet is filled.
const PRIORITY: i32 = 1;

/// How a call ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Reply(Vec<u8>),
    Refused(String),
    Busy,
    /// The connection is gone. `sent`: the request may have reached the peer.
    Lost { sent: bool },
}

/// A frame on its way out, and the room it takes in the queue.
struct Outgoing {
    header: FrameHeader,
    payload: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

/// Calls that wait for their answer.
#[derive(Default)]
struct Pending {
    calls: HashMap<u64, Waiting>,
    lost: bool,
}

struct Waiting {
    answer: oneshot::Sender<Answer>,
    sent: bool,
}

impl Pending {
    /// The stream is gone: everyone who waits hears so, and whoever comes later too.
    fn fail(&mut self) {
        self.lost = true;
        for (_, waiting) in self.calls.drain() {
            // The caller may have left in this moment.
            let _ = waiting.answer.send(Answer::Lost { sent: waiting.sent });
        }
    }
}

/// The asking end of a call stream.
pub(crate) struct CallStream {
    queue: mpsc::Sender<Outgoing>,
    pending: Arc<Mutex<Pending>>,
    calls: Arc<Semaphore>,
    room: Arc<Semaphore>,
    next: AtomicU64,
}

/// Takes the call out of the pending map when its caller leaves.
struct Forget<'a> {
    pending: &'a Mutex<Pending>,
    call: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.pending.lock().calls.remove(&self.call);
    }
}

impl CallStream {
    /// Opens a stream for `class`. Nothing is awaited once the stream exists, so a caller who
    /// leaves does not leave half a stream behind.
    pub(crate) async fn open(connection: &Connection, class: u8) -> Result<Self, ConnectionError> {
        let (mut send, recv) = connection.open_bi().await?;
        let (queue, frames) = mpsc::channel(CALLS_MAX);
        let pending = Arc::new(Mutex::new(Pending::default()));

        let marks = pending.clone();
        let wire = connection.clone();
        tokio::spawn(async move {
            let opened = send.write_all(&wire::preamble(StreamKind::Calls { class })).await;
            let written = match opened {
                Ok(()) => write_frames(&mut send, frames, |header| mark_sent(&marks, header.call)).await,
                Err(error) => Err(error),
            };
            if written.is_err() {
                wire.close(VarInt::from_u32(PROTOCOL), b"call stream broke");
            }
        });

        let waiting = pending.clone();
        let wire = connection.clone();
        tokio::spawn(async move {
            let end = read_answers(recv, &waiting).await;
            waiting.lock().fail();
            // A call stream lives as long as its connection; one without the other is of no use.
            let why = if let Broken::Wire(error) = end { error.to_string() } else { "call stream ended".to_owned() };
            wire.close(VarInt::from_u32(PROTOCOL), why.as_bytes());
        });

        Ok(Self {
            queue,
            pending,
            calls: Arc::new(Semaphore::new(CALLS_MAX)),
            room: Arc::new(Semaphore::new(QUEUED_BYTES_MAX)),
            next: AtomicU64::new(1),
        })
    }

    /// Asks and waits. Cancel-safe: a caller who leaves takes its call out of the books.
    pub(crate) async fn call(&self, service: u16, payload: Bytes) -> Answer {
        let not_sent = Answer::Lost { sent: false };
        let Ok(_turn) = self.calls.acquire().await else { return not_sent };
        let Ok(room) = self.room.clone().acquire_many_owned(payload.len() as u32).await else { return not_sent };

        let call = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        {
            let mut pending = self.pending.lock();
            if pending.lost {
                return not_sent;
            }
            pending.calls.insert(call, Waiting { answer, sent: false });
        }
        let _forget = Forget { pending: &self.pending, call };
        let header = FrameHeader { kind: FrameKind::Request, call, service };
        if self.queue.send(Outgoing { header, payload, _room: Some(room) }).await.is_err() {
            return not_sent;
        }
        answered.await.unwrap_or(Answer::Lost { sent: true })
    }
}

/// Marks a call as sent; false when nobody waits for it any more.
fn mark_sent(pending: &Mutex<Pending>, call: u64) -> bool {
    match pending.lock().calls.get_mut(&call) {
        Some(waiting) => {
            waiting.sent = true;
            true
        }
        None => false,
    }
}

/// Writes queued frames until the queue closes; `wanted` may drop a frame at the last moment.
async fn write_frames(
    send: &mut SendStream,
    mut frames: mpsc::Receiver<Outgoing>,
    wanted: impl Fn(&FrameHeader) -> bool,
) -> Result<(), WriteError> {
    // Refused only on a stream that was reset already, which the write will tell.
    let _ = send.set_priority(PRIORITY);
    while let Some(first) = frames.recv().await {
        let mut next = Some(first);
        let mut rooms = Vec::new();
        let mut chunks = Vec::new();
        let mut small = BytesMut::new();
        let mut bytes = 0;
        while let Some(frame) = next {
            if wanted(&frame.header) {
                bytes += frame.payload.len();
                small.extend_from_slice(&wire::frame_header(frame.header, frame.payload.len()));
                if frame.payload.len() < COPY_BYTES_MAX {
                    small.extend_from_slice(&frame.payload);
                } else {
                    chunks.push(small.split().freeze());
                    chunks.push(frame.payload);
                }
                rooms.push(frame._room);
            }
            next = if bytes < BATCH_BYTES { frames.try_recv().ok() } else { None };
        }
        if !small.is_empty() {
            chunks.push(small.freeze());
        }
        send.write_all_chunks(&mut chunks).await?;
    }
    // Already finished or reset: then there is nothing to finish.
    let _ = send.finish();
    Ok(())
}

async fn read_answers(recv: RecvStream, pending: &Mutex<Pending>) -> Broken {
    let mut frames = Frames::new(recv);
    loop {
        let (header, payload) = match frames.next().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Broken::Lost,
            Err(broken) => return broken,
        };
        let answer = match header.kind {
            FrameKind::Reply => Answer::Reply(payload),
            FrameKind::Refused => Answer::Refused(String::from_utf8_lossy(&payload).into_owned()),
            FrameKind::Busy => Answer::Busy,
            FrameKind::Request => return Broken::Wire(WireError::Kind(0)),
        };
        // Nobody waits when the caller's deadline passed.
        if let Some(waiting) = pending.lock().calls.remove(&header.call) {
            let _ = waiting.answer.send(answer);
        }
    }
}

/// Frames of a stream, one after the other.
struct Frames {
    recv: RecvStream,
    buffer: BytesMut,
}

impl Frames {
    fn new(recv: RecvStream) -> Self {
        Self { recv, buffer: BytesMut::new() }
    }

    /// The next frame; `None` at the end of the stream. Holds at most one frame and one chunk.
    async fn next(&mut self) -> Result<Option<(FrameHeader, Vec<u8>)>, Broken> {
        loop {
            if let Some((header, len)) = wire::decode_frame(&self.buffer)? {
                let frame = self.buffer.split_to(len);
                return Ok(Some((header, frame[wire::FRAME_HEADER_BYTES..].to_vec())));
            }
            match self.recv.read_chunk(BATCH_BYTES, true).await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk.bytes),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(WireError::Truncated.into()),
            }
        }
    }
}

/// The answering end: reads requests until the stream or the connection ends.
pub(crate) async fn serve(
    link: &Arc<Link>,
    handler: &Arc<dyn Handler>,
    class: u8,
    mut send: SendStream,
    recv: RecvStream,
) -> Result<(), Broken> {
    let (replies, frames) = mpsc::channel(CALLS_MAX);
    let wire = link.connection.clone();
    tokio::spawn(async move {
        if write_frames(&mut send, frames, |_| true).await.is_err() {
            wire.close(VarInt::from_u32(PROTOCOL), b"reply stream broke");
        }
    });

    let in_flight = Arc::new(Semaphore::new(CALLS_MAX));
    let mut requests = Frames::new(recv);
    while let Some((header, payload)) = requests.next().await? {
        if header.kind != FrameKind::Request {
            return Err(WireError::Kind(1).into());
        }
        if (header.service >> 8) as u8 != class {
            return Err(WireError::Class { service: header.service, class }.into());
        }
        let turn = in_flight.clone().try_acquire_owned();
        let room = link.request_bytes.clone().try_acquire_many_owned(payload.len() as u32);
        let (Ok(turn), Ok(room)) = (turn, room) else {
            let header = FrameHeader { kind: FrameKind::Busy, ..header };
            // A full queue of replies: the peer does not even read "busy", and its deadline will do.
            let _ = replies.try_send(Outgoing { header, payload: Bytes::new(), _room: None });
            continue;
        };
        let handler = handler.clone();
        let replies = replies.clone();
        let from = link.node;
        tokio::spawn(async move {
            let _turn = turn;
            let handled = AssertUnwindSafe(handler.call(from, header.service, payload)).catch_unwind().await;
            drop(room);
            let (kind, payload) = match handled.unwrap_or_else(|_| Err("the request made its handler panic".into())) {
                Ok(reply) if reply.len() > CALL_BYTES_MAX => {
                    (FrameKind::Refused, wire::refusal(format!("a reply of {} bytes is over the limit", reply.len())))
                }
                Ok(reply) => (FrameKind::Reply, reply),
                Err(why) => (FrameKind::Refused, wire::refusal(why)),
            };
            let header = FrameHeader { kind, ..header };
            // Nobody to answer to when the connection went away.
            let _ = replies.send(Outgoing { header, payload: Bytes::from(payload), _room: None }).await;
        });
    }
    Ok(())
}
