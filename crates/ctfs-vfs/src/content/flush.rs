//! Flushing: from unflushed ranges to chunks that the metadata name.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ctfs_chunk::tier::{Base, Found, Tag};
use ctfs_meta::{CellWrite, Change, MetaError, Noted, Op, Reply};
use ctfs_types::{Attr, CellIndex, ExtentData, Ino, Stamp, Timestamp, limits::INLINE_BYTES_MAX};
use futures_util::{StreamExt, TryStreamExt};
use tracing::{debug, warn};

use super::{Inode, Shared, attr_of, cache_error, doubt::Turn, extent_of, tag_of, written::unflushed_of};
use crate::FsError;

/// Cells in one command: with 50 bytes each they stay far below what a command may hold.
const BATCH_CELLS: u64 = 32;
/// Bytes of one batch held in memory until it is committed.
const BATCH_BYTES: u64 = 32 << 20;
/// Merges over somebody else's newer extent before a flush gives up.
const MERGE_TRIES: usize = 16;
/// Leading zeros are left out in steps of a page, so that equal pages keep making equal chunks.
const TRIM_STEP: usize = 4096;

/// Who hears of a flush that failed: each handle that was open, once, or whoever asked alone. What a quota has no room
/// for is dropped, and told to those who wrote it in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    ToWriters,
    ToAsker,
}

/// What a flush takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    Everything,
    /// Only cells that are dirty from end to end: the others are still being written.
    WholeCells,
}

/// What a flush does to the size of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Growth {
    /// It grows as far as was written.
    Free,
    /// An append: as above, and refused when the size is not this one.
    From(u64),
    /// Nothing; what is past the end is cut off.
    Never,
}

/// What is pending of the attributes when a flush begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pending {
    size: Option<u64>,
    mtime: Option<Timestamp>,
    drops_wanted: u64,
    drop_privileges: bool,
    growth: Growth,
    /// The journal's bytes of the file up to there are in it.
    noted: Option<u64>,
}

/// A cell ready to be committed.
pub(super) struct Built {
    pub cell: CellIndex,
    /// The stamp of the extent merged over.
    pub expect: Stamp,
    pub start: u32,
    pub data: Option<ExtentData>,
    /// The bytes of `data`, for the cache and for putting them again.
    bytes: Bytes,
    base: Option<Tag>,
    pub copies: u8,
    pub put_at: PutAt,
}

impl Built {
    pub fn without_bytes(&self) -> Self {
        Self { data: self.data.clone(), bytes: Bytes::new(), ..*self }
    }
}

/// When a chunk was put. Counted on a clock that goes on while this machine is suspended, because
/// the grace time of the peers that hold the chunk does, too.
#[derive(Debug, Clone, Copy)]
pub(super) struct PutAt(Duration);

impl PutAt {
    fn now() -> Self {
        Self(ctfs_host::boot_time())
    }

    pub fn elapsed(self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }
}

/// A cell's new content before it is put.
enum Composed {
    Ready { expect: Stamp, base: Option<Tag>, copies: u8, size: u64, bytes: Vec<u8> },
    Missing(Tag),
}

impl Shared {
    pub(super) async fn flush(&self, ino: Ino) -> Result<(), FsError> {
        self.flush_telling(ino, Told::ToWriters).await
    }

    pub(super) async fn flush_telling(&self, ino: Ino, told: Told) -> Result<(), FsError> {
        let inode = self.inodes.lock().get(&ino).cloned();
        let Some(inode) = inode else { return Ok(()) };
        let flushed = {
            let mut turn = inode.flushing.lock().await;
            self.flush_locked(&inode, &mut turn, Cut::Everything).await
        };
        if let Err(error) = &flushed
            && (told == Told::ToWriters || error.is_over_quota())
        {
            inode.local.lock().error = Some(error.clone());
        }
        drop(inode);
        flushed
    }

