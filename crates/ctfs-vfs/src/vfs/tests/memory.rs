//! A cluster in memory: one namespace, one set of chunks, any number of servers over them.
//!
//! The namespace is the real one. What is simple here is what consensus does: an entry is applied
//! the moment it is proposed, every server is told, and the proposer is answered when every server
//! has said that its kernel was told.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_chunk::{CacheTier, TierSettings};
use ctfs_meta::{About, Ahead, Batch, Change, Command, Durability, MemoryStore, Namespace, Op, Reply, SharedNamespace, Subject};
use ctfs_types::{Attr, ChunkId, FileBytes, Holder, Incarnation, Ino, LogIndex, NodeId, RequestId};
use ctfs_vfs::{ChunkAccess, FsError, Happened, Holders, Metadata, Request, SpaceReport, Vfs, VfsSettings};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

/// How long a proposer waits for the servers: the length of a lease.
const LEASE: Duration = Duration::from_secs(3);

/// How much of a lease a server uses.
const USED: Duration = Duration::from_secs(2);

/// How the cluster treats what its servers ask for. Still air unless a test says otherwise.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// Others run up to so many times before a question is heard, and again before it is answered.
    pub pauses: u32,
    /// Of 256 proposals, so many end without an answer; half of these were applied.
    pub lost: u32,
    /// Of 256 chunks to be put, so many find too few servers.
    pub failed_puts: u32,
}

/// Told of each entry: who proposed it, its index, what it changed.
type Listener = Box<dyn Fn(NodeId, LogIndex, &[Change]) + Send + Sync>;

pub struct Cluster {
    replica: SharedNamespace,
    /// Index of the last entry; held while it is applied and told, so that all see one order.
    order: Mutex<u64>,
    requests: AtomicU64,
    listeners: Mutex<Vec<Listener>>,
    told: Mutex<Vec<watch::Receiver<LogIndex>>>,
    /// The last change of everything, and of anything.
    changes: Mutex<HashMap<Subject, LogIndex>>,
    shown: AtomicU64,
    /// Everybody who is waited for was told up to here.
    visible: watch::Sender<LogIndex>,
    /// Questions that wait for something to become visible.
    pub waiting: watch::Sender<usize>,
    chunks: Mutex<BTreeMap<ChunkId, Bytes>>,
    servers: Mutex<BTreeMap<NodeId, (Weak<Vfs>, Weak<MemoryMeta>)>>,
    weather: Mutex<Weather>,
    chance: AtomicU64,
}

impl Cluster {
    pub fn new() -> Arc<Self> {
        let namespace = Namespace::open(Box::new(MemoryStore::default())).unwrap();
        Arc::new(Self {
            replica: Arc::new(RwLock::new(namespace)),
            order: Mutex::new(0),
            requests: AtomicU64::new(0),
            listeners: Mutex::default(),
            told: Mutex::default(),
            changes: Mutex::default(),
            shown: AtomicU64::new(0),
            visible: watch::Sender::new(LogIndex(0)),
            waiting: watch::Sender::new(0),
            chunks: Mutex::default(),
            servers: Mutex::default(),
            weather: Mutex::default(),
            chance: AtomicU64::new(1),
        })
    }

    pub fn set_weather(&self, weather: Weather) {
        *self.weather.lock() = weather;
    }

    /// From here on chance goes as `seed` says.
    pub fn seed(&self, seed: u64) {
        self.chance.store(seed, Ordering::SeqCst);
    }

