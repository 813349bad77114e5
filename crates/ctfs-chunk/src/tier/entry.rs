//! The cached bytes of one inode.
//!
//! A cell that holds bytes here is in one of two states, and they are different types:
//! [`Slot::Clean`] equals a committed extent and may be evicted at any moment;
//! [`Slot::Unflushed`] holds bytes that exist nowhere else, and no eviction can be asked of it.
//!
//! Unflushed bytes are a set of ranges: `dirty` ones wait for a flush, `flushing` ones are being
//! flushed. Both are read in front of whatever extent the metadata name. Bytes of the cell that
//! are in neither set mean something only through the tag: they are the tagged content.
//!
//! The cache directory is not ours alone: somebody may remove or cut a file in it. Clean bytes are
//! forgotten then and fetched again; unflushed ones are `lost`, and reading them is an error until
//! their loss was told ([`Entry::take_lost`]) or they were written again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Range,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use ctfs_types::{CellIndex, CellSize, ChunkId, Ino};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use rustix::io::Errno;
use tracing::{error, warn};

use super::{Core, RangeSet, TierError, backing::Backing, policy::Hits};

/// Which content a cell's cached bytes are: the first `len` bytes of a chunk, from `start` in the
/// cell; the cell's other bytes are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    pub start: u32,
    pub len: u32,
    pub id: ChunkId,
}

impl Tag {
    /// Whether bytes with this tag contain those of `wanted`: an extent cut by a truncate is the
    /// beginning of what it was.
    pub fn covers(&self, wanted: &Tag) -> bool {
        self.id == wanted.id && self.start == wanted.start && self.len >= wanted.len
    }

    /// Offsets inside the cell.
    pub fn range(&self) -> Range<u64> {
        u64::from(self.start)..u64::from(self.start) + u64::from(self.len)
    }
}

/// What lies under the unflushed bytes of a cell: the cell's extent at this moment.
#[derive(Debug, Clone, Copy)]
pub enum Base<'a> {
    Hole,
    /// Bytes at hand, from `start` in the cell: inline content, or a chunk just fetched.
    Bytes { start: u32, bytes: &'a [u8] },
    /// A chunk, which must be resident.
    Chunk(Tag),
}

/// What [`View::read`] could do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    All,
    /// The base is a chunk that is not resident and is needed.
    Missing,
}

/// What a cell holds here, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    Clean { bytes: u64 },
    Unflushed { dirty: u64, clean: u64 },
}

#[derive(Debug)]
enum Slot {
    Clean(Clean),
    /// `base` tags the bytes between the unflushed ones, where they are known.
    Unflushed { base: Option<Tag> },
}

/// A cell that may be evicted.
#[derive(Debug)]
struct Clean {
    tag: Tag,
    hits: Hits,
}

impl Slot {
    fn tag(&self) -> Option<Tag> {
        match self {
            Self::Clean(clean) => Some(clean.tag),
            Self::Unflushed { base } => *base,
        }
    }
}

/// The cached and unflushed bytes of one inode. See the module.
pub struct Entry {
    ino: Ino,
    cell: CellSize,
    core: Arc<Core>,
    /// For the eviction queues.
    itself: Weak<Entry>,
    state: RwLock<State>,
    /// Cells whose bytes could not be read, and whether there are any: looked at before the next
    /// use.
    unreadable: Mutex<BTreeSet<CellIndex>>,
    doubtful: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    backing: Backing,
    slots: BTreeMap<CellIndex, Slot>,
    dirty: RangeSet,
    flushing: RangeSet,
    /// Unflushed bytes that are gone, and nobody was told yet.
    lost: RangeSet,
    dead: bool,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("ino", &self.ino).field("cell", &self.cell).finish_non_exhaustive()
    }
}

