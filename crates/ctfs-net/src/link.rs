//! One connection to one member, used by both sides for everything.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use ctfs_types::NodeId;
use parking_lot::Mutex;
use quinn::{Connection, ReadError, ReadExactError, RecvStream, SendStream, VarInt, WriteError};
use tokio::{
    sync::{OnceCell, Semaphore},
    time::timeout,
};
use tracing::{debug, warn};

use crate::{
    Handler, bulk,
    calls::{self, Answer, CallStream},
    wire::{self, StreamKind, WireError},
};

/// Bulk bytes of ours that the peer has not acknowledged: half of its connection window
/// ([`crate::settings::CONNECTION_WINDOW_BYTES`]), which leaves the other half to small calls.
/// At 150 ms it allows 100 MB/s.
pub(crate) const BULK_WINDOW_BYTES: usize = crate::settings::CONNECTION_WINDOW_BYTES as usize / 2;
/// Call streams a peer may open; one per class, and there are a handful of classes.
const CALL_STREAMS_MAX: usize = 16;
/// A stream that has begun says within this time what it is for.
const PREAMBLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why we closed a connection, as the peer's log shows it.
pub(crate) const GOODBYE: u32 = 0;
pub(crate) const NOT_A_MEMBER: u32 = 1;
pub(crate) const SURPLUS: u32 = 2;
pub(crate) const PROTOCOL: u32 = 3;

/// Why a stream is of no more use.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The stream or its connection went away.
    Lost,
    /// The peer broke the framing; its connection has to go.
    Wire(WireError),
}

impl From<WireError> for Broken {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl From<ReadError> for Broken {
    fn from(_: ReadError) -> Self {
        Self::Lost
    }
}

impl From<WriteError> for Broken {
    fn from(_: WriteError) -> Self {
        Self::Lost
    }
}

impl From<ReadExactError> for Broken {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(_) => Self::Wire(WireError::Truncated),
            ReadExactError::ReadError(_) => Self::Lost,
        }
    }
}

/// A live connection to a member.
pub(crate) struct Link {
    pub(crate) node: NodeId,
    pub(crate) connection: Connection,
    pub(crate) since: SystemTime,
    /// Call streams we opened, by class.
    asking: Mutex<BTreeMap<u8, Arc<OnceCell<CallStream>>>>,
    /// Classes of the call streams the peer opened.
    answering: Mutex<BTreeSet<u8>>,
    /// Bytes of requests our handler has in hand.
    pub(crate) request_bytes: Arc<Semaphore>,
    /// Transfers our handler has in hand.
    pub(crate) transfers: Arc<Semaphore>,
    /// Bulk bytes we may have unacknowledged.
    pub(crate) bulk_window: Arc<Semaphore>,
}

impl Link {
    pub(crate) fn new(node: NodeId, connection: Connection) -> Arc<Self> {
        Arc::new(Self {
            node,
            connection,
            since: SystemTime::now(),
            asking: Mutex::default(),
            answering: Mutex::default(),
            request_bytes: Arc::new(Semaphore::new(calls::REQUEST_BYTES_MAX)),
            transfers: Arc::new(Semaphore::new(bulk::SERVED_MAX)),
            bulk_window: Arc::new(Semaphore::new(BULK_WINDOW_BYTES)),
        })
    }

    pub(crate) fn is_live(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    /// Where the peer is; an IPv4 address is shown as one even on a socket that serves both.
    pub(crate) fn remote(&self) -> SocketAddr {
        canonical(self.connection.remote_address())
    }

    pub(crate) fn close(&self, code: u32, why: &str) {
        self.connection.close(VarInt::from_u32(code), why.as_bytes());
    }

    pub(crate) fn protocol_error(&self, error: &WireError) {
        warn!(peer = %self.node, remote = %self.remote(), %error, "peer broke the protocol, closing its connection");
        self.close(PROTOCOL, &error.to_string());
    }

    /// Asks over the stream of the service's class, opening it first if need be.
    pub(crate) async fn call(&self, service: u16, payload: Bytes) -> Answer {
        let class = (service >> 8) as u8;
        let cell = self.asking.lock().entry(class).or_default().clone();
        match cell.get_or_try_init(|| CallStream::open(&self.connection, class)).await {
            Ok(stream) => stream.call(service, payload).await,
            Err(_) => Answer::Lost { sent: false },
        }
    }
}

pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Answers the streams the peer opens, until the connection ends.
pub(crate) async fn serve(link: Arc<Link>, handler: Arc<dyn Handler>) {
    while let Ok((send, recv)) = link.connection.accept_bi().await {
        let link = link.clone();
        let handler = handler.clone();
        tokio::spawn(async move {
            match serve_stream(&link, &handler, send, recv).await {
                Ok(()) => {}
                Err(Broken::Lost) => debug!(peer = %link.node, "stream lost"),
                Err(Broken::Wire(error)) => link.protocol_error(&error),
            }
        });
    }
}

async fn serve_stream(
    link: &Arc<Link>,
    handler: &Arc<dyn Handler>,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Result<(), Broken> {
    let mut head = [0; wire::PREAMBLE_BYTES];
    timeout(PREAMBLE_TIMEOUT, recv.read_exact(&mut head)).await.map_err(|_| WireError::Truncated)??;
    match wire::decode_preamble(head)? {
        StreamKind::Calls { class } => {
            {
                let mut answering = link.answering.lock();
                if answering.len() == CALL_STREAMS_MAX || !answering.insert(class) {
                    return Err(WireError::Kind(0).into());
                }
            }
            calls::serve(link, handler, class, send, recv).await
        }
        StreamKind::Bulk => bulk::serve(link, handler, send, recv).await,
        StreamKind::Hello => {
            send.write_all(&wire::preamble(StreamKind::Hello)).await?;
            // Finishing a stream the peer has stopped is of no use to anyone.
            let _ = send.finish();
            Ok(())
        }
        StreamKind::Join => Err(WireError::Kind(3).into()),
    }
}

/// The dialler's side of hello: resolves when the peer has let us in.
pub(crate) async fn greet(connection: &Connection) -> Result<(), String> {
    let hello = wire::preamble(StreamKind::Hello);
    let (mut send, mut recv) = connection.open_bi().await.map_err(|error| error.to_string())?;
    let lost = |error: String| connection.close_reason().map_or(error, |reason| reason.to_string());
    send.write_all(&hello).await.map_err(|error| lost(error.to_string()))?;
    send.finish().map_err(|error| lost(error.to_string()))?;
    let answer = recv.read_to_end(wire::PREAMBLE_BYTES).await.map_err(|error| lost(error.to_string()))?;
    if answer == hello { Ok(()) } else { Err("the peer speaks another version".to_owned()) }
}
