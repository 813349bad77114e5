//! The metadata and the other holders, as `ctfs-node` hands them to the file system.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use ctfs_consensus::{Consensus, Transport};
use ctfs_meta::{Durability, Op, Reply, SharedNamespace, Subject};
use ctfs_pair::no_verdict;
use ctfs_types::{Attr, FileBytes, Holder, Incarnation, Ino, LogIndex, NodeId, codec};
use ctfs_vfs::{FsError, Happened, Holders, Metadata, Request};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::network::Link;

/// As in `ctfs-node`.
const HOLDER_DEADLINE: Duration = Duration::from_secs(10);

const VERSION: u8 = 1;
const MESSAGE_BYTES_MAX: usize = 2 << 20;

pub mod service {
    pub const OPEN_ORPHANS: u16 = 0x0302;
    pub const RECALL: u16 = 0x0305;
    pub const PEEK: u16 = 0x0306;
    pub const SETTLE: u16 = 0x0307;
    pub const JOURNAL: u16 = 0x0501;
}

/// A file or directory of one life of a server.
#[derive(Debug, Serialize, Deserialize)]
pub struct HeldFile {
    pub incarnation: Incarnation,
    pub ino: Ino,
}

/// Which of these are open at a server that has applied so much.
#[derive(Debug, Serialize, Deserialize)]
pub struct OpenOrphans {
    pub applied: LogIndex,
    pub inos: Vec<Ino>,
}

pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    codec::encode(VERSION, message)
}

/// # Errors
/// A text for the log of who sent it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    codec::decode(VERSION, bytes, MESSAGE_BYTES_MAX).map_err(|error| error.to_string())
}

/// The replicated metadata, reached from this server.
pub struct ReplicatedMetadata {
    pub consensus: Consensus,
    pub replica: SharedNamespace,
    pub node: NodeId,
}

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

    async fn settled(&self) -> Result<(), FsError> {
        self.consensus.await_streamed().await.map_err(no_verdict)
    }

    fn close_ahead(&self, dirs: &[Ino]) {
        self.consensus.close_ahead(dirs);
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
pub struct PeerHolders(pub Arc<Link>);

impl PeerHolders {
    async fn ask(&self, holder: Holder, ino: Ino, service: u16) -> Result<Vec<u8>, FsError> {
        let file = encode(&HeldFile { incarnation: holder.incarnation, ino });
        let answer = self.0.call(holder.node, service, file, HOLDER_DEADLINE).await;
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
        decode(&answer).map_err(|why| FsError::HolderAway { node: holder.node, why })
    }

    async fn settle(&self, life: Holder) -> Result<(), FsError> {
        self.ask(life, Ino::ROOT, service::SETTLE).await.map(drop)
    }
}
