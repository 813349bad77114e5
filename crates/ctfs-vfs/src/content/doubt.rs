//! Commands of which nobody knows whether they happened.
//!
//! A proposal that ends without an answer may still be applied. If its bytes were simply merged and
//! proposed again, they could be applied twice, the second time over what another server wrote in
//! between; and a truncate that comes late could cut off what was written and synced after it. So a
//! command about a file's bytes stays in [`Inode::flushing`] until its outcome is known, and nothing
//! else about them is proposed before. The doubt is ended by [`Op::Noop`] under the same request: the
//! answer is the verdict of the command if it happened, and if it did not, then it never will.

use std::sync::Arc;

use ctfs_meta::{MetaError, Op, Reply};
use ctfs_types::{Attr, ExtentData, Ino, Stamp};
use tracing::{debug, warn};

use super::{
    Inode, Shared, extent_of,
    flush::{Built, Pending},
};
use crate::{FsError, Request};

/// The command in doubt, if there is one.
pub(super) type Turn = Option<Doubt>;

pub(super) struct Doubt {
    request: Arc<dyn Request>,
    /// What it writes; nothing of a command that takes bytes away or changes attributes.
    write: Option<Write>,
    /// The size it sets: unflushed bytes past it go with those that the metadata know, if it happened.
    size: Option<u64>,
}

/// A write that may have happened. Its bytes are in the tier as flushing ones.
struct Write {
    /// Without their bytes: as much as a flush holds would be held for every file.
    cells: Vec<Built>,
    pending: Pending,
}

impl Shared {
    /// Proposes a command about the inode that is no flush. The caller holds the turn.
    ///
    /// # Errors
    /// As [`crate::Metadata::propose`]; also when an earlier command is in doubt and stays so.
    pub(super) async fn propose_in_turn(&self, inode: &Arc<Inode>, turn: &mut Turn, op: Op) -> Result<Reply, FsError> {
        self.end_doubt(inode, turn).await?;
        self.propose_doubtful(inode, turn, op, None).await
    }

    /// Proposes a flush of these cells. The caller holds the turn, and nothing is in doubt.
    pub(super) async fn propose_flush(
        &self,
        inode: &Arc<Inode>,
        turn: &mut Turn,
        op: Op,
        (cells, pending): (&[Built], Pending),
    ) -> Result<Reply, FsError> {
        let cells = cells.iter().map(Built::without_bytes).collect();
        self.propose_doubtful(inode, turn, op, Some(Write { cells, pending })).await
    }

    async fn propose_doubtful(
        &self,
        inode: &Arc<Inode>,
        turn: &mut Turn,
        op: Op,
        write: Option<Write>,
    ) -> Result<Reply, FsError> {
        debug_assert!(turn.is_none(), "one doubt is ended before the next command");
        let request = self.meta.request();
        let size = match &op {
            Op::SetAttr { set, .. } => set.size,
            _ => None,
        };
        // From here on, also if whoever asked goes away before the answer.
        *turn = Some(Doubt { request: request.clone(), write, size });
        {
            let mut local = inode.local.lock();
            local.in_doubt = true;
            // The background ends the doubt if nobody else does.
            self.has_something_pending(inode, &mut local);
        }
        let outcome = request.propose(op).await;
        if outcome.as_ref().err().is_none_or(|error| !error.is_doubtful()) {
            *turn = None;
            inode.local.lock().in_doubt = false;
        }
        outcome
    }

