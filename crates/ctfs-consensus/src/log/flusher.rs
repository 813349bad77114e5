//! The one thread that writes the log.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use ctfs_host::Worker;
use openraft::storage::LogFlushed;
use tokio::sync::{
    mpsc::{Receiver, error::TryRecvError},
    oneshot,
};
use tracing::error;

use super::{
    Place, SegmentFile, Shared,
    frame::{self, SEGMENT_HEADER_BYTES},
    marks::{Progress, ProgressFile, State},
};
use crate::{
    durable,
    health::{is_full, sync_failed},
    raft_types::{RaftLogId, RaftVote, TypeConfig},
};

/// Bytes that may be gathered for one sync. More makes the first of them wait longer for the
/// disk than a sync costs.
const BATCH_BYTES_MAX: usize = 4 << 20;

type Done = oneshot::Sender<io::Result<()>>;

/// What the thread can be asked.
pub(super) enum Request {
    Append { frames: Vec<(RaftLogId, Vec<u8>)>, callback: LogFlushed<TypeConfig> },
    SaveVote { vote: RaftVote, done: Done },
    /// Entries from index `from` on conflict with the leader's.
    Truncate { from: u64, done: Done },
    Purge { upto: RaftLogId, done: Done },
    /// The committed index in memory moved.
    NoteCommitted,
    /// A purge may be due.
    CoverageMoved,
}

impl Request {
    /// Refuses what is waited for.
    fn refuse(self, why: io::Error) {
        match self {
            Self::Append { callback, .. } => callback.log_io_completed(Err(why)),
            Self::SaveVote { done, .. } | Self::Truncate { done, .. } | Self::Purge { done, .. } => {
                let _ = done.send(Err(why));
            }
            Self::NoteCommitted | Self::CoverageMoved => {}
        }
    }
}

/// Requests that may wait for a purge. openraft asks one at a time; more than a few is a fault.
const HELD_MAX: usize = 256;

/// A purge that was answered and is not on disk yet.
#[derive(Clone, Copy)]
struct Deferred {
    upto: RaftLogId,
    /// What is on disk does not lead up to `upto`: the next entry needs the purge first, or the
    /// log would have a hole.
    hole: bool,
}

/// The segment that is written to.
pub(super) struct Active {
    pub first: u64,
    pub segment: SegmentFile,
    /// Where the next frame goes.
    pub end: u64,
}

pub(super) struct Flusher {
    shared: Arc<Shared>,
    /// How far the log is purged on disk; in memory it may be further.
    purged: Option<RaftLogId>,
    deferred: Option<Deferred>,
    /// What waits for the deferred purge, in order.
    held: VecDeque<Request>,
    progress_file: ProgressFile,
    progress: Progress,
    active: Option<Active>,
}

/// The file of the segment whose first entry is `first`. Twenty digits sort as numbers do.
pub(super) fn segment_path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.seg"))
}

/// The flusher at work, until every asker is gone.
pub(super) struct Serving {
    flusher: Flusher,
    inbox: Receiver<Request>,
}

impl Serving {
    pub fn new(flusher: Flusher, inbox: Receiver<Request>) -> Self {
        Self { flusher, inbox }
    }

    fn serve(&mut self, first: Request) {
        let mut next = Some(first);
        while let Some(request) = next {
            next = self.flusher.take(request, &mut self.inbox);
        }
    }

    fn end(&mut self) {
        let _ = self.flusher.guarded(|flusher| flusher.note_progress());
    }
}

impl Worker for Serving {
    fn run(mut self) {
        while let Some(request) = self.inbox.blocking_recv() {
            self.serve(request);
        }
        self.end();
    }

    fn turn(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(request) => self.serve(request),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => {
                    self.end();
                    return false;
                }
            }
        }
    }
}

impl Flusher {
    pub fn new(
        shared: Arc<Shared>,
        purged: Option<RaftLogId>,
        progress_file: ProgressFile,
        progress: Progress,
        active: Option<Active>,
    ) -> Self {
        Self { shared, purged, deferred: None, held: VecDeque::new(), progress_file, progress, active }
    }

