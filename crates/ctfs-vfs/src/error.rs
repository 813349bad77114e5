//! Why an operation failed, verdicts and weather together.

use std::time::Duration;

use ctfs_meta::{MetaError, StoreError};
use ctfs_types::{ChunkId, Ino, InvalidName, NodeId};

/// Why a file system operation failed.
///
/// One variant per reaction a caller could have. What a program sees of each is decided in
/// [`FsError::errno`](crate::errno), and nowhere else. Cloneable, because a lost write is told to
/// every handle that was open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    /// The namespace refused: the same on every server.
    #[error(transparent)]
    Meta(#[from] MetaError),
    #[error("not a name: {0}")]
    Name(#[from] InvalidName),

    // The cluster.
    /// Whether the change happened may be unknown; nothing was acknowledged.
    #[error("no majority of servers answered within {waited:?}")]
    NoQuorum { waited: Duration },
    /// The server that holds newer bytes of a file cannot be asked.
    #[error("server {node}, which holds the file, cannot be asked: {why}")]
    HolderAway { node: NodeId, why: String },
    /// This server is stopping.
    #[error("this server is shutting down")]
    Shutdown,
    /// The local metadata store failed or is damaged; it must be rebuilt.
    #[error("metadata store: {0}")]
    Store(String),

    // Bytes.
    /// No server has a valid copy.
    #[error("chunk {chunk} is lost: no server has a valid copy")]
    ChunkLost { chunk: ChunkId },
    /// Servers that may have it did not answer in time.
    #[error("chunk {chunk} is out of reach: {why}")]
    ChunkUnavailable { chunk: ChunkId, why: String },
    #[error("only {synced} of {wanted} copies could be made durable")]
    TooFewCopies { wanted: u8, synced: u8 },
    /// No server has room for another chunk.
    #[error("no space left in the chunk stores")]
    NoSpace,
    /// Unflushed bytes fill the cache tier and could not be flushed in time.
    #[error("the cache tier is full of unflushed bytes")]
    CacheFull,
    /// The cache tier's disk failed.
    #[error("cache tier: {0}")]
    Cache(String),
    /// Acknowledged writes were lost before they were made durable; told once per open handle.
    #[error("earlier writes to inode {ino} were lost: {why}")]
    LostWrites { ino: Ino, why: String },
    /// Over the largest size of a file.
    #[error("file too large")]
    TooBig,
    /// `SEEK_DATA` or `SEEK_HOLE` past the end of the file.
    #[error("offset is past the last byte")]
    PastEnd,

    /// The program may believe to hold locks that others have by now.
    #[error("locks on inode {0} were lost while this server was cut off")]
    LostLocks(Ino),

    // Handles and callers.
    /// The inode is gone, or has no name left and is not open here.
    #[error("inode {0} is gone")]
    Stale(Ino),
    #[error("no open handle {0}")]
    BadHandle(u64),
    #[error("the handle was not opened for this")]
    WrongMode,
    #[error("not supported: {0}")]
    Unsupported(&'static str),
    #[error("invalid: {0}")]
    Invalid(&'static str),
    #[error("only the superuser may do this")]
    NotPermitted,
    #[error("access denied")]
    Denied,
    #[error("the volume is read-only here")]
    ReadOnly,
    /// A table of this server is full: open handles, lock waiters.
    #[error("too many {0} on this server")]
    TooMany(&'static str),
    /// A signal reached the program that waits.
    #[error("interrupted by a signal")]
    Interrupted,
    /// The lock table has no room for this waiter.
    #[error("too many waiters for locks")]
    NoLocks,
}

impl FsError {
    /// There is room in the cluster, but not below this directory.
    pub fn is_over_quota(&self) -> bool {
        matches!(self, Self::Meta(MetaError::QuotaExceeded { .. }))
    }

    /// Whether a proposal that failed so may have happened, or happen yet.
    pub fn is_doubtful(&self) -> bool {
        matches!(self, Self::NoQuorum { .. } | Self::Shutdown | Self::Meta(MetaError::Answered))
    }
}

impl From<StoreError> for FsError {
    fn from(error: StoreError) -> Self {
        Self::Store(error.to_string())
    }
}
