//! What the tasks of one server's consensus share, and the few questions all of them ask.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use ctfs_meta::SharedNamespace;
use ctfs_types::{Incarnation, LogIndex, NodeId};
use openraft::{EmptyNode, Raft, RaftMetrics, ServerState};
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    boottime::{BootTime, PatientClock},
    error::ProposeError,
    health::{Health, Space},
    ledger::Ledger,
    machine::StateMachine,
    messages,
    network::{QuorumClock, Transport, TransportError},
    proposer::{Doubts, Ticket},
    raft_types::{TypeConfig, log_index, log_index_of, node_id, raft_node},
    relay::Relay,
    settings::{Settings, Timings},
    stream::Stream,
    unseen::Unseen,
};

/// Pause after a call that failed at once, unless the leader changes before.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

pub(crate) type Metrics = RaftMetrics<u64, EmptyNode>;

/// Who leads, as far as this server knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct View {
    pub term: u64,
    pub leader: Option<NodeId>,
    /// Why openraft has ended.
    pub stopped: Option<String>,
}

/// A lease as its holder counts it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lease {
    pub until: BootTime,
    pub from: LogIndex,
}

/// How long a request that was asked more than once stays open: a copy of it may still be on its
/// way, and must find its verdict remembered.
const STRAY_COPIES: Duration = Duration::from_secs(60);

/// Numbers the commands of this life and remembers which are still under way.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    last: u64,
    /// Without an answer.
    open: BTreeSet<u64>,
    /// Ended, but copies may be about, which must find its verdict.
    stray: BTreeSet<u64>,
    /// Until when; oldest first.
    strays_end: VecDeque<(Instant, u64)>,
}

impl Numbers {
    /// The next `seq`, and the `answered` that goes with it.
    pub fn take(&mut self, now: Instant) -> (u64, u64) {
        while let Some(&(until, seq)) = self.strays_end.front()
            && until <= now
        {
            self.strays_end.pop_front();
            self.stray.remove(&seq);
        }
        self.last += 1;
        self.open.insert(self.last);
        let oldest = [&self.open, &self.stray].into_iter().filter_map(|numbers| numbers.first()).min();
        (self.last, oldest.copied().unwrap_or(self.last) - 1)
    }

    /// How many were numbered since the oldest that has no answer.
    pub fn span(&self) -> u64 {
        self.open.first().map_or(0, |oldest| self.last - oldest)
    }

    /// The request has ended; `once` if there is no copy of it anywhere any more.
    pub fn done(&mut self, seq: u64, once: bool, now: Instant) {
        self.open.remove(&seq);
        if !once {
            self.stray.insert(seq);
            self.strays_end.push_back((now + STRAY_COPIES, seq));
        }
    }
}

pub(crate) struct Core {
    pub settings: Settings,
    pub me: NodeId,
    /// Which life of this server; see [`Self::incarnation`].
    pub life: AtomicU64,
    /// The last life that was reported and has a journal.
    pub reported: watch::Sender<Incarnation>,
    /// Microseconds of the slowest round trip measured in this life.
    pub rtt: AtomicU64,
    pub health: Health,
    pub raft: Raft<TypeConfig>,
    pub replica: SharedNamespace,
    pub transport: Arc<dyn Transport>,
    pub clock: Arc<QuorumClock>,
    /// The clock of the ledger.
    pub patient: PatientClock,
    pub relay: Arc<Relay>,
    pub invalidated: watch::Receiver<LogIndex>,
    pub view: watch::Sender<View>,
    /// The leader alone, for others.
    pub leader_watch: watch::Sender<Option<NodeId>>,
    /// Never goes back.
    pub visible: watch::Sender<LogIndex>,
    pub unseen: Arc<Unseen>,
    pub committed: AtomicU64,
    /// There while this server leads.
    pub ledger: Mutex<Option<Ledger>>,
    /// Members that said last that their disk is short of room.
    pub short_of_room: Mutex<BTreeSet<NodeId>>,
    pub lease: watch::Sender<Option<Lease>>,
    /// The highest index a reader here waits to become visible.
    pub wanted: watch::Sender<LogIndex>,
    pub readers: mpsc::Sender<oneshot::Sender<Result<LogIndex, ProposeError>>>,
    /// Commands for the log, at the leader.
    pub entries: mpsc::Sender<Ticket>,
    /// Commands for the leader, elsewhere.
    pub outbox: mpsc::Sender<Ticket>,
    /// One permit for each command that waits for its answer.
    pub places: Arc<Semaphore>,
    pub numbers: Mutex<Numbers>,
    /// What happened here before it is in the log.
    pub stream: Stream,
    /// The next number of a request in the name of a life that has ended.
    pub left_seq: AtomicU64,
    pub doubts: Doubts,
    /// The leader refuses commands for which there must be room, as it said last.
    pub refuses_growth: AtomicBool,
    /// One change of membership at a time.
    pub changing: tokio::sync::Mutex<()>,
}

