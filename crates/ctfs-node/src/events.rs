//! What happens when the replica moves: kernel caches, lock waiters, repair and the member list
//! are told, and how far the kernel was told is reported back.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use ctfs_consensus::Observer;
use ctfs_fuse::Notifier;
use ctfs_meta::Change;
use ctfs_types::{ChunkId, Incarnation, LogIndex};
use ctfs_vfs::Vfs;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};

use crate::repair::Repair;

/// Chunks waiting to be deleted; past it the next repair walk finds them.
const FORGOTTEN_MAX: usize = 65536;

pub struct Events {
    /// This life of this server: its own changes need no invalidation of its own kernel.
    own: AtomicU64,
    /// Fires when this life may have been ended.
    fenced: Notify,
    vfs: OnceLock<Arc<Vfs>>,
    repair: OnceLock<Arc<Repair>>,
    notifier: Mutex<Option<Notifier>>,
    invalidated: watch::Sender<LogIndex>,
    /// Where the member list changed last.
    members: watch::Sender<LogIndex>,
    /// A snapshot came, and the entry that says how far it reaches has not been told yet.
    snapshot_came: AtomicBool,
    forgotten: mpsc::Sender<ChunkId>,
}

impl Events {
    /// The receiver yields chunks whose copies may be deleted.
    pub fn new(own: Incarnation) -> (Arc<Self>, mpsc::Receiver<ChunkId>) {
        let (forgotten, deletions) = mpsc::channel(FORGOTTEN_MAX);
        let events = Self {
            own: AtomicU64::new(own.0),
            fenced: Notify::new(),
            vfs: OnceLock::new(),
            repair: OnceLock::new(),
            notifier: Mutex::new(None),
            invalidated: watch::Sender::new(LogIndex(0)),
            members: watch::Sender::new(LogIndex(0)),
            snapshot_came: AtomicBool::new(false),
            forgotten,
        };
        (Arc::new(events), deletions)
    }

    pub fn tell_vfs(&self, vfs: Arc<Vfs>) {
        assert!(self.vfs.set(vfs).is_ok(), "the file system starts once");
    }

    pub fn tell_repair(&self, repair: Arc<Repair>) {
        assert!(self.repair.set(repair).is_ok(), "repair starts once");
    }

    /// Sets or takes away the kernel to be told; without one everything counts as told.
    pub fn tell_kernel(&self, notifier: Option<Notifier>) {
        *self.notifier.lock() = notifier;
    }

    /// Returns when this life may have been ended.
    pub async fn fenced(&self) {
        self.fenced.notified().await;
    }

    /// This server goes on in another life.
    pub fn begin_life(&self, own: Incarnation) {
        self.own.store(own.0, Relaxed);
    }

    /// Fires when the member list may have changed, with the log index of it. This server has
    /// applied the entry then, and counts it as applied a moment later.
    pub fn members(&self) -> watch::Receiver<LogIndex> {
        self.members.subscribe()
    }

    /// Nobody waits for this server's kernel any more: what it keeps can be old from now on.
    pub fn lease_lapsed(&self) {
        if let Some(vfs) = self.vfs.get() {
            vfs.distrust_pages();
        }
        if let Some(notifier) = self.notifier.lock().as_ref() {
            notifier.forget_everything();
        }
    }

    fn told(&self, index: LogIndex) {
        self.invalidated.send_if_modified(|told| {
            let newer = index > *told;
            if newer {
                *told = index;
            }
            newer
        });
    }

    /// Reports the notifier's progress as this server's; runs until the mount ends.
    pub async fn follow(self: Arc<Self>, mut invalidated: watch::Receiver<LogIndex>) {
        while invalidated.changed().await.is_ok() {
            let index = *invalidated.borrow_and_update();
            self.told(index);
        }
    }
}

impl Observer for Events {
    fn applied(&self, index: LogIndex, changes: Vec<(u64, Change)>) {
        if let Some(vfs) = self.vfs.get() {
            let all: Vec<Change> = changes.iter().map(|(_, change)| change.clone()).collect();
            vfs.changed(&all);
        }
        for (_, change) in &changes {
            match change {
                Change::ChunkWanted { chunk } => {
                    if let Some(repair) = self.repair.get() {
                        repair.want(*chunk);
                    }
                }
                Change::ChunkForgotten { chunk } => {
                    if self.forgotten.try_send(*chunk).is_err() {
                        tracing::debug!(%chunk, "left to the next repair walk");
                    }
                }
                Change::Fenced { incarnation, .. } if incarnation.0 == self.own.load(Relaxed) => self.fenced.notify_one(),
                _ => {}
            }
        }
        let of_members = changes.iter().any(|(_, change)| matches!(change, Change::Members));
        if self.snapshot_came.swap(false, Relaxed) || of_members {
            self.members.send_replace(index);
        }
        let notifier = self.notifier.lock();
        match notifier.as_ref() {
            Some(notifier) => {
                let own = self.own.load(Relaxed);
                let is_news = |(client, change): &(u64, Change)| *client != own || matches!(change, Change::Covered { .. });
                let foreign = changes.into_iter().filter(is_news).map(|(_, change)| change);
                notifier.apply(index, foreign.collect());
            }
            None => self.told(index),
        }
    }

    fn happened(&self, changes: &[Change]) {
        // The kernel knows: its own request did it.
        if let Some(vfs) = self.vfs.get() {
            vfs.changed(changes);
        }
    }

    fn installed_snapshot(&self) {
        self.snapshot_came.store(true, Relaxed);
        self.members.send_modify(|_| {});
        self.fenced.notify_one();
        if let Some(vfs) = self.vfs.get() {
            vfs.replaced();
        }
        if let Some(repair) = self.repair.get() {
            repair.walk_soon();
        }
        if let Some(notifier) = self.notifier.lock().as_ref() {
            notifier.forget_everything();
        }
    }

    fn invalidated(&self) -> watch::Receiver<LogIndex> {
        self.invalidated.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_member_list_is_news_with_the_index_of_its_change_also_after_a_snapshot() {
        let (events, _deletions) = Events::new(Incarnation(1));
        let mut members = events.members();
        let mut news = || members.has_changed().unwrap().then(|| *members.borrow_and_update());
        events.applied(LogIndex(4), vec![]);
        assert_eq!(news(), None);
        events.applied(LogIndex(5), vec![(7, Change::Members)]);
        assert_eq!(news(), Some(LogIndex(5)));
        events.installed_snapshot();
        assert_eq!(news(), Some(LogIndex(5)), "at once, though nobody knows yet how far it reaches");
        events.applied(LogIndex(90), vec![]);
        assert_eq!(news(), Some(LogIndex(90)));
    }
}
