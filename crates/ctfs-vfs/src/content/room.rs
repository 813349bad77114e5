//! Room below quotas, for bytes that the metadata do not know yet.
//!
//! The metadata refuse what goes over a quota, but hear of buffered bytes only when they are flushed.
//! So that already write(2) fails, each buffered write sets aside the most that it may take of the
//! room that is left below each quota. What is set aside may turn out smaller (bytes that are zero
//! take nothing); where it is more than there is, what is buffered below the quota is flushed first,
//! and the metadata say how much room there is.
//!
//! Other servers set aside for themselves. Where several fill one quota at the same time, a flush is
//! refused that had room when its bytes were written: those are dropped, and fsync(2) and close(2)
//! say so ([`Shared::flush_locked`]).

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use ctfs_meta::{MetaError, Namespace, QuotaUse};
use ctfs_types::{CellIndex, CellSize, Extent, Ino, limits::INLINE_BYTES_MAX};
use futures_util::StreamExt;

use super::{Inode, Shared, attr_of, extent_of, write::Place};
use crate::FsError;

/// Data of a cell begins at a page, see `flush::trim`.
const PAGE: u32 = 4096;
/// What inline content is counted in.
const SECTOR: u64 = 512;

/// What is set aside for the unflushed bytes of one cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Aside {
    /// Where bytes that are not zero may lie.
    start: u32,
    end: u32,
    /// The most that the cell may take beyond what it has taken when this was reckoned.
    bytes: u64,
}

/// What this server has set aside, by file and by quota.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    files: HashMap<Ino, FileAside>,
    /// Sums over the files, by the directory of the quota.
    quotas: HashMap<Ino, u64>,
}

#[derive(Debug, Default)]
struct FileAside {
    quotas: Vec<Ino>,
    cells: BTreeMap<CellIndex, Aside>,
}

impl FileAside {
    fn bytes(&self) -> u64 {
        self.cells.values().map(|aside| aside.bytes).sum()
    }
}

impl Ledger {
    /// The fewest bytes that are left below one of the quotas and not set aside, and which it is.
    fn left(&self, quotas: &[QuotaUse]) -> Option<(u64, Ino)> {
        let left = quotas.iter().filter_map(|quota| {
            let aside = self.quotas.get(&quota.dir).copied().unwrap_or(0);
            Some((quota.bytes_left()?.saturating_sub(aside), quota.dir))
        });
        left.min()
    }

    fn aside(&self, ino: Ino, cell: CellIndex) -> Option<Aside> {
        self.files.get(&ino)?.cells.get(&cell).copied()
    }

    fn set(&mut self, ino: Ino, quotas: &[QuotaUse], cells: Vec<(CellIndex, Aside)>) {
        let mut file = self.take(ino);
        file.quotas = quotas.iter().map(|quota| quota.dir).collect();
        file.cells.extend(cells);
        self.give(ino, file);
    }

    /// Keeps only what is set aside for these cells.
    fn keep(&mut self, ino: Ino, dirty: &[CellIndex]) {
        let mut file = self.take(ino);
        file.cells.retain(|cell, _| dirty.binary_search(cell).is_ok());
        self.give(ino, file);
    }

    pub(super) fn forget(&mut self, ino: Ino) {
        self.take(ino);
    }

    fn knows(&self, ino: Ino) -> bool {
        self.files.contains_key(&ino)
    }

    fn take(&mut self, ino: Ino) -> FileAside {
        let file = self.files.remove(&ino).unwrap_or_default();
        let bytes = file.bytes();
        for quota in &file.quotas {
            let left = self.quotas.get(quota).copied().unwrap_or(0).saturating_sub(bytes);
            if left == 0 {
                self.quotas.remove(quota);
            } else {
                self.quotas.insert(*quota, left);
            }
        }
        file
    }

    fn give(&mut self, ino: Ino, file: FileAside) {
        if file.cells.is_empty() {
            return;
        }
        let bytes = file.bytes();
        for quota in &file.quotas {
            *self.quotas.entry(*quota).or_default() += bytes;
        }
        self.files.insert(ino, file);
    }

    /// Files for which something is set aside below any of the quotas.
    fn files_below(&self, quotas: &[QuotaUse]) -> Vec<Ino> {
        let below = |file: &FileAside| file.quotas.iter().any(|dir| quotas.iter().any(|quota| quota.dir == *dir));
        self.files.iter().filter(|(_, file)| below(file)).map(|(ino, _)| *ino).collect()
    }
}

/// The part of each cell that a write makes other than zero, as far as is known without what lies
/// around it.
fn spans(grid: CellSize, offset: u64, data: &[u8]) -> Vec<(CellIndex, Range<u32>)> {
    let mut found = Vec::new();
    let mut done = 0;
    while done < data.len() {
        let at = offset + done as u64;
        let within = grid.within(at);
        let len = ((grid.bytes() - within) as usize).min(data.len() - done);
        let part = &data[done..done + len];
        let first = part.iter().position(|&byte| byte != 0);
        let last = part.iter().rposition(|&byte| byte != 0);
        if let (Some(first), Some(last)) = (first, last) {
            let start = (within as u32 + first as u32) / PAGE * PAGE;
            found.push((grid.cell_of(at), start..within as u32 + last as u32 + 1));
        }
        done += len;
    }
    found
}

