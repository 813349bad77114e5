//! The chunk store of one server: packed append-only segments on its own disk.
//!
//! Chunks are never a file each: a segment of 64 MiB holds as many as fit, so small files stay
//! fast and no open happens on the read path. [`ChunkStore::put`] returns when its chunk is
//! durable; one thread appends for everyone and one `fdatasync` serves all who wait for it.
//! [`ChunkStore::get`] returns bytes that match their BLAKE3 name, or nothing.
//!
//! Nothing is written in place. A deleted chunk gets a tombstone; a segment of which too little
//! is still wanted has the rest copied out and is removed ([`ChunkStore::compact`]). The index is
//! in memory and rebuilt at start from one small file per segment, or from the segment itself.
//!
//! Reading order: [`frame`] (the bytes), [`files`] (the files and start-up), [`state`] (the index
//! and what segments are worth), [`writer`] (the thread that changes things), [`care`]
//! (compaction and scrub).
//!
//! Pins keep a chunk from being deleted for a while after someone put it or asked for it, since
//! they may be about to commit metadata that names it. Pins are in memory: after a start
//! everything counts as pinned for as long as a pin lasts.

mod care;
mod files;
mod frame;
#[cfg(test)]
mod golden;
mod state;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    io,
    ops::Bound,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ctfs_types::{ChunkId, limits::CHUNK_BYTES_MAX};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::warn;

pub use self::care::{Compacted, Scrubbed};
pub(crate) use self::files::Disk;
use self::{
    files::{Files, RealDisk},
    frame::Frame,
    state::{Location, State},
    writer::{Job, Writer},
};

#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// Bytes of segment files after which puts are refused.
    pub capacity: u64,
    /// Size at which a segment is full, 4 KiB to 1 GiB. 64 MiB: a scan of the last one at start
    /// takes a fraction of a second, and compaction moves at most 40 MB in one step.
    pub segment_bytes: u64,
    /// How long a chunk stays after it was put or asked for. 10 min: a writer that is slower to
    /// commit puts again.
    pub pin_for: Duration,
    /// Bytes of the file system that puts leave free: tombstones and compaction must still work
    /// on a full disk, and so must the metadata next to it.
    pub reserve_bytes: u64,
}

impl StoreSettings {
    /// The defaults, for a store that takes at most `capacity` bytes of disk.
    pub fn with_capacity(capacity: u64) -> Self {
        Self { capacity, segment_bytes: 64 << 20, pin_for: Duration::from_secs(600), reserve_bytes: 256 << 20 }
    }
}

/// A clock that never goes back. Pins are measured with it.
pub trait Clock: Send + Sync + 'static {
    /// Time since some moment before the store was opened.
    fn now(&self) -> Duration;
}

/// The real one. It stands still while the machine sleeps: pins then last longer, never shorter.
pub struct MonotonicClock(Instant);

impl Default for MonotonicClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Why the store could not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("chunk store is full: {needed} bytes needed, {free} free")]
    Full { needed: u64, free: u64 },
    /// What was acknowledged stays readable; nothing is accepted until the store is opened again.
    #[error("chunk store accepts nothing more: {0}")]
    Failed(String),
    #[error("{what}: {why}")]
    Io { what: String, why: String },
    #[error("a chunk of {len} bytes is over the limit of {CHUNK_BYTES_MAX}")]
    TooLong { len: usize },
    #[error("another program has this chunk store open")]
    Locked,
    #[error("segment {segment} is of version {version}, which this program does not read")]
    Version { segment: u32, version: u32 },
}

impl StoreError {
    fn io(what: &str, error: &io::Error) -> Self {
        Self::Io { what: what.to_owned(), why: error.to_string() }
    }
}

/// What became of a request to delete a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deleted {
    /// Gone, durably.
    Deleted,
    /// It was not here.
    Absent,
    /// Put or asked for a short time ago, or the store was opened a short time ago.
    Pinned,
}

/// Space, in bytes unless said otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// What the held chunks take, compressed and with their frames.
    pub live: u64,
    /// What the segment files take.
    pub stored: u64,
    pub chunks: u64,
    pub segments: u64,
    pub capacity: u64,
    /// What puts may still take: the rest of the capacity or of the disk, whichever is less.
    pub free: u64,
}

/// What happened to the store since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreCounts {
    pub puts: u64,
    /// Puts of a chunk that was held already.
    pub puts_known: u64,
    pub put_bytes: u64,
    pub reads: u64,
    pub read_bytes: u64,
    pub deletes: u64,
    /// Calls of fdatasync: fewer than puts when commits are grouped.
    pub syncs: u64,
    /// Copies found to be unreadable or wrong, by reads, scrub or at start.
    pub damaged: u64,
}

