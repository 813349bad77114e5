//! The log: the truth of this server, as segments of framed entries.
//!
//! [`LogStore`] is openraft's view of it. Everything that touches the disk happens in one thread
//! ([`flusher`]), in the order it was asked for: appends that wait together share one
//! `fdatasync`, and an entry is acknowledged only after it. [`recovery`] reads the segments back:
//! an unfinished write at the very end is cut, damage anywhere else is an error, because an
//! acknowledged entry may be the only one there is.
//!
//! A failed sync ends the log's service until it is opened again. A full disk does not: the thread
//! waits with the entry it has, nothing is acknowledged meanwhile, and goes on when there is room
//! ([`crate::health`]).
//!
//! Reading order: [`frame`] (bytes of an entry), [`marks`] (vote and progress), [`recovery`],
//! [`coverage`] (what may be purged), [`flusher`].

mod coverage;
mod flusher;
mod frame;
#[cfg(test)]
pub(crate) mod golden;
mod marks;
mod recovery;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Debug,
    fs::File,
    io,
    ops::{Bound, RangeBounds},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use ctfs_host::Thread;
use ctfs_types::codec;
use openraft::{
    AnyError, LogState, OptionalSend, RaftLogReader, StorageIOError,
    storage::{LogFlushed, RaftLogStorage},
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

pub use self::coverage::Coverage;
pub(crate) use self::recovery::Recovered;
use self::{
    coverage::Reach,
    flusher::{Flusher, Request, Serving},
    frame::PAYLOAD_BYTES_MAX,
};
use crate::{
    health::Health,
    raft_types::{RaftEntry, RaftLogId, RaftStorageError, RaftVote, TypeConfig},
};

/// Version of the encoding of an entry inside its frame.
/// 2: commands that name inode numbers and stamps of inodes.
pub(crate) const ENTRY_VERSION: u8 = 5;

/// Why the log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    /// An entry that had been acknowledged is not readable. Cutting it off would forget it, and
    /// perhaps it was the last copy: an operator decides.
    #[error("log segment {segment} is damaged at byte {offset}: {why}")]
    LogDamaged { segment: PathBuf, offset: u64, why: &'static str },
    #[error("log state {path} is damaged: {why}")]
    StateDamaged { path: PathBuf, why: String },
    #[error("log directory {path} has segments but no state file")]
    StateMissing { path: PathBuf },
}

impl LogError {
    fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }
}

/// How large the log's pieces are.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// A segment ends with the first entry past this size. Smaller frees disk sooner after a
    /// purge, larger means fewer files.
    pub segment_bytes: u64,
    /// Encoded size of recent entries kept in memory, so that replication and applying do not
    /// read what was just written. What is not yet written is kept beyond this.
    pub recent_bytes_max: usize,
    /// Most bytes one read for replication returns (at least one entry): it must fit into one call.
    pub read_bytes_max: usize,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { segment_bytes: 16 << 20, recent_bytes_max: 16 << 20, read_bytes_max: 1 << 20 }
    }
}

/// Requests that may wait for the flusher thread. openraft asks one at a time, so this is never
/// reached; a full queue makes the asker wait.
const REQUESTS_MAX: usize = 256;

/// The log as openraft writes it. Clones are the same log.
#[derive(Clone)]
pub struct LogStore {
    shared: Arc<Shared>,
    requests: tokio::sync::mpsc::Sender<Request>,
    /// Last, so that the thread sees its channel closed before it is waited for.
    _thread: Arc<FlusherThread>,
}

impl Debug for LogStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogStore").field("dir", &self.shared.dir).finish_non_exhaustive()
    }
}

/// The log as replication reads it.
#[derive(Clone)]
pub struct LogReader {
    shared: Arc<Shared>,
}

struct FlusherThread {
    health: Health,
    handle: Option<Thread>,
}

impl Drop for FlusherThread {
    fn drop(&mut self) {
        self.health.stop();
        if let Some(handle) = self.handle.take() {
            // The directory may be opened again right after; the thread has at most one sync left.
            handle.join();
        }
    }
}

/// What the thread and the askers share.
struct Shared {
    dir: PathBuf,
    settings: LogSettings,
    health: Health,
    index: Mutex<Index>,
    reach: Mutex<Reach>,
    /// Makes the n-th next sync fail; negative never.
    #[cfg(test)]
    fail_sync_after: std::sync::atomic::AtomicI64,
    /// So many writes find the disk full.
    #[cfg(test)]
    refuse_writes: std::sync::atomic::AtomicI64,
}

