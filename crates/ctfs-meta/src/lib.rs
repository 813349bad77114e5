//! The namespace: every inode, directory entry, owner, mode, xattr, extent and lock of the file
//! system, and who its servers are.
//!
//! [`Namespace`] is a deterministic state machine over an ordered key-value [`Store`]. Committed
//! log entries go in through [`Namespace::apply`], verdicts come out, and every replica that
//! applied the same log prefix is equal byte for byte. It reads no clock and draws no
//! randomness: a timestamp is stamped by the server that proposed the command.
//!
//! Reading order: [`command`] (what can be asked), [`namespace`] (what it does), [`error`] (why
//! it may be refused), [`store`] (where it is kept).

pub mod command;
pub mod error;
pub mod member;
pub mod namespace;
pub mod quota;
pub mod store;

#[cfg(test)]
mod tests;

pub use command::{
    About, SEQ_LEFT,
    Cell, CellWrite, Change, ClusterIdentity, Command, EffectivePolicy, Lock, LockKind, LockOwner, NewContent, NewNode,
    INOS_RESERVED_MAX, Noted, Op, RenameMode, Reply, SetAttr, Subject, XattrMode,
};
pub use error::MetaError;
pub use member::{Durability, Member, MemberState, OnPartition, Policy, TokenRecord};
pub use namespace::{AHEAD_MAX, Ahead, Applied, ChunkRecord, Cover, DirEntry, Namespace, Stage, Staged, Totals, Wish};
pub use quota::{Quota, QuotaUse};
pub use store::{Batch, MemoryStore, Store, StoreError, merged};

/// The namespace as one server shares it between its tasks: many readers, one applier.
pub type SharedNamespace = std::sync::Arc<parking_lot::RwLock<Namespace>>;
