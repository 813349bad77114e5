//! Operations that take bytes away or change the size: truncate, punch, zero, allocate.

use std::{ops::Range, sync::Arc};

use ctfs_meta::{MetaError, Op, Reply, SetAttr};
use ctfs_types::{Attr, Ino, limits::FILE_BYTES_MAX};
use tokio::time::Instant;

use super::{Inode, Pages, Shared, attr_of, doubt::Turn, extent_of, flush::Cut, sharing::WriteMode, write::Place};
use crate::FsError;

const CAPABILITY: &[u8] = b"security.capability";

/// Marks a truncate as under way, until it is done or given up, or else until its outcome is known.
struct CutMark<'a>(&'a Inode);

impl<'a> CutMark<'a> {
    fn set(shared: &Shared, inode: &'a Inode) -> Result<Self, FsError> {
        let version = attr_of(&shared.meta.replica().read(), inode.ino)?.data_version;
        inode.local.lock().set_cut(Some(version));
        Ok(Self(inode))
    }
}

impl Drop for CutMark<'_> {
    fn drop(&mut self) {
        let mut local = self.0.local.lock();
        if !local.in_doubt {
            local.set_cut(None);
        }
    }
}

impl Shared {
    pub(super) async fn set_attr(&self, ino: Ino, set: SetAttr) -> Result<Attr, FsError> {
        if set.size.is_some_and(|size| size > FILE_BYTES_MAX) {
            return Err(FsError::TooBig);
        }
        let deadline = Instant::now() + self.settings.holder_patience;
        loop {
            self.settle(ino, Pages::Unlocked).await?;
            match self.set_attr_settled(ino, set.clone()).await {
                Err(FsError::Meta(MetaError::Held { .. })) if Instant::now() < deadline => {}
                decided => return decided,
            }
        }
    }

    async fn set_attr_settled(&self, ino: Ino, set: SetAttr) -> Result<Attr, FsError> {
        let inode = self.inode(ino)?;
        // Only a new size takes bytes away.
        let gate = match set.size {
            Some(_) => Some(inode.gate.write().await),
            None => None,
        };
        let mut turn = inode.flushing.lock().await;
        self.end_doubt(&inode, &mut turn).await?;
        // Earlier writes that drop setuid come before a chmod that sets it.
        if set.mode.is_some() {
            self.commit_drops_in_turn(&inode, &mut turn).await?;
        }
        let (size, times) = (set.size, set.mtime.is_some());
        // What the journal says of a file comes after its commands when it is sent: nothing of it may undo this.
        if size.is_some() || times || set.mode.is_some() || set.uid.is_some() || set.gid.is_some() {
            self.flush_written_down(&inode, &mut turn).await?;
        }
        let cut = size.map(|_| CutMark::set(self, &inode)).transpose()?;
        // The metadata first: if they refuse, every unflushed byte is still there.
        let mut attr = match self.propose_in_turn(&inode, &mut turn, Op::SetAttr { ino, set }).await? {
            Reply::Attr(attr) | Reply::Entry { attr, .. } | Reply::Written { attr, .. } => attr,
            other => return Err(FsError::Store(format!("a change of attributes was answered as {other:?}"))),
        };
        if let Some(size) = size {
            inode.entry.abandon_flush();
            inode.entry.discard(size..u64::MAX);
        }
        {
            let mut local = self.letting_go(&inode);
            if size.is_some() {
                // Unflushed bytes that are left lie below the size that the metadata have now.
                local.size = None;
            }
            if size.is_some() || times {
                local.mtime = None;
            }
        }
        drop(cut);
        // Nothing is flushed before the turn ends.
        self.overlay(&mut attr);
        drop(turn);
        drop(gate);
        Ok(attr)
    }

