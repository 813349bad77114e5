//! Locks: fcntl, OFD and flock, for all servers in one table per inode, and who waits for them.
//!
//! Whoever shall wait is part of the state, too: a queue per inode, in the order in which they
//! came, whatever their server. A command that frees something grants in the same step what can be
//! granted then, and only those who got something are told.
//!
//! Of those who wait nobody overtakes: a request that an earlier waiter excludes waits behind it, so
//! a stream of short locks starves nobody. Bytes that an owner already holds are an exception, because
//! whoever waits for them waits for it. Another is a reader that asks to be let past the writers
//! ([`Op::Overtake`](crate::Op::Overtake)): who holds the lock may wait for it in a way that no owner
//! shows. Whoever does not wait at all is refused for what is held alone, as on a local disk.

use std::collections::{BTreeMap, BTreeSet};

use ctfs_types::{Incarnation, Ino};
use serde::{Deserialize, Serialize};

use super::{Apply, keys, txn::Outcome};
use crate::{Change, Lock, LockKind, LockOwner, MetaError, Reply, StoreError};

/// Waiters of one inode. Each command about its locks looks at all of them, for each pair of them
/// once: at this number some milliseconds.
pub const WAITERS_MAX: usize = 1024;
/// Waiters of one life of a server: a thread there for each.
pub const WAITERS_OF_LIFE_MAX: u64 = 4096;
/// Queues that are looked through before a search for deadlocks; most often there are fewer.
const QUEUES_AT_ONCE: usize = 8;

/// A lock that is waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    pub lock: Lock,
    /// How the owner's server calls it.
    pub ticket: u64,
}

/// What is held of an inode, sorted, and waited for, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Table {
    held: Vec<Lock>,
    waiting: Vec<Wish>,
}

/// Whether two locks cannot be held together.
fn conflict(a: &Lock, b: &Lock) -> bool {
    a.kind == b.kind && a.owner != b.owner && (a.exclusive || b.exclusive) && a.start <= b.end && b.start <= a.end
}

/// What keeps `lock` from being granted: locks held, then those who wait ahead of it.
pub fn blockers<'a>(held: &'a [Lock], ahead: &'a [Wish], lock: &'a Lock) -> impl Iterator<Item = &'a Lock> {
    let unheld = if ahead.is_empty() { Vec::new() } else { unheld(held, lock) };
    let behind = move |wish: &&Wish| unheld.iter().any(|part| conflict(&wish.lock, part));
    held.iter().filter(|held| conflict(held, lock)).chain(ahead.iter().filter(behind).map(|wish| &wish.lock))
}

/// The parts of `lock` of which its owner holds nothing yet.
fn unheld(held: &[Lock], lock: &Lock) -> Vec<Lock> {
    let own = held.iter().filter(|held| held.kind == lock.kind && held.owner == lock.owner);
    own.fold(vec![lock.clone()], |parts, own| parts.iter().flat_map(|part| without(part, own.start, own.end)).collect())
}

/// Takes `[start, end]` out of a lock; what is left may be nothing, one piece or two.
fn without(lock: &Lock, start: u64, end: u64) -> Vec<Lock> {
    if lock.end < start || end < lock.start {
        return vec![lock.clone()];
    }
    let mut left = Vec::new();
    if lock.start < start {
        left.push(Lock { end: start - 1, ..lock.clone() });
    }
    if lock.end > end {
        left.push(Lock { start: end + 1, ..lock.clone() });
    }
    left
}

