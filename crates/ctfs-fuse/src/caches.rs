//! What the kernel was allowed to keep, and for how long the next answer may be kept.
//!
//! A reply that carries a timeout looks at [`Caches::permits`] and is written while it holds them;
//! a change made elsewhere is marked under the same lock before the kernel is told. So a reply
//! computed from the state before the change either reaches the kernel before the notice, which
//! then takes it back, or carries no timeout.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use ctfs_types::Ino;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use crate::{listings::Listings, undo::KernelSize, untold::Untold};

/// A directory in which another server changed a name within this time gets no entry timeout. Not
/// because an answer would be wrong otherwise, but because nobody need be waited for then: what the
/// kernel does not keep need not be taken back, and taking back waits for the directory's lock, which
/// programs here hold while their own `mkdir` there waits for the cluster. One sweep of the kernel's
/// names, which is not cheap, thus serves a directory for as long as two servers are busy in it.
const DIRECTORY_STAYS_HOT: Duration = Duration::from_secs(60);
/// For so long it is remembered when attributes changed elsewhere: longer than a reply can be under
/// way between reading the replica and being written.
const INODE_STAYS_HOT: Duration = Duration::from_secs(10);
/// Marks kept; past it everything counts as just changed, for a minute.
const MARKS_MAX: usize = 65536;
/// Spreads the lookup counts over this many locks.
const SHARDS: usize = 16;

#[derive(Debug, Default)]
pub struct Caches {
    marks: RwLock<Marks>,
    /// Inodes the kernel knows.
    known: [Mutex<HashMap<Ino, Known>>; SHARDS],
    pub listings: Listings,
    pub untold: Untold,
}

#[derive(Debug, Default)]
struct Known {
    /// `nlookup` in fuse.h.
    lookups: u64,
    size: KernelSize,
}

#[derive(Debug, Default)]
struct Marks {
    directories: HashMap<Ino, Hot>,
    inodes: HashMap<Ino, Instant>,
    everything: Option<Hot>,
}

#[derive(Debug, Clone, Copy)]
struct Hot {
    since: Instant,
    last: Instant,
    /// The kernel has thrown out what it was given before.
    swept: bool,
}

/// What the kernel can still keep of a directory in which a name has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    Nothing,
    /// Names that it was given a timeout for before this.
    Before(Instant),
}

/// The right to write replies with timeouts; held while they are written, so never across a wait.
#[derive(Debug)]
pub struct Permits<'a> {
    marks: RwLockReadGuard<'a, Marks>,
    timeout: Duration,
    /// The replica was looked at after this.
    asked: Instant,
}

impl Permits<'_> {
    /// How long the kernel may keep what a name in `dir` leads to.
    pub fn entry(&self, dir: Ino) -> Duration {
        if self.timeout.is_zero() || self.marks.directory(dir, Instant::now()).is_some() {
            Duration::ZERO
        } else {
            self.timeout
        }
    }

    /// How long the kernel may keep the attributes of `ino`: not if they changed since it asked, because
    /// what it gets may be of before.
    pub fn attr(&self, ino: Ino) -> Duration {
        let changed = |at: &Instant| *at >= self.asked;
        if self.timeout.is_zero()
            || self.marks.inodes.get(&ino).is_some_and(changed)
            || self.marks.everything.is_some_and(|hot| changed(&hot.last))
        {
            Duration::ZERO
        } else {
            self.timeout
        }
    }
}

impl Marks {
    /// Since when nothing in `dir` was given a timeout.
    fn directory(&self, dir: Ino, now: Instant) -> Option<Hot> {
        let hot = |hot: &Hot| now.duration_since(hot.last) < DIRECTORY_STAYS_HOT;
        let own = self.directories.get(&dir).copied().filter(hot);
        let all = self.everything.filter(hot);
        own.into_iter().chain(all).min_by_key(|hot| (!hot.swept, hot.since))
    }

    fn make_room(&mut self, now: Instant) {
        if self.directories.len() >= MARKS_MAX {
            self.directories.retain(|_, hot| now.duration_since(hot.last) < DIRECTORY_STAYS_HOT);
        }
        if self.inodes.len() >= MARKS_MAX {
            self.inodes.retain(|_, at| now.duration_since(*at) < INODE_STAYS_HOT);
        }
        if self.directories.len() >= MARKS_MAX || self.inodes.len() >= MARKS_MAX {
            self.directories.clear();
            self.inodes.clear();
            self.mark_everything(now);
        }
    }

