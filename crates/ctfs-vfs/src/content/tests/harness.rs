//! A cluster in memory: servers that share one namespace and one set of chunks.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_chunk::tier::{CacheTier, TierSettings};
use ctfs_meta::{
    Durability,
    About, Batch, CellWrite, Command, MemoryStore, Namespace, NewContent, NewNode, Op, Policy, Reply, SharedNamespace, Subject,
};
use ctfs_types::{FileBytes, LogIndex, 
    Attr, CellSize, ChunkId, ExtentData, FileName, Holder, Incarnation, Ino, NodeId, RequestId, Stamp, Timestamp,
};
use parking_lot::{Mutex, RwLock};

use crate::{
    ChunkAccess, Content, ContentSettings, FsError, Holders, Metadata, Pages, Request, SpaceReport, content::Around, partition::Partition,
};

pub const CELL: u64 = 256 << 10;

/// What the servers share.
pub struct Cluster {
    namespace: SharedNamespace,
    seq: AtomicU64,
    chunks: Mutex<BTreeMap<ChunkId, Bytes>>,
    servers: Mutex<Vec<Weak<Content>>>,
    pub puts: AtomicU32,
    pub gets: AtomicU32,
    /// So many puts fail.
    pub failing_puts: AtomicU32,
    /// No proposal reaches a quorum.
    pub cut_off: AtomicBool,
    /// What somebody else does right before the next proposal, or while the next chunk is fetched.
    pub before_propose: Hook,
    /// What becomes of the next proposal, of which the proposer hears nothing.
    pub fate: Mutex<Option<Fate>>,
    late: Mutex<Vec<Command>>,
    pub before_get: Hook,
}

/// How a proposal ends that is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Happens,
    /// With the next [`Cluster::deliver_late`].
    HappensLate,
    Lost,
}

pub type Hook = Mutex<Option<Box<dyn FnOnce() + Send>>>;

fn run(hook: &Hook) {
    let hook = hook.lock().take();
    if let Some(hook) = hook {
        hook();
    }
}

impl Cluster {
    pub fn new() -> Arc<Self> {
        let namespace = Namespace::open(Box::new(MemoryStore::default())).unwrap();
        let cluster = Arc::new(Self {
            namespace: Arc::new(RwLock::new(namespace)),
            seq: AtomicU64::new(1),
            chunks: Mutex::default(),
            servers: Mutex::default(),
            puts: AtomicU32::new(0),
            gets: AtomicU32::new(0),
            failing_puts: AtomicU32::new(0),
            cut_off: AtomicBool::new(false),
            before_propose: Mutex::default(),
            fate: Mutex::default(),
            late: Mutex::default(),
            before_get: Mutex::default(),
        });
        let policy = Policy { cell: CellSize::from_bytes(CELL), ..Policy::default() };
        cluster.apply(Op::SetPolicy { ino: Ino::ROOT, policy }).unwrap();
        cluster
    }

    pub fn apply(&self, op: Op) -> Result<Reply, FsError> {
        self.apply_as(self.seq.fetch_add(1, SeqCst), op)
    }

    fn apply_as(&self, seq: u64, op: Op) -> Result<Reply, FsError> {
        if self.cut_off.load(SeqCst) {
            return Err(NO_ANSWER);
        }
        self.apply_command(self.command(seq, op))
    }

    fn command(&self, seq: u64, op: Op) -> Command {
        let at = Timestamp::new(1_000_000 + seq as i64, 0);
        // Nobody says that verdicts may be forgotten: what is in doubt is asked for much later.
        Command { request: RequestId { client: 1, seq }, answered: 0, at, about: About::Inodes(Vec::new()), op }
    }

    /// Applies what was held back on its way, as a leader does that is back with its log.
    pub fn deliver_late(&self) {
        let late = std::mem::take(&mut *self.late.lock());
        for command in late {
            // Nobody waits for it.
            let _ = self.apply_command(command);
        }
    }

    fn apply_command(&self, command: Command) -> Result<Reply, FsError> {
        let mut ns = self.namespace.write();
        let index = ns.applied().next();
        let mut applied = ns.apply(index, &[command], Batch::new()).unwrap();
        // As consensus may do it: still under the lock of the replica.
        let servers: Vec<_> = self.servers.lock().iter().filter_map(Weak::upgrade).collect();
        for server in servers {
            applied.changes.iter().for_each(|(_, change)| server.changed(change));
        }
        Ok(applied.verdicts.remove(0)?)
    }

