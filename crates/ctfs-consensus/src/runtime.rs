//! One server's consensus, started: what the rest of the program holds.

use std::{
    collections::BTreeSet,
    future::Future,
    sync::{Arc, atomic::{AtomicBool, AtomicU64}},
    time::Duration,
};

use ctfs_journal::{Depth, Journal};
use ctfs_meta::{Command, Durability, MetaError, Op, Reply, SharedNamespace, Subject};
use ctfs_types::{FileBytes, Holder, Incarnation, Ino, LogIndex, NodeId};
use openraft::{
    Config, Raft, SnapshotPolicy, Vote,
    raft::{AppendEntriesRequest, InstallSnapshotRequest, VoteRequest, VoteResponse},
};
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    boottime::{BootTime, PatientClock},
    core::{self, Core, Numbers, View},
    error::{ProposeError, StartError},
    health::Space,
    messages::{self, AwaitVisible, Forward, ReadIndex, Renew, service},
    network::{PeerNetwork, QuorumClock, Transport, encode_result},
    observer::Observer,
    proposer::{self, Doubts, Request},
    raft_types::{TypeConfig, raft_node},
    relay::Relay,
    replay::{self, Replayed},
    second::Second,
    settings::{Limits, Settings, Timings},
    status::ConsensusStatus,
    storage::Storage,
    stream::{self, Happened, Stream},
    visibility,
};

/// Waits of a shutdown, each.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(5);

/// One server's part in the replicated log. Clones are the same server.
#[derive(Clone)]
pub struct Consensus {
    pub(crate) core: Arc<Core>,
    tasks: Arc<Tasks>,
}

/// The running tasks; they end with the last clone of [`Consensus`].
struct Tasks(Mutex<Vec<JoinHandle<()>>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.get_mut().iter().for_each(JoinHandle::abort);
    }
}

impl Consensus {
    /// Opens the log and the state in `settings.dir` and takes part from now on.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(
        settings: Settings,
        transport: Arc<dyn Transport>,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, StartError> {
        let config = raft_config(&settings.timings, &settings.limits)?;
        let relay = Relay::new(observer.clone());
        let (dir, sizes, told) = (settings.dir.clone(), settings.storage.clone(), relay.clone());
        let storage = ctfs_host::blocking(move || Storage::open(&dir, &sizes, told))
            .await
            .map_err(|error| StartError::Raft(error.to_string()))??;
        let clock = Arc::new(QuorumClock::default());
        let network = PeerNetwork { me: raft_node(settings.node), transport: transport.clone(), clock: clock.clone() };
        let machine = storage.machine.clone();
        let raft = Raft::new(raft_node(settings.node), Arc::new(config), network, storage.log, storage.machine)
            .await
            .map_err(|error| StartError::Raft(error.to_string()))?;

        let queued = settings.limits.queued_commands;
        let (readers, readers_queue) = mpsc::channel(queued);
        let (entries, entries_queue) = mpsc::channel(queued);
        let (outbox, outbox_queue) = mpsc::channel(queued);
        let core = Arc::new(Core {
            me: settings.node,
            life: AtomicU64::new(settings.incarnation.0),
            reported: watch::Sender::new(Incarnation(0)),
            rtt: AtomicU64::new(0),
            health: storage.health,
            raft: raft.clone(),
            replica: storage.replica,
            transport,
            clock,
            patient: PatientClock::new(),
            relay,
            invalidated: observer.invalidated(),
            view: watch::Sender::new(View::default()),
            leader_watch: watch::Sender::new(None),
            visible: watch::Sender::new(LogIndex(0)),
            unseen: machine.unseen(),
            committed: AtomicU64::new(0),
            ledger: Mutex::new(None),
            short_of_room: Mutex::default(),
            lease: watch::Sender::new(None),
            wanted: watch::Sender::new(LogIndex(0)),
            readers,
            entries,
            outbox,
            places: Arc::new(Semaphore::new(queued)),
            numbers: Mutex::new(Numbers::default()),
            stream: Stream::default(),
            left_seq: AtomicU64::new(replay::first_seq()),
            doubts: Doubts::default(),
            refuses_growth: AtomicBool::new(false),
            changing: tokio::sync::Mutex::new(()),
            settings,
        });
        // openraft answers this only after it has published its state for the first time.
        raft.is_initialized().await.map_err(|error| StartError::Raft(error.to_string()))?;
        core.observe(&raft.metrics().borrow().clone());

        let tasks = vec![
            spawn(core::follow(core.clone(), raft.metrics())),
            spawn(core::end_when_failed(core.clone(), machine)),
            spawn(core::hold_back(core.clone())),
            spawn(visibility::renew(core.clone())),
            spawn(visibility::lapse(core.clone())),
            spawn(visibility::chase(core.clone())),
            spawn(visibility::serve_readers(core.clone(), readers_queue)),
            spawn(proposer::pack(core.clone(), entries_queue)),
            spawn(proposer::forward(core.clone(), outbox_queue)),
            spawn(stream::run(core.clone())),
            spawn(stream::reserve_numbers(core.clone())),
            spawn(proposer::end_doubts(core.clone())),
        ];
        Ok(Self { core, tasks: Arc::new(Tasks(Mutex::new(tasks))) })
    }