impl Core {
    /// The present life of this server: the client of its commands.
    pub fn incarnation(&self) -> Incarnation {
        Incarnation(self.life.load(Ordering::Relaxed))
    }

    /// A lease is renewed at least this often: by what this life was started with, and earlier when
    /// the others turn out to be further away.
    pub fn renew_every(&self) -> Duration {
        let measured = Duration::from_micros(self.rtt.load(Ordering::Relaxed));
        self.settings.timings.renew.min(Timings::for_rtt(measured).renew)
    }

    /// Learns from openraft who leads and who belongs to the cluster.
    pub fn observe(&self, metrics: &Metrics) {
        let applied = log_index_of(metrics.last_applied);
        self.relay.catch_up(applied);
        self.committed.fetch_max(applied.0, Ordering::Relaxed);
        // A failure of ours is the better reason; openraft only ends because of it.
        let ended = metrics.running_state.as_ref().err().map(ToString::to_string);
        if let Some(why) = self.health.failed().or(ended) {
            return self.stop(&why);
        }
        if self.stopped().is_some() {
            return;
        }
        self.keep_ledger(metrics, applied);
        let view = View { term: metrics.current_term, leader: metrics.current_leader.map(node_id), stopped: None };
        publish(&self.leader_watch, view.leader);
        publish(&self.view, view);
    }

    /// Ends this server's part for good: it leads nobody, reads nothing, answers nobody. The first
    /// reason stays.
    pub fn stop(&self, why: &str) {
        self.view.send_if_modified(|view| {
            view.leader = None;
            let first = view.stopped.is_none();
            view.stopped.get_or_insert_with(|| why.to_owned());
            first
        });
        *self.ledger.lock() = None;
        self.lease.send_replace(None);
        publish(&self.leader_watch, None);
    }

    /// Why this server must be silent to the others now: they shall do without it.
    pub fn silent(&self) -> Option<String> {
        if let Some(why) = &self.view.borrow().stopped {
            return Some(format!("consensus has stopped: {why}"));
        }
        if self.health.waits() {
            return Some("the disk of the log is full".to_owned());
        }
        let busy = self.health.busy_for();
        (busy > self.settings.timings.election_max * 2).then(|| format!("the disk of the log has not answered for {busy:?}"))
    }

    /// At the leader: whether so many voters are short of room that the others are no majority.
    /// Fewer do no harm; when their disks are full, the volume goes on without them.
    pub fn is_short_of_room(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let own = self.health.space() != Space::Enough;
        let short = self.short_of_room.lock();
        let is_short = |node: &&u64| if **node == raft_node(self.me) { own } else { short.contains(&node_id(**node)) };
        let configs = metrics.membership_config.membership().get_joint_config();
        configs.iter().any(|voters| voters.iter().filter(is_short).count() * 2 >= voters.len())
    }

