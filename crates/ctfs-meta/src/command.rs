//! What can be asked of the namespace.
//!
//! A [`Command`] is what the log carries. Everything that depends on time, chance or the caller
//! is inside it, so that every replica reaches the same verdict.

use ctfs_types::{Attr, CellIndex, CellSize, ChunkId, Extent, ExtentData, FileName, Holder, Incarnation, Ino, NodeId, RequestId, Stamp, Timestamp};
use serde::{Deserialize, Serialize};

use crate::{
    member::{Durability, Member, MemberState, OnPartition, Policy, TokenRecord},
    quota::Quota,
};

/// One request to change the namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// A command that was already applied under this id is answered from the table of verdicts, or, where commands
    /// come in order, refused with [`crate::MetaError::Answered`].
    pub request: RequestId,
    /// The client has its answers up to this `seq`; their verdicts may be forgotten.
    pub answered: u64,
    /// The proposer's clock: becomes ctime, mtime and friends.
    pub at: Timestamp,
    pub about: About,
    pub op: Op,
}

/// Requests in the name of a life that has ended, given by whoever takes over, count from here: no life gets as
/// far with its own.
pub const SEQ_LEFT: u64 = 1 << 62;

impl Command {
    /// Whether it comes to the log behind all that happened before it on its server, whoever sends it, and
    /// whatever is sent again.
    pub fn comes_in_order(&self) -> bool {
        match self.about {
            About::Ahead => true,
            About::Inodes(_) => false,
            About::Left { .. } => self.request.seq < SEQ_LEFT,
        }
    }
}

/// How a command stands to what its server has happen ahead of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum About {
    /// It happened there first, after all that the same server sent before.
    Ahead,
    /// It comes to the log first. Until it is there nothing happens ahead of the log to these inodes, as far
    /// as its server knew what it is about; the log refuses it when it touches more of what that server
    /// alone may change.
    Inodes(Vec<Ino>),
    /// A life of a server has ended with this in its journal, and whoever has the journal sends it: its
    /// server's next life, or the pair's present one once the old one is fenced.
    Left { by: Holder },
}