    /// Takes one request from the inbox, and what may be done together with it; returns what else it
    /// took from there.
    fn take(&mut self, request: Request, inbox: &mut Receiver<Request>) -> Option<Request> {
        self.release();
        if self.must_wait(&request) {
            if self.held.len() < HELD_MAX {
                self.held.push_back(request);
            } else {
                request.refuse(io::Error::other("too much waits for a snapshot to be installed"));
            }
            return None;
        }
        self.serve(request, Some(inbox))
    }

    /// Whether `request` must not be done before the deferred purge is.
    fn must_wait(&self, request: &Request) -> bool {
        match request {
            Request::Append { frames, .. } => {
                !self.held.is_empty() || (!frames.is_empty() && self.deferred.is_some_and(|deferred| deferred.hole))
            }
            Request::Truncate { .. } | Request::Purge { .. } => !self.held.is_empty(),
            Request::SaveVote { .. } | Request::NoteCommitted | Request::CoverageMoved => false,
        }
    }

    /// Does the deferred purge if a durable snapshot reaches it by now, and then what waited.
    fn release(&mut self) {
        if self.deferred.is_none() {
            return;
        }
        match self.guarded(|this| this.finish_purge()) {
            Ok(()) if self.deferred.is_some() => return,
            Ok(()) => {}
            // The log has failed: what waited is refused.
            Err(_) => self.deferred = None,
        }
        for request in std::mem::take(&mut self.held) {
            self.serve(request, None);
        }
    }

