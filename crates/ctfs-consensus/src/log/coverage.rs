//! How far durable snapshots reach, which bounds what may be purged on disk.
//!
//! openraft asks for a purge as soon as it has ordered a snapshot to be installed and waits for
//! neither. The state machine says here when the snapshot has its durable name; until then the
//! entries below it, if there are any, stay on disk, and a crash finds the log as it was.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Shared, flusher::Request};
use crate::raft_types::RaftLogId;

#[derive(Debug, Default)]
pub(super) struct Reach {
    pub upto: Option<RaftLogId>,
    /// Why the snapshot that was last announced by a purge does not come.
    pub failed: Option<String>,
}

/// What the state machine tells the log.
#[derive(Clone)]
pub struct Coverage {
    pub(super) shared: Arc<Shared>,
    /// Weak: the log's thread ends with the last [`super::LogStore`].
    pub(super) requests: mpsc::WeakSender<Request>,
}

impl Coverage {
    /// A state at or past `upto` is durable and is found by the next start.
    pub fn reached(&self, upto: RaftLogId) {
        {
            let mut reach = self.shared.reach.lock();
            reach.upto = reach.upto.max(Some(upto));
            reach.failed = None;
        }
        self.nudge();
    }

    /// A snapshot could not be installed. What waits for it fails instead of waiting for ever.
    pub fn failed(&self, why: &str) {
        self.shared.reach.lock().failed = Some(why.to_owned());
        self.nudge();
    }

    /// The thread looks after every request; a full queue needs no other.
    fn nudge(&self) {
        if let Some(requests) = self.requests.upgrade() {
            let _ = requests.try_send(Request::CoverageMoved);
        }
    }
}
