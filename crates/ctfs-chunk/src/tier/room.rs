//! How much of its disk the tier may take.
//!
//! The disk is often the one that the log and the chunk store are on, and a log that finds no room
//! refuses everything. So the tier leaves a reserve: below it cached bytes go, nothing new is
//! cached, and a write finds no room until what is unflushed was flushed and could be evicted.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{Core, EVICT_FACTOR};

/// Bytes of its file system that the tier leaves free by default: 128 MiB more than the chunk
/// store does, so that cached copies give way to chunks before the store calls itself full.
pub(super) const RESERVE_BYTES: u64 = 384 << 20;
/// Evicted beyond the reserve, so that the next few writes need not evict again; never more than an
/// eighth of the tier.
const SLACK_BYTES: u64 = 64 << 20;
/// Bytes taken before the disk is looked at again; never more than an eighth of what is left.
const LOOK_EVERY_BYTES: u64 = 16 << 20;
/// Some cells give back less disk than they count, so one look may not be enough.
const LOOKS: usize = 4;

/// Free bytes of the disk, as a test may have them.
pub type FreeBytes = dyn Fn() -> u64 + Send + Sync;

#[derive(Default)]
pub(super) struct Room {
    /// Bytes that may be taken before the disk is looked at again.
    budget: AtomicU64,
    said: Option<Box<FreeBytes>>,
}

impl Room {
    pub(super) fn said_by(free: Box<FreeBytes>) -> Self {
        Self { said: Some(free), ..Self::default() }
    }
}

impl Core {
    /// Free bytes of the tier's file system; unknown is not full, a write itself will say.
    pub(super) fn disk_free(&self) -> u64 {
        match &self.room.said {
            Some(free) => free(),
            None => self.files.free().unwrap_or(u64::MAX),
        }
    }

    /// Whether the disk has `bytes` above the reserve, evicting for them.
    pub(super) fn disk_admits(&self, bytes: u64) -> bool {
        if self.room.budget.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(bytes)).is_ok() {
            return true;
        }
        let wanted = self.settings.reserve_bytes.saturating_add(bytes);
        for _ in 0..LOOKS {
            let free = self.disk_free();
            if free >= wanted {
                self.room.budget.store(((free - wanted) / 8).min(LOOK_EVERY_BYTES), Relaxed);
                return true;
            }
            let slack = self.slack().max(bytes.saturating_mul(EVICT_FACTOR));
            if self.evict((wanted - free).saturating_add(slack)) == 0 {
                return false;
            }
        }
        false
    }

    fn slack(&self) -> u64 {
        SLACK_BYTES.min(self.settings.limit / 8)
    }

    /// Evicts until the reserve is free, and answers whether it is, with something to spare.
    pub(super) fn keep_reserve(&self) -> bool {
        let reserve = self.settings.reserve_bytes;
        let enough = reserve.saturating_add(LOOK_EVERY_BYTES);
        let free = self.disk_free();
        if free < reserve {
            self.room.budget.store(0, Relaxed);
            self.evict((reserve - free).saturating_add(self.slack()));
            return self.disk_free() >= enough;
        }
        free >= enough
    }
}
