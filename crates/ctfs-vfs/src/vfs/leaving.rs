//! Handles that the kernel has closed, and whose locks are not back yet.
//!
//! close(2) waits for the flush of a handle and not for its release, which gives its flock and OFD
//! locks back. So the next program finds a lock in its way that nobody has any more.

use std::{collections::HashMap, sync::Arc};

use ctfs_types::Ino;
use parking_lot::Mutex;
use tokio::sync::Notify;

#[derive(Default)]
pub(super) struct Leavings {
    counts: Mutex<HashMap<Ino, u32>>,
    ended: Notify,
}

/// A release under way. Made when the kernel says so, before anything it asks later is looked at.
pub struct Leaving {
    of: Arc<Leavings>,
    ino: Ino,
}

impl Leavings {
    pub(super) fn begin(self: &Arc<Self>, ino: Ino) -> Leaving {
        *self.counts.lock().entry(ino).or_default() += 1;
        Leaving { of: self.clone(), ino }
    }

    /// Whether handles of the file are being released; returns when they are.
    pub(super) async fn wait(&self, ino: Ino) -> bool {
        let mut any = false;
        loop {
            // Registered before looking, so that an end in between is not missed.
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if !self.counts.lock().contains_key(&ino) {
                return any;
            }
            any = true;
            ended.await;
        }
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let mut counts = self.of.counts.lock();
        if let Some(count) = counts.get_mut(&self.ino) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.ino);
                drop(counts);
                self.of.ended.notify_waiters();
            }
        }
    }
}