#[derive(Debug, Default)]
struct Counters {
    puts: AtomicU64,
    puts_known: AtomicU64,
    put_bytes: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    deletes: AtomicU64,
    syncs: AtomicU64,
    damaged: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Jobs waiting for the writer. When there are more, or more than [`QUEUE_BYTES`], puts wait.
const QUEUE_JOBS: usize = 256;
/// Bytes of chunks waiting for the writer, the bound on what a slow disk costs in memory.
const QUEUE_BYTES: usize = 64 << 20;
/// Damaged chunks waiting for repair. When there are more, they are found again by scrub or when
/// the chunk records are walked, since [`ChunkStore::has`] says no for them.
const DAMAGED_QUEUE: usize = 1024;
/// Below this, hashing and compressing is cheaper than handing it to another thread.
const INLINE_WORK_BYTES: usize = 32 << 10;

/// The chunk store of this server. Dropping it waits for the writer to finish what was queued.
pub struct ChunkStore {
    shared: Arc<Shared>,
    /// `None` only while dropping.
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    queue_bytes: Arc<Semaphore>,
    damaged: Mutex<Option<mpsc::Receiver<ChunkId>>>,
    /// One compaction at a time.
    compacting: tokio::sync::Mutex<()>,
}

struct Shared {
    settings: StoreSettings,
    files: Files,
    disk: Arc<dyn Disk>,
    clock: Arc<dyn Clock>,
    opened_at: Duration,
    state: Mutex<State>,
    /// Why nothing more is accepted.
    failed: OnceLock<String>,
    counters: Counters,
    damaged: mpsc::Sender<ChunkId>,
}

impl ChunkStore {
    /// Opens the store in `dir`, making it if it is not there. Reads the index of every segment,
    /// and scans the last one: blocking, a fraction of a second per TiB.
    ///
    /// # Errors
    /// [`StoreError::Locked`], [`StoreError::Version`], or [`StoreError::Io`]. Damage is no
    /// error: what is whole is served, and the rest is reported through [`ChunkStore::damaged`].
    pub fn open(dir: &Path, settings: StoreSettings) -> Result<Self, StoreError> {
        Self::open_with(dir, settings, Arc::new(MonotonicClock::default()))
    }

    /// [`ChunkStore::open`] with a clock of the caller's.
    pub fn open_with(dir: &Path, settings: StoreSettings, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        Self::open_on(dir, settings, clock, Arc::new(RealDisk))
    }

    pub(crate) fn open_on(
        dir: &Path,
        mut settings: StoreSettings,
        clock: Arc<dyn Clock>,
        disk: Arc<dyn Disk>,
    ) -> Result<Self, StoreError> {
        settings.segment_bytes = settings.segment_bytes.clamp(4 << 10, 1 << 30);
        let files = Files::lock(dir)?;
        let opened = files::open(&files, &*disk, settings.segment_bytes)?;

        let (damaged, receiver) = mpsc::channel(DAMAGED_QUEUE);
        for id in opened.damaged {
            let _ = damaged.try_send(id); // full: found again later, see DAMAGED_QUEUE
        }
        let shared = Arc::new(Shared {
            opened_at: clock.now(),
            settings,
            files,
            disk,
            clock,
            state: Mutex::new(opened.state),
            failed: OnceLock::new(),
            counters: Counters { damaged: opened.damages.into(), ..Counters::default() },
            damaged,
        });
        let (jobs, queue) = mpsc::channel(QUEUE_JOBS);
        let writer = Writer::new(shared.clone(), opened.active, opened.next_number)?;
        let writer = std::thread::Builder::new()
            .name("ctfs-store".to_owned())
            .spawn(move || writer.run(queue))
            .map_err(|e| StoreError::io("start store thread", &e))?;
        Ok(Self {
            shared,
            jobs: Some(jobs),
            writer: Some(writer),
            queue_bytes: Arc::new(Semaphore::new(QUEUE_BYTES >> 10)),
            damaged: Mutex::new(Some(receiver)),
            compacting: tokio::sync::Mutex::default(),
        })
    }