    /// Has the metadata drop what earlier writes took away: setuid, setgid, `security.capability`.
    pub(super) async fn commit_drops(&self, ino: Ino) -> Result<(), FsError> {
        let deadline = Instant::now() + self.settings.holder_patience;
        loop {
            self.settle(ino, Pages::Unlocked).await?;
            let inode = self.inode(ino)?;
            let mut turn = inode.flushing.lock().await;
            self.flush_written_down(&inode, &mut turn).await?;
            match self.commit_drops_in_turn(&inode, &mut turn).await {
                Err(FsError::Meta(MetaError::Held { .. })) if Instant::now() < deadline => {}
                decided => return decided,
            }
        }
    }

    async fn commit_drops_in_turn(&self, inode: &Arc<Inode>, turn: &mut Turn) -> Result<(), FsError> {
        let (wanted, mtime) = {
            let local = inode.local.lock();
            if !local.drop_is_pending() {
                return Ok(());
            }
            (local.drops_wanted, local.mtime)
        };
        let mtime = Some(self.mtime_to_commit(inode.ino, mtime)?);
        let op = Op::Write { ino: inode.ino, cells: vec![], size_at_least: 0, mtime, drop_privileges: true, appends_at: None, noted: None };
        self.propose_in_turn(inode, turn, op).await?;
        let mut local = self.letting_go(inode);
        local.drops_committed = local.drops_committed.max(wanted);
        Ok(())
    }