    /// Whether this server belongs to a volume: it founded one, or was made a member of one.
    pub fn is_initialized(&self) -> bool {
        let metrics = self.core.raft.metrics();
        let metrics = metrics.borrow();
        metrics.last_log_index.is_some() || metrics.membership_config.voter_ids().next().is_some()
    }

    /// Makes this server the first of a new volume, with itself as the only voter, and proposes
    /// `command`, an [`Op::Found`]. May be repeated after an interruption.
    ///
    /// # Errors
    /// [`ProposeError::Refused`] when the volume was founded before; else as [`Self::propose`].
    pub async fn found(&self, command: Op) -> Result<(), ProposeError> {
        self.core.found(command).await
    }

    /// The local copy of the namespace. Read it after [`Self::barrier`].
    pub fn incarnation(&self) -> Incarnation {
        self.core.incarnation()
    }

    /// From here on this server speaks in a new life. Commands proposed before are of the old one.
    pub fn begin_life(&self, incarnation: Incarnation) {
        self.core.life.store(incarnation.0, std::sync::atomic::Ordering::Relaxed);
    }

    /// The slowest round trip to another server, as measured now: leases are renewed in time for it.
    /// Elections keep what this life was started with.
    pub fn set_rtt(&self, rtt: Duration) {
        let micros = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
        self.core.rtt.store(micros, std::sync::atomic::Ordering::Relaxed);
    }

    /// The local replica.
    pub fn replica(&self) -> SharedNamespace {
        self.core.replica.clone()
    }

    /// Proposes `op` and answers with its verdict when it is visible on every leased server and
    /// applied here. It happens at most once, whatever is retried on the way.
    ///
    /// # Errors
    /// - [`ProposeError::NoQuorum`]: no answer within [`Timings::propose_deadline`]; it may still
    ///   happen later.
    /// - [`ProposeError::TooLarge`], [`ProposeError::NoSpace`]: it did not happen.
    /// - [`ProposeError::Stopped`]: it may have happened.
    pub async fn propose(&self, op: Op) -> Result<Result<Reply, MetaError>, ProposeError> {
        self.core.propose(op).await
    }

    /// Has `op` happen at once, here, if this server alone may do that; it follows into the log.
    /// `None`: it must be proposed.
    pub fn happen(&self, op: &Op) -> Option<Happened> {
        self.core.happen(op)
    }

    /// From here on nothing happens ahead of the log by these directories, which are about to be given up;
    /// what only this server knows of locks there is on its way to the log.
    pub fn close_ahead(&self, dirs: &[Ino]) {
        self.core.close_ahead(dirs);
    }