/// Where every entry is.
#[derive(Default)]
struct Index {
    vote: Option<RaftVote>,
    purged: Option<RaftLogId>,
    committed: Option<RaftLogId>,
    /// The last entry, written or not; `None` when there are none.
    last: Option<RaftLogId>,
    /// Written entries: consecutive, the first one of index `places[0].id.index`.
    places: VecDeque<Place>,
    files: BTreeMap<u64, SegmentFile>,
    /// The newest entries: consecutive, up to `last`.
    recent: VecDeque<Recent>,
    recent_bytes: usize,
    /// Why the log refuses everything since a write or sync failed. What reached the disk is
    /// unknown from then on, and the kernel reports a failed sync only once.
    failed: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    id: RaftLogId,
    /// First index of its segment.
    segment: u64,
    offset: u64,
    bytes: usize,
}

#[derive(Clone)]
struct SegmentFile {
    file: Arc<File>,
    salt: u32,
    path: PathBuf,
}

struct Recent {
    entry: RaftEntry,
    bytes: usize,
}

impl Index {
    fn first(&self) -> Option<u64> {
        match (self.places.front(), self.recent.front()) {
            (Some(place), _) => Some(place.id.index),
            (None, Some(recent)) => Some(recent.entry.log_id.index),
            (None, None) => None,
        }
    }

    fn place(&self, index: u64) -> Option<Place> {
        let first = self.places.front()?.id.index;
        self.places.get(usize::try_from(index.checked_sub(first)?).ok()?).copied()
    }

    fn recent(&self, index: u64) -> Option<&Recent> {
        let first = self.recent.front()?.entry.log_id.index;
        self.recent.get(usize::try_from(index.checked_sub(first)?).ok()?)
    }

    /// The id of the entry at `index`, written or not.
    fn id_at(&self, index: u64) -> Option<RaftLogId> {
        self.recent(index).map(|recent| recent.entry.log_id).or_else(|| self.place(index).map(|place| place.id))
    }

    /// Whether nothing here goes on from `upto`, which is committed: the entries end before it, or
    /// another one is in its place, and then all that follow are not committed.
    fn superseded_by(&self, upto: RaftLogId) -> bool {
        let Some(last) = self.last else { return true };
        last != upto && (last <= upto || last.index <= upto.index || self.id_at(upto.index).is_some_and(|id| id != upto))
    }

    /// Forgets what a purge up to `upto` takes. Returns whether everything here was superseded.
    fn purge(&mut self, upto: RaftLogId) -> bool {
        let superseded = self.superseded_by(upto);
        if superseded {
            self.forget_from(0);
        } else {
            self.forget_to(upto.index);
        }
        self.purged = self.purged.max(Some(upto));
        superseded
    }

    /// Forgets the oldest of the recent entries that are written, down to the limit.
    fn shrink_recent(&mut self, bytes_max: usize) {
        let written_end = self.places.back().map_or(0, |place| place.id.index + 1);
        while self.recent_bytes > bytes_max {
            match self.recent.front() {
                Some(oldest) if oldest.entry.log_id.index < written_end => {
                    self.recent_bytes -= oldest.bytes;
                    self.recent.pop_front();
                }
                _ => break,
            }
        }
    }

    /// Forgets everything from `index` on.
    fn forget_from(&mut self, index: u64) {
        while self.places.back().is_some_and(|place| place.id.index >= index) {
            self.places.pop_back();
        }
        while self.recent.back().is_some_and(|recent| recent.entry.log_id.index >= index) {
            if let Some(recent) = self.recent.pop_back() {
                self.recent_bytes -= recent.bytes;
            }
        }
        self.last = self.recent.back().map(|r| r.entry.log_id).or_else(|| self.places.back().map(|p| p.id));
    }

    /// Forgets everything up to `index`, inclusive.
    fn forget_to(&mut self, index: u64) {
        while self.places.front().is_some_and(|place| place.id.index <= index) {
            self.places.pop_front();
        }
        while self.recent.front().is_some_and(|recent| recent.entry.log_id.index <= index) {
            if let Some(recent) = self.recent.pop_front() {
                self.recent_bytes -= recent.bytes;
            }
        }
        if self.last.is_some_and(|last| last.index <= index) {
            self.last = None;
        }
    }
}

impl LogStore {
    /// Opens the log in `dir`, making an empty one where there is none, and starts its thread.
    ///
    /// # Errors
    /// [`LogError::LogDamaged`] when an entry that had been acknowledged does not check.
    pub fn open(dir: &Path, settings: LogSettings) -> Result<Self, LogError> {
        Self::start(Recovered::read(dir)?, settings, Health::new(dir))
    }

