//! Commands about locks, one at a time for each owner and inode, and none in doubt.
//!
//! A command that found no majority in time may still happen. A lock that came about in this way
//! would belong to nobody who knows of it. So whoever proposes such a command holds the owner's
//! [`Turn`], and where the outcome stays unknown the turn goes to a task that finds it out: what
//! was to be taken is given back, what was to be given back is. The owner's next command waits
//! until that is done.

use std::{collections::HashMap, sync::Arc, time::Duration};

use ctfs_meta::{Lock, MetaError, Op, Reply};
use ctfs_types::Ino;
use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

use crate::{FsError, Metadata, Request, waiters::Place};

/// How long the task rests between two tries; each of them waits for a majority itself.
const REST: Duration = Duration::from_millis(500);

type Latches = Mutex<HashMap<(Ino, u64), Arc<tokio::sync::Mutex<()>>>>;

/// Who is in the middle of a command.
#[derive(Debug, Default)]
pub struct Turns(Arc<Latches>);

/// The right to propose commands about one owner's locks on one inode.
#[derive(Debug)]
pub struct Turn {
    latches: Arc<Latches>,
    key: (Ino, u64),
    latch: Option<Arc<tokio::sync::Mutex<()>>>,
    held: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    /// # Errors
    /// [`FsError::NoQuorum`]: an earlier command of the owner is still in doubt.
    pub async fn take(&self, ino: Ino, owner: u64, patience: Duration) -> Result<Turn, FsError> {
        let turn = tokio::time::timeout(patience, self.wait(ino, owner)).await;
        turn.map_err(|_| FsError::NoQuorum { waited: patience })
    }

    /// The turn, however long it takes; they are had in the order in which these are polled first.
    pub fn wait(&self, ino: Ino, owner: u64) -> impl Future<Output = Turn> + Send + 'static {
        let latches = self.0.clone();
        async move {
            let key = (ino, owner);
            let latch = latches.lock().entry(key).or_default().clone();
            // Made before it is had, so that the table is left clean if nobody waits for it longer.
            let mut turn = Turn { latches, key, latch: Some(latch.clone()), held: None };
            turn.held = Some(latch.lock_owned().await);
            turn
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut latches = self.latches.lock();
        self.held = None;
        self.latch = None;
        // The table's own is the last one.
        if latches.get(&self.key).is_some_and(|latch| Arc::strong_count(latch) == 1) {
            latches.remove(&self.key);
        }
    }
}

/// What is to be settled before the owner goes on.
pub enum Doubt {
    /// Whether a lock was taken, or is waited for at a place.
    Taking { request: Arc<dyn Request>, lock: Lock, had: Vec<Lock>, place: Option<Place> },
    /// A place was to be left that may have become a lock.
    Waiting { request: Arc<dyn Request>, lock: Lock, had: Vec<Lock>, place: Place },
    /// A lock is held of which its owner knows nothing.
    Held { lock: Lock, had: Vec<Lock> },
    /// Whether locks were given back.
    Releasing { request: Arc<dyn Request>, op: Op },
}

/// Settles the doubt, however long it takes, and ends the turn. Ends early when this server does:
/// its locks end with its life.
pub fn settle(meta: Arc<dyn Metadata>, ino: Ino, doubt: Doubt, turn: impl Future<Output = Turn> + Send + 'static) {
    tokio::spawn(async move {
        let turn = turn.await;
        let settled = Settling { meta: &*meta, ino }.settle(doubt).await;
        if settled.is_none() {
            tracing::debug!(%ino, "a lock command stays in doubt, as this life of the server ends");
        }
        drop(turn);
    });
}

struct Settling<'a> {
    meta: &'a dyn Metadata,
    ino: Ino,
}

