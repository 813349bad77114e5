//! What servers say to each other about commands, leases and reads.
//!
//! The raft messages themselves are openraft's types, encoded by [`crate::network`]. Every
//! message is a record of [`ctfs_types::codec`] with [`VERSION`] in front.

use std::time::Duration;

use ctfs_meta::{Command, MetaError, Reply};
use ctfs_types::{
    Incarnation, LogIndex,
    codec::{self, CodecError},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Version byte of every message of this crate. 2: commands as in the log of that version.
pub(crate) const VERSION: u8 = 5;

/// Limit of the transport for one call.
pub(crate) const MESSAGE_BYTES_MAX: usize = 2 << 20;

/// Service numbers.
pub mod service {
    pub const APPEND_ENTRIES: u16 = 0x0101;
    pub const VOTE: u16 = 0x0102;
    pub const INSTALL_SNAPSHOT: u16 = 0x0103;
    pub const FORWARD: u16 = 0x0201;
    pub const RENEW: u16 = 0x0202;
    pub const READ_INDEX: u16 = 0x0203;
    pub const AWAIT_VISIBLE: u16 = 0x0204;
}

pub(crate) fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    codec::encode(VERSION, message)
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    codec::decode(VERSION, bytes, MESSAGE_BYTES_MAX)
}

/// Commands of one server on their way to the leader.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Forward {
    /// How long the sender will wait.
    pub patience: Duration,
    /// Commands that belong together are in the log together, or none of them is.
    pub together: Vec<Vec<Command>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Forwarded {
    NotLeader,
    /// One for all commands that belong together, in order.
    Answers(Vec<Fate>),
}

/// What became of forwarded commands that belong together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fate {
    Answered(Answer),
    /// It may have happened or not; ask again under the same request id.
    Unsure,
    /// It did not happen, for want of room.
    NoSpace,
}

/// Commands were applied at `index`, and are visible.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub index: LogIndex,
    pub verdicts: Vec<Result<Reply, MetaError>>,
}

/// "I have applied and told my kernel everything up to here; renew my lease."
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Renew {
    pub incarnation: Incarnation,
    pub acked: LogIndex,
    pub short_of_room: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Renewed {
    NotLeader,
    Heard {
        grant: Option<Grant>,
        /// Every leased server has applied and invalidated up to here.
        visible: LogIndex,
        /// The leader has applied up to here.
        committed: LogIndex,
        /// Commands for which there must be room are refused.
        short_of_room: bool,
    },
}

/// A read lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Grant {
    /// Counted by the server from before it asked.
    pub usable: Duration,
    /// It counts once the server has applied and invalidated this (coherence rule 18).
    pub from: LogIndex,
}

/// "Which index must I have applied, so that my read is not of the past?"
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReadIndex {
    /// What the reader has applied already, and so may show.
    pub applied: LogIndex,
    pub patience: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ReadIndexed {
    NotLeader,
    /// The leader found no quorum in time.
    NoQuorum,
    /// Visible, and at or above everything answered before the question.
    At(LogIndex),
}

/// "Tell me when this is visible."
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct AwaitVisible {
    pub index: LogIndex,
    pub patience: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Visible {
    NotLeader,
    /// The visible index when the wait ended, for whichever reason.
    UpTo(LogIndex),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn hostile_messages_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Forward>(&bytes);
            let _ = decode::<Forwarded>(&bytes);
            let _ = decode::<Renew>(&bytes);
            let _ = decode::<Renewed>(&bytes);
            let _ = decode::<openraft::raft::AppendEntriesRequest<crate::raft_types::TypeConfig>>(&bytes);
            let _ = decode::<openraft::raft::InstallSnapshotRequest<crate::raft_types::TypeConfig>>(&bytes);
        }
    }
}
