//! The metadata and the chunks, as the file system semantics want to see them.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use ctfs_chunk::{ChunkError, Chunks, PutError};
use ctfs_consensus::Consensus;
use ctfs_meta::{Durability, Op, Reply, SharedNamespace, Subject};
use ctfs_net::Network;
use ctfs_pair::no_verdict;
use ctfs_types::{Attr, ChunkId, FileBytes, Holder, Incarnation, Ino, LogIndex, NodeId};
use ctfs_vfs::{ChunkAccess, FsError, Happened, Holders, Metadata, Request, SpaceReport};

use crate::{
    messages::{self, HeldFile, service},
    report::Figures,
};

/// A holder that is asked for a file may have to flush much of it first.
const HOLDER_DEADLINE: Duration = Duration::from_secs(10);

/// The replicated metadata, reached from this server.
pub struct ReplicatedMetadata {
    pub consensus: Consensus,
    pub replica: SharedNamespace,
    pub node: NodeId,
}

/// A request to the replicated log.
struct Agreed(ctfs_consensus::Request);

#[async_trait]
impl Request for Agreed {
    async fn propose(&self, op: Op) -> Result<Reply, FsError> {
        self.0.propose(op).await.map_err(no_verdict)?.map_err(FsError::Meta)
    }
}

#[async_trait]
impl Metadata for ReplicatedMetadata {
    fn replica(&self) -> &SharedNamespace {
        &self.replica
    }

    fn request(&self) -> Arc<dyn Request> {
        Arc::new(Agreed(self.consensus.request()))
    }

    fn happen(&self, op: &Op) -> Option<Happened> {
        Some(match self.consensus.happen(op)? {
            ctfs_consensus::Happened::Answered(answer) => Happened::Answered(answer.map_err(FsError::Meta)),
            ctfs_consensus::Happened::Unsure(reply) => Happened::Unsure(reply),
        })
    }

    fn close_ahead(&self, dirs: &[Ino]) {
        self.consensus.close_ahead(dirs);
    }

    async fn settled(&self) -> Result<(), FsError> {
        self.consensus.await_streamed().await.map_err(no_verdict)
    }

    fn write_down(&self, bytes: &FileBytes) -> Option<u64> {
        self.consensus.write_down(bytes)
    }

    fn let_go(&self, ino: Ino, upto: u64) {
        self.consensus.let_go(ino, upto);
    }

    fn kept_from(&self) -> u64 {
        self.consensus.kept_from()
    }

    fn journal_counts(&self, class: Durability) -> bool {
        self.consensus.journal_counts(class)
    }

    async fn durable(&self, class: Durability) -> Result<bool, FsError> {
        self.consensus.durable(class).await.map_err(no_verdict)
    }

    async fn barrier(&self) -> Result<(), FsError> {
        self.consensus.barrier().await.map_err(no_verdict)
    }

    fn node(&self) -> NodeId {
        self.node
    }

    fn incarnation(&self) -> Incarnation {
        self.consensus.incarnation()
    }

    fn leased_for(&self) -> Duration {
        self.consensus.leased_for()
    }

    fn ahead(&self) -> Option<LogIndex> {
        self.consensus.ahead()
    }

    fn unseen_change(&self, subject: &Subject) -> Option<LogIndex> {
        self.consensus.unseen_change(subject)
    }

    async fn await_visible(&self, index: LogIndex) -> Result<(), FsError> {
        self.consensus.await_visible(index).await.map_err(no_verdict)
    }
}

/// The other servers, as holders of files.
pub struct PeerHolders {
    pub network: Network,
}

impl PeerHolders {
    async fn ask(&self, holder: Holder, ino: Ino, service: u16) -> Result<Vec<u8>, FsError> {
        let file = messages::encode(&HeldFile { incarnation: holder.incarnation, ino });
        let answer = self.network.call(holder.node, service, file, HOLDER_DEADLINE).await;
        answer.map_err(|error| FsError::HolderAway { node: holder.node, why: error.to_string() })
    }
}

#[async_trait]
impl Holders for PeerHolders {
    async fn recall(&self, holder: Holder, ino: Ino) -> Result<(), FsError> {
        self.ask(holder, ino, service::RECALL).await.map(drop)
    }

    async fn peek(&self, holder: Holder, ino: Ino) -> Result<Attr, FsError> {
        let answer = self.ask(holder, ino, service::PEEK).await?;
        messages::decode(&answer).map_err(|why| FsError::HolderAway { node: holder.node, why })
    }

    async fn settle(&self, life: Holder) -> Result<(), FsError> {
        self.ask(life, Ino::ROOT, service::SETTLE).await.map(drop)
    }
}

/// The chunks of the whole cluster, reached from this server.
pub struct ClusterChunks {
    pub chunks: Chunks,
    pub figures: Arc<Figures>,
    pub runtime: tokio::runtime::Handle,
}

#[async_trait]
impl ChunkAccess for ClusterChunks {
    async fn get(&self, id: ChunkId, len: u32) -> Result<Bytes, FsError> {
        self.chunks.get(id, len).await.map_err(|error| {
            tracing::error!(chunk = %id, %error, "chunk cannot be read");
            match error {
                ChunkError::Lost { id, .. } => FsError::ChunkLost { chunk: id },
                other => FsError::ChunkUnavailable { chunk: id, why: other.to_string() },
            }
        })
    }

    async fn put(&self, bytes: Bytes, copies: u8) -> Result<ChunkId, FsError> {
        self.chunks.put(bytes, copies).await.map(|stored| stored.id).map_err(|error| {
            tracing::warn!(%error, "chunk cannot be stored");
            match error {
                PutError::Full => FsError::NoSpace,
                PutError::TooFewCopies { wanted, got, .. } => FsError::TooFewCopies { wanted: wanted as u8, synced: got as u8 },
                PutError::TooLong { .. } => FsError::TooBig,
            }
        })
    }

    fn prefetch(&self, id: ChunkId, len: u32) {
        let chunks = self.chunks.clone();
        self.runtime.spawn(async move {
            if let Err(error) = chunks.get(id, len).await {
                tracing::debug!(chunk = %id, %error, "read-ahead failed");
            }
        });
    }

    fn free(&self) -> SpaceReport {
        self.figures.space()
    }
}
