//! The journal of the running life: who appends, who waits, and the thread that writes.
//!
//! Appending writes the record where nothing is in the way, which `kill -9` does not undo. Where something is
//! (a sync, another who writes, the next segment), it stays in memory for the thread, which writes all that has
//! gathered at once. The thread syncs when somebody waits for it, or some time later.

mod writer;

use std::{
    collections::VecDeque,
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ctfs_host::Thread;
use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::watch;

use crate::{
    Disk, JournalError, JournalId, Position, RECORD_BYTES_MAX, Record,
    frame::frame_bytes,
    segments::{SegmentReader, Segments},
};

/// Written bytes that are synced although nobody waits: what a loss of power may take at most.
const UNSYNCED_BYTES_MAX: usize = 4 << 20;

/// Sizes and times of a journal.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Size of a file. Larger ones begin less often; up to two more than are needed lie on the disk.
    pub segment_bytes: u64,
    /// Bytes of records that are not trimmed or not durable, from which on [`Journal::room`] waits.
    /// This is what a pair has to replay, and what a crash can leave to the next life.
    pub bytes_max: u64,
    /// Bytes of written records that stay in memory, for a stream that keeps up.
    pub recent_bytes_max: usize,
    /// A record that nobody waits for is synced after this long.
    pub sync_after: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            segment_bytes: 16 << 20,
            bytes_max: 64 << 20,
            recent_bytes_max: 8 << 20,
            sync_after: Duration::from_millis(100),
        }
    }
}

/// What a journal holds, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Depth {
    /// Records that are not trimmed.
    pub records: u64,
    /// Bytes of the records that are not trimmed or not durable.
    pub bytes: u64,
    pub appended: Position,
    pub durable: Position,
    pub trimmed: Position,
    /// The disk has no room for the next file; nothing becomes durable until it has.
    pub waits_for_disk: bool,
}

/// The journal of this life. Dropping it writes and syncs what was appended, and blocks for that.
pub struct Journal {
    shared: Arc<Shared>,
    thread: Mutex<Option<Thread>>,
}

struct Shared {
    id: JournalId,
    settings: Settings,
    reader: SegmentReader,
    state: Mutex<State>,
    /// What is on the disk. Locked before the state, or tried.
    files: Mutex<Segments>,
    /// The thread waits here for something to do.
    work: Condvar,
    /// Blocking callers wait here for the thread, or for a trim.
    done: Condvar,
    /// The same for asynchronous ones.
    progress: watch::Sender<Progress>,
    appended: watch::Sender<Position>,
}

/// What asynchronous callers wait for.
#[derive(Debug, Clone, Default)]
struct Progress {
    durable: Position,
    bytes: u64,
    trimmed: Position,
    /// Nothing moves any more.
    ended: Option<JournalError>,
}

#[derive(Default)]
struct State {
    appended: Position,
    written: Position,
    durable: Position,
    /// Somebody waits for this position.
    wanted: Position,
    trimmed: Position,
    /// What the files are told is trimmed.
    let_go: Position,
    /// Records up to `appended`: all that are not written, and some before them.
    recent: VecDeque<Record>,
    recent_bytes: usize,
    /// Bytes ever appended, behind each record that is not trimmed or not durable.
    ends: VecDeque<u64>,
    /// The same, before the first of them.
    released: u64,
    /// When the oldest record was written that is not synced, and how many bytes there are.
    unsynced_since: Option<Instant>,
    unsynced_bytes: usize,
    /// The thread waits for something to do.
    sleeping: bool,
    /// When it looks by itself, while it waits.
    alarm: Option<Instant>,
    closing: bool,
    waits_for_disk: bool,
    failed: Option<Arc<str>>,
    /// The thread has ended.
    ended: bool,
}

impl State {
    /// These were written.
    fn wrote(&mut self, records: &[Record], files: &Segments) {
        self.written = files.written();
        self.unsynced_bytes += records.iter().map(|record| frame_bytes(&record.payload)).sum::<usize>();
        self.unsynced_since.get_or_insert_with(Instant::now);
    }

    /// Whether what is written must be synced now.
    fn sync_is_wanted(&self) -> bool {
        self.durable < self.written && (self.wanted > self.durable || self.closing || self.unsynced_bytes >= UNSYNCED_BYTES_MAX)
    }

    fn check(&self) -> Result<(), JournalError> {
        match &self.failed {
            Some(why) => Err(JournalError::Broken(why.clone())),
            None => Ok(()),
        }
    }

    /// Bytes of records that are not trimmed or not durable.
    fn bytes(&self) -> u64 {
        self.ends.back().map_or(0, |end| end - self.released)
    }

    /// Lets go of what is both durable and trimmed, and of what need not be in memory.
    fn release(&mut self, recent_bytes_max: usize) {
        let kept = self.appended.0 - self.trimmed.min(self.durable).0;
        while self.ends.len() as u64 > kept {
            self.released = self.ends.pop_front().expect("it is not empty");
        }
        while let Some(front) = self.recent.front()
            && front.position <= self.written
            && (front.position <= self.trimmed || self.recent_bytes > recent_bytes_max)
        {
            self.recent_bytes -= frame_bytes(&front.payload);
            self.recent.pop_front();
        }
    }

