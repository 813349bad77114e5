//! The cache tier: bytes of files on a local disk, so that a read need not go to a chunk store.
//!
//! Each regular inode that was read or written here has one [`Entry`], and its bytes lie in one
//! sparse file at their natural offsets (in memory while tiny). The entry knows of every cell of
//! the file's grid which content the cached bytes belong to, as a [`Tag`], and which bytes are
//! *unflushed*: written here and named by no extent yet.
//!
//! Two rules carry everything:
//! - A tag names content, not time. A reader compares it with the extent that the metadata hold
//!   *now*; if they differ, the cached bytes are not what was asked for. So nobody has to be told
//!   when a cell becomes stale.
//! - What may be evicted and what is unflushed are different types (see [`entry`]), and eviction
//!   can only be asked of the first.
//!
//! The whole directory may vanish at any start: unflushed bytes were never promised to survive
//! that, and the rest is named by extents. So it is wiped when the tier opens.
//!
//! Reading order: [`ranges`], [`entry`], [`policy`] (who goes first), [`room`] (what the disk still
//! has), [`files`].

mod backing;
pub mod entry;
mod files;
mod policy;
pub mod ranges;
mod room;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use ctfs_types::{CellIndex, CellSize, Ino};
use parking_lot::Mutex;
use rustix::io::Errno;

pub use entry::{Base, Entry, Found, Residency, Tag, View};
pub use ranges::RangeSet;
pub use room::FreeBytes;

use files::Files;
use policy::S3Fifo;
use room::Room;

/// Eviction starts when this share of the limit (percent) is taken...
const HIGH_PERCENT: u64 = 95;
/// ...and aims at this one.
const LOW_PERCENT: u64 = 90;
/// Evicting to the low mark at once could stall one writer for long; each caller evicts at most
/// this many times what it needs, which is still more than comes in.
const EVICT_FACTOR: u64 = 4;

#[derive(Debug, Clone)]
pub struct TierSettings {
    /// Directory of the cache files; its parent must exist. Wiped at start.
    pub dir: PathBuf,
    /// Most bytes the tier may hold, clean and unflushed together.
    pub limit: u64,
    /// Bytes of the file system that the tier leaves free: the log may be on the same disk.
    pub reserve_bytes: u64,
    /// Most bytes of tiny files kept in memory.
    pub memory_bytes_max: u64,
    /// Cache files open at a time.
    pub open_files_max: usize,
    /// Cells remembered at a time; about 200 bytes of memory each.
    pub cells_max: usize,
}

impl TierSettings {
    /// The defaults around a directory and a limit.
    pub fn new(dir: PathBuf, limit: u64) -> Self {
        Self {
            dir,
            limit,
            reserve_bytes: room::RESERVE_BYTES,
            memory_bytes_max: 64 << 20,
            open_files_max: 1024,
            cells_max: 1 << 20,
        }
    }
}

/// Why the tier could not do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TierError {
    /// The limit or the disk is full, and nothing may be evicted.
    #[error("the cache tier is full")]
    Full,
    /// Past the largest file of the file system that the tier is on.
    #[error("past the largest file of the cache's file system")]
    TooBig,
    /// Unflushed bytes are gone: somebody cut or removed the cache file. See [`Entry::take_lost`].
    #[error("unflushed bytes are gone from the cache directory")]
    Lost,
    /// The inode is gone.
    #[error("the inode is gone")]
    Gone,
    #[error("{what}: {errno}")]
    Io { what: &'static str, errno: Errno },
}

/// What the tier holds, and how it did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierUsage {
    /// Bytes it may hold.
    pub limit: u64,
    /// Bytes that equal a committed extent.
    pub clean: u64,
    /// Unflushed bytes.
    pub dirty: u64,
    /// Bytes that the disk has above the reserve, with what may be evicted.
    pub room: u64,
    /// Bytes of tiny files in memory; counted in `clean` and `dirty` too.
    pub memory: u64,
    /// Evictable cells.
    pub cells: u64,
    /// Reads of a cell served from the tier, and fills from a chunk store.
    pub hits: u64,
    pub misses: u64,
    /// Cells evicted.
    pub evictions: u64,
}

