//! The bytes of files: reading, writing, flushing.
//!
//! Written bytes go into the inode's cache file as *unflushed* ranges, and everybody on this server
//! sees them at once. A flush cuts them into cells, merges each over the extent that the metadata
//! name at that moment, makes the result durable as a chunk, and has the metadata name it, on the
//! condition that the extent is still the one merged over. If it is not, somebody wrote meanwhile:
//! merge again, over theirs. So two servers that write different bytes of one cell both keep them.
//!
//! Reads look at the extents of the local replica each time; the cache tier tags cached bytes with
//! the content they are, so a stale cell is simply one whose tag is not the extent's.
//!
//! | Lock | Held by | For |
//! | --- | --- | --- |
//! | [`Inode::gate`] | shared: write; alone: truncate, punch, clone | what takes bytes away drops no byte written meanwhile |
//! | [`Inode::flushing`] | one flush, truncate, punch or clone at a time | flushing ranges have one owner; holds the command whose outcome is not known |
//! | [`Inode::local`], the tier entry, [`Shared::ledger`], the replica | short, never across an await, taken in this order | |
//!
//! A read takes no gate: the kernel may hold a page locked for it, and the change that a truncate
//! waits for may in turn wait for that page. [`Local::cut`] tells a read on which side of a truncate
//! it is.
//!
//! A read of resident bytes and a write with room in the tier complete without awaiting anything.
//!
//! Reading order: [`sharing`] (which server may write), [`read`], [`write`], [`flush`], [`doubt`]
//! (commands without an answer), [`resize`] (truncate, allocate), [`room`] (quotas), [`ranges`] (seek, copy),
//! [`background`], [`written`] (fsync by the journal), [`left`] (what an ended life left in it).

mod background;
mod doubt;
mod flush;
mod handover;
mod left;
mod ranges;
mod read;
mod resize;
mod room;
mod sharing;
#[cfg(test)]
mod tests;
mod write;
mod written;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use ctfs_chunk::tier::{CacheTier, Entry, RangeSet, Residency, Tag, TierError, TierUsage};
use ctfs_meta::{Change, MetaError, Namespace, SetAttr, Subject};
use ctfs_types::{Attr, CellIndex, Extent, ExtentData, FileKind, Holder, Ino, Timestamp};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore},
};

pub use handover::Moment;
pub use left::{LeftBytes, Successor};
pub(crate) use sharing::is_over;
pub use sharing::{PageWaits, Pages};

use self::{flush::Told, handover::Handovers};
use crate::{ChunkAccess, FsError, Holders, Metadata, partition::Partition};

/// Numbers that bound what file contents may take.
#[derive(Debug, Clone)]
pub struct ContentSettings {
    /// Where background work runs; `None` means the runtime that calls [`Content::new`].
    pub runtime: Option<Handle>,
    /// Unflushed bytes are flushed in the background when they are older than this.
    pub dirty_age_max: Duration,
    /// Whole cells of an inode with more unflushed bytes than this are flushed at once.
    pub dirty_inode_bytes: u64,
    /// How long another server that holds a file is waited for. Longer than it takes to declare it
    /// ended.
    pub holder_patience: Duration,
    /// An owner that could not be reached is asked again so soon, unless its end is known before.
    pub ask_again: Duration,
    /// How long a file stays shared before a writer takes it again: between two servers that write
    /// in turn it would only go to and fro.
    pub shared_for: Duration,
    /// How long a write waits for room in the cache tier before it fails.
    pub room_patience: Duration,
    /// A chunk put longer ago than this is put again before the metadata name it: half the grace
    /// time after which unreferenced chunks are collected.
    pub put_age_max: Duration,
    /// Chunk transfers at a time: of one flush or one read, and of all read-ahead together.
    pub transfers: usize,
    /// Inodes flushed in the background at a time.
    pub flushes: usize,
}

impl Default for ContentSettings {
    fn default() -> Self {
        Self {
            runtime: None,
            dirty_age_max: Duration::from_secs(5),
            dirty_inode_bytes: 32 << 20,
            holder_patience: Duration::from_secs(20),
            ask_again: Duration::from_millis(300),
            shared_for: Duration::from_secs(10),
            room_patience: Duration::from_secs(30),
            put_age_max: Duration::from_secs(300),
            transfers: 8,
            flushes: 8,
        }
    }
}

