//! The copies of other servers' journals that this server keeps as their pair.
//!
//! ```text
//! ROOT/NODE-LIFE/   the copy of one life: segments as in a journal, from some position on
//! ROOT/fences       of each server, the last life that was fenced
//! ```
//!
//! One thread does everything, in the order asked: what several owners sent meanwhile is written,
//! then each file is synced once, then all are answered. A fence is on the disk before it is
//! answered, and lies behind every record that was accepted before it and in front of every one
//! that is refused after it.

pub(crate) mod keeper;

use std::{path::Path, sync::Arc};

use ctfs_host::Thread;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::{Batch, Disk, JournalError, JournalId, Position, Record, segments::SegmentReader};
use keeper::Keeper;

/// Lives of which copies are kept at once. A cluster is a handful of servers, and a copy goes when
/// its life has been replayed; more is a fault, and each takes a segment of disk.
pub const COPIES_MAX: usize = 64;

/// Requests that wait for the thread: each may be a whole batch. More wait at the sender.
const INBOX: usize = 4;

/// Sizes of the copies.
#[derive(Debug, Clone, Copy)]
pub struct CopySettings {
    pub segment_bytes: u64,
    /// Bytes of one copy that its owner has not trimmed. The owner holds at most twice
    /// [`Settings::bytes_max`](crate::Settings::bytes_max); this is no less.
    pub bytes_max: u64,
}

impl Default for CopySettings {
    fn default() -> Self {
        Self { segment_bytes: 16 << 20, bytes_max: 256 << 20 }
    }
}

/// Why a copy does not do what it is asked. Travels to the owner: new ones are added at the end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    /// The life has ended by the word of the others; nothing of it is ever accepted again.
    #[error("fenced in epoch {epoch}")]
    Fenced { epoch: u64 },
    /// The copy has other bytes at this position: one of the two is not what was appended.
    #[error("the copy has another record {position}")]
    Diverged { position: Position },
    /// Records are missing between what the copy has and what was sent.
    #[error("the copy ends at {has}")]
    Gap { has: Position },
    /// No room, on the disk or in the copy's bound. It may have some later.
    #[error("the copy has no room")]
    Full,
    #[error("not a batch of this cluster")]
    Invalid,
    /// The copy, or all of them, cannot be read or written until a person looked or the server restarts.
    #[error("the copy failed: {0}")]
    Failed(String),
    /// Somebody fences in an epoch that another take-over has passed.
    #[error("epoch {epoch} has fenced it since")]
    Superseded { epoch: u64 },
}

/// One copy, for status and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyStatus {
    pub id: JournalId,
    pub kept_from: Position,
    pub last: Position,
    pub bytes: u64,
    /// The epoch that fenced this life.
    pub fenced: Option<u64>,
    pub failed: Option<String>,
}

/// A copy that grows no more, to be taken over.
#[derive(Clone)]
pub struct Fenced {
    kept_from: Position,
    last: Position,
    reader: SegmentReader,
}

impl Fenced {
    /// The first record that the owner had not trimmed, or one past the last.
    pub fn kept_from(&self) -> Position {
        self.kept_from
    }

    pub fn last(&self) -> Position {
        self.last
    }

    /// Records from `from` on, of at most `bytes_max` but at least one; none past the last. Blocks.
    pub fn records(&self, from: Position, bytes_max: usize) -> Result<Vec<Record>, JournalError> {
        if from < self.kept_from {
            return Err(JournalError::Trimmed { upto: self.kept_from.before() });
        }
        self.reader.read(from, bytes_max)
    }
}

enum Request {
    Accept { id: JournalId, batch: Batch, reply: Reply<Position> },
    Fence { id: JournalId, epoch: u64, reply: Reply<Option<Fenced>> },
    Trim { id: JournalId, upto: Position, reply: Reply<()> },
    Remove { id: JournalId, reply: Reply<()> },
    List { reply: Reply<Vec<CopyStatus>> },
}

type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// All copies of this server. Dropping it waits for what was begun.
pub struct Copies {
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<Thread>,
}

impl Copies {
    /// Opens the copies of cluster `cluster` in `root`, reading each from end to end. One that is
    /// damaged is listed as failed and does not keep the others from being used.
    pub fn open(
        disk: Arc<dyn Disk>,
        root: &Path,
        cluster: [u8; 16],
        settings: CopySettings,
    ) -> Result<Self, JournalError> {
        let (requests, inbox) = mpsc::channel(INBOX);
        let keeper = Keeper::open(disk, root, cluster, settings, inbox)?;
        let thread = Thread::start("ctfs-copies", keeper);
        let thread = thread.map_err(|source| JournalError::io("start the thread of", root, source))?;
        Ok(Self { requests: Some(requests), thread: Some(thread) })
    }

    /// Takes records of the running life `id` and answers how far the copy is durable, when it is.
    ///
    /// Records that are here already must be the same. A life of which nothing is here begins with
    /// [`Batch::kept_from`], and so does one that ends before that: its owner needs nothing earlier.
    pub async fn accept(&self, id: JournalId, batch: Batch) -> Result<Position, Refusal> {
        self.ask(|reply| Request::Accept { id, batch, reply }).await
    }

    /// Ends life `id`, and every earlier one of its server, for good, and then answers what there is
    /// of it; `None`: no copy of it is here.
    pub async fn fence(&self, id: JournalId, epoch: u64) -> Result<Option<Fenced>, Refusal> {
        self.ask(|reply| Request::Fence { id, epoch, reply }).await
    }

    /// Records of `id` up to `upto` are no longer needed.
    pub async fn trim(&self, id: JournalId, upto: Position) -> Result<(), Refusal> {
        self.ask(|reply| Request::Trim { id, upto, reply }).await
    }

    /// Removes the copy of `id`, if there is one. All or nothing; a fence stays.
    pub async fn remove(&self, id: JournalId) -> Result<(), Refusal> {
        self.ask(|reply| Request::Remove { id, reply }).await
    }

    pub async fn list(&self) -> Result<Vec<CopyStatus>, Refusal> {
        self.ask(|reply| Request::List { reply }).await
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, Refusal> {
        let ended = || Refusal::Failed("its thread ended".into());
        let (reply, answer) = oneshot::channel();
        let requests = self.requests.as_ref().expect("taken in drop only");
        requests.send(request(reply)).await.map_err(|_| ended())?;
        answer.await.unwrap_or_else(|_| Err(ended()))
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}
