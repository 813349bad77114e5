//! The one thread that writes a journal.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use ctfs_host::Worker;
use tracing::{error, warn};

use super::{Shared, State};
use crate::{
    JournalError, Position, Record,
    frame::frame_bytes,
    segments::{Segments, WriteError},
};

/// Bytes that are written at once. More makes the first of them wait longer for the disk than a
/// sync costs.
const GROUP_BYTES_MAX: usize = 4 << 20;
/// Written bytes that are synced although nobody waits: what a loss of power may take at most.
const UNSYNCED_BYTES_MAX: usize = 4 << 20;
/// A full disk is looked at again after this long.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(super) struct Writer {
    shared: Arc<Shared>,
    segments: Segments,
    unsynced_bytes: usize,
}

/// What there is to do.
struct Job {
    records: Vec<Record>,
    sync: bool,
    trim: Position,
}

impl Worker for Writer {
    fn run(mut self) {
        // However this ends, nobody waits for it any longer.
        let _end = OnEnd(self.shared.clone());
        while let Some(job) = self.next_job() {
            if !self.work(job) {
                return;
            }
        }
    }

    fn turn(&mut self) -> bool {
        loop {
            let (job, closing) = {
                let state = self.shared.state.lock();
                (self.job(&state), state.closing)
            };
            match job {
                Some(job) => {
                    if self.work(job) {
                        continue;
                    }
                }
                None if !closing => return true,
                None => {}
            }
            drop(OnEnd(self.shared.clone()));
            return false;
        }
    }
}

impl Writer {
    pub fn new(shared: Arc<Shared>, segments: Segments) -> Self {
        Self { shared, segments, unsynced_bytes: 0 }
    }

    /// Does a job; `false`: the journal has failed.
    fn work(&mut self, job: Job) -> bool {
        match self.serve(job) {
            Ok(()) => true,
            Err(why) => {
                error!(journal = %self.shared.id, %why, "the journal failed and refuses everything from now on");
                self.shared.state.lock().failed = Some(why.to_string().into());
                false
            }
        }
    }

    /// What there is to do at this moment.
    fn job(&self, state: &State) -> Option<Job> {
        let records = gather(state);
        let due = self.due(state).is_some_and(|due| due <= Instant::now());
        let sync = state.durable < state.written && (state.wanted > state.durable || state.closing || due);
        let trim = state.trimmed.min(state.durable);
        let trims = trim > self.segments.trimmed();
        (!records.is_empty() || sync || trims).then_some(Job { records, sync, trim })
    }

    /// When what is written is to be synced although nobody waits for it.
    fn due(&self, state: &State) -> Option<Instant> {
        state.unsynced_since.map(|since| since + self.shared.settings.sync_after)
    }

    /// Waits for something to do; `None`: the journal is closed, and all is done.
    fn next_job(&mut self) -> Option<Job> {
        let shared = self.shared.clone();
        let mut state = shared.state.lock();
        loop {
            if let Some(job) = self.job(&state) {
                return Some(job);
            }
            if state.closing {
                return None;
            }
            state.sleeping = true;
            match self.due(&state) {
                Some(due) => drop(shared.work.wait_until(&mut state, due)),
                None => shared.work.wait(&mut state),
            }
            state.sleeping = false;
        }
    }

    fn serve(&mut self, job: Job) -> io::Result<()> {
        let mut sync = job.sync;
        if !job.records.is_empty() {
            self.write(&job.records)?;
            self.unsynced_bytes += job.records.iter().map(|record| frame_bytes(&record.payload)).sum::<usize>();
            let mut state = self.shared.state.lock();
            state.written = self.segments.written();
            state.unsynced_since.get_or_insert_with(Instant::now);
            sync = state.wanted > state.durable || state.closing || self.unsynced_bytes >= UNSYNCED_BYTES_MAX;
        }
        if sync {
            self.segments.sync()?;
            self.unsynced_bytes = 0;
        }
        self.note();
        self.segments.prepare();
        self.segments.trim(job.trim)
    }

    /// Writes `records`, waiting for room on the disk if need be.
    fn write(&mut self, mut records: &[Record]) -> io::Result<()> {
        loop {
            match self.segments.write(records) {
                Ok(()) => break,
                Err(WriteError::Failed(why)) => return Err(why),
                Err(WriteError::NoRoom(why)) => {
                    let done = records.partition_point(|record| record.position <= self.segments.written());
                    records = &records[done..];
                    self.note();
                    let mut state = self.shared.state.lock();
                    if !std::mem::replace(&mut state.waits_for_disk, true) {
                        warn!(journal = %self.shared.id, %why, "the disk of the journal is full; waiting for room");
                    }
                    if state.closing {
                        return Err(io::Error::other(format!("closed while the disk has no room: {why}")));
                    }
                    // Not sleeping: an append is no reason to look, only the end is.
                    self.shared.work.wait_for(&mut state, LOOK_AGAIN);
                }
            }
        }
        self.shared.state.lock().waits_for_disk = false;
        Ok(())
    }

    /// Tells everybody how far it is written and durable.
    fn note(&mut self) {
        let mut state = self.shared.state.lock();
        state.written = self.segments.written();
        let durable = self.segments.synced();
        if durable > state.durable {
            state.durable = durable;
        }
        if state.durable == state.written {
            state.unsynced_since = None;
        }
        state.release(self.shared.settings.recent_bytes_max);
        self.shared.tell(&state);
    }
}

/// The next records to write.
fn gather(state: &State) -> Vec<Record> {
    let first = state.recent.front().map_or(0, |record| record.position.0);
    let mut bytes = 0;
    let pending = state.recent.iter().skip((state.written.0 + 1).saturating_sub(first) as usize);
    let group = pending.take_while(|record| {
        let before = bytes;
        bytes += frame_bytes(&record.payload);
        before < GROUP_BYTES_MAX
    });
    group.cloned().collect()
}

struct OnEnd(Arc<Shared>);

impl Drop for OnEnd {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.ended = true;
        if state.failed.is_none() && state.durable < state.appended {
            state.failed = Some("its thread ended".into());
        }
        if let Some(JournalError::Broken(_)) = state.check().err() {
            // What waits in memory will never be written.
            state.recent.clear();
        }
        self.0.tell(&state);
    }
}
