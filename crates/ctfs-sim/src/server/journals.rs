//! The journals of one server's lives, as `ctfs-node` keeps them.

use std::{path::Path, sync::Arc};

use ctfs_consensus::Consensus;
use ctfs_journal::{Disk, Journal, JournalId, OldLife, Settings, lives};
use ctfs_types::{Incarnation, NodeId};

use crate::CrashDisk;

const CLUSTER: [u8; 16] = [7; 16];
const ROOT: &str = "journal";
const PIECE_BYTES: usize = 1 << 20;

/// Where this server keeps them.
#[derive(Clone)]
pub struct Journals {
    pub(crate) disk: CrashDisk,
    pub node: NodeId,
}

impl Journals {
    fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(self.disk.clone())
    }

    pub fn begin(&self, life: Incarnation) -> Arc<Journal> {
        let id = JournalId { cluster: CLUSTER, node: self.node, incarnation: life };
        let settings = Settings { segment_bytes: 16 << 10, ..Settings::default() };
        Arc::new(Journal::create(self.disk(), Path::new(ROOT), id, settings).expect("a new life has no journal yet"))
    }

    /// Sends what lives before `life` left behind, and removes their journals.
    ///
    /// # Errors
    /// A text; all may be asked again.
    pub async fn replay(&self, life: Incarnation, consensus: &Consensus) -> Result<u64, String> {
        let root = Path::new(ROOT);
        let mut happened = 0;
        if self.disk().list(root).map_err(|error| error.to_string())?.is_empty() {
            return Ok(0);
        }
        let found = lives(&self.disk, root, CLUSTER).map_err(|error| error.to_string())?;
        for id in found.into_iter().filter(|id| id.node == self.node && id.incarnation < life) {
            let old = OldLife::recover(self.disk(), root, id).map_err(|error| error.to_string())?;
            let mut next = old.kept_from();
            loop {
                let records = old.read(next, PIECE_BYTES).map_err(|error| error.to_string())?;
                let Some(last) = records.last() else { break };
                next = last.position.next();
                let commands = records.iter().map(|record| ctfs_consensus::decode_record(&record.payload));
                let commands = commands.collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
                happened += consensus.replay(&commands).await.map_err(|error| error.to_string())?.happened as u64;
            }
            old.remove().map_err(|error| error.to_string())?;
        }
        Ok(happened)
    }
}