/// What a cell takes at most when it holds `span` over `extent`, beyond what it takes now.
fn growth(span: &Range<u32>, extent: Option<&Extent>, inline: bool) -> u64 {
    let (start, end) = match extent {
        Some(extent) => (span.start.min(extent.start / PAGE * PAGE), span.end.max(extent.end())),
        None => (span.start, span.end),
    };
    let unit = if inline { SECTOR } else { u64::from(PAGE) };
    u64::from(end - start).next_multiple_of(unit).saturating_sub(extent.map_or(0, Extent::allocated))
}

/// Quotas over the file that limit bytes.
fn byte_quotas(ns: &Namespace, ino: Ino) -> Result<Vec<QuotaUse>, FsError> {
    let mut quotas = ns.quotas_over(ino)?;
    quotas.retain(|quota| quota.quota.bytes.is_some());
    Ok(quotas)
}

impl Shared {
    /// Sets room aside for a write that follows at once. The caller holds [`Inode::local`], whose
    /// size this is, so that no flush ends in between and takes it for done.
    ///
    /// # Errors
    /// [`MetaError::QuotaExceeded`]: it may be more than is left.
    pub(super) fn set_aside(&self, inode: &Inode, local_size: Option<u64>, offset: u64, data: &[u8]) -> Result<(), FsError> {
        if byte_quotas(&self.meta.replica().read(), inode.ino)?.is_empty() {
            return Ok(());
        }
        // The ledger before the replica: what a flush committed is seen there before it is let go of
        // here.
        let mut ledger = self.ledger.lock();
        let ns = self.meta.replica().read();
        let quotas = byte_quotas(&ns, inode.ino)?;
        let (cells, more) = self.reckon(&ledger, &ns, inode, local_size, offset, data)?;
        if let Some((left, dir)) = ledger.left(&quotas)
            && more > left
        {
            return Err(MetaError::QuotaExceeded { dir }.into());
        }
        ledger.set(inode.ino, &quotas, cells);
        Ok(())
    }

    /// What would be set aside for the cells of a write, and by how much that is more than now.
    fn reckon(
        &self,
        ledger: &Ledger,
        ns: &Namespace,
        inode: &Inode,
        local_size: Option<u64>,
        offset: u64,
        data: &[u8],
    ) -> Result<(Vec<(CellIndex, Aside)>, u64), FsError> {
        let (ino, grid) = (inode.ino, inode.entry.cell_size());
        let size = attr_of(ns, ino)?.size.max(local_size.unwrap_or(0)).max(offset + data.len() as u64);
        let mut spans = spans(grid, offset, data);
        // A file that grows is no longer kept inline, wherever it grows.
        if spans.first().is_none_or(|(cell, _)| *cell > 0)
            && let Some(first) = ledger.aside(ino, 0)
        {
            spans.push((0, first.start..first.end));
        }
        let (mut cells, mut more) = (Vec::with_capacity(spans.len()), 0);
        for (cell, span) in spans {
            let before = ledger.aside(ino, cell);
            let span = before.map_or(span.clone(), |aside| span.start.min(aside.start)..span.end.max(aside.end));
            let extent = extent_of(ns, ino, cell)?;
            let bytes = growth(&span, extent.as_ref(), cell == 0 && size <= INLINE_BYTES_MAX as u64);
            let bytes = bytes.max(before.map_or(0, |aside| aside.bytes));
            more += bytes - before.map_or(0, |aside| aside.bytes);
            cells.push((cell, Aside { start: span.start, end: span.end, bytes }));
        }
        Ok((cells, more))
    }

    /// Lets go of what was set aside for cells with nothing unflushed. The caller holds
    /// [`Inode::local`], and no flush is in doubt.
    pub(super) fn settle_aside(&self, inode: &Inode) {
        if self.ledger.lock().knows(inode.ino) {
            let dirty = inode.entry.dirty_cells(false);
            self.ledger.lock().keep(inode.ino, &dirty);
        }
    }

    /// Flushes what is buffered here below the quotas over `ino`, so that the metadata know how much
    /// room is left. What fails keeps its room and its error.
    pub(super) async fn flush_below_quotas(&self, ino: Ino) -> Result<(), FsError> {
        let files = {
            let ledger = self.ledger.lock();
            let quotas = byte_quotas(&self.meta.replica().read(), ino)?;
            ledger.files_below(&quotas)
        };
        let flushes = futures_util::stream::iter(files).map(|ino| async move {
            if !self.inodes.lock().contains_key(&ino) {
                self.ledger.lock().forget(ino);
            } else if let Err(error) = self.flush(ino).await {
                tracing::debug!(%ino, %error, "flush to make room below a quota");
            }
        });
        flushes.buffer_unordered(self.settings.flushes.max(1)).collect::<()>().await;
        Ok(())
    }

