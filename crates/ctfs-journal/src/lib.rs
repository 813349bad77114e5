//! The journal: what a server has acknowledged and the cluster has not committed yet, in one order.
//!
//! Each life of a server has one [`Journal`]: an append-only list of records, durable in groups on
//! the own disk. A [`Stream`] carries the same records to a pair, which keeps them as a copy among
//! its [`Copies`]. What the records mean is not known here: a payload is bytes.
//!
//! A record is named by its [`Position`], counted from 1 without gaps. Whatever happens, what is
//! read back is a prefix: the records from the first one that was kept up to some last one, and
//! that one is not before any position that was reported durable. When the records are no longer
//! needed they are trimmed from the front.
//!
//! After `kill -9` or a loss of power the next life reads what earlier ones left ([`lives`],
//! [`OldLife`]). When a server is declared dead, its pair fences it ([`Copies::fence`]) and only
//! then can read the copy ([`Fenced`]).
//!
//! Reading order: `frame` how a record lies in a file, `segments` the files of one life,
//! `journal` the writer thread and who waits for it, `copies` the pair's side, `batch` what travels
//! between them, `stream` how it is sent. [`Disk`] is the file system below, simulated in tests.

mod batch;
mod copies;
mod disk;
mod error;
mod frame;
#[cfg(test)]
mod golden;
mod journal;
mod old_life;
mod segments;
mod stream;
#[cfg(test)]
mod tests;

use std::fmt;

use bytes::Bytes;
use ctfs_types::{Incarnation, NodeId};
use serde::{Deserialize, Serialize};

pub use batch::{BATCH_BYTES_MAX, BATCH_RECORDS_MAX, Batch, BatchError, decode_answer, encode_answer};
pub use copies::{COPIES_MAX, Copies, CopySettings, CopyStatus, Fenced, Refusal};
pub use disk::{Disk, DiskFile, SystemDisk};
pub use error::JournalError;
pub use journal::{Depth, Journal, Settings};
pub use old_life::{OldLife, lives};
pub use stream::{End, Stream, StreamSettings, StreamState, Transport, TransportError};

/// Largest payload of a record. A larger one would hold up everything behind it, here and on the
/// way to the pair; what is larger is cut by the caller, who knows where.
pub const RECORD_BYTES_MAX: usize = 4 << 20;

/// The number of a record in its journal, counted from 1. 0 is "before the first".
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position(pub u64);

impl Position {
    /// Before the first record.
    pub const NONE: Self = Self(0);

    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The position before this one; of the first, and of none, none.
    pub fn before(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whose journal it is: one life of one server of one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JournalId {
    pub cluster: [u8; 16],
    pub node: NodeId,
    pub incarnation: Incarnation,
}

impl JournalId {
    /// The name of the directory with this life's files.
    pub(crate) fn dir_name(&self) -> String {
        format!("{:016x}-{:016x}", self.node.0, self.incarnation.0)
    }

    /// Whose directory `name` is, if it is one.
    pub(crate) fn of_dir_name(cluster: [u8; 16], name: &str) -> Option<Self> {
        let (node, incarnation) = name.split_once('-')?;
        let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
        let id = Self { cluster, node: NodeId(number(node)?), incarnation: Incarnation(number(incarnation)?) };
        // Exactly one spelling: what else lies there is not ours.
        (id.dir_name() == name).then_some(id)
    }
}

impl fmt::Display for JournalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} life {}", self.node, self.incarnation.0)
    }
}

/// A record and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub position: Position,
    pub payload: Bytes,
}