/// What a write holds of the journal of the life that gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// All bytes of the file that the journal has up to this position.
    pub upto: u64,
    /// Nothing before this position is needed of the journal any more.
    pub kept_from: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Changes nothing; commits an index.
    Noop,

    // Names.
    /// Makes an inode and its first name. The parent's setgid bit and default ACL are obeyed.
    Make { parent: Ino, name: FileName, node: NewNode },
    Link { ino: Ino, parent: Ino, name: FileName },
    /// Removes a name of anything but a directory.
    Unlink { parent: Ino, name: FileName },
    Rmdir { parent: Ino, name: FileName },
    Rename { from: Ino, name: FileName, to: Ino, new_name: FileName, mode: RenameMode },

    // Attributes.
    SetAttr { ino: Ino, set: SetAttr },
    SetXattr {
        ino: Ino,
        #[serde(with = "ctfs_types::octets")]
        name: Vec<u8>,
        #[serde(with = "ctfs_types::octets")]
        value: Vec<u8>,
        mode: XattrMode,
    },
    RemoveXattr {
        ino: Ino,
        #[serde(with = "ctfs_types::octets")]
        name: Vec<u8>,
    },

    // Bytes.
    /// Commits flushed cells. All cells are checked before any is changed.
    Write {
        ino: Ino,
        cells: Vec<CellWrite>,
        size_at_least: u64,
        mtime: Option<Timestamp>,
        drop_privileges: bool,
        /// An append, placed by its writer: the size must still be this one, or nothing happens
        /// ([`crate::MetaError::SizeChanged`]).
        appends_at: Option<u64>,
        /// The journal's bytes that are in it. One that says no more than an earlier one is refused
        /// ([`crate::MetaError::NotedBefore`]).
        noted: Option<Noted>,
    },
    /// Makes whole cells holes; the size stays. As with shrinking, only so many cells are freed at
    /// once; the others read as holes and are freed by [`Op::FreeCells`].
    Punch { ino: Ino, first: CellIndex, cells: u64 },
    /// Shares whole cells of `source` with `ino` (copy_file_range, reflink). Where `size_at_least`
    /// ends inside the last cell, `ino` must not go on behind it: [`crate::MetaError::CellChanged`].
    CloneCells { source: Ino, first: CellIndex, ino: Ino, to: CellIndex, cells: u64, size_at_least: u64 },
    /// Drops inodes without links that no server has open any more. Cells beyond what one command
    /// frees are left to [`Op::FreeCells`].
    Reap { inos: Vec<Ino> },
    /// Second phase of garbage collection: forgets chunks whose count is still zero.
    ForgetChunks { chunks: Vec<ChunkId> },

    // Who may buffer.
    /// From here on `holder` alone may buffer writes to a file, or change the names in a directory and
    /// what is only there. Taking what several servers use needs `although_shared`. Taking it once more
    /// makes the holding a new one.
    Own { ino: Ino, holder: Holder, although_shared: bool },
    /// The holder has nothing buffered any more, and gives these files up. Those that it does not
    /// hold since just that request are passed over: the command was late. `shared`: it goes on using
    /// them, and so will another server.
    Disown { files: Vec<(Ino, u64)>, holder: Holder, shared: bool },

    // Locks.
    /// Takes a lock, or is refused: [`crate::MetaError::Locked`].
    Lock { ino: Ino, lock: Lock },
    /// Removes `owner`'s locks inside the range, splitting what reaches over it.
    Unlock { ino: Ino, owner: LockOwner, kind: LockKind, start: u64, end: u64 },
    /// Removes every lock of `owner` on `ino`.
    UnlockAll { ino: Ino, owner: LockOwner },

    // The cluster.
    /// The first command of a volume: its name, first member and root owner.
    Found { cluster: ClusterIdentity, member: Member },
    CreateToken { token: TokenRecord },
    RevokeToken { hash: [u8; 32] },
    /// Adds a member; uses up one use of the token.
    Join { token: [u8; 32], member: Member },
    /// A member reports a new life: its locks of earlier lives go, its addresses are replaced.
    Incarnate { node: NodeId, incarnation: Incarnation, addresses: Vec<String>, capacity: u64, version: String },
    SetMemberState { node: NodeId, state: MemberState },
    /// For good: the member's key is never accepted again.
    RemoveMember { node: NodeId },
    SetPolicy { ino: Ino, policy: Policy },

    // Last, because a variant's number is part of the format.
    /// Goes on freeing cells that earlier commands took away ([`crate::Namespace::unfreed`]), of
    /// inodes that are there or gone, open or not: nothing that can be read changes.
    FreeCells { inos: Vec<Ino> },
    /// Ends a life of a server that nobody can reach: none of its commands happens any more, and what it
    /// holds and has locked is free; where it has a pair, after [`Op::EndLife`]. Nothing if the server is in
    /// another life by now.
    Fence { node: NodeId, incarnation: Incarnation },
    /// Takes a lock ([`Reply::Locked`]) or waits for it ([`Reply::Queued`]) behind those who came
    /// earlier, under a number that the owner's server uses once. How a wait ends is a [`Change`].
    AwaitLock { ino: Ino, lock: Lock, ticket: u64 },
    /// Waits no longer. [`crate::MetaError::NotWaiting`]: the lock was granted before.
    WithdrawLock { ino: Ino, owner: LockOwner, ticket: u64 },
    /// Limits what may be below a directory, also to less than there is; without limits the quota
    /// ends.
    SetQuota { ino: Ino, quota: Quota },
    /// Lets a shared lock that waits in past exclusive ones that wait, unless something held excludes
    /// it; then it goes on waiting. [`crate::MetaError::NotWaiting`]: it was granted before.
    Overtake { ino: Ino, owner: LockOwner, ticket: u64 },
    /// Sets numbers aside that only this client makes inodes under ([`NewNode::ino`]), until its life
    /// ends: answered by [`Reply::Inos`]. From 1 to [`INOS_RESERVED_MAX`] of them.
    ReserveInos { count: u32 },
    /// A life says which server has its journal from here on and takes over when it ends; `None`: nobody.
    SetPair { life: Holder, pair: Option<NodeId> },
    /// All that a fenced life left in its journal was sent by its pair, of which this is the present life:
    /// what it held and had locked is free.
    EndLife { life: Holder, by: Holder },
}