    /// How much of `data`, from its beginning, there is room for now.
    pub(super) fn fitting(&self, inode: &Inode, place: Place, data: &[u8]) -> Result<usize, FsError> {
        let local_size = inode.local.lock().size;
        let ledger = self.ledger.lock();
        let ns = self.meta.replica().read();
        let Some((left, _)) = ledger.left(&byte_quotas(&ns, inode.ino)?) else { return Ok(data.len()) };
        let offset = match place {
            Place::At(offset) | Place::Within(offset) => offset,
            Place::End => attr_of(&ns, inode.ino)?.size.max(local_size.unwrap_or(0)),
        };
        // Up to the n-th boundary of a sector behind the offset.
        let len = |n: usize| ((n as u64 * SECTOR).saturating_sub(offset % SECTOR) as usize).min(data.len());
        let (mut fits, mut too_many) = (0, data.len() / SECTOR as usize + 3);
        while fits + 1 < too_many {
            let n = fits.midpoint(too_many);
            let (_, more) = self.reckon(&ledger, &ns, inode, local_size, offset, &data[..len(n)])?;
            if more <= left { fits = n } else { too_many = n }
        }
        Ok(len(fits))
    }

    /// Refuses to allocate what could not be written anyway.
    ///
    /// # Errors
    /// [`MetaError::QuotaExceeded`].
    pub(super) fn may_allocate(&self, ino: Ino, bytes: u64) -> Result<(), FsError> {
        let ledger = self.ledger.lock();
        let ns = self.meta.replica().read();
        let Some((left, dir)) = ledger.left(&byte_quotas(&ns, ino)?) else { return Ok(()) };
        let has = attr_of(&ns, ino)?.allocated + ledger.files.get(&ino).map_or(0, FileAside::bytes);
        if bytes.saturating_sub(has) > left { Err(MetaError::QuotaExceeded { dir }.into()) } else { Ok(()) }
    }

    /// Whether so many bytes surely fit beside what is set aside below the quotas over `ino`.
    pub(super) fn surely_fits(&self, ino: Ino, bytes: u64) -> Result<bool, FsError> {
        let ledger = self.ledger.lock();
        let quotas = byte_quotas(&self.meta.replica().read(), ino)?;
        Ok(ledger.left(&quotas).is_none_or(|(left, _)| bytes <= left))
    }
}

#[cfg(test)]
mod tests {
    use ctfs_meta::{Quota, Totals};
    use ctfs_types::{ChunkId, ExtentData, Stamp};

    use super::*;

    const GRID: CellSize = CellSize::DEFAULT;

    #[test]
    fn only_bytes_that_are_not_zero_take_room() {
        assert_eq!(spans(GRID, 0, &[0; 9000]), []);
        assert_eq!(spans(GRID, 10, b"\0\0x\0"), [(0, 0..13)]);
        let mut data = vec![0; 20_000];
        data[9000] = 1;
        assert_eq!(spans(GRID, 0, &data), [(0, 8192..9001)]);
        assert_eq!(spans(GRID, GRID.bytes() - 1, b"ab"), [(0, (1 << 20) - 4096..1 << 20), (1, 0..1)]);
    }

    #[test]
    fn a_cell_grows_to_reach_over_all_of_its_data() {
        let extent = Extent { start: 8192, data: ExtentData::Chunk { id: ChunkId([0; 32]), len: 4096 }, stamp: Stamp(1) };
        assert_eq!(growth(&(0..1), None, true), 512);
        assert_eq!(growth(&(0..1), None, false), 4096);
        assert_eq!(growth(&(8192..9000), Some(&extent), false), 0);
        assert_eq!(growth(&(0..1), Some(&extent), false), 8192);
        assert_eq!(growth(&(20_480..20_481), Some(&extent), false), 12_288);
    }

    #[test]
    fn the_sums_are_those_of_the_files() {
        let quota = |dir, bytes| QuotaUse { dir: Ino(dir), quota: Quota { bytes: Some(bytes), files: None }, totals: Totals::default() };
        let aside = |bytes| Aside { start: 0, end: 1, bytes };
        let (outer, inner) = (quota(2, 1000), quota(3, 800));
        let mut ledger = Ledger::default();
        ledger.set(Ino(10), &[inner, outer], vec![(0, aside(100)), (1, aside(50))]);
        ledger.set(Ino(11), &[outer], vec![(0, aside(300))]);
        assert_eq!(ledger.left(&[outer]), Some((550, Ino(2))));
        assert_eq!(ledger.left(&[inner, outer]), Some((550, Ino(2))));
        assert_eq!(ledger.left(&[inner]), Some((650, Ino(3))));
        // Set anew, and now below another quota.
        ledger.set(Ino(10), &[outer], vec![(1, aside(60))]);
        assert_eq!((ledger.left(&[outer]), ledger.left(&[inner])), (Some((540, Ino(2))), Some((800, Ino(3)))));
        ledger.keep(Ino(10), &[1]);
        assert_eq!(ledger.left(&[outer]), Some((640, Ino(2))));
        ledger.keep(Ino(10), &[]);
        ledger.forget(Ino(11));
        assert_eq!(ledger.left(&[outer]), Some((1000, Ino(2))));
        assert!(ledger.files.is_empty() && ledger.quotas.is_empty());
    }
}
