//! Locks: fcntl, OFD and flock, for all servers in one table per inode.

use ctfs_types::Ino;

use super::{Apply, keys, txn::Outcome};
use crate::{Change, Lock, LockKind, LockOwner, MetaError, Reply};

/// Whether two locks cannot be held together.
pub fn conflict(a: &Lock, b: &Lock) -> bool {
    a.kind == b.kind && a.owner != b.owner && (a.exclusive || b.exclusive) && a.start <= b.end && b.start <= a.end
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

/// The table after `lock` was granted: it replaces what its owner held in the range, and joins
/// neighbours of the same strength, as POSIX fcntl() says.
fn granted(table: &[Lock], lock: &Lock) -> Vec<Lock> {
    let own = |other: &Lock| other.kind == lock.kind && other.owner == lock.owner;
    let mut rest: Vec<Lock> =
        table.iter().flat_map(|other| if own(other) { without(other, lock.start, lock.end) } else { vec![other.clone()] }).collect();
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

impl Apply<'_, '_> {
    fn table(&mut self, ino: Ino) -> Outcome<Vec<Lock>> {
        Ok(self.txn.get(&keys::locks(ino))?.unwrap_or_default())
    }

    fn put_table(&mut self, ino: Ino, table: &[Lock]) {
        if table.is_empty() { self.txn.delete(keys::locks(ino)) } else { self.txn.put(keys::locks(ino), &table) }
    }

    pub(super) fn lock(&mut self, ino: Ino, lock: &Lock) -> Outcome<Reply> {
        self.inode(ino)?;
        self.is_alive(lock.owner.node, lock.owner.incarnation)?;
        let table = self.table(ino)?;
        if let Some(holder) = table.iter().find(|held| conflict(held, lock)) {
            return Err(MetaError::Locked { holder: Box::new(holder.clone()) }.into());
        }
        let after = granted(&table, lock);
        // Turning an exclusive lock into a shared one lets others in.
        let weaker = !lock.exclusive && table.iter().any(|held| held.owner == lock.owner && held.exclusive);
        self.put_table(ino, &after);
        if weaker {
            self.changed(Change::LocksFreed { ino });
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
        let after: Vec<Lock> = table.iter().flat_map(keep).collect();
        if after != table {
            self.put_table(ino, &after);
            self.changed(Change::LocksFreed { ino });
        }
        Ok(Reply::Done)
    }

    /// Frees every lock that `gone` says belongs to nobody any more.
    pub(super) fn release_everywhere(&mut self, gone: impl Fn(&LockOwner) -> bool) -> Outcome<()> {
        let (from, to) = keys::under(keys::LOCKS, &[]);
        for (key, _) in self.txn.scan(&from, &to, usize::MAX)? {
            let ino = Ino(keys::number_at(&key, 1).expect("lock keys end in the inode"));
            self.release(ino, |lock| if gone(&lock.owner) { Vec::new() } else { vec![lock.clone()] })?;
        }
        Ok(())
    }
}
