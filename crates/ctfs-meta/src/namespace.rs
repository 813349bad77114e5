//! What the namespace does with a command.

use ctfs_types::{Attr, CellIndex, ChunkId, FileKind, FileName, Ino, LogIndex, NodeId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::{
    Cell, Change, ClusterIdentity, Command, EffectivePolicy, Lock, LockKind, Member, MetaError, Policy, Reply, Store,
    StoreError, TokenRecord,
};

/// The replicated state of one volume.
pub struct Namespace {
    store: Box<dyn Store>,
}

/// What applying one log entry gave.
#[derive(Debug, Default)]
pub struct Applied {
    /// One verdict per command, in order.
    pub verdicts: Vec<Result<Reply, MetaError>>,
    pub changes: Vec<Change>,
}

/// One entry of a directory listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    pub name: FileName,
    pub ino: Ino,
    pub kind: FileKind,
    /// Where the next listing goes on: pass it as `after`. Stable while the entry lives.
    pub cookie: u64,
}

/// What the metadata knows of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRecord {
    /// Cells that name the chunk.
    pub references: u64,
    /// Most copies any of them asked for; 0 means automatic.
    pub copies: u8,
    /// Bytes in the chunk.
    pub len: u32,
    /// When the count fell to zero; `None` while it is referenced.
    pub condemned: Option<Timestamp>,
}

/// Recursive counts of a directory, itself not included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub files: u64,
    pub directories: u64,
    /// Sum of file sizes.
    pub bytes: u64,
    /// Sum of bytes that are not holes.
    pub allocated: u64,
}

impl Namespace {
    /// Opens the state kept in `store`; an empty store is a volume before its first command, with
    /// an empty root directory (mode 0755, root:root).
    pub fn open(store: Box<dyn Store>) -> Result<Self, StoreError>;

    /// The index of the last applied entry.
    pub fn applied(&self) -> LogIndex;

    /// Applies the committed entry at `index`, which must be past [`Self::applied`] (entries of
    /// the consensus layer itself use up indexes without coming here). All of its commands, the
    /// index, and `extra` (records under keys starting with 0xff, kept for the caller and no part
    /// of the state hash) reach the store in one batch.
    pub fn apply(&mut self, index: LogIndex, commands: &[Command], extra: crate::Batch) -> Result<Applied, StoreError>;

    /// A 128-bit sum over all records, equal on replicas that applied the same prefix.
    pub fn state_hash(&self) -> [u8; 16];

    /// The raw store, for snapshots.
    pub fn store(&self) -> &dyn Store;

    // Reads. Each sees one applied index, because the caller holds the lock.
    pub fn lookup(&self, parent: Ino, name: &FileName) -> Result<Option<Ino>, StoreError>;
    pub fn attr(&self, ino: Ino) -> Result<Option<Attr>, StoreError>;
    /// Parent of a directory; of the root: the root.
    pub fn parent(&self, dir: Ino) -> Result<Option<Ino>, StoreError>;
    /// Up to `limit` entries after cookie `after` (0 starts); without `.` and `..`.
    pub fn list(&self, dir: Ino, after: u64, limit: usize) -> Result<Vec<DirEntry>, StoreError>;
    pub fn readlink(&self, ino: Ino) -> Result<Option<Vec<u8>>, StoreError>;
    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;
    pub fn xattr_names(&self, ino: Ino) -> Result<Vec<Vec<u8>>, StoreError>;
    /// Extents of the cells in `[first, first + cells)`, in order, holes left out.
    pub fn cells(&self, ino: Ino, first: CellIndex, cells: u64) -> Result<Vec<Cell>, StoreError>;
    /// First lock that `lock` would have to wait for.
    pub fn conflicting_lock(&self, ino: Ino, lock: &Lock) -> Result<Option<Lock>, StoreError>;
    pub fn locks(&self, ino: Ino, kind: LockKind) -> Result<Vec<Lock>, StoreError>;
    /// Recursive counts below a directory.
    pub fn totals(&self, dir: Ino) -> Result<Option<Totals>, StoreError>;
    pub fn orphans(&self, limit: usize) -> Result<Vec<Ino>, StoreError>;
    pub fn chunk(&self, id: &ChunkId) -> Result<Option<ChunkRecord>, StoreError>;
    /// Up to `limit` chunk records with ids after `after`, in order of id.
    pub fn chunks(&self, after: Option<ChunkId>, limit: usize) -> Result<Vec<(ChunkId, ChunkRecord)>, StoreError>;
    /// Up to `limit` chunks condemned before `before`.
    pub fn condemned(&self, before: Timestamp, limit: usize) -> Result<Vec<ChunkId>, StoreError>;
    pub fn cluster(&self) -> Result<Option<ClusterIdentity>, StoreError>;
    pub fn member(&self, node: NodeId) -> Result<Option<Member>, StoreError>;
    pub fn members(&self) -> Result<Vec<Member>, StoreError>;
    /// Keys of removed members.
    pub fn removed_keys(&self) -> Result<Vec<[u8; 32]>, StoreError>;
    pub fn token(&self, hash: &[u8; 32]) -> Result<Option<TokenRecord>, StoreError>;
    pub fn tokens(&self) -> Result<Vec<TokenRecord>, StoreError>;
    /// The policy set on `ino` itself.
    pub fn policy(&self, ino: Ino) -> Result<Policy, StoreError>;
    pub fn effective_policy(&self, ino: Ino) -> Result<EffectivePolicy, StoreError>;
    /// One path of the inode from the root, for people; `None` for orphans.
    pub fn path(&self, ino: Ino) -> Result<Option<Vec<FileName>>, StoreError>;
    /// An inode that names the chunk, found by search; slow, for status and repair reports.
    pub fn file_of_chunk(&self, id: &ChunkId) -> Result<Option<Ino>, StoreError>;
}