    /// Finds out whether the command in doubt happened, and if it was a flush, lets go of its bytes
    /// or makes them dirty again.
    ///
    /// # Errors
    /// Nobody could say; the doubt stays.
    pub(super) async fn end_doubt(&self, inode: &Inode, turn: &mut Turn) -> Result<(), FsError> {
        let Some(doubt) = turn.as_ref() else { return Ok(()) };
        let ino = inode.ino;
        let outcome = doubt.request.propose(Op::Noop).await;
        if let Some(size) = doubt.size {
            let was_cut = match &outcome {
                Ok(reply) => matches!(reply, Reply::Attr(_)),
                Err(FsError::Meta(MetaError::Answered)) => self.seems_cut(inode)?,
                Err(FsError::Meta(_)) => false,
                Err(error) => return Err(error.clone()),
            };
            self.cut_ended(inode, was_cut.then_some(size));
        }
        let happened = match (outcome, &doubt.write) {
            (Ok(Reply::Written { attr, .. }), _) => Some(attr),
            (Err(FsError::Meta(MetaError::Answered)), Some(write)) => self.seems_written(ino, write)?,
            (Ok(_) | Err(FsError::Meta(_)), _) => None,
            (Err(error), _) => return Err(error),
        };
        debug!(%ino, happened = happened.is_some(), "the outcome of an earlier command is known");
        if let (Some(attr), Some(write)) = (happened, &doubt.write) {
            for done in &write.cells {
                if self.is_kept(done).await? {
                    inode.entry.settle(done.cell, None, None);
                }
            }
            self.committed(inode, &attr, write.pending);
        }
        inode.entry.abandon_flush();
        // What was noted as being in the metadata may be dirty again.
        inode.local.lock().unnoted.insert(0..u64::MAX);
        self.forget_doubt(inode, turn);
        Ok(())
    }

    /// The outcome is known, or no business of this server's any more.
    pub(super) fn forget_doubt(&self, inode: &Inode, turn: &mut Turn) {
        *turn = None;
        let mut local = inode.local.lock();
        local.in_doubt = false;
        local.set_cut(None);
    }

    /// Whether the data version says that a truncate happened, after its verdict was forgotten. Who has
    /// bytes to lose holds the file, so nobody else has changed it.
    fn seems_cut(&self, inode: &Inode) -> Result<bool, FsError> {
        let before = inode.local.lock().cut;
        let attr = super::attr_of(&self.meta.replica().read(), inode.ino)?;
        Ok(before.is_some_and(|before| before != attr.data_version))
    }

    /// The outcome of a truncate in doubt is known: to this size, or not at all. Nothing was written
    /// since, because writes wait for it.
    fn cut_ended(&self, inode: &Inode, size: Option<u64>) {
        if let Some(size) = size {
            inode.entry.abandon_flush();
            inode.entry.discard(size..u64::MAX);
        }
        if size.is_some() {
            let mut local = self.letting_go(inode);
            (local.size, local.mtime) = (None, None);
        }
    }

    /// Before something is written: ends the doubt about a truncate, if there is one. The caller has
    /// entered the gate.
    pub(super) async fn know_the_size(&self, inode: &Inode) -> Result<(), FsError> {
        if inode.local.lock().cut.is_none() {
            return Ok(());
        }
        let mut turn = inode.flushing.lock().await;
        self.end_doubt(inode, &mut turn).await
    }

    /// Whether the cells say that the write happened, after its verdict was forgotten. It will not
    /// happen any more, so the worst of a wrong "no" is that its bytes are merged once more.
    fn seems_written(&self, ino: Ino, write: &Write) -> Result<Option<Attr>, FsError> {
        let ns = self.meta.replica().read();
        for done in &write.cells {
            let extent = extent_of(&ns, ino, done.cell)?;
            let stamp = extent.as_ref().map_or(Stamp(0), |extent| extent.stamp);
            let same = extent.map(|extent| (extent.start, extent.data)) == done.data.clone().map(|data| (done.start, data));
            // All cells of a command change or none, so the first that tells is enough.
            match (stamp == done.expect, same) {
                (true, true) => {}
                (true, false) => return Ok(None),
                (false, true) => return Ok(ns.attr(ino)?),
                (false, false) => {}
            }
        }
        Ok(None)
    }

    /// Whether the chunk of a cell whose write happened is surely kept. One that was put long before
    /// anything named it may have been collected: it is put once more, or else its bytes, which are
    /// still in the tier, are flushed again.
    async fn is_kept(&self, done: &Built) -> Result<bool, FsError> {
        let Some(ExtentData::Chunk { id, len }) = done.data else { return Ok(true) };
        if done.put_at.elapsed() <= self.settings.put_age_max.saturating_mul(2) {
            return Ok(true);
        }
        match self.chunks.get(id, len).await {
            Ok(bytes) => self.chunks.put(bytes, done.copies).await.map(|_| true),
            Err(FsError::ChunkLost { chunk }) => {
                warn!(%chunk, "a chunk was collected before its write was known to have happened; flushing again");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}