    /// Starts the thread of a log that was read.
    pub(crate) fn start(recovered: Recovered, settings: LogSettings, health: Health) -> Result<Self, LogError> {
        let Recovered { dir, state, index, progress_file, progress, active } = recovered;
        let shared = Arc::new(Shared {
            dir: dir.clone(),
            settings,
            health: health.clone(),
            index: Mutex::new(index),
            reach: Mutex::default(),
            #[cfg(test)]
            fail_sync_after: std::sync::atomic::AtomicI64::new(-1),
            #[cfg(test)]
            refuse_writes: std::sync::atomic::AtomicI64::new(0),
        });
        let (requests, inbox) = tokio::sync::mpsc::channel(REQUESTS_MAX);
        let flusher = Flusher::new(shared.clone(), state.purged, progress_file, progress, active);
        let handle = Thread::start("ctfs-log", Serving::new(flusher, inbox))
            .map_err(|source| LogError::io("start thread for", &dir, source))?;
        Ok(Self { shared, requests, _thread: Arc::new(FlusherThread { health, handle: Some(handle) }) })
    }

    /// Where the state machine says how far durable snapshots reach.
    pub fn coverage(&self) -> Coverage {
        Coverage { shared: self.shared.clone(), requests: self.requests.downgrade() }
    }

    async fn ask(&self, make: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Request) -> io::Result<()> {
        let (done, wait) = oneshot::channel();
        self.requests.send(make(done)).await.map_err(|_| thread_gone())?;
        wait.await.map_err(|_| thread_gone())?
    }
}

fn thread_gone() -> io::Error {
    io::Error::other("the log's thread has ended")
}

impl Shared {
    fn check(&self) -> io::Result<()> {
        match &self.index.lock().failed {
            Some(why) => Err(io::Error::other(format!("the log refuses since a failure: {why}"))),
            None => Ok(()),
        }
    }

    /// The entries of `[start, end)` that are there, in order; stops after `bytes_max`, but not
    /// before the first.
    fn read(&self, start: u64, end: u64, bytes_max: usize) -> Result<Vec<RaftEntry>, (u64, io::Error)> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut next = start;
        while next < end {
            let place = {
                let index = self.index.lock();
                if let Some(why) = &index.failed {
                    return Err((next, io::Error::other(why.clone())));
                }
                match index.recent(next) {
                    Some(recent) => {
                        bytes += recent.bytes;
                        if !entries.is_empty() && bytes > bytes_max {
                            break;
                        }
                        entries.push(recent.entry.clone());
                        next += 1;
                        continue;
                    }
                    None => index.place(next).and_then(|place| Some((place, index.files.get(&place.segment)?.clone()))),
                }
            };
            let Some((place, file)) = place else { break };
            bytes += place.bytes;
            if !entries.is_empty() && bytes > bytes_max {
                break;
            }
            match read_place(&place, &file) {
                Ok(entry) => entries.push(entry),
                // Truncated under the reader: the entry is not there, which is no damage.
                Err(_) if self.index.lock().place(next) != Some(place) => break,
                Err(error) => return Err((next, error)),
            }
            next += 1;
        }
        Ok(entries)
    }

    /// Whether all of `[start, end)` that exists is in memory.
    fn in_memory(&self, start: u64, end: u64) -> bool {
        let index = self.index.lock();
        let first_asked = index.first().map_or(start, |first| first.max(start));
        first_asked >= end || index.last.is_none_or(|last| last.index < first_asked) || index.recent(first_asked).is_some()
    }

    /// The part of `range` that is there, as a half-open interval.
    fn clamp(&self, range: &impl RangeBounds<u64>) -> (u64, u64) {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => u64::MAX,
        };
        let index = self.index.lock();
        let first = index.first().unwrap_or(0);
        let past = index.last.map_or(0, |last| last.index + 1);
        (start.max(first), end.min(past))
    }

    async fn read_range(
        self: &Arc<Self>,
        start: u64,
        end: u64,
        bytes_max: usize,
    ) -> Result<Vec<RaftEntry>, RaftStorageError> {
        let read = if self.in_memory(start, end) {
            self.read(start, end, bytes_max)
        } else {
            let shared = self.clone();
            ctfs_host::blocking(move || shared.read(start, end, bytes_max))
                .await
                .unwrap_or_else(|error| Err((start, io::Error::other(error))))
        };
        read.map_err(|(at, error)| StorageIOError::read_log_at_index(at, AnyError::new(&error)).into())
    }
}

fn read_place(place: &Place, segment: &SegmentFile) -> io::Result<RaftEntry> {
    let mut bytes = vec![0; place.bytes];
    segment.file.read_exact_at(&mut bytes, place.offset)?;
    let damaged = |why: String| io::Error::other(format!("{} at byte {}: {why}", segment.path.display(), place.offset));
    let frame = frame::read(segment.salt, &bytes).ok_or_else(|| damaged("frame does not check".into()))?;
    if frame.id != place.id || frame.bytes() != place.bytes {
        return Err(damaged("another entry's frame".into()));
    }
    let entry: RaftEntry = codec::decode(ENTRY_VERSION, &bytes[frame::FRAME_HEADER_BYTES..], PAYLOAD_BYTES_MAX)
        .map_err(|why| damaged(why.to_string()))?;
    if entry.log_id != place.id {
        return Err(damaged("entry and frame disagree".into()));
    }
    Ok(entry)
}