    /// Stores a chunk and pins it. Durable when it returns `Ok`.
    ///
    /// `id` must be the BLAKE3 hash of `bytes`: the caller computed or checked it, and bytes
    /// stored under a wrong name are never returned. A chunk that is held already costs nothing.
    ///
    /// # Errors
    /// - [`StoreError::Full`]: nothing was changed.
    /// - [`StoreError::Failed`]: the disk failed once; the chunk may or may not be there later.
    /// - [`StoreError::TooLong`]
    pub async fn put(&self, id: ChunkId, bytes: Bytes) -> Result<(), StoreError> {
        if bytes.len() > CHUNK_BYTES_MAX {
            return Err(StoreError::TooLong { len: bytes.len() });
        }
        self.shared.check_failed()?;
        if self.shared.pin_if_held(&id) {
            count(&self.shared.counters.puts_known, 1);
            return Ok(());
        }
        let len = bytes.len();
        let room = (len >> 10) as u32 + 1;
        let room = self.queue_bytes.clone().acquire_many_owned(room).await.map_err(|_| closed())?;
        let frame = if len < INLINE_WORK_BYTES {
            Frame::data(id, &bytes)
        } else {
            tokio::task::spawn_blocking(move || Frame::data(id, &bytes)).await.map_err(|_| closed())?
        };
        self.ask(|done| Job::Put { frame, done, _room: room }).await
    }

    /// The chunk's bytes, checked against its name. Blocks on the disk.
    ///
    /// `None` when it is not here, or when the copy is damaged: then it is counted, reported
    /// through [`ChunkStore::damaged`], and written anew by the next put.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the disk would not read it; reported like damage.
    pub fn get(&self, id: &ChunkId) -> Result<Option<Bytes>, StoreError> {
        let Some((location, frame)) = self.shared.read(id)? else { return Ok(None) };
        match frame.verified() {
            Some(bytes) => {
                count(&self.shared.counters.reads, 1);
                count(&self.shared.counters.read_bytes, bytes.len() as u64);
                Ok(Some(bytes))
            }
            None => {
                self.shared.doubt(id, &location);
                Ok(None)
            }
        }
    }

    /// Which of these chunks are held, and pins those: whoever asks may be about to rely on it.
    pub fn has(&self, ids: &[ChunkId]) -> Vec<bool> {
        ids.iter().map(|id| self.shared.pin_if_held(id)).collect()
    }

    /// Whether the chunk is held, without pinning it.
    pub fn holds(&self, id: &ChunkId) -> bool {
        self.shared.state.lock().index.get(id).is_some_and(|location| !location.doubtful)
    }

    /// Whether there is a copy whose last read failed; it may be readable again later.
    pub fn is_doubtful(&self, id: &ChunkId) -> bool {
        self.shared.state.lock().index.get(id).is_some_and(|location| location.doubtful)
    }

    /// Deletes a chunk unless it is pinned. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::Failed`], or [`StoreError::Full`] when not even a tombstone fits.
    pub async fn delete(&self, id: &ChunkId) -> Result<Deleted, StoreError> {
        self.shared.check_failed()?;
        let id = *id;
        self.ask(|done| Job::Delete { id, done }).await
    }

    /// Up to `limit` ids above `after`, ascending: one page of all that is held.
    pub fn ids_after(&self, after: Option<ChunkId>, limit: usize) -> Vec<ChunkId> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let state = self.shared.state.lock();
        let held = state.index.range((from, Bound::Unbounded)).filter(|(_, location)| !location.doubtful);
        held.map(|(id, _)| *id).take(limit).collect()
    }

    /// All ids held, 32 bytes each. A large store is better walked by [`ChunkStore::ids_after`].
    pub fn ids(&self) -> Vec<ChunkId> {
        self.ids_after(None, usize::MAX)
    }

    pub fn usage(&self) -> Usage {
        let (live, stored, chunks, segments) = {
            let state = self.shared.state.lock();
            (state.live_bytes(), state.stored_bytes(), state.index.len() as u64, state.segments.len() as u64)
        };
        let capacity = self.shared.settings.capacity;
        Usage { live, stored, chunks, segments, capacity, free: self.shared.room(stored) }
    }

    pub fn counts(&self) -> StoreCounts {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StoreCounts {
            puts: read(&counters.puts),
            puts_known: read(&counters.puts_known),
            put_bytes: read(&counters.put_bytes),
            reads: read(&counters.reads),
            read_bytes: read(&counters.read_bytes),
            deletes: read(&counters.deletes),
            syncs: read(&counters.syncs),
            damaged: read(&counters.damaged),
        }
    }

    /// Why the store accepts nothing more, if so.
    pub fn failure(&self) -> Option<String> {
        self.shared.failed.get().cloned()
    }