    /// The flush itself; the caller holds [`Inode::flushing`].
    ///
    /// What becomes dirty meanwhile is left for the next one, so a busy writer cannot keep it going.
    pub(super) async fn flush_locked(&self, inode: &Arc<Inode>, turn: &mut Turn, cut: Cut) -> Result<(), FsError> {
        match self.flush_placed(inode, turn, cut, Growth::Free).await {
            // What is in the journal is let through, with all that is noted of it.
            Err(refusal) if refusal.is_over_quota() && cut != Cut::Everything && inode.local.lock().noted_upto > 0 => {
                self.flush_placed(inode, turn, Cut::Everything, Growth::Free).await
            }
            Err(refusal) if refusal.is_over_quota() => self.flush_over_quota(inode, turn, cut, refusal).await,
            flushed => flushed,
        }
    }

    /// A quota has no room for all that is unflushed: commits cell by cell what it lets through, and
    /// drops the others' bytes, because no later flush could promise more. Whoever wrote them is told.
    async fn flush_over_quota(&self, inode: &Arc<Inode>, turn: &mut Turn, cut: Cut, refusal: FsError) -> Result<(), FsError> {
        let (ino, grid) = (inode.ino, inode.entry.cell_size());
        // The file does not grow by bytes that are dropped.
        let pending = Pending { size: None, noted: None, ..self.pending(inode, Growth::Free) };
        let mut dropped = 0u64;
        for cell in inode.entry.dirty_cells(cut == Cut::WholeCells) {
            match self.flush_batch(inode, turn, &[cell], pending).await {
                Err(error) if error.is_over_quota() => {
                    inode.entry.abandon_flush();
                    let (offset, len) = (grid.start_of(cell), grid.bytes());
                    let mut local = inode.local.lock();
                    let before = inode.entry.dirty_bytes();
                    inode.entry.discard(offset..offset + len);
                    dropped += before.saturating_sub(inode.entry.dirty_bytes());
                    local.size = inode.entry.view().unflushed_end();
                    local.error = Some(error);
                    drop(local);
                    if let Some(kernel) = self.waits.kernel() {
                        kernel.invalidate(vec![Change::Data { ino, offset, len }, Change::Attr { ino }]);
                    }
                }
                flushed => flushed?,
            }
        }
        // The times, and what was written meanwhile.
        self.flush_placed(inode, turn, cut, Growth::Free).await?;
        if dropped == 0 {
            return Ok(());
        }
        warn!(%ino, dropped, "unflushed bytes over a quota were dropped");
        Err(refusal)
    }

    fn pending(&self, inode: &Inode, growth: Growth) -> Pending {
        let local = inode.local.lock();
        Pending {
            size: local.size,
            mtime: local.mtime,
            drops_wanted: local.drops_wanted,
            drop_privileges: local.drop_is_pending(),
            growth,
            noted: Some(local.noted_upto).filter(|upto| *upto > 0),
        }
    }

    /// As [`Self::flush_locked`], with a say in the size.
    pub(super) async fn flush_placed(
        &self,
        inode: &Arc<Inode>,
        turn: &mut Turn,
        cut: Cut,
        growth: Growth,
    ) -> Result<(), FsError> {
        self.end_doubt(inode, turn).await?;
        // A flush whose caller went away left its ranges behind.
        inode.entry.abandon_flush();
        let lost = self.take_lost(inode);
        let flushed = self.flush_cells(inode, turn, cut, growth).await;
        if turn.is_none() {
            inode.entry.abandon_flush();
        }
        let lost = lost.or(self.take_lost(inode));
        let flushed = match flushed {
            Err(FsError::Meta(MetaError::NoSuchInode(_)) | FsError::Stale(_)) => {
                // Nobody can open it any more: there is nothing to keep. Whoever has it open (it was
                // reaped while this server was away) must not be told that its bytes are safe.
                let is_open = inode.local.lock().opens > 0;
                debug!(ino = %inode.ino, is_open, "unflushed bytes of a removed file are dropped");
                self.forget(inode.ino);
                return if is_open { Err(FsError::Stale(inode.ino)) } else { Ok(()) };
            }
            other => other,
        };
        let mut local = inode.local.lock();
        if flushed.is_ok() {
            // What was flushed is missing in no journal, and must not be looked at each time.
            local.unnoted = unflushed_of(&inode.entry.view(), &local.unnoted);
        } else if turn.is_none() {
            // It may have been noted as being in the metadata: the next fsync has it all in the journal once more.
            local.unnoted.insert(0..u64::MAX);
        }
        if !self.rest_if_clean(inode, &mut local) && flushed.is_ok() {
            local.since = Some(Instant::now());
        }
        drop(local);
        self.drained.notify_waiters();
        lost.map_or(flushed, Err)
    }

