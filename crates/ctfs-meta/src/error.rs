//! Why the namespace refused a command.

use ctfs_types::{CellIndex, FileName, Holder, Ino};
use serde::{Deserialize, Serialize};

use crate::command::{INOS_RESERVED_MAX, Lock};

/// A verdict of the state machine: every replica returns the same one for the same log entry.
///
/// "No quorum" and "disk full" are not verdicts; they live in `ctfs_vfs::FsError`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum MetaError {
    #[error("no inode {0}")]
    NoSuchInode(Ino),
    #[error("no entry {name:?} in directory {parent}")]
    NoSuchEntry { parent: Ino, name: FileName },
    #[error("{name:?} already exists in directory {parent}")]
    Exists { parent: Ino, name: FileName },
    #[error("inode {0} is not a directory")]
    NotDirectory(Ino),
    #[error("inode {0} is a directory")]
    IsDirectory(Ino),
    #[error("directory {0} is not empty")]
    NotEmpty(Ino),
    #[error("directory {0} would be moved under itself")]
    UnderItself(Ino),
    #[error("inode {0} has as many links as it can have")]
    TooManyLinks(Ino),
    #[error("inode {0} is not of a kind that has this operation")]
    WrongKind(Ino),
    #[error("size over the limit of a file")]
    FileTooBig,
    #[error("symlink target is empty or too long")]
    BadTarget,
    #[error("no such extended attribute")]
    NoSuchXattr,
    #[error("the extended attribute exists")]
    XattrExists,
    #[error("extended attribute name or value too long")]
    XattrTooBig,
    #[error("access control list does not parse")]
    BadAcl,
    #[error("cell {cell} of inode {ino} changed since it was read")]
    CellChanged { ino: Ino, cell: CellIndex },
    /// The end of the file is no longer where an append was placed.
    #[error("inode {0} has grown since the append was placed")]
    SizeChanged(Ino),
    /// Another server may have newer bytes; it must give the file up first.
    #[error("inode {ino} is being written on server {}", holder.node)]
    Held { ino: Ino, holder: Holder },
    #[error("inode {0} is used by several servers")]
    Shared(Ino),
    #[error("locked by another owner")]
    Locked { holder: Box<Lock> },
    /// The owner belongs to a life of a server that has ended.
    #[error("this server's earlier life has ended")]
    StaleIncarnation,
    /// A copy of a request whose verdict was delivered and forgotten; nothing was done again.
    #[error("this request was answered before")]
    Answered,
    #[error("the volume was founded already")]
    AlreadyFounded,
    #[error("join token is unknown, or was used up or revoked")]
    NoSuchToken,
    #[error("join token expired")]
    TokenExpired,
    #[error("no such member")]
    NoSuchMember,
    #[error("a member with this name exists: {0:?}")]
    MemberNameTaken(String),
    #[error("this server's key was removed from the cluster")]
    KeyRemoved,
    #[error("policy out of range: {0}")]
    BadPolicy(String),
    // Last, because a variant's number is part of the format.
    #[error("more than the quota of directory {dir} allows")]
    QuotaExceeded { dir: Ino },
    /// As between two file systems: copy and remove instead.
    #[error("directories {from} and {to} are below different quotas")]
    AcrossQuota { from: Ino, to: Ino },
    /// Waiting for the lock would never end, because whoever is in the way waits for this owner.
    #[error("waiting for the lock would be a deadlock")]
    Deadlock,
    #[error("too many wait for locks")]
    TooManyWaiters,
    #[error("not in the queue for this lock")]
    NotWaiting,
    /// Not in a range that the client has reserved, or taken or passed over there.
    #[error("inode number {0} is not reserved for this server")]
    NumberNotReserved(Ino),
    #[error("{0} inode numbers cannot be reserved at once, but 1 to {INOS_RESERVED_MAX}")]
    BadReservation(u32),
    /// Those that the client has must be used up first.
    #[error("too many ranges of inode numbers are reserved for this server")]
    TooManyReservations,
    /// A write that is sent from a journal, whose bytes are there by an earlier one.
    #[error("inode {0} has these bytes of the journal")]
    NotedBefore(Ino),
    /// Another takes over what the life left, or nobody: it goes on, or has ended.
    #[error("not the one to take over from that life")]
    NotTheSuccessor,
}
