//! Bytes of files that a life of a server left in its journal, brought into the metadata.
//!
//! The files are still held by that life, so nobody else changes them meanwhile. Nothing of it goes
//! through the cache tier: each cell is merged over its extent, put, and named, as a flush does it.

use std::collections::BTreeMap;

use async_trait::async_trait;
use ctfs_meta::{CellWrite, MetaError, Noted, Op, Reply};
use ctfs_types::{
    CellIndex, CellSize, Extent, ExtentData, FileBytes, FileKind, FileUse, Holder, Ino, Stamp, Timestamp,
    limits::INLINE_BYTES_MAX,
    rules::{Rule, keeps},
};
use tracing::{error, info, warn};

use super::{Content, Shared, attr_of, extent_of, flush::trim};
use crate::FsError;

/// Cells of one command.
const BATCH_CELLS: usize = 32;
/// Merges over an extent that somebody else made meanwhile. Whoever sends the same journal can have.
const MERGE_TRIES: usize = 16;

/// Sends commands in the name of a life that has ended.
#[async_trait]
pub trait Successor: Send + Sync {
    /// # Errors
    /// As [`crate::Request::propose`].
    async fn propose(&self, op: Op) -> Result<Reply, FsError>;
}

/// What became of bytes that a life left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftBytes {
    /// Files that have them now.
    pub written: Vec<Ino>,
    /// Files that somebody else has changed since that life ended.
    pub lost: Vec<Ino>,
}

/// All that is left of one file.
#[derive(Default)]
struct LeftFile {
    upto: u64,
    mtime: Option<Timestamp>,
    drop_privileges: bool,
    /// By cell, in order, each piece with its offset in there.
    cells: BTreeMap<CellIndex, Vec<(u64, Vec<u8>)>>,
    grid: CellSize,
}

impl LeftFile {
    /// One past the last byte in these cells.
    fn end_of(&self, cells: &[CellIndex]) -> u64 {
        let end = |cell: &CellIndex| {
            let within = self.cells[cell].iter().map(|(at, piece)| at + piece.len() as u64).max().unwrap_or(0);
            self.grid.start_of(*cell) + within
        };
        cells.iter().map(end).max().unwrap_or(0)
    }

    fn end(&self) -> u64 {
        self.cells.last_key_value().map_or(0, |(cell, _)| self.end_of(&[*cell]))
    }

    fn add(&mut self, position: u64, bytes: FileBytes) {
        let grid = self.grid;
        self.upto = position;
        self.mtime = Some(bytes.mtime);
        self.drop_privileges |= bytes.drop_privileges;
        for (offset, mut rest) in bytes.pieces {
            let mut at = offset;
            while !rest.is_empty() {
                let cell = grid.cell_of(at);
                let room = (grid.start_of(cell) + grid.bytes() - at).min(rest.len() as u64);
                let later = rest.split_off(room as usize);
                self.cells.entry(cell).or_default().push((at - grid.start_of(cell), rest));
                (at, rest) = (at + room, later);
            }
        }
    }
}