/// The cache tier; cheap to clone.
#[derive(Clone)]
pub struct CacheTier {
    owner: Arc<Owner>,
}

/// The last owner to go breaks the circle of entries and core.
struct Owner {
    core: Arc<Core>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.core.entries.lock().clear();
        *self.core.policy.lock() = S3Fifo::new();
    }
}

type Key = (Ino, CellIndex);

/// What entries share.
pub(crate) struct Core {
    settings: TierSettings,
    files: Files,
    room: Room,
    /// Lock order: an entry's state, then `policy`. The other way round only `try_` locks.
    policy: Mutex<S3Fifo<Key, Arc<Entry>>>,
    entries: Mutex<HashMap<Ino, Arc<Entry>>>,
    pinned: Mutex<HashSet<Ino>>,
    clean: AtomicU64,
    dirty: AtomicU64,
    reserved: AtomicU64,
    memory: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    evictions: AtomicU64,
}

/// Room set aside for bytes about to be cached; given back when dropped, after they were counted.
struct Reservation<'a> {
    core: &'a Core,
    bytes: u64,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.core.reserved.fetch_sub(self.bytes, Relaxed);
    }
}

impl CacheTier {
    /// Opens the tier, empty.
    ///
    /// # Errors
    /// The directory cannot be made, is used by another daemon, or cannot be wiped.
    pub fn open(settings: TierSettings) -> io::Result<Self> {
        Self::open_in(settings, Room::default())
    }

    /// [`Self::open`], with the free bytes of the disk as `free` says them.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(settings: TierSettings, free: Box<FreeBytes>) -> io::Result<Self> {
        Self::open_in(settings, Room::said_by(free))
    }

    /// Removes what an earlier life left in `dir`, if it is there and no daemon uses it: on a full
    /// disk this comes before anything that must write.
    ///
    /// # Errors
    /// The directory cannot be read or wiped.
    pub fn wipe(dir: &Path) -> io::Result<()> {
        files::wipe_unused(dir)
    }

    fn open_in(settings: TierSettings, room: Room) -> io::Result<Self> {
        let files = Files::open(&settings.dir, settings.open_files_max)?;
        let core = Core {
            settings,
            files,
            room,
            policy: Mutex::new(S3Fifo::new()),
            entries: Mutex::default(),
            pinned: Mutex::default(),
            clean: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            reserved: AtomicU64::new(0),
            memory: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
        };
        Ok(Self { owner: Arc::new(Owner { core: Arc::new(core) }) })
    }

    fn core(&self) -> &Arc<Core> {
        &self.owner.core
    }

    /// The entry of `ino`, made if there is none. `cell` is the file's grid, which never changes.
    pub fn entry(&self, ino: Ino, cell: CellSize) -> Arc<Entry> {
        let mut entries = self.core().entries.lock();
        entries.entry(ino).or_insert_with(|| Entry::new(ino, cell, self.core().clone())).clone()
    }

    /// The entry of `ino`, if there is one.
    pub fn peek(&self, ino: Ino) -> Option<Arc<Entry>> {
        self.core().entries.lock().get(&ino).cloned()
    }

    /// Drops the entry if nobody holds it and it holds no bytes.
    pub fn release(&self, ino: Ino) {
        self.core().release(ino);
    }

    /// Drops everything of an inode that is gone, unflushed bytes included.
    pub fn forget(&self, ino: Ino) {
        let entry = self.core().entries.lock().remove(&ino);
        if let Some(entry) = entry {
            entry.kill();
        }
        self.core().pinned.lock().remove(&ino);
    }

    /// Keeps the cells of `ino` from eviction.
    pub fn pin(&self, ino: Ino) {
        self.core().pinned.lock().insert(ino);
    }

    pub fn unpin(&self, ino: Ino) {
        self.core().pinned.lock().remove(&ino);
    }

    /// Evicts every clean cell that is not pinned; answers how many went.
    pub fn evict_all(&self) -> u64 {
        let mut evicted = 0;
        while self.core().evict_one().is_some() {
            evicted += 1;
        }
        evicted
    }

    /// What is cached of `ino`, cell by cell.
    pub fn resident(&self, ino: Ino) -> Vec<(CellIndex, Residency)> {
        self.peek(ino).map_or_else(Vec::new, |entry| entry.resident())
    }

    /// Evicts what the disk's reserve asks for. `false`: the disk is short of room all the same,
    /// until something is flushed or somebody else makes room. Blocks on the disk.
    pub fn keep_reserve(&self) -> bool {
        self.core().keep_reserve()
    }

    pub fn dirty_bytes(&self) -> u64 {
        self.core().dirty.load(Relaxed)
    }

    pub fn limit(&self) -> u64 {
        self.core().settings.limit
    }

    pub fn usage(&self) -> TierUsage {
        let core = self.core();
        let (clean, memory) = (core.clean.load(Relaxed), core.memory.load(Relaxed));
        let evictable = clean.saturating_sub(memory);
        TierUsage {
            limit: core.settings.limit,
            clean,
            dirty: core.dirty.load(Relaxed),
            room: core.disk_free().saturating_add(evictable).saturating_sub(core.settings.reserve_bytes),
            memory,
            cells: core.policy.lock().len() as u64,
            hits: core.hits.load(Relaxed),
            misses: core.misses.load(Relaxed),
            evictions: core.evictions.load(Relaxed),
        }
    }
}

