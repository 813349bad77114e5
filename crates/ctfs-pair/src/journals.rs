//! The journals of this server's lives: what happened here before it was in the log.
//!
//! Each life has one. A life that ended without reaching the log with all of it leaves the rest to the next
//! one, which sends it before it reports itself: reporting ends the old life, and nothing of it happens
//! after that.

use std::{path::PathBuf, sync::Arc};

use ctfs_consensus::{Consensus, ProposeError};
use ctfs_host::blocking;
use ctfs_journal::{Disk, Journal, JournalError, JournalId, OldLife, Position, Record, Settings, lives};
use ctfs_types::{Holder, Incarnation, NodeId};
use ctfs_vfs::{FsError, Vfs};

use crate::InTheNameOf;

/// Read from a journal at once.
pub(crate) const PIECE_BYTES: usize = 1 << 20;
/// Journals put aside that stay.
const ASIDE_MAX: usize = 8;

/// Where this server keeps the journals of its lives.
#[derive(Clone)]
pub struct Journals {
    pub disk: Arc<dyn Disk>,
    pub root: PathBuf,
    pub cluster: [u8; 16],
    pub node: NodeId,
    pub settings: Settings,
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
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    pub(crate) fn id(&self, life: Holder) -> JournalId {
        JournalId { cluster: self.cluster, node: life.node, incarnation: life.incarnation }
    }

    /// Begins the journal of a life. Blocks for the disk.
    ///
    /// # Errors
    /// See [`Journal::create`].
    pub(crate) fn begin(&self, life: Incarnation) -> Result<Arc<Journal>, JournalError> {
        let id = self.id(Holder { node: self.node, incarnation: life });
        Journal::create(self.disk.clone(), &self.root, id, self.settings).map(Arc::new)
    }

    /// Sends what lives before `life` left behind, and removes their journals. Answers how many commands
    /// of them are in the log now.
    ///
    /// # Errors
    /// The journals stay, and all may be asked again.
    pub(crate) async fn replay(&self, life: Incarnation, consensus: &Consensus, vfs: &Vfs) -> Result<u64, ReplayError> {
        let this = self.clone();
        let found = read(move || match lives(&*this.disk, &this.root, this.cluster) {
            Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            found => found,
        })
        .await?;
        let mut happened = 0;
        for id in found.into_iter().filter(|id| id.node == self.node && id.incarnation < life) {
            let (disk, root) = (self.disk.clone(), self.root.clone());
            let old = Arc::new(read(move || OldLife::recover(disk, &root, id)).await?);
            let reader = old.clone();
            let by = Holder { node: self.node, incarnation: life };
            let sent = send(id, by, old.kept_from(), Arc::new(move |from| reader.read(from, PIECE_BYTES)), consensus, vfs).await?;
            happened += sent.happened;
            let Ok(old) = Arc::try_unwrap(old) else { unreachable!("its reader ended") };
            if sent.is_whole() {
                read(move || old.remove()).await?;
            } else {
                let aside = read(move || old.set_aside()).await?;
                tracing::error!(journal = %aside.display(), "the others went on without this server; what it had alone is kept there");
                self.keep_few_aside().await;
            }
        }
        Ok(happened)
    }

    /// Removes the oldest of the journals that were put aside, if they are many.
    async fn keep_few_aside(&self) {
        let this = self.clone();
        let removed = blocking(move || {
            let mut aside = this.disk.list(&this.root)?;
            aside.retain(|name| name.ends_with(".lost"));
            // Lives are numbered upwards, and all are of this server.
            aside.sort();
            let many = aside.len().saturating_sub(ASIDE_MAX);
            aside.iter().take(many).try_for_each(|name| this.disk.remove_dir(&this.root.join(name)))
        });
        if let Ok(Err(error)) = removed.await {
            tracing::warn!(%error, "journals that were put aside cannot be removed");
        }
    }
}

/// Reads records of a journal from a position on; none past the last.
pub(crate) type ReadRecords = Arc<dyn Fn(Position) -> Result<Vec<Record>, JournalError> + Send + Sync>;

/// What became of a journal that was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Commands that are in the log, now or before.
    pub happened: u64,
    /// Commands and files that are not, and will not be.
    pub lost: u64,
}

impl Sent {
    pub fn is_whole(self) -> bool {
        self.lost == 0
    }
}

/// Sends what the life `id` left in a journal: first all commands, then the bytes of files that the
/// metadata do not have yet. All of it as `by`, also when that life ends meanwhile: then the rest is refused, and
/// whoever begins anew begins with the first that was.
///
/// # Errors
/// All may be sent again.
pub(crate) async fn send(
    id: JournalId,
    by: Holder,
    kept_from: Position,
    records: ReadRecords,
    consensus: &Consensus,
    vfs: &Vfs,
) -> Result<Sent, ReplayError> {
    let (mut next, mut left) = (kept_from, Vec::new());
    let mut sent = Sent::default();
    loop {
        let (records, from) = (records.clone(), next);
        let records = read(move || records(from)).await?;
        let Some(last) = records.last() else { break };
        next = last.position.next();
        let mut commands = Vec::new();
        for record in records {
            match ctfs_consensus::Record::decode(&record.payload).map_err(|error| ReplayError::Record(error.to_string()))? {
                ctfs_consensus::Record::Command(command) => commands.push(command),
                ctfs_consensus::Record::Bytes(bytes) => left.push((record.position.0, bytes)),
            }
        }
        let replayed = consensus.replay(by, commands).await?;
        sent = Sent { happened: sent.happened + replayed.happened, lost: sent.lost + replayed.lost };
    }
    tracing::info!(happened = sent.happened, lost = sent.lost, bytes = left.len(), life = %id, "what an ended life left was sent");
    if !left.is_empty() {
        // What it says of its journal is in the log, and must be here.
        consensus.barrier().await?;
        let successor = InTheNameOf { consensus: consensus.clone(), by, life: id.incarnation };
        let done = vfs.write_left(Holder { node: id.node, incarnation: id.incarnation }, left, &successor).await?;
        sent.lost += done.lost.len() as u64;
    }
    Ok(sent)
}

async fn read<T: Send + 'static>(step: impl FnOnce() -> Result<T, JournalError> + Send + 'static) -> Result<T, JournalError> {
    match blocking(step).await {
        Ok(done) => done,
        Err(broken) => Err(JournalError::Broken(Arc::from(broken.to_string()))),
    }
}