impl Content {
    /// Has the metadata hold `left`, each with its position, of the journal of `life`; what they hold
    /// already is left out. May be asked again.
    ///
    /// # Errors
    /// What kept some of it from being put or named.
    pub async fn write_left(&self, life: Holder, left: Vec<(u64, FileBytes)>, successor: &dyn Successor) -> Result<LeftBytes, FsError> {
        let shared = &*self.shared;
        let (noted, kept_from) = shared.meta.replica().read().noted(life.incarnation)?;
        let mut files: BTreeMap<Ino, Vec<(u64, FileBytes)>> = BTreeMap::new();
        for (position, bytes) in left {
            let is_missing = position >= kept_from && noted.get(&bytes.ino).is_none_or(|upto| *upto < position);
            if is_missing || !keeps(Rule::NotedIsNotSent) {
                files.entry(bytes.ino).or_default().push((position, bytes));
            }
        }
        let (mut done, mut failed) = (LeftBytes::default(), None);
        for (ino, records) in files {
            match shared.write_left_file(life, ino, records, successor).await {
                Ok(()) => done.written.push(ino),
                // Removed since.
                Err(FsError::Meta(MetaError::NoSuchInode(_))) => {}
                Err(FsError::Meta(why @ (MetaError::Held { .. } | MetaError::StaleIncarnation))) => {
                    warn!(%ino, life = life.incarnation.0, %why, "bytes of a life that has ended are lost: others have the file");
                    done.lost.push(ino);
                }
                // The others first: one file must not hold up all.
                Err(error) => {
                    warn!(%ino, life = life.incarnation.0, %error, "bytes of a life that has ended are not written yet");
                    failed = failed.or(Some(error));
                }
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        info!(life = life.incarnation.0, node = %life.node, written = done.written.len(), lost = done.lost.len(), "bytes that a life left were written");
        Ok(done)
    }
}

impl Shared {
    async fn write_left_file(&self, life: Holder, ino: Ino, records: Vec<(u64, FileBytes)>, successor: &dyn Successor) -> Result<(), FsError> {
        let mut file = LeftFile::default();
        {
            let ns = self.meta.replica().read();
            let attr = attr_of(&ns, ino)?;
            // Not the holder's any more: whoever has it since has it with all that was written before.
            let is_owned = matches!(attr.usage, FileUse::Owned { holder, .. } if holder == life);
            let is_held = is_owned || ns.cover(ino)?.is_some_and(|(_, holder)| holder == life);
            if attr.kind != FileKind::File || !is_held {
                return Err(MetaError::StaleIncarnation.into());
            }
            file.grid = attr.cell;
            for (position, bytes) in records {
                file.add(position, bytes);
            }
        }
        let cells: Vec<CellIndex> = file.cells.keys().copied().collect();
        let last = cells.chunks(BATCH_CELLS).count().saturating_sub(1);
        for (n, cells) in cells.chunks(BATCH_CELLS).enumerate() {
            self.write_left_cells(ino, &file, cells, n == last, successor).await?;
        }
        Ok(())
    }

    async fn write_left_cells(&self, ino: Ino, file: &LeftFile, cells: &[CellIndex], is_last: bool, successor: &dyn Successor) -> Result<(), FsError> {
        for _ in 0..MERGE_TRIES {
            let mut writes = Vec::with_capacity(cells.len());
            for &cell in cells {
                writes.push(self.merge_left(ino, file, cell).await?);
            }
            let op = Op::Write {
                ino,
                cells: writes,
                size_at_least: file.end_of(cells),
                mtime: file.mtime,
                drop_privileges: file.drop_privileges,
                appends_at: None,
                noted: is_last.then_some(Noted { upto: file.upto, kept_from: 0 }),
            };
            match successor.propose(op).await {
                Ok(_) | Err(FsError::Meta(MetaError::NotedBefore(_))) => return Ok(()),
                Err(FsError::Meta(MetaError::CellChanged { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        Err(MetaError::CellChanged { ino, cell: cells[0] }.into())
    }

    /// One cell with the bytes that are left over its extent, durable where it belongs.
    async fn merge_left(&self, ino: Ino, file: &LeftFile, cell: CellIndex) -> Result<CellWrite, FsError> {
        let (extent, size, copies) = {
            let ns = self.meta.replica().read();
            (extent_of(&ns, ino, cell)?, attr_of(&ns, ino)?.size, ns.effective_policy(ino)?.copies)
        };
        let (expect, mut bytes) = match extent {
            None => (Stamp(0), Vec::new()),
            Some(Extent { start, data, stamp }) => {
                let mut bytes = vec![0; start as usize];
                match data {
                    ExtentData::Inline(inline) => bytes.extend_from_slice(&inline),
                    // It may be longer than what the extent has of it.
                    ExtentData::Chunk { id, len } => match self.chunks.get(id, len).await {
                        Ok(chunk) => bytes.extend_from_slice(&chunk[..len as usize]),
                        // What is around them is gone, also for readers; these bytes are not.
                        Err(FsError::ChunkLost { chunk }) => error!(%ino, cell, %chunk, "what is left of a life goes over a lost chunk"),
                        Err(error) => return Err(error),
                    },
                }
                (stamp, bytes)
            }
        };
        for (at, piece) in &file.cells[&cell] {
            let end = *at as usize + piece.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*at as usize..end].copy_from_slice(piece);
        }
        let (start, bytes) = trim(bytes);
        let is_whole_file = cell == 0 && size.max(file.end()) <= INLINE_BYTES_MAX as u64;
        let data = if bytes.is_empty() {
            None
        } else if is_whole_file {
            Some(ExtentData::Inline(bytes.to_vec()))
        } else {
            let len = bytes.len() as u32;
            Some(ExtentData::Chunk { id: self.chunks.put(bytes, copies).await?, len })
        };
        Ok(CellWrite { cell, expect, start: if data.is_some() { start } else { 0 }, data, copies })
    }
}