/// What the contents stand on.
pub struct Around {
    pub meta: Arc<dyn Metadata>,
    pub chunks: Arc<dyn ChunkAccess>,
    pub holders: Arc<dyn Holders>,
    pub waits: Arc<PageWaits>,
    pub(crate) partition: Arc<Partition>,
}

/// The contents of all regular files, as one server reads and writes them.
///
/// Dropping it ends the background work; what was not flushed is lost then, so [`Self::flush_all`]
/// comes first.
pub struct Content {
    shared: Arc<Shared>,
}

struct Shared {
    meta: Arc<dyn Metadata>,
    chunks: Arc<dyn ChunkAccess>,
    holders: Arc<dyn Holders>,
    waits: Arc<PageWaits>,
    partition: Arc<Partition>,
    tier: CacheTier,
    settings: ContentSettings,
    runtime: Handle,
    inodes: Mutex<HashMap<Ino, Arc<Inode>>>,
    /// Inodes with something to flush.
    pending: Mutex<BTreeMap<Ino, Arc<Inode>>>,
    /// Inodes that are gone; their bytes are dropped by the background task, because whoever tells
    /// us may hold the replica's lock.
    reaped: Mutex<Vec<Ino>>,
    /// Files that this server may still hold although nobody here writes them.
    idle: Mutex<BTreeSet<Ino>>,
    /// Another server is looking around here: what is idle is given up at once.
    wanted: Arc<Notify>,
    /// Told when some file may have changed hands.
    usage_changed: Notify,
    /// Files that were closed and are to be flushed at once, in that order.
    closed_files: Mutex<VecDeque<Ino>>,
    /// Wakes the background task: for all there is, and for those alone.
    kick: Arc<Notify>,
    closed_kick: Arc<Notify>,
    /// Not all flushes that are due could be started.
    more_is_due: AtomicBool,
    /// Told after each flush: there may be room in the tier.
    drained: Notify,
    read_ahead: Arc<Semaphore>,
    background_flushes: Arc<Semaphore>,
    closed: AtomicBool,
    /// The tier's disk is down to its reserve: whatever is unflushed is flushed, to be evicted.
    short_of_disk: AtomicBool,
    /// Room below quotas for what is unflushed.
    ledger: Mutex<room::Ledger>,
    handovers: Handovers,
}

/// One regular file in use.
struct Inode {
    ino: Ino,
    entry: Arc<Entry>,
    gate: tokio::sync::RwLock<()>,
    flushing: tokio::sync::Mutex<doubt::Turn>,
    local: Mutex<Local>,
    stream: Mutex<read::Stream>,
    /// One fetch per cell at a time.
    fills: Mutex<HashMap<CellIndex, Arc<tokio::sync::Mutex<()>>>>,
}

/// What this server knows of a file beyond the metadata.
#[derive(Debug, Default)]
struct Local {
    /// One past the last byte written here, until the metadata know a size at least as large.
    size: Option<u64>,
    /// When it was last written here, until the metadata know.
    mtime: Option<Timestamp>,
    /// Writes that asked to drop setuid and friends, and how many of them were committed.
    drops_wanted: u64,
    drops_committed: u64,
    /// Since when something waits to be flushed.
    since: Option<Instant>,
    /// While a truncate is under way or in doubt: the file's data version before it. Once the metadata
    /// show another, the unflushed bytes past their size are as good as gone.
    cut: Option<u64>,
    /// Counts the changes of `cut`; a read that saw it move starts over.
    cuts: u64,
    opens: u32,
    /// Of those, handles that can write.
    writers: u32,
    /// This server may have given the file up without knowing it: it must be taken anew.
    holding_is_in_doubt: bool,
    /// What a flush failed with, until somebody is told.
    error: Option<FsError>,
    /// Failed background flushes in a row, and when to try again.
    failures: u32,
    retry_at: Option<Instant>,
    /// A background flush is under way.
    in_background: bool,
    /// What was written since it was last written down in the journal. Of it, what was flushed meanwhile
    /// is not missing there.
    unnoted: RangeSet,
    /// The last position of the journal with bytes of the file that the metadata may lack; 0 is none.
    noted_upto: u64,
    /// Closed and not waited for: the background flushes it, at once or some time after it was closed.
    due: bool,
    /// It stands in [`Shared::closed_files`].
    is_queued: bool,
    lingers_since: Option<Instant>,
    /// Whether a command about the file happened is not known; see [`doubt`].
    in_doubt: bool,
}

