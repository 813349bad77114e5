//! flock, fcntl and OFD locks across servers.
//!
//! The lock table is replicated state. A program that must wait stands in this server's queue and
//! tries again when locks on the file are freed anywhere; its signals are looked at meanwhile,
//! because the kernel's interrupt message does not reach us.
//!
//! `flock` arrives as a record lock over the whole file with an owner of its own: the kernel
//! interface in use drops the bit that tells them apart. So flock and fcntl locks of one file
//! exclude each other, also within one program, as they do over NFS.

use std::collections::BTreeSet;

use ctfs_meta::{Lock, LockKind, LockOwner, MetaError, Op};
use ctfs_types::Ino;
use tokio::sync::watch;

use super::Vfs;
use crate::{FsError, handles::HandleId};

/// Largest end offset the kernel sends; it means "to the end of the file" (`OFFSET_MAX`).
const KERNEL_END: u64 = i64::MAX as u64;

/// A byte range and who wants it, as the kernel asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockRequest {
    /// A number the kernel made for the process or the open file.
    pub owner: u64,
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive; `i64::MAX` and above mean to the end of the file.
    pub end: u64,
    /// Process, for `F_GETLK`.
    pub pid: u32,
}

impl Vfs {
    fn lock_owner(&self, owner: u64) -> LockOwner {
        LockOwner { node: self.meta.node(), incarnation: self.meta.incarnation(), owner }
    }

    fn lock(&self, request: LockRequest) -> Result<Lock, FsError> {
        if request.start > request.end {
            return Err(FsError::Invalid("lock range ends before it starts"));
        }
        let end = if request.end >= KERNEL_END { u64::MAX } else { request.end };
        Ok(Lock {
            owner: self.lock_owner(request.owner),
            kind: LockKind::Record,
            exclusive: request.exclusive,
            start: request.start,
            end,
            pid: request.pid,
        })
    }

    /// The first lock that `request` would have to wait for. Its process is 0 when it runs on
    /// another server, where its number would mean somebody else.
    pub async fn getlk(&self, ino: Ino, request: LockRequest) -> Result<Option<Lock>, FsError> {
        let lock = self.lock(request)?;
        let holder = self.read(|ns| Ok(ns.conflicting_lock(ino, &lock)?)).await?;
        Ok(holder.map(|mut holder| {
            if holder.owner.node != self.meta.node() {
                holder.pid = 0;
            }
            holder.end = holder.end.min(KERNEL_END);
            holder
        }))
    }

    /// Takes a lock. With `wait`, stands in the queue until it is free; `thread` is the thread whose
    /// signals end the wait.
    ///
    /// # Errors
    /// - [`MetaError::Locked`] (EAGAIN) without `wait`.
    /// - [`FsError::Interrupted`]: a signal reached the thread, or it is gone.
    /// - [`FsError::NoLocks`]: too many wait on this server.
    pub async fn setlk(
        &self,
        ino: Ino,
        handle: HandleId,
        request: LockRequest,
        wait: bool,
        thread: u32,
    ) -> Result<(), FsError> {
        let lock = self.lock(request)?;
        // Remembered before it is taken: a close after this point gives it back.
        self.handles.locked(handle, request.owner);
        let mut connection = self.connection.subscribe();
        connection.mark_unchanged();
        match self.try_lock(ino, &lock).await {
            Err(FsError::Meta(MetaError::Locked { .. })) if wait => {
                self.wait_for_lock(ino, &lock, thread, connection).await?;
            }
            decided => decided?,
        }
        if self.handles.mode(handle, ino).is_err() {
            // Closed or disconnected meanwhile; nobody will give it back but we.
            self.drop_left_locks(ino, BTreeSet::from([request.owner])).await;
            return Err(FsError::BadHandle(handle.0));
        }
        Ok(())
    }

    /// Stands in the queue until the lock is taken.
    async fn wait_for_lock(
        &self,
        ino: Ino,
        lock: &Lock,
        thread: u32,
        mut connection: watch::Receiver<u64>,
    ) -> Result<(), FsError> {
        let place = self.waiters.join(ino, lock.clone())?;
        loop {
            // Tried again before the first sleep: it may have been freed before we stood in line.
            if place.is_first() {
                match self.try_lock(ino, lock).await {
                    Err(FsError::Meta(MetaError::Locked { .. })) => {}
                    decided => return decided,
                }
            }
            loop {
                if connection.has_changed().unwrap_or(true) {
                    return Err(FsError::Shutdown);
                }
                if (self.settings.interrupted)(thread) {
                    return Err(FsError::Interrupted);
                }
                tokio::select! {
                    () = place.woken() => break,
                    _ = connection.changed() => return Err(FsError::Shutdown),
                    () = tokio::time::sleep(self.settings.interrupt_check) => {}
                }
            }
        }
    }

    /// Asks the local replica first: what is visibly locked needs no command to be refused.
    async fn try_lock(&self, ino: Ino, lock: &Lock) -> Result<(), FsError> {
        if let Some(holder) = self.read(|ns| Ok(ns.conflicting_lock(ino, lock)?)).await? {
            return Err(MetaError::Locked { holder: Box::new(holder) }.into());
        }
        self.meta.propose(Op::Lock { ino, lock: lock.clone() }).await.map(drop)
    }

    /// Gives back what the owner holds inside the range.
    pub async fn unlock(&self, ino: Ino, request: LockRequest) -> Result<(), FsError> {
        // Programs unlock to be sure, also what they never locked; a command each would be waste.
        if !self.handles.may_hold_locks(ino, request.owner) {
            return Ok(());
        }
        let Lock { owner, kind, start, end, .. } = self.lock(request)?;
        self.meta.propose(Op::Unlock { ino, owner, kind, start, end }).await.map(drop)
    }

    /// POSIX: closing any descriptor of a file drops the process's record locks on it.
    pub(super) async fn drop_locks_of(&self, ino: Ino, owner: u64) -> Result<(), FsError> {
        if !self.handles.may_hold_locks(ino, owner) {
            return Ok(());
        }
        self.meta.propose(Op::UnlockAll { ino, owner: self.lock_owner(owner) }).await?;
        self.handles.unlocked(ino, owner);
        Ok(())
    }

    /// What a closed handle leaves behind: flock and OFD locks, whose owner it was.
    pub(super) async fn drop_left_locks(&self, ino: Ino, owners: BTreeSet<u64>) {
        for owner in owners {
            let op = Op::UnlockAll { ino, owner: self.lock_owner(owner) };
            if let Err(error) = self.meta.propose(op).await {
                // Nobody is left to hear it. The locks end with this life of the server.
                tracing::warn!(%ino, %error, "locks of a closed file stay until this server restarts");
            }
        }
    }
}