    /// Does one request, with the appends that wait behind it in `inbox`; returns what else it
    /// took from there.
    fn serve(&mut self, request: Request, inbox: Option<&mut Receiver<Request>>) -> Option<Request> {
        let mut next = None;
        match request {
            Request::Append { frames, callback } => {
                let mut bytes: usize = frames.iter().map(|(_, payload)| payload.len()).sum();
                let mut batch = frames;
                let mut callbacks = vec![callback];
                if let Some(inbox) = inbox {
                    while bytes < BATCH_BYTES_MAX {
                        match inbox.try_recv() {
                            Ok(Request::Append { frames, callback }) => {
                                bytes += frames.iter().map(|(_, payload)| payload.len()).sum::<usize>();
                                batch.extend(frames);
                                callbacks.push(callback);
                            }
                            Ok(other) => {
                                next = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                }
                let result = self.guarded(|this| this.append(&batch));
                for callback in callbacks {
                    callback.log_io_completed(result.as_ref().map_err(copy_of).copied());
                }
            }
            Request::SaveVote { vote, done } => {
                let _ = done.send(self.guarded(|this| this.save_vote(vote)));
            }
            Request::Truncate { from, done } => {
                let _ = done.send(self.guarded(|this| this.truncate(from)));
            }
            Request::Purge { upto, done } => {
                let _ = done.send(self.guarded(|this| this.purge(upto)));
            }
            Request::NoteCommitted => {
                let _ = self.guarded(|this| this.note_progress());
            }
            Request::CoverageMoved => {}
        }
        next
    }

    /// Runs `step` unless an earlier one failed; a failure ends the log's service for good.
    fn guarded(&mut self, step: impl FnOnce(&mut Self) -> io::Result<()>) -> io::Result<()> {
        self.shared.check()?;
        self.shared.health.set_busy(true);
        let result = step(self);
        self.shared.health.set_busy(false);
        if let Err(why) = &result {
            error!(dir = %self.shared.dir.display(), %why, "the log failed and refuses everything from now on");
            self.shared.index.lock().failed = Some(why.to_string());
            self.shared.health.fail(&format!("the log failed: {why}"));
        }
        result
    }

    fn append(&mut self, batch: &[(RaftLogId, Vec<u8>)]) -> io::Result<()> {
        let mut buffer = Vec::new();
        let mut places = Vec::new();
        for (id, payload) in batch {
            let full = self
                .active
                .as_ref()
                .is_none_or(|active| active.end + buffer.len() as u64 >= self.shared.settings.segment_bytes);
            if full {
                self.write_out(&mut buffer, &mut places)?;
                // A later segment must never hold an entry whose predecessors are not durable:
                // recovery cuts unfinished writes in the last one only.
                self.sync()?;
                self.begin_segment(id.index)?;
            }
            let active = self.active.as_ref().expect("a segment was begun if there was none");
            let start = buffer.len();
            frame::write(&mut buffer, active.segment.salt, *id, self.progress.synced, payload);
            let offset = active.end + start as u64;
            places.push(Place { id: *id, segment: active.first, offset, bytes: buffer.len() - start });
        }
        self.write_out(&mut buffer, &mut places)?;
        self.sync()?;
        self.note_progress()
    }

    fn write_out(&mut self, buffer: &mut Vec<u8>, places: &mut Vec<Place>) -> io::Result<()> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let (file, end) = (&active.segment.file, active.end);
        self.shared.health.with_room(|| {
            let written = self.shared.write(file, buffer, end);
            if written.is_err() {
                // Half a frame is worth nothing; without it the small files find room.
                let _ = file.set_len(end);
            }
            written
        })?;
        active.end += buffer.len() as u64;
        buffer.clear();
        let mut index = self.shared.index.lock();
        index.places.extend(places.drain(..));
        index.shrink_recent(self.shared.settings.recent_bytes_max);
        Ok(())
    }

    /// Waits until everything written is durable.
    fn sync(&mut self) -> io::Result<()> {
        let Some(active) = &self.active else { return Ok(()) };
        self.allow_sync()?;
        active.segment.file.sync_data().map_err(sync_failed)?;
        let written = self.shared.index.lock().places.back().map_or(0, |place| place.id.index + 1);
        self.progress.synced = self.progress.synced.max(written);
        Ok(())
    }

    #[cfg(not(test))]
    fn allow_sync(&self) -> io::Result<()> {
        Ok(())
    }

    #[cfg(test)]
    fn allow_sync(&self) -> io::Result<()> {
        use std::sync::atomic::Ordering;
        match self.shared.fail_sync_after.fetch_sub(1, Ordering::SeqCst) {
            0 => Err(io::Error::other("injected")),
            _ => Ok(()),
        }
    }

    fn begin_segment(&mut self, first: u64) -> io::Result<()> {
        let path = segment_path(&self.shared.dir, first);
        let salt = rand::random();
        let file = self.shared.health.with_room(|| {
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
            let written = self.shared.write(&file, &frame::segment_header(first, salt), 0);
            if written.is_err() {
                fs::remove_file(&path)?;
            }
            written.map(|()| file)
        })?;
        file.sync_all().map_err(sync_failed)?;
        durable::sync_dir(&self.shared.dir).map_err(sync_failed)?;
        let segment = SegmentFile { file: Arc::new(file), salt, path };
        self.shared.index.lock().files.insert(first, segment.clone());
        self.active = Some(Active { first, segment, end: SEGMENT_HEADER_BYTES as u64 });
        Ok(())
    }

    fn save_vote(&mut self, vote: RaftVote) -> io::Result<()> {
        let state = State { vote: Some(vote), purged: self.purged };
        self.shared.health.with_room(|| state.save(&self.shared.dir))?;
        self.shared.index.lock().vote = Some(vote);
        Ok(())
    }

    fn note_progress(&mut self) -> io::Result<()> {
        self.progress.committed = self.shared.index.lock().committed;
        match self.progress_file.write(&self.progress) {
            // Worth having, not worth waiting for.
            Err(error) if is_full(&error) => Ok(()),
            written => written,
        }
    }

    /// Takes back the claim that entries from `from` on are durable, before they go.
    fn lower_synced(&mut self, from: u64) -> io::Result<()> {
        if self.progress.synced > from {
            self.progress.synced = from;
            self.shared.health.for_room(|| self.progress_file.write_durably(&self.progress))?;
        }
        Ok(())
    }

    fn truncate(&mut self, from: u64) -> io::Result<()> {
        if self.shared.index.lock().last.is_none_or(|last| last.index < from) {
            return Ok(());
        }
        self.lower_synced(from)?;
        let place = self.shared.index.lock().place(from);
        self.shared.index.lock().forget_from(from);
        // Newest first: whatever is left after a crash in between is a prefix.
        let firsts: Vec<u64> = self.shared.index.lock().files.range(from..).map(|(&first, _)| first).rev().collect();
        self.remove_segments(&firsts)?;
        if let Some(place) = place
            && let Some(segment) = self.segment(place.segment)
        {
            segment.file.set_len(place.offset)?;
            self.allow_sync()?;
            segment.file.sync_all().map_err(sync_failed)?;
            self.active = Some(Active { first: place.segment, segment, end: place.offset });
        } else {
            // All of what was left began at `from`; the segment before it, if any, goes on.
            self.resume_last_segment()?;
        }
        Ok(())
    }

    /// Purges in memory, and on disk as soon as a durable snapshot reaches `upto`.
    fn purge(&mut self, upto: RaftLogId) -> io::Result<()> {
        {
            let mut index = self.shared.index.lock();
            if index.purged.is_some_and(|purged| purged.index >= upto.index) {
                return Ok(());
            }
            let hole = index.purge(upto);
            self.deferred = Some(Deferred { upto, hole });
        }
        self.finish_purge()
    }

    /// Makes the deferred purge durable if a durable snapshot reaches it.
    fn finish_purge(&mut self) -> io::Result<()> {
        let Some(Deferred { upto, .. }) = self.deferred else { return Ok(()) };
        {
            let reach = self.shared.reach.lock();
            if reach.upto < Some(upto) {
                return match &reach.failed {
                    Some(why) => Err(io::Error::other(format!("a snapshot that replaces entries was not installed: {why}"))),
                    None => Ok(()),
                };
            }
        }
        let vote = self.shared.index.lock().vote;
        let state = State { vote, purged: Some(upto) };
        self.shared.health.for_room(|| state.save(&self.shared.dir))?;
        self.purged = Some(upto);
        self.deferred = None;
        if self.shared.index.lock().places.is_empty() {
            // Entries of an older term past `upto` go too: they conflict with what is committed there.
            self.lower_synced(upto.index + 1)?;
            let firsts: Vec<u64> = self.shared.index.lock().files.keys().rev().copied().collect();
            self.active = None;
            return self.remove_segments(&firsts);
        }
        let firsts: Vec<u64> = {
            let index = self.shared.index.lock();
            let kept = index.places.front().map_or(u64::MAX, |place| place.segment);
            // What is not written yet goes to the active segment, or past it.
            let kept = kept.min(self.active.as_ref().map_or(u64::MAX, |active| active.first));
            index.files.range(..kept).map(|(&first, _)| first).collect()
        };
        self.remove_segments(&firsts)
    }

    fn remove_segments(&mut self, firsts: &[u64]) -> io::Result<()> {
        for first in firsts {
            if let Some(segment) = self.shared.index.lock().files.remove(first) {
                fs::remove_file(&segment.path)?;
            }
            if self.active.as_ref().is_some_and(|active| active.first == *first) {
                self.active = None;
            }
        }
        if firsts.is_empty() { Ok(()) } else { durable::sync_dir(&self.shared.dir).map_err(sync_failed) }
    }

    fn segment(&self, first: u64) -> Option<SegmentFile> {
        self.shared.index.lock().files.get(&first).cloned()
    }

    fn resume_last_segment(&mut self) -> io::Result<()> {
        let last = self.shared.index.lock().files.last_key_value().map(|(&first, segment)| (first, segment.clone()));
        self.active = match last {
            Some((first, segment)) => {
                let end = file_bytes(&segment.file)?;
                Some(Active { first, segment, end })
            }
            None => None,
        };
        Ok(())
    }
}

impl Shared {
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        if self.refuse_writes.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) > 0 {
            file.write_all_at(&bytes[..bytes.len() / 2], offset)?;
            return Err(rustix::io::Errno::NOSPC.into());
        }
        file.write_all_at(bytes, offset)
    }
}

fn file_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.len())
}

/// `io::Error` does not clone; every waiter of a batch gets its own.
fn copy_of(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}
