//! The journals of this server's lives: what happened here before it was in the log.
//!
//! Each life has one, in `journal` of the state directory. A life that ended without reaching the log
//! with all of it leaves the rest to the next one, which sends it before it reports itself: reporting
//! ends the old life, and nothing of it happens after that.

use std::{path::PathBuf, sync::Arc};

use ctfs_consensus::{Consensus, ProposeError};
use ctfs_journal::{Disk, Journal, JournalError, JournalId, OldLife, Position, Record, Settings, SystemDisk, lives};
use ctfs_types::{Holder, Incarnation, NodeId};
use ctfs_vfs::{FsError, Vfs};

use crate::access::InTheNameOf;

/// Read from a journal at once.
const PIECE_BYTES: usize = 1 << 20;

/// Where this server keeps the journals of its lives.
#[derive(Clone)]
pub struct Journals {
    root: PathBuf,
    cluster: [u8; 16],
    node: NodeId,
}

/// Why an earlier life's journal was not replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("a record of the journal is none of this version: {0}")]
    Record(String),
    #[error(transparent)]
    Log(#[from] ProposeError),
    #[error(transparent)]
    Files(#[from] FsError),
}

impl Journals {
    pub fn new(root: PathBuf, cluster: [u8; 16], node: NodeId) -> Self {
        Self { root, cluster, node }
    }

    fn disk() -> Arc<dyn Disk> {
        Arc::new(SystemDisk)
    }

    /// Begins the journal of a life. Blocks for the disk.
    ///
    /// # Errors
    /// See [`Journal::create`].
    pub fn begin(&self, life: Incarnation) -> Result<Arc<Journal>, JournalError> {
        let id = JournalId { cluster: self.cluster, node: self.node, incarnation: life };
        Journal::create(Self::disk(), &self.root, id, Settings::default()).map(Arc::new)
    }

    /// Sends what lives before `life` left behind, and removes their journals.
    ///
    /// # Errors
    /// The journals stay, and all may be asked again.
    pub async fn replay(&self, life: Incarnation, consensus: &Consensus, vfs: &Vfs) -> Result<(), ReplayError> {
        let this = self.clone();
        let found = blocking(move || match lives(&*Self::disk(), &this.root, this.cluster) {
            Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            found => found,
        })
        .await?;
        for id in found.into_iter().filter(|id| id.node == self.node && id.incarnation < life) {
            let root = self.root.clone();
            let old = Arc::new(blocking(move || OldLife::recover(Self::disk(), &root, id)).await?);
            let reader = old.clone();
            let sent = send(id, old.kept_from(), Arc::new(move |from| reader.read(from, PIECE_BYTES)), consensus, vfs).await?;
            let Ok(old) = Arc::try_unwrap(old) else { unreachable!("its reader ended") };
            if sent {
                blocking(move || old.remove()).await?;
            } else {
                let aside = blocking(move || old.set_aside()).await?;
                tracing::error!(journal = %aside.display(), "the others went on without this server; what it had alone is kept there");
                self.keep_few_aside().await;
            }
        }
        Ok(())
    }
}

/// Journals put aside that stay.
const ASIDE_MAX: usize = 8;

impl Journals {
    /// Removes the oldest of the journals that were put aside, if they are many.
    async fn keep_few_aside(&self) {
        let root = self.root.clone();
        let removed = tokio::task::spawn_blocking(move || {
            let mut aside: Vec<_> = std::fs::read_dir(root)?.flatten().map(|entry| entry.path()).collect();
            aside.retain(|path| path.extension().is_some_and(|extension| extension == "lost"));
            // Lives are numbered upwards, and all are of this server.
            aside.sort();
            let many = aside.len().saturating_sub(ASIDE_MAX);
            aside.iter().take(many).try_for_each(std::fs::remove_dir_all)
        });
        if let Ok(Err(error)) = removed.await {
            tracing::warn!(%error, "journals that were put aside cannot be removed");
        }
    }
}

/// Reads records of a journal from a position on; none past the last.
pub type ReadRecords = Arc<dyn Fn(Position) -> Result<Vec<Record>, JournalError> + Send + Sync>;

/// Sends what the life `id` left in a journal: first all commands, then the bytes of files that the
/// metadata do not have yet. Answers whether all of it has happened, now or before.
///
/// # Errors
/// All may be sent again.
pub async fn send(id: JournalId, kept_from: Position, read: ReadRecords, consensus: &Consensus, vfs: &Vfs) -> Result<bool, ReplayError> {
    let (mut next, mut left) = (kept_from, Vec::new());
    let (mut happened, mut lost) = (0, 0);
    loop {
        let (read, from) = (read.clone(), next);
        let records = blocking(move || read(from)).await?;
        let Some(last) = records.last() else { break };
        next = last.position.next();
        let mut commands = Vec::new();
        for record in records {
            match ctfs_consensus::Record::decode(&record.payload).map_err(|error| ReplayError::Record(error.to_string()))? {
                ctfs_consensus::Record::Command(command) => commands.push(command),
                ctfs_consensus::Record::Bytes(bytes) => left.push((record.position.0, bytes)),
            }
        }
        let replayed = consensus.replay(commands).await?;
        (happened, lost) = (happened + replayed.happened, lost + replayed.lost);
    }
    tracing::info!(happened, lost, bytes = left.len(), life = %id, "what an ended life left was sent");
    if !left.is_empty() {
        // What it says of its journal is in the log, and must be here.
        consensus.barrier().await?;
        let successor = InTheNameOf { consensus: consensus.clone(), life: id.incarnation };
        let done = vfs.write_left(Holder { node: id.node, incarnation: id.incarnation }, left, &successor).await?;
        lost += done.lost.len() as u64;
    }
    Ok(lost == 0)
}

async fn blocking<T: Send + 'static>(step: impl FnOnce() -> Result<T, JournalError> + Send + 'static) -> Result<T, JournalError> {
    match tokio::task::spawn_blocking(step).await {
        Ok(done) => done,
        Err(broken) => Err(JournalError::Broken(Arc::from(broken.to_string()))),
    }
}