impl Settling<'_> {
    /// `None`: this server stops.
    async fn settle(&self, doubt: Doubt) -> Option<()> {
        match doubt {
            Doubt::Releasing { request, op } => self.carry_through(&*request, op).await.map(drop),
            Doubt::Held { lock, had } => self.give_back(&lock, &had).await,
            Doubt::Waiting { request, lock, had, place } => self.leave(&*request, &lock, &had, &place).await,
            Doubt::Taking { request, lock, had, place } => match (self.carry_through(&*request, Op::Noop).await?, place) {
                (Ok(Reply::Locked), _) => self.give_back(&lock, &had).await,
                (Ok(Reply::Queued) | Err(MetaError::Answered), Some(place)) => {
                    self.leave(&*self.meta.request(), &lock, &had, &place).await
                }
                (Err(MetaError::Answered), None) => self.give_back(&lock, &had).await,
                // Refused, or it never happens.
                _ => Some(()),
            },
        }
    }

    async fn leave(&self, request: &dyn Request, lock: &Lock, had: &[Lock], place: &Place) -> Option<()> {
        match self.carry_through(request, withdraw(self.ino, lock, place)).await? {
            Err(MetaError::NotWaiting | MetaError::Answered) => self.give_back(lock, had).await,
            _ => Some(()),
        }
    }

    /// Lets the owner hold in the lock's range what it held before, or less where it holds less:
    /// nobody is asked for anything, so nothing can stand in the way.
    async fn give_back(&self, lock: &Lock, had: &[Lock]) -> Option<()> {
        for op in giving_back(self.ino, lock, had) {
            // A refusal says that inode or life are gone, and the lock with them.
            let _ = self.carry_through(&*self.meta.request(), op).await?;
        }
        Some(())
    }

    /// Proposes until somebody answers; under one request, so it happens once.
    async fn carry_through(&self, request: &dyn Request, op: Op) -> Option<Result<Reply, MetaError>> {
        loop {
            match request.propose(op.clone()).await {
                Ok(reply) => return Some(Ok(reply)),
                Err(FsError::Meta(verdict)) => return Some(Err(verdict)),
                Err(FsError::Shutdown) => return None,
                Err(_) => tokio::time::sleep(REST).await,
            }
        }
    }
}

pub fn withdraw(ino: Ino, lock: &Lock, place: &Place) -> Op {
    Op::WithdrawLock { ino, owner: lock.owner, ticket: place.ticket }
}

/// The commands after which the owner holds nothing in the range of `lock` but `had`, or what is
/// weaker of both. Exclusive locks that were to become shared stay shared: others may have come in.
fn giving_back(ino: Ino, lock: &Lock, had: &[Lock]) -> Vec<Op> {
    let unlock = |start, end| Op::Unlock { ino, owner: lock.owner, kind: lock.kind, start, end };
    let mut ops = Vec::new();
    // First byte that nothing was said of yet; `None` behind the last byte there is.
    let mut next = Some(lock.start);
    for part in had {
        let (start, end) = (part.start.max(lock.start), part.end.min(lock.end));
        match next {
            Some(next) if next < start => ops.push(unlock(next, start - 1)),
            _ => {}
        }
        if lock.exclusive && !part.exclusive {
            ops.push(Op::Lock { ino, lock: Lock { start, end, exclusive: false, ..lock.clone() } });
        }
        next = end.checked_add(1);
    }
    if let Some(next) = next.filter(|next| *next <= lock.end) {
        ops.push(unlock(next, lock.end));
    }
    ops
}

#[cfg(test)]
mod tests {
    use ctfs_meta::{LockKind, LockOwner};
    use ctfs_types::{Incarnation, NodeId};

    use super::*;

    const OWNER: LockOwner = LockOwner { node: NodeId(1), incarnation: Incarnation(1), owner: 7 };

    fn lock(exclusive: bool, start: u64, end: u64) -> Lock {
        Lock { owner: OWNER, kind: LockKind::Record, exclusive, start, end, pid: 1 }
    }

    #[test]
    fn what_was_held_before_is_what_is_left() {
        let ino = Ino(9);
        let unlock = |start, end| Op::Unlock { ino, owner: OWNER, kind: LockKind::Record, start, end };
        let all = lock(true, 0, u64::MAX);
        assert_eq!(giving_back(ino, &all, &[]), [unlock(0, u64::MAX)]);
        let had = [lock(false, 10, 19), lock(true, 30, u64::MAX)];
        let shared = Op::Lock { ino, lock: lock(false, 10, 19) };
        assert_eq!(giving_back(ino, &all, &had), [unlock(0, 9), shared, unlock(20, 29)]);
        assert_eq!(giving_back(ino, &lock(false, 5, 12), &[lock(true, 0, 12)]), []);
        assert_eq!(giving_back(ino, &lock(true, 5, 12), &[lock(false, 0, 99)]), [Op::Lock { ino, lock: lock(false, 5, 12) }]);
    }

    #[tokio::test]
    async fn a_turn_is_had_by_one_and_leaves_nothing_behind() {
        let turns = Turns::default();
        let (short, long) = (Duration::from_millis(1), Duration::from_secs(60));
        let first = turns.take(Ino(1), 7, long).await.unwrap();
        assert!(matches!(turns.take(Ino(1), 7, short).await, Err(FsError::NoQuorum { .. })));
        let other = turns.take(Ino(1), 8, long).await.expect("another owner");
        drop((first, other));
        drop(turns.take(Ino(1), 7, long).await.expect("free again"));
        assert!(turns.0.lock().is_empty());
    }
}