/// The locks held after `lock` was granted: it replaces what its owner held in the range, and
/// joins neighbours of the same strength, as POSIX fcntl() says.
fn granted(held: &[Lock], lock: &Lock) -> Vec<Lock> {
    let own = |other: &Lock| other.kind == lock.kind && other.owner == lock.owner;
    let mut rest: Vec<Lock> =
        held.iter().flat_map(|other| if own(other) { without(other, lock.start, lock.end) } else { vec![other.clone()] }).collect();
    let mut joined = lock.clone();
    rest.retain(|other| {
        let touches = other.start <= joined.end.saturating_add(1) && joined.start <= other.end.saturating_add(1);
        let joins = own(other) && other.exclusive == lock.exclusive && touches;
        if joins {
            joined.start = joined.start.min(other.start);
            joined.end = joined.end.max(other.end);
        }
        !joins
    });
    rest.push(joined);
    rest.sort_by_key(|lock| (lock.kind, lock.start, lock.end, lock.owner));
    rest
}

impl Table {
    fn lives(&self) -> impl Iterator<Item = Incarnation> {
        self.held.iter().chain(self.waiting.iter().map(|wish| &wish.lock)).map(|lock| lock.owner.incarnation)
    }

    fn names(&self, owner: LockOwner) -> bool {
        self.held.iter().chain(self.waiting.iter().map(|wish| &wish.lock)).any(|lock| lock.owner == owner)
    }

    /// Grants what nothing stands in the way of any more, oldest first, and answers it.
    fn grant(&mut self) -> Vec<Wish> {
        let mut all = Vec::new();
        loop {
            let mut waiting: Vec<Wish> = Vec::with_capacity(self.waiting.len());
            let before = all.len();
            for wish in std::mem::take(&mut self.waiting) {
                if blockers(&self.held, &waiting, &wish.lock).next().is_some() {
                    waiting.push(wish);
                } else {
                    self.held = granted(&self.held, &wish.lock);
                    all.push(wish);
                }
            }
            self.waiting = waiting;
            // What was granted may have been weaker than what its owner held: then somebody
            // earlier may be next.
            if all.len() == before {
                return all;
            }
        }
    }
}

impl Apply<'_, '_> {
    fn table(&mut self, ino: Ino) -> Outcome<Table> {
        let held = self.txn.get(&keys::locks(ino))?.unwrap_or_default();
        let waiting = self.txn.get(&keys::waiting(ino))?.unwrap_or_default();
        let table = Table { held, waiting };
        if table.lives().any(|life| life.0 != self.request.client) {
            // Whose locks may go at any time, because that life ends.
            self.txn.goes_beyond();
        }
        Ok(table)
    }

    /// As [`Self::table`], of an inode that the command is not about.
    fn peek_table(&mut self, ino: Ino) -> Outcome<Table> {
        let held = self.txn.peek(&keys::locks(ino))?.unwrap_or_default();
        let waiting = self.txn.peek(&keys::waiting(ino))?.unwrap_or_default();
        Ok(Table { held, waiting })
    }

    /// Stores `after`, having granted what can be.
    fn put_table(&mut self, ino: Ino, before: &Table, mut after: Table) -> Outcome<()> {
        for Wish { lock: Lock { owner, .. }, ticket } in after.grant() {
            self.unlist(ino, owner, ticket)?;
            self.changed(Change::LockGranted { owner, ticket });
        }
        if after.held != before.held {
            let key = keys::locks(ino);
            if after.held.is_empty() { self.txn.delete(key) } else { self.txn.put(key, &after.held) }
        }
        if after.waiting != before.waiting {
            let key = keys::waiting(ino);
            if after.waiting.is_empty() { self.txn.delete(key) } else { self.txn.put(key, &after.waiting) }
        }
        Ok(())
    }

    fn waits_of_life(&mut self, owner: LockOwner) -> Outcome<u64> {
        Ok(self.txn.get(&keys::waits_of_life(owner))?.unwrap_or(0))
    }

    fn list(&mut self, ino: Ino, owner: LockOwner, ticket: u64) -> Outcome<()> {
        let waits = self.waits_of_life(owner)? + 1;
        self.txn.put(keys::waits_of_life(owner), &waits);
        self.txn.put(keys::wait(owner, ino, ticket), &());
        Ok(())
    }

