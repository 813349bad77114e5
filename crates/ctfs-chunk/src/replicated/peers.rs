//! What replicated access needs of the other servers. Implemented over the network by the node,
//! and in memory by tests.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_types::{ChunkId, NodeId};
use serde::{Deserialize, Serialize};

use crate::store::StoreError;

/// The other servers' chunk stores. A call may take as long as it likes; the caller bounds it.
///
/// Nothing that comes back is trusted: chunks are compared with their names by the caller.
#[async_trait]
pub trait ChunkPeers: Send + Sync + 'static {
    /// The raw bytes of a chunk, `None` when the peer does not hold it.
    async fn get(&self, node: NodeId, id: ChunkId) -> Result<Option<Bytes>, PeerError>;
    /// Durable on the peer when it returns `Ok`.
    async fn put(&self, node: NodeId, id: ChunkId, bytes: Bytes) -> Result<(), PeerError>;
    /// Which of these the peer holds, in their order; it pins those.
    async fn has(&self, node: NodeId, ids: Vec<ChunkId>) -> Result<Vec<bool>, PeerError>;
    /// Whether a call would probably get through. A guess: it only decides who is asked first.
    fn reachable(&self, node: NodeId) -> bool;
    /// Smoothed round trip time, once known.
    fn rtt(&self, node: NodeId) -> Option<Duration>;
}

/// Why a server did not do what it was asked. Travels over the wire as the answer of a server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum PeerError {
    #[error("not reachable")]
    Unreachable,
    #[error("no answer in time")]
    Deadline,
    #[error("chunk store is full")]
    Full,
    /// The request itself was wrong; asking again does not help.
    #[error("refused: {0}")]
    Refused(String),
    #[error("failed: {0}")]
    Failed(String),
}

impl From<StoreError> for PeerError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full { .. } => Self::Full,
            StoreError::TooLong { .. } => Self::Refused(error.to_string()),
            StoreError::Failed(_) | StoreError::Io { .. } | StoreError::Locked | StoreError::Version { .. } => {
                Self::Failed(error.to_string())
            }
        }
    }
}
