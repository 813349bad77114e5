//! The journals of one server's lives and the copies of others', as `ctfs-node` keeps them.

use std::{path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use ctfs_consensus::Transport;
use ctfs_journal::{Batch, Copies, CopySettings, JournalId, Position, Settings, TransportError};
use ctfs_pair::{Journals, Peers, wire};
use ctfs_types::NodeId;

use super::metadata::service;
use crate::{CrashDisk, network::Link};

const CLUSTER: [u8; 16] = [7; 16];
/// Small, so that a run has several.
const SEGMENT_BYTES: u64 = 16 << 10;
/// As in `ctfs-node`.
const BATCH_DEADLINE: Duration = Duration::from_secs(5);

/// Where a server keeps the journals of its lives.
pub(crate) fn journals(disk: &CrashDisk, node: NodeId) -> Journals {
    let settings = Settings { segment_bytes: SEGMENT_BYTES, ..Settings::default() };
    Journals { disk: Arc::new(disk.clone()), root: "journal".into(), cluster: CLUSTER, node, settings }
}

/// Opens the copies that a server keeps for others.
pub(crate) fn copies(disk: &CrashDisk) -> Arc<Copies> {
    let settings = CopySettings { segment_bytes: SEGMENT_BYTES, ..CopySettings::default() };
    let copies = Copies::open(Arc::new(disk.clone()), Path::new("copies"), CLUSTER, settings);
    Arc::new(copies.expect("a crash damages nothing that was synced"))
}

#[async_trait]
impl Peers for Link {
    fn distance(&self, to: NodeId) -> Option<Duration> {
        self.shared.wires.lock().distance(self.me, to)
    }

    async fn send(&self, to: NodeId, id: JournalId, batch: Batch) -> Result<Position, TransportError> {
        let call = wire::call(id, &batch.encode());
        let answer = self.call(to, service::JOURNAL, call, BATCH_DEADLINE).await;
        wire::answer(&answer.map_err(|error| TransportError::Unreachable(error.to_string()))?)
    }
}
