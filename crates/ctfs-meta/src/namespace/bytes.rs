//! File bytes: which cells hold what, and how often each chunk is named.

use ctfs_types::{
    CellIndex, ChunkId, Extent, ExtentData, FileKind, FileUse, Ino, Stamp,
    limits::{FILE_BYTES_MAX, INLINE_BYTES_MAX},
};

use super::{Apply, ChunkRecord, Totals, cuts::is_dead, keys, records::Inode, txn::Outcome};
use crate::{CellWrite, Change, MetaError, Noted, Reply};

/// Writers keep content of up to `INLINE_BYTES_MAX` inline; a little more is let through so that
/// the limit can be raised without a new format.
const INLINE_ACCEPTED_MAX: usize = 16 * INLINE_BYTES_MAX;

impl Apply<'_, '_> {
    fn file(&mut self, ino: Ino) -> Outcome<Inode> {
        let inode = self.inode(ino)?;
        if inode.kind == FileKind::File { Ok(inode) } else { Err(MetaError::WrongKind(ino).into()) }
    }

    /// What the cell holds; nothing if that is dead.
    fn extent(&mut self, ino: Ino, cell: CellIndex) -> Outcome<Option<Extent>> {
        let extent: Option<Extent> = self.txn.get(&keys::cell(ino, cell))?;
        match extent {
            Some(extent) if !is_dead(&self.cuts(ino)?, cell, extent.stamp) => Ok(Some(extent)),
            _ => Ok(None),
        }
    }

    pub(super) fn may_have_size(&mut self, ino: Ino, inode: &Inode, size: u64) -> Outcome<()> {
        if inode.kind != FileKind::File {
            return Err(MetaError::WrongKind(ino).into());
        }
        if size > FILE_BYTES_MAX {
            return Err(MetaError::FileTooBig.into());
        }
        Ok(())
    }

    pub(super) fn write(
        &mut self,
        ino: Ino,
        cells: &[CellWrite],
        size_at_least: u64,
        mtime: Option<ctfs_types::Timestamp>,
        drop_privileges: bool,
        appends_at: Option<u64>,
        noted: Option<Noted>,
    ) -> Outcome<Reply> {
        // Decide: every cell, before the first is changed.
        let mut inode = self.file(ino)?;
        self.may_change(ino, &inode)?;
        if let Some(noted) = noted.filter(|_| self.is_left) {
            self.may_note(ino, noted)?;
        }
        if appends_at.is_some_and(|size| size != inode.size) {
            return Err(MetaError::SizeChanged(ino).into());
        }
        self.may_have_size(ino, &inode, size_at_least)?;
        for write in cells {
            let current = self.extent(ino, write.cell)?.map_or(Stamp(0), |extent| extent.stamp);
            if current != write.expect {
                return Err(MetaError::CellChanged { ino, cell: write.cell }.into());
            }
            self.may_hold(ino, &inode, write)?;
        }

        // Change.
        if let Some(noted) = noted {
            self.note(ino, noted)?;
        }
        let before = inode.contribution();
        let stamp = inode.next_stamp();
        inode.size = inode.size.max(size_at_least);
        for write in cells {
            let extent = write.data.clone().map(|data| Extent { start: write.start, data, stamp });
            self.set_cell(ino, &mut inode, write.cell, extent, write.copies)?;
            let (offset, len) = (inode.cell.start_of(write.cell), inode.cell.bytes());
            self.changed(Change::Data { ino, offset, len });
        }
        inode.mtime = mtime.unwrap_or(self.at);
        inode.ctime = self.at;
        if drop_privileges {
            self.drop_privileges(ino, &mut inode);
        }
        self.put_counted(ino, before, &inode)?;
        self.changed(Change::Attr { ino });
        Ok(Reply::Written { attr: inode.attr(ino), stamp })
    }