impl Entry {
    pub(super) fn new(ino: Ino, cell: CellSize, core: Arc<Core>) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            ino,
            cell,
            core,
            itself: itself.clone(),
            state: RwLock::default(),
            unreadable: Mutex::default(),
            doubtful: AtomicBool::new(false),
        })
    }

    pub fn ino(&self) -> Ino {
        self.ino
    }

    pub fn cell_size(&self) -> CellSize {
        self.cell
    }

    /// Locks the entry for reading. Short-lived: it holds up writers and eviction.
    ///
    /// A reader takes this first and looks at the metadata inside: a flush lets go of its bytes
    /// (see [`Self::settle`]) only after the metadata name them, so each written byte is found in
    /// the one place or the other.
    pub fn view(&self) -> View<'_> {
        self.resolve_doubts();
        View { entry: self, state: self.state.read() }
    }

    /// Writes bytes at `offset` and remembers them as dirty.
    ///
    /// # Errors
    /// [`TierError::Full`] when they do not fit and nothing may be evicted for them;
    /// [`TierError::TooBig`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), TierError> {
        if data.is_empty() {
            return Ok(());
        }
        let len = data.len() as u64;
        let in_memory = self.state.read().backing.stays_in_memory(&self.core, offset.saturating_add(len));
        let _room = self.core.reserve(len, in_memory).ok_or(TierError::Full)?;
        match self.try_write(offset, data) {
            Err(TierError::Full) => {
                self.core.evict(len.saturating_mul(super::EVICT_FACTOR));
                self.try_write(offset, data)
            }
            other => other,
        }
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<(), TierError> {
        let range = offset..offset + data.len() as u64;
        let mut state = self.state.write();
        if state.dead {
            return Err(TierError::Gone);
        }
        self.examine(&mut state);
        let State { backing, .. } = &mut *state;
        let written = backing.write(&self.core, self.ino, offset, data);
        for cell in self.cells_of(range.clone()) {
            match written {
                Ok(()) => self.unflush(&mut state, cell),
                // A write that failed may have left some of its bytes in the file.
                Err(_) => self.spoil(&mut state, cell),
            }
        }
        if let Err(errno) = written {
            self.tidy(&mut state);
            return Err(io_error("write cache file", errno));
        }
        state.lost.remove(range.clone());
        let added = state.dirty.insert(range);
        self.core.dirty.fetch_add(added, Relaxed);
        Ok(())
    }

    /// Puts the content `bytes` of `tag` into the cell, around its unflushed bytes.
    ///
    /// # Errors
    /// [`TierError::Full`]: there is no room; the caller goes on without caching.
    pub fn fill(&self, cell: CellIndex, tag: Tag, bytes: &[u8]) -> Result<(), TierError> {
        self.core.misses.fetch_add(1, Relaxed);
        if bytes.len() < tag.len as usize || tag.range().end > self.cell.bytes() {
            return Err(TierError::Io { what: "fill a cell with fewer bytes than its extent", errno: Errno::INVAL });
        }
        let end = self.cell.start_of(cell) + tag.range().end;
        let in_memory = self.state.read().backing.stays_in_memory(&self.core, end);
        let _room = self.core.reserve(u64::from(tag.len), in_memory).ok_or(TierError::Full)?;
        let mut state = self.state.write();
        if state.dead {
            return Err(TierError::Gone);
        }
        self.examine(&mut state);
        if state.slots.get(&cell).and_then(Slot::tag).is_some_and(|have| have.covers(&tag)) {
            return Ok(());
        }
        let start = self.cell.start_of(cell);
        let data = start + tag.range().start..start + tag.range().end;
        let gaps = state.gaps(data.clone());
        for gap in gaps {
            let part = &bytes[(gap.start - data.start) as usize..(gap.end - data.start) as usize];
            if let Err(errno) = state.backing.write(&self.core, self.ino, gap.start, part) {
                self.spoil(&mut state, cell);
                self.tidy(&mut state);
                return Err(io_error("write cache file", errno));
            }
        }
        self.set_tag(&mut state, cell, Some(tag));
        Ok(())
    }

    /// Whether the content of `tag` can be read from here.
    pub fn holds(&self, cell: CellIndex, tag: &Tag) -> bool {
        self.resolve_doubts();
        self.state.read().slots.get(&cell).and_then(Slot::tag).is_some_and(|have| have.covers(tag))
    }

    /// Moves the cell's dirty bytes to `flushing`.
    pub fn begin_flush(&self, cell: CellIndex) {
        let mut state = self.state.write();
        let moved: Vec<_> = state.dirty.inside(self.range_of(cell)).collect();
        for range in moved {
            let removed = state.dirty.remove(range.clone());
            let added = state.flushing.insert(range);
            self.core.dirty.fetch_add(added, Relaxed);
            self.core.dirty.fetch_sub(removed, Relaxed);
        }
    }

    /// Makes every flushing byte dirty again, after a flush that failed or was given up.
    pub fn abandon_flush(&self) {
        let mut state = self.state.write();
        let flushing = std::mem::take(&mut state.flushing);
        let added: u64 = flushing.iter().map(|range| state.dirty.insert(range)).sum();
        self.core.dirty.fetch_add(added, Relaxed);
        self.core.dirty.fetch_sub(flushing.len(), Relaxed);
    }

    /// Ends the flush of one cell: the metadata now name its flushing bytes.
    ///
    /// `committed` is the new extent and its bytes (`None`: a hole or inline), `base` the content
    /// that was merged under the flushed bytes. What the cache lacks of the new content is
    /// written, so that the cell stays resident; where that fails it is merely not resident.
    pub fn settle(&self, cell: CellIndex, committed: Option<(Tag, &[u8])>, base: Option<Tag>) {
        // Whether there is room for the parts that are not here yet.
        let room = committed.and_then(|(tag, _)| self.core.reserve(u64::from(tag.len), false));
        let mut state = self.state.write();
        if state.dead {
            return;
        }
        let start = self.cell.start_of(cell);
        let flushed: Vec<_> = state.flushing.inside(self.range_of(cell)).collect();
        let removed = state.flushing.remove(self.range_of(cell));
        self.core.dirty.fetch_sub(removed, Relaxed);
        let mut known: RangeSet = flushed.into_iter().collect();
        // What was flushed is safe; of the rest some may be gone.
        if let Some(left) = state.backing.cut(&self.core, self.ino) {
            self.forget_from(&mut state, left);
            known.remove(left..u64::MAX);
        }
        let had = state.slots.get(&cell).and_then(Slot::tag);
        if let (Some(had), Some(base)) = (had, base)
            && had.covers(&base)
        {
            known.insert(start + base.range().start..start + base.range().end);
        }
        for range in state.dirty.inside(self.range_of(cell)) {
            known.insert(range);
        }
        let mut tag = None;
        if let (Some((new, bytes)), true) = (committed, room.is_some()) {
            // Tiny files over the memory's share are not kept: the next reader fetches them.
            let keep = !state.backing.in_memory() || self.core.memory_has_room();
            let data = start + new.range().start..start + new.range().end;
            let written = known.gaps(data.clone()).into_iter().try_for_each(|gap| {
                let part = &bytes[(gap.start - data.start) as usize..(gap.end - data.start) as usize];
                state.backing.write(&self.core, self.ino, gap.start, part)
            });
            tag = (keep && written.is_ok()).then_some(new);
        }
        self.set_tag(&mut state, cell, tag);
        if tag.is_none() && !state.slots.is_empty() {
            // The file stays; the bytes that mean nothing any more give their room back.
            for gap in state.gaps(self.range_of(cell)) {
                let punched = state.backing.punch(&self.core, self.ino, gap);
                self.warn_punch(punched);
            }
        }
        self.tidy(&mut state);
    }

    /// The unflushed bytes that are gone since the last call, because somebody removed or cut the
    /// cache file: how many. From here on the file reads without them.
    pub fn take_lost(&self) -> u64 {
        let mut state = self.state.write();
        self.examine(&mut state);
        std::mem::take(&mut state.lost).len()
    }

    /// Forgets unflushed and cached bytes in `range`, because the metadata no longer have them.
    pub fn discard(&self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let mut state = self.state.write();
        self.examine(&mut state);
        state.lost.remove(range.clone());
        let touched: Vec<CellIndex> = state
            .slots
            .range(self.cell.cell_of(range.start)..=self.cell.cell_of(range.end.saturating_sub(1)))
            .map(|(&cell, _)| cell)
            .collect();
        for cell in touched {
            let whole = self.range_of(cell);
            let part = range.start.max(whole.start)..range.end.min(whole.end);
            let dropped = state.dirty.remove(part.clone()) + state.flushing.remove(part.clone());
            self.core.dirty.fetch_sub(dropped, Relaxed);
            let kept = state.slots.get(&cell).and_then(Slot::tag).and_then(|tag| {
                // Only a beginning can be kept, and only if no unflushed byte lay over it.
                let keep = part.start.saturating_sub(whole.start + u64::from(tag.start));
                let cut = Tag { len: tag.len.min(u32::try_from(keep).unwrap_or(u32::MAX)), ..tag };
                (dropped == 0 && cut.len > 0 && part.end >= whole.start + tag.range().end.min(self.cell.bytes()))
                    .then_some(cut)
            });
            self.set_tag(&mut state, cell, kept);
        }
        let punched = state.backing.punch(&self.core, self.ino, range);
        self.warn_punch(punched);
        self.tidy(&mut state);
    }

    /// Forgets the tags of clean cells that touch `range`; a hint that they are stale.
    pub fn drop_clean(&self, range: Range<u64>) {
        for cell in self.cells_of(range) {
            self.evict(cell);
        }
    }

    /// Unflushed bytes, counted twice where rewritten while being flushed.
    pub fn dirty_bytes(&self) -> u64 {
        let state = self.state.read();
        state.dirty.len() + state.flushing.len()
    }

    /// Cells with dirty bytes, in order. With `whole_only`, those dirty from end to end.
    pub fn dirty_cells(&self, whole_only: bool) -> Vec<CellIndex> {
        let state = self.state.read();
        let mut cells = BTreeSet::new();
        for range in state.dirty.iter() {
            let (first, last) = (self.cell.cell_of(range.start), self.cell.cell_of(range.end - 1));
            cells.extend((first..=last).filter(|&cell| !whole_only || state.dirty.covers(self.range_of(cell))));
        }
        cells.into_iter().collect()
    }

    pub fn resident(&self) -> Vec<(CellIndex, Residency)> {
        let state = self.state.read();
        let of = |(&cell, slot): (&CellIndex, &Slot)| {
            let residency = match slot {
                Slot::Clean(clean) => Residency::Clean { bytes: clean.tag.len.into() },
                Slot::Unflushed { base } => Residency::Unflushed {
                    dirty: state.unflushed(self.range_of(cell)).len(),
                    clean: base.map_or(0, |tag| tag.len.into()),
                },
            };
            (cell, residency)
        };
        state.slots.iter().map(of).collect()
    }

    /// Whether nothing is cached or unflushed.
    pub(super) fn is_empty(&self) -> bool {
        let state = self.state.read();
        state.slots.is_empty() && state.lost.is_empty()
    }

    /// Evicts one cell if it is clean; answers the bytes that went.
    pub(super) fn evict(&self, cell: CellIndex) -> Option<u64> {
        let mut state = self.state.write();
        match state.slots.get(&cell) {
            Some(Slot::Clean(clean)) => {
                let bytes = clean.tag.len.into();
                self.set_tag(&mut state, cell, None);
                let punched = state.backing.punch(&self.core, self.ino, self.range_of(cell));
                self.warn_punch(punched);
                self.tidy(&mut state);
                Some(bytes)
            }
            _ => None,
        }
    }

    /// Ends the entry: the inode is gone, or nothing is left.
    pub(super) fn kill(&self) {
        let mut state = self.state.write();
        state.dead = true;
        let cells: Vec<_> = state.slots.keys().copied().collect();
        let dropped = state.dirty.len() + state.flushing.len();
        (state.dirty, state.flushing, state.lost) = (RangeSet::new(), RangeSet::new(), RangeSet::new());
        self.core.dirty.fetch_sub(dropped, Relaxed);
        for cell in cells {
            self.set_tag(&mut state, cell, None);
        }
        let State { backing, .. } = &mut *state;
        if let Err(errno) = backing.clear(&self.core, self.ino) {
            warn!(ino = %self.ino, %errno, "cache file not removed");
        }
    }

    fn range_of(&self, cell: CellIndex) -> Range<u64> {
        let start = self.cell.start_of(cell);
        start..start + self.cell.bytes()
    }

    fn cells_of(&self, range: Range<u64>) -> Range<CellIndex> {
        if range.start >= range.end {
            return 0..0;
        }
        self.cell.cell_of(range.start)..self.cell.cell_of(range.end - 1) + 1
    }

    /// Notes that the cell's bytes could not be read.
    fn doubt(&self, cell: CellIndex) {
        self.unreadable.lock().insert(cell);
        self.doubtful.store(true, Relaxed);
    }

    fn resolve_doubts(&self) {
        if self.doubtful.load(Relaxed) {
            self.examine(&mut self.state.write());
        }
    }

    /// Forgets what the cache file no longer has, and the clean bytes that could not be read.
    fn examine(&self, state: &mut State) {
        if let Some(left) = state.backing.cut(&self.core, self.ino) {
            self.forget_from(state, left);
        }
        if self.doubtful.swap(false, Relaxed) {
            for cell in std::mem::take(&mut *self.unreadable.lock()) {
                self.spoil(state, cell);
            }
            self.tidy(state);
        }
    }

    /// The cache file has only its first `left` bytes.
    fn forget_from(&self, state: &mut State, left: u64) {
        let State { dirty, flushing, lost, backing, slots, .. } = &mut *state;
        let mut unflushed = 0;
        for set in [dirty, flushing] {
            set.inside(left..u64::MAX).for_each(|range| {
                lost.insert(range);
            });
            unflushed += set.remove(left..u64::MAX);
        }
        self.core.dirty.fetch_sub(unflushed, Relaxed);
        backing.shorten(left);
        let cells: Vec<CellIndex> = slots.range(self.cell.cell_of(left)..).map(|(&cell, _)| cell).collect();
        if unflushed > 0 {
            error!(ino = %self.ino, left, bytes = unflushed, "a cache file was cut or removed: unflushed bytes are lost");
        } else {
            warn!(ino = %self.ino, left, "a cache file was cut or removed");
        }
        for cell in cells {
            let whole = |tag: &Tag| self.cell.start_of(cell) + tag.range().end <= left;
            let tag = state.slots.get(&cell).and_then(Slot::tag).filter(whole);
            self.set_tag(state, cell, tag);
        }
        self.tidy(state);
        if left == 0 && let Err(errno) = state.backing.clear(&self.core, self.ino) {
            warn!(ino = %self.ino, %errno, "cache file not removed");
        }
    }

    /// A cell is about to hold dirty bytes: it leaves the reach of eviction.
    fn unflush(&self, state: &mut State, cell: CellIndex) {
        let base = match state.slots.get(&cell) {
            Some(Slot::Unflushed { .. }) => return,
            Some(Slot::Clean(clean)) => {
                self.core.policy.lock().remove(&(self.ino, cell));
                Some(clean.tag)
            }
            None => None,
        };
        state.slots.insert(cell, Slot::Unflushed { base });
    }

    /// The cell's bytes outside the unflushed ranges are unknown from here on.
    fn spoil(&self, state: &mut State, cell: CellIndex) {
        if state.slots.contains_key(&cell) {
            self.set_tag(state, cell, None);
        }
    }

    /// Gives the cell a tag, and the state that its unflushed bytes ask for.
    fn set_tag(&self, state: &mut State, cell: CellIndex, tag: Option<Tag>) {
        let old = state.slots.remove(&cell);
        let had = old.as_ref().and_then(Slot::tag).map_or(0, |tag| u64::from(tag.len));
        self.core.clean.fetch_add(tag.map_or(0, |tag| u64::from(tag.len)), Relaxed);
        self.core.clean.fetch_sub(had, Relaxed);
        if state.is_unflushed(self.range_of(cell)) {
            if matches!(old, Some(Slot::Clean(_))) {
                self.core.policy.lock().remove(&(self.ino, cell));
            }
            state.slots.insert(cell, Slot::Unflushed { base: tag });
            return;
        }
        let Some(tag) = tag else {
            self.core.policy.lock().remove(&(self.ino, cell));
            return;
        };
        let hits = match old {
            Some(Slot::Clean(clean)) => clean.hits,
            _ => Hits::default(),
        };
        let itself = self.itself.upgrade().expect("an entry in use is held by somebody");
        self.core.policy.lock().insert((self.ino, cell), tag.len.into(), hits.clone(), itself);
        state.slots.insert(cell, Slot::Clean(Clean { tag, hits }));
    }

    /// Removes the file once nothing in it means anything.
    fn tidy(&self, state: &mut State) {
        if state.slots.is_empty() {
            let State { backing, .. } = &mut *state;
            if let Err(errno) = backing.clear(&self.core, self.ino) {
                warn!(ino = %self.ino, %errno, "cache file not removed");
            }
        }
    }

    fn warn_punch(&self, punched: Result<(), Errno>) {
        if let Err(errno) = punched {
            // The bytes are forgotten all the same; only their disk space comes back later.
            warn!(ino = %self.ino, %errno, "cannot punch a hole into a cache file");
        }
    }
}

