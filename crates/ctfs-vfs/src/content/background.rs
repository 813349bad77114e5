//! Background work: flushing what is old or much, and dropping what is gone.

use std::{
    sync::{Arc, Weak, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use ctfs_types::{Attr, Ino, limits::INLINE_BYTES_MAX};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit},
    time::MissedTickBehavior,
};
use tracing::warn;

use super::{Inode, Local, Shared, flush::Cut, sharing::{GIVE_UP_MAX, WriteMode}};

/// How often the background looks around unasked.
const TICK: Duration = Duration::from_millis(500);
/// After a failed background flush: the first pause, doubled each time up to the last.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LAST: Duration = Duration::from_secs(30);
/// Unflushed bytes over this share of the tier (one in so many) are flushed whatever their age.
/// Writers wait from one half on.
const PRESSURE_SHARE: u64 = 4;
/// A file with more to flush than this is waited for when it is closed.
const DUE_BYTES_MAX: u64 = 1 << 20;
/// A file that was closed and takes a chunk lingers so long: many are removed, or written again, just after.
const CLOSED_FOR: Duration = Duration::from_millis(300);
/// With so many files to flush none lingers.
const LINGERING_MAX: usize = 128;
/// With so many files to flush, each that is closed is waited for. What they hold is bounded by the tier.
const DUE_INODES_MAX: usize = 4096;
/// Inodes kept in memory although nobody has them open, before they are looked through.
const IDLE_INODES_MAX: usize = 4096;

/// Runs until the contents are closed or dropped. `kick` has it look at everything, `closed` only at files that
/// were closed, of which there may be many: most of what it does is for them.
pub(super) async fn run(shared: Weak<Shared>, kick: Arc<Notify>, closed: Arc<Notify>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let all = tokio::select! {
            _ = ticks.tick() => true,
            () = kick.notified() => true,
            () = closed.notified() => false,
        };
        let Some(shared) = shared.upgrade() else { return };
        if shared.closed.load(Relaxed) {
            return;
        }
        if all {
            shared.keep_reserve().await;
            shared.flush_what_is_due();
        } else {
            shared.flush_closed();
        }
    }
}

/// As [`run`], for what may wait for a majority: flushes and room must not wait with it.
pub(super) async fn give_up(shared: Weak<Shared>) {
    let Some(wanted) = shared.upgrade().map(|shared| shared.wanted.clone()) else { return };
    loop {
        let is_wanted = tokio::time::timeout(TICK, wanted.notified()).await.is_ok();
        let Some(shared) = shared.upgrade() else { return };
        if shared.closed.load(Relaxed) {
            return;
        }
        let pieces = if is_wanted { shared.idle.lock().len().div_ceil(GIVE_UP_MAX) } else { 1 };
        for _ in 0..pieces {
            shared.give_up_idle().await;
        }
    }
}

impl Shared {
    pub(super) fn flush_what_is_due(self: &Arc<Self>) {
        self.drop_reaped();
        self.start_flushes();
        self.drop_idle();
    }

    pub(super) fn flush_soon(&self, ino: Ino) -> bool {
        let Some(inode) = self.inodes.lock().get(&ino).cloned() else { return false };
        let is_held = || {
            let ns = self.meta.replica().read();
            matches!(ns.cover(ino), Ok(Some((_, holder))) if holder == self.meta.holder())
        };
        let pending = self.pending.lock().len();
        let is_small = inode.entry.dirty_bytes() <= DUE_BYTES_MAX && pending <= DUE_INODES_MAX;
        if !is_small || self.short_of_disk.load(Relaxed) || !is_held() || !matches!(self.write_mode(&inode), Ok(Some(WriteMode::Buffer))) {
            return false;
        }
        let takes_chunk = self.size(&inode).is_ok_and(|size| size > INLINE_BYTES_MAX as u64);
        let mut local = inode.local.lock();
        if local.error.is_some() || local.failures > 0 || local.in_doubt {
            return false;
        }
        local.due = local.since.is_some();
        if local.due {
            if takes_chunk && pending <= LINGERING_MAX {
                local.lingers_since.get_or_insert_with(Instant::now);
            } else {
                self.queue_closed(ino, &mut local);
                self.closed_kick.notify_one();
            }
        }
        true
    }

    /// Whether somebody may open the file. One without a name goes in most cases before it is read.
    pub(super) fn has_name(&self, ino: Ino) -> bool {
        !matches!(self.meta.replica().read().attr(ino), Ok(Some(Attr { nlink: 0, .. })))
    }

    fn drop_reaped(&self) {
        let reaped = std::mem::take(&mut *self.reaped.lock());
        for ino in reaped {
            self.forget(ino);
        }
    }

    /// Has the tier give way to what else is on its disk.
    async fn keep_reserve(&self) {
        let tier = self.tier.clone();
        match ctfs_host::blocking(move || tier.keep_reserve()).await {
            Ok(kept) => self.short_of_disk.store(!kept, Relaxed),
            Err(error) => warn!(%error, "looking after the cache tier's disk"),
        }
    }

