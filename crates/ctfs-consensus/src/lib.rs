//! The replicated log of CTFS, its store, snapshots and read visibility.
//!
//! Storage reads in this order: [`raft_types`] (what openraft is told about us), [`log`] (the
//! truth: segments of framed entries), [`sled_store`] and [`versioned`] (the materialised state
//! and its copy-aside view, with `write_behind` between them), [`snapshot`] (the state as a file), [`machine`] (entries into state),
//! [`storage`] (opening all of it, and rebuilding what does not check).
//!
//! Beside both: [`health`] (a disk that failed, a disk that is full).
//!
//! The running server reads in this order: [`runtime`] (what the rest of the program holds),
//! `core` (what its tasks share), `proposer` (commands on their way into the log), `stream` (those that happened here first), `replay` (those of an earlier life), `visibility`
//! and `ledger` (leases and reads), [`network`] (between servers), `membership`, [`status`].

mod answer_time;
mod boottime;
mod core;
mod durable;
pub mod error;
#[cfg(test)]
mod golden;
pub mod health;
mod ledger;
pub mod log;
pub mod machine;
mod membership;
pub mod messages;
pub mod network;
pub mod observer;
mod proposer;
pub mod raft_types;
mod record;
mod records;
mod relay;
mod replay;
pub mod runtime;
mod second;
pub mod settings;
pub mod sled_store;
pub mod snapshot;
mod state_dir;
pub mod status;
pub mod storage;
mod stream;
#[cfg(test)]
mod tests;
mod unseen;
pub mod versioned;
mod visibility;
mod warm;
mod write_behind;
mod written;

pub use error::{ProposeError, StartError};
pub use health::Space;
pub use network::{Transport, TransportError};
pub use observer::Observer;
pub use proposer::Request;
pub use record::{Record, RecordError};
pub use replay::Replayed;
pub use second::{JournalCopy, Second};
pub use runtime::Consensus;
pub use settings::{COMMAND_BYTES_MAX, Limits, Settings, Timings};
pub use status::{ConsensusStatus, ServerStatus};
pub use stream::Happened;
pub use storage::{Storage, StorageError, StorageSettings};
