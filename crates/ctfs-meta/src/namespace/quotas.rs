//! Quotas: limits on what is below a directory.
//!
//! The limits stand in the directory's inode, so whoever carries counts up to it sees them on the way. A command is judged by what it changed as a whole: what it takes away and adds again at
//! the same place is no growth.
//!
//! Names do not move across the edge of a quota, as they do not between file systems: what counts
//! where would change for a whole tree at once.

use ctfs_types::Ino;

use super::{Apply, keys, records::Inode, txn::Outcome};
use crate::{Change, MetaError, Op, Quota, Reply};

impl Apply<'_, '_> {
    pub(super) fn set_quota(&mut self, ino: Ino, quota: Quota) -> Outcome<Reply> {
        let mut inode = self.directory(ino)?;
        // What happens ahead of the log asks for no limits.
        if let Some((dir, holder)) = self.held_below(ino)? {
            return Err(MetaError::Held { ino: dir, holder }.into());
        }
        self.put_quota(ino, &mut inode, quota);
        self.put_inode(ino, &inode);
        self.changed(Change::Attr { ino });
        Ok(Reply::Done)
    }

    /// Puts limits into a directory's inode, which the caller stores.
    pub(super) fn put_quota(&mut self, ino: Ino, inode: &mut Inode, quota: Quota) {
        let Some(dir) = &mut inode.dir else { return };
        match (dir.quota.is_none(), quota.is_none()) {
            (true, false) => {
                self.counters.quotas += 1;
                self.txn.put(keys::quota(ino), &());
            }
            (false, true) => {
                self.counters.quotas -= 1;
                self.txn.delete(keys::quota(ino));
            }
            _ => {}
        }
        dir.quota = quota;
    }

    /// The nearest directory with a quota: `dir` itself or one above it.
    pub(super) fn quota_root(&mut self, dir: Ino) -> Outcome<Option<Ino>> {
        let mut ino = dir;
        loop {
            let record = self.peek_inode(ino)?.dir.ok_or(MetaError::NotDirectory(ino))?;
            if !record.quota.is_none() {
                return Ok(Some(ino));
            }
            if ino == Ino::ROOT {
                return Ok(None);
            }
            ino = record.parent;
        }
    }

    /// Refuses to bring what counts for `from` to where it would count for another quota.
    pub(super) fn must_share_quota(&mut self, from: Ino, to: Ino) -> Outcome<()> {
        if self.counters.quotas == 0 || from == to || self.quota_root(from)? == self.quota_root(to)? {
            return Ok(());
        }
        Err(MetaError::AcrossQuota { from, to }.into())
    }

    /// Remembers what was below a directory before the command changed it, if there is a limit.
    pub(super) fn note_totals(&mut self, ino: Ino, quota: Quota) -> Outcome<()> {
        if !quota.is_none() && !self.counted.contains_key(&ino) {
            self.counted.insert(ino, self.txn.totals(ino)?);
        }
        Ok(())
    }

    /// Refuses a command that made something grow over its limit. Those that take away never are
    /// refused, although a file of several names may come to count elsewhere when it loses one.
    pub(super) fn keep_quotas(&mut self, op: &Op) -> Outcome<()> {
        let grows = matches!(
            op,
            Op::Make { .. } | Op::Link { .. } | Op::Rename { .. } | Op::SetAttr { .. } | Op::Write { .. } | Op::CloneCells { .. }
        );
        for (ino, before) in std::mem::take(&mut self.counted) {
            if let Some(dir) = self.peek_inode(ino)?.dir
                && grows
                && dir.quota.refuses(before, self.txn.totals(ino)?)
            {
                return Err(MetaError::QuotaExceeded { dir: ino }.into());
            }
        }
        Ok(())
    }
}
