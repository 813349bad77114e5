//! Locks of files that nobody but this server's programs can see.
//!
//! A program that locks a file in a directory which this server holds competes with programs here alone:
//! whoever else wants to has the directory given up first. And when this server is lost, its programs and
//! their locks are. So such a lock is neither in the log nor on any disk, and costs no more than on a local
//! file system. Only what is held is kept so; where somebody has to wait, and before anything happens after
//! which others could look, the locks become commands like any other ([`Namespace::settle_locks`]).

use ctfs_types::{Holder, Ino, RequestId, Timestamp};

use super::{
    Apply, Namespace,
    ahead::store_only,
    keys, records,
    txn::{Fail, Txn},
    view::{View, Written},
};
use crate::{Lock, MetaError, Op, Reply, StoreError};

/// Who wrote a record that belongs to no command.
const NOBODY: u64 = u64::MAX;

impl Namespace {
    /// Runs a command about locks that concerns this server's programs alone, here and for nobody else to
    /// see. `None`: it must happen as others do.
    ///
    /// # Errors
    /// The store failed; nothing happened.
    pub fn lock_here(&mut self, op: &Op, holder: Holder) -> Result<Option<Result<Reply, MetaError>>, StoreError> {
        // One that may wait is tried without, first.
        let tried = match op {
            Op::AwaitLock { ino, lock, .. } => Op::Lock { ino: *ino, lock: lock.clone() },
            Op::Lock { .. } | Op::Unlock { .. } | Op::UnlockAll { .. } => op.clone(),
            _ => return Ok(None),
        };
        let (Op::Lock { ino, .. } | Op::Unlock { ino, .. } | Op::UnlockAll { ino, .. }) = tried else { return Ok(None) };
        let is_own = self.layer.own_locks.contains(&ino);
        if !is_own && (self.delegated() == 0 || self.has_locks(ino)?) {
            return Ok(None);
        }
        let mut txn = Txn::new(View::ahead(&*self.store, &self.layer.records, &self.layer.sums));
        let mut counters = self.counters.clone();
        let request = RequestId { client: holder.incarnation.0, seq: 0 };
        let mut apply = Apply::of_one(&mut txn, &mut counters, request, Timestamp::EPOCH, self.freed_max);
        let outcome = apply.dispatch(&tried);
        // Once it is so it stays so until it is settled.
        if !is_own && !apply.is_covered(holder, &self.layer).map_err(store_only)? {
            return Ok(None);
        }
        match outcome {
            Ok(reply) => {
                txn.keep();
                let (batch, _) = txn.written_and_added();
                let key = keys::locks(ino);
                debug_assert!(batch.keys().all(|written| *written == key), "a lock that is granted changes who holds, and nothing else");
                match batch.into_values().next() {
                    Some(Some(value)) => {
                        self.layer.own_locks.insert(ino);
                        self.layer.records.insert(key, Written { value: Some(value), by: NOBODY });
                    }
                    Some(None) => self.forget_own_locks(ino),
                    None => {}
                }
                Ok(Some(Ok(reply)))
            }
            Err(Fail::Verdict(MetaError::Locked { .. })) if matches!(op, Op::AwaitLock { .. }) => Ok(None),
            Err(Fail::Verdict(verdict)) => Ok(Some(Err(verdict))),
            Err(Fail::Store(error)) => Err(error),
        }
    }

    /// Whether anything is known of locks of the inode, or was a moment ago.
    fn has_locks(&self, ino: Ino) -> Result<bool, StoreError> {
        for key in [keys::locks(ino), keys::waiting(ino)] {
            if self.layer.records.contains_key(&key) || self.store.get(&key)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn forget_own_locks(&mut self, ino: Ino) {
        self.layer.own_locks.remove(&ino);
        self.layer.records.remove(&keys::locks(ino));
    }

    /// Before a command that may make others look: the commands by which they learn of locks that are
    /// only known here. They must happen before anything else does.
    ///
    /// # Errors
    /// The store failed.
    pub fn settle_locks(&mut self, before: &Op) -> Result<Vec<Op>, StoreError> {
        let keeps_cover = matches!(before, Op::Write { .. } | Op::SetAttr { .. } | Op::SetXattr { .. } | Op::RemoveXattr { .. } | Op::FreeCells { .. });
        if self.layer.own_locks.is_empty() || keeps_cover {
            return Ok(Vec::new());
        }
        let inos = self.inodes_of(before)?;
        let gives_up = matches!(before, Op::Disown { .. });
        self.settle_locks_of(|this, ino| {
            Ok(inos.contains(&ino) || gives_up && this.cover(ino)?.is_none_or(|(dir, _)| inos.contains(&dir)))
        })
    }

    /// As [`Self::settle_locks`], before directories are given up.
    ///
    /// # Errors
    /// The store failed.
    pub fn settle_locks_in(&mut self, dirs: &[Ino]) -> Result<Vec<Op>, StoreError> {
        self.settle_locks_of(|this, ino| Ok(this.cover(ino)?.is_none_or(|(dir, _)| dirs.contains(&dir))))
    }

    fn settle_locks_of(&mut self, which: impl Fn(&Self, Ino) -> Result<bool, StoreError>) -> Result<Vec<Op>, StoreError> {
        let mut ops = Vec::new();
        for ino in self.layer.own_locks.clone() {
            if !which(self, ino)? {
                continue;
            }
            let key = keys::locks(ino);
            let held = self.layer.records.get(&key).and_then(|written| written.value.as_deref());
            let held: Vec<Lock> = held.map(|value| records::decode(&key, value)).transpose()?.unwrap_or_default();
            self.forget_own_locks(ino);
            ops.extend(held.into_iter().map(|lock| Op::Lock { ino, lock }));
        }
        Ok(ops)
    }

    /// Inodes with locks that only this server knows.
    pub fn own_locks(&self) -> usize {
        self.layer.own_locks.len()
    }
}