    /// SplitMix64 (Steele et al., 2014).
    fn random(&self) -> u64 {
        let state = self.chance.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn strikes(&self, of_256: u32) -> bool {
        of_256 > 0 && self.random() % 256 < u64::from(of_256)
    }

    /// Lets others run, as the network would.
    async fn pause(&self) {
        let pauses = self.weather.lock().pauses;
        if pauses > 0 {
            for _ in 0..self.random() % u64::from(pauses + 1) {
                tokio::task::yield_now().await;
            }
        }
    }

    pub fn listen(&self, listener: Listener) {
        self.listeners.lock().push(listener);
    }

    /// Entries are answered only when this has reached them.
    pub fn wait_for(&self, told: watch::Receiver<LogIndex>) {
        self.told.lock().push(told);
    }

    /// Another server of this cluster, numbered `node`, with its cache tier in `dir`.
    /// How many chunks the servers have.
    pub fn chunks(&self) -> usize {
        self.chunks.lock().len()
    }

    pub fn server(self: &Arc<Self>, node: u64, dir: &Path, settings: VfsSettings) -> Server {
        self.server_with_cache(node, dir, settings, 256 << 20)
    }

    /// As [`Self::server`], with a cache tier of so many bytes.
    pub fn server_with_cache(
        self: &Arc<Self>,
        node: u64,
        dir: &Path,
        settings: VfsSettings,
        cache_bytes: u64,
    ) -> Server {
        let meta = Arc::new_cyclic(|itself| MemoryMeta {
            itself: itself.clone(),
            cluster: self.clone(),
            node: NodeId(node),
            life: AtomicU64::new(node),
            leased: AtomicBool::new(true),
            cut_off: AtomicBool::new(false),
        });
        let tier = CacheTier::open(TierSettings::new(dir.join(format!("tier-{node}")), cache_bytes)).unwrap();
        let vfs = Vfs::new(
            meta.clone(),
            Arc::new(MemoryChunks(self.clone())),
            Arc::new(MemoryHolders(Arc::downgrade(self))),
            tier,
            settings,
        );
        self.servers.lock().insert(NodeId(node), (Arc::downgrade(&vfs), Arc::downgrade(&meta)));
        let told = Arc::downgrade(&vfs);
        self.listen(Box::new(move |_, _, changes| {
            if let Some(vfs) = told.upgrade() {
                vfs.changed(changes);
            }
        }));
        Server { vfs, meta }
    }
}

/// One server of the cluster.
pub struct Server {
    pub vfs: Arc<Vfs>,
    pub meta: Arc<MemoryMeta>,
}

pub struct MemoryMeta {
    itself: Weak<MemoryMeta>,
    cluster: Arc<Cluster>,
    node: NodeId,
    life: AtomicU64,
    leased: AtomicBool,
    cut_off: AtomicBool,
}

impl MemoryMeta {
    /// Goes on in another life, after the cluster ended this one.
    pub async fn begin_life(&self, next: Incarnation) {
        self.life.store(next.0, Ordering::SeqCst);
        let op = Op::Incarnate { node: self.node, incarnation: next, addresses: vec![], capacity: 1, version: String::new() };
        self.propose_op(op).await.unwrap();
    }

    /// From now on nobody answers this server, and its lease is over.
    pub fn cut_off(&self) {
        self.leased.store(false, Ordering::SeqCst);
        self.cut_off.store(true, Ordering::SeqCst);
    }

    /// The others answer again, and it has a lease.
    pub fn is_back(&self) {
        self.cut_off.store(false, Ordering::SeqCst);
        self.leased.store(true, Ordering::SeqCst);
    }

    /// Proposes for this server what no operation of the file system does.
    pub async fn propose_op(&self, op: Op) -> Result<Reply, FsError> {
        let seq = self.cluster.requests.fetch_add(1, Ordering::SeqCst) + 1;
        self.propose_as(seq, op).await
    }

    fn reach(&self) -> Result<(), FsError> {
        if self.cut_off.load(Ordering::SeqCst) { Err(FsError::NoQuorum { waited: LEASE }) } else { Ok(()) }
    }
}

#[async_trait]
impl Metadata for MemoryMeta {
    fn replica(&self) -> &SharedNamespace {
        &self.cluster.replica
    }

    fn request(&self) -> Arc<dyn Request> {
        let seq = self.cluster.requests.fetch_add(1, Ordering::SeqCst) + 1;
        Arc::new(Numbered { meta: self.itself.upgrade().expect("asked of a living server"), seq })
    }