/// Most numbers that one [`Op::ReserveInos`] sets aside. So many that a busy server asks a few times
/// an hour; numbers of 64 bits last for 2^48 times of it.
pub const INOS_RESERVED_MAX: u32 = 1 << 16;

/// Who the cluster is, replicated so that every server can sign joiners.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterIdentity {
    /// Random; state directories and peers of another cluster are refused by it.
    pub id: [u8; 16],
    /// For people, e.g. `brave-otter`.
    pub name: String,
    /// DER of the certificate authority.
    pub ca_certificate: Vec<u8>,
}

/// An inode to be made. `mode` is what the program asked for; `umask` counts only where the
/// parent has no default ACL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewNode {
    pub content: NewContent,
    pub mode: u16,
    pub umask: u16,
    pub uid: u32,
    pub gid: u32,
    /// `O_EXCL`: refuse when the name exists. Without it an existing file is returned as it is.
    pub exclusive: bool,
    /// A file that is opened for writing as it is made, or a directory in one that its maker holds:
    /// held by its maker from birth.
    pub holder: Option<Holder>,
    /// The number it gets, from a range that this client has reserved and within it past all that
    /// were taken: those in between are never used. `None`: the next of the volume.
    pub ino: Option<Ino>,
    /// Its grid; `None`: as the directories above it say.
    pub cell: Option<CellSize>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewContent {
    File,
    Directory,
    Symlink {
        #[serde(with = "ctfs_types::octets")]
        target: Vec<u8>,
    },
    Fifo,
    Socket,
    CharDevice { rdev: u64 },
    BlockDevice { rdev: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenameMode {
    /// Replaces the target if there is one.
    Replace,
    /// `RENAME_NOREPLACE`
    NoReplace,
    /// `RENAME_EXCHANGE`
    Exchange,
}

/// The fields of chmod, chown, truncate and utimensat; `None` leaves a field alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAttr {
    pub mode: Option<u16>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Shrinking cuts extents; growing makes a hole.
    pub size: Option<u64>,
    pub atime: Option<Timestamp>,
    pub mtime: Option<Timestamp>,
    /// Drop setuid, setgid (when group-executable) and `security.capability`, as Linux does for
    /// the unprivileged writer and for chown.
    pub drop_privileges: bool,
    /// chmod by someone outside the file's group, or without CAP_FSETID: setgid is cleared.
    pub drop_setgid: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum XattrMode {
    Set,
    /// `XATTR_CREATE`
    Create,
    /// `XATTR_REPLACE`
    Replace,
}

/// One cell of a [`Op::Write`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellWrite {
    pub cell: CellIndex,
    /// The stamp the writer merged its bytes over; 0 stands for a hole. Anything else in
    /// the metadata means that somebody wrote meanwhile: [`crate::MetaError::CellChanged`].
    pub expect: Stamp,
    /// Offset of the data inside the cell.
    pub start: u32,
    /// `None` makes the cell a hole.
    pub data: Option<ExtentData>,
    /// Copies the chunk shall have; 0 means the policy's default for the cluster's size.
    pub copies: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LockKind {
    /// fcntl and OFD locks, which share one table; their owners differ.
    Record,
    /// flock(2): the whole file, its own table.
    Flock,
}

/// Who holds a lock: an owner number the kernel made, on one life of one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockOwner {
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub owner: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    pub owner: LockOwner,
    pub kind: LockKind,
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive; `u64::MAX` means to the end of the file.
    pub end: u64,
    /// Process on the owner's server, for `F_GETLK`.
    pub pid: u32,
}

/// What an applied command answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    /// The inode after the command. `made` is false when a non-exclusive create found it there.
    Entry { attr: Attr, made: bool },
    Attr(Attr),
    /// The attributes and, for each cell of a [`Op::Write`], its new stamp.
    Written { attr: Attr, stamp: Stamp },
    Joined { member: Member },
    /// The lock is held.
    Locked,
    /// The lock is waited for.
    Queued,
    /// The numbers `[first, first + count)` are set aside.
    Inos { first: Ino, count: u32 },
}

