//! The journals of this server's lives: what happened here before it was in the log.
//!
//! Each life has one, in `journal` of the state directory. A life that ended without reaching the log
//! with all of it leaves the rest to the next one, which sends it before it reports itself: reporting
//! ends the old life, and nothing of it happens after that.

use std::{path::PathBuf, sync::Arc};

use ctfs_consensus::{Consensus, ProposeError};
use ctfs_journal::{Disk, Journal, JournalError, JournalId, OldLife, Position, Settings, SystemDisk, lives};
use ctfs_types::{Incarnation, NodeId};

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
    pub async fn replay(&self, life: Incarnation, consensus: &Consensus) -> Result<(), ReplayError> {
        let this = self.clone();
        let found = blocking(move || match lives(&*Self::disk(), &this.root, this.cluster) {
            Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            found => found,
        })
        .await?;
        for id in found.into_iter().filter(|id| id.node == self.node && id.incarnation < life) {
            let root = self.root.clone();
            let mut old = Some(blocking(move || OldLife::recover(Self::disk(), &root, id)).await?);
            let mut next = old.as_ref().map_or(Position::NONE, OldLife::kept_from);
            loop {
                let (back, records) = {
                    let old = old.take().expect("it is put back below");
                    blocking(move || {
                        let records = old.read(next, PIECE_BYTES)?;
                        Ok((old, records))
                    })
                    .await?
                };
                old = Some(back);
                let Some(last) = records.last() else { break };
                next = last.position.next();
                let commands = records.iter().map(|record| ctfs_consensus::decode_record(&record.payload));
                let commands = commands.collect::<Result<Vec<_>, _>>().map_err(|error| ReplayError::Record(error.to_string()))?;
                let replayed = consensus.replay(&commands).await?;
                tracing::info!(happened = replayed.happened, lost = replayed.lost, life = %id.incarnation.0, "changes of an earlier life were sent again");
            }
            if let Some(old) = old {
                blocking(move || old.remove()).await?;
            }
        }
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(step: impl FnOnce() -> Result<T, JournalError> + Send + 'static) -> Result<T, JournalError> {
    match tokio::task::spawn_blocking(step).await {
        Ok(done) => done,
        Err(broken) => Err(JournalError::Broken(Arc::from(broken.to_string()))),
    }
}