    /// All servers share one replica, so the log has the command in the same moment.
    fn happen(&self, op: &Op) -> Option<Happened> {
        if !self.leased() || self.cut_off.load(Ordering::SeqCst) {
            return None;
        }
        let seq = self.cluster.requests.fetch_add(1, Ordering::SeqCst) + 1;
        let mut order = self.cluster.order.lock();
        let mut replica = self.cluster.replica.write();
        let request = RequestId { client: self.incarnation().0, seq };
        let mut command = Command { request, answered: 0, at: std::time::SystemTime::now().into(), about: About::Ahead, op: op.clone() };
        match replica.apply_ahead(&mut command, self.holder()).unwrap() {
            Ahead::NotAlone => None,
            Ahead::Refused(why) => Some(Happened::Answered(Err(why.into()))),
            Ahead::Happened { reply, .. } => {
                *order += 1;
                let index = LogIndex(*order);
                let applied = replica.apply(index, &[command], Batch::new()).unwrap();
                assert_eq!((&applied.verdicts[..], &applied.diverged[..]), (&[Ok(reply.clone())][..], &[][..]));
                let changes: Vec<Change> = applied.changes.into_iter().map(|(_, change)| change).collect();
                self.cluster.shown.fetch_max(index.0, Ordering::SeqCst);
                drop(replica);
                for listener in self.cluster.listeners.lock().iter() {
                    listener(self.node, index, &changes);
                }
                Some(Happened::Answered(Ok(reply)))
            }
        }
    }

    async fn settled(&self) -> Result<(), FsError> {
        Ok(())
    }

    fn close_ahead(&self, dirs: &[Ino]) {
        self.cluster.replica.write().close_ahead(dirs);
    }

    fn write_down(&self, _bytes: &FileBytes) -> Option<u64> {
        None
    }

    fn let_go(&self, _ino: Ino, _upto: u64) {}

    fn kept_from(&self) -> u64 {
        0
    }

    fn journal_counts(&self, _class: Durability) -> bool {
        false
    }

    async fn durable(&self, _class: Durability) -> Result<bool, FsError> {
        Ok(false)
    }

    async fn barrier(&self) -> Result<(), FsError> {
        self.reach()
    }

    fn node(&self) -> NodeId {
        self.node
    }

    fn incarnation(&self) -> Incarnation {
        Incarnation(self.life.load(Ordering::SeqCst))
    }

    fn leased_for(&self) -> Duration {
        if self.leased.load(Ordering::SeqCst) { USED } else { Duration::ZERO }
    }

    fn ahead(&self) -> Option<LogIndex> {
        let shown = LogIndex(self.cluster.shown.load(Ordering::SeqCst));
        (shown > *self.cluster.visible.borrow()).then_some(shown)
    }

    fn unseen_change(&self, subject: &Subject) -> Option<LogIndex> {
        let change = self.cluster.changes.lock().get(subject).copied()?;
        (change > *self.cluster.visible.borrow()).then_some(change)
    }