impl RaftLogReader<TypeConfig> for LogReader {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<RaftEntry>, RaftStorageError> {
        let (start, end) = self.shared.clamp(&range);
        self.shared.read_range(start, end, usize::MAX).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<RaftEntry>, RaftStorageError> {
        let bytes_max = self.shared.settings.read_bytes_max;
        self.shared.read_range(start, end, bytes_max).await
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<RaftEntry>, RaftStorageError> {
        LogReader { shared: self.shared.clone() }.try_get_log_entries(range).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<RaftEntry>, RaftStorageError> {
        LogReader { shared: self.shared.clone() }.limited_get_log_entries(start, end).await
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, RaftStorageError> {
        let index = self.shared.index.lock();
        Ok(LogState { last_purged_log_id: index.purged, last_log_id: index.last.or(index.purged) })
    }

    async fn get_log_reader(&mut self) -> LogReader {
        LogReader { shared: self.shared.clone() }
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> Result<(), RaftStorageError> {
        let vote = *vote;
        self.ask(|done| Request::SaveVote { vote, done })
            .await
            .map_err(|error| StorageIOError::write_vote(AnyError::new(&error)).into())
    }

    async fn read_vote(&mut self) -> Result<Option<RaftVote>, RaftStorageError> {
        Ok(self.shared.index.lock().vote)
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> Result<(), RaftStorageError> {
        self.shared.index.lock().committed = committed;
        // Worth saving, not worth waiting for: a full queue saves a later one.
        let _ = self.requests.try_send(Request::NoteCommitted);
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<RaftLogId>, RaftStorageError> {
        let index = self.shared.index.lock();
        // It was written without waiting: it may know of more than survived. Then the leader
        // will tell again.
        let last = index.last.or(index.purged);
        Ok(index.committed.filter(|committed| Some(committed.index) <= last.map(|last| last.index)))
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), RaftStorageError>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let failed = |error: io::Error| StorageIOError::write_logs(AnyError::new(&error));
        self.shared.check().map_err(failed)?;
        let mut frames = Vec::new();
        let mut recent = Vec::new();
        let purged = self.shared.index.lock().purged;
        for entry in entries {
            // What was purged is committed and in a snapshot; there is nothing to keep.
            if Some(entry.log_id.index) <= purged.map(|purged| purged.index) {
                continue;
            }
            let payload = codec::encode(ENTRY_VERSION, &entry);
            if payload.len() > PAYLOAD_BYTES_MAX {
                let error = io::Error::other(format!("entry of {} bytes is too long for the log", payload.len()));
                return Err(StorageIOError::write_log_entry(entry.log_id, AnyError::new(&error)).into());
            }
            recent.push(Recent { bytes: payload.len(), entry: entry.clone() });
            frames.push((entry.log_id, payload));
        }
        {
            let mut index = self.shared.index.lock();
            for recent in recent {
                let id = recent.entry.log_id;
                let expected = index.last.or(index.purged).map(|last| last.index + 1);
                if expected.is_some_and(|expected| expected != id.index) {
                    let error = io::Error::other(format!("entry {id} would leave a hole, expected {expected:?}"));
                    return Err(StorageIOError::write_log_entry(id, AnyError::new(&error)).into());
                }
                index.last = Some(id);
                index.recent_bytes += recent.bytes;
                index.recent.push_back(recent);
            }
        }
        self.requests
            .send(Request::Append { frames, callback })
            .await
            .map_err(|_| failed(thread_gone()))?;
        Ok(())
    }

    async fn truncate(&mut self, from: RaftLogId) -> Result<(), RaftStorageError> {
        self.ask(|done| Request::Truncate { from: from.index, done })
            .await
            .map_err(|error| StorageIOError::write_logs(AnyError::new(&error)).into())
    }

    /// Answers when the entries are gone from memory. On disk they stay until a durable snapshot
    /// reaches `upto` ([`Coverage`]): a leader purges behind a snapshot it has, but a follower is
    /// told to purge as soon as the installation of one was ordered.
    async fn purge(&mut self, upto: RaftLogId) -> Result<(), RaftStorageError> {
        self.ask(|done| Request::Purge { upto, done })
            .await
            .map_err(|error| StorageIOError::write_logs(AnyError::new(&error)).into())
    }
}
