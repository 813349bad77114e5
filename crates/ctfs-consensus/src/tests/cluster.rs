//! Several servers in one process, with links that can be cut.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ctfs_meta::{Change, ClusterIdentity, MetaError, Member, MemberState, NewContent, NewNode, Op, Reply};
use ctfs_types::{FileName, Incarnation, Ino, LogIndex, NodeId, Timestamp};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::{Consensus, Observer, ProposeError, Settings, StartError, StorageError, Timings, Transport, TransportError};

/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Shorter than the defaults, so that tests need not wait long; long enough for a busy machine.
pub fn timings() -> Timings {
    Timings {
        heartbeat: Duration::from_millis(150),
        election_min: Duration::from_millis(400),
        election_max: Duration::from_millis(700),
        lease: Duration::from_millis(1800),
        lease_used: Duration::from_millis(1200),
        renew: Duration::from_millis(400),
        barrier_deadline: Duration::from_millis(2500),
        ..Timings::default()
    }
}

/// A kernel that hears of changes at once, unless it is held up.
pub struct Kernel {
    pub installed: AtomicU32,
    heard: watch::Sender<LogIndex>,
    told: watch::Sender<LogIndex>,
    stuck: watch::Sender<bool>,
}

impl Kernel {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            installed: AtomicU32::new(0),
            heard: watch::Sender::new(LogIndex(0)),
            told: watch::Sender::new(LogIndex(0)),
            stuck: watch::Sender::new(false),
        })
    }

    pub fn stick(&self, stuck: bool) {
        self.stuck.send_replace(stuck);
        self.tell();
    }

    fn tell(&self) {
        if !*self.stuck.borrow() {
            self.told.send_replace(*self.heard.borrow());
        }
    }
}

impl Observer for Kernel {
    fn applied(&self, index: LogIndex, _changes: Vec<(u64, Change)>) {
        assert!(self.heard.send_replace(index) < index, "notices come in log order");
        self.tell();
    }

    fn happened(&self, _: &[Change]) {}

    fn installed_snapshot(&self) {
        self.installed.fetch_add(1, Ordering::Relaxed);
    }

    fn invalidated(&self) -> watch::Receiver<LogIndex> {
        self.told.subscribe()
    }
}

/// The wires.
#[derive(Default)]
struct Hub {
    running: Mutex<BTreeMap<NodeId, Consensus>>,
    /// Directed; what is sent over a cut link is never answered.
    cut: Mutex<BTreeSet<(NodeId, NodeId)>>,
    calls: AtomicU64,
    /// Milliseconds that every answer takes.
    round_trip: AtomicU64,
}

struct Link {
    me: NodeId,
    hub: Arc<Hub>,
}

impl Link {
    fn cut(&self, to: NodeId) -> bool {
        let cut = self.hub.cut.lock();
        cut.contains(&(self.me, to)) || cut.contains(&(to, self.me))
    }
}

#[async_trait]
impl Transport for Link {
    async fn call(&self, to: NodeId, service: u16, payload: Vec<u8>, deadline: Duration) -> Result<Vec<u8>, TransportError> {
        assert!(payload.len() <= 2 << 20, "a call of {} bytes to {service:#x}", payload.len());
        self.hub.calls.fetch_add(1, Ordering::Relaxed);
        let Some(target) = self.hub.running.lock().get(&to).cloned() else { return Err(TransportError::Unreachable) };
        let served = async {
            if !self.cut(to) {
                let answer = target.serve(self.me, service, payload).await;
                sleep(Duration::from_millis(self.hub.round_trip.load(Ordering::Relaxed))).await;
                if !self.cut(to) {
                    return answer.map_err(TransportError::Refused);
                }
            }
            sleep(deadline * 2).await;
            Err(TransportError::Deadline)
        };
        timeout(deadline, served).await.unwrap_or(Err(TransportError::Deadline))
    }

    fn reachable(&self, to: NodeId) -> bool {
        self.hub.running.lock().contains_key(&to) && !self.cut(to)
    }
}

pub struct Cluster {
    hub: Arc<Hub>,
    dirs: BTreeMap<NodeId, TempDir>,
    pub kernels: BTreeMap<NodeId, Arc<Kernel>>,
    lives: u64,
    adjust: fn(&mut Settings),
}

pub fn node(number: u64) -> NodeId {
    NodeId(number)
}

pub fn nodes(numbers: impl IntoIterator<Item = u64>) -> BTreeSet<NodeId> {
    numbers.into_iter().map(NodeId).collect()
}

pub fn found() -> Op {
    Op::Found {
        cluster: ClusterIdentity { id: [7; 16], name: "brave-otter".to_owned(), ca_certificate: vec![1, 2, 3] },
        member: Member {
            node: node(1),
            name: "one".to_owned(),
            zone: String::new(),
            key: [1; 32],
            addresses: vec!["127.0.0.1:1".to_owned()],
            capacity: 1 << 30,
            state: MemberState::Active,
            incarnation: Incarnation(1),
            version: "0".to_owned(),
            fenced: false,
            pair: None,
            joined: Timestamp::EPOCH,
        },
    }
}

pub fn file_name(name: &str) -> FileName {
    FileName::new(name.as_bytes()).unwrap()
}

pub fn make(name: &str) -> Op {
    let node = NewNode { content: NewContent::File, mode: 0o644, umask: 0, uid: 0, gid: 0, exclusive: true, holder: None, ino: None, cell: None };
    Op::Make { parent: Ino::ROOT, name: file_name(name), node }
}

