//! Open handles, and how often each inode is open here.
//!
//! One latch covers opening and the question which orphans are still open, so an inode without
//! names is either kept alive by an open handle or can never be opened on this server again.

use std::collections::{BTreeSet, HashMap, HashSet};

use ctfs_types::{
    Ino,
    rules::{Rule, keeps},
};
use parking_lot::Mutex;

use crate::FsError;

/// Names an open file or directory between the kernel and us; never 0, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HandleId(pub u64);

/// What was opened, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenMode {
    pub read: bool,
    pub write: bool,
    /// `O_APPEND`: the metadata place each write at the end.
    pub append: bool,
    /// The kernel is told to bypass its page cache. With `O_DIRECT` it does by itself, but then cuts
    /// the file off at what it takes for the end after a write that failed beyond it
    /// (`fuse_do_truncate`), and makes EIO of one that ended early.
    pub direct: bool,
}

impl OpenMode {
    pub const DIRECTORY: Self = Self { read: true, write: false, append: false, direct: false };

    pub fn from_flags(flags: i32) -> Self {
        let access = flags & libc::O_ACCMODE;
        Self {
            read: access != libc::O_WRONLY,
            write: access == libc::O_WRONLY || access == libc::O_RDWR,
            append: flags & libc::O_APPEND != 0,
            direct: flags & libc::O_DIRECT != 0,
        }
    }
}

#[derive(Debug)]
struct Handle {
    ino: Ino,
    mode: OpenMode,
    /// What the next fsync or close of this handle has to report, once.
    error: Option<FsError>,
    /// Lock owners that locked through this handle.
    lock_owners: BTreeSet<u64>,
    /// Its locks were given to others while this server was cut off: it must not go on.
    dead: bool,
}

impl Handle {
    fn is_in_use(&self) -> bool {
        self.mode.write || !self.lock_owners.is_empty()
    }
}

/// Handles open on this server.
#[derive(Debug)]
pub struct Handles {
    open_max: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    open: HashMap<u64, Handle>,
    by_inode: HashMap<Ino, BTreeSet<u64>>,
    /// Orphans of which we said that they are not open here. Emptied as they are reaped.
    barred: HashSet<Ino>,
}

impl Handles {
    pub fn new(open_max: usize) -> Self {
        Self { open_max, inner: Mutex::new(Inner { next: 1, ..Inner::default() }) }
    }

    /// Opens `ino`. `links` is asked under the latch; `None` means that the inode is gone.
    ///
    /// # Errors
    /// - [`FsError::Stale`]: the inode is gone, or has no name and is not open here.
    /// - [`FsError::TooMany`]: the table is full.
    pub fn open(
        &self,
        ino: Ino,
        mode: OpenMode,
        links: impl FnOnce() -> Result<Option<u32>, FsError>,
    ) -> Result<HandleId, FsError> {
        let mut inner = self.inner.lock();
        let open_here = inner.by_inode.contains_key(&ino);
        match links()? {
            _ if open_here => {}
            None | Some(0) => return Err(FsError::Stale(ino)),
            Some(_) if inner.barred.contains(&ino) => return Err(FsError::Stale(ino)),
            Some(_) => {}
        }
        if inner.open.len() >= self.open_max {
            return Err(FsError::TooMany("open files"));
        }
        let id = inner.next;
        inner.next += 1;
        inner.open.insert(id, Handle { ino, mode, error: None, lock_owners: BTreeSet::new(), dead: false });
        inner.by_inode.entry(ino).or_default().insert(id);
        Ok(HandleId(id))
    }

    /// Forgets the handle; answers how it was opened and which lock owners it leaves behind.
    pub fn close(&self, id: HandleId) -> Option<(Ino, OpenMode, BTreeSet<u64>)> {
        let mut inner = self.inner.lock();
        let handle = inner.open.remove(&id.0)?;
        if let Some(ids) = inner.by_inode.get_mut(&handle.ino) {
            ids.remove(&id.0);
            if ids.is_empty() {
                inner.by_inode.remove(&handle.ino);
            }
        }
        Some((handle.ino, handle.mode, handle.lock_owners))
    }

    /// # Errors
    /// - [`FsError::BadHandle`]: no such handle, or it belongs to another inode.
    /// - [`FsError::LostLocks`]: locks were held through it when this server's life was ended.
    pub fn mode(&self, id: HandleId, ino: Ino) -> Result<OpenMode, FsError> {
        match self.inner.lock().open.get(&id.0) {
            Some(handle) if handle.ino == ino && handle.dead => Err(FsError::LostLocks(ino)),
            Some(handle) if handle.ino == ino => Ok(handle.mode),
            _ => Err(FsError::BadHandle(id.0)),
        }
    }

    /// Remembers that `owner` may hold locks through this handle.
    pub fn locked(&self, id: HandleId, owner: u64) {
        if let Some(handle) = self.inner.lock().open.get_mut(&id.0) {
            handle.lock_owners.insert(owner);
        }
    }

    /// The owner's locks on `ino` are gone, through whichever handle they were taken.
    pub fn unlocked(&self, ino: Ino, owner: u64) {
        let mut inner = self.inner.lock();
        let Inner { open, by_inode, .. } = &mut *inner;
        for id in by_inode.get(&ino).into_iter().flatten() {
            if let Some(handle) = open.get_mut(id) {
                handle.lock_owners.remove(&owner);
            }
        }
    }