    /// What to tell of unflushed bytes that went with their cache file. Also a flush that nobody
    /// asked for keeps it for the next one who asks: the bytes are gone, no flush can make it good.
    fn take_lost(&self, inode: &Inode) -> Option<FsError> {
        let bytes = inode.entry.take_lost();
        if bytes == 0 {
            return None;
        }
        let why = format!("{bytes} bytes were removed from the cache directory");
        let error = FsError::LostWrites { ino: inode.ino, why };
        let mut local = inode.local.lock();
        // The file does not grow by bytes that are gone: they would read as zeros.
        local.size = inode.entry.view().unflushed_end();
        local.error = Some(error.clone());
        Some(error)
    }

    async fn flush_cells(
        &self,
        inode: &Arc<Inode>,
        turn: &mut Turn,
        cut: Cut,
        growth: Growth,
    ) -> Result<(), FsError> {
        // The attributes first: what is written from here on belongs to the next flush.
        let pending = self.pending(inode, growth);
        let cells = inode.entry.dirty_cells(cut == Cut::WholeCells);
        let batch = (BATCH_BYTES / inode.entry.cell_size().bytes()).clamp(1, BATCH_CELLS) as usize;
        let batches = cells.chunks(batch);
        let count = batches.len();
        for (n, cells) in batches.enumerate() {
            // The size that programs see comes with the last bytes, not before them.
            let is_last = n + 1 == count && cut == Cut::Everything;
            let (size, noted) = (pending.size.filter(|_| is_last), pending.noted.filter(|_| is_last));
            self.flush_batch(inode, turn, cells, Pending { size, noted, ..pending }).await?;
            // Room for those who wait, long before a large flush ends.
            self.drained.notify_waiters();
        }
        let attributes = pending.size.is_some() || pending.mtime.is_some() || pending.drop_privileges || pending.noted.is_some();
        if count == 0 && attributes && cut == Cut::Everything {
            self.flush_batch(inode, turn, &[], pending).await?;
        }
        Ok(())
    }

