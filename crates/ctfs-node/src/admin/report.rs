//! What the daemon answers: documents with the numbers, not the sentences, so that the program
//! can print them for people and scripts can read them.
//!
//! Fields are added, never renamed: `ctfs status --json` prints these as they are.

use ctfs_meta::{Durability, OnPartition};
use ctfs_types::{ByteSize, Timestamp};
use serde::{Deserialize, Serialize};

use super::request::WirePath;

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingReport {
    pub pid: u32,
    pub name: String,
    pub version: String,
    /// Where it is mounted now.
    pub mountpoint: Option<WirePath>,
    /// BLAKE3 of the cluster's certificate authority, hexadecimal: what a join token pins.
    #[serde(default)]
    pub authority: String,
}

/// Something was done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoneReport {
    /// One sentence without a full stop: "unmounted /srv/data".
    pub message: String,
    /// What the operator should know besides.
    #[serde(default)]
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Everything answers and has the copies its policy asks for.
    Healthy,
    /// All data can be read and written, with less redundancy or speed than asked for.
    Degraded,
    /// Something cannot be read or written now.
    Unavailable,
}

/// How this server sees the cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    pub cluster_name: String,
    pub cluster_id: String,
    pub verdict: Verdict,
    /// One line after the verdict: "2 of 3 servers alive, all data readable and writable".
    pub summary: String,
    pub why: Vec<String>,
    pub action: Vec<String>,
    /// Name of the server that answers.
    pub this_node: String,
    pub servers: Vec<ServerReport>,
    pub mounts: Vec<MountReport>,
    pub cache: CacheReport,
    pub jobs: Vec<JobReport>,
    pub chunks: ChunksReport,
    /// Log index applied here.
    pub applied: u64,
    pub term: u64,
    /// Name of the leader; `None` while there is none.
    pub leader: Option<String>,
    /// Whether this server answers from its own copy of the metadata, which nobody may change unseen.
    pub leased: bool,
    pub reads: ReadsReport,
    pub journal: JournalReport,
    pub directories: DirectoriesReport,
}

/// Reads on a server that may be cut off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadsReport {
    /// No majority answers: each directory's policy says what reads do.
    pub cut_off: bool,
    /// Since the daemon started, reads answered with what this server knew last.
    pub stale: u64,
}

/// Directories that servers hold alone, and what this one did about them since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoriesReport {
    /// Held now, by any server.
    pub held: u64,
    /// Taken here, by a command of their own.
    pub taken: u64,
    /// Changes that happened here before they were in the log.
    pub ahead: u64,
    /// Recalls by other servers that were answered here.
    pub given_up: u64,
    /// Directories given up here unasked, because nobody used them.
    #[serde(default)]
    pub unused: u64,
    /// Of the recalls, those after which the directory was left shared because it went to and fro.
    pub shared: u64,
    /// Recalls from here of what other servers held.
    pub recalled: u64,
}

/// What this server has acknowledged that is not in the log or the chunk stores.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalReport {
    /// The other server that has it, if one keeps up.
    pub pair: Option<String>,
    /// There is no other server that could.
    pub alone: bool,
    pub records: u64,
    pub bytes: ByteSize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodesReport {
    pub this_node: String,
    pub servers: Vec<ServerReport>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServerState {
    #[default]
    Up,
    /// Does not answer now; its chunks are still counted on.
    Down,
    /// Silent for so long that its chunks are kept elsewhere.
    Away,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServerRole {
    Leader,
    Voter,
    /// Follows the log without a vote.
    Learner,
    /// Not, or not yet, in the log's membership.
    #[default]
    None,
}

/// Room on the disk that holds a server's log and metadata.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Room {
    #[default]
    Enough,
    /// What makes the volume larger is refused where most servers are like this.
    Low,
    /// It takes no part until there is some.
    Full,
}

/// One server of the cluster. `None` means: not known here now.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ServerReport {
    pub name: String,
    /// Its number as 16 hexadecimal digits.
    pub node: String,
    pub zone: String,
    pub state: ServerState,
    pub role: ServerRole,
    pub addresses: Vec<String>,
    /// The address in use, for a peer with a live connection.
    pub connected: Option<String>,
    pub rtt_ms: Option<f64>,
    /// UDP payload that gets through, bytes.
    pub mtu: Option<u16>,
    pub cache_used: Option<ByteSize>,
    pub cache_limit: Option<ByteSize>,
    pub store_used: Option<ByteSize>,
    pub store_capacity: Option<ByteSize>,
    /// Chunks in its store.
    pub chunks: Option<u64>,
    pub version: String,
    /// Seconds since it was last heard of; 0 for the server that answers.
    pub last_heard_secs: Option<u64>,
    /// Log entries it is behind.
    pub lag: Option<u64>,
    /// Why it takes no further part although it answers: its log failed.
    #[serde(default)]
    pub stopped: Option<String>,
    #[serde(default)]
    pub room: Room,
    /// Why its chunk store accepts nothing more.
    #[serde(default)]
    pub store_failed: Option<String>,
    /// Chunks that belong there and found no room.
    #[serde(default)]
    pub store_refused: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountReport {
    pub path: WirePath,
    pub files: u64,
    pub bytes: ByteSize,
    pub open_handles: u64,
}

/// The cache tier of the server that answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheReport {
    pub used: ByteSize,
    pub limit: ByteSize,
    /// Written here and not yet on the stores.
    pub dirty: ByteSize,
    pub hits: u64,
    pub misses: u64,
}

