//! Whether this server's disk lets it do its part.
//!
//! Two things can be wrong. Something **failed** (a sync, the store, a broken invariant): that is
//! for good, the server falls silent and says why until it is started again. Or the disk is
//! **full**: nothing is lost by waiting, so the log waits with what it was asked to write, and the
//! server is silent until there is room. Long before that a volume of which a majority is short of
//! room takes no change that grows it.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use ctfs_meta::Op;
use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{error, info, warn};

/// Below this much free, changes that grow the volume are refused: enough for the deletions that
/// make room again, and for what else writes to the disk meanwhile.
const LOW_BYTES: u64 = 128 << 20;
/// Below this much free the log takes nothing. The state's store, which must never find its disk
/// full, takes a few MiB for what the log holds already.
const FULL_BYTES: u64 = 16 << 20;
/// On a small disk the limits are these parts of it.
const LOW_PART: u64 = 8;
const FULL_PART: u64 = 64;

/// A full disk is looked at again after this long.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Room on the disk that holds log, state and snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Space {
    Enough,
    /// Taken by what is there already; no change that grows the volume if a majority says so.
    Low,
    /// The log waits.
    Full,
}

/// Shared by the log, the store and the tasks of one server. Clones are the same.
#[derive(Clone)]
pub struct Health {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    failed: watch::Sender<Option<String>>,
    /// Whether the log waits for room.
    waiting: watch::Sender<bool>,
    log: Mutex<Log>,
    /// Wakes who waits for room when the server ends.
    stop: Condvar,
    /// Bytes free, instead of what the disk says.
    #[cfg(test)]
    pretended: Mutex<Option<u64>>,
}

#[derive(Default)]
struct Log {
    stopping: bool,
    /// Since when the log waits for room.
    waiting: Option<Instant>,
    /// Since when it writes what it writes.
    busy: Option<Instant>,
}

impl Health {
    /// For a server whose files are in `dir`, which need not be there yet.
    pub fn new(dir: &Path) -> Self {
        let inner = Inner {
            dir: dir.to_owned(),
            failed: watch::Sender::new(None),
            waiting: watch::Sender::new(false),
            log: Mutex::default(),
            stop: Condvar::new(),
            #[cfg(test)]
            pretended: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Something failed for good. The first reason is the one that is told.
    pub fn fail(&self, why: &str) {
        self.inner.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            if first {
                error!(why, "this server takes no further part until it is started again");
                *failed = Some(why.to_owned());
            }
            first
        });
    }

    pub fn failed(&self) -> Option<String> {
        self.inner.failed.borrow().clone()
    }

    pub fn watch_failed(&self) -> watch::Receiver<Option<String>> {
        self.inner.failed.subscribe()
    }

    /// How much room there is. A disk that does not say is written to until it refuses.
    pub fn space(&self) -> Space {
        if self.waits() {
            return Space::Full;
        }
        match self.free() {
            Some((free, total)) if free < FULL_BYTES.min(total / FULL_PART) => Space::Full,
            Some((free, total)) if free < LOW_BYTES.min(total / LOW_PART) => Space::Low,
            _ => Space::Enough,
        }
    }