    /// The life was reported: from here on what happens here is written down there. Without a journal nothing
    /// does, and where this server may act ahead of the log it holds and locks nothing.
    pub fn set_journal(&self, journal: Arc<Journal>) {
        let life = journal.id().incarnation;
        self.core.stream.set_journal(journal);
        self.core.reported.send_replace(life);
    }

    /// From here on what shall be on two disks is on this server's and on that one's.
    pub fn set_second(&self, second: Second) {
        self.core.stream.second.send_replace(second);
    }

    /// Sends commands that a life left in its journal, in their order: an earlier one of this server,
    /// before the new one is reported, or one that was ended and whose pair this is. `by` is the life that sends
    /// them; all that was left is sent by one.
    ///
    /// # Errors
    /// [`ProposeError::NoQuorum`], [`ProposeError::NoSpace`], [`ProposeError::Stopped`]: send all of them
    /// again later.
    pub async fn replay(&self, by: Holder, commands: Vec<Command>) -> Result<Replayed, ProposeError> {
        self.core.replay(by, commands).await
    }

    /// As [`Self::replay`], something that the life did not say itself: what its journal means.
    ///
    /// # Errors
    /// As [`Self::replay`]; it may have happened.
    pub async fn propose_left(&self, by: Holder, life: Incarnation, op: Op) -> Result<Result<Reply, MetaError>, ProposeError> {
        self.core.propose_left(by, life, op).await
    }

    /// Writes bytes of a file into the journal of this life, and answers where; `None`: there is none, or
    /// it has no room. Others must not have the file meanwhile.
    pub fn write_down(&self, bytes: &FileBytes) -> Option<u64> {
        self.core.write_down(bytes)
    }

    /// The metadata have what was written down of a file up to there, or the file is gone.
    pub fn let_go(&self, ino: Ino, upto: u64) {
        self.core.let_go(ino, upto);
    }

    /// What the journal has before this position is needed by nobody.
    pub fn kept_from(&self) -> u64 {
        self.core.kept_from()
    }

    /// Whether what is in the journal counts as being on as many disks as asked for, once it is there.
    pub fn journal_counts(&self, class: Durability) -> bool {
        self.core.journal_counts(class)
    }

    /// Returns when all that happened and was written down here before the call is on as many disks as
    /// asked for. `false`: the journal alone does not do that now.
    ///
    /// # Errors
    /// [`ProposeError::LifeEnded`]: some of it is lost, and who asks for it has not been told. As
    /// [`Self::barrier`].
    pub async fn durable(&self, class: Durability) -> Result<bool, ProposeError> {
        self.core.durable(class).await
    }

    /// How much is in the journal of this life.
    pub fn journal_depth(&self) -> Option<Depth> {
        self.core.stream.journal.lock().as_ref().map(|journal| journal.depth())
    }

    /// Returns when everything that happened here before the call is in the log and visible.
    ///
    /// # Errors
    /// [`ProposeError::LifeEnded`]: some of it is lost. [`ProposeError::NoQuorum`] when nothing more came so far for
    /// [`Timings::propose_deadline`], [`ProposeError::Stopped`].
    pub async fn await_streamed(&self) -> Result<(), ProposeError> {
        self.core.await_streamed().await
    }

    /// After this life was ended: takes back what happened here and is not in the log. Answers the
    /// commands that are lost, and the journal of that life: until the next one is set nothing happens here.
    pub fn end_stream(&self) -> (Vec<Command>, Option<Arc<Journal>>) {
        self.core.end_stream()
    }

    /// Whoever had something open that is lost will hear of it: until then nobody is told that all is in
    /// the log.
    pub fn lost_is_told(&self) {
        self.core.lost_is_told();
    }

    /// Commands that have happened here and are not in the log yet.
    pub fn streaming(&self) -> u64 {
        self.core.stream.depth()
    }

    /// A request of which the outcome can be found out when a proposal ended without one.
    pub fn request(&self) -> Request {
        Request::new(self.core.clone())
    }

