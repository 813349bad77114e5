//! Threads on this server that wait for a lock.
//!
//! Their places in the queues are replicated state; here stands whom to wake. Nobody polls a lock
//! and nobody tries again: the entry that grants one names the ticket of its waiter.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use ctfs_types::Incarnation;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::FsError;

/// What is known of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Waiting,
    /// The replica was replaced as a whole: it must be asked.
    Unknown,
    Granted,
    /// Nobody will grant it any more.
    Ended,
}

/// All who wait on this server.
#[derive(Debug)]
pub struct LockWaiters {
    waiting_max: usize,
    next: AtomicU64,
    /// By life and ticket: the namespace may still decide about tickets of an ended life.
    waiting: Mutex<HashMap<(Incarnation, u64), watch::Sender<Fate>>>,
}

/// A ticket, and news of it.
#[derive(Debug)]
pub struct Place {
    waiters: Arc<LockWaiters>,
    life: Incarnation,
    pub ticket: u64,
    fate: watch::Receiver<Fate>,
}

impl LockWaiters {
    pub fn new(waiting_max: usize) -> Arc<Self> {
        Arc::new(Self { waiting_max, next: AtomicU64::new(1), waiting: Mutex::default() })
    }

    /// Makes a ticket that `life` of this server never made before. It comes before the command
    /// that names it, so no news of it are missed.
    ///
    /// # Errors
    /// [`FsError::NoLocks`]: too many wait on this server already.
    pub fn join(self: &Arc<Self>, life: Incarnation) -> Result<Place, FsError> {
        let mut waiting = self.waiting.lock();
        if waiting.len() >= self.waiting_max {
            return Err(FsError::NoLocks);
        }
        let ticket = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, fate) = watch::channel(Fate::Waiting);
        waiting.insert((life, ticket), sender);
        Ok(Place { waiters: self.clone(), life, ticket, fate })
    }

    /// An applied entry decided about a ticket of this server.
    pub fn decided(&self, life: Incarnation, ticket: u64, fate: Fate) {
        if let Some(sender) = self.waiting.lock().get(&(life, ticket)) {
            sender.send_replace(fate);
        }
    }

    /// The replica was replaced, and what it decided in between was told to nobody.
    pub fn replaced(&self) {
        for sender in self.waiting.lock().values() {
            sender.send_if_modified(|fate| {
                let waits = *fate == Fate::Waiting;
                if waits {
                    *fate = Fate::Unknown;
                }
                waits
            });
        }
    }
}

impl Place {
    pub fn fate(&self) -> Fate {
        *self.fate.borrow()
    }

    /// The replica says that this ticket still waits.
    pub fn still_waits(&self) {
        if let Some(sender) = self.waiters.waiting.lock().get(&(self.life, self.ticket)) {
            sender.send_if_modified(|fate| {
                if *fate == Fate::Unknown {
                    *fate = Fate::Waiting;
                }
                false
            });
        }
    }

    /// Returns when there is something to look at, at once if there is already.
    pub async fn news(&mut self) {
        // The sender lives as long as this place.
        let _ = self.fate.wait_for(|fate| *fate != Fate::Waiting).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.waiters.waiting.lock().remove(&(self.life, self.ticket));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Incarnation = Incarnation(9);

    #[test]
    fn a_full_table_refuses_and_a_left_place_is_free_again() {
        let waiters = LockWaiters::new(1);
        let place = waiters.join(LIFE).unwrap();
        let ticket = place.ticket;
        assert!(matches!(waiters.join(LIFE), Err(FsError::NoLocks)));
        drop(place);
        assert!(waiters.join(LIFE).unwrap().ticket > ticket, "no ticket is made twice");
    }

    #[tokio::test]
    async fn news_before_the_wait_are_not_lost() {
        let waiters = LockWaiters::new(10);
        let mut place = waiters.join(LIFE).unwrap();
        waiters.decided(Incarnation(8), place.ticket, Fate::Ended);
        waiters.decided(LIFE, place.ticket, Fate::Granted);
        waiters.replaced();
        place.news().await;
        assert_eq!(place.fate(), Fate::Granted, "a decision stands");
    }
}