pub fn has(server: &Consensus, name: &str) -> bool {
    server.replica().read().lookup(Ino::ROOT, &file_name(name)).unwrap().is_some()
}

impl Cluster {
    /// A volume with one server.
    pub async fn founded(adjust: fn(&mut Settings)) -> Self {
        let mut cluster = Self {
            hub: Arc::default(),
            dirs: BTreeMap::new(),
            kernels: BTreeMap::new(),
            lives: 0,
            adjust,
        };
        let first = cluster.start(node(1)).await;
        assert!(!first.is_initialized());
        first.found(found()).await.unwrap();
        assert!(first.is_initialized());
        cluster
    }

    /// `count` voters, all leased.
    pub async fn of(count: u64, adjust: fn(&mut Settings)) -> Self {
        let mut cluster = Self::founded(adjust).await;
        for number in 2..=count {
            cluster.start(node(number)).await;
        }
        cluster.get(node(1)).set_membership(nodes(1..=count), nodes([])).await.unwrap();
        cluster.all_leased().await;
        cluster
    }

    /// Starts a server, or starts it again on what it left.
    pub async fn start(&mut self, number: NodeId) -> Consensus {
        let began = Instant::now();
        self.lives += 1;
        let dir = self.dirs.entry(number).or_insert_with(|| TempDir::new().unwrap());
        let mut settings = Settings::new(dir.path(), number, Incarnation(self.lives));
        settings.timings = timings();
        settings.storage.cache_bytes = 4 << 20;
        (self.adjust)(&mut settings);
        let (server, kernel) = loop {
            let kernel = Kernel::new();
            let link = Arc::new(Link { me: number, hub: self.hub.clone() });
            match Consensus::start(settings.clone(), link, kernel.clone()).await {
                Ok(server) => break (server, kernel),
                // Tasks of the life before that were inside a call drop the store a little later.
                Err(StartError::Storage(StorageError::Locked { .. })) if began.elapsed() < PATIENCE => {
                    tokio::task::yield_now().await;
                }
                Err(error) => panic!("{error}"),
            }
        };
        self.kernels.insert(number, kernel);
        self.hub.running.lock().insert(number, server.clone());
        server
    }

    /// The server ends; nobody hears of it any more.
    pub async fn kill(&self, number: NodeId) {
        let server = self.hub.running.lock().remove(&number).unwrap();
        server.shutdown().await;
    }

    pub fn get(&self, number: NodeId) -> Consensus {
        self.hub.running.lock()[&number].clone()
    }

    pub fn running(&self) -> Vec<Consensus> {
        self.hub.running.lock().values().cloned().collect()
    }

    pub fn isolate(&self, number: NodeId) {
        let others = self.dirs.keys().filter(|other| **other != number);
        self.hub.cut.lock().extend(others.map(|other| (number, *other)));
    }

    pub fn heal(&self) {
        self.hub.cut.lock().clear();
    }

    /// From now on every call between servers takes so long.
    pub fn move_apart(&self, round_trip: Duration) {
        self.hub.round_trip.store(round_trip.as_millis() as u64, Ordering::Relaxed);
    }

    pub fn calls(&self) -> u64 {
        self.hub.calls.load(Ordering::Relaxed)
    }

    /// Waits for a leader that at least half of `among` agree on and that leads itself.
    pub async fn leader(&self, among: &[NodeId]) -> Consensus {
        let servers: Vec<Consensus> = among.iter().map(|number| self.get(*number)).collect();
        let found = || servers.iter().find(|server| server.core.leads()).cloned();
        until(&servers[0], "a leader", || found().is_some()).await;
        found().unwrap()
    }

    pub async fn all_leased(&self) {
        for server in self.running() {
            until(&server, "a lease", || server.leased()).await;
        }
    }

    /// Waits until all running servers stand at the same index, and compares their state.
    pub async fn converge(&self) {
        let servers = self.running();
        let numbers: Vec<NodeId> = servers.iter().map(|server| server.core.me).collect();
        let leader = self.leader(&numbers).await;
        leader.propose(Op::Noop).await.unwrap().unwrap();
        for server in &servers {
            until(server, "all applied", || *server.applied().borrow() >= *leader.applied().borrow()).await;
        }
        let states: Vec<_> = servers
            .iter()
            .map(|server| {
                let replica = server.replica();
                let replica = replica.read();
                (replica.applied(), replica.state_hash())
            })
            .collect();
        assert!(states.iter().all(|state| *state == states[0]), "{states:?}");
    }
}

/// Looks again with everything `server`'s openraft does, heartbeats included.
pub async fn until(server: &Consensus, what: &str, mut condition: impl FnMut() -> bool) {
    let mut news = server.core.raft.metrics();
    let wait = async {
        while !condition() {
            news.changed().await.expect("openraft runs");
        }
    };
    if timeout(PATIENCE, wait).await.is_err() {
        panic!("waited in vain for {what}: {:#?}", server.status());
    }
}

/// Makes `name` until it is acknowledged; `Err` when the server went away.
pub async fn make_surely(server: &Consensus, name: &str) -> Result<(), ProposeError> {
    match server.propose(make(name)).await? {
        Ok(Reply::Entry { made, .. }) => Ok(assert!(made, "{name}")),
        Ok(other) => panic!("{name}: {other:?}"),
        Err(error @ MetaError::Exists { .. }) => panic!("{name} was made twice: {error}"),
        Err(error) => panic!("{name}: {error}"),
    }
}
