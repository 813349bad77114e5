//! Programs on this server that wait for a lock, in the order in which they came.
//!
//! Nobody polls a lock. A waiter is woken when locks on its inode are freed anywhere, or when one
//! that stands before it leaves the queue. It tries again only if none before it wants a range
//! that excludes its own, so a stream of short locks cannot starve anybody here.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use ctfs_meta::Lock;
use ctfs_types::Ino;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::FsError;

/// All queues of this server.
#[derive(Debug)]
pub struct LockWaiters {
    waiting_max: usize,
    waiting: AtomicUsize,
    queues: Mutex<HashMap<Ino, Vec<Waiter>>>,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    lock: Lock,
    woken: Arc<Notify>,
}

/// A place in a queue; leaving it wakes those behind.
#[derive(Debug)]
pub struct Place<'a> {
    waiters: &'a LockWaiters,
    ino: Ino,
    ticket: u64,
    woken: Arc<Notify>,
}

impl LockWaiters {
    pub fn new(waiting_max: usize) -> Self {
        Self { waiting_max, waiting: AtomicUsize::new(0), queues: Mutex::default() }
    }

    /// Joins the queue of `ino`.
    ///
    /// # Errors
    /// [`FsError::NoLocks`]: too many wait on this server already.
    pub fn join(&self, ino: Ino, lock: Lock) -> Result<Place<'_>, FsError> {
        let mut queues = self.queues.lock();
        if self.waiting.load(Ordering::Relaxed) >= self.waiting_max {
            return Err(FsError::NoLocks);
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let queue = queues.entry(ino).or_default();
        let ticket = queue.last().map_or(1, |last| last.ticket + 1);
        let woken = Arc::new(Notify::new());
        queue.push(Waiter { ticket, lock, woken: woken.clone() });
        Ok(Place { waiters: self, ino, ticket, woken })
    }

    /// Locks on `ino` were freed somewhere.
    pub fn freed(&self, ino: Ino) {
        if let Some(queue) = self.queues.lock().get(&ino) {
            queue.iter().for_each(|waiter| waiter.woken.notify_one());
        }
    }

    /// Wakes everybody, for instance because the replica was replaced.
    pub fn wake_all(&self) {
        for queue in self.queues.lock().values() {
            queue.iter().for_each(|waiter| waiter.woken.notify_one());
        }
    }
}

impl Place<'_> {
    /// Returns when it is worth trying again. A wake-up between two calls is not lost.
    pub async fn woken(&self) {
        self.woken.notified().await;
    }

    /// Whether nobody who came earlier waits for something that excludes this lock.
    pub fn is_first(&self) -> bool {
        let queues = self.waiters.queues.lock();
        let Some(queue) = queues.get(&self.ino) else { return true };
        let Some(own) = queue.iter().find(|waiter| waiter.ticket == self.ticket) else { return true };
        !queue.iter().any(|other| other.ticket < self.ticket && excludes(&other.lock, &own.lock))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut queues = self.waiters.queues.lock();
        if let Some(queue) = queues.get_mut(&self.ino) {
            queue.retain(|waiter| waiter.ticket != self.ticket);
            queue.iter().filter(|waiter| waiter.ticket > self.ticket).for_each(|waiter| waiter.woken.notify_one());
            if queue.is_empty() {
                queues.remove(&self.ino);
            }
        }
        self.waiters.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether both cannot be held at once.
fn excludes(a: &Lock, b: &Lock) -> bool {
    a.owner != b.owner && a.kind == b.kind && (a.exclusive || b.exclusive) && a.start <= b.end && b.start <= a.end
}

#[cfg(test)]
mod tests {
    use ctfs_meta::{LockKind, LockOwner};
    use ctfs_types::{Incarnation, NodeId};

    use super::*;

    fn lock(owner: u64, start: u64, end: u64) -> Lock {
        let owner = LockOwner { node: NodeId(1), incarnation: Incarnation(1), owner };
        Lock { owner, kind: LockKind::Record, exclusive: true, start, end, pid: 1 }
    }

    #[test]
    fn the_first_to_wait_is_the_first_to_try() {
        let waiters = LockWaiters::new(10);
        let first = waiters.join(Ino(7), lock(1, 0, 9)).unwrap();
        let second = waiters.join(Ino(7), lock(2, 5, 20)).unwrap();
        let elsewhere = waiters.join(Ino(7), lock(3, 100, 200)).unwrap();
        assert!(first.is_first() && !second.is_first() && elsewhere.is_first());
        drop(first);
        assert!(second.is_first());
    }

    #[test]
    fn a_full_queue_refuses_and_a_left_place_is_free_again() {
        let waiters = LockWaiters::new(1);
        let place = waiters.join(Ino(7), lock(1, 0, 9)).unwrap();
        assert!(matches!(waiters.join(Ino(8), lock(2, 0, 9)), Err(FsError::NoLocks)));
        drop(place);
        assert!(waiters.join(Ino(8), lock(2, 0, 9)).is_ok());
    }

    #[tokio::test]
    async fn a_wake_up_before_the_wait_is_not_lost() {
        let waiters = LockWaiters::new(10);
        let place = waiters.join(Ino(7), lock(1, 0, 9)).unwrap();
        waiters.freed(Ino(7));
        tokio::time::timeout(std::time::Duration::from_secs(5), place.woken()).await.expect("woken");
    }
}
