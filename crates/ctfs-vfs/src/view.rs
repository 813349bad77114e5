//! The replica as an operation looks at it: every look is noted, so that no answer tells what other
//! servers may not show yet (scenario 2 of the coherence notes), and none what another server alone knows.

use std::cell::Cell as Slot;

use ctfs_meta::{DirEntry, EffectivePolicy, Lock, LockKind, LockOwner, MetaError, Namespace, Quota, Subject, Totals};
use ctfs_types::{Attr, FileKind, FileName, Holder, Ino, LogIndex};

use crate::{FsError, Metadata};

/// The local replica, under its lock.
pub(crate) struct View<'a> {
    ns: &'a Namespace,
    /// Asked what may not be shown yet; there while the replica is ahead of what is visible.
    meta: Option<(&'a dyn Metadata, LogIndex)>,
    me: Holder,
    newest: Slot<LogIndex>,
    /// Nobody can be asked, and nobody is.
    is_past: bool,
}

type Read<T> = Result<T, FsError>;

impl<'a> View<'a> {
    pub fn new(meta: &'a dyn Metadata, ns: &'a Namespace) -> Self {
        Self { ns, meta: meta.ahead().map(|ahead| (meta, ahead)), me: meta.holder(), newest: Slot::new(LogIndex(0)), is_past: false }
    }

    /// Of what this server knew last.
    pub fn past(meta: &'a dyn Metadata, ns: &'a Namespace) -> Self {
        Self { ns, meta: None, me: meta.holder(), newest: Slot::new(LogIndex(0)), is_past: true }
    }

    /// The last change of what was looked at, if not every server has it.
    pub fn newest_unseen(&self) -> Option<LogIndex> {
        Some(self.newest.get()).filter(|newest| newest.0 > 0)
    }

    /// Whether only this server can have changed the inode, so that whoever looks at it elsewhere asks this
    /// server first: once everybody knows that it holds the directory.
    ///
    /// # Errors
    /// [`MetaError::Held`]: another server alone knows, because it holds the directory that is named.
    fn is_known_here_alone(&self, ino: Ino) -> Result<bool, FsError> {
        if self.is_past {
            return Ok(true);
        }
        match self.ns.cover(ino)? {
            Some((dir, holder)) if holder == self.me => Ok(!self.ns.is_on_the_way(dir) && !self.ns.is_between(ino)),
            Some((dir, holder)) => Err(MetaError::Held { ino: dir, holder }.into()),
            None => Ok(false),
        }
    }

    fn look(&self, ino: Ino, subject: impl FnOnce() -> Subject) -> Result<(), FsError> {
        if self.is_known_here_alone(ino)? {
            return Ok(());
        }
        if let Some((meta, _)) = self.meta
            && let Some(change) = meta.unseen_change(&subject())
        {
            self.newest.set(self.newest.get().max(change));
        }
        Ok(())
    }

    /// Looks at what changes without a [`ctfs_meta::Change`] of its own.
    fn look_at_all(&self) {
        if let Some((_, ahead)) = self.meta {
            self.newest.set(self.newest.get().max(ahead));
        }
    }

    pub fn lookup(&self, parent: Ino, name: &FileName) -> Read<Option<Ino>> {
        self.look(parent, || Subject::Name(parent, name.clone()))?;
        Ok(self.ns.lookup(parent, name)?)
    }

    pub fn attr(&self, ino: Ino) -> Read<Option<Attr>> {
        self.look(ino, || Subject::Inode(ino))?;
        Ok(self.ns.attr(ino)?)
    }

    /// # Errors
    /// [`FsError::Stale`]: there is no such inode.
    pub fn attr_of(&self, ino: Ino) -> Result<Attr, FsError> {
        self.attr(ino)?.ok_or(FsError::Stale(ino))
    }

    /// What kind of inode it is, which does not change while it lives.
    pub fn kind(&self, ino: Ino) -> Read<Option<FileKind>> {
        let kind = self.ns.attr(ino)?.map(|attr| attr.kind);
        if kind.is_none() {
            self.look(ino, || Subject::Inode(ino))?;
        }
        Ok(kind)
    }

    pub fn parent(&self, dir: Ino) -> Read<Option<Ino>> {
        self.look(dir, || Subject::Inode(dir))?;
        Ok(self.ns.parent(dir)?)
    }

    pub fn list(&self, dir: Ino, after: u64, limit: usize) -> Read<Vec<DirEntry>> {
        self.look(dir, || Subject::Names(dir))?;
        Ok(self.ns.list(dir, after, limit)?)
    }

    pub fn readlink(&self, ino: Ino) -> Read<Option<Vec<u8>>> {
        self.look(ino, || Subject::Inode(ino))?;
        Ok(self.ns.readlink(ino)?)
    }

    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Read<Option<Vec<u8>>> {
        self.look(ino, || Subject::Inode(ino))?;
        Ok(self.ns.xattr(ino, name)?)
    }

    pub fn xattr_names(&self, ino: Ino) -> Read<Vec<Vec<u8>>> {
        self.look(ino, || Subject::Inode(ino))?;
        Ok(self.ns.xattr_names(ino)?)
    }

    pub fn quota(&self, dir: Ino) -> Read<Quota> {
        self.look(dir, || Subject::Inode(dir))?;
        Ok(self.ns.quota(dir)?)
    }

    pub fn policy(&self, ino: Ino) -> Read<EffectivePolicy> {
        self.look_at_all();
        Ok(self.ns.effective_policy(ino)?)
    }

    pub fn totals(&self, dir: Ino) -> Read<Option<Totals>> {
        self.look_at_all();
        Ok(self.ns.totals(dir)?)
    }

    pub fn conflicting_lock(&self, ino: Ino, lock: &Lock) -> Read<Option<Lock>> {
        if !self.is_known_here_alone(ino)? {
            self.look_at_all();
        }
        Ok(self.ns.conflicting_lock(ino, lock)?)
    }

    /// Only decides what to ask next: nothing of it is told.
    pub fn locks(&self, ino: Ino, kind: LockKind) -> Read<Vec<Lock>> {
        Ok(self.ns.locks(ino, kind)?)
    }

    /// As [`Self::locks`].
    pub fn waits_for_lock(&self, ino: Ino, owner: LockOwner, ticket: u64) -> Read<bool> {
        Ok(self.ns.waits_for_lock(ino, owner, ticket)?)
    }
}