    fn unlist(&mut self, ino: Ino, owner: LockOwner, ticket: u64) -> Outcome<()> {
        // Others wait elsewhere, and their number is one for the whole life.
        self.txn.goes_beyond();
        let waits = self.waits_of_life(owner)?.saturating_sub(1);
        let key = keys::waits_of_life(owner);
        if waits == 0 { self.txn.delete(key) } else { self.txn.put(key, &waits) }
        self.txn.delete(keys::wait(owner, ino, ticket));
        Ok(())
    }

    /// Takes the lock. With a `ticket` whoever cannot have it at once waits under that number.
    pub(super) fn lock(&mut self, ino: Ino, lock: &Lock, ticket: Option<u64>) -> Outcome<Reply> {
        self.inode(ino)?;
        self.is_alive(lock.owner.node, lock.owner.incarnation)?;
        let table = self.table(ino)?;
        let mut after = table.clone();
        let ahead = if ticket.is_some() { &table.waiting[..] } else { &[] };
        let mut in_the_way = blockers(&table.held, ahead, lock);
        let Some(first) = in_the_way.next() else {
            after.held = granted(&table.held, lock);
            self.put_table(ino, &table, after)?;
            return Ok(Reply::Locked);
        };
        let Some(ticket) = ticket else {
            return Err(MetaError::Locked { holder: Box::new(first.clone()) }.into());
        };
        let in_the_way = std::iter::once(first).chain(in_the_way).map(|lock| lock.owner).collect();
        if table.waiting.len() >= WAITERS_MAX || self.waits_of_life(lock.owner)? >= WAITERS_OF_LIFE_MAX {
            return Err(MetaError::TooManyWaiters.into());
        }
        if self.waits_for(in_the_way, lock.owner)? {
            return Err(MetaError::Deadlock.into());
        }
        after.waiting.push(Wish { lock: lock.clone(), ticket });
        self.list(ino, lock.owner, ticket)?;
        self.txn.put(keys::waiting(ino), &after.waiting);
        Ok(Reply::Queued)
    }

    /// Whether one of these, or somebody whom one of these waits for and so on, is `owner`.
    fn waits_for(&mut self, mut these: Vec<LockOwner>, owner: LockOwner) -> Outcome<bool> {
        let mut seen = BTreeSet::new();
        let mut tables: BTreeMap<Ino, Table> = BTreeMap::new();
        // Many wait for one lock and have nothing else to do with any: nobody waits for them.
        let (from, to) = keys::under(keys::WAITING, &[]);
        let queues = self.txn.scan(&from, &to, QUEUES_AT_ONCE + 1)?;
        if queues.len() <= QUEUES_AT_ONCE {
            for (key, _) in queues {
                let damaged = || StoreError::Corrupt { key: key.clone(), why: "not a queue of an inode".into() };
                let ino = Ino(keys::number_at(&key, 1).ok_or_else(damaged)?);
                tables.insert(ino, self.peek_table(ino)?);
            }
            if !tables.values().any(|table| table.names(owner)) {
                return Ok(false);
            }
        }
        while let Some(next) = these.pop() {
            if next == owner {
                return Ok(true);
            }
            if !seen.insert(next) {
                continue;
            }
            let (from, to) = keys::waits_of(next);
            for (key, _) in self.txn.scan(&from, &to, usize::MAX)? {
                let damaged = || StoreError::Corrupt { key: key.clone(), why: "no such place in a queue".into() };
                let (ino, ticket) = keys::waited_for(&key).ok_or_else(damaged)?;
                if !tables.contains_key(&ino) {
                    tables.insert(ino, self.peek_table(ino)?);
                }
                let Table { held, waiting } = &tables[&ino];
                let at = waiting.iter().position(|wish| (wish.lock.owner, wish.ticket) == (next, ticket));
                let at = at.ok_or_else(damaged)?;
                these.extend(blockers(held, &waiting[..at], &waiting[at].lock).map(|lock| lock.owner));
            }
        }
        Ok(false)
    }