impl Local {
    fn drop_is_pending(&self) -> bool {
        self.drops_wanted > self.drops_committed
    }

    /// Whether whoever closed the file was not kept waiting.
    fn is_on_its_way(&self) -> bool {
        self.due || self.noted_upto > 0
    }

    fn set_cut(&mut self, cut: Option<u64>) {
        self.cut = cut;
        self.cuts += 1;
    }

    fn attributes_pending(&self) -> bool {
        self.size.is_some() || self.mtime.is_some() || self.drop_is_pending() || self.noted_upto > 0
    }
}

impl Inode {
    /// Joins the writers of the file.
    async fn enter(&self) -> tokio::sync::RwLockReadGuard<'_, ()> {
        match self.gate.try_read() {
            Ok(guard) => guard,
            Err(_) => self.gate.read().await,
        }
    }

    fn has_pending(&self) -> bool {
        let waits = {
            let local = self.local.lock();
            local.attributes_pending() || local.in_doubt
        };
        waits || self.entry.dirty_bytes() > 0
    }
}

impl Content {
    /// # Panics
    /// Outside a tokio runtime, when the settings name none.
    pub fn new(
        Around { meta, chunks, holders, waits, partition }: Around,
        tier: CacheTier,
        settings: ContentSettings,
    ) -> Self {
        let runtime = settings.runtime.clone().unwrap_or_else(Handle::current);
        let (kick, closed_kick) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let shared = Arc::new(Shared {
            meta,
            chunks,
            holders,
            waits,
            partition,
            tier,
            runtime: runtime.clone(),
            inodes: Mutex::default(),
            pending: Mutex::default(),
            reaped: Mutex::default(),
            wanted: Arc::default(),
            idle: Mutex::default(),
            usage_changed: Notify::new(),
            closed_files: Mutex::default(),
            kick: kick.clone(),
            closed_kick: closed_kick.clone(),
            more_is_due: AtomicBool::new(false),
            drained: Notify::new(),
            read_ahead: Arc::new(Semaphore::new(settings.transfers.max(1))),
            background_flushes: Arc::new(Semaphore::new(settings.flushes.max(1))),
            closed: AtomicBool::new(false),
            short_of_disk: AtomicBool::new(false),
            ledger: Mutex::default(),
            handovers: Handovers::new(),
            settings,
        });
        runtime.spawn(background::run(Arc::downgrade(&shared), kick, closed_kick));
        runtime.spawn(background::give_up(Arc::downgrade(&shared)));
        Self { shared }
    }

    /// Reads up to `len` bytes at `offset`; shorter only at the end of the file.
    ///
    /// # Errors
    /// - [`FsError::ChunkLost`], [`FsError::ChunkUnavailable`]: the bytes cannot be had.
    /// - [`FsError::NoQuorum`]: without a lease, and nobody could say what is current.
    pub async fn read(&self, ino: Ino, offset: u64, len: u32, pages: Pages) -> Result<Bytes, FsError> {
        self.shared.read(ino, offset, len, pages).await
    }

    /// Writes `data` at `offset`; it is visible here when this answers, and durable after a flush.
    /// Answers how much of it was written: less than all where room ended, as write(2) has it.
    ///
    /// # Errors
    /// - [`FsError::TooBig`]: over the largest size of a file, or of one in the cache directory.
    /// - [`FsError::CacheFull`]: no room in the tier within [`ContentSettings::room_patience`].
    /// - [`MetaError::QuotaExceeded`]: no room for the first byte below a quota.
    pub async fn write(
        &self,
        ino: Ino,
        offset: u64,
        data: Bytes,
        drop_privileges: bool,
        pages: Pages,
    ) -> Result<u32, FsError> {
        self.shared.write(ino, write::Place::At(offset), data, drop_privileges, pages).await.map(|(_, len)| len)
    }