    pub(super) async fn allocate(&self, ino: Ino, mode: i32, offset: u64, len: u64) -> Result<(), FsError> {
        let end = offset.checked_add(len).filter(|&end| end <= FILE_BYTES_MAX).ok_or(FsError::TooBig)?;
        if len == 0 {
            return Err(FsError::Invalid("fallocate of no bytes"));
        }
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let zero = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => false,
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => true,
            libc::FALLOC_FL_ZERO_RANGE => true,
            _ => return Err(FsError::Unsupported("this mode of fallocate")),
        };
        let inode = self.inode(ino)?;
        let deadline = Instant::now() + self.settings.holder_patience;
        loop {
            self.meta.be_current().await?;
            let gate = inode.gate.write().await;
            let Some(mode) = self.write_mode(&inode)? else {
                drop(gate);
                self.claim(&inode, Pages::Unlocked).await?;
                continue;
            };
            self.know_the_size(&inode).await?;
            let allocated = self.allocate_claimed(&inode, keep_size, zero, offset..end).await;
            let allocated = match mode {
                WriteMode::Buffer => allocated,
                WriteMode::Through => self.end_through(&inode, allocated, offset..end).await,
            };
            match allocated {
                // Another server took the file on the way: once more.
                Err(FsError::Meta(MetaError::Held { .. })) if Instant::now() < deadline => {}
                decided => return decided,
            }
        }
    }

    /// Flushes what an operation wrote into a range of a shared file, or takes it back: other servers
    /// write there, and nothing that failed may be merged over theirs later. The caller holds the gate
    /// alone.
    async fn end_through(&self, inode: &Arc<Inode>, done: Result<(), FsError>, range: Range<u64>) -> Result<(), FsError> {
        let mut turn = inode.flushing.lock().await;
        let flushed = match done {
            Ok(()) => self.flush_locked(inode, &mut turn, Cut::Everything).await,
            failed => failed,
        };
        if flushed.is_err() {
            self.unwrite(inode, range);
        }
        flushed
    }

    /// The caller holds the gate alone.
    async fn allocate_claimed(
        &self,
        inode: &Arc<Inode>,
        keep_size: bool,
        zero: bool,
        Range { start: offset, end }: Range<u64>,
    ) -> Result<(), FsError> {
        let ino = inode.ino;
        if !zero {
            self.may_allocate(ino, end - offset)?;
        }
        if zero {
            let size = self.size(inode)?;
            if offset < size {
                self.zero(inode, offset..end.min(size)).await?;
            }
        }
        self.touch(inode, &mut inode.local.lock(), false);
        if !keep_size && end > self.size(inode)? {
            // Not SetAttr: a size that somebody else made larger meanwhile stays.
            let op = Op::Write { ino, cells: vec![], size_at_least: end, mtime: None, drop_privileges: false, appends_at: None, noted: None };
            let mut turn = inode.flushing.lock().await;
            self.propose_in_turn(&inode, &mut turn, op).await?;
        }
        Ok(())
    }

    /// Makes a range zero, as holes where it covers whole cells. The caller holds the gate alone.
    ///
    /// Also at the end of the file a part of a cell is written over, not punched: another server
    /// may be appending to that cell, and a merge keeps what it appends. Zeros become a hole anyway.
    async fn zero(&self, inode: &Arc<Inode>, range: Range<u64>) -> Result<(), FsError> {
        let (ino, grid) = (inode.ino, inode.entry.cell_size());
        let first = range.start.div_ceil(grid.bytes());
        let last = grid.cell_of(range.end);
        if first >= last {
            return self.zero_edge(inode, range).await;
        }
        {
            let mut turn = inode.flushing.lock().await;
            self.flush_written_down(inode, &mut turn).await?;
            self.propose_in_turn(inode, &mut turn, Op::Punch { ino, first, cells: last - first }).await?;
            inode.entry.abandon_flush();
            inode.entry.discard(grid.start_of(first)..grid.start_of(last));
        }
        self.zero_edge(inode, range.start..grid.start_of(first)).await?;
        self.zero_edge(inode, grid.start_of(last)..range.end).await
    }

    /// Writes zeros over the data in a range, which lies in few cells.
    async fn zero_edge(&self, inode: &Arc<Inode>, range: Range<u64>) -> Result<(), FsError> {
        let grid = inode.entry.cell_size();
        let mut at = range.start;
        while at < range.end {
            let cell = grid.cell_of(at);
            let start = grid.start_of(cell);
            let part = at..range.end.min(start + grid.bytes());
            let has_data = {
                let view = inode.entry.view();
                let extent = extent_of(&self.meta.replica().read(), inode.ino, cell)?;
                view.is_unflushed(part.clone())
                    || extent.is_some_and(|extent| {
                        start + u64::from(extent.start) < part.end && part.start < start + u64::from(extent.end())
                    })
            };
            if has_data {
                let zeros = vec![0; (part.end - part.start) as usize];
                self.write_piece(inode, Place::At(part.start), &zeros, false).await?;
            }
            at = part.end;
        }
        Ok(())
    }

    /// Shares whole cells of another file. Both were flushed; the caller has checked the grids.
    ///
    /// # Errors
    /// [`ctfs_meta::MetaError::CellChanged`] when `size_at_least` ends inside the last cell and the
    /// target has grown beyond it meanwhile; nothing was changed.
    pub(super) async fn clone_cells(
        &self,
        source: Ino,
        first: u64,
        target: &Arc<Inode>,
        to: u64,
        cells: u64,
        size_at_least: u64,
    ) -> Result<(), FsError> {
        let grid = target.entry.cell_size();
        let _gate = target.gate.write().await;
        let mut turn = target.flushing.lock().await;
        // Nothing may be unflushed over the new cells.
        self.flush_locked(target, &mut turn, Cut::Everything).await?;
        let op = Op::CloneCells { source, first, ino: target.ino, to, cells, size_at_least };
        self.propose_in_turn(target, &mut turn, op).await?;
        target.entry.drop_clean(grid.start_of(to)..grid.start_of(to + cells));
        self.drop_privileges(target, &mut turn).await
    }

    /// Takes setuid, setgid and `security.capability` from a file whose bytes changed in the metadata.
    async fn drop_privileges(&self, inode: &Arc<Inode>, turn: &mut Turn) -> Result<(), FsError> {
        {
            let ns = self.meta.replica().read();
            if attr_of(&ns, inode.ino)?.mode & 0o6000 == 0 && ns.xattr(inode.ino, CAPABILITY)?.is_none() {
                return Ok(());
            }
        }
        {
            let mut local = inode.local.lock();
            local.drops_wanted += 1;
            self.has_something_pending(inode, &mut local);
        }
        self.commit_drops_in_turn(inode, turn).await
    }
}