    async fn await_visible(&self, index: LogIndex) -> Result<(), FsError> {
        self.cluster.waiting.send_modify(|waiting| *waiting += 1);
        let seen = self.cluster.visible.subscribe().wait_for(|visible| *visible >= index).await.map(drop);
        self.cluster.waiting.send_modify(|waiting| *waiting -= 1);
        seen.map_err(|_| FsError::Shutdown)
    }
}

struct Numbered {
    meta: Arc<MemoryMeta>,
    seq: u64,
}

#[async_trait]
impl Request for Numbered {
    async fn propose(&self, op: Op) -> Result<Reply, FsError> {
        self.meta.propose_as(self.seq, op).await
    }
}

impl MemoryMeta {
    async fn propose_as(&self, seq: u64, op: Op) -> Result<Reply, FsError> {
        self.reach()?;
        self.cluster.pause().await;
        let lost = self.cluster.strikes(self.cluster.weather.lock().lost);
        if lost && self.cluster.random() % 2 == 0 {
            return Err(FsError::NoQuorum { waited: LEASE });
        }
        let (index, verdict) = {
            let mut order = self.cluster.order.lock();
            *order += 1;
            let mut replica = self.cluster.replica.write();
            let inos = replica.sets_out(&op).unwrap();
            let command = Command {
                request: RequestId { client: self.incarnation().0, seq },
                answered: 0,
                at: std::time::SystemTime::now().into(),
                about: About::Inodes(inos.clone()),
                op,
            };
            let index = LogIndex(*order);
            let applied = replica.apply(index, &[command], Batch::new()).unwrap();
            replica.has_landed(&inos);
            let changes: Vec<Change> = applied.changes.into_iter().map(|(_, change)| change).collect();
            let subjects = changes.iter().flat_map(Change::subjects).map(|subject| (subject, index));
            self.cluster.changes.lock().extend(subjects);
            self.cluster.shown.store(index.0, Ordering::SeqCst);
            drop(replica);
            for listener in self.cluster.listeners.lock().iter() {
                listener(self.node, index, &changes);
            }
            (index, applied.verdicts.into_iter().next().unwrap())
        };
        let told = self.cluster.told.lock().clone();
        for mut told in told {
            // A server that is late is waited for once, for at most a lease.
            let _ = tokio::time::timeout(LEASE, told.wait_for(|told| *told >= index)).await;
        }
        self.cluster.visible.send_if_modified(|visible| {
            let news = index > *visible;
            *visible = index.max(*visible);
            news
        });
        self.cluster.pause().await;
        if lost {
            return Err(FsError::NoQuorum { waited: LEASE });
        }
        Ok(verdict?)
    }
}

struct MemoryHolders(Weak<Cluster>);

impl MemoryHolders {
    fn reach(&self, holder: Holder) -> Result<Arc<Vfs>, FsError> {
        let away = |why: &str| FsError::HolderAway { node: holder.node, why: why.to_owned() };
        let cluster = self.0.upgrade().ok_or_else(|| away("the cluster is gone"))?;
        let (vfs, meta) = cluster.servers.lock().get(&holder.node).cloned().ok_or_else(|| away("no such server"))?;
        meta.upgrade().ok_or_else(|| away("it is down"))?.reach()?;
        vfs.upgrade().ok_or_else(|| away("it is down"))
    }

    async fn pause(&self) {
        if let Some(cluster) = self.0.upgrade() {
            cluster.pause().await;
        }
    }
}

#[async_trait]
impl Holders for MemoryHolders {
    async fn recall(&self, holder: Holder, ino: Ino) -> Result<(), FsError> {
        let given = self.reach(holder)?.give_up(ino).await;
        self.pause().await;
        given
    }

    async fn peek(&self, holder: Holder, ino: Ino) -> Result<Attr, FsError> {
        let seen = self.reach(holder)?.peek_here(ino).await;
        self.pause().await;
        seen
    }

    async fn settle(&self, life: Holder) -> Result<(), FsError> {
        let settled = self.reach(life)?.settle_here().await;
        self.pause().await;
        settled
    }
}

struct MemoryChunks(Arc<Cluster>);

#[async_trait]
impl ChunkAccess for MemoryChunks {
    async fn get(&self, id: ChunkId, _len: u32) -> Result<Bytes, FsError> {
        self.0.pause().await;
        self.0.chunks.lock().get(&id).cloned().ok_or(FsError::ChunkLost { chunk: id })
    }

    async fn put(&self, bytes: Bytes, _copies: u8) -> Result<ChunkId, FsError> {
        self.0.pause().await;
        if self.0.strikes(self.0.weather.lock().failed_puts) {
            return Err(FsError::TooFewCopies { wanted: 2, synced: 1 });
        }
        let id = ChunkId(*blake3::hash(&bytes).as_bytes());
        self.0.chunks.lock().insert(id, bytes);
        Ok(id)
    }

    fn prefetch(&self, _id: ChunkId, _len: u32) {}

    fn free(&self) -> SpaceReport {
        SpaceReport { total: 100 << 30, free: 60 << 30, available: 50 << 30, files: 1_000_000 }
    }
}