    /// The ledger lives exactly as long as this server's leadership of one term.
    fn keep_ledger(&self, metrics: &Metrics, applied: LogIndex) {
        let mut ledger = self.ledger.lock();
        if !leads(metrics, self.me) {
            *ledger = None;
            return;
        }
        let now = self.patient.now();
        let nodes = || metrics.membership_config.nodes().map(|(&node, _)| node_id(node)).collect::<BTreeSet<_>>();
        if ledger.as_ref().is_none_or(|ledger| ledger.term != metrics.current_term) {
            tracing::info!(node = %self.me, term = metrics.current_term, "leading");
            let last_log = metrics.last_log_index.map_or(LogIndex(0), log_index);
            let visible = *self.visible.borrow();
            *ledger = Some(Ledger::open(
                metrics.current_term,
                &nodes(),
                last_log,
                applied,
                visible,
                &self.settings.timings,
                now,
            ));
        }
        // A membership that is not committed may be forgotten by the next leader, who would then
        // not wait for a lease granted under it.
        let committed = metrics.membership_config.log_id().is_none_or(|id| Some(id) <= metrics.last_applied);
        if let (true, Some(ledger)) = (committed, ledger.as_mut()) {
            ledger.members(&nodes(), now);
        }
    }

    pub fn leader(&self) -> Option<NodeId> {
        self.view.borrow().leader
    }

    pub fn leads(&self) -> bool {
        self.leader() == Some(self.me)
    }

    pub fn stopped(&self) -> Option<ProposeError> {
        self.view.borrow().stopped.clone().map(ProposeError::Stopped)
    }

    pub fn raise_visible(&self, index: LogIndex) {
        self.visible.send_if_modified(|visible| {
            let news = index > *visible;
            *visible = index.max(*visible);
            self.unseen.visible(*visible);
            news
        });
    }

    /// When the last message was sent that a quorum acknowledged; `None` when this server does
    /// not lead.
    pub fn quorum_acked(&self, now: BootTime) -> Option<BootTime> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        if !leads(&metrics, self.me) {
            return None;
        }
        let configs = metrics.membership_config.membership().get_joint_config();
        self.clock.quorum(metrics.current_term, configs, raft_node(self.me), now)
    }

    /// Calls the leader, who is another server, and gives up when the leader changes.
    pub async fn call_leader<T: serde::de::DeserializeOwned>(
        &self,
        leader: NodeId,
        service: u16,
        payload: Vec<u8>,
        deadline: Instant,
    ) -> Result<T, TransportError> {
        let mut view = self.view.subscribe();
        let patience = deadline.saturating_duration_since(Instant::now());
        let call = timeout(patience, self.transport.call(leader, service, payload, patience));
        tokio::select! {
            answer = call => {
                let answer = answer.map_err(|_| TransportError::Deadline)??;
                messages::decode(&answer).map_err(|error| TransportError::Refused(error.to_string()))
            }
            _ = view.wait_for(|view| view.leader != Some(leader)) => Err(TransportError::Unreachable),
        }
    }

    /// Waits for news of the leader, `RETRY_PAUSE` at most when `leader` is known and failed.
    pub async fn await_other_leader(&self, leader: Option<NodeId>, deadline: Instant) {
        let mut view = self.view.subscribe();
        let until = if leader.is_some() { deadline.min(Instant::now() + RETRY_PAUSE) } else { deadline };
        let news = |view: &View| view.leader != leader || view.stopped.is_some();
        // Either way the caller looks again.
        let _ = timeout_at(until, view.wait_for(news)).await;
    }

    pub async fn await_applied(&self, index: LogIndex, deadline: Instant) -> bool {
        at_least(&mut self.relay.watch_applied(), index, deadline).await
    }

    pub async fn await_visible(&self, index: LogIndex, deadline: Instant) -> bool {
        at_least(&mut self.visible.subscribe(), index, deadline).await
    }

    /// Entries each member lacks, as the leader knows.
    pub fn lags(metrics: &Metrics) -> BTreeMap<u64, (LogIndex, u64)> {
        let last = metrics.last_log_index.map_or(LogIndex(0), log_index);
        let lag = |matched: LogIndex| (matched, last.0.saturating_sub(matched.0));
        let replication = metrics.replication.iter().flatten();
        let mut lags: BTreeMap<_, _> =
            replication.map(|(&node, &matched)| (node, lag(log_index_of(matched)))).collect();
        if metrics.replication.is_some() {
            lags.insert(metrics.id, lag(last));
        }
        lags
    }
}

