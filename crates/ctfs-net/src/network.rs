//! The network of one server: its socket, its peers, and what is asked over them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use ctfs_types::NodeId;
use parking_lot::Mutex;
use quinn::{Endpoint, EndpointConfig, Incoming, Runtime, TokioRuntime, TransportConfig, VarInt};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tracing::{debug, info, warn};

pub use crate::peer::PeerStatus;
use crate::{
    BULK_BODY_BYTES_MAX, BULK_HEADER_BYTES_MAX, CALL_BYTES_MAX, CaDer, Handler, Identity, NetError, NetSettings,
    PeerInfo,
    bulk::{self, BulkAnswer},
    calls::Answer,
    identity::{key_hash, node_of, public_key_of},
    join,
    link::{GOODBYE, Link, NOT_A_MEMBER},
    peer::{Peer, turn_away},
    settings::{Admission, CONNECTION_WINDOW_BYTES, STREAMS_MAX},
    socket,
    tls::{ALPN_JOIN, ALPN_MEMBER, Trust, handshake_result, server_config},
};

/// Handshakes of others under way at once; more are refused, to be tried again.
const HANDSHAKES_MAX: usize = 64;
/// From so many on, whoever dials must first show that its address is its own (a QUIC retry).
const HANDSHAKES_UNPROVEN_MAX: usize = 16;
/// Strangers served at once.
const JOINS_MAX: usize = 8;
/// How long goodbyes may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What every task of a network shares.
pub(crate) struct Shared {
    pub(crate) settings: NetSettings,
    pub(crate) identity: Identity,
    pub(crate) trust: Arc<Trust>,
    pub(crate) endpoint: Endpoint,
    pub(crate) dial_transport: Arc<TransportConfig>,
    pub(crate) runtime: Handle,
    handler: Arc<dyn Handler>,
    peers: Mutex<BTreeMap<NodeId, Arc<Peer>>>,
    handshakes: Arc<Semaphore>,
    joins: Arc<Semaphore>,
}

/// This server among its peers. Cheap to clone; the last clone closes it when dropped.
#[derive(Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    local_addr: SocketAddr,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.shut_down();
    }
}