/// What a replica's neighbours must know after a command was applied.
///
/// Kernel caches, the cache tier, lock waiters and the repair task live on these; they are
/// derived on every server by applying, and never travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The name now leads elsewhere or nowhere.
    Entry { parent: Ino, name: FileName },
    Attr { ino: Ino },
    /// Bytes in `[offset, offset + len)` changed; `len` is `u64::MAX` for "to the end".
    Data { ino: Ino, offset: u64, len: u64 },
    /// The last name went; the inode waits for its last close.
    Orphaned { ino: Ino },
    /// The inode is gone.
    Reaped { ino: Ino },
    /// Whoever waited under this ticket holds the lock now.
    LockGranted { owner: LockOwner, ticket: u64 },
    /// Waiting under this ticket is over without a lock: the life of its server ended, or the inode.
    LockWaitEnded { owner: LockOwner, ticket: u64 },
    /// Another server holds the file or directory now, or none.
    Usage { ino: Ino },
    /// A server holds the directory from here on: what others keep of anything in it may be old soon.
    Children { dir: Ino },
    /// The server that holds the directory of the file may change it from here on and tell nobody, which it
    /// could not before. Told also to the server whose command it was.
    Covered { ino: Ino },
    /// First reference to a chunk, or a wish for more copies of it.
    ChunkWanted { chunk: ChunkId },
    /// Nothing refers to the chunk any more and its grace time is over: copies may go.
    ChunkForgotten { chunk: ChunkId },
    Members,
    /// The life was ended from outside. With a pair: that server takes over what it left.
    Fenced { node: NodeId, incarnation: Incarnation, pair: Option<NodeId> },
}

/// What a read of the namespace looks at, and a change is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Subject {
    /// Attributes, extended attributes, bytes, holder.
    Inode(Ino),
    /// Who holds the file.
    Holder(Ino),
    /// What one name in a directory leads to.
    Name(Ino, FileName),
    /// All names in a directory.
    Names(Ino),
}

impl Change {
    /// What looks different since the change; nothing for what concerns no reader of files.
    pub fn subjects(&self) -> impl Iterator<Item = Subject> + use<> {
        let (one, other) = match self {
            Self::Entry { parent, name } => (Some(Subject::Name(*parent, name.clone())), Some(Subject::Names(*parent))),
            Self::Attr { ino }
            | Self::Data { ino, .. }
            | Self::Orphaned { ino }
            | Self::Covered { ino }
            | Self::Reaped { ino } => (Some(Subject::Inode(*ino)), None),
            // Whoever looks below asks the holder; the directory's own change is told with it.
            Self::Children { .. } => (None, None),
            Self::Usage { ino } => (Some(Subject::Inode(*ino)), Some(Subject::Holder(*ino))),
            Self::LockGranted { .. }
            | Self::LockWaitEnded { .. }
            | Self::ChunkWanted { .. }
            | Self::ChunkForgotten { .. }
            | Self::Members
            | Self::Fenced { .. } => (None, None),
        };
        one.into_iter().chain(other)
    }
}

/// A cell and its extent, as reads and `ctfs info` see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    pub index: CellIndex,
    pub extent: Extent,
}

/// The policy that holds for a path, with everything inherited filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EffectivePolicy {
    /// 0: as many as the cluster's size allows, at most 3.
    pub copies: u8,
    pub cell: CellSize,
    pub durability: Durability,
    pub on_partition: OnPartition,
}