    /// Whether `owner` locked through any handle of `ino`.
    pub fn may_hold_locks(&self, ino: Ino, owner: u64) -> bool {
        let inner = self.inner.lock();
        let mut handles = inner.by_inode.get(&ino).into_iter().flatten().filter_map(|id| inner.open.get(id));
        handles.any(|handle| handle.lock_owners.contains(&owner))
    }

    /// This life of the server was ended: locks that were held have gone to others, and whoever
    /// believes to hold one must not go on. Nobody is left to unlock for.
    pub fn lose_locks(&self) {
        for handle in self.inner.lock().open.values_mut() {
            handle.dead |= !handle.lock_owners.is_empty();
            handle.lock_owners.clear();
        }
    }

    /// Lets every handle now open for writing on `ino` report `error` once.
    pub fn spread_error(&self, ino: Ino, error: &FsError) {
        let mut inner = self.inner.lock();
        let Inner { open, by_inode, .. } = &mut *inner;
        for id in by_inode.get(&ino).into_iter().flatten() {
            if let Some(handle) = open.get_mut(id).filter(|handle| handle.error.is_none()) {
                handle.error = Some(error.clone());
            }
        }
    }

    /// What this handle still has to report.
    pub fn take_error(&self, id: HandleId) -> Option<FsError> {
        self.inner.lock().open.get_mut(&id.0).and_then(|handle| handle.error.take())
    }

    pub fn is_open(&self, ino: Ino) -> bool {
        self.inner.lock().by_inode.contains_key(&ino)
    }

    pub fn is_open_for_writing(&self, ino: Ino) -> bool {
        let inner = self.inner.lock();
        let ids = inner.by_inode.get(&ino).into_iter().flatten();
        ids.filter_map(|id| inner.open.get(id)).any(|handle| handle.mode.write)
    }

    /// Whether the inode is open for writing here, or locks are held through one of its handles.
    pub fn is_in_use(&self, ino: Ino) -> bool {
        let inner = self.inner.lock();
        let ids = inner.by_inode.get(&ino).into_iter().flatten();
        ids.filter_map(|id| inner.open.get(id)).any(Handle::is_in_use)
    }

    /// Inodes that are open for writing here or through which locks are held, each once for each handle.
    pub fn in_use(&self) -> Vec<Ino> {
        let inner = self.inner.lock();
        inner.open.values().filter(|handle| handle.is_in_use()).map(|handle| handle.ino).collect()
    }

    /// For each inode whether it is open here. Those that are not are barred from being opened.
    pub fn open_orphans(&self, inos: &[Ino]) -> Vec<bool> {
        let mut inner = self.inner.lock();
        inos.iter()
            .map(|ino| {
                let open = inner.by_inode.contains_key(ino) && keeps(Rule::OpenInodesStay);
                if !open {
                    inner.barred.insert(*ino);
                }
                open
            })
            .collect()
    }

    /// The inode is gone; nothing needs to be remembered of it.
    pub fn reaped(&self, ino: Ino) {
        self.inner.lock().barred.remove(&ino);
    }

    pub fn all(&self) -> Vec<HandleId> {
        self.inner.lock().open.keys().map(|id| HandleId(*id)).collect()
    }

    pub fn count(&self) -> usize {
        self.inner.lock().open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RW: OpenMode = OpenMode { read: true, write: true, append: false, direct: false };

    #[test]
    fn an_orphan_is_opened_again_only_while_it_is_open() {
        let handles = Handles::new(10);
        let ino = Ino(7);
        let first = handles.open(ino, RW, || Ok(Some(1))).unwrap();
        let second = handles.open(ino, RW, || Ok(Some(0))).expect("open here, so it may be opened without a name");
        assert_eq!(handles.open_orphans(&[ino]), [true]);
        handles.close(first);
        handles.close(second);
        assert_eq!(handles.open(ino, RW, || Ok(Some(0))), Err(FsError::Stale(ino)));
    }

    #[test]
    fn an_inode_said_to_be_closed_can_never_be_opened_again_here() {
        let handles = Handles::new(10);
        assert_eq!(handles.open_orphans(&[Ino(7)]), [false]);
        assert_eq!(handles.open(Ino(7), RW, || Ok(Some(1))), Err(FsError::Stale(Ino(7))), "even from a stale replica");
    }

    #[test]
    fn each_handle_reports_a_lost_write_once() {
        let handles = Handles::new(10);
        let lost = FsError::LostWrites { ino: Ino(7), why: "disk".into() };
        let (a, b) = (handles.open(Ino(7), RW, || Ok(Some(1))).unwrap(), handles.open(Ino(7), RW, || Ok(Some(1))).unwrap());
        handles.spread_error(Ino(7), &lost);
        assert_eq!(handles.take_error(a), Some(lost.clone()));
        assert_eq!(handles.take_error(a), None);
        assert_eq!(handles.take_error(b), Some(lost));
    }

    #[test]
    fn a_full_table_refuses_and_loses_nobody() {
        let handles = Handles::new(1);
        let only = handles.open(Ino(7), RW, || Ok(Some(1))).unwrap();
        assert_eq!(handles.open(Ino(8), RW, || Ok(Some(1))), Err(FsError::TooMany("open files")));
        assert!(handles.mode(only, Ino(7)).is_ok());
        assert_eq!(handles.mode(only, Ino(8)), Err(FsError::BadHandle(only.0)));
    }
}
