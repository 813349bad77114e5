//! Where data and holes are, and copying between files.

use std::sync::Arc;

use ctfs_meta::MetaError;
use ctfs_types::Ino;
use tokio::time::Instant;

use super::{Inode, Pages, Shared, attr_of};
use crate::FsError;

/// Cells looked at in one go while searching for data, at first; doubled while none is found.
const SEARCH_CELLS: u64 = 64;
/// Cells shared by one command.
const CLONE_CELLS_MAX: u64 = 256;
/// Bytes copied at a time where cells cannot be shared.
const COPY_BYTES: u64 = 1 << 20;

impl Shared {
    pub(super) async fn seek(&self, ino: Ino, offset: u64, whence: i32) -> Result<u64, FsError> {
        self.settle(ino, Pages::Unlocked).await?;
        let inode = self.inode(ino)?;
        let _gate = inode.enter().await;
        let found = self.seek_settled(&inode, offset, whence);
        self.await_seen(ino).await?;
        found
    }

    fn seek_settled(&self, inode: &Inode, offset: u64, whence: i32) -> Result<u64, FsError> {
        let size = self.size(inode)?;
        if offset >= size {
            return Err(FsError::PastEnd);
        }
        match whence {
            libc::SEEK_DATA => match self.next_data(inode, offset, size)? {
                Some(at) if at < size => Ok(at),
                _ => Err(FsError::PastEnd),
            },
            libc::SEEK_HOLE => Ok(self.next_hole(inode, offset, size)?.min(size)),
            _ => Err(FsError::Invalid("whence")),
        }
    }

    /// The first data at or after `offset`, unflushed or named by an extent.
    fn next_data(&self, inode: &Inode, offset: u64, size: u64) -> Result<Option<u64>, FsError> {
        let grid = inode.entry.cell_size();
        let view = inode.entry.view();
        let unflushed = view.next_unflushed(offset).map(|range| range.start);
        let ns = self.meta.replica().read();
        attr_of(&ns, inode.ino)?;
        let end = grid.cell_of(unflushed.unwrap_or(size).min(size).max(1) - 1) + 1;
        let (mut first, mut count) = (grid.cell_of(offset), SEARCH_CELLS);
        while first < end {
            count = count.min(end - first);
            for cell in ns.cells(inode.ino, first, count)? {
                let start = grid.start_of(cell.index);
                if start + u64::from(cell.extent.end()) > offset {
                    let data = offset.max(start + u64::from(cell.extent.start));
                    return Ok(Some(unflushed.map_or(data, |at| at.min(data))));
                }
            }
            first += count;
            count = count.saturating_mul(2);
        }
        Ok(unflushed)
    }

    /// The first hole at or after `offset`; the end of the file begins one.
    fn next_hole(&self, inode: &Inode, offset: u64, size: u64) -> Result<u64, FsError> {
        let grid = inode.entry.cell_size();
        let view = inode.entry.view();
        let ns = self.meta.replica().read();
        attr_of(&ns, inode.ino)?;
        let mut at = offset;
        let mut extents = Vec::new().into_iter().peekable();
        let mut known = grid.cell_of(at);
        while at < size {
            if let Some(range) = view.next_unflushed(at).filter(|range| range.start == at) {
                at = range.end;
                continue;
            }
            let cell = grid.cell_of(at);
            if cell >= known {
                extents = ns.cells(inode.ino, cell, SEARCH_CELLS)?.into_iter().peekable();
                known = cell + SEARCH_CELLS;
            }
            while extents.next_if(|found| found.index < cell).is_some() {}
            let start = grid.start_of(cell);
            match extents.peek().filter(|found| found.index == cell) {
                Some(found)
                    if (start + u64::from(found.extent.start)..start + u64::from(found.extent.end())).contains(&at) =>
                {
                    at = start + u64::from(found.extent.end());
                }
                _ => return Ok(at),
            }
        }
        Ok(at)
    }

    pub(super) async fn copy(
        self: &Arc<Self>,
        (source, from): (Ino, u64),
        (target, to): (Ino, u64),
        len: u64,
    ) -> Result<u64, FsError> {
        let (reader, writer) = (self.inode(source)?, self.inode(target)?);
        let deadline = Instant::now() + self.settings.holder_patience;
        loop {
            self.settle(source, Pages::Unlocked).await?;
            self.claim(&writer, Pages::Unlocked).await?;
            match self.copy_settled(&reader, from, &writer, to, len).await {
                // A file changed hands before the first byte.
                Err(FsError::Meta(MetaError::Held { .. })) if Instant::now() < deadline => {}
                copied => return copied,
            }
        }
    }

    async fn copy_settled(
        self: &Arc<Self>,
        reader: &Arc<Inode>,
        from: u64,
        writer: &Arc<Inode>,
        to: u64,
        len: u64,
    ) -> Result<u64, FsError> {
        let (source, target) = (reader.ino, writer.ino);
        let size = self.size(reader)?;
        let len = len.min(size.saturating_sub(from));
        if source == target && from < to.saturating_add(len) && to < from.saturating_add(len) {
            return Err(FsError::Invalid("the ranges overlap"));
        }
        let grid = reader.entry.cell_size();
        let alike = grid == writer.entry.cell_size() && grid.within(from) == grid.within(to);
        let shares = alike && len >= grid.bytes();
        if shares {
            self.flush(source).await?;
        }
        let (mut done, mut share_tail, mut whole_max) = (0, true, CLONE_CELLS_MAX);
        while done < len {
            let (read_at, write_at, left) = (from + done, to + done, len - done);
            let at_cell = shares && grid.within(read_at) == 0;
            let mut whole = if at_cell { (left / grid.bytes()).min(whole_max) } else { 0 };
            // The source's last cell is zero behind its end, so it can be shared where nothing of
            // the target lies behind it.
            if at_cell && share_tail && whole_max > 0 && whole == 0 && read_at + left == size && write_at + left >= self.size(writer)? {
                whole = 1;
            }
            let step = if whole > 0 {
                if !self.surely_fits(target, whole * grid.bytes())? {
                    // What was written before comes first.
                    self.flush_below_quotas(target).await?;
                }
                let bytes = left.min(whole * grid.bytes());
                let (first, at) = (grid.cell_of(read_at), grid.cell_of(write_at));
                match self.clone_cells(source, first, writer, at, whole, write_at + bytes).await {
                    Ok(()) => bytes,
                    // Somebody appended to the target behind the copied bytes: those must stay.
                    Err(FsError::Meta(MetaError::CellChanged { .. })) if !bytes.is_multiple_of(grid.bytes()) => {
                        share_tail = false;
                        0
                    }
                    // Fewer may fit below a quota; in the end a part of a cell.
                    Err(error) if error.is_over_quota() => {
                        whole_max = whole / 2;
                        0
                    }
                    Err(FsError::Meta(MetaError::Held { .. })) if done > 0 => break,
                    Err(error) => return Err(error),
                }
            } else {
                let to_boundary = grid.bytes() - grid.within(read_at);
                let piece = left.min(COPY_BYTES).min(to_boundary);
                let bytes = self.read(source, read_at, piece as u32, Pages::Unlocked).await?;
                if bytes.is_empty() {
                    break;
                }
                match self.write(target, super::write::Place::At(write_at), bytes, true, Pages::Unlocked).await {
                    Ok((_, written)) => u64::from(written),
                    // What was copied before counts; the next call is told.
                    Err(error) if error.is_over_quota() && done > 0 => break,
                    Err(error) => return Err(error),
                }
            };
            done += step;
        }
        Ok(done)
    }
}
