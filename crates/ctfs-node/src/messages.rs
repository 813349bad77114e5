//! What servers say to each other besides consensus: chunks, orphans, reports, joining.
//!
//! Every message is a codec record of version 1; the service number says which.

use ctfs_meta::{ClusterIdentity, Member};
use ctfs_types::{Incarnation, Ino, LogIndex, NodeId, codec};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::admin::Room;

/// Service numbers; the high byte picks the stream, so that classes do not wait for each other.
pub mod service {
    /// Everything the consensus crate serves itself.
    pub const CONSENSUS: std::ops::RangeInclusive<u16> = 0x0100..=0x02ff;
    pub const HAVE_CHUNKS: u16 = 0x0301;
    pub const OPEN_ORPHANS: u16 = 0x0302;
    pub const REPORT: u16 = 0x0303;
    /// To the leader: take a member out of the voters and learners, then remove it.
    pub const REMOVE_MEMBER: u16 = 0x0304;
    /// Have the answering server give up a file that it holds.
    pub const RECALL: u16 = 0x0305;
    /// The attributes of a file that the answering server holds.
    pub const PEEK: u16 = 0x0306;
    /// Have all that programs of the answering server did put into the metadata.
    pub const SETTLE: u16 = 0x0307;
    pub const GET_CHUNK: u16 = 0x0401;
    pub const PUT_CHUNK: u16 = 0x0402;
    /// Records of the asking server's journal, for the copy that the answering one keeps; on a stream of
    /// its own, because fsync waits for it.
    pub const JOURNAL: u16 = 0x0501;
    pub const JOURNAL_BULK: u16 = 0x0502;
}

const VERSION: u8 = 1;
/// Lists of chunks or inodes in one call.
pub const LIST_MAX: usize = 4096;

/// Which of these are open on the answering server, once it has applied `applied`?
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OpenOrphans {
    pub applied: LogIndex,
    pub inos: Vec<Ino>,
}

/// About a file, to the life of a server that holds it; the root, where it is about all of them.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct HeldFile {
    pub incarnation: Incarnation,
    pub ino: Ino,
}

/// The figures of one server, for `ctfs status`, `statfs` and placement.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ServerFigures {
    pub applied: u64,
    pub cache_used: u64,
    pub cache_limit: u64,
    pub store_used: u64,
    pub store_capacity: u64,
    pub store_free: u64,
    pub chunks: u64,
    /// Chunks that placement gives to this server and it does not hold yet.
    pub missing: u64,
    /// For which placement the last repair walk was made ([`crate::repair::placement_mark`]);
    /// `missing` is what it left.
    pub walked: u64,
    /// Log index up to which that walk at least knew the chunks and the members.
    pub walked_at: u64,
    /// Of `missing`, chunks its own store had no room for.
    pub refused: u64,
    /// Why its consensus has stopped: it answers, and learns of no change.
    pub stopped: Option<String>,
    /// Room on the disk of its log and metadata.
    pub room: Room,
    /// At the leader: members whose log has not answered for some time, connected or not.
    pub unanswering: Vec<NodeId>,
    /// Why its chunk store accepts nothing more.
    pub store_failed: Option<String>,
    pub version: String,
}

/// What a joining server shows once it trusts the server it talks to.
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinRequest {
    pub secret: [u8; 16],
    pub name: String,
    pub zone: String,
    /// Where it listens, its own idea; the port is added to the address it called from.
    pub addresses: Vec<String>,
    pub port: u16,
    pub capacity: u64,
    pub version: String,
}

/// What makes a server a member.
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinReply {
    pub cluster: ClusterIdentity,
    /// DER, signed by the cluster's authority.
    pub certificate: Vec<u8>,
    /// PEM; every server can let the next one in.
    pub authority_key: String,
    pub members: Vec<Member>,
}


pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    codec::encode(VERSION, message)
}

/// # Errors
/// A sentence for the peer; the peer is at fault or of another version.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    codec::decode(VERSION, bytes, 2 << 20).map_err(|error| error.to_string())
}
