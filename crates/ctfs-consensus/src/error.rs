//! Why consensus did not do what it was asked.

use std::time::Duration;

use ctfs_meta::MetaError;
use ctfs_types::NodeId;

/// Why a proposal, a barrier or a change of membership did not end well.
///
/// What the namespace itself refuses is a verdict and travels as [`MetaError`]; only
/// [`crate::Consensus::found`] folds it in here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// No majority answered in time. A proposal may still happen later, at most once.
    #[error("no majority of the voting servers answered within {waited:?}")]
    NoQuorum { waited: Duration },
    /// Only the leader can do this.
    #[error("this server does not lead, {} does", leader.map_or("nobody".to_owned(), |node| node.to_string()))]
    NotLeader { leader: Option<NodeId> },
    /// The disks of too many servers are nearly full, or this server's is. It did not happen.
    #[error("the disks that hold the metadata are full")]
    NoSpace,
    /// Cut it into several commands.
    #[error("command of {bytes} bytes is over the limit of {max}")]
    TooLarge { bytes: usize, max: usize },
    /// This server's life was ended while it was cut off. It did not happen, nor did some of what this server
    /// had done before it.
    #[error("the others went on without this server")]
    LifeEnded,
    /// Another change of membership has not ended yet; ask again.
    #[error("another change of membership is under way")]
    ChangeInProgress,
    /// The server is not ready to vote; ask again.
    #[error("server {node} is {entries} log entries behind")]
    CatchingUp { node: NodeId, entries: u64 },
    /// The wanted membership makes no sense.
    #[error("membership refused: {0}")]
    BadMembership(String),
    /// The namespace refused [`ctfs_meta::Op::Found`].
    #[error(transparent)]
    Refused(MetaError),
    /// This server's consensus has stopped, by wish or because its store failed.
    #[error("consensus has stopped: {0}")]
    Stopped(String),
}

/// Why consensus did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("open the consensus store: {0}")]
    Storage(#[from] crate::storage::StorageError),
    #[error("settings refused: {0}")]
    Settings(String),
    #[error("start consensus: {0}")]
    Raft(String),
}