    /// Puts and commits some cells; none for the attributes alone.
    async fn flush_batch(
        &self,
        inode: &Arc<Inode>,
        turn: &mut Turn,
        cells: &[CellIndex],
        pending: Pending,
    ) -> Result<(), FsError> {
        let ino = inode.ino;
        let grid = inode.entry.cell_size();
        cells.iter().for_each(|&cell| inode.entry.begin_flush(cell));
        let end = {
            let view = inode.entry.view();
            cells.iter().filter_map(|&cell| Some(grid.start_of(cell) + view.flushing_end(cell)?)).max()
        };
        let size_at_least = end.max(pending.size).filter(|_| pending.growth != Growth::Never).unwrap_or(0);

        let mut built: Vec<Built> = Vec::with_capacity(cells.len());
        for _ in 0..MERGE_TRIES {
            let todo: Vec<CellIndex> =
                cells.iter().copied().filter(|cell| built.iter().all(|done| done.cell != *cell)).collect();
            let builds = futures_util::stream::iter(todo).map(|cell| self.build(inode, cell, size_at_least));
            let fresh: Vec<Built> = builds.buffer_unordered(self.settings.transfers.max(1)).try_collect().await?;
            built.extend(fresh);
            built.sort_unstable_by_key(|done| done.cell);
            for done in built.iter_mut().filter(|done| done.put_at.elapsed() > self.settings.put_age_max) {
                self.put(done).await?;
            }
            let write = |done: &Built| CellWrite {
                cell: done.cell,
                expect: done.expect,
                start: done.start,
                data: done.data.clone(),
                copies: done.copies,
            };
            let op = Op::Write {
                ino,
                cells: built.iter().map(write).collect(),
                size_at_least,
                mtime: Some(self.mtime_to_commit(ino, pending.mtime)?),
                drop_privileges: pending.drop_privileges,
                appends_at: match pending.growth {
                    Growth::From(size) => Some(size),
                    Growth::Free | Growth::Never => None,
                },
                noted: pending.noted.map(|upto| Noted { upto, kept_from: self.meta.kept_from() }),
            };
            match self.propose_flush(inode, turn, op, (&built, pending)).await {
                Ok(Reply::Written { attr, .. }) => {
                    // The answer came late, or this machine slept on the way: what no extent named
                    // yet may have been collected. Nobody is told 0 before the copies are there.
                    let kept_for = self.settings.put_age_max.saturating_mul(2);
                    for done in built.iter_mut().filter(|done| done.put_at.elapsed() > kept_for) {
                        self.put(done).await?;
                    }
                    for done in &built {
                        let committed = match done.data {
                            Some(ExtentData::Chunk { id, len }) => Some((Tag { start: done.start, len, id }, &done.bytes[..])),
                            _ => None,
                        };
                        inode.entry.settle(done.cell, committed, done.base);
                    }
                    self.committed(inode, &attr, pending);
                    return Ok(());
                }
                Ok(other) => {
                    warn!(%ino, ?other, "a write was answered as something else");
                    return Err(FsError::Store("a write was answered as something else".into()));
                }
                Err(FsError::Meta(MetaError::CellChanged { .. })) => {
                    // Somebody wrote meanwhile. Those cells are merged again, over theirs.
                    let ns = self.meta.replica().read();
                    let mut kept = Vec::with_capacity(built.len());
                    for done in built {
                        let stamp = extent_of(&ns, ino, done.cell)?.map_or(Stamp(0), |extent| extent.stamp);
                        if stamp == done.expect {
                            kept.push(done);
                        }
                    }
                    built = kept;
                }
                Err(error) => return Err(error),
            }
        }
        Err(MetaError::CellChanged { ino, cell: cells.first().copied().unwrap_or(0) }.into())
    }

    /// The time of the last write here, or else what the metadata have: a flush is not a change,
    /// and utimensat(2) between write and flush must hold.
    pub(super) fn mtime_to_commit(&self, ino: Ino, pending: Option<Timestamp>) -> Result<Timestamp, FsError> {
        match pending {
            Some(mtime) => Ok(mtime),
            None => Ok(attr_of(&self.meta.replica().read(), ino)?.mtime),
        }
    }

    /// The metadata know what was pending: what was not written since is let go of.
    pub(super) fn committed(&self, inode: &Inode, attr: &Attr, pending: Pending) {
        let mut local = self.letting_go(inode);
        if local.size.is_some_and(|size| size <= attr.size) {
            local.size = None;
        }
        if local.mtime == pending.mtime {
            local.mtime = None;
        }
        if pending.drop_privileges {
            local.drops_committed = local.drops_committed.max(pending.drops_wanted);
        }
        if let Some(upto) = pending.noted {
            if local.noted_upto == upto {
                local.noted_upto = 0;
            }
            self.meta.let_go(inode.ino, upto);
        }
    }

    /// Merges a cell and makes its bytes durable.
    async fn build(&self, inode: &Arc<Inode>, cell: CellIndex, size_at_least: u64) -> Result<Built, FsError> {
        let mut loan = None;
        for _ in 0..MERGE_TRIES {
            match self.compose(inode, cell, loan.as_ref())? {
                Composed::Missing(tag) => {
                    loan = self.fetch(inode, cell, tag).await?.map(|bytes| (tag, bytes));
                }
                Composed::Ready { expect, base, copies, size, bytes } => {
                    let (start, bytes) = trim(bytes);
                    let whole_file = cell == 0 && size.max(size_at_least) <= INLINE_BYTES_MAX as u64;
                    let mut done = Built { cell, expect, start, data: None, bytes, base, copies, put_at: PutAt::now() };
                    if done.bytes.is_empty() {
                        done.start = 0;
                    } else if whole_file {
                        done.data = Some(ExtentData::Inline(done.bytes.to_vec()));
                    } else {
                        self.put(&mut done).await?;
                    }
                    return Ok(done);
                }
            }
        }
        Err(MetaError::CellChanged { ino: inode.ino, cell }.into())
    }