impl State {
    fn is_unflushed(&self, range: Range<u64>) -> bool {
        self.dirty.overlaps(range.clone()) || self.flushing.overlaps(range)
    }

    /// Dirty and flushing parts of `range`, joined.
    fn unflushed(&self, range: Range<u64>) -> RangeSet {
        let mut all = RangeSet::new();
        for part in self.dirty.inside(range.clone()).chain(self.flushing.inside(range)) {
            all.insert(part);
        }
        all
    }

    /// Parts of `range` that are not unflushed.
    fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.unflushed(range.clone()).gaps(range)
    }
}

/// A consistent look at an entry. See [`Entry::view`].
pub struct View<'a> {
    entry: &'a Entry,
    state: RwLockReadGuard<'a, State>,
}

impl View<'_> {
    /// Reads `within` (offsets inside the cell) into `out`, of the same length: unflushed bytes
    /// over those of `base`.
    ///
    /// # Errors
    /// [`TierError::Io`] when unflushed bytes cannot be read, [`TierError::Lost`] when they are gone.
    /// A clean cell that cannot be read is [`Found::Missing`].
    pub fn read(
        &self,
        cell: CellIndex,
        within: Range<u64>,
        base: Base<'_>,
        out: &mut [u8],
    ) -> Result<Found, TierError> {
        debug_assert_eq!(within.end - within.start, out.len() as u64);
        let (entry, state) = (self.entry, &*self.state);
        let (core, ino) = (&entry.core, entry.ino);
        let start = entry.cell.start_of(cell);
        let asked = start + within.start..start + within.end;
        let at = |offset: u64| (offset - asked.start) as usize;
        if state.lost.overlaps(asked.clone()) {
            return Err(TierError::Lost);
        }
        match base {
            Base::Hole => out.fill(0),
            Base::Bytes { start: from, bytes } => {
                out.fill(0);
                let from = start + u64::from(from);
                let part = asked.start.max(from)..asked.end.min(from + bytes.len() as u64);
                if part.start < part.end {
                    let source = &bytes[(part.start - from) as usize..(part.end - from) as usize];
                    out[at(part.start)..at(part.end)].copy_from_slice(source);
                }
            }
            Base::Chunk(tag) => {
                let data = start + tag.range().start..start + tag.range().end;
                let part = asked.start.max(data.start)..asked.end.min(data.end);
                let resident = state.slots.get(&cell).filter(|slot| slot.tag().is_some_and(|have| have.covers(&tag)));
                if part.start >= part.end {
                    out.fill(0);
                } else if let Some(slot) = resident {
                    out[..at(part.start)].fill(0);
                    out[at(part.end)..].fill(0);
                    // One call for clean and unflushed bytes alike: they lie side by side.
                    if let Err(errno) = state.backing.read(core, ino, part.start, &mut out[at(part.start)..at(part.end)]) {
                        warn!(%ino, cell, %errno, "cannot read cached bytes, fetching them again");
                        entry.doubt(cell);
                        return Ok(Found::Missing);
                    }
                    core.hits.fetch_add(1, Relaxed);
                    if let Slot::Clean(clean) = slot {
                        clean.hits.bump();
                    }
                    if part == asked {
                        return Ok(Found::All);
                    }
                } else if state.unflushed(part.clone()).covers(part) {
                    out.fill(0);
                } else {
                    return Ok(Found::Missing);
                }
            }
        }
        for part in state.unflushed(asked.clone()).iter() {
            let read = state.backing.read(core, ino, part.start, &mut out[at(part.start)..at(part.end)]);
            read.map_err(|errno| {
                entry.doubt(cell);
                io_error("read unflushed bytes", errno)
            })?;
        }
        Ok(Found::All)
    }

    /// End of the cell's flushing bytes, as an offset inside the cell; `None` if it has none.
    pub fn flushing_end(&self, cell: CellIndex) -> Option<u64> {
        let range = self.entry.range_of(cell);
        let start = range.start;
        self.state.flushing.inside(range).last().map(|part| part.end - start)
    }

    /// The first unflushed bytes at or after `from`.
    pub fn next_unflushed(&self, from: u64) -> Option<Range<u64>> {
        match (self.state.dirty.next(from), self.state.flushing.next(from)) {
            (Some(a), Some(b)) => Some(if a.start <= b.start { a } else { b }),
            (a, b) => a.or(b),
        }
    }

    pub fn is_unflushed(&self, range: Range<u64>) -> bool {
        self.state.is_unflushed(range)
    }

    /// The unflushed parts of a range.
    pub fn unflushed_in(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.state.unflushed(range).iter().collect()
    }

    /// One past the last unflushed byte.
    pub fn unflushed_end(&self) -> Option<u64> {
        self.state.dirty.end().max(self.state.flushing.end())
    }
}

pub(super) fn io_error(what: &'static str, errno: Errno) -> TierError {
    match errno {
        Errno::NOSPC | Errno::DQUOT => TierError::Full,
        Errno::FBIG => TierError::TooBig,
        errno => TierError::Io { what, errno },
    }
}
