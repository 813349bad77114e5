//! The journals of one server's lives, as `ctfs-node` keeps them.

use std::{path::Path, sync::Arc};

use ctfs_consensus::{Consensus, Record};
use ctfs_journal::{Disk, Journal, JournalId, OldLife, Settings, lives};
use ctfs_types::{Holder, Incarnation, NodeId};
use ctfs_vfs::Vfs;

use super::metadata::InTheNameOf;
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
    pub async fn replay(&self, life: Incarnation, consensus: &Consensus, vfs: &Vfs) -> Result<u64, String> {
        let root = Path::new(ROOT);
        let mut happened = 0;
        if self.disk().list(root).map_err(|error| error.to_string())?.is_empty() {
            return Ok(0);
        }
        let found = lives(&self.disk, root, CLUSTER).map_err(|error| error.to_string())?;
        for id in found.into_iter().filter(|id| id.node == self.node && id.incarnation < life) {
            let old = OldLife::recover(self.disk(), root, id).map_err(|error| error.to_string())?;
            let (mut next, mut left) = (old.kept_from(), Vec::new());
            loop {
                let records = old.read(next, PIECE_BYTES).map_err(|error| error.to_string())?;
                let Some(last) = records.last() else { break };
                next = last.position.next();
                let mut commands = Vec::new();
                for record in records {
                    match Record::decode(&record.payload).map_err(|error| error.to_string())? {
                        Record::Command(command) => commands.push(command),
                        Record::Bytes(bytes) => left.push((record.position.0, bytes)),
                    }
                }
                happened += consensus.replay(commands).await.map_err(|error| error.to_string())?.happened;
            }
            if !left.is_empty() {
                consensus.barrier().await.map_err(|error| error.to_string())?;
                let successor = InTheNameOf { consensus: consensus.clone(), life: id.incarnation };
                let holder = Holder { node: id.node, incarnation: id.incarnation };
                vfs.write_left(holder, left, &successor).await.map_err(|error| error.to_string())?;
            }
            old.remove().map_err(|error| error.to_string())?;
        }
        Ok(happened)
    }
}