/// Something long in the background.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobReport {
    pub name: String,
    pub detail: String,
    pub done: u64,
    /// 0 when it is not known yet.
    pub total: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunksReport {
    pub total: u64,
    /// Chunks with fewer copies than their policy asks for.
    pub below_policy: u64,
    /// Chunks that no server is known to hold.
    pub lost: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenReport {
    /// The whole command for the next server.
    pub line: String,
    pub token: String,
    pub expires: Timestamp,
    pub uses: u32,
}

/// How much fits, honestly: with the copies in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DfReport {
    /// What was asked about; `None` is the whole file system.
    pub path: Option<WirePath>,
    /// Content as programs see it.
    pub files: u64,
    pub bytes: ByteSize,
    /// What could still be written, and the sum of the two as `statfs` says it.
    pub available: ByteSize,
    pub total: ByteSize,
    /// Copies of each chunk in force.
    pub copies: u8,
    /// That hold for the path, nearest first. What is available and in total is not more than they
    /// allow.
    #[serde(default)]
    pub quotas: Vec<QuotaReport>,
    pub servers: Vec<DfServer>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DfServer {
    pub name: String,
    pub store_used: Option<ByteSize>,
    pub store_capacity: Option<ByteSize>,
    pub cache_used: Option<ByteSize>,
    pub cache_limit: Option<ByteSize>,
}

/// Where one file is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InfoReport {
    pub path: WirePath,
    pub ino: u64,
    /// `file`, `directory`, `symlink`, ...
    pub kind: String,
    pub size: ByteSize,
    /// Bytes that are not holes.
    pub allocated: ByteSize,
    /// Copies its policy asks for; 0 means automatic.
    pub copies: u8,
    /// Copies in force with the servers there are.
    pub copies_now: u8,
    /// Size of a grid cell.
    pub cell: ByteSize,
    pub durability: Durability,
    /// The server that alone may change it at the moment and is asked by the others.
    pub holder: Option<String>,
    /// Runs of holes are one entry. At most [`super::CELLS_SHOWN_MAX`] entries.
    pub cells: Vec<CellReport>,
    /// Entries left out above.
    pub cells_more: u64,
    /// Bytes of the file in this server's cache tier.
    pub cached: ByteSize,
    /// Of these, written and not yet on the stores.
    pub dirty: ByteSize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CellKind {
    /// In the metadata, on every server.
    Inline,
    Chunk,
    Hole,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CachedAs {
    None,
    Clean,
    /// Written here and not yet on the stores.
    Dirty,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellReport {
    pub index: u64,
    /// Byte offset in the file.
    pub offset: u64,
    pub len: u64,
    pub kind: CellKind,
    /// Chunk id, 64 hexadecimal digits.
    pub chunk: Option<String>,
    /// In placement order.
    pub holders: Vec<HolderReport>,
    /// In this server's cache tier.
    pub cached: CachedAs,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HolderReport {
    pub name: String,
    /// Position in the placement of this chunk, from 1.
    pub rank: u32,
    /// `None`: it did not answer.
    pub holds: Option<bool>,
    /// "placed here", "surplus, goes once the placed servers have it", ...
    pub why: String,
}

/// What is set on a directory and what is in force there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyReport {
    pub path: WirePath,
    /// Set on this very directory; `None` inherits.
    pub copies_set: Option<u8>,
    pub cell_set: Option<ByteSize>,
    pub durability_set: Option<Durability>,
    pub on_partition_set: Option<OnPartition>,
    /// In force; 0 copies means automatic.
    pub copies: u8,
    pub cell: ByteSize,
    pub durability: Durability,
    pub on_partition: OnPartition,
    /// Copies that come of it with the servers there are.
    pub copies_now: u8,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotasReport {
    /// In order of path; as many as one answer holds, some thousands.
    pub quotas: Vec<QuotaReport>,
    pub more: u64,
}

/// Limits of one directory, and what counts against them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaReport {
    pub path: WirePath,
    pub bytes_limit: Option<ByteSize>,
    /// Allocated below the directory.
    pub bytes_used: ByteSize,
    pub files_limit: Option<u64>,
    /// Files and directories below the directory.
    pub files_used: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheDropReport {
    pub freed: ByteSize,
    pub files: u64,
    /// Stays, because it is on no store yet or in use.
    pub kept: ByteSize,
}