    /// Writes back pages of a mapping. What is past the end of the file is left out, and counts as
    /// written.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn write_pages(&self, ino: Ino, offset: u64, data: Bytes, drop_privileges: bool) -> Result<u32, FsError> {
        let place = write::Place::Within(offset);
        self.shared.write(ino, place, data, drop_privileges, Pages::Locked).await.map(|(_, len)| len)
    }

    /// Writes `data` at the end of the file, as this server sees it, and answers where that was and
    /// how much was written.
    /// Appends of this server do not overlap each other.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn append(&self, ino: Ino, data: Bytes, drop_privileges: bool, pages: Pages) -> Result<(u64, u32), FsError> {
        self.shared.write(ino, write::Place::End, data, drop_privileges, pages).await
    }

    /// Gets the right to write to `ino`, so that other servers ask before they use it.
    ///
    /// # Errors
    /// [`FsError::NoQuorum`]; [`MetaError::Held`]: another server holds it, and neither answers nor
    /// has ended.
    pub async fn claim(&self, ino: Ino) -> Result<(), FsError> {
        let inode = self.shared.inode(ino)?;
        self.shared.claim(&inode, Pages::Unlocked).await.map(drop)
    }

    /// Returns when no other server holds newer bytes of `ino`.
    ///
    /// # Errors
    /// As [`Self::claim`].
    pub async fn settle(&self, ino: Ino) -> Result<(), FsError> {
        self.shared.settle(ino, Pages::Unlocked).await
    }

    /// Whether nobody need be asked about the file's bytes, as this server knew when it read `attr`, and then had
    /// a lease or had asked.
    ///
    /// # Errors
    /// The store failed.
    pub fn is_settled(&self, attr: &Attr) -> Result<bool, FsError> {
        let (me, ns) = (self.shared.meta.holder(), self.shared.meta.replica().read());
        Ok(sharing::held_elsewhere(&ns, attr, me)?.is_none())
    }

    /// The attributes as the holder sees them.
    ///
    /// # Errors
    /// As [`Self::claim`].
    pub async fn peek(&self, ino: Ino, holder: Holder) -> Result<Attr, FsError> {
        self.shared.peek(ino, holder).await
    }

    /// Another server wants the file: flushes it and gives it up.
    ///
    /// # Errors
    /// What kept it from being flushed or given up; this server holds it on.
    pub async fn give_up(&self, ino: Ino) -> Result<(), FsError> {
        self.shared.give_up(ino).await
    }

    /// Drops what was not flushed, because this life may not write any more; answers which files
    /// lost bytes.
    pub async fn life_ended(&self) -> Vec<Ino> {
        self.shared.life_ended().await
    }

    /// Another server is looking around here: gives up what nobody here uses, so that it need not ask for
    /// each file.
    pub fn give_up_soon(&self) {
        self.shared.wanted.notify_one();
    }

    /// Files with bytes that the metadata lack.
    pub fn pending(&self) -> Vec<Ino> {
        self.shared.pending.lock().keys().copied().collect()
    }

    /// Gives up every file held here that has nothing pending.
    pub async fn give_up_all(&self) {
        self.shared.give_up_all().await;
    }

    /// Makes everything written to `ino` before the call durable and visible to every server.
    ///
    /// # Errors
    /// What kept it from being durable. The bytes stay unflushed, a later flush may succeed; only
    /// what is over a quota is dropped. The error is also kept for [`Self::take_error`].
    pub async fn flush(&self, ino: Ino) -> Result<(), FsError> {
        self.shared.flush(ino).await
    }

    /// Changes attributes of a regular file, its size included. Every change of a file's mode,
    /// times or size comes through here, so that what is pending of earlier writes cannot undo it.
    ///
    /// # Errors
    /// What the metadata say; nothing changed then.
    pub async fn truncate(&self, ino: Ino, set: SetAttr) -> Result<Attr, FsError> {
        self.shared.set_attr(ino, set).await
    }

    /// Has the metadata know that earlier writes, of whichever server, dropped setuid and friends.
    ///
    /// # Errors
    /// As [`Self::claim`].
    pub async fn commit_drops(&self, ino: Ino) -> Result<(), FsError> {
        self.shared.commit_drops(ino).await
    }

    /// fallocate(2). Nothing is reserved: there is no room that only one file could have.
    ///
    /// # Errors
    /// [`FsError::Unsupported`] for modes that move bytes; [`FsError::TooBig`].
    pub async fn allocate(&self, ino: Ino, mode: i32, offset: u64, len: u64) -> Result<(), FsError> {
        self.shared.allocate(ino, mode, offset, len).await
    }

    /// `SEEK_DATA` or `SEEK_HOLE` from `offset`.
    ///
    /// # Errors
    /// [`FsError::PastEnd`] (ENXIO): at or past the end, or no data after `offset`.
    pub async fn seek(&self, ino: Ino, offset: u64, whence: i32) -> Result<u64, FsError> {
        self.shared.seek(ino, offset, whence).await
    }

    /// Copies up to `len` bytes and answers how many; whole cells are shared, not copied, where
    /// both offsets lie alike in their cells. Setuid and setgid bits of the target go.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for overlapping ranges of one file; else as read and write.
    pub async fn copy(&self, source: Ino, from: u64, target: Ino, to: u64, len: u64) -> Result<u64, FsError> {
        self.shared.copy((source, from), (target, to), len).await
    }

    /// To be taken before attributes are read that [`Self::overlay`] gets.
    pub fn moment(&self) -> Moment {
        self.shared.handovers.moment()
    }

    /// Puts what was written here and is not flushed yet over committed attributes, read after `since`. `false`: the
    /// metadata have learnt of something meanwhile that these attributes may lack, so they must be read again.
    #[must_use]
    pub fn overlay(&self, attr: &mut Attr, since: Moment) -> bool {
        if attr.kind == FileKind::File {
            self.shared.overlay(attr);
        }
        !self.shared.handovers.any_since(attr.ino, since)
    }

    /// A handle of `ino` was opened. Each call is matched by one of [`Self::closed`].
    pub fn opened(&self, ino: Ino, writes: bool) {
        // An inode that is gone is of no interest; the open itself says so.
        if let Ok(inode) = self.shared.inode(ino) {
            let mut local = inode.local.lock();
            local.opens += 1;
            local.writers += u32::from(writes);
        }
    }

    pub fn closed(&self, ino: Ino, wrote: bool) {
        let inode = self.shared.inodes.lock().get(&ino).cloned();
        if let Some(inode) = inode {
            let mut local = inode.local.lock();
            local.opens = local.opens.saturating_sub(1);
            local.writers = local.writers.saturating_sub(u32::from(wrote));
            if wrote && local.writers == 0 {
                self.shared.idle.lock().insert(ino);
            }
        }
        self.shared.release(ino);
    }

    /// Drops everything kept for an inode that is gone.
    pub fn forget(&self, ino: Ino) {
        self.shared.forget(ino);
    }

    /// An applied entry changed something. Quick, and takes no lock that is held during I/O.
    pub fn changed(&self, change: &Change) {
        match change {
            Change::Reaped { ino } => {
                self.shared.reaped.lock().push(*ino);
                self.shared.kick.notify_one();
            }
            Change::Usage { .. } => self.shared.usage_changed.notify_waiters(),
            // Changed bytes need nothing: the extents say it to whoever reads.
            _ => {}
        }
    }

    /// Has the background flush a file that is being closed, if nobody has to wait for that: what this
    /// server alone knows of it is asked of this server by everybody. Answers whether it will.
    pub fn flush_soon(&self, ino: Ino) -> bool {
        self.shared.flush_soon(ino)
    }

    /// Whether what is unflushed of a file that nobody has open here any more may stay so for a while: it has no
    /// name, or [`Self::flush_soon`] has put it off.
    pub fn may_wait(&self, ino: Ino) -> bool {
        let inode = self.shared.inodes.lock().get(&ino).cloned();
        let lingers = inode.is_some_and(|inode| {
            let local = inode.local.lock();
            local.due && local.lingers_since.is_some()
        });
        lingers || !self.shared.has_name(ino)
    }

    /// Waits for what [`Self::flush_soon`] and [`Self::write_down`] left to the background.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub async fn flush_if_due(&self, ino: Ino) -> Result<(), FsError> {
        let inode = self.shared.inodes.lock().get(&ino).cloned();
        match inode {
            Some(inode) if inode.local.lock().is_on_its_way() => self.shared.flush(ino).await,
            _ => Ok(()),
        }
    }

    /// Has everything written to `ino` before the call in the journal of this life, if that is how it
    /// becomes durable soonest. `false`: it must be flushed.
    ///
    /// # Errors
    /// What kept the bytes from being read.
    pub async fn write_down(&self, ino: Ino) -> Result<bool, FsError> {
        self.shared.write_down(ino).await
    }

    /// What a flush of `ino` failed with, once.
    pub fn take_error(&self, ino: Ino) -> Option<FsError> {
        let inode = self.shared.inodes.lock().get(&ino).cloned()?;
        let error = inode.local.lock().error.take();
        error
    }

    /// Flushes every file.
    ///
    /// # Errors
    /// The first failure; the other files were tried nevertheless.
    pub async fn flush_all(&self) -> Result<(), FsError> {
        self.shared.flush_all(Told::ToWriters).await
    }

    /// The same, where whoever asks is told alone what was not flushed: it is tried again.
    pub async fn flush_all_quietly(&self) -> Result<(), FsError> {
        self.shared.flush_all(Told::ToAsker).await
    }

    /// Ends the background work. Reads and writes go on; nobody flushes unasked.
    pub fn close(&self) {
        self.shared.closed.store(true, Relaxed);
        self.shared.kick.notify_one();
    }

    /// One round of the background tasks, which otherwise come when they come.
    #[cfg(test)]
    pub(crate) async fn work_in_background(&self) {
        self.shared.flush_what_is_due();
        self.shared.give_up_idle().await;
    }

    /// Unflushed bytes of all files.
    pub fn dirty_bytes(&self) -> u64 {
        self.shared.tier.dirty_bytes()
    }

    pub fn usage(&self) -> TierUsage {
        self.shared.tier.usage()
    }

    /// What this server caches of `ino`, cell by cell.
    pub fn resident(&self, ino: Ino) -> Vec<(CellIndex, Residency)> {
        self.shared.tier.resident(ino)
    }

    /// Drops every cached cell that is not unflushed; answers how many.
    pub fn evict_all(&self) -> u64 {
        self.shared.tier.evict_all()
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// The inode's state here, made at first use.
    fn inode(&self, ino: Ino) -> Result<Arc<Inode>, FsError> {
        if let Some(inode) = self.inodes.lock().get(&ino) {
            return Ok(inode.clone());
        }
        let attr = attr_of(&self.meta.replica().read(), ino)?;
        match attr.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(MetaError::IsDirectory(ino).into()),
            _ => return Err(MetaError::WrongKind(ino).into()),
        }
        let mut inodes = self.inodes.lock();
        let make = || {
            Arc::new(Inode {
                ino,
                entry: self.tier.entry(ino, attr.cell),
                gate: tokio::sync::RwLock::new(()),
                flushing: tokio::sync::Mutex::new(None),
                local: Mutex::default(),
                stream: Mutex::default(),
                fills: Mutex::default(),
            })
        };
        Ok(inodes.entry(ino).or_insert_with(make).clone())
    }

    /// Drops the inode's state if nobody needs it; cached bytes stay in the tier.
    fn release(&self, ino: Ino) {
        let mut inodes = self.inodes.lock();
        let unused = inodes
            .get(&ino)
            .is_some_and(|inode| Arc::strong_count(inode) == 1 && inode.local.lock().opens == 0 && !inode.has_pending());
        if unused {
            inodes.remove(&ino);
            self.ledger.lock().forget(ino);
            drop(inodes);
            self.tier.release(ino);
        }
    }

    fn forget(&self, ino: Ino) {
        self.inodes.lock().remove(&ino);
        self.pending.lock().remove(&ino);
        self.ledger.lock().forget(ino);
        self.tier.forget(ino);
        self.meta.let_go(ino, u64::MAX);
        self.drained.notify_waiters();
    }

    /// The size programs see: what the metadata say, or more if more was written here.
    ///
    /// What was written here is looked at first: it is let go of only after the metadata know.
    fn size(&self, inode: &Inode) -> Result<u64, FsError> {
        let (size, cut) = {
            let local = inode.local.lock();
            (local.size, local.cut)
        };
        let attr = attr_of(&self.meta.replica().read(), inode.ino)?;
        Ok(shown_size(&attr, size, cut))
    }

    /// For the size, times or mode that the metadata have by now, or that nobody is to see.
    fn letting_go<'a>(&self, inode: &'a Inode) -> MutexGuard<'a, Local> {
        let local = inode.local.lock();
        if local.attributes_pending() {
            self.handovers.begin(inode.ino);
        }
        local
    }

    fn overlay(&self, attr: &mut Attr) {
        let inode = self.inodes.lock().get(&attr.ino).cloned();
        let Some(inode) = inode else { return };
        let dirty = inode.entry.dirty_bytes();
        let local = inode.local.lock();
        attr.size = shown_size(attr, local.size, local.cut);
        if let Some(mtime) = local.mtime {
            attr.mtime = mtime;
            attr.ctime = attr.ctime.max(mtime);
        }
        if local.drop_is_pending() {
            let setgid = if attr.mode & 0o010 != 0 { 0o2000 } else { 0 };
            attr.mode &= !(0o4000 | setgid);
        }
        // Unflushed bytes over committed ones take no more room, but nobody has counted them.
        let most = attr.allocated.max(attr.size.next_multiple_of(512));
        attr.allocated = (attr.allocated + dirty).min(most);
    }

    /// Returns when every server shows what the replica showed of the inode before the call.
    async fn await_seen(&self, ino: Ino) -> Result<(), FsError> {
        let unseen = {
            let _lock = self.meta.replica().read();
            self.meta.unseen_change(&Subject::Inode(ino))
        };
        match unseen {
            Some(index) => self.meta.await_visible(index).await,
            None => Ok(()),
        }
    }

    async fn flush_all(&self, told: Told) -> Result<(), FsError> {
        use futures_util::StreamExt;
        let inos: Vec<Ino> = self.pending.lock().keys().copied().collect();
        let flushes = futures_util::stream::iter(inos).map(|ino| self.flush_telling(ino, told));
        let results: Vec<_> = flushes.buffer_unordered(self.settings.flushes.max(1)).collect().await;
        results.into_iter().collect()
    }
}