    fn may_hold(&mut self, ino: Ino, inode: &Inode, write: &CellWrite) -> Outcome<()> {
        let cell_bytes = inode.cell.bytes();
        if write.cell >= FILE_BYTES_MAX / cell_bytes {
            return Err(MetaError::FileTooBig.into());
        }
        if let Some(data) = &write.data {
            let fits = u64::from(write.start) + u64::from(data.len()) <= cell_bytes;
            let inline_fits = !matches!(data, ExtentData::Inline(bytes) if bytes.len() > INLINE_ACCEPTED_MAX);
            if data.is_empty() || !fits || !inline_fits {
                return Err(MetaError::WrongKind(ino).into());
            }
        }
        Ok(())
    }

    /// Replaces one cell, dead or not; counts of chunks and allocated bytes follow. Data past the end of the
    /// file is cut off, because growing the file later must show zeros there.
    fn set_cell(&mut self, ino: Ino, inode: &mut Inode, cell: CellIndex, extent: Option<Extent>, copies: u8) -> Outcome<()> {
        let full = extent.as_ref().map_or(0, |extent| extent.data.len());
        let room = inode.size.saturating_sub(inode.cell.start_of(cell));
        let extent = extent.and_then(|extent| cut(extent, room));
        let old: Option<Extent> = self.txn.get(&keys::cell(ino, cell))?;
        // Up before down, so that a chunk named by both is never condemned in between.
        if let Some(id) = extent.as_ref().and_then(Extent::chunk) {
            self.name_chunk(id, full, copies)?;
        }
        if let Some(id) = old.as_ref().and_then(Extent::chunk) {
            self.unname_chunk(id)?;
        }
        inode.allocated -= old.as_ref().map_or(0, Extent::allocated);
        inode.allocated += extent.as_ref().map_or(0, Extent::allocated);
        match extent {
            Some(extent) => self.txn.put(keys::cell(ino, cell), &extent),
            None => self.txn.delete(keys::cell(ino, cell)),
        }
        Ok(())
    }

    /// Sets the size: cells past it go, the one it cuts is shortened, growing makes a hole.
    pub(super) fn resize(&mut self, ino: Ino, inode: &mut Inode, size: u64) -> Outcome<()> {
        let old_size = inode.size;
        inode.size = size;
        inode.next_stamp();
        if size < old_size {
            let mut first = inode.cell.cell_of(size);
            let room = inode.cell.within(size);
            if room > 0 {
                if let Some(extent) = self.extent(ino, first)?.filter(|extent| u64::from(extent.end()) > room) {
                    self.shorten_cell(ino, inode, first, extent, room)?;
                }
                first += 1;
            }
            self.take_away(ino, inode, first, u64::MAX)?;
            self.changed(Change::Data { ino, offset: size, len: u64::MAX });
        } else if size > old_size {
            self.changed(Change::Data { ino, offset: old_size, len: size - old_size });
        }
        Ok(())
    }

    fn shorten_cell(&mut self, ino: Ino, inode: &mut Inode, cell: CellIndex, extent: Extent, room: u64) -> Outcome<()> {
        inode.allocated -= extent.allocated();
        let chunk = extent.chunk();
        match cut(Extent { stamp: inode.stamp(), ..extent }, room) {
            Some(shorter) => {
                inode.allocated += shorter.allocated();
                self.txn.put(keys::cell(ino, cell), &shorter);
            }
            None => {
                self.txn.delete(keys::cell(ino, cell));
                if let Some(id) = chunk {
                    self.unname_chunk(id)?;
                }
            }
        }
        Ok(())
    }

    /// Cells of a range, dead ones left out.
    fn cells_from(&mut self, ino: Ino, first: CellIndex, cells: u64) -> Outcome<Vec<(CellIndex, Extent)>> {
        let to = keys::cells_end(ino, first.saturating_add(cells));
        let cuts = self.cuts(ino)?;
        let mut found = Vec::new();
        for (key, value) in self.txn.scan(&keys::cell(ino, first), &to, usize::MAX)? {
            let cell = keys::number_at(&key, 9).expect("cell keys end in their index");
            let extent: Extent = super::records::decode(&key, &value)?;
            if !is_dead(&cuts, cell, extent.stamp) {
                found.push((cell, extent));
            }
        }
        Ok(found)
    }

