//! The types openraft is instantiated with, and how its numbers map to ours.

use std::fmt;

use ctfs_meta::{Command, MetaError, Reply};
use ctfs_types::{LogIndex, NodeId};
use serde::{Deserialize, Serialize};

openraft::declare_raft_types!(
    /// openraft, as CTFS uses it.
    pub TypeConfig:
        D = Entries,
        R = Verdicts,
        NodeId = u64,
        Node = openraft::EmptyNode,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = tokio::fs::File,
        AsyncRuntime = crate::answer_time::Runtime,
);

/// One log entry.
pub type RaftEntry = openraft::Entry<TypeConfig>;
/// Position and leader of a log entry.
pub type RaftLogId = openraft::LogId<u64>;
/// What openraft asks a server to remember of elections.
pub type RaftVote = openraft::Vote<u64>;
/// Who votes and who learns.
pub type RaftMembership = openraft::StoredMembership<u64, openraft::EmptyNode>;
/// Where a snapshot stands.
pub type RaftSnapshotMeta = openraft::SnapshotMeta<u64, openraft::EmptyNode>;
/// openraft's "the storage failed, stop this server".
pub type RaftStorageError = openraft::StorageError<u64>;

/// The payload of one log entry: what the proposer packed while the entry before was flushed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entries {
    pub commands: Vec<Command>,
}

impl fmt::Display for Entries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commands", self.commands.len())
    }
}

/// One verdict per command of an [`Entries`], in order; empty for openraft's own entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdicts(pub Vec<Result<Reply, MetaError>>);

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} verdicts", self.0.len())
    }
}

/// Our server number as openraft spells it.
pub fn raft_node(node: NodeId) -> u64 {
    node.0
}

/// openraft's server number as we spell it.
pub fn node_id(raft: u64) -> NodeId {
    NodeId(raft)
}

/// The place of openraft's entry `raft` in our counting.
///
/// openraft numbers its first entry (the founding membership) 0; for us 0 is "before the first
/// entry". Every conversion goes through here or [`raft_index`].
pub fn log_index(raft: u64) -> LogIndex {
    LogIndex(raft + 1)
}

/// openraft's number of our `index`; `None` for 0, which is no entry.
pub fn raft_index(index: LogIndex) -> Option<u64> {
    index.0.checked_sub(1)
}

/// Our index of an optional log id: `None` is [`LogIndex`] 0.
pub fn log_index_of(id: Option<RaftLogId>) -> LogIndex {
    id.map_or(LogIndex(0), |id| log_index(id.index))
}
