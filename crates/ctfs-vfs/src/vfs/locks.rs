//! flock, fcntl and OFD locks across servers.
//!
//! The lock table and the queues for it are replicated state. A program that must wait stands in
//! the queue there, and its thread sleeps until the entry that grants its lock is applied here. Its
//! signals are looked at meanwhile, because the kernel's interrupt message does not reach us.
//! [`lock_doubts`](super::lock_doubts) takes care of commands whose outcome is unknown.
//!
//! `flock` arrives as a record lock over the whole file with an owner of its own: the kernel
//! interface in use drops the bit that tells them apart. So flock and fcntl locks of one file
//! exclude each other, also within one program, as they do over NFS.

use std::{
    collections::BTreeSet,
    future::ready,
    time::{Duration, Instant},
};

use ctfs_meta::{Lock, LockKind, LockOwner, MetaError, Op, Reply};
use ctfs_types::Ino;
use tokio::{sync::watch, time::timeout};

use super::{
    Leaving, Vfs,
    lock_doubts::{self, Doubt, settle},
    unexpected,
};
use crate::{
    FsError,
    handles::HandleId,
    view::View,
    waiters::{Fate, Place},
};

/// How long a lock call that does not wait looks on while closed handles of the file are released.
const LEAVING_PATIENCE: Duration = Duration::from_secs(1);
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

    /// The first lock held that excludes `request`. Its process is 0 when it runs on another server,
    /// where its number would mean somebody else.
    pub async fn getlk(&self, ino: Ino, request: LockRequest) -> Result<Option<Lock>, FsError> {
        let lock = self.lock(request)?;
        let look = |view: &View<'_>| Ok(view.conflicting_lock(ino, &lock)?);
        let mut holder = self.read(look).await?;
        if self.may_be_leaving(ino, holder.as_ref()).await {
            holder = self.read(look).await?;
        }
        Ok(holder.map(|mut holder| {
            if holder.owner.node != self.meta.node() {
                holder.pid = 0;
            }
            holder.end = holder.end.min(KERNEL_END);
            holder
        }))
    }

    /// Takes a lock. With `wait`, stands in the queue until it is granted; `thread` is the thread
    /// whose signals end the wait.
    ///
    /// # Errors
    /// - [`MetaError::Locked`] (EAGAIN) without `wait`.
    /// - [`MetaError::Deadlock`] (EDEADLK): whoever is in the way waits for this owner.
    /// - [`FsError::Interrupted`]: a signal reached the thread, or it is gone; the owner did not get
    ///   the lock.
    /// - [`FsError::NoLocks`], [`MetaError::TooManyWaiters`] (ENOLCK): too many wait.
    /// - [`FsError::NoQuorum`]: what may come of it is given back as soon as somebody answers.
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
        let place = if wait { Some(self.waiters.join(lock.owner.incarnation)?) } else { None };
        self.take_lock(ino, lock, place, thread, connection).await?;
        if self.handles.mode(handle, ino).is_err() {
            // Closed or disconnected meanwhile; nobody will give it back but we.
            self.drop_left_locks(ino, BTreeSet::from([request.owner])).await;
            return Err(FsError::BadHandle(handle.0));
        }
        Ok(())
    }

    async fn take_lock(
        &self,
        ino: Ino,
        lock: Lock,
        place: Option<Place>,
        thread: u32,
        connection: watch::Receiver<u64>,
    ) -> Result<(), FsError> {
        let turn = self.turns.take(ino, lock.owner.owner, self.settings.lock_patience).await?;
        let look = |view: &View<'_>| {
            Ok((view.conflicting_lock(ino, &lock)?, held_before(view.locks(ino, lock.kind)?, &lock)))
        };
        let (mut holder, mut had) = self.read(look).await?;
        if place.is_none() && self.may_be_leaving(ino, holder.as_ref()).await {
            (holder, had) = self.read(look).await?;
        }
        let op = match (&place, holder) {
            // What is visibly locked needs no command to be refused.
            (None, Some(holder)) => return Err(MetaError::Locked { holder: Box::new(holder) }.into()),
            (None, None) => Op::Lock { ino, lock: lock.clone() },
            (Some(Place { ticket, .. }), _) => Op::AwaitLock { ino, lock: lock.clone(), ticket: *ticket },
        };
        let request = self.meta.request();
        match (request.propose(op).await, place) {
            (Ok(Reply::Locked), _) => Ok(()),
            (Ok(Reply::Queued), Some(place)) => {
                drop(turn);
                // Answered: its verdict need not be remembered for as long as the lock is waited for.
                drop(request);
                self.wait_for_lock(ino, lock, had, place, thread, connection).await
            }
            (Ok(other), _) => Err(unexpected(&other)),
            (Err(error), place) => {
                if error.is_doubtful() {
                    settle(self.meta.clone(), ino, Doubt::Taking { request, lock, had, place }, ready(turn));
                }
                Err(error)
            }
        }
    }

    /// The kernel is about to release a handle of the file, and its notice of that.
    #[must_use = "what is asked without waiting finds the locks of the handle in its way, else"]
    pub fn leaving(&self, ino: Ino) -> Leaving {
        self.leavings.begin(ino)
    }

    /// Whether a lock in the way may have been that of a closed handle; it is given back, if so.
    async fn may_be_leaving(&self, ino: Ino, holder: Option<&Lock>) -> bool {
        let here = holder.is_some_and(|holder| holder.owner.node == self.meta.node());
        here && timeout(LEAVING_PATIENCE, self.leavings.wait(ino)).await.unwrap_or(true)
    }

    /// Sleeps until the lock is granted or there is a reason to wait no longer.
    async fn wait_for_lock(
        &self,
        ino: Ino,
        lock: Lock,
        had: Vec<Lock>,
        mut place: Place,
        thread: u32,
        mut connection: watch::Receiver<u64>,
    ) -> Result<(), FsError> {
        let mut overtakes_at = Instant::now() + self.settings.reader_patience;
        let why = loop {
            match place.fate() {
                Fate::Granted => return self.see_grant(ino, lock, had).await,
                Fate::Ended => return Err(MetaError::StaleIncarnation.into()),
                Fate::Waiting => {}
                Fate::Unknown => match self.read(|view| Ok(view.waits_for_lock(ino, lock.owner, place.ticket)?)).await {
                    Ok(true) => place.still_waits(),
                    // Leaving the queue tells what became of it.
                    Ok(false) => break FsError::Interrupted,
                    Err(error) => break error,
                },
            }
            if connection.has_changed().unwrap_or(true) {
                break FsError::Shutdown;
            }
            if (self.settings.interrupted)(thread) {
                break FsError::Interrupted;
            }
            if !lock.exclusive && self.overtakes(ino, &lock, &place, overtakes_at) {
                overtakes_at = Instant::now() + self.settings.reader_patience;
            }
            tokio::select! {
                () = place.news() => {}
                _ = connection.changed() => break FsError::Shutdown,
                () = tokio::time::sleep(self.settings.interrupt_check) => {}
            }
        };
        self.leave_queue(ino, lock, had, place, why).await
    }

    /// Has a reader let past waiting writers when they alone have kept it out until `due`: the
    /// program that holds the lock may wait for this one. What comes of it the place hears. Whether
    /// the time starts anew.
    fn overtakes(&self, ino: Ino, lock: &Lock, place: &Place, due: Instant) -> bool {
        if !matches!(self.meta.replica().read().conflicting_lock(ino, lock), Ok(None)) {
            return true;
        }
        if Instant::now() < due {
            return false;
        }
        let (meta, op) = (self.meta.clone(), Op::Overtake { ino, owner: lock.owner, ticket: place.ticket });
        tokio::spawn(async move {
            if let Err(error) = meta.propose(op).await {
                tracing::debug!(%ino, %error, "a reader was not let past");
            }
        });
        true
    }

    /// The entry that granted the lock is applied here. What came before it may still be on its way
    /// to the kernel, so this returns when all servers are there, as after any other command.
    async fn see_grant(&self, ino: Ino, lock: Lock, had: Vec<Lock>) -> Result<(), FsError> {
        let seen = self.meta.propose(Op::Noop).await.map(drop);
        if seen.is_err() {
            let mut turn = Box::pin(self.turns.wait(ino, lock.owner.owner));
            // Polled once here, so that it comes before what the owner does next.
            match timeout(std::time::Duration::ZERO, &mut turn).await {
                Ok(turn) => settle(self.meta.clone(), ino, Doubt::Held { lock, had }, ready(turn)),
                Err(_) => settle(self.meta.clone(), ino, Doubt::Held { lock, had }, turn),
            }
        }
        seen
    }

    /// Waits no longer. A grant that came first stands: the call has its lock, and a signal finds
    /// the program after it.
    async fn leave_queue(&self, ino: Ino, lock: Lock, mut had: Vec<Lock>, place: Place, why: FsError) -> Result<(), FsError> {
        let request = self.meta.request();
        let mut turn = Box::pin(self.turns.wait(ino, lock.owner.owner));
        let Ok(turn) = timeout(self.settings.lock_patience, &mut turn).await else {
            settle(self.meta.clone(), ino, Doubt::Waiting { request, lock, had, place }, turn);
            return Err(why);
        };
        {
            let ns = self.meta.replica().read();
            if ns.waits_for_lock(ino, lock.owner, place.ticket)? {
                had = held_before(ns.locks(ino, lock.kind)?, &lock);
            }
        }
        match request.propose(lock_doubts::withdraw(ino, &lock, &place)).await {
            Ok(_) => Err(why),
            Err(FsError::Meta(MetaError::NotWaiting)) => {
                drop(turn);
                self.see_grant(ino, lock, had).await
            }
            Err(FsError::Meta(verdict)) if verdict != MetaError::Answered => Err(verdict.into()),
            Err(_) => {
                settle(self.meta.clone(), ino, Doubt::Waiting { request, lock, had, place }, ready(turn));
                Err(why)
            }
        }
    }

    /// Gives back what the owner holds inside the range.
    ///
    /// # Errors
    /// [`FsError::NoQuorum`]: it happens as soon as somebody answers.
    pub async fn unlock(&self, ino: Ino, request: LockRequest) -> Result<(), FsError> {
        // Programs unlock to be sure, also what they never locked; a command each would be waste.
        if !self.handles.may_hold_locks(ino, request.owner) {
            return Ok(());
        }
        let Lock { owner, kind, start, end, .. } = self.lock(request)?;
        self.release_locks(ino, request.owner, Op::Unlock { ino, owner, kind, start, end }).await
    }

    /// POSIX: closing any descriptor of a file drops the process's record locks on it.
    pub(super) async fn drop_locks_of(&self, ino: Ino, owner: u64) -> Result<(), FsError> {
        if !self.handles.may_hold_locks(ino, owner) {
            return Ok(());
        }
        self.release_locks(ino, owner, Op::UnlockAll { ino, owner: self.lock_owner(owner) }).await?;
        self.handles.unlocked(ino, owner);
        Ok(())
    }

    /// What a closed handle leaves behind: flock and OFD locks, whose owner it was.
    pub(super) async fn drop_left_locks(&self, ino: Ino, owners: BTreeSet<u64>) {
        for owner in owners {
            let op = Op::UnlockAll { ino, owner: self.lock_owner(owner) };
            if let Err(error) = self.release_locks(ino, owner, op).await {
                // Nobody is left to hear it.
                tracing::warn!(%ino, %error, "locks of a closed file stay until a majority answers");
            }
        }
    }

    /// Happens in any case, unless it is refused; the answer says whether it has.
    async fn release_locks(&self, ino: Ino, owner: u64, op: Op) -> Result<(), FsError> {
        let request = self.meta.request();
        let mut turn = Box::pin(self.turns.wait(ino, owner));
        let patience = self.settings.lock_patience;
        let Ok(turn) = timeout(patience, &mut turn).await else {
            settle(self.meta.clone(), ino, Doubt::Releasing { request, op }, turn);
            return Err(FsError::NoQuorum { waited: patience });
        };
        let released = request.propose(op.clone()).await.map(drop);
        if released.as_ref().is_err_and(FsError::is_doubtful) {
            settle(self.meta.clone(), ino, Doubt::Releasing { request, op }, ready(turn));
        }
        released
    }
}

/// What the owner of `lock` holds in its range.
fn held_before(mut held: Vec<Lock>, lock: &Lock) -> Vec<Lock> {
    held.retain(|held| held.owner == lock.owner && held.start <= lock.end && lock.start <= held.end);
    held
}