    pub(super) fn punch(&mut self, ino: Ino, first: CellIndex, cells: u64) -> Outcome<Reply> {
        let mut inode = self.file(ino)?;
        self.may_change(ino, &inode)?;
        let before = inode.contribution();
        inode.next_stamp();
        self.take_away(ino, &mut inode, first, first.saturating_add(cells))?;
        (inode.mtime, inode.ctime) = (self.at, self.at);
        self.put_counted(ino, before, &inode)?;
        let len = cells.saturating_mul(inode.cell.bytes());
        self.changed(Change::Data { ino, offset: inode.cell.bytes().saturating_mul(first), len });
        self.changed(Change::Attr { ino });
        Ok(Reply::Attr(inode.attr(ino)))
    }

    pub(super) fn clone_cells(
        &mut self,
        source: Ino,
        first: CellIndex,
        ino: Ino,
        to: CellIndex,
        cells: u64,
        size_at_least: u64,
    ) -> Outcome<Reply> {
        let from = self.file(source)?;
        let mut inode = self.file(ino)?;
        self.may_change(source, &from)?;
        self.may_change(ino, &inode)?;
        self.may_have_size(ino, &inode, size_at_least)?;
        let most = FILE_BYTES_MAX / inode.cell.bytes();
        let in_range = |start: u64| start.checked_add(cells).is_some_and(|end| end <= most);
        if !in_range(first) || !in_range(to) {
            return Err(MetaError::FileTooBig.into());
        }
        if from.cell != inode.cell {
            return Err(MetaError::WrongKind(ino).into());
        }
        // A last cell of which only a part is copied: bytes that the target has behind that part,
        // perhaps since the proposer looked, must not go with the cell.
        let end = inode.cell.start_of(to + cells);
        if (end.saturating_sub(inode.cell.bytes()) + 1..end).contains(&size_at_least) && inode.size > size_at_least {
            return Err(MetaError::CellChanged { ino, cell: to + cells - 1 }.into());
        }

        let before = inode.contribution();
        let stamp = inode.next_stamp();
        inode.size = inode.size.max(size_at_least);
        // All sources are read before the first target is written: the ranges may overlap.
        let sources = self.cells_from(source, first, cells)?;
        let targets = self.cells_from(ino, to, cells)?;
        // Named once more before anything is unnamed, for the same reason.
        for id in sources.iter().filter_map(|(_, extent)| extent.chunk()) {
            let copies = self.copies_of(&id)?;
            self.name_chunk(id, 0, copies)?;
        }
        for (cell, _) in targets {
            self.set_cell(ino, &mut inode, cell, None, 0)?;
        }
        for (cell, extent) in sources {
            let chunk = extent.chunk();
            let copies = match &chunk {
                Some(id) => self.copies_of(id)?,
                None => 0,
            };
            let extent = Extent { stamp, ..extent };
            self.set_cell(ino, &mut inode, to + (cell - first), Some(extent), copies)?;
            if let Some(id) = chunk {
                self.unname_chunk(id)?;
            }
        }
        (inode.mtime, inode.ctime) = (self.at, self.at);
        self.put_counted(ino, before, &inode)?;
        let (offset, len) = (inode.cell.start_of(to), cells.saturating_mul(inode.cell.bytes()));
        self.changed(Change::Data { ino, offset, len });
        self.changed(Change::Attr { ino });
        Ok(Reply::Written { attr: inode.attr(ino), stamp })
    }

