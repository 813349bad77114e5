//! Reading, and reading ahead.

use std::{collections::HashMap, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use ctfs_chunk::tier::{Base, Found, Tag};
use ctfs_meta::{Lock, LockKind, MetaError, Subject};
use ctfs_types::{CellIndex, ExtentData, FileUse, Ino, LogIndex};
use futures_util::{StreamExt, TryStreamExt};
use tracing::debug;

use super::{Inode, Pages, Shared, attr_of, cache_error, extent_of, sharing::held_elsewhere, shown_size, tag_of};
use crate::{FsError, partition::Sight};

/// How often a read starts over because the cells it fetched were changed meanwhile.
const READ_TRIES: usize = 64;
/// Cells read ahead: at first, and at most. Eight of 1 MiB are 60 ms of a gigabit link.
const AHEAD_MIN: u64 = 2;
const AHEAD_MAX: u64 = 8;
/// How often a read starts over because what it read was changed and not every server shows it yet.
/// Then it answers what it had: the file is being written all the time.
const UNSEEN_TRIES: u32 = 8;
/// Reads of the kernel's own read-ahead come a little out of order.
const STREAM_SLACK: u64 = 512 << 10;

/// Chunks fetched for one read, in case the tier could not take or keep them.
pub(super) type Loans = HashMap<CellIndex, (Tag, Bytes)>;

enum Attempt {
    /// `unseen`: other servers may not show this before that entry is visible.
    Done { bytes: Bytes, size: u64, cuts: u64, unseen: Option<LogIndex> },
    Missing(Vec<(CellIndex, Tag)>),
    /// Another server has newer bytes.
    Held,
}

/// How a file is being read, to know what to fetch ahead.
#[derive(Debug, Default)]
pub(super) struct Stream {
    /// Where the next read begins if it goes on.
    next: u64,
    /// Reads that went on, in a row.
    run: u32,
    /// Cells to fetch ahead; 0 until the file is read in order.
    window: u64,
    /// Cells below this were asked for already.
    until: CellIndex,
}

impl Stream {
    /// Notes a read of `range` and answers the cells to fetch ahead.
    fn advance(&mut self, range: Range<u64>, cell_of: impl Fn(u64) -> CellIndex, cells: CellIndex) -> Range<CellIndex> {
        let goes_on = range.start.abs_diff(self.next) <= STREAM_SLACK && range.end > self.next;
        if !goes_on && self.next != 0 {
            // Behind what was read already: a read that came late.
            if range.end <= self.next && self.next - range.start <= STREAM_SLACK {
                return 0..0;
            }
            *self = Self { next: range.end, ..Self::default() };
            return 0..0;
        }
        self.next = range.end;
        self.run = self.run.saturating_add(1);
        let after = cell_of(range.end - 1) + 1;
        if self.run < 2 || (self.until > after && self.until - after > self.window / 2) {
            return 0..0;
        }
        self.window = (self.window * 2).clamp(AHEAD_MIN, AHEAD_MAX);
        let ahead = after.max(self.until)..(after + self.window).min(cells);
        self.until = self.until.max(ahead.end);
        ahead
    }
}

impl Shared {
    pub(super) async fn read(self: &Arc<Self>, ino: Ino, offset: u64, len: u32, pages: Pages) -> Result<Bytes, FsError> {
        let reading = self.partition.begin();
        loop {
            match reading.sight(ino).await? {
                Sight::Present => match self.read_present(ino, offset, len, pages).await {
                    Err(error) if reading.is_cut_off_by(&error) => {}
                    read => return read,
                },
                Sight::Past => return self.read_past(ino, offset, len).await,
            }
        }
    }

    /// What this server knew last, of its own cache and of whoever has the chunks.
    ///
    /// # Errors
    /// [`FsError::NoQuorum`] where programs here hold a lock or wrote what the others do not have: the others may
    /// have ended this life, and then what is here was never so.
    async fn read_past(self: &Arc<Self>, ino: Ino, offset: u64, len: u32) -> Result<Bytes, FsError> {
        let inode = self.inode(ino)?;
        let mut loans = Loans::new();
        for _ in 0..READ_TRIES {
            if self.pending.lock().contains_key(&ino) || self.is_locked_here(ino)? {
                return Err(FsError::NoQuorum { waited: Duration::ZERO });
            }
            match self.try_read(&inode, offset, len, &loans, Sight::Past)? {
                Attempt::Done { cuts, .. } if inode.local.lock().cuts != cuts => {}
                Attempt::Done { bytes, .. } => return Ok(bytes),
                Attempt::Held => break,
                Attempt::Missing(missing) => self.lend(&inode, missing, &mut loans).await?,
            }
        }
        Err(MetaError::CellChanged { ino, cell: inode.entry.cell_size().cell_of(offset) }.into())
    }

    fn is_locked_here(&self, ino: Ino) -> Result<bool, FsError> {
        let ns = self.meta.replica().read();
        let is_ours = |lock: &Lock| lock.owner.node == self.meta.node();
        Ok(ns.locks(ino, LockKind::Record)?.iter().any(is_ours) || ns.locks(ino, LockKind::Flock)?.iter().any(is_ours))
    }

    /// Fetches what is missing.
    async fn lend(&self, inode: &Inode, missing: Vec<(CellIndex, Tag)>, loans: &mut Loans) -> Result<(), FsError> {
        let fetches = futures_util::stream::iter(missing)
            .map(|(cell, tag)| async move { Ok::<_, FsError>((cell, tag, self.fetch(inode, cell, tag).await?)) });
        let fetched: Vec<_> = fetches.buffer_unordered(self.settings.transfers.max(1)).try_collect().await?;
        loans.extend(fetched.into_iter().filter_map(|(cell, tag, bytes)| Some((cell, (tag, bytes?)))));
        Ok(())
    }

    async fn read_present(self: &Arc<Self>, ino: Ino, offset: u64, len: u32, pages: Pages) -> Result<Bytes, FsError> {
        let mut leased = self.meta.leased();
        if !leased {
            self.meta.barrier().await?;
        }
        let inode = self.inode(ino)?;
        let mut loans = Loans::new();
        let mut waited = 0;
        for _ in 0..READ_TRIES {
            match self.try_read(&inode, offset, len, &loans, Sight::Present)? {
                // A pause since the lease was looked at may have ended it: look again.
                Attempt::Done { .. } if leased && !self.meta.leased() => {
                    leased = false;
                    self.meta.barrier().await?;
                }
                // Began on one side of a truncate and ended on the other.
                Attempt::Done { cuts, .. } if inode.local.lock().cuts != cuts => {}
                Attempt::Done { unseen: Some(index), bytes, .. } => {
                    {
                        // Everybody may be waiting for these very pages until we have answered.
                        let _waits = self.waits.enter(ino, pages);
                        self.meta.await_visible(index).await?;
                    }
                    waited += 1;
                    // What came meanwhile was acknowledged although the kernel has not dropped these
                    // pages: they shall be filled with what is there by now.
                    if waited == UNSEEN_TRIES {
                        return Ok(bytes);
                    }
                }
                Attempt::Done { bytes, size, .. } => {
                    self.read_ahead(&inode, offset..offset + bytes.len() as u64, size);
                    return Ok(bytes);
                }
                Attempt::Held => self.settle(ino, pages).await?,
                Attempt::Missing(missing) => self.lend(&inode, missing, &mut loans).await?,
            }
        }
        Err(MetaError::CellChanged { ino, cell: inode.entry.cell_size().cell_of(offset) }.into())
    }

    /// Reads what is at hand, or says what is not. Never waits.
    fn try_read(&self, inode: &Inode, offset: u64, len: u32, loans: &Loans, sight: Sight) -> Result<Attempt, FsError> {
        let ino = inode.ino;
        let grid = inode.entry.cell_size();
        let (local_size, cut, cuts) = {
            let local = inode.local.lock();
            (local.size, local.cut, local.cuts)
        };
        // The entry first, the replica inside it: see `Entry::view`.
        let view = inode.entry.view();
        let ns = self.meta.replica().read();
        let attr = attr_of(&ns, ino)?;
        if sight == Sight::Present && held_elsewhere(&ns, &attr, self.meta.holder())?.is_some() {
            return Ok(Attempt::Held);
        }
        // Bytes of a file that this server holds are asked of it by whoever reads them elsewhere.
        let is_held = matches!(attr.usage, FileUse::Owned { holder, .. } if holder == self.meta.holder());
        let unseen = match ns.cover(ino)? {
            // So is all of it, if it holds the directory.
            Some((dir, _)) if !ns.is_on_the_way(dir) && !ns.is_between(ino) => None,
            _ => self.meta.unseen_change(&if is_held { Subject::Holder(ino) } else { Subject::Inode(ino) }),
        };
        let size = shown_size(&attr, local_size, cut);
        let end = offset.saturating_add(len.into()).min(size);
        if offset >= end {
            return Ok(Attempt::Done { bytes: Bytes::new(), size, cuts, unseen });
        }
        let (first, last) = (grid.cell_of(offset), grid.cell_of(end - 1));
        let mut extents = ns.cells(ino, first, last - first + 1)?.into_iter().peekable();
        drop(ns);

        let mut out = vec![0; (end - offset) as usize];
        let mut missing = Vec::new();
        for cell in first..=last {
            let start = grid.start_of(cell);
            let part = offset.max(start)..end.min(start + grid.bytes());
            let within = part.start - start..part.end - start;
            let target = &mut out[(part.start - offset) as usize..(part.end - offset) as usize];
            let extent = extents.next_if(|found| found.index == cell).map(|found| found.extent);
            let tag = extent.as_ref().and_then(tag_of);
            let base = match (&extent, tag) {
                (None, _) => Base::Hole,
                (Some(extent), Some(tag)) => match loans.get(&cell).filter(|(loan, _)| loan.covers(&tag)) {
                    Some((_, bytes)) => Base::Bytes { start: extent.start, bytes: &bytes[..tag.len as usize] },
                    None => Base::Chunk(tag),
                },
                (Some(extent), None) => match &extent.data {
                    ExtentData::Inline(bytes) => Base::Bytes { start: extent.start, bytes },
                    ExtentData::Chunk { .. } => unreachable!("a chunk has a tag"),
                },
            };
            match (view.read(cell, within, base, target).map_err(|error| cache_error(ino, error))?, tag) {
                (Found::Missing, Some(tag)) => missing.push((cell, tag)),
                _ => {}
            }
        }
        Ok(if missing.is_empty() {
            Attempt::Done { bytes: out.into(), size, cuts, unseen }
        } else {
            Attempt::Missing(missing)
        })
    }

    /// Fetches a chunk and caches it. `None`: look again; somebody else has cached it meanwhile, or
    /// the cell has other content now.
    pub(super) async fn fetch(&self, inode: &Inode, cell: CellIndex, tag: Tag) -> Result<Option<Bytes>, FsError> {
        let turn = inode.fills.lock().entry(cell).or_default().clone();
        let fetched = async {
            let _turn = turn.lock().await;
            if inode.entry.holds(cell, &tag) {
                return Ok(None);
            }
            let bytes = self.chunks.get(tag.id, tag.len).await?;
            if bytes.len() < tag.len as usize {
                let why = format!("{} bytes came, {} were asked for", bytes.len(), tag.len);
                return Err(FsError::ChunkUnavailable { chunk: tag.id, why });
            }
            let bytes = bytes.slice(..tag.len as usize);
            if let Err(error) = inode.entry.fill(cell, tag, &bytes) {
                debug!(ino = %inode.ino, cell, %error, "read goes past the cache");
            }
            Ok(Some(bytes))
        }
        .await;
        {
            let mut fills = inode.fills.lock();
            // Ours and the map's: nobody else waits.
            if Arc::strong_count(&turn) <= 2 {
                fills.remove(&cell);
            }
        }
        match fetched {
            // Named no longer, so perhaps collected by now: the caller looks at the new extent.
            Err(_) if !self.partition.is_cut_off() && self.meta.be_current().await.is_ok() && !self.names(inode.ino, cell, &tag)? => Ok(None),
            fetched => fetched,
        }
    }

    /// Whether the cell's extent is of the chunk of `tag` at this moment.
    fn names(&self, ino: Ino, cell: CellIndex, tag: &Tag) -> Result<bool, FsError> {
        let extent = extent_of(&self.meta.replica().read(), ino, cell)?;
        Ok(extent.as_ref().and_then(tag_of).is_some_and(|now| now.id == tag.id))
    }

    /// Fetches the next cells in the background while a file is read in order.
    fn read_ahead(self: &Arc<Self>, inode: &Arc<Inode>, range: Range<u64>, size: u64) {
        if range.start >= range.end {
            return;
        }
        let grid = inode.entry.cell_size();
        let cells = grid.cell_of(size - 1) + 1;
        if cells == 1 {
            return;
        }
        let ahead = inode.stream.lock().advance(range, |offset| grid.cell_of(offset), cells);
        for cell in ahead {
            // Without a permit the cell is fetched when it is read; nothing queues up.
            let Ok(permit) = self.read_ahead.clone().try_acquire_owned() else { return };
            let Ok(Some(extent)) = extent_of(&self.meta.replica().read(), inode.ino, cell) else { continue };
            let Some(tag) = tag_of(&extent) else { continue };
            if inode.entry.holds(cell, &tag) {
                continue;
            }
            let (shared, inode) = (self.clone(), inode.clone());
            self.runtime.spawn(async move {
                let _permit = permit;
                if let Err(error) = shared.fetch(&inode, cell, tag).await {
                    debug!(ino = %inode.ino, cell, %error, "read-ahead");
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn run(reads: impl IntoIterator<Item = Range<u64>>) -> Vec<CellIndex> {
        let mut stream = Stream::default();
        reads.into_iter().flat_map(|range| stream.advance(range, |offset| offset / MIB, 100)).collect()
    }

    #[test]
    fn a_file_read_in_order_is_fetched_ahead_once_and_to_its_end() {
        let got = run((0..100 * 8).map(|n| n * MIB / 8..(n + 1) * MIB / 8));
        assert_eq!(got, (1..100).collect::<Vec<_>>());
    }

    #[test]
    fn scattered_reads_fetch_nothing_ahead() {
        assert_eq!(run((0..50).map(|n| (n * 37 % 50) * 2 * MIB..(n * 37 % 50) * 2 * MIB + 4096)), []);
    }
}
