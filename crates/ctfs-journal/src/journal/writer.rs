//! The one thread that syncs a journal, and writes what appenders cannot without waiting.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use ctfs_host::Worker;
use tracing::warn;

use super::{Shared, State};
use crate::{
    JournalError, Record,
    frame::frame_bytes,
    segments::{Segments, WriteError},
};

/// Bytes that are written at once. More makes the first of them wait longer for the disk than a
/// sync costs.
const GROUP_BYTES_MAX: usize = 4 << 20;
/// A full disk is looked at again after this long.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(super) struct Writer {
    shared: Arc<Shared>,
}

impl Worker for Writer {
    fn run(mut self) {
        // However this ends, nobody waits for it any longer.
        let _end = OnEnd(self.shared.clone());
        while self.await_work() && self.work() {}
    }

    fn turn(&mut self) -> bool {
        loop {
            let (has_work, is_over) = {
                let state = self.shared.state.lock();
                (self.has_work(&state), state.closing || state.failed.is_some())
            };
            match (has_work, is_over) {
                (true, _) if self.work() => {}
                (false, false) => return true,
                _ => break,
            }
        }
        drop(OnEnd(self.shared.clone()));
        false
    }
}

impl Writer {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Waits for something to do; `false`: the journal has failed, or is closed and all is done.
    fn await_work(&self) -> bool {
        let mut state = self.shared.state.lock();
        loop {
            if self.has_work(&state) {
                return true;
            }
            if state.closing || state.failed.is_some() {
                return false;
            }
            state.alarm = self.due(&state);
            state.sleeping = true;
            match state.alarm {
                Some(due) => drop(self.shared.work.wait_until(&mut state, due)),
                None => self.shared.work.wait(&mut state),
            }
            state.sleeping = false;
        }
    }

    /// Whether there is something to do at this moment.
    fn has_work(&self, state: &State) -> bool {
        let writes = state.written < state.appended;
        let trims = state.trimmed.min(state.durable) > state.let_go;
        state.failed.is_none() && (writes || trims || self.is_to_sync(state))
    }

    fn is_to_sync(&self, state: &State) -> bool {
        state.sync_is_wanted() || self.due(state).is_some_and(|due| due <= Instant::now())
    }

    /// When what is written is to be synced although nobody waits for it.
    fn due(&self, state: &State) -> Option<Instant> {
        state.unsynced_since.map(|since| since + self.shared.settings.sync_after)
    }

    /// Does what there is to do; `false`: the journal has failed.
    fn work(&mut self) -> bool {
        let mut files = self.shared.files.lock();
        let served = self.serve(&mut files);
        if let Err(why) = &served {
            self.shared.fail(&mut self.shared.state.lock(), why);
        }
        served.is_ok()
    }

    fn serve(&self, files: &mut Segments) -> io::Result<()> {
        let records = gather(&self.shared.state.lock());
        if !records.is_empty() {
            self.write(files, &records)?;
            self.shared.state.lock().wrote(&records, files);
        }
        let sync = self.is_to_sync(&self.shared.state.lock());
        if sync {
            files.sync()?;
        }
        let trim = self.note(files);
        files.prepare();
        files.trim(trim)?;
        self.shared.state.lock().let_go = trim;
        Ok(())
    }

    /// Writes `records`, waiting for room on the disk if need be.
    fn write(&self, files: &mut Segments, mut records: &[Record]) -> io::Result<()> {
        loop {
            match files.write(records) {
                Ok(()) => break,
                Err(WriteError::Failed(why)) => return Err(why),
                Err(WriteError::NoRoom(why)) => {
                    let done = records.partition_point(|record| record.position <= files.written());
                    records = &records[done..];
                    self.note(files);
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

    /// Tells everybody how far it is written and durable. Answers up to where it can be let go of.
    fn note(&self, files: &Segments) -> crate::Position {
        let mut state = self.shared.state.lock();
        state.written = files.written();
        state.durable = state.durable.max(files.synced());
        if state.durable == state.written {
            (state.unsynced_since, state.unsynced_bytes) = (None, 0);
        }
        state.release(self.shared.settings.recent_bytes_max);
        self.shared.tell(&state);
        state.trimmed.min(state.durable)
    }
}

/// The next records to write.
pub(super) fn gather(state: &State) -> Vec<Record> {
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