    /// Starts the flushes that are due. Each inode has at most one, and all of them share a few
    /// permits, so nothing piles up.
    fn start_flushes(self: &Arc<Self>) {
        let mut inodes: Vec<(u64, Arc<Inode>)> =
            self.pending.lock().values().map(|inode| (0, inode.clone())).collect();
        for (dirty, inode) in &mut inodes {
            *dirty = inode.entry.dirty_bytes();
        }
        // The largest first: under pressure they make the most room.
        inodes.sort_unstable_by_key(|(dirty, _)| std::cmp::Reverse(*dirty));
        let much = self.tier.dirty_bytes() > self.tier.limit() / PRESSURE_SHARE;
        let pressure = much || self.short_of_disk.load(Relaxed);
        let now = Instant::now();
        let may_linger = inodes.len() <= LINGERING_MAX;
        for (dirty, inode) in inodes {
            let mut local = inode.local.lock();
            let Some(since) = local.since else { continue };
            if local.in_background {
                // It may have more by now.
                self.more_is_due.store(true, Relaxed);
                continue;
            }
            if local.retry_at.is_some_and(|at| at > now) {
                continue;
            }
            let lingers = local.lingers_since.is_some_and(|since| may_linger && now.duration_since(since) < CLOSED_FOR || !self.has_name(inode.ino));
            let cut = if local.due && !lingers || pressure || now.duration_since(since) >= self.settings.dirty_age_max {
                Cut::Everything
            } else if dirty > self.settings.dirty_inode_bytes && !inode.entry.dirty_cells(true).is_empty() {
                Cut::WholeCells
            } else {
                continue;
            };
            let Ok(permit) = self.background_flushes.clone().try_acquire_owned() else {
                if local.due && !lingers && !pressure {
                    // Each flush that ends begins the next of these, without another look at all.
                    self.queue_closed(inode.ino, &mut local);
                    continue;
                }
                self.more_is_due.store(true, Relaxed);
                return;
            };
            local.in_background = true;
            drop(local);
            self.start_flush(inode, cut, permit);
        }
    }

    fn queue_closed(&self, ino: Ino, local: &mut Local) {
        if !std::mem::replace(&mut local.is_queued, true) {
            self.closed_files.lock().push_back(ino);
        }
    }

    /// Starts the flushes of files in the order in which they were closed. What cannot be now is found when all
    /// is looked at.
    fn flush_closed(self: &Arc<Self>) {
        loop {
            let Ok(permit) = self.background_flushes.clone().try_acquire_owned() else { return };
            let Some(ino) = self.closed_files.lock().pop_front() else { return };
            let Some(inode) = self.pending.lock().get(&ino).cloned() else { continue };
            {
                let mut local = inode.local.lock();
                local.is_queued = false;
                if local.in_background {
                    self.more_is_due.store(true, Relaxed);
                }
                if !local.due || local.since.is_none() || local.in_background || local.lingers_since.is_some() || local.retry_at.is_some() {
                    continue;
                }
                local.in_background = true;
            }
            self.start_flush(inode, Cut::Everything, permit);
        }
    }

    fn start_flush(self: &Arc<Self>, inode: Arc<Inode>, cut: Cut, permit: OwnedSemaphorePermit) {
        let shared = self.clone();
        self.runtime.spawn(async move {
            shared.flush_in_background(&inode, cut).await;
            let ino = inode.ino;
            drop(inode);
            shared.release(ino);
            drop(permit);
            shared.closed_kick.notify_one();
            if shared.more_is_due.swap(false, Relaxed) {
                shared.kick.notify_one();
            }
        });
    }

    async fn flush_in_background(&self, inode: &Arc<Inode>, cut: Cut) {
        let flushed = {
            let mut turn = inode.flushing.lock().await;
            self.flush_locked(inode, &mut turn, cut).await
        };
        let mut local = inode.local.lock();
        local.in_background = false;
        match flushed {
            Ok(()) => (local.failures, local.retry_at) = (0, None),
            // Dropped, and kept to be told.
            Err(error) if error.is_over_quota() => (local.failures, local.retry_at) = (0, None),
            Err(error) => {
                // Nobody is told: the bytes are still here, and the next fsync tries for itself.
                let pause = RETRY_FIRST.saturating_mul(1 << local.failures.min(6)).min(RETRY_LAST);
                local.failures += 1;
                local.retry_at = Some(Instant::now() + pause);
                warn!(ino = %inode.ino, %error, ?pause, "background flush failed, trying again");
            }
        }
    }

    /// Forgets inodes that were read without being opened.
    fn drop_idle(&self) {
        let inodes = self.inodes.lock();
        if inodes.len() <= IDLE_INODES_MAX {
            return;
        }
        let idle: Vec<_> =
            inodes.iter().filter(|(_, inode)| Arc::strong_count(inode) == 1).map(|(&ino, _)| ino).collect();
        drop(inodes);
        for ino in idle {
            self.release(ino);
        }
    }
}