    /// The chunks whose copy here was found damaged, for repair. Given out once.
    pub fn damaged(&self) -> Option<mpsc::Receiver<ChunkId>> {
        self.damaged.lock().take()
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Job) -> Result<T, StoreError> {
        let (done, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or_else(closed)?;
        jobs.send(job(done)).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

impl Drop for ChunkStore {
    fn drop(&mut self) {
        self.jobs = None; // the writer ends when the queue is empty and closed
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            warn!("store thread panicked");
        }
    }
}

/// The writer thread is gone: it panicked, or the runtime is shutting down.
fn closed() -> StoreError {
    StoreError::Failed("the store is closed".to_owned())
}

impl Shared {
    fn check_failed(&self) -> Result<(), StoreError> {
        self.failed.get().map_or(Ok(()), |why| Err(StoreError::Failed(why.clone())))
    }

    /// Seconds since the store was opened.
    fn age(&self) -> u32 {
        let age = self.clock.now().saturating_sub(self.opened_at).as_secs();
        u32::try_from(age).unwrap_or(u32::MAX)
    }

    /// The moment, in seconds of [`Shared::age`], until which a pin set now lasts.
    fn pin_end(&self) -> u32 {
        self.age().saturating_add(self.settings.pin_for.as_secs() as u32).saturating_add(1)
    }

    fn is_pinned(&self, location: &Location) -> bool {
        let age = self.age();
        u64::from(age) < self.settings.pin_for.as_secs() || age < location.pinned_until
    }

    fn pin_if_held(&self, id: &ChunkId) -> bool {
        let until = self.pin_end();
        match self.state.lock().index.get_mut(id) {
            Some(location) if !location.doubtful => {
                location.pinned_until = until;
                true
            }
            _ => false,
        }
    }

    /// Bytes that puts may still take when the segments take `stored`.
    fn room(&self, stored: u64) -> u64 {
        let free = match self.disk.free(self.files.dir()) {
            Ok(free) => free.saturating_sub(self.settings.reserve_bytes),
            // Unknown is not full: the write itself will say.
            Err(_) => u64::MAX,
        };
        self.settings.capacity.saturating_sub(stored).min(free)
    }

    /// The frame of a chunk, its checksum verified; `None` when it is not here or damaged.
    fn read(&self, id: &ChunkId) -> Result<Option<(Location, Frame)>, StoreError> {
        // Compaction may move a chunk between the look into the index and the open of the file.
        for _ in 0..8 {
            let (location, salt) = {
                let state = self.state.lock();
                let Some(location) = state.index.get(id).copied() else { return Ok(None) };
                (location, state.segments.get(&location.segment).map_or(0, |segment| segment.salt))
            };
            match self.read_at(id, &location, salt) {
                Ok(Some(frame)) => return Ok(Some((location, frame))),
                Ok(None) => {
                    self.doubt(id, &location);
                    return Ok(None);
                }
                Err(_) if !self.still_at(id, &location) => {}
                Err(error) => {
                    self.doubt(id, &location);
                    return Err(StoreError::io("read chunk", &error));
                }
            }
        }
        Err(StoreError::Io { what: "read chunk".to_owned(), why: "it kept moving".to_owned() })
    }

    fn read_at(&self, id: &ChunkId, location: &Location, salt: u64) -> io::Result<Option<Frame>> {
        let file = self.files.handle(location.segment)?;
        let mut bytes = vec![0; location.frame_len() as usize];
        match self.disk.read(&file, &mut bytes, u64::from(location.offset)) {
            Ok(()) => Ok(Frame::read(bytes, salt, u64::from(location.offset), id)),
            // The file is shorter than it was: the chunk is gone, which is damage.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn still_at(&self, id: &ChunkId, location: &Location) -> bool {
        self.state.lock().index.get(id).is_some_and(|now| now.at(location.segment, location.offset))
    }

    /// Marks a copy as bad, once, and reports it for repair.
    fn doubt(&self, id: &ChunkId, location: &Location) {
        let newly = match self.state.lock().index.get_mut(id) {
            Some(now) if now.at(location.segment, location.offset) && !now.doubtful => {
                now.doubtful = true;
                true
            }
            _ => false,
        };
        if newly {
            warn!(chunk = %id, segment = location.segment, offset = location.offset, "copy of a chunk is damaged");
            count(&self.counters.damaged, 1);
            let _ = self.damaged.try_send(*id); // full: found again later, see DAMAGED_QUEUE
        }
    }
}
