//! Cells that were taken away and are not freed yet.
//!
//! Truncating, punching or reaping a file of millions of cells must not keep every reader of the
//! replica waiting for as long as freeing them takes. One command frees [`CELLS_FREED_MAX`] of them
//! and remembers the rest as a [`Cut`]: in its range every cell older than the cut is dead. A dead
//! cell reads as a hole. Its chunk is still counted and its bytes are still allocated, until an
//! [`crate::Op::FreeCells`] of the inode frees it.

use ctfs_types::{CellIndex, Extent, Ino, Stamp};
use serde::{Deserialize, Serialize};

use super::{
    Apply,
    keys,
    records::{self, Inode},
    txn::Outcome,
};
use crate::{Change, Reply, StoreError};

/// Cells that one command frees: some tens of milliseconds. Fewer make more commands of a large
/// file, more make whoever reads meanwhile wait longer. A rule of the state machine: with another
/// number the same log makes another state.
pub const CELLS_FREED_MAX: usize = 1024;

/// In `[first, end)` the cells with a stamp below `before` are dead.
///
/// `before` is the stamp of the command that cut. What earlier commands wrote has a lower one. What
/// that command itself leaves in the range has the same, what comes later a higher one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    pub first: CellIndex,
    /// `u64::MAX`: to the end of the file.
    pub end: CellIndex,
    pub before: Stamp,
}

impl Cut {
    fn covers(&self, cell: CellIndex, stamp: Stamp) -> bool {
        (self.first..self.end).contains(&cell) && stamp < self.before
    }
}

pub fn is_dead(cuts: &[Cut], cell: CellIndex, stamp: Stamp) -> bool {
    cuts.iter().any(|cut| cut.covers(cell, stamp))
}

/// The cuts without what they say about `[first, end)`.
fn outside(cuts: &[Cut], first: CellIndex, end: CellIndex) -> Vec<Cut> {
    let parts = cuts.iter().flat_map(|cut| {
        let left = Cut { end: cut.end.min(first), ..*cut };
        let right = Cut { first: cut.first.max(end), ..*cut };
        [left, right]
    });
    parts.filter(|cut| cut.first < cut.end).collect()
}

impl Apply<'_, '_> {
    /// Disjoint and in order; there are more than one only while large cuts of one file come
    /// faster than they are freed.
    pub(super) fn cuts(&mut self, ino: Ino) -> Outcome<Vec<Cut>> {
        Ok(self.txn.get(&keys::cuts(ino))?.unwrap_or_default())
    }

    fn put_cuts(&mut self, ino: Ino, cuts: &[Cut]) {
        if cuts.is_empty() { self.txn.delete(keys::cuts(ino)) } else { self.txn.put(keys::cuts(ino), &cuts) }
    }

    /// Takes the cells in `[first, end)` away: as many as one command may free, the rest as a cut. The
    /// inode has the command's stamp already, and the command has written none of them.
    pub(super) fn take_away(&mut self, ino: Ino, inode: &mut Inode, first: CellIndex, end: CellIndex) -> Outcome<()> {
        let known = self.cuts(ino)?;
        let mut cuts = outside(&known, first, end);
        let to = keys::cells_end(ino, end);
        let found = self.txn.scan(&keys::cell(ino, first), &to, self.freed_max.saturating_add(1))?;
        let now = found.len().min(self.freed_max);
        for (key, value) in &found[..now] {
            inode.allocated -= self.free(key, value)?;
        }
        if let Some((rest, _)) = found.get(now) {
            cuts.push(Cut { first: cell_of(rest)?, end, before: inode.stamp() });
            cuts.sort_unstable_by_key(|cut| cut.first);
        }
        self.freed_max -= now;
        if cuts != known {
            self.put_cuts(ino, &cuts);
        }
        Ok(())
    }

    pub(super) fn free_cells(&mut self, inos: &[Ino]) -> Outcome<Reply> {
        inos.iter().try_for_each(|&ino| self.free_dead(ino))?;
        Ok(Reply::Done)
    }

    /// Goes on freeing dead cells of an inode, which may be gone itself.
    fn free_dead(&mut self, ino: Ino) -> Outcome<()> {
        if self.counters.delegated > 0 && self.cover_before(ino)?.is_some() {
            // Its holder may have changed what is allocated, ahead of the log.
            return Ok(());
        }
        let known = self.cuts(ino)?;
        let mut cuts = known.clone();
        let mut freed = 0;
        while let Some(cut) = cuts.first_mut()
            && self.freed_max > 0
        {
            let found = self.txn.scan(&keys::cell(ino, cut.first), &keys::cells_end(ino, cut.end), self.freed_max)?;
            for (key, value) in &found {
                // Cells that live lie between them; looking at them counts, too.
                let extent: Extent = records::decode(key, value)?;
                if extent.stamp < cut.before {
                    freed += self.free(key, value)?;
                }
            }
            match found.last() {
                Some((last, _)) if found.len() >= self.freed_max => cut.first = cell_of(last)? + 1,
                _ => drop(cuts.remove(0)),
            }
            self.freed_max -= found.len();
        }
        if cuts != known {
            self.put_cuts(ino, &cuts);
        }
        if freed > 0
            && let Some(mut inode) = self.txn.get::<Inode>(&keys::inode(ino))?
        {
            let before = inode.contribution();
            inode.allocated -= freed;
            self.put_counted(ino, before, &inode)?;
            self.changed(Change::Attr { ino });
        }
        Ok(())
    }

    /// Deletes the record of a cell and answers what it had allocated.
    fn free(&mut self, key: &[u8], value: &[u8]) -> Outcome<u64> {
        let extent: Extent = records::decode(key, value)?;
        self.txn.delete(key.to_vec());
        if let Some(id) = extent.chunk() {
            self.unname_chunk(id)?;
        }
        Ok(extent.allocated())
    }
}

fn cell_of(key: &[u8]) -> Result<CellIndex, StoreError> {
    keys::number_at(key, 9).ok_or_else(|| StoreError::Corrupt { key: key.to_vec(), why: "not a cell".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(first: CellIndex, end: CellIndex, before: u64) -> Cut {
        Cut { first, end, before: Stamp(before) }
    }

    #[test]
    fn a_newer_cut_leaves_of_older_ones_what_lies_outside() {
        let old = [cut(0, 10, 1), cut(20, u64::MAX, 2)];
        assert_eq!(outside(&old, 5, 30), [cut(0, 5, 1), cut(30, u64::MAX, 2)]);
        assert_eq!(outside(&old, 22, 24), [cut(0, 10, 1), cut(20, 22, 2), cut(24, u64::MAX, 2)]);
        assert_eq!(outside(&old, 0, u64::MAX), []);
    }

    #[test]
    fn only_what_is_older_than_the_cut_is_dead() {
        let cuts = [cut(5, u64::MAX, 8)];
        assert!(is_dead(&cuts, 5, Stamp(7)) && is_dead(&cuts, 1 << 40, Stamp(1)));
        assert!(!is_dead(&cuts, 5, Stamp(8)) && !is_dead(&cuts, 4, Stamp(7)));
    }
}