    pub fn make(&self, name: &str) -> Ino {
        let node = NewNode { content: NewContent::File, mode: 0o644, umask: 0, uid: 0, gid: 0, exclusive: true, holder: None, ino: None, cell: None };
        let op = Op::Make { parent: Ino::ROOT, name: FileName::new(name.as_bytes()).unwrap(), node };
        match self.apply(op).unwrap() {
            Reply::Entry { attr, .. } => attr.ino,
            other => panic!("{other:?}"),
        }
    }

    pub fn replica(&self) -> &SharedNamespace {
        &self.namespace
    }

    pub fn attr(&self, ino: Ino) -> Attr {
        self.namespace.read().attr(ino).unwrap().unwrap()
    }

    /// Writes a cell as a server would that has merged its bytes over the present ones.
    pub fn write_cell(&self, ino: Ino, cell: u64, bytes: Bytes, size_at_least: u64) {
        let old = self.namespace.read().cells(ino, cell, 1).unwrap().pop();
        let data = ExtentData::Chunk { id: ChunkId(*blake3::hash(&bytes).as_bytes()), len: bytes.len() as u32 };
        let expect = old.map_or(Stamp(0), |old| old.extent.stamp);
        let write = CellWrite { cell, expect, start: 0, data: Some(data), copies: 0 };
        self.chunks.lock().insert(ChunkId(*blake3::hash(&bytes).as_bytes()), bytes);
        self.apply(Op::Write { ino, cells: vec![write], size_at_least, mtime: None, drop_privileges: false, appends_at: None, noted: None }).unwrap();
    }

    /// Deletes every chunk, as collection does with those that nothing names.
    pub fn delete_chunks(&self) {
        self.chunks.lock().clear();
    }

    pub fn server(self: &Arc<Self>, limit: u64) -> Server {
        self.server_with(limit, ContentSettings::default())
    }

    pub fn server_with(self: &Arc<Self>, limit: u64, settings: ContentSettings) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let tier = CacheTier::open(TierSettings::new(dir.path().join("tier"), limit)).unwrap();
        self.server_over(tier, dir, settings)
    }

    /// A server whose cache is on a disk with as many free bytes as `free` says of its directory.
    pub fn server_on(
        self: &Arc<Self>,
        limit: u64,
        settings: ContentSettings,
        reserve_bytes: u64,
        free: impl Fn(&Path) -> u64 + Send + Sync + 'static,
    ) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let tier = TierSettings { reserve_bytes, ..TierSettings::new(dir.path().join("tier"), limit) };
        let tier = CacheTier::open_with(tier, Box::new(move || free(&path))).unwrap();
        self.server_over(tier, dir, settings)
    }

    fn server_over(self: &Arc<Self>, tier: CacheTier, dir: tempfile::TempDir, settings: ContentSettings) -> Server {
        let access = Arc::new(Access { cluster: self.clone() });
        let partition = Partition::new(access.clone(), tokio::runtime::Handle::current());
        let around = Around { meta: access.clone(), chunks: access.clone(), holders: access, waits: Arc::default(), partition };
        let content = Arc::new(Content::new(around, tier, settings));
        self.servers.lock().push(Arc::downgrade(&content));
        Server { content, dir }
    }
}

pub struct Server {
    pub content: Arc<Content>,
    dir: tempfile::TempDir,
}

impl Server {
    /// The directory that holds its cache directory, `tier`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    // No kernel holds pages here.

    pub async fn read(&self, ino: Ino, offset: u64, len: u32) -> Result<Bytes, FsError> {
        self.content.read(ino, offset, len, Pages::Unlocked).await
    }

    pub async fn write(&self, ino: Ino, offset: u64, data: Bytes, drop_privileges: bool) -> Result<u32, FsError> {
        self.content.write(ino, offset, data, drop_privileges, Pages::Unlocked).await
    }

    pub async fn append(&self, ino: Ino, data: Bytes, drop_privileges: bool) -> Result<u64, FsError> {
        self.content.append(ino, data, drop_privileges, Pages::Unlocked).await.map(|(at, _)| at)
    }
}

impl std::ops::Deref for Server {
    type Target = Content;

    fn deref(&self) -> &Content {
        &self.content
    }
}

const NO_ANSWER: FsError = FsError::NoQuorum { waited: Duration::from_secs(1) };