    /// After this a read of [`Self::replica`] sees every change answered before the call, and
    /// nothing that another server may not show yet. At once while leased and quiet.
    ///
    /// A lease can lapse between this and the read: [`Self::leased`] after the read tells.
    ///
    /// # Errors
    /// [`ProposeError::NoQuorum`] after [`Timings::barrier_deadline`], [`ProposeError::Stopped`].
    pub async fn barrier(&self) -> Result<(), ProposeError> {
        self.core.barrier().await
    }

    /// Whether this server holds a read lease right now.
    pub fn leased(&self) -> bool {
        self.core.leased()
    }

    /// For how long the read lease still holds if it is not renewed; zero without one.
    pub fn leased_for(&self) -> Duration {
        self.core.leased_for()
    }

    /// Returns when this server had a read lease and has none any more.
    pub async fn lease_lapsed(&self) {
        self.core.lease_lapsed().await;
    }

    /// The last entry that the local replica shows, if it may not be answered from yet. Under the
    /// replica's lock.
    pub fn ahead(&self) -> Option<LogIndex> {
        self.core.unseen.ahead()
    }

    /// The last change of `subject`, if it may not be answered yet. Under the replica's lock.
    pub fn unseen_change(&self, subject: &Subject) -> Option<LogIndex> {
        self.core.unseen.change_of(subject)
    }

    /// Returns when every leased server has applied and invalidated entry `index`.
    ///
    /// # Errors
    /// As [`Self::barrier`].
    pub async fn await_visible(&self, index: LogIndex) -> Result<(), ProposeError> {
        self.core.seen(index).await
    }

    /// How far the local replica has come.
    pub fn applied(&self) -> watch::Receiver<LogIndex> {
        self.core.relay.watch_applied()
    }

    /// Known here to be applied and invalidated on every leased server.
    pub fn visible(&self) -> watch::Receiver<LogIndex> {
        self.core.visible.subscribe()
    }

    pub fn status(&self) -> ConsensusStatus {
        self.core.status()
    }

    /// Changes with every change of leader.
    pub fn leader(&self) -> watch::Receiver<Option<NodeId>> {
        self.core.leader_watch.subscribe()
    }

    /// Brings the membership to exactly these voters and learners: adds who is missing as a
    /// learner, waits until new voters have nearly the whole log, changes the voters through a
    /// joint membership, and removes who is not wanted any more. Only at the leader. Returns
    /// quickly when it is so already; after an error it may be asked again.
    ///
    /// Removing a server takes up to one lease.
    ///
    /// # Errors
    /// [`ProposeError::NotLeader`], [`ProposeError::ChangeInProgress`],
    /// [`ProposeError::CatchingUp`], [`ProposeError::BadMembership`], [`ProposeError::NoQuorum`],
    /// [`ProposeError::Stopped`].
    pub async fn set_membership(
        &self,
        voters: BTreeSet<NodeId>,
        learners: BTreeSet<NodeId>,
    ) -> Result<(), ProposeError> {
        self.core.set_membership(voters, learners).await
    }

