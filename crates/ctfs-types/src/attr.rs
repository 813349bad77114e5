//! What `stat` shows of an inode.

use serde::{Deserialize, Serialize};

use crate::{Incarnation, Ino, NodeId, Timestamp};

/// The type of an inode, as POSIX `st_mode` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

/// One life of one server, as the holder of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Holder {
    pub node: NodeId,
    pub incarnation: Incarnation,
}

/// Who may hold bytes of a file that the metadata do not know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileUse {
    /// Nobody: the metadata are all there is.
    #[default]
    Free,
    /// The holder alone, since the request of this number. Whoever else wants its bytes, size or
    /// times asks the holder first.
    Owned { holder: Holder, since: u64 },
    /// Nobody: several servers use it, and each write is in the metadata before it is answered.
    Shared { since: Timestamp },
}

impl FileUse {
    /// The server to be asked first, for everybody but `me`.
    pub fn held_from(&self, me: Holder) -> Option<Holder> {
        match *self {
            Self::Owned { holder, .. } if holder != me => Some(holder),
            _ => None,
        }
    }
}

/// The attributes of one inode at one log index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attr {
    pub ino: Ino,
    /// Grows when a number could be seen twice; numbers are never reused, so it stays 0 today.
    pub generation: u32,
    pub kind: FileKind,
    /// Permission, setuid, setgid and sticky bits: `st_mode & 0o7777`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    /// Bytes; for a symlink the length of its target, for a directory its number of entries.
    pub size: u64,
    /// Bytes that are not holes, the source of `st_blocks`.
    pub allocated: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub btime: Timestamp,
    /// Device number of a character or block device, as `makedev(3)` packs it; else 0.
    pub rdev: u64,
    /// 1 when the inode is made, and one more with each command that changes its bytes or size; the
    /// kernel's page cache is good while it stands still.
    pub data_version: u64,
    /// Cell size of a file's chunk grid.
    pub cell: crate::CellSize,
    /// Of a file: who may hold newer bytes.
    pub usage: FileUse,
}
