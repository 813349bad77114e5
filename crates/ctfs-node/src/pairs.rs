//! The other servers as those who may keep a copy of this one's journal ([`ctfs_pair`]), over the network.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_journal::{Batch, JournalId, Position, TransportError};
use ctfs_net::{NetError, Network};
use ctfs_pair::{Peers, wire};
use ctfs_types::NodeId;

use crate::messages::service;

/// A batch takes as long as a chunk at most.
const BATCH_DEADLINE: Duration = Duration::from_secs(5);
/// Up to so many bytes a batch goes by a call, which waits for no stream of its own.
const BY_CALL_MAX: usize = 256 << 10;

pub struct PairPeers {
    pub network: Network,
}

#[async_trait]
impl Peers for PairPeers {
    fn distance(&self, to: NodeId) -> Option<Duration> {
        let peer = self.network.peer(to);
        peer.connected.then(|| peer.rtt.unwrap_or(Duration::MAX))
    }

    async fn send(&self, to: NodeId, id: JournalId, batch: Batch) -> Result<Position, TransportError> {
        let unreachable = |error: NetError| TransportError::Unreachable(error.to_string());
        let body = batch.encode();
        if body.len() <= BY_CALL_MAX {
            let answer = self.network.call(to, service::JOURNAL, wire::call(id, &body), BATCH_DEADLINE).await;
            wire::answer(&answer.map_err(unreachable)?)
        } else {
            let sent = self.network.bulk(to, service::JOURNAL_BULK, wire::header(id), Bytes::from(body), BATCH_DEADLINE).await;
            wire::answer(&sent.map_err(unreachable)?.0)
        }
    }
}