impl Network {
    /// Opens the socket and begins to answer. There are no members yet: see
    /// [`Network::set_members`].
    ///
    /// # Errors
    /// - [`NetError::Bind`]: the address is taken, or not ours.
    /// - [`NetError::Identity`]: the certificate of `identity` was not signed by `ca`.
    pub async fn bind(
        settings: NetSettings,
        identity: Identity,
        ca: CaDer,
        handler: Arc<dyn Handler>,
    ) -> Result<Self, NetError> {
        ca.check(&identity.certificate())?;
        let trust = Arc::new(Trust::new(ca)?);
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server_config(&identity, &trust)?));
        server.transport_config(settings.transport(Admission::Accepted));
        server.max_incoming(HANDSHAKES_MAX);

        let failed = |error: std::io::Error| NetError::Bind { addr: settings.listen, why: error.to_string() };
        let runtime = Arc::new(TokioRuntime);
        let socket = socket::open(settings.listen, settings.socket_buffer_bytes)?;
        let socket = runtime.wrap_udp_socket(socket).map_err(failed)?;
        if socket.max_transmit_segments() == 1 {
            warn!("the kernel does not segment UDP for us (no GSO): bulk transfers will cost more CPU");
        }
        let endpoint =
            Endpoint::new_with_abstract_socket(EndpointConfig::default(), Some(server), socket, runtime)
                .map_err(failed)?;
        let local_addr = endpoint.local_addr().map_err(failed)?;

        let shared = Arc::new(Shared {
            dial_transport: settings.transport(Admission::Dialled),
            settings,
            identity,
            trust,
            endpoint,
            runtime: Handle::current(),
            handler,
            peers: Mutex::default(),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            joins: Arc::new(Semaphore::new(JOINS_MAX)),
        });
        info!(node = %shared.identity.node(), listen = %local_addr, "network is up");
        // Ends when the endpoint is closed.
        tokio::spawn(accept(shared.clone()));
        Ok(Self { inner: Arc::new(Inner { shared, local_addr }) })
    }

    /// The address the socket is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.local_addr
    }

    pub fn node(&self) -> NodeId {
        self.inner.shared.identity.node()
    }

    /// Says who the members are. Connections of whoever left, or has another key now, are closed
    /// before this returns; whoever is new is dialled. This server itself may be in the list.
    pub fn set_members(&self, members: Vec<PeerInfo>) {
        self.inner.shared.set_members(members);
    }

    /// Whether strangers may reach [`Handler::join`].
    pub fn set_joining(&self, open: bool) {
        self.inner.shared.trust.set_joining(open);
    }

    /// Asks a member and waits for its answer; both at most [`CALL_BYTES_MAX`].
    ///
    /// A request that was not yet written when its connection broke is sent again, once. This
    /// server itself is asked without the network.
    ///
    /// # Errors
    /// Every variant of [`NetError`] but `Bind` and `Identity`. After `Deadline` and `Closed` the
    /// request may have been handled.
    pub async fn call(
        &self,
        to: NodeId,
        service: u16,
        payload: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>, NetError> {
        if payload.len() > CALL_BYTES_MAX {
            return Err(NetError::TooLong);
        }
        let shared = &self.inner.shared;
        let asking = async {
            if to == shared.identity.node() {
                return shared.handler.call(to, service, payload).await.map_err(NetError::Refused);
            }
            let peer = shared.peer(to)?;
            let payload = Bytes::from(payload);
            let mut again = true;
            loop {
                match peer.link().await?.call(service, payload.clone()).await {
                    Answer::Reply(reply) => return Ok(reply),
                    Answer::Refused(why) => return Err(NetError::Refused(why)),
                    Answer::Busy => return Err(NetError::Busy),
                    Answer::Lost { sent: false } if again => again = false,
                    Answer::Lost { .. } => return Err(NetError::Closed),
                }
            }
        };
        timeout(deadline, asking).await.unwrap_or(Err(NetError::Deadline))
    }

    /// Sends a header (at most [`BULK_HEADER_BYTES_MAX`]) and a body (at most
    /// [`BULK_BODY_BYTES_MAX`]) over a stream of their own, and waits for the same in return.
    ///
    /// At most 16 at once to one peer; the next waits, up to its deadline.
    ///
    /// # Errors
    /// As for [`Network::call`].
    pub async fn bulk(
        &self,
        to: NodeId,
        service: u16,
        header: Vec<u8>,
        body: Bytes,
        deadline: Duration,
    ) -> Result<(Vec<u8>, Bytes), NetError> {
        if header.len() > BULK_HEADER_BYTES_MAX || body.len() > BULK_BODY_BYTES_MAX {
            return Err(NetError::TooLong);
        }
        let shared = &self.inner.shared;
        let asking = async {
            if to == shared.identity.node() {
                return shared.handler.bulk(to, service, header, body).await.map_err(NetError::Refused);
            }
            let peer = shared.peer(to)?;
            let header = Bytes::from(header);
            let _turn = peer.transfers.acquire().await.map_err(|_| NetError::Closed)?;
            let mut again = true;
            loop {
                let link = peer.link().await?;
                match bulk::transfer(&link, service, header.clone(), body.clone()).await {
                    BulkAnswer::Done(header, body) => return Ok((header, body)),
                    BulkAnswer::Refused(why) => return Err(NetError::Refused(why)),
                    BulkAnswer::Busy => return Err(NetError::Busy),
                    BulkAnswer::Lost { sent: false } if again => again = false,
                    BulkAnswer::Lost { .. } => return Err(NetError::Closed),
                }
            }
        };
        timeout(deadline, asking).await.unwrap_or(Err(NetError::Deadline))
    }

    /// How a peer is doing; all zero for who is not a member.
    pub fn peer(&self, node: NodeId) -> PeerStatus {
        self.inner.shared.peer(node).map(|peer| peer.status()).unwrap_or_default()
    }

    /// Asks a cluster we are no member of to let us in: one request of at most 16 KiB to the first
    /// of `addresses` that answers. The request leaves only for a server whose chain contains the
    /// authority with the hash `ca_hash`, and may be delivered more than once.
    ///
    /// # Errors
    /// - [`NetError::Refused`]: the cluster said no; other addresses are not tried.
    /// - [`NetError::Identity`]: who answered is of another cluster.
    /// - [`NetError::NotAdmitted`]: the right cluster, and it lets nobody in now.
    /// - [`NetError::Unreachable`], [`NetError::Closed`], [`NetError::Busy`],
    ///   [`NetError::Deadline`]: nobody answered.
    pub async fn join(
        addresses: &[String],
        ca_hash: [u8; 32],
        identity: &Identity,
        request: Vec<u8>,
        deadline: Duration,
    ) -> Result<join::Joined, NetError> {
        join::ask(addresses, ca_hash, identity, request, deadline).await
    }

    /// Closes every connection and lets the goodbyes leave. Calls under way end with
    /// [`NetError::Closed`], later ones with [`NetError::Unreachable`].
    pub async fn close(&self) {
        self.inner.shared.shut_down();
        // A peer that does not answer a goodbye finds out by itself.
        let _ = timeout(CLOSE_TIMEOUT, self.inner.shared.endpoint.wait_idle()).await;
    }
}