    fn mark_everything(&mut self, now: Instant) {
        let still_hot = self.everything.filter(|hot| now.duration_since(hot.last) < DIRECTORY_STAYS_HOT);
        let since = still_hot.map_or(now, |hot| hot.since);
        self.everything = Some(Hot { since, last: now, swept: still_hot.is_some_and(|hot| hot.swept) });
    }
}

impl Caches {
    /// `timeout` is what the lease allows at this moment; the kernel asked at `asked` or later.
    pub fn permits(&self, timeout: Duration, asked: Instant) -> Permits<'_> {
        Permits { marks: self.marks.read(), timeout, asked }
    }

    /// A name in `dir` changed elsewhere: replies about `dir` carry no timeout from now on. The kernel asks for
    /// names only in what it knows, so nothing is under way about a directory that it does not.
    pub fn mark_directory(&self, dir: Ino) -> Kept {
        if !self.is_known(dir) {
            return Kept::Nothing;
        }
        let now = Instant::now();
        let mut marks = self.marks.write();
        marks.make_room(now);
        let hot = marks.directory(dir, now).unwrap_or(Hot { since: now, last: now, swept: false });
        marks.directories.insert(dir, Hot { last: now, ..hot });
        if hot.swept { Kept::Nothing } else { Kept::Before(hot.since) }
    }

    /// Of these directories, those whose names were given no timeout since `before`.
    pub fn marked_before(&self, dirs: impl Iterator<Item = Ino>, before: Instant) -> Vec<Ino> {
        let (now, marks) = (Instant::now(), self.marks.read());
        dirs.filter(|dir| marks.directory(*dir, now).is_some_and(|hot| hot.since <= before)).collect()
    }

    /// The kernel threw out all names it was given before `before`.
    pub fn swept(&self, dirs: &[Ino], before: Instant) {
        let mut marks = self.marks.write();
        for dir in dirs {
            if let Some(hot) = marks.directories.get_mut(dir).filter(|hot| hot.since <= before) {
                hot.swept = true;
            }
        }
    }

    /// Attributes or bytes of `ino` changed elsewhere.
    pub fn mark_inode(&self, ino: Ino) {
        let now = Instant::now();
        let mut marks = self.marks.write();
        marks.make_room(now);
        marks.inodes.insert(ino, now);
    }

    /// Whether the kernel may have the directory `ino` in a place where it is no more.
    pub fn may_have_moved(&self, ino: Ino) -> bool {
        let lately = |at: &Instant| at.elapsed() < INODE_STAYS_HOT;
        let marked = {
            let marks = self.marks.read();
            marks.inodes.get(&ino).is_some_and(lately) || marks.everything.is_some_and(|hot| lately(&hot.last))
        };
        marked && self.is_known(ino)
    }

    pub fn mark_everything(&self) {
        self.listings.all_changed();
        self.marks.write().mark_everything(Instant::now());
    }

    fn shard(&self, ino: Ino) -> &Mutex<HashMap<Ino, Known>> {
        &self.known[ino.0 as usize % SHARDS]
    }

    /// The kernel is about to learn of `ino` once more.
    pub fn looked_up(&self, ino: Ino, size: u64) {
        let mut known = self.shard(ino).lock();
        let one = known.entry(ino).or_default();
        one.lookups += 1;
        one.size = KernelSize { told: size, grown: size };
    }

    /// The kernel is told, or was, that a file has this size.
    pub fn told_size(&self, ino: Ino, size: u64) {
        if let Some(known) = self.shard(ino).lock().get_mut(&ino) {
            known.size = KernelSize { told: size, grown: size };
        }
    }

    /// The kernel wrote up to `end`.
    pub fn wrote(&self, ino: Ino, end: u64) {
        if let Some(known) = self.shard(ino).lock().get_mut(&ino) {
            known.size.grown = known.size.grown.max(end);
        }
    }

    pub fn size(&self, ino: Ino) -> Option<KernelSize> {
        self.shard(ino).lock().get(&ino).map(|known| known.size)
    }

    /// The kernel forgot `lookups` of those.
    pub fn forgotten(&self, ino: Ino, lookups: u64) {
        let mut known = self.shard(ino).lock();
        if let Some(one) = known.get_mut(&ino) {
            one.lookups = one.lookups.saturating_sub(lookups);
            if one.lookups == 0 {
                known.remove(&ino);
            }
        }
    }

    pub fn is_known(&self, ino: Ino) -> bool {
        ino == Ino::ROOT || self.shard(ino).lock().contains_key(&ino)
    }

    /// Every inode the kernel may keep something of.
    pub fn known(&self) -> Vec<Ino> {
        let shards = self.known.iter().flat_map(|shard| shard.lock().keys().copied().collect::<Vec<_>>());
        std::iter::once(Ino::ROOT).chain(shards).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_directory_changed_elsewhere_gives_no_entry_timeout() {
        let (caches, now) = (Caches::default(), Instant::now());
        assert_eq!(caches.mark_directory(Ino(5)), Kept::Nothing, "the kernel does not know it");
        caches.looked_up(Ino(5), 0);
        assert_eq!(caches.permits(SECOND, now).entry(Ino(5)), SECOND);
        let kept = caches.mark_directory(Ino(5));
        assert_eq!(caches.permits(SECOND, now).entry(Ino(5)), Duration::ZERO);
        assert_eq!(caches.permits(SECOND, now).entry(Ino(6)), SECOND);
        assert_eq!(caches.mark_directory(Ino(5)), kept, "it stays marked since the first change");
    }

    #[test]
    fn attributes_changed_elsewhere_since_the_kernel_asked_have_no_timeout() {
        let (caches, before) = (Caches::default(), Instant::now());
        caches.mark_inode(Ino(5));
        let after = Instant::now();
        assert_eq!(caches.permits(SECOND, before).attr(Ino(5)), Duration::ZERO);
        assert_eq!(caches.permits(SECOND, before).attr(Ino(6)), SECOND);
        assert_eq!(caches.permits(SECOND, after + Duration::from_nanos(1)).attr(Ino(5)), SECOND, "it sees the change");
    }

    #[test]
    fn of_a_directory_that_was_swept_the_kernel_keeps_nothing() {
        let (caches, now) = (Caches::default(), Instant::now());
        caches.looked_up(Ino(5), 0);
        caches.looked_up(Ino(6), 0);
        let Kept::Before(since) = caches.mark_directory(Ino(5)) else { panic!("nobody has swept it") };
        let earlier = since.checked_sub(SECOND).unwrap();
        let both = || [Ino(5), Ino(6)].into_iter();
        assert_eq!(caches.marked_before(both(), earlier), [], "replies given meanwhile may be on their way");
        caches.swept(&[Ino(5)], earlier);
        assert_eq!(caches.mark_directory(Ino(5)), Kept::Before(since));
        assert_eq!(caches.marked_before(both(), since), [Ino(5)]);
        caches.swept(&[Ino(5)], since);
        assert_eq!(caches.mark_directory(Ino(5)), Kept::Nothing);
        assert_ne!(caches.mark_directory(Ino(6)), Kept::Nothing);
        assert_eq!(caches.permits(SECOND, now).entry(Ino(5)), Duration::ZERO, "and it is given nothing new");
    }

    #[test]
    fn without_a_lease_nothing_has_a_timeout() {
        let caches = Caches::default();
        let permits = caches.permits(Duration::ZERO, Instant::now());
        assert_eq!((permits.entry(Ino(5)), permits.attr(Ino(5))), (Duration::ZERO, Duration::ZERO));
    }

    #[test]
    fn too_many_marks_become_one_for_everything() {
        let (caches, now) = (Caches::default(), Instant::now());
        for ino in 0..=MARKS_MAX as u64 {
            caches.mark_inode(Ino(ino));
        }
        let permits = caches.permits(SECOND, now);
        assert_eq!((permits.attr(Ino(u64::MAX)), permits.entry(Ino(7))), (Duration::ZERO, Duration::ZERO));
    }

    #[test]
    fn an_inode_is_known_until_every_lookup_is_forgotten() {
        let caches = Caches::default();
        caches.looked_up(Ino(9), 0);
        caches.looked_up(Ino(9), 0);
        caches.forgotten(Ino(9), 1);
        assert!(caches.is_known(Ino(9)));
        caches.forgotten(Ino(9), 1);
        assert!(!caches.is_known(Ino(9)) && caches.is_known(Ino::ROOT));
    }
}
