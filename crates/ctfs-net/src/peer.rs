//! All we know of one other server: its connections, and how dialling it goes.
//!
//! One task per peer keeps a connection to it alive ([`keep_connected`]); it is the only one that
//! dials, so a caller who leaves never breaks off a dial that others wait for. A caller without a
//! connection waits for the first attempt only: once a dial has failed, calls fail at once with
//! `Unreachable` until the task succeeds or the peer dials us.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use ctfs_types::NodeId;
use futures_util::{StreamExt, stream::FuturesUnordered};
use parking_lot::Mutex;
use tokio::{
    net::lookup_host,
    sync::{Notify, Semaphore, watch},
    task::AbortHandle,
    time::{sleep, timeout},
};
use tracing::{debug, info};

use crate::{
    Handler, NetError, NetSettings, PeerInfo,
    link::{Link, NOT_A_MEMBER, SURPLUS, greet},
    network::Shared,
    tls::{SERVER_NAME, member_config},
};

/// Connections of one peer; the fifth pushes out the oldest.
const LINKS_MAX: usize = 4;
/// Bulk transfers of ours under way to one peer.
const TRANSFERS_MAX: usize = 16;
/// Addresses tried of one peer, and spellings of one address.
const ADDRESSES_MAX: usize = 8;
const RESOLVED_MAX: usize = 4;
/// The next address is tried beside a slow one after this long (RFC 8305 asks for 250 ms).
const STAGGER: Duration = Duration::from_millis(250);
/// The server with the larger number leaves the other this long to dial first, as one connection
/// is enough.
const COURTESY: Duration = Duration::from_millis(200);

/// Another member.
pub(crate) struct Peer {
    pub(crate) node: NodeId,
    state: Mutex<State>,
    /// Whether the handler was told of a connection; held while it is told, so that it hears
    /// "connected" and "disconnected" in turns.
    announced: Mutex<bool>,
    /// Moves when a connection came up or a dial failed.
    progress: watch::Sender<u64>,
    /// Asks the task to look again: a connection went down, the addresses changed, a caller waits.
    wanted: Notify,
    pub(crate) transfers: Semaphore,
    task: Mutex<Option<AbortHandle>>,
}

struct State {
    info: PeerInfo,
    /// Newest last.
    links: Vec<Arc<Link>>,
    /// Failed dials since the last success.
    failures: u32,
    retry_at: Option<Instant>,
    last_error: Option<String>,
    refuses_us: bool,
    /// The address our last successful dial used.
    good: Option<String>,
    /// UDP bytes of connections that have ended.
    sent_before: u64,
    received_before: u64,
}

/// How a peer is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerStatus {
    pub connected: bool,
    /// Live connections; more than one for a while when both sides dialled at the same time.
    pub connections: usize,
    pub rtt: Option<Duration>,
    /// Largest UDP payload known to pass, bytes.
    pub mtu: Option<u16>,
    pub remote: Option<SocketAddr>,
    /// When the newest connection came up.
    pub since: Option<SystemTime>,
    /// UDP payload bytes, all connections since the peer became a member.
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// Why the last dial failed, while there is no connection.
    pub last_error: Option<String>,
    /// It answered the last dial and turned us away: to it we are no member.
    pub refuses_us: bool,
}

impl Peer {
    pub(crate) fn new(info: PeerInfo) -> Arc<Self> {
        Arc::new(Self {
            node: info.node,
            state: Mutex::new(State {
                info,
                links: Vec::new(),
                failures: 0,
                retry_at: None,
                last_error: None,
                refuses_us: false,
                good: None,
                sent_before: 0,
                received_before: 0,
            }),
            announced: Mutex::new(false),
            progress: watch::Sender::new(0),
            wanted: Notify::new(),
            transfers: Semaphore::new(TRANSFERS_MAX),
            task: Mutex::new(None),
        })
    }

    pub(crate) fn start(self: &Arc<Self>, shared: &Arc<Shared>) {
        let task = shared.runtime.spawn(keep_connected(shared.clone(), self.clone()));
        *self.task.lock() = Some(task.abort_handle());
    }

    /// New addresses are tried at once.
    pub(crate) fn update(&self, info: PeerInfo) {
        let mut state = self.state.lock();
        if state.info.addresses != info.addresses {
            state.failures = 0;
            state.retry_at = None;
            self.wanted.notify_one();
        }
        state.info = info;
    }

