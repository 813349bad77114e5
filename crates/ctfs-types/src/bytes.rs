//! Bytes of a file on their way from a journal to the metadata.

use crate::{Ino, Timestamp};

/// What was written to a file and is written down, before its chunks are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileBytes {
    pub ino: Ino,
    /// When it was last written.
    pub mtime: Timestamp,
    /// A writer may not keep setuid and friends.
    pub drop_privileges: bool,
    /// Each with its offset, in order, none over another.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

impl FileBytes {
    /// All bytes of the pieces.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.iter().all(|(_, bytes)| bytes.is_empty())
    }
}