    /// Leaves the queue, unless the lock was granted before.
    pub(super) fn withdraw_lock(&mut self, ino: Ino, owner: LockOwner, ticket: u64) -> Outcome<Reply> {
        self.inode(ino)?;
        self.is_alive(owner.node, owner.incarnation)?;
        let table = self.table(ino)?;
        let mut after = table.clone();
        after.waiting.retain(|wish| (wish.lock.owner, wish.ticket) != (owner, ticket));
        if after == table {
            return Err(MetaError::NotWaiting.into());
        }
        self.unlist(ino, owner, ticket)?;
        self.put_table(ino, &table, after)?;
        Ok(Reply::Done)
    }

    /// Lets a reader that waits in past the writers that wait, unless something held excludes it.
    pub(super) fn overtake(&mut self, ino: Ino, owner: LockOwner, ticket: u64) -> Outcome<Reply> {
        self.inode(ino)?;
        self.is_alive(owner.node, owner.incarnation)?;
        let table = self.table(ino)?;
        let place = table.waiting.iter().position(|wish| (wish.lock.owner, wish.ticket) == (owner, ticket));
        let place = place.ok_or(MetaError::NotWaiting)?;
        let lock = &table.waiting[place].lock;
        if !lock.exclusive && blockers(&table.held, &[], lock).next().is_none() {
            let mut after = table.clone();
            after.waiting[..=place].rotate_right(1);
            self.put_table(ino, &table, after)?;
        }
        Ok(Reply::Done)
    }

    pub(super) fn unlock(&mut self, ino: Ino, owner: LockOwner, kind: LockKind, start: u64, end: u64) -> Outcome<Reply> {
        self.release(ino, |lock| {
            if lock.owner == owner && lock.kind == kind { without(lock, start, end) } else { vec![lock.clone()] }
        })
    }

    pub(super) fn unlock_all(&mut self, ino: Ino, owner: LockOwner) -> Outcome<Reply> {
        self.release(ino, |lock| if lock.owner == owner { Vec::new() } else { vec![lock.clone()] })
    }

    fn release(&mut self, ino: Ino, keep: impl Fn(&Lock) -> Vec<Lock>) -> Outcome<Reply> {
        let table = self.table(ino)?;
        let held: Vec<Lock> = table.held.iter().flat_map(keep).collect();
        if held != table.held {
            let after = Table { held, ..table.clone() };
            self.put_table(ino, &table, after)?;
        }
        Ok(Reply::Done)
    }

    /// Frees every lock that `gone` says belongs to nobody any more, and ends their waits.
    pub(super) fn release_everywhere(&mut self, gone: impl Fn(&LockOwner) -> bool) -> Outcome<()> {
        // Whoever waits, waits for somebody who holds: no inode has waiters alone.
        let (from, to) = keys::under(keys::LOCKS, &[]);
        for (key, _) in self.txn.scan(&from, &to, usize::MAX)? {
            let ino = Ino(keys::number_at(&key, 1).expect("lock keys end in the inode"));
            let table = self.table(ino)?;
            let mut after = table.clone();
            after.held.retain(|lock| !gone(&lock.owner));
            after.waiting.retain(|wish| !gone(&wish.lock.owner));
            for wish in table.waiting.iter().filter(|wish| gone(&wish.lock.owner)) {
                self.end_wait(ino, wish)?;
            }
            if after != table {
                self.put_table(ino, &table, after)?;
            }
        }
        Ok(())
    }

    fn end_wait(&mut self, ino: Ino, wish: &Wish) -> Outcome<()> {
        let (owner, ticket) = (wish.lock.owner, wish.ticket);
        self.unlist(ino, owner, ticket)?;
        self.changed(Change::LockWaitEnded { owner, ticket });
        Ok(())
    }

    /// Forgets all about the locks of an inode that goes.
    pub(super) fn drop_locks(&mut self, ino: Ino) -> Outcome<()> {
        let table = self.table(ino)?;
        for wish in &table.waiting {
            self.end_wait(ino, wish)?;
        }
        self.put_table(ino, &table, Table::default())
    }
}
