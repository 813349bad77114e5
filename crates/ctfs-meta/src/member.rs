//! Servers, join tokens and policies, as the replicated state holds them.

use ctfs_types::{CellSize, Incarnation, NodeId, Timestamp};
use serde::{Deserialize, Serialize};

/// One server of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub node: NodeId,
    /// Unique among members, for people.
    pub name: String,
    /// Chunks are spread over zones first.
    pub zone: String,
    /// BLAKE3 of the server's public key (DER SubjectPublicKeyInfo): its identity.
    pub key: [u8; 32],
    /// `host:port` spellings at which it answers, best first.
    pub addresses: Vec<String>,
    /// Bytes its chunk store may take; the weight in placement.
    pub capacity: u64,
    pub state: MemberState,
    pub incarnation: Incarnation,
    /// That life was ended by the others; its server goes on in a new one when it learns of it.
    pub fenced: bool,
    /// Who has the journal of that life, and takes over what it left when it was ended.
    pub pair: Option<NodeId>,
    pub version: String,
    pub joined: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberState {
    /// Holds the chunks that placement gives it.
    Active,
    /// Not heard of for so long that its chunks are kept elsewhere until it returns.
    Away,
}

/// A join token as the cluster remembers it: never the secret itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// BLAKE3 of the secret.
    pub hash: [u8; 32],
    pub expires: Timestamp,
    pub uses_left: u32,
}

/// What an operator set on one directory; `None` inherits from the parent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Servers that hold each chunk; 0 means automatic.
    pub copies: Option<u8>,
    /// Grid of files made from now on.
    pub cell: Option<CellSize>,
    /// What fsync waits for.
    pub durability: Option<Durability>,
    /// What reads do on a server that is cut off.
    pub on_partition: Option<OnPartition>,
}

/// What reads do on a server that cannot reach most of the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnPartition {
    /// Answer what it knew last.
    #[default]
    Stale,
    /// Wait for the others.
    Block,
    /// Fail.
    Error,
}

impl OnPartition {
    pub const EACH: [Self; 3] = [Self::Stale, Self::Block, Self::Error];

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stale => "stale",
            Self::Block => "block",
            Self::Error => "error",
        }
    }

    pub fn of_name(name: &[u8]) -> Option<Self> {
        Self::EACH.into_iter().find(|choice| choice.name().as_bytes() == name)
    }
}

/// On how many disks something is when fsync says so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// On that of the server where it was written.
    Local,
    /// On two servers'; on one where there is only one.
    #[default]
    Pair,
    /// The data on as many as there shall be copies, names and attributes on most.
    Quorum,
    /// On that of every server that answers.
    All,
}

impl Durability {
    pub const EACH: [Self; 4] = [Self::Local, Self::Pair, Self::Quorum, Self::All];

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Pair => "pair",
            Self::Quorum => "quorum",
            Self::All => "all",
        }
    }

    pub fn of_name(name: &[u8]) -> Option<Self> {
        Self::EACH.into_iter().find(|class| class.name().as_bytes() == name)
    }
}
