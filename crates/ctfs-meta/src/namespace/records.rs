//! The records as they are stored, each behind a version byte.

use ctfs_types::{Attr, CellSize, FileKind, FileName, FileUse, Ino, NodeId, Stamp, Timestamp, codec};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::Totals;
use crate::{Quota, StoreError};

/// 4: the home of a file.
pub const VERSION: u8 = 5;
/// No record comes near: the largest holds one extended attribute or one inline cell.
const RECORD_BYTES_MAX: usize = 16 << 20;

pub fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    codec::encode(VERSION, record)
}

pub fn decode<T: DeserializeOwned>(key: &[u8], bytes: &[u8]) -> Result<T, StoreError> {
    codec::decode(VERSION, bytes, RECORD_BYTES_MAX)
        .map_err(|error| StoreError::Corrupt { key: key.to_vec(), why: error.to_string() })
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inode {
    pub kind: FileKind,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub size: u64,
    pub allocated: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub btime: Timestamp,
    pub rdev: u64,
    /// Counts the commands that changed the bytes; 1 when made.
    pub data_version: u64,
    pub cell: CellSize,
    /// Of a symlink.
    #[serde(with = "ctfs_types::octets")]
    pub target: Vec<u8>,
    pub dir: Option<Dir>,
    /// Of a file or a directory.
    pub usage: FileUse,
    /// Of anything but a directory: the directory that has its name, while it has only one.
    pub home: Option<Ino>,
}

/// What only a directory has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dir {
    pub parent: Ino,
    pub entries: u64,
    pub subdirs: u32,
    pub next_cookie: u64,
    pub quota: Quota,
}

impl Dir {
    pub fn new(parent: Ino) -> Self {
        Self { parent, entries: 0, subdirs: 0, next_cookie: 1, quota: Quota::default() }
    }
}

impl Inode {
    pub fn attr(&self, ino: Ino) -> Attr {
        Attr {
            ino,
            generation: 0,
            kind: self.kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            size: self.dir.as_ref().map_or(self.size, |dir| dir.entries),
            allocated: self.allocated,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            btime: self.btime,
            rdev: self.rdev,
            data_version: self.data_version,
            cell: self.cell,
            usage: self.usage,
        }
    }

    pub fn is_dir(&self) -> bool {
        self.dir.is_some()
    }

    /// What the inode itself adds to the counts of the directories above it; of a directory, what is
    /// below it comes on top.
    pub fn contribution(&self) -> Totals {
        match &self.dir {
            Some(_) => Totals { directories: 1, ..Totals::default() },
            None => Totals { files: 1, directories: 0, bytes: self.size, allocated: self.allocated },
        }
    }

    /// The stamp of the latest change of the bytes.
    pub fn stamp(&self) -> Stamp {
        Stamp(self.data_version)
    }

    /// The same, moved on. Once in each command that changes the bytes, before it changes them.
    pub fn next_stamp(&mut self) -> Stamp {
        self.data_version += 1;
        self.stamp()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dentry {
    pub ino: Ino,
    pub kind: FileKind,
    pub cookie: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CookieEntry {
    pub name: FileName,
    pub ino: Ino,
    pub kind: FileKind,
}

/// Inode numbers that are set aside for one client: those in `[next, end)` are not used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    pub next: Ino,
    pub end: Ino,
}

/// Numbers of the whole volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub applied: u64,
    pub next_ino: u64,
    pub chunks: u64,
    /// Directories with a quota.
    pub quotas: u64,
    /// Directories that servers hold.
    pub delegated: u64,
    /// Lives that were ended and whose journals are being taken over.
    pub left: u64,
}

/// A life that was ended and left a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    pub node: NodeId,
    /// Who has the journal, too.
    pub pair: NodeId,
}

impl Default for Counters {
    fn default() -> Self {
        Self { applied: 0, next_ino: Ino::ROOT.0 + 1, chunks: 0, quotas: 0, delegated: 0, left: 0 }
    }
}
