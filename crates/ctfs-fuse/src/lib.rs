//! The kernel interface: the only crate that names `fuser`.
//!
//! Requests come in on a few threads that read `/dev/fuse`. Each becomes one future over
//! [`ctfs_vfs::Vfs`]; it is polled once where it is, so what the local replica or the cache can
//! answer costs no hand-over, and goes to the runtime only if it has to wait. Changes made
//! elsewhere go the other way: [`Notifier`] tells the kernel what to forget.
//!
//! Reading order: [`mount`] (how a mount begins and ends), [`bridge`] (requests), [`caches`] (what
//! the kernel was allowed to keep), [`notifier`] (how it is taken back).

mod bridge;
mod caches;
mod convert;
mod listings;
mod mount;
pub mod mountinfo;
mod notice;
mod notifier;
mod replies;
mod runner;
mod undo;
mod untold;

#[cfg(test)]
mod tests;

pub use mount::{Mount, MountError, MountSettings};
pub use notifier::Notifier;