    /// Stops dialling and closes every connection, now.
    pub(crate) fn remove(&self, code: u32, why: &str) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
        {
            let mut state = self.state.lock();
            for link in &state.links {
                link.close(code, why);
            }
            // Nobody dials any more, so nobody is to wait for it.
            state.failures = state.failures.max(1);
            state.last_error = Some(why.to_owned());
        }
        self.progress.send_modify(|count| *count += 1);
    }

    /// The newest live connection.
    pub(crate) fn live(&self) -> Option<Arc<Link>> {
        self.state.lock().links.iter().rev().find(|link| link.is_live()).cloned()
    }

    /// A connection, waiting for the first dial if there is none.
    pub(crate) async fn link(&self) -> Result<Arc<Link>, NetError> {
        let mut progress = self.progress.subscribe();
        loop {
            progress.borrow_and_update();
            if let Some(link) = self.live() {
                return Ok(link);
            }
            if self.state.lock().failures > 0 {
                return Err(NetError::Unreachable);
            }
            self.wanted.notify_one();
            // The sender lives in `self`.
            let _ = progress.changed().await;
        }
    }

    /// Takes a connection into use and starts answering on it.
    pub(crate) fn attach(self: &Arc<Self>, link: Arc<Link>, handler: &Arc<dyn Handler>) {
        {
            let mut state = self.state.lock();
            state.links.push(link.clone());
            state.failures = 0;
            state.retry_at = None;
            state.last_error = None;
            state.refuses_us = false;
            if state.links.len() > LINKS_MAX {
                state.links[0].close(SURPLUS, "newer connections exist");
            }
        }
        info!(peer = %self.node, remote = %link.remote(), "connected");
        self.progress.send_modify(|count| *count += 1);
        tokio::spawn(crate::link::serve(link.clone(), handler.clone()));
        let peer = self.clone();
        let handler = handler.clone();
        tokio::spawn(async move {
            let why = link.connection.closed().await;
            info!(peer = %peer.node, remote = %link.remote(), %why, "connection ended");
            peer.detach(&link);
            peer.announce(handler.as_ref());
            peer.wanted.notify_one();
        });
    }

    fn detach(&self, link: &Arc<Link>) {
        let stats = link.connection.stats();
        let mut state = self.state.lock();
        state.links.retain(|other| !Arc::ptr_eq(other, link));
        state.sent_before += stats.udp_tx.bytes;
        state.received_before += stats.udp_rx.bytes;
    }

    /// Tells the handler if the peer came or went since it last heard.
    pub(crate) fn announce(&self, handler: &dyn Handler) {
        let mut announced = self.announced.lock();
        match (self.live(), *announced) {
            (Some(link), false) => handler.connected(self.node, link.remote()),
            (None, true) => handler.disconnected(self.node),
            _ => return,
        }
        *announced = !*announced;
    }

    pub(crate) fn status(&self) -> PeerStatus {
        let state = self.state.lock();
        let mut status = PeerStatus {
            sent_bytes: state.sent_before,
            received_bytes: state.received_before,
            last_error: state.last_error.clone(),
            refuses_us: state.refuses_us,
            ..PeerStatus::default()
        };
        for link in &state.links {
            let stats = link.connection.stats();
            status.sent_bytes += stats.udp_tx.bytes;
            status.received_bytes += stats.udp_rx.bytes;
            if link.is_live() {
                status.connected = true;
                status.connections += 1;
                status.rtt = Some(stats.path.rtt);
                status.mtu = Some(stats.path.current_mtu);
                status.remote = Some(link.remote());
                status.since = Some(link.since);
            }
        }
        status
    }

    /// Addresses to try, the one that last worked first.
    fn addresses(&self) -> Vec<String> {
        let state = self.state.lock();
        let mut addresses = state.info.addresses.clone();
        if let Some(at) = state.good.as_ref().and_then(|good| addresses.iter().position(|a| a == good)) {
            addresses[..=at].rotate_right(1);
        }
        addresses.truncate(ADDRESSES_MAX);
        addresses
    }

    fn dial_failed(&self, why: String, settings: &NetSettings) {
        let mut state = self.state.lock();
        if state.failures == 0 {
            info!(peer = %self.node, error = %why, "cannot reach the peer, will keep trying");
        } else {
            debug!(peer = %self.node, error = %why, "cannot reach the peer");
        }
        let pause = backoff(state.failures, settings, rand::random());
        state.failures = state.failures.saturating_add(1);
        state.retry_at = Some(Instant::now() + pause);
        state.last_error = Some(why);
        drop(state);
        self.progress.send_modify(|count| *count += 1);
    }
}

/// Pause after the given number of earlier failures; `chance` in `[0, 1)` spreads it over
/// 75 to 125 %, so that servers cut off together do not come back in step.
fn backoff(failures: u32, settings: &NetSettings, chance: f64) -> Duration {
    let doubled = settings.backoff_min.saturating_mul(1 << failures.min(16));
    doubled.min(settings.backoff_max).mul_f64(0.75 + chance / 2.0)
}

/// Keeps a connection to the peer alive, for as long as the peer is a member.
async fn keep_connected(shared: Arc<Shared>, peer: Arc<Peer>) {
    let courteous = shared.identity.node() > peer.node;
    if courteous {
        // Woken early when a caller waits.
        let _ = timeout(COURTESY, peer.wanted.notified()).await;
    }
    loop {
        if peer.live().is_some() {
            peer.wanted.notified().await;
            continue;
        }
        let retry_at = peer.state.lock().retry_at;
        let pause = retry_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
        if !pause.is_zero() {
            tokio::select! {
                () = sleep(pause) => {}
                () = peer.wanted.notified() => {}
            }
            continue;
        }
        let dialled = tokio::select! {
            dialled = dial(&shared, &peer) => dialled,
            // Only one of the two gives up its own dial for the other's, else both might.
            () = connected(&peer), if courteous => continue,
        };
        match dialled {
            Ok((connection, address)) => {
                peer.state.lock().good = Some(address);
                shared.admit(peer.node, connection);
            }
            // The peer may have reached us while we could not reach it.
            Err(_) if peer.live().is_some() => {}
            Err(why) => peer.dial_failed(why, &shared.settings),
        }
    }
}