    /// Whether `bytes` more leave the log room to go on.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        self.free().is_none_or(|(free, total)| free >= bytes.saturating_add(FULL_BYTES.min(total / FULL_PART)))
    }

    /// Bytes free, with those kept for root, as whom the daemon runs; and bytes of the whole disk.
    fn free(&self) -> Option<(u64, u64)> {
        #[cfg(test)]
        if let Some(free) = *self.inner.pretended.lock() {
            return Some((free, 1 << 40));
        }
        let stat = rustix::fs::statvfs(&self.inner.dir).ok()?;
        Some((stat.f_bfree.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize)))
    }

    #[cfg(test)]
    pub fn pretend_free(&self, free: Option<u64>) {
        *self.inner.pretended.lock() = free;
    }

    /// Whether the log waits for room.
    pub fn waits(&self) -> bool {
        self.inner.log.lock().waiting.is_some()
    }

    /// The log's thread begins something, or has ended it.
    pub(crate) fn set_busy(&self, busy: bool) {
        self.inner.log.lock().busy = busy.then(Instant::now);
    }

    pub fn watch_waiting(&self) -> watch::Receiver<bool> {
        self.inner.waiting.subscribe()
    }

    /// How long the log has been at what it writes now.
    pub fn busy_for(&self) -> Duration {
        self.inner.log.lock().busy.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Runs `write` for the log's thread, again and again while the disk is full. Blocks; gives up
    /// only when the server ends. `write` must be repeatable after it was refused for lack of room.
    pub(crate) fn with_room<T>(&self, write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        self.retry(false, write)
    }

    /// As [`Self::with_room`], but for what makes room: it may use the disk to the last byte.
    pub(crate) fn for_room<T>(&self, write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        self.retry(true, write)
    }

    fn retry<T>(&self, to_the_last: bool, mut write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let result = loop {
            let refused = if to_the_last || self.has_room_for(0) {
                match write() {
                    Err(error) if is_full(&error) => Some(error),
                    result => break result,
                }
            } else {
                None
            };
            let mut log = self.inner.log.lock();
            if log.waiting.is_none() {
                warn!(dir = %self.inner.dir.display(), ?refused, "the disk of the log is full; waiting for room");
            }
            let since = *log.waiting.get_or_insert_with(Instant::now);
            self.inner.waiting.send_if_modified(|waiting| !std::mem::replace(waiting, true));
            if !log.stopping {
                self.inner.stop.wait_for(&mut log, LOOK_AGAIN);
            }
            if log.stopping {
                break Err(io::Error::other(format!("stopped after waiting {:?} for room on the disk", since.elapsed())));
            }
        };
        let mut log = self.inner.log.lock();
        if let Some(since) = log.waiting.take() {
            self.inner.waiting.send_replace(false);
            info!(dir = %self.inner.dir.display(), waited = ?since.elapsed(), "the log goes on");
        }
        result
    }

    /// Waits are over: the server ends.
    pub fn stop(&self) {
        self.inner.log.lock().stopping = true;
        self.inner.stop.notify_all();
    }

    pub fn stopping(&self) -> bool {
        self.inner.log.lock().stopping
    }

    /// Waits until `bytes` more leave room, or the server ends.
    pub async fn await_room_for(&self, bytes: u64, what: &str) {
        let mut told = false;
        while !self.stopping() && !self.has_room_for(bytes) {
            if !std::mem::replace(&mut told, true) {
                warn!(dir = %self.inner.dir.display(), bytes, "too little room on the disk to {what}; waiting");
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

/// Whether a write was refused for lack of room, and nothing else is wrong.
pub(crate) fn is_full(error: &io::Error) -> bool {
    [Errno::NOSPC, Errno::DQUOT].iter().any(|full| error.raw_os_error() == Some(full.raw_os_error()))
}

/// The error of a failed sync: whatever its number, what reached the disk is unknown.
pub(crate) fn sync_failed(error: io::Error) -> io::Error {
    io::Error::other(format!("sync: {error}"))
}

/// Whether `op` makes the volume larger. The others must go through when room is short: they make
/// some, or keep the cluster going.
pub(crate) fn grows(op: &Op) -> bool {
    matches!(
        op,
        Op::Make { .. }
            | Op::Link { .. }
            | Op::SetXattr { .. }
            | Op::Write { .. }
            | Op::CloneCells { .. }
            | Op::CreateToken { .. }
            | Op::Join { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_told_by_what_is_free() {
        let health = Health::new(Path::new("/"));
        for (free, space) in [(LOW_BYTES, Space::Enough), (LOW_BYTES - 1, Space::Low), (FULL_BYTES - 1, Space::Full)] {
            health.pretend_free(Some(free));
            assert_eq!(health.space(), space);
        }
        health.pretend_free(Some(FULL_BYTES + 10));
        assert!(health.has_room_for(10) && !health.has_room_for(11));
    }

    #[test]
    fn the_first_reason_of_a_failure_is_kept() {
        let health = Health::new(Path::new("/"));
        health.fail("first");
        health.fail("second");
        assert_eq!(health.failed().as_deref(), Some("first"));
    }

    #[test]
    fn a_failed_sync_is_not_taken_for_a_full_disk() {
        let full = io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error());
        assert!(is_full(&full));
        assert!(!is_full(&sync_failed(full)));
    }
}