    pub(super) fn reap(&mut self, inos: &[Ino]) -> Outcome<Reply> {
        for &ino in inos {
            if self.txn.get::<()>(&keys::orphan(ino))?.is_none() {
                continue;
            }
            // The inode goes at once. Its number never comes back, so nobody asks for cells that
            // are left.
            let mut inode = self.inode(ino)?;
            inode.next_stamp();
            self.take_away(ino, &mut inode, 0, u64::MAX)?;
            if inode.is_dir() {
                // Nothing is below it; should anything still be counted there, the record goes anyway.
                let counted = self.txn.totals(ino)?;
                self.txn.add(keys::totals(ino), Totals::default().minus(counted));
            }
            let (from, to) = keys::under(keys::XATTR, &[ino.0]);
            for (key, _) in self.txn.scan(&from, &to, usize::MAX)? {
                self.txn.delete(key);
            }
            if let Some(Inode { usage: FileUse::Owned { holder, .. }, dir, .. }) = self.txn.get(&keys::inode(ino))? {
                self.txn.delete(keys::owned(holder, ino));
                self.counters.delegated -= u64::from(dir.is_some());
            }
            self.drop_locks(ino)?;
            for key in [keys::policy(ino), keys::orphan(ino), keys::inode(ino)] {
                if self.txn.get_raw(&key)?.is_some() {
                    self.txn.delete(key);
                }
            }
            self.changed(Change::Reaped { ino });
        }
        Ok(Reply::Done)
    }

    /// One more cell names the chunk, whose full length is `len` when it is new.
    fn name_chunk(&mut self, id: ChunkId, len: u32, copies: u8) -> Outcome<()> {
        let key = keys::chunk(&id);
        let old: Option<ChunkRecord> = self.txn.get(&key)?;
        let mut record = old.unwrap_or_else(|| {
            self.counters.chunks += 1;
            ChunkRecord { references: 0, copies, len, condemned: None }
        });
        if let Some(at) = record.condemned.take() {
            self.txn.delete(keys::condemned(at, &id));
            record.copies = copies;
        }
        record.references += 1;
        record.copies = more_copies(record.copies, copies);
        record.len = record.len.max(len);
        self.txn.put(key, &record);
        if old.is_none_or(|old| old.references == 0 || old.copies != record.copies) {
            self.changed(Change::ChunkWanted { chunk: id });
        }
        Ok(())
    }

    fn copies_of(&mut self, id: &ChunkId) -> Outcome<u8> {
        let record: Option<ChunkRecord> = self.txn.get(&keys::chunk(id))?;
        Ok(record.map_or(0, |record| record.copies))
    }

    pub(super) fn unname_chunk(&mut self, id: ChunkId) -> Outcome<()> {
        let key = keys::chunk(&id);
        let mut record: ChunkRecord = self.txn.get(&key)?.expect("a chunk named by a cell has a record");
        record.references -= 1;
        if record.references == 0 {
            record.condemned = Some(self.at);
            self.txn.put(keys::condemned(self.at, &id), &());
        }
        self.txn.put(key, &record);
        Ok(())
    }

    pub(super) fn forget_chunks(&mut self, chunks: &[ChunkId]) -> Outcome<Reply> {
        for id in chunks {
            let record: Option<ChunkRecord> = self.txn.get(&keys::chunk(id))?;
            if let Some(ChunkRecord { references: 0, condemned, .. }) = record {
                if let Some(at) = condemned {
                    self.txn.delete(keys::condemned(at, id));
                }
                self.txn.delete(keys::chunk(id));
                self.counters.chunks -= 1;
                self.changed(Change::ChunkForgotten { chunk: *id });
            }
        }
        Ok(Reply::Done)
    }
}

/// The larger wish; automatic (0) stands for three.
fn more_copies(a: u8, b: u8) -> u8 {
    let weight = |copies: u8| if copies == 0 { 3 } else { copies };
    if weight(b) > weight(a) { b } else { a }
}

/// The extent without what lies past `room` bytes of its cell.
fn cut(extent: Extent, room: u64) -> Option<Extent> {
    let left = room.saturating_sub(u64::from(extent.start)).min(u64::from(extent.data.len())) as u32;
    if left == 0 {
        return None;
    }
    let data = match extent.data {
        ExtentData::Inline(mut bytes) => {
            bytes.truncate(left as usize);
            ExtentData::Inline(bytes)
        }
        ExtentData::Chunk { id, .. } => ExtentData::Chunk { id, len: left },
    };
    Some(Extent { data, ..extent })
}