fn attr_of(ns: &Namespace, ino: Ino) -> Result<Attr, FsError> {
    ns.attr(ino)?.ok_or(FsError::Meta(MetaError::NoSuchInode(ino)))
}

/// The size programs see: with what was written here, unless a truncate has taken that away.
fn shown_size(attr: &Attr, written: Option<u64>, cut: Option<u64>) -> u64 {
    let was_cut = cut.is_some_and(|before| attr.data_version != before);
    if was_cut { attr.size } else { attr.size.max(written.unwrap_or(0)) }
}

fn extent_of(ns: &Namespace, ino: Ino, cell: CellIndex) -> Result<Option<Extent>, FsError> {
    Ok(ns.cells(ino, cell, 1)?.pop().map(|cell| cell.extent))
}

/// The content that an extent names, if it is a chunk's.
fn tag_of(extent: &Extent) -> Option<Tag> {
    match extent.data {
        ExtentData::Chunk { id, len } => Some(Tag { start: extent.start, len, id }),
        ExtentData::Inline(_) => None,
    }
}

fn now() -> Timestamp {
    SystemTime::now().into()
}

fn cache_error(ino: Ino, error: TierError) -> FsError {
    match error {
        TierError::Full => FsError::CacheFull,
        TierError::TooBig => FsError::TooBig,
        TierError::Gone => FsError::Stale(ino),
        TierError::Lost | TierError::Io { .. } => FsError::Cache(error.to_string()),
    }
}