struct Numbered {
    cluster: Arc<Cluster>,
    seq: u64,
}

#[async_trait]
impl Request for Numbered {
    async fn propose(&self, op: Op) -> Result<Reply, FsError> {
        // Let others run between the merge and the commit, as the network would.
        tokio::task::yield_now().await;
        run(&self.cluster.before_propose);
        let fate = self.cluster.fate.lock().take();
        match fate {
            None => return self.cluster.apply_as(self.seq, op),
            Some(Fate::Happens) => drop(self.cluster.apply_as(self.seq, op)),
            Some(Fate::HappensLate) => {
                let command = self.cluster.command(self.seq, op);
                self.cluster.late.lock().push(command);
            }
            Some(Fate::Lost) => {}
        }
        Err(NO_ANSWER)
    }
}

struct Access {
    cluster: Arc<Cluster>,
}

#[async_trait]
impl Metadata for Access {
    fn happen(&self, _: &Op) -> Option<crate::Happened> {
        None
    }

    async fn settled(&self) -> Result<(), FsError> {
        Ok(())
    }

    fn replica(&self) -> &SharedNamespace {
        &self.cluster.namespace
    }

    fn request(&self) -> Arc<dyn Request> {
        Arc::new(Numbered { cluster: self.cluster.clone(), seq: self.cluster.seq.fetch_add(1, SeqCst) })
    }

    fn close_ahead(&self, dirs: &[Ino]) {
        self.replica().write().close_ahead(dirs);
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
        Ok(())
    }

    fn node(&self) -> NodeId {
        NodeId(1)
    }

    fn incarnation(&self) -> Incarnation {
        Incarnation(1)
    }

    fn leased_for(&self) -> Duration {
        crate::vfs::CACHE_TIMEOUT_MAX
    }

    fn ahead(&self) -> Option<LogIndex> {
        None
    }

    fn unseen_change(&self, _subject: &Subject) -> Option<LogIndex> {
        None
    }

    async fn await_visible(&self, _index: LogIndex) -> Result<(), FsError> {
        Ok(())
    }
}

/// All servers here are one to the namespace: none finds a file held by another.
#[async_trait]
impl Holders for Access {
    async fn recall(&self, holder: Holder, _ino: Ino) -> Result<(), FsError> {
        Err(FsError::HolderAway { node: holder.node, why: "there is one server only".to_owned() })
    }

    async fn peek(&self, holder: Holder, _ino: Ino) -> Result<Attr, FsError> {
        Err(FsError::HolderAway { node: holder.node, why: "there is one server only".to_owned() })
    }

    async fn settle(&self, life: Holder) -> Result<(), FsError> {
        Err(FsError::HolderAway { node: life.node, why: "there is one server only".to_owned() })
    }
}

#[async_trait]
impl ChunkAccess for Access {
    async fn get(&self, id: ChunkId, len: u32) -> Result<Bytes, FsError> {
        tokio::task::yield_now().await;
        self.cluster.gets.fetch_add(1, SeqCst);
        run(&self.cluster.before_get);
        let bytes = self.cluster.chunks.lock().get(&id).cloned().ok_or(FsError::ChunkLost { chunk: id })?;
        assert!(len as usize <= bytes.len(), "an extent names more bytes than its chunk has");
        Ok(bytes)
    }

    async fn put(&self, bytes: Bytes, _copies: u8) -> Result<ChunkId, FsError> {
        tokio::task::yield_now().await;
        let less = |left: u32| left.checked_sub(1);
        if self.cluster.failing_puts.fetch_update(SeqCst, SeqCst, less).is_ok() {
            return Err(FsError::TooFewCopies { wanted: 2, synced: 1 });
        }
        self.cluster.puts.fetch_add(1, SeqCst);
        let id = ChunkId(*blake3::hash(&bytes).as_bytes());
        self.cluster.chunks.lock().insert(id, bytes);
        Ok(id)
    }

    fn prefetch(&self, _id: ChunkId, _len: u32) {}

    fn free(&self) -> SpaceReport {
        SpaceReport::default()
    }
}

/// Bytes that tell where they are from: no two seeds, and few offsets, look alike.
pub fn pattern(seed: u8, len: usize) -> Bytes {
    (0..len).map(|n| seed.wrapping_mul(31).wrapping_add((n / 7) as u8) | 1).collect::<Vec<u8>>().into()
}