impl Shared {
    fn peer(&self, node: NodeId) -> Result<Arc<Peer>, NetError> {
        self.peers.lock().get(&node).cloned().ok_or(NetError::Unreachable)
    }

    fn set_members(self: &Arc<Self>, list: Vec<PeerInfo>) {
        let mut fresh = BTreeMap::new();
        for info in list {
            if node_of(&info.key) != info.node {
                warn!(peer = %info.node, "member whose number is not that of its key, left out");
            } else if info.node != self.identity.node() {
                fresh.insert(info.node, info);
            }
        }
        let mut members = self.trust.members().write();
        let mut removed = Vec::new();
        {
            let mut peers = self.peers.lock();
            peers.retain(|node, peer| {
                let old = members.get(node);
                let stays = fresh.get(node).is_some_and(|info| old.is_some_and(|old| old.key == info.key));
                if !stays {
                    info!(peer = %node, "no longer a member, closing its connections");
                    peer.remove(NOT_A_MEMBER, "no longer a member");
                    removed.push(peer.clone());
                }
                stays
            });
            for (node, info) in &fresh {
                match peers.get(node) {
                    Some(peer) => peer.update(info.clone()),
                    None => {
                        let peer = Peer::new(info.clone());
                        peer.start(self);
                        peers.insert(*node, peer);
                    }
                }
            }
        }
        *members = fresh;
        // Still under the lock: whoever comes back under the same number is announced after this.
        for peer in removed {
            peer.announce(self.handler.as_ref());
        }
    }

    /// Takes a connection of a member into use, whoever dialled, unless it was removed meanwhile.
    pub(crate) fn admit(&self, node: NodeId, connection: quinn::Connection) {
        match self.attach(node, &connection) {
            Some(peer) => peer.announce(self.handler.as_ref()),
            None => turn_away(&connection),
        }
    }

    fn attach(&self, node: NodeId, connection: &quinn::Connection) -> Option<Arc<Peer>> {
        // Held until the connection is in the books, where a removal finds it.
        let members = self.trust.members().read();
        let (_, leaf) = handshake_result(connection)?;
        // Asked again: since the handshake the number may have got another key.
        let key = key_hash(&public_key_of(&leaf).ok()?);
        members.get(&node).filter(|member| member.key == key)?;
        let peer = self.peer(node).ok()?;
        peer.attach(Link::new(node, connection.clone()), &self.handler);
        Some(peer)
    }

    fn shut_down(&self) {
        self.trust.set_joining(false);
        let peers = std::mem::take(&mut *self.peers.lock());
        for peer in peers.values() {
            peer.remove(GOODBYE, "shutting down");
        }
        self.endpoint.close(VarInt::from_u32(GOODBYE), b"shutting down");
    }
}

/// Lets handshakes begin, a bounded number at once.
async fn accept(shared: Arc<Shared>) {
    while let Some(incoming) = shared.endpoint.accept().await {
        let Ok(turn) = shared.handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let busy = HANDSHAKES_MAX - shared.handshakes.available_permits();
        if busy > HANDSHAKES_UNPROVEN_MAX && incoming.may_retry() && !incoming.remote_address_validated() {
            if let Err(error) = incoming.retry() {
                error.into_incoming().refuse();
            }
            continue;
        }
        tokio::spawn(welcome(shared.clone(), incoming, turn));
    }
}

/// Completes one handshake and sends whoever it was where they may go.
async fn welcome(shared: Arc<Shared>, incoming: Incoming, turn: OwnedSemaphorePermit) {
    let remote = incoming.remote_address();
    let connection = match timeout(shared.settings.handshake_timeout, incoming).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return debug!(%remote, %error, "handshake refused"),
        Err(_) => return debug!(%remote, "handshake took too long"),
    };
    drop(turn);
    let Some((protocol, leaf)) = handshake_result(&connection) else { return turn_away(&connection) };
    if protocol == ALPN_JOIN && shared.trust.joining() {
        let Ok(_turn) = shared.joins.clone().try_acquire_owned() else { return turn_away(&connection) };
        return join::serve(connection, leaf, shared.handler.clone(), shared.settings.join_timeout).await;
    }
    match shared.trust.dialler(&leaf) {
        Ok(node) if protocol == ALPN_MEMBER => {
            // Until here it could open one stream and send a few packets.
            connection.set_receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES));
            connection.set_max_concurrent_bi_streams(VarInt::from_u32(STREAMS_MAX));
            shared.admit(node, connection);
        }
        _ => {
            debug!(%remote, "stranger turned away");
            turn_away(&connection);
        }
    }
}