    fn progress(&self) -> Progress {
        let ended = match self.check() {
            Err(broken) => Some(broken),
            Ok(()) => self.ended.then_some(JournalError::Closed),
        };
        Progress { durable: self.durable, bytes: self.bytes(), trimmed: self.trimmed, ended }
    }
}

impl Journal {
    /// Begins the journal of life `id` in a directory of its own in `root`.
    ///
    /// # Errors
    /// - [`JournalError::Exists`]: this life has begun before; a life has one journal.
    pub fn create(disk: Arc<dyn Disk>, root: &Path, id: JournalId, settings: Settings) -> Result<Self, JournalError> {
        let dir = root.join(id.dir_name());
        let failed = |source| JournalError::io("create journal in", root, source);
        disk.create_dir(root).map_err(failed)?;
        if disk.list(root).map_err(failed)?.contains(&id.dir_name()) {
            return Err(JournalError::Exists(dir));
        }
        let segments = Segments::create(disk, &dir, id, Position::NONE.next(), settings.segment_bytes)?;
        let shared = Arc::new(Shared {
            id,
            settings,
            reader: segments.reader(),
            state: Mutex::default(),
            files: Mutex::new(segments),
            work: Condvar::new(),
            done: Condvar::new(),
            progress: watch::Sender::default(),
            appended: watch::Sender::default(),
        });
        let thread = Thread::start("ctfs-journal", writer::Writer::new(shared.clone()));
        let thread = thread.map_err(|source| JournalError::io("start the thread of", &dir, source))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    pub fn id(&self) -> JournalId {
        self.shared.id
    }

    /// Adds a record behind all others. Waits for nothing but short locks, and for no disk: what it writes stays
    /// with the system until it is synced.
    ///
    /// # Errors
    /// - [`JournalError::Full`]: twice [`Settings::bytes_max`] are held; wait for [`Self::room`] first.
    /// - [`JournalError::TooLong`], [`JournalError::Broken`], [`JournalError::Closed`].
    pub fn append(&self, payload: Bytes) -> Result<Position, JournalError> {
        if payload.len() > RECORD_BYTES_MAX {
            return Err(JournalError::TooLong { bytes: payload.len() });
        }
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        state.check()?;
        if state.closing {
            return Err(JournalError::Closed);
        }
        let (bytes, limit) = (frame_bytes(&payload), shared.settings.bytes_max.saturating_mul(2));
        if state.bytes().saturating_add(bytes as u64) > limit {
            return Err(JournalError::Full { bytes: state.bytes(), limit });
        }
        let position = state.appended.next();
        state.appended = position;
        let end = state.ends.back().copied().unwrap_or(state.released) + bytes as u64;
        state.ends.push_back(end);
        state.recent_bytes += bytes;
        state.recent.push_back(Record { position, payload });
        // Inside the lock, so that what is told is in order.
        shared.appended.send_replace(position);
        shared.write_here(state);
        Ok(position)
    }

    /// Waits until less than [`Settings::bytes_max`] are held.
    pub async fn room(&self) -> Result<(), JournalError> {
        let limit = self.shared.settings.bytes_max;
        self.until(|progress| progress.bytes < limit).await
    }

    /// As [`Self::room`], for a thread.
    pub fn room_blocking(&self, patience: Duration) -> Result<(), JournalError> {
        let limit = self.shared.settings.bytes_max;
        self.shared.block_until(patience, |state| state.bytes() < limit)
    }

    /// Waits until the records up to `position` are durable on this disk.
    pub async fn durable(&self, position: Position) -> Result<(), JournalError> {
        self.want(position);
        self.until(|progress| progress.durable >= position).await
    }

    /// As [`Self::durable`], for a thread.
    pub fn durable_blocking(&self, position: Position, patience: Duration) -> Result<(), JournalError> {
        self.want(position);
        self.shared.block_until(patience, |state| state.durable >= position)
    }

    /// The last record, as it moves.
    pub fn watch_appended(&self) -> watch::Receiver<Position> {
        self.shared.appended.subscribe()
    }

    /// Waits until the records up to `position` are trimmed.
    pub async fn trimmed(&self, position: Position) -> Result<(), JournalError> {
        self.until(|progress| progress.trimmed >= position).await
    }

    /// Waits until the journal is closed or broken, and says which.
    pub async fn ended(&self) -> JournalError {
        self.until(|_| false).await.err().unwrap_or(JournalError::Closed)
    }

    fn want(&self, position: Position) {
        let mut state = self.shared.state.lock();
        if state.wanted < position {
            state.wanted = position;
            self.shared.wake(state);
        }
    }

    async fn until(&self, reached: impl Fn(&Progress) -> bool) -> Result<(), JournalError> {
        let mut progress = self.shared.progress.subscribe();
        let now = progress.wait_for(|progress| reached(progress) || progress.ended.is_some()).await;
        let now = now.map_err(|_| JournalError::Closed)?;
        match &now.ended {
            Some(ended) if !reached(&now) || matches!(ended, JournalError::Broken(_)) => Err(ended.clone()),
            _ => Ok(()),
        }
    }

    /// Records from `from` on, of at most `bytes_max` but at least one; none when `from` is past
    /// the last. They need not be durable yet: a pair may have them before this disk does. Blocks
    /// where they are no longer in memory.
    pub fn read(&self, from: Position, bytes_max: usize) -> Result<Vec<Record>, JournalError> {
        match self.read_recent(from, bytes_max)? {
            Some(records) => Ok(records),
            None => self.shared.reader.read(from, bytes_max),
        }
    }

    /// As [`Self::read`], but `None` where it would have to read from the disk.
    pub fn read_recent(&self, from: Position, bytes_max: usize) -> Result<Option<Vec<Record>>, JournalError> {
        let state = self.shared.state.lock();
        state.check()?;
        if from <= state.trimmed {
            return Err(JournalError::Trimmed { upto: state.trimmed });
        }
        let first_recent = state.recent.front().map_or(state.appended.next(), |record| record.position);
        if from < first_recent {
            return Ok(None);
        }
        let mut bytes = 0;
        let mut records = Vec::new();
        for record in state.recent.iter().skip((from.0 - first_recent.0) as usize) {
            bytes += frame_bytes(&record.payload);
            if bytes > bytes_max && !records.is_empty() {
                break;
            }
            records.push(record.clone());
        }
        Ok(Some(records))
    }

    /// Records up to `upto` are no longer needed here nor at a copy. Their files go when all of
    /// their records are both trimmed and durable; after a crash some may be there again.
    pub fn trim(&self, upto: Position) {
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        let upto = upto.min(state.appended);
        if upto > state.trimmed {
            state.trimmed = upto;
            state.release(shared.settings.recent_bytes_max);
            shared.tell(&state);
            shared.wake(state);
        }
    }

    pub fn depth(&self) -> Depth {
        let state = self.shared.state.lock();
        Depth {
            records: state.appended.0 - state.trimmed.0,
            bytes: state.bytes(),
            appended: state.appended,
            durable: state.durable,
            trimmed: state.trimmed,
            waits_for_disk: state.waits_for_disk,
        }
    }

    /// Takes nothing more, writes and syncs what was appended, and ends. Blocks.
    pub fn close(&self) -> Result<(), JournalError> {
        let mut state = self.shared.state.lock();
        state.closing = true;
        drop(state);
        self.shared.work.notify_one();
        // One caller joins; the others find the thread ended when they have the lock.
        if let Some(thread) = self.thread.lock().take() {
            thread.join();
        }
        let state = self.shared.state.lock();
        state.check()?;
        // Ended without room on the disk for what is left.
        if state.durable < state.appended { Err(JournalError::Closed) } else { Ok(()) }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _ = self.close();
    }
}

impl Shared {
    /// Writes what was appended, or leaves it to the thread where that would mean to wait.
    fn write_here(&self, state: MutexGuard<'_, State>) {
        // Whoever has the files may have looked before this was appended.
        let Some(mut files) = self.files.try_lock() else { return self.wake(state) };
        let records = writer::gather(&state);
        if !files.has_room_for(&records) {
            return self.wake(state);
        }
        drop(state);
        let written = files.write(&records);
        let mut state = self.state.lock();
        match written {
            Ok(()) => state.wrote(&records, &files),
            Err(why) => self.fail(&mut state, &why.into()),
        }
        drop(files);
        // Without an alarm it would not know when to sync.
        if state.sync_is_wanted() || state.alarm.is_none() || state.failed.is_some() {
            self.wake(state);
        }
    }

    fn fail(&self, state: &mut State, why: &io::Error) {
        tracing::error!(journal = %self.id, %why, "the journal failed and refuses everything from now on");
        state.failed.get_or_insert_with(|| why.to_string().into());
    }

    /// Has the thread look at what there is to do.
    fn wake(&self, mut state: MutexGuard<'_, State>) {
        let sleeping = std::mem::take(&mut state.sleeping);
        drop(state);
        if sleeping {
            self.work.notify_one();
        }
    }

    /// Wakes all who wait.
    fn tell(&self, state: &State) {
        self.progress.send_replace(state.progress());
        self.done.notify_all();
    }

    fn block_until(&self, patience: Duration, reached: impl Fn(&State) -> bool) -> Result<(), JournalError> {
        let deadline = Instant::now() + patience;
        let mut state = self.state.lock();
        loop {
            state.check()?;
            if reached(&state) {
                return Ok(());
            }
            if state.ended {
                return Err(JournalError::Closed);
            }
            if self.done.wait_until(&mut state, deadline).timed_out() && !reached(&state) {
                state.check()?;
                return Err(JournalError::TimedOut);
            }
        }
    }
}