    /// Answers a call of another server.
    ///
    /// # Errors
    /// A text for the log of the caller: the message does not decode, breaks a limit, or speaks
    /// for another server than the one it came from; or this server takes no part now, and the
    /// others shall do without it.
    pub async fn serve(&self, from: NodeId, service: u16, payload: Vec<u8>) -> Result<Vec<u8>, String> {
        let core = &self.core;
        if let Some(why) = core.silent() {
            return Err(why);
        }
        match service {
            service::APPEND_ENTRIES => {
                let rpc: AppendEntriesRequest<TypeConfig> = decode(&payload)?;
                speaks_for_itself(from, &rpc.vote)?;
                Ok(encode_result(&core.raft.append_entries(rpc).await))
            }
            service::VOTE => {
                let rpc: VoteRequest<u64> = decode(&payload)?;
                speaks_for_itself(from, &rpc.vote)?;
                match self.refuse_vote() {
                    Some(refusal) => Ok(encode_result::<_, openraft::error::Infallible>(&Ok(refusal))),
                    None => Ok(encode_result(&core.raft.vote(rpc).await)),
                }
            }
            service::INSTALL_SNAPSHOT => {
                let rpc: InstallSnapshotRequest<TypeConfig> = decode(&payload)?;
                speaks_for_itself(from, &rpc.vote)?;
                if core.health.space() != Space::Enough {
                    return Err("too little room on the disk for a snapshot".to_owned());
                }
                Ok(encode_result(&core.raft.install_snapshot(rpc).await))
            }
            service::FORWARD => {
                let message: Forward = decode(&payload)?;
                Ok(messages::encode(&core.forwarded(message).await?))
            }
            service::RENEW => Ok(messages::encode(&core.heard(from, &decode::<Renew>(&payload)?))),
            service::READ_INDEX => {
                let question: ReadIndex = decode(&payload)?;
                Ok(messages::encode(&core.read_index(question.applied, question.patience).await))
            }
            service::AWAIT_VISIBLE => {
                let question: AwaitVisible = decode(&payload)?;
                Ok(messages::encode(&core.visible_at(&question).await))
            }
            _ => Err(format!("no consensus service {service:#06x}")),
        }
    }

    /// openraft's followers refuse their vote while they hear their leader, but a leader would
    /// give its own. One that a quorum still hears keeps it: leases rest on the promise that no
    /// majority votes within `election_max` of the last heartbeat it acknowledged.
    fn refuse_vote(&self) -> Option<VoteResponse<u64>> {
        let now = BootTime::now();
        let acked = self.core.quorum_acked(now)?;
        if now.since(acked) > self.core.settings.timings.election_max {
            return None;
        }
        let vote = self.core.raft.metrics().borrow().vote;
        let last_log = self.core.raft.data_metrics().borrow().last_log;
        Some(VoteResponse::new(vote, last_log, false))
    }

    /// Ends this server's part. Bounded; what was acknowledged is durable without it.
    pub async fn shutdown(&self) {
        let tasks = std::mem::take(&mut *self.tasks.0.lock());
        self.core.health.stop();
        if timeout(SHUTDOWN_PATIENCE, self.core.raft.shutdown()).await.is_err() {
            tracing::warn!(node = %self.core.me, "openraft did not end in time");
        }
        for task in tasks {
            task.abort();
            // Ends by the abort, if not of itself.
            let _ = timeout(SHUTDOWN_PATIENCE, task).await;
        }
        self.core.places.close();
    }
}

fn spawn(task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(task)
}

fn decode<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, String> {
    messages::decode(payload).map_err(|error| error.to_string())
}

/// A member must not lead or stand for election in another's name.
fn speaks_for_itself(from: NodeId, vote: &Vote<u64>) -> Result<(), String> {
    if vote.leader_id().voted_for() == Some(raft_node(from)) {
        return Ok(());
    }
    tracing::warn!(peer = %from, %vote, "peer speaks for another server; refused");
    Err("this message speaks for another server".to_owned())
}

fn raft_config(timings: &Timings, limits: &Limits) -> Result<Config, StartError> {
    if limits.queued_commands < limits.entry_commands {
        return Err(StartError::Settings("fewer places for commands than one entry takes".to_owned()));
    }
    if timings.lease_used >= timings.lease || timings.renew >= timings.lease_used {
        return Err(StartError::Settings("a lease must outlast its use, and its use its renewal".to_owned()));
    }
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Config {
        cluster_name: "ctfs".to_owned(),
        heartbeat_interval: millis(timings.heartbeat),
        election_timeout_min: millis(timings.election_min),
        election_timeout_max: millis(timings.election_max),
        install_snapshot_timeout: millis(timings.install_snapshot),
        max_payload_entries: limits.append_entries,
        replication_lag_threshold: limits.replication_lag,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(limits.snapshot_entries),
        snapshot_max_chunk_size: limits.snapshot_part_bytes,
        max_in_snapshot_log_to_keep: limits.log_entries_kept,
        ..Config::default()
    }
    .validate()
    .map_err(|error| StartError::Settings(error.to_string()))
}
