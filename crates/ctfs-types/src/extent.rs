//! How a file's bytes are described: a fixed grid of cells, each empty, inline or one chunk.

use serde::{Deserialize, Serialize};

use crate::{ChunkId, Stamp};

/// The position of a cell in a file's grid: byte offset divided by the cell size.
pub type CellIndex = u64;

/// The size of a grid cell as a power of two, 256 KiB to 8 MiB; one chunk covers at most one cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct CellSize(u8);

impl CellSize {
    /// 1 MiB: one FUSE request fills it, and 10^7 files of 1 MiB need one extent each.
    pub const DEFAULT: Self = Self(20);

    pub fn from_bytes(bytes: u64) -> Option<Self> {
        let shift = bytes.trailing_zeros() as u8;
        (bytes.is_power_of_two() && (18..=23).contains(&shift)).then_some(Self(shift))
    }

    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    pub fn cell_of(self, offset: u64) -> CellIndex {
        offset >> self.0
    }

    /// Byte offset in the file at which `cell` begins.
    pub fn start_of(self, cell: CellIndex) -> u64 {
        cell << self.0
    }

    /// Offset of the byte inside its cell.
    pub fn within(self, offset: u64) -> u64 {
        offset & (self.bytes() - 1)
    }
}

impl Default for CellSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl TryFrom<u8> for CellSize {
    type Error = &'static str;

    fn try_from(shift: u8) -> Result<Self, Self::Error> {
        if (18..=23).contains(&shift) { Ok(Self(shift)) } else { Err("cell size is 2^18 to 2^23 bytes") }
    }
}

impl From<CellSize> for u8 {
    fn from(cell: CellSize) -> u8 {
        cell.0
    }
}

/// The bytes of one cell of a file. A cell without an extent is a hole.
///
/// The data covers `[start, start + data.len())` of the cell; every other byte of the cell is
/// zero. So a truncated or sparse cell needs no rewritten chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Offset inside the cell at which the data begins.
    pub start: u32,
    pub data: ExtentData,
    /// The inode's `data_version` when this cell last changed; writers compare it (0 = hole).
    pub stamp: Stamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExtentData {
    /// Small content, kept in the metadata, so every server already holds it.
    Inline(#[serde(with = "crate::octets")] Vec<u8>),
    /// The first `len` bytes of a chunk. After a truncate `len` may be less than the chunk holds.
    Chunk { id: ChunkId, len: u32 },
}

impl ExtentData {
    pub fn len(&self) -> u32 {
        match self {
            Self::Inline(bytes) => bytes.len() as u32,
            Self::Chunk { len, .. } => *len,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Extent {
    /// One past the last data byte inside the cell.
    pub fn end(&self) -> u32 {
        self.start + self.data.len()
    }

    /// What it adds to `st_blocks`: whole 4 KiB blocks, or 512-byte sectors when inline.
    pub fn allocated(&self) -> u64 {
        let unit = match self.data {
            ExtentData::Inline(_) => 512,
            ExtentData::Chunk { .. } => 4096,
        };
        u64::from(self.data.len()).next_multiple_of(unit)
    }

    pub fn chunk(&self) -> Option<ChunkId> {
        match self.data {
            ExtentData::Chunk { id, .. } => Some(id),
            ExtentData::Inline(_) => None,
        }
    }
}
