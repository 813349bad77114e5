//! The replicated log of CTFS, its store, snapshots and read visibility.
//!
//! Storage reads in this order: [`raft_types`] (what openraft is told about us), [`log`] (the
//! truth: segments of framed entries), [`sled_store`] and [`versioned`] (the materialised state
//! and its copy-aside view), [`snapshot`] (the state as a file), [`machine`] (entries into state),
//! [`storage`] (opening all of it, and rebuilding what does not check).

mod durable;
pub mod log;
pub mod machine;
pub mod observer;
pub mod raft_types;
pub mod sled_store;
pub mod snapshot;
mod state_dir;
pub mod storage;
pub mod versioned;

pub use observer::Observer;
pub use storage::{Storage, StorageError, StorageSettings};
