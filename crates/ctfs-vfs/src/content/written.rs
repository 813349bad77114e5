//! Fsync by the journal: what is unflushed is written down, and flushed some seconds later.
//!
//! The bytes go into the journal of this life as they are, so fsync waits for one disk write here and
//! one at the pair, and neither for chunks nor for the log. [`Local::unnoted`] are the ranges that were written
//! since they were last written down; of those, what is still unflushed is missing in the journal. A flush
//! that has taken everything tells the metadata up to which position the journal is in it
//! ([`ctfs_meta::Noted`]), so that whoever sends the journal after a crash leaves out what is there already,
//! maybe under newer bytes. What takes bytes away flushes first, for the same reason.

use std::{ops::Range, sync::Arc};

use ctfs_chunk::tier::{Base, RangeSet, View};
use ctfs_types::{FileBytes, Ino};
use tracing::debug;

use super::{Inode, Shared, attr_of, doubt::Turn, flush::Cut, sharing::WriteMode};
use crate::FsError;

/// With more to sync a file is flushed: its chunks go to their servers, and not through the journal first.
const WRITTEN_DOWN_MAX: u64 = 512 << 10;

impl Shared {
    /// Writes down what is unflushed of a file and not written down yet. `false`: it must be flushed.
    pub(super) async fn write_down(&self, ino: Ino) -> Result<bool, FsError> {
        let inode = self.inodes.lock().get(&ino).cloned();
        let Some(inode) = inode else { return Ok(true) };
        // What takes bytes away has the gate alone.
        let _gate = inode.enter().await;
        if !inode.has_pending() {
            return Ok(inode.local.lock().error.is_none());
        }
        // What a quota may refuse later is not promised.
        let is_limited = !self.meta.replica().read().quotas_over(ino)?.is_empty();
        if is_limited || self.write_mode(&inode)? != Some(WriteMode::Buffer) {
            return Ok(false);
        }
        self.write_down_buffered(&inode)
    }

    fn write_down_buffered(&self, inode: &Arc<Inode>) -> Result<bool, FsError> {
        // Held to the end: nothing is written in between, so the journal has a file's bytes in their order.
        let mut local = inode.local.lock();
        if local.error.is_some() || local.cut.is_some() {
            return Ok(false);
        }
        let view = inode.entry.view();
        let missing = unflushed_of(&view, &local.unnoted);
        let bytes = missing.len();
        if bytes > WRITTEN_DOWN_MAX {
            return Ok(false);
        }
        if bytes > 0 {
            let mut pieces = Vec::new();
            for range in missing.iter() {
                // The flush knows what to do about bytes that cannot be read.
                if !read_unflushed(inode, &view, range, &mut pieces) {
                    return Ok(false);
                }
            }
            let mtime = match local.mtime {
                Some(mtime) => mtime,
                None => attr_of(&self.meta.replica().read(), inode.ino)?.mtime,
            };
            let written = FileBytes { ino: inode.ino, mtime, drop_privileges: local.drop_is_pending(), pieces };
            match self.meta.write_down(&written) {
                Some(position) => local.noted_upto = position,
                None => return Ok(false),
            }
        }
        local.unnoted = Default::default();
        Ok(true)
    }

    /// Before bytes are taken away: has the metadata hold all that is written down of the file. The caller
    /// holds the gate alone.
    pub(super) async fn flush_written_down(&self, inode: &Arc<Inode>, turn: &mut Turn) -> Result<(), FsError> {
        if inode.local.lock().noted_upto == 0 { Ok(()) } else { self.flush_locked(inode, turn, Cut::Everything).await }
    }
}

/// The parts of these ranges that are unflushed.
pub(super) fn unflushed_of(view: &View<'_>, ranges: &RangeSet) -> RangeSet {
    let mut unflushed = RangeSet::new();
    for range in ranges.iter().flat_map(|range| view.unflushed_in(range)) {
        unflushed.insert(range);
    }
    unflushed
}

/// Answers whether all of a range could be read.
fn read_unflushed(inode: &Inode, view: &View<'_>, range: Range<u64>, pieces: &mut Vec<(u64, Vec<u8>)>) -> bool {
    let grid = inode.entry.cell_size();
    let mut at = range.start;
    while at < range.end {
        let cell = grid.cell_of(at);
        let start = grid.start_of(cell);
        let end = range.end.min(start + grid.bytes());
        let mut bytes = vec![0; (end - at) as usize];
        if let Err(error) = view.read(cell, at - start..end - start, Base::Hole, &mut bytes) {
            debug!(ino = %inode.ino, %error, "unflushed bytes cannot be read to be written down");
            return false;
        }
        pieces.push((at, bytes));
        at = end;
    }
    true
}