impl Core {
    fn used(&self) -> u64 {
        self.clean.load(Relaxed) + self.dirty.load(Relaxed) + self.reserved.load(Relaxed)
    }

    /// Sets `bytes` aside, evicting for them. `None`: nothing more may go and they do not fit.
    /// Those that stay in memory need not fit on the disk.
    ///
    /// Never called with an entry locked: its own cells could not be evicted then.
    fn reserve(&self, bytes: u64, in_memory: bool) -> Option<Reservation<'_>> {
        self.reserved.fetch_add(bytes, Relaxed);
        let reservation = Reservation { core: self, bytes };
        let limit = self.settings.limit;
        let too_many = || self.policy.lock().len() >= self.settings.cells_max;
        if self.used() > limit / 100 * HIGH_PERCENT || too_many() {
            let mut evicted = 0;
            while self.used() > limit
                || too_many()
                || (self.used() > limit / 100 * LOW_PERCENT && evicted < bytes.saturating_mul(EVICT_FACTOR))
            {
                let Some(freed) = self.evict_one() else { break };
                evicted += freed;
            }
        }
        (self.used() <= limit && (in_memory || self.disk_admits(bytes))).then_some(reservation)
    }

    /// Evicts about `bytes`, because the disk is full although the limit is not reached; answers
    /// how many went.
    fn evict(&self, bytes: u64) -> u64 {
        let mut freed = 0;
        while freed < bytes {
            let Some(more) = self.evict_one() else { break };
            freed += more;
        }
        freed
    }

    /// Evicts one cell and answers its bytes; `None` when none may go.
    fn evict_one(&self) -> Option<u64> {
        // A few victims in a row may be in use just now; each goes back to its queue.
        for _ in 0..16 {
            let pinned = self.pinned.lock();
            let victim = self.policy.lock().victim(|(ino, _)| pinned.contains(ino));
            drop(pinned);
            let ((ino, cell), entry) = victim?;
            let freed = entry.evict(cell);
            drop(entry);
            if let Some(freed) = freed {
                self.evictions.fetch_add(1, Relaxed);
                self.release(ino);
                return Some(freed);
            }
        }
        None
    }

    fn release(&self, ino: Ino) {
        let mut entries = self.entries.lock();
        let unused = entries.get(&ino).is_some_and(|entry| Arc::strong_count(entry) == 1 && entry.is_empty());
        if unused && let Some(entry) = entries.remove(&ino) {
            // Still under the lock of the map: a new entry must not meet the old one's file.
            entry.kill();
        }
    }

    fn memory_has_room(&self) -> bool {
        self.memory.load(Relaxed) < self.settings.memory_bytes_max
    }

    fn add_memory(&self, bytes: u64) {
        self.memory.fetch_add(bytes, Relaxed);
    }

    fn sub_memory(&self, bytes: u64) {
        self.memory.fetch_sub(bytes, Relaxed);
    }
}