fn publish<T: PartialEq>(watch: &watch::Sender<T>, value: T) {
    watch.send_if_modified(|known| {
        let news = *known != value;
        *known = value;
        news
    });
}

fn leads(metrics: &Metrics, me: NodeId) -> bool {
    metrics.running_state.is_ok()
        && metrics.state == ServerState::Leader
        && metrics.current_leader == Some(raft_node(me))
}

async fn at_least(watch: &mut watch::Receiver<LogIndex>, index: LogIndex, deadline: Instant) -> bool {
    matches!(timeout_at(deadline, watch.wait_for(|now| *now >= index)).await, Ok(Ok(_)))
}

/// Tells openraft's news to the core until openraft ends.
pub(crate) async fn follow(core: Arc<Core>, mut metrics: watch::Receiver<Metrics>) {
    loop {
        let now = metrics.borrow_and_update().clone();
        core.observe(&now);
        if metrics.changed().await.is_err() {
            core.stop("openraft has ended");
            return;
        }
    }
}

/// Ends this server's part when its disk, its store or the state machine has failed: openraft may
/// not have noticed, and would go on sending heartbeats.
pub(crate) async fn end_when_failed(core: Arc<Core>, machine: StateMachine) {
    let mut failed = core.health.watch_failed();
    let why = match failed.wait_for(Option::is_some).await {
        Ok(why) => why.clone().unwrap_or_default(),
        Err(_) => return,
    };
    core.stop(&why);
    // Whether it could be marked or not, the others must not wait for us.
    let _ = ctfs_host::blocking(move || machine.poison_failed_store()).await;
    if let Err(error) = core.raft.shutdown().await {
        tracing::warn!(%error, "openraft broke down");
    }
}

/// A server that comes back from a full disk has heard nobody for long. It must hear its leader
/// before it may stand for election, or its higher term would depose that one.
pub(crate) async fn hold_back(core: Arc<Core>) {
    let mut waiting = core.health.watch_waiting();
    while waiting.wait_for(|waiting| *waiting).await.is_ok() {
        core.raft.runtime_config().elect(false);
        if waiting.wait_for(|waiting| !*waiting).await.is_err() {
            return;
        }
        sleep(core.settings.timings.election_max * 2).await;
        core.raft.runtime_config().elect(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answered_stays_below_the_oldest_open_request() {
        let (mut numbers, now) = (Numbers::default(), Instant::now());
        assert_eq!(numbers.take(now), (1, 0));
        assert_eq!(numbers.take(now), (2, 0));
        numbers.done(2, true, now);
        assert_eq!(numbers.take(now), (3, 0));
        numbers.done(1, true, now);
        assert_eq!(numbers.take(now), (4, 2));
        numbers.done(3, true, now);
        numbers.done(4, true, now);
        assert_eq!(numbers.take(now), (5, 4));
    }

    #[test]
    fn a_request_asked_twice_keeps_its_verdict_a_while() {
        let (mut numbers, now) = (Numbers::default(), Instant::now());
        numbers.take(now);
        numbers.done(1, false, now);
        assert_eq!(numbers.take(now), (2, 0));
        numbers.done(2, true, now);
        assert_eq!(numbers.take(now + STRAY_COPIES), (3, 2));
    }
}
