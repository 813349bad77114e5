//! Between the state machine and the server's observer: remembers how far applying has come.

use std::sync::Arc;

use ctfs_meta::Change;
use ctfs_types::LogIndex;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::observer::Observer;

/// Passes every notice on, in log order, and publishes the applied index.
pub(crate) struct Relay {
    inner: Arc<dyn Observer>,
    /// Held while a notice is passed on, so that none overtakes another.
    last: Mutex<LogIndex>,
    applied: watch::Sender<LogIndex>,
}

impl Relay {
    pub fn new(inner: Arc<dyn Observer>) -> Arc<Self> {
        Arc::new(Self { inner, last: Mutex::new(LogIndex(0)), applied: watch::Sender::new(LogIndex(0)) })
    }

    pub fn watch_applied(&self) -> watch::Receiver<LogIndex> {
        self.applied.subscribe()
    }

    pub fn applied_index(&self) -> LogIndex {
        *self.applied.borrow()
    }

    /// What this server may acknowledge: applied, and told to its kernel.
    pub fn acked(&self, invalidated: &watch::Receiver<LogIndex>) -> LogIndex {
        self.applied_index().min(*invalidated.borrow())
    }

    /// openraft says that `index` is applied. News only after a start, or when a snapshot was
    /// installed: the observer then learns its index by an entry without changes.
    pub fn catch_up(&self, index: LogIndex) {
        let mut last = self.last.lock();
        if index > *last {
            *last = index;
            self.inner.applied(index, Vec::new());
            self.publish(index);
        }
    }

    /// A command made these changes here; the log will make them again.
    pub fn happened(&self, changes: &[Change]) {
        self.inner.happened(changes);
    }

    fn publish(&self, index: LogIndex) {
        self.applied.send_if_modified(|applied| {
            let news = index > *applied;
            *applied = index.max(*applied);
            news
        });
    }
}

impl Observer for Relay {
    fn applied(&self, index: LogIndex, changes: Vec<(u64, Change)>) {
        let mut last = self.last.lock();
        *last = index.max(*last);
        self.inner.applied(index, changes);
        self.publish(index);
    }

    fn happened(&self, changes: &[Change]) {
        self.inner.happened(changes);
    }

    fn installed_snapshot(&self) {
        let _in_order = self.last.lock();
        self.inner.installed_snapshot();
    }

    fn invalidated(&self) -> watch::Receiver<LogIndex> {
        self.inner.invalidated()
    }
}
