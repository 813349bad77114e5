//! What the file system needs of the rest of a server: agreed metadata, and chunks.
//!
//! Implemented over consensus and the chunk stores in the node, and in memory in tests.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_meta::{Durability, Op, Reply, SharedNamespace, Subject};
use ctfs_types::{Attr, ChunkId, FileBytes, Holder, Incarnation, Ino, LogIndex, NodeId};

use crate::FsError;

/// How a command fared that was to happen at once.
#[derive(Debug)]
pub enum Happened {
    Answered(Result<Reply, FsError>),
    /// It has happened once [`Metadata::settled`] says so.
    Unsure(Reply),
}

/// The replicated namespace, as this server sees it.
#[async_trait]
pub trait Metadata: Send + Sync + 'static {
    /// The local replica. Reads under its lock miss nothing while [`Self::leased`] says so, or right
    /// after [`Self::barrier`]. What they show that is new must be visible before it is told.
    fn replica(&self) -> &SharedNamespace;

    /// A new request. Dropping it gives up what could be found out by it.
    fn request(&self) -> Arc<dyn Request>;

    /// Has `op` happen at once, if this server alone may do that: others learn of it in its order, before
    /// anything that is asked afterwards. `None`: it must be proposed.
    fn happen(&self, op: &Op) -> Option<Happened>;

    /// From here on nothing happens at once by these directories, which are about to be given up; what
    /// only this server knows is on its way to the others.
    fn close_ahead(&self, dirs: &[Ino]);

    /// Returns when all that has happened here before the call is in the log.
    ///
    /// # Errors
    /// [`FsError::NoQuorum`], [`FsError::Shutdown`]; that some of it is lost.
    async fn settled(&self) -> Result<(), FsError>;

    /// Has `op` happen once and answers when it is visible on every live server, and applied here.
    ///
    /// # Errors
    /// As [`Request::propose`].
    async fn propose(&self, op: Op) -> Result<Reply, FsError> {
        self.request().propose(op).await
    }

    /// Writes bytes of a file that this server holds into the journal of its life, and answers where;
    /// `None`: there is no journal, or it has no room.
    fn write_down(&self, bytes: &FileBytes) -> Option<u64>;

    /// The replicated metadata have what was written down of the file up to there, or the file is gone.
    fn let_go(&self, ino: Ino, upto: u64);

    /// What the journal has before this position is needed by nobody.
    fn kept_from(&self) -> u64;

    /// Whether what is in the journal counts as being on as many disks as asked for, once it is there.
    fn journal_counts(&self, class: Durability) -> bool;

    /// Returns when all that happened and was written down here before the call is on as many disks as
    /// asked for. `false`: the journal alone does not do that now; flush, and wait until it is
    /// [`Self::settled`].
    ///
    /// # Errors
    /// As [`Self::settled`].
    async fn durable(&self, class: Durability) -> Result<bool, FsError>;

    /// Returns once the local replica holds everything that was visible anywhere before the call.
    ///
    /// # Errors
    /// [`FsError::NoQuorum`]: nobody could confirm it in time.
    async fn barrier(&self) -> Result<(), FsError>;

    fn node(&self) -> NodeId;

    /// This life of the daemon; locks belong to it.
    fn incarnation(&self) -> Incarnation;

    /// This life, as a holder of files.
    fn holder(&self) -> Holder {
        Holder { node: self.node(), incarnation: self.incarnation() }
    }

    /// Whether this server's read lease holds at this moment.
    fn leased(&self) -> bool {
        !self.leased_for().is_zero()
    }

    /// Returns when the replica shows everything that was answered anywhere before the call.
    ///
    /// # Errors
    /// As [`Self::barrier`].
    async fn be_current(&self) -> Result<(), FsError> {
        if self.leased() { Ok(()) } else { self.barrier().await }
    }

    /// For how long it holds if it is not renewed.
    fn leased_for(&self) -> Duration;

    /// The last entry that the replica shows, if other servers may not show it yet. Ask under the
    /// replica's lock.
    fn ahead(&self) -> Option<LogIndex>;

    /// The last change of `subject`, if other servers may not show it yet. Ask as [`Self::ahead`].
    fn unseen_change(&self, subject: &Subject) -> Option<LogIndex>;

    /// Returns when entry `index` is visible: every server that answers from its replica shows it.
    ///
    /// # Errors
    /// As [`Self::barrier`].
    async fn await_visible(&self, index: LogIndex) -> Result<(), FsError>;
}

/// One request of this server: all commands proposed through it happen once, together.
///
/// Whichever of them is applied first is the one that happens; a later one is answered with its
/// verdict and changes nothing. So [`Op::Noop`] ends the doubt about a command that was proposed
/// before it and not answered: [`Reply::Done`] says that it did not happen and never will.
#[async_trait]
pub trait Request: Send + Sync + 'static {
    /// # Errors
    /// - [`FsError::Meta`]: the namespace refused. [`ctfs_meta::MetaError::Answered`]: some command of this
    ///   request may have happened long ago; none will any more.
    /// - [`FsError::NoQuorum`], [`FsError::Shutdown`]: no majority in time; it may still happen.
    async fn propose(&self, op: Op) -> Result<Reply, FsError>;
}

/// The other servers, as holders of files ([`ctfs_types::FileUse`]).
#[async_trait]
pub trait Holders: Send + Sync + 'static {
    /// Has the holder give up the file: when this answers, everything written there is in the
    /// metadata, and another may hold it.
    ///
    /// # Errors
    /// It was not reached, is no more, or could not flush.
    async fn recall(&self, holder: Holder, ino: Ino) -> Result<(), FsError>;

    /// The attributes as programs on the holder's server see them.
    ///
    /// # Errors
    /// It was not reached, is no more, or does not hold the file.
    async fn peek(&self, holder: Holder, ino: Ino) -> Result<Attr, FsError>;

    /// Has that life of a server put all that its programs did before into the metadata
    /// ([`crate::Vfs::settle_here`]).
    ///
    /// # Errors
    /// It was not reached, is no more, or could not.
    async fn settle(&self, life: Holder) -> Result<(), FsError>;
}

/// Immutable chunks, wherever they live.
#[async_trait]
pub trait ChunkAccess: Send + Sync + 'static {
    /// The chunk's bytes, `len` of them, checked against its name.
    ///
    /// # Errors
    /// - [`FsError::ChunkLost`]: every server was asked and none has a valid copy.
    /// - [`FsError::ChunkUnavailable`]: servers that may have it did not answer in time.
    async fn get(&self, id: ChunkId, len: u32) -> Result<Bytes, FsError>;

    /// Makes the bytes durable on `copies` servers (0: automatic) and answers their name.
    ///
    /// # Errors
    /// [`FsError::TooFewCopies`], [`FsError::NoSpace`].
    async fn put(&self, bytes: Bytes, copies: u8) -> Result<ChunkId, FsError>;

    /// Starts to fetch the chunk, if that is cheap at the moment.
    fn prefetch(&self, id: ChunkId, len: u32);

    /// Space in the cluster, from what this server knows; never waits.
    fn free(&self) -> SpaceReport;
}

/// Space as `df` shows it, copies already divided out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpaceReport {
    /// Bytes of file content the cluster could hold.
    pub total: u64,
    /// Bytes not taken.
    pub free: u64,
    /// Bytes that programs may still take.
    pub available: u64,
    /// Inodes that may still be made.
    pub files: u64,
}
