//! The semantics of a file system: every operation the kernel can ask, as an async function.
//!
//! Names and attributes are read from the local replica of the namespace and changed by proposing
//! commands; bytes go through [`content`]. Nothing here knows FUSE, sockets or disks: those come
//! in as [`Metadata`] and [`ChunkAccess`], so a test can run all of it in memory.
//!
//! Reading order: [`access`] (what is needed from outside), [`error`] and [`errno`] (how it fails),
//! [`vfs`] (the operations), [`delegations`] (directories that a server holds), [`content`] (bytes), [`handles`] and [`waiters`] (what is open, who waits).

// The tests' cluster in memory is shared with `ctfs-fuse`, so it names this crate from outside.
#[cfg(test)]
extern crate self as ctfs_vfs;

pub mod access;
pub mod caller;
pub mod content;
pub mod delegations;
pub mod errno;
pub mod error;
pub mod handles;
mod partition;
pub mod vfs;
mod view;
pub mod waiters;

pub use access::{ChunkAccess, Happened, Holders, Metadata, Request, SpaceReport};
pub use caller::Caller;
pub use content::{Content, ContentSettings, LeftBytes, PageWaits, Pages, Successor};
pub use delegations::{DelegationFigures, DelegationSettings};
pub use error::FsError;
pub use handles::{HandleId, OpenMode};
pub use vfs::{
    CACHE_TIMEOUT_MAX, DirItem, KernelCache, Leaving, LockRequest, Opened, SetAttrRequest, SetTime, Statfs, Vfs,
    VfsSettings,
};