async fn connected(peer: &Peer) {
    let mut progress = peer.progress.subscribe();
    while peer.live().is_none() {
        // The sender lives in the peer.
        let _ = progress.changed().await;
    }
}

/// Tries every address, each beside the slower ones before it; the first that works wins.
async fn dial(shared: &Shared, peer: &Peer) -> Result<(quinn::Connection, String), String> {
    let mut attempts = FuturesUnordered::new();
    for (rank, address) in (0u32..).zip(peer.addresses()) {
        attempts.push(async move {
            sleep(STAGGER * rank).await;
            match dial_address(shared, peer, &address).await {
                Ok(connection) => Ok((connection, address)),
                Err(why) => Err(format!("{address}: {why}")),
            }
        });
    }
    let mut failures = Vec::new();
    while let Some(attempt) = attempts.next().await {
        match attempt {
            Ok(connected) => return Ok(connected),
            Err(why) => failures.push(why),
        }
    }
    if failures.is_empty() { Err("no address is known".to_owned()) } else { Err(failures.join("; ")) }
}

async fn dial_address(shared: &Shared, peer: &Peer, address: &str) -> Result<quinn::Connection, String> {
    let found = resolve(address, shared.settings.dial_timeout).await?;
    let mut attempts = FuturesUnordered::new();
    for (rank, remote) in (0u32..).zip(found) {
        attempts.push(async move {
            sleep(STAGGER * rank).await;
            timeout(shared.settings.dial_timeout, connect(shared, peer, remote))
                .await
                .unwrap_or_else(|_| Err("no answer".to_owned()))
        });
    }
    let mut last = "the name has no address".to_owned();
    while let Some(attempt) = attempts.next().await {
        match attempt {
            Ok(connection) => return Ok(connection),
            Err(why) => last = why,
        }
    }
    Err(last)
}

/// The socket addresses behind a `host:port`.
pub(crate) async fn resolve(address: &str, limit: Duration) -> Result<Vec<SocketAddr>, String> {
    let found = timeout(limit, lookup_host(address))
        .await
        .map_err(|_| "the name was not resolved in time".to_owned())?
        .map_err(|error| error.to_string())?;
    Ok(found.take(RESOLVED_MAX).collect())
}

async fn connect(shared: &Shared, peer: &Peer, remote: SocketAddr) -> Result<quinn::Connection, String> {
    let tls = member_config(&shared.identity, &shared.trust, peer.node).map_err(|error| error.to_string())?;
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(shared.dial_transport.clone());
    let connecting = shared.endpoint.connect_with(config, remote, SERVER_NAME).map_err(|error| error.to_string())?;
    let connection = connecting.await.map_err(|error| error.to_string())?;
    // In TLS 1.3 the dialler is done before the other side has seen its certificate.
    let greeted = greet(&connection).await;
    peer.state.lock().refuses_us = match connection.close_reason() {
        // Its verifier refused our certificate, or it closed us out by name.
        Some(quinn::ConnectionError::ConnectionClosed(_)) => true,
        Some(quinn::ConnectionError::ApplicationClosed(close)) => close.error_code == quinn::VarInt::from_u32(NOT_A_MEMBER),
        _ => false,
    };
    greeted?;
    Ok(connection)
}

/// Closes a connection nobody will use.
pub(crate) fn turn_away(connection: &quinn::Connection) {
    connection.close(quinn::VarInt::from_u32(NOT_A_MEMBER), b"not a member");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_back_off_doubles_up_to_its_limit_and_is_spread() {
        let settings = NetSettings::default();
        assert_eq!(backoff(0, &settings, 0.5), Duration::from_millis(100));
        assert_eq!(backoff(1, &settings, 0.5), Duration::from_millis(200));
        for failures in 5..100 {
            assert_eq!(backoff(failures, &settings, 0.0), Duration::from_millis(1500));
            assert!(backoff(failures, &settings, 0.999) <= Duration::from_millis(2500));
        }
    }

    #[test]
    fn the_address_that_worked_is_tried_first() {
        let addresses = ["a:1", "b:1", "c:1"].map(str::to_owned).to_vec();
        let peer = Peer::new(PeerInfo { node: NodeId(1), key: [0; 32], addresses });
        assert_eq!(peer.addresses(), ["a:1", "b:1", "c:1"]);
        peer.state.lock().good = Some("c:1".to_owned());
        assert_eq!(peer.addresses(), ["c:1", "a:1", "b:1"]);
        peer.state.lock().good = Some("gone:1".to_owned());
        assert_eq!(peer.addresses(), ["a:1", "b:1", "c:1"]);
    }
}
