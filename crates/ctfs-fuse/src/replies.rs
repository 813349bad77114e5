//! Replies: how long the kernel may keep what it is told, looked up while it is told.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ctfs_meta::Change;
use ctfs_types::{Attr, FileKind, FileName, Ino};
use ctfs_vfs::{FsError, Vfs};
use fuser::{Errno, ReplyAttr, ReplyEntry};

use crate::{
    caches::{Caches, Permits},
    convert::{absent, errno, file_attr, generation},
};

/// A reply written so much later than its timeout was looked up is taken back. Between the end of a
/// lease's use and the moment when nobody waits for its holder any more lies a second.
const LATE_REPLY: Duration = Duration::from_millis(500);

/// What a reply needs after the operation is done.
#[derive(Clone)]
pub struct Replies {
    pub vfs: Arc<Vfs>,
    pub caches: Arc<Caches>,
    /// When the request came, before anything was looked at for it.
    pub asked: Instant,
}

impl Replies {
    pub fn entry(&self, parent: Ino, result: Result<Attr, FsError>, reply: ReplyEntry) {
        let attr = match result {
            Ok(attr) => attr,
            Err(error) => return reply.error(errno(&error)),
        };
        let timeout = self.vfs.cache_timeout();
        let permits = self.caches.permits(timeout, self.asked);
        self.caches.looked_up(attr.ino, attr.size);
        reply.entry_with_ttls(&self.attr_timeout(&permits, &attr), &permits.entry(parent), &file_attr(&attr), generation(&attr));
        drop(permits);
        self.look_at_the_lease_again(timeout, || vec![Change::Attr { ino: attr.ino }]);
    }

    /// Before the kernel is told that a directory is in `parent`: it has let it go where it was.
    pub async fn let_go_elsewhere(&self, parent: Ino, attr: &Attr) {
        if attr.kind == FileKind::Directory && self.caches.may_have_moved(attr.ino) {
            self.caches.untold.all_told_but_in(parent).await;
        }
    }

    /// Nothing may be kept of a file that another server is writing: its holder tells nobody.
    pub fn attr_timeout(&self, permits: &Permits<'_>, attr: &Attr) -> Duration {
        if self.vfs.may_cache(attr) { permits.attr(attr.ino) } else { Duration::ZERO }
    }

    /// "No such name", which the kernel may remember like a name.
    pub fn absent(&self, parent: Ino, name: FileName, reply: ReplyEntry) {
        let timeout = self.vfs.cache_timeout();
        let permits = self.caches.permits(timeout, self.asked);
        let entry = permits.entry(parent);
        if entry.is_zero() {
            return reply.error(Errno::ENOENT);
        }
        reply.entry(&entry, &absent(), fuser::Generation(0));
        drop(permits);
        self.look_at_the_lease_again(timeout, || vec![Change::Entry { parent, name }]);
    }

    pub fn attr(&self, result: Result<Attr, FsError>, reply: ReplyAttr) {
        let attr = match result {
            Ok(attr) => attr,
            Err(error) => return reply.error(errno(&error)),
        };
        let timeout = self.vfs.cache_timeout();
        let permits = self.caches.permits(timeout, self.asked);
        self.caches.told_size(attr.ino, attr.size);
        reply.attr(&self.attr_timeout(&permits, &attr), &file_attr(&attr));
        drop(permits);
        self.look_at_the_lease_again(timeout, || vec![Change::Attr { ino: attr.ino }]);
    }

    /// A reply that was delayed between the check of the lease and the kernel carries a timeout
    /// that outlives the lease (scenario 17 of the coherence page): take it back.
    pub fn look_at_the_lease_again(&self, given: Duration, what: impl FnOnce() -> Vec<Change>) {
        if outlives(given, self.vfs.cache_timeout()) {
            self.vfs.invalidate(what());
        }
    }
}

/// Whether a timeout `given` a moment ago is too long for what is `left` of the lease.
fn outlives(given: Duration, left: Duration) -> bool {
    !given.is_zero() && (left.is_zero() || left + LATE_REPLY < given)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_outlives_a_lease_that_lapsed_or_was_looked_up_long_before_the_reply() {
        let millis = Duration::from_millis;
        assert!(!outlives(millis(1500), millis(1499)), "as always");
        assert!(!outlives(millis(300), millis(1750)), "renewed meanwhile");
        assert!(outlives(millis(1500), millis(900)));
        assert!(outlives(millis(300), Duration::ZERO));
        assert!(!outlives(Duration::ZERO, Duration::ZERO), "nothing was given");
    }
}