    async fn put(&self, done: &mut Built) -> Result<(), FsError> {
        if done.bytes.is_empty() || matches!(done.data, Some(ExtentData::Inline(_))) {
            return Ok(());
        }
        // Counted from before the put: the peers' grace time begins no earlier.
        let at = PutAt::now();
        let id = self.chunks.put(done.bytes.clone(), done.copies).await?;
        done.data = Some(ExtentData::Chunk { id, len: done.bytes.len() as u32 });
        done.put_at = at;
        Ok(())
    }

    /// The cell as it shall be: its unflushed bytes over its extent of this moment.
    fn compose(&self, inode: &Inode, cell: CellIndex, loan: Option<&(Tag, Bytes)>) -> Result<Composed, FsError> {
        let ino = inode.ino;
        let view = inode.entry.view();
        let ns = self.meta.replica().read();
        let size = attr_of(&ns, ino)?.size;
        let extent = extent_of(&ns, ino, cell)?;
        let copies = ns.effective_policy(ino)?.copies;
        drop(ns);
        let tag = extent.as_ref().and_then(tag_of);
        let base = match (&extent, tag) {
            (None, _) => Base::Hole,
            (Some(extent), Some(tag)) => match loan.filter(|(loan, _)| loan.covers(&tag)) {
                Some((_, bytes)) => Base::Bytes { start: extent.start, bytes: &bytes[..tag.len as usize] },
                None => Base::Chunk(tag),
            },
            (Some(extent), None) => match &extent.data {
                ExtentData::Inline(bytes) => Base::Bytes { start: extent.start, bytes },
                ExtentData::Chunk { .. } => unreachable!("a chunk has a tag"),
            },
        };
        let old_end = extent.as_ref().map_or(0, |extent| u64::from(extent.end()));
        let end = old_end.max(view.flushing_end(cell).unwrap_or(0));
        let mut bytes = vec![0; end as usize];
        match (view.read(cell, 0..end, base, &mut bytes).map_err(|error| cache_error(ino, error))?, tag) {
            (Found::Missing, Some(tag)) => Ok(Composed::Missing(tag)),
            _ => {
                let expect = extent.map_or(Stamp(0), |extent| extent.stamp);
                Ok(Composed::Ready { expect, base: tag, copies, size, bytes })
            }
        }
    }
}

/// Leaves out leading zeros (whole pages) and trailing zeros: outside its data a cell is zero.
pub(super) fn trim(bytes: Vec<u8>) -> (u32, Bytes) {
    let is_zero = |part: &[u8]| part.iter().all(|&byte| byte == 0);
    let start = bytes.chunks(TRIM_STEP).take_while(|page| is_zero(page)).count() * TRIM_STEP;
    if start >= bytes.len() {
        return (0, Bytes::new());
    }
    let zero_pages = bytes[start..].rchunks(TRIM_STEP).take_while(|page| is_zero(page)).count();
    let end = bytes.len() - zero_pages * TRIM_STEP;
    let end = bytes[..end].iter().rposition(|&byte| byte != 0).map_or(start, |last| last + 1);
    (start as u32, Bytes::from(bytes).slice(start..end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trimming_keeps_every_byte_that_is_not_zero() {
        for (len, set) in [(0, None), (1, Some(0)), (5000, Some(4999)), (20_000, Some(4096)), (20_000, Some(8191)), (9000, None)] {
            let mut bytes = vec![0; len];
            if let Some(at) = set {
                bytes[at] = 7;
            }
            let (start, kept) = trim(bytes);
            assert_eq!(start % 4096, 0);
            match set {
                Some(at) => {
                    assert_eq!(kept.len(), at + 1 - start as usize);
                    assert_eq!(kept[at - start as usize], 7);
                    assert!(at - (start as usize) < 4096);
                }
                None => assert!(kept.is_empty()),
            }
        }
    }
}
