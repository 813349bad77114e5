//! How a chunk is put on the servers that should hold it.

use bytes::Bytes;
use ctfs_types::{
    ChunkId, NodeId,
    limits::{CHUNK_BYTES_MAX, COPIES_ON_EVERY},
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::Instant;
use tracing::debug;

use super::{Chunks, PeerError, PutError, Reasons, Stored, counters::count, hash};
use crate::Placement;

/// Fewer durable copies than this are no success while there are that many servers.
const COPIES_MIN: usize = 2;

impl Chunks {
    /// Stores a chunk on `copies` servers (0 = automatic): the first in rank that take it.
    ///
    /// Returns when every server tried has finished or failed and at least two (or as many as
    /// were asked for, or as there are) have it on stable storage. Repair moves copies that had
    /// to go elsewhere. With [`COPIES_ON_EVERY`] every server that can be reached must have it, and at
    /// least two; repair brings it to the others when they are back.
    ///
    /// # Errors
    /// [`PutError`], within [`super::ChunkSettings::put_deadline`].
    pub async fn put(&self, bytes: Bytes, copies: u8) -> Result<Stored, PutError> {
        let len = bytes.len();
        if len > CHUNK_BYTES_MAX {
            return Err(PutError::TooLong { len });
        }
        let result = self.put_copies(bytes, copies).await;
        match &result {
            Ok(_) => {
                count(&self.shared.counters.puts, 1);
                count(&self.shared.counters.put_bytes, len as u64);
            }
            Err(_) => count(&self.shared.counters.put_failures, 1),
        }
        result
    }

    async fn put_copies(&self, bytes: Bytes, copies: u8) -> Result<Stored, PutError> {
        let too_few = |wanted, got, reasons| PutError::TooFewCopies { wanted, got, reasons };
        let Some(id) = hash(&bytes).await else { return Err(too_few(1, 0, Reasons::default())) };
        let rank = self.cluster().placement.rank(&id);
        let wanted = Placement::copies_for(copies, rank.len());
        let needed = wanted.min(COPIES_MIN);
        let on_every = copies == COPIES_ON_EVERY;
        let deadline = Instant::now() + self.shared.settings.put_deadline;

        // Those that seem unreachable are tried only when the others are not enough.
        let (near, far): (Vec<_>, Vec<_>) = rank.iter().copied().partition(|&node| self.is_near(node));
        let mut nearest = near.iter().copied();
        let mut far = far.into_iter();
        let mut holders = Vec::new();
        let mut reasons = Reasons::default();
        let mut full = 0;
        let mut attempts = FuturesUnordered::new();
        loop {
            while holders.len() + attempts.len() < wanted {
                // A server that was never dialled is not known to be away.
                let more = || on_every || holders.len() + attempts.len() < needed;
                let Some(node) = nearest.next().or_else(|| more().then(|| far.next()).flatten()) else { break };
                let bytes = bytes.clone();
                attempts.push(async move { (node, self.put_on(node, id, bytes, copies, deadline).await) });
            }
            match attempts.next().await {
                None => break,
                Some((node, Ok(()))) => holders.push(node),
                Some((node, Err(error))) => {
                    debug!(peer = %node, chunk = %id, %error, "server did not take a chunk");
                    full += usize::from(error == PeerError::Full);
                    reasons.0.push((node, error.to_string()));
                }
            }
        }
        let ideal = &rank[..wanted];
        let detours = holders.iter().filter(|node| !ideal.contains(node)).count();
        count(&self.shared.counters.put_detours, detours as u64);
        // On every server is on all that were there and still are.
        let is_passed_over = |node: &NodeId| on_every && !(near.contains(node) && self.is_near(*node));
        let missed = reasons.0.iter().filter(|(node, _)| !is_passed_over(node)).count();
        let needed = if on_every { needed.max(holders.len() + missed) } else { needed };
        if holders.len() >= needed.max(1) {
            Ok(Stored { id, holders })
        } else if full > 0 && full == missed {
            Err(PutError::Full)
        } else {
            Err(too_few(needed.max(1), holders.len(), reasons))
        }
    }

    fn is_near(&self, node: NodeId) -> bool {
        node == self.shared.local || self.shared.peers.reachable(node)
    }

    async fn put_on(&self, node: NodeId, id: ChunkId, bytes: Bytes, copies: u8, deadline: Instant) -> Result<(), PeerError> {
        let settings = &self.shared.settings;
        if node == self.shared.local {
            // The own disk gets the whole time: a busy one is better than a copy elsewhere.
            let put = tokio::time::timeout_at(deadline, self.shared.store.put(id, bytes)).await;
            return Ok(put.map_err(|_| PeerError::Deadline)??);
        }
        // No other server can take it in its stead when it shall be on all.
        let until = if copies == COPIES_ON_EVERY { deadline } else { deadline.min(Instant::now() + settings.peer_put_deadline) };
        let put = tokio::time::timeout_at(until, self.shared.peers.put(node, id, bytes)).await;
        put.map_err(|_| PeerError::Deadline)?
    }
}
