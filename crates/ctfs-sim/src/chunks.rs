//! The chunk stores of all servers: what was put is synced, and stays with its server until it is dropped.

use std::{collections::{BTreeMap, BTreeSet}, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_types::{ChunkId, NodeId};
use ctfs_vfs::{ChunkAccess, FsError, SpaceReport};

use crate::shared::Shared;

#[derive(Default)]
pub struct Chunks {
    stores: BTreeMap<NodeId, BTreeMap<ChunkId, Kept>>,
    lost: BTreeSet<NodeId>,
}

/// A chunk on one server.
struct Kept {
    bytes: Bytes,
    pinned_until: Duration,
}

/// A chunk that was put is dropped by nobody for so long. Ten minutes in the product.
pub const PINNED_FOR: Duration = Duration::from_secs(16);

impl Chunks {
    /// What a server has and might drop.
    pub fn unpinned(&self, node: NodeId, now: Duration) -> Vec<ChunkId> {
        let store = self.stores.get(&node).into_iter().flatten();
        store.filter(|(_, kept)| kept.pinned_until <= now).map(|(id, _)| *id).collect()
    }

    /// Drops one, unless it was put again meanwhile; answers whether it did.
    pub fn delete(&mut self, node: NodeId, id: &ChunkId, now: Duration) -> bool {
        let Some(store) = self.stores.get_mut(&node) else { return false };
        let may_go = store.get(id).is_some_and(|kept| kept.pinned_until <= now);
        may_go && store.remove(id).is_some()
    }

    /// The server's disk is gone for good.
    pub fn lose(&mut self, node: NodeId) {
        self.stores.remove(&node);
        self.lost.insert(node);
    }

    pub fn is_lost(&self, node: NodeId) -> bool {
        self.lost.contains(&node)
    }
}

/// The chunks as one server reaches them.
pub struct ReachedChunks {
    pub me: NodeId,
    pub shared: Arc<Shared>,
}

/// Servers that must have synced a chunk.
const COPIES: usize = 2;

impl ReachedChunks {
    async fn pause(&self) {
        let micros = self.shared.draw(|chance| chance.between(500, 5_000));
        tokio::time::sleep(Duration::from_micros(micros)).await;
    }

    fn reaches(&self, other: NodeId) -> bool {
        other == self.me || self.shared.wires.lock().connects(self.me, other)
    }
}

#[async_trait]
impl ChunkAccess for ReachedChunks {
    async fn get(&self, id: ChunkId, _len: u32) -> Result<Bytes, FsError> {
        self.pause().await;
        let holders: Vec<(NodeId, Bytes)> = {
            let chunks = self.shared.chunks.lock();
            chunks.stores.iter().filter_map(|(node, store)| Some((*node, store.get(&id)?.bytes.clone()))).collect()
        };
        if holders.is_empty() {
            return Err(FsError::ChunkLost { chunk: id });
        }
        let found = holders.into_iter().find(|(node, _)| self.reaches(*node));
        found.map(|(_, bytes)| bytes).ok_or_else(|| FsError::ChunkUnavailable { chunk: id, why: "cut off".to_owned() })
    }

    async fn put(&self, bytes: Bytes, _copies: u8) -> Result<ChunkId, FsError> {
        self.pause().await;
        let id = ChunkId(*blake3::hash(&bytes).as_bytes());
        let nodes: Vec<NodeId> = (1..=5).map(NodeId).filter(|node| self.shared.wires.lock().is_up(*node)).collect();
        let reached: Vec<NodeId> = nodes.into_iter().filter(|node| *node != self.me && self.reaches(*node)).collect();
        let others: Vec<NodeId> = reached.into_iter().take(COPIES - 1).collect();
        if others.len() < COPIES - 1 {
            return Err(FsError::TooFewCopies { wanted: COPIES as u8, synced: 1 });
        }
        let pinned_until = self.shared.now() + PINNED_FOR;
        let mut chunks = self.shared.chunks.lock();
        for node in others.into_iter().chain([self.me]) {
            chunks.stores.entry(node).or_default().insert(id, Kept { bytes: bytes.clone(), pinned_until });
        }
        Ok(id)
    }

    fn prefetch(&self, _id: ChunkId, _len: u32) {}

    fn free(&self) -> SpaceReport {
        SpaceReport { total: 100 << 30, free: 60 << 30, available: 50 << 30, files: 1_000_000 }
    }
}
