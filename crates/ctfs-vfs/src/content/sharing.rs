//! One file on several servers: who may buffer, and who must ask.
//!
//! | The metadata say | Writes here | Reads here |
//! | --- | --- | --- |
//! | free | take the file first, then buffer | what the metadata name |
//! | owned by this server | buffer | with the buffered bytes on top |
//! | owned by another server | have it give the file up, then as the metadata say | the same |
//! | shared | are in the metadata before they are answered | what the metadata name |
//!
//! A file is taken when it is made, opened for reading and writing, or first written. It is given up
//! some time after the last writer here has closed it, or when another server asks: free then, or
//! shared when this one still has it open for writing. A shared file may be taken again after a
//! while; whoever uses it elsewhere asks again.
//!
//! Everybody knows an owner before the owner's first write is answered, because taking is a command
//! like any other. So a read that finds no other owner, under a lease, has missed nothing.
//!
//! The owner of a file that everybody believes to be free would lose writes. That is why taking again
//! makes a new holding: a command to give up that was late, or of unknown fate, ends only its own.

use std::{
    collections::HashMap,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use ctfs_meta::{MetaError, Namespace, Op};
use ctfs_types::{Attr, FileUse, Holder, Ino, Timestamp};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::{Inode, Shared, attr_of, flush::{Cut, Growth}, write::{Place, within}};
use crate::{FsError, vfs::KernelCache};

/// How long one call to an owner may take. It may have to flush much first.
const CALL_PATIENCE: Duration = Duration::from_secs(8);
/// The first pause before a holder is asked again for attributes: most often it has not applied yet,
/// as this server has, that it holds the file.
const PEEK_AGAIN: Duration = Duration::from_millis(2);
/// Files given up by one command.
pub(super) const GIVE_UP_MAX: usize = 512;

/// What a write does with its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteMode {
    Buffer,
    Through,
}

/// Whether the kernel holds pages of the file locked until a request is answered. It does for
/// requests through its page cache, and not for direct ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    Locked,
    Unlocked,
}

/// Requests that hold pages and wait for the cluster, by file. The notifier must not let others wait
/// for those pages: what is waited for here may be waiting for it.
#[derive(Default)]
pub struct PageWaits {
    counts: Mutex<HashMap<Ino, u32>>,
    kernel: Mutex<Option<Arc<dyn KernelCache>>>,
}

impl PageWaits {
    pub fn set_kernel(&self, kernel: Option<Arc<dyn KernelCache>>) {
        *self.kernel.lock() = kernel;
    }

    pub fn kernel(&self) -> Option<Arc<dyn KernelCache>> {
        self.kernel.lock().clone()
    }

    /// Whether a request that holds pages of `ino` waits for the cluster.
    pub fn any(&self, ino: Ino) -> bool {
        self.counts.lock().contains_key(&ino)
    }

    pub(super) fn enter(&self, ino: Ino, pages: Pages) -> Option<PageWait<'_>> {
        if pages == Pages::Unlocked {
            return None;
        }
        *self.counts.lock().entry(ino).or_default() += 1;
        if let Some(kernel) = self.kernel() {
            kernel.pages_wait(ino);
        }
        Some(PageWait { waits: self, ino })
    }
}

pub(super) struct PageWait<'a> {
    waits: &'a PageWaits,
    ino: Ino,
}

impl Drop for PageWait<'_> {
    fn drop(&mut self) {
        let mut counts = self.waits.counts.lock();
        if let Some(count) = counts.get_mut(&self.ino) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.ino);
            }
        }
    }
}

impl Shared {
    fn usage(&self, ino: Ino) -> Result<FileUse, FsError> {
        Ok(attr_of(&self.meta.replica().read(), ino)?.usage)
    }

    /// Who must be asked before anything is known of the file, and what that server shall give up: the
    /// file, or the directory by which it holds it.
    fn held_elsewhere(&self, ino: Ino) -> Result<Option<(Ino, Holder)>, FsError> {
        let (me, ns) = (self.meta.holder(), self.meta.replica().read());
        held_elsewhere(&ns, &attr_of(&ns, ino)?, me)
    }

    /// Whether bytes may be buffered at this moment; `None` when the file must be taken first.
    pub(super) fn write_mode(&self, inode: &Inode) -> Result<Option<WriteMode>, FsError> {
        if self.meta.replica().read().left_by(self.meta.incarnation())? {
            // What this life holds is its successor's: it writes nothing more.
            return Ok(None);
        }
        match self.usage(inode.ino)? {
            FileUse::Owned { holder, .. } if holder == self.meta.holder() && !inode.local.lock().holding_is_in_doubt => {
                Ok(Some(WriteMode::Buffer))
            }
            FileUse::Shared { since } if !is_over(since, self.settings.shared_for) => Ok(Some(WriteMode::Through)),
            _ => Ok(None),
        }
    }

    /// Returns when no other server holds newer bytes of the file.
    pub(super) async fn settle(&self, ino: Ino, pages: Pages) -> Result<(), FsError> {
        let deadline = Instant::now() + self.settings.holder_patience;
        loop {
            self.meta.be_current().await?;
            match self.held_elsewhere(ino)? {
                None => return Ok(()),
                Some((what, holder)) => self.recall(what, holder, pages, deadline).await?,
            }
        }
    }

    /// Has the holder give the file up, or waits until it has ended. May return early: look again.
    async fn recall(&self, ino: Ino, holder: Holder, pages: Pages, deadline: Instant) -> Result<(), FsError> {
        let _waits = self.waits.enter(ino, pages);
        // Registered before the question, so that an end in between is not missed.
        let changed = self.usage_changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let until = deadline.min(Instant::now() + CALL_PATIENCE);
        match timeout_at(until, self.holders.recall(holder, ino)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => debug!(%ino, node = %holder.node, %error, "the holder did not give the file up"),
            Err(_) => debug!(%ino, node = %holder.node, "the holder did not answer"),
        }
        if Instant::now() >= deadline {
            return Err(MetaError::Held { ino, holder }.into());
        }
        let _ = timeout_at(deadline.min(Instant::now() + self.settings.ask_again), changed).await;
        Ok(())
    }

    /// The attributes as their holder sees them, if another server holds the file.
    ///
    /// # Errors
    /// [`MetaError::Held`]: the holder neither answered nor ended in time.
    pub(super) async fn peek(&self, ino: Ino, holder: Holder) -> Result<Attr, FsError> {
        let deadline = Instant::now() + self.settings.holder_patience;
        let (mut holder, mut pause) = (holder, PEEK_AGAIN);
        loop {
            let changed = self.usage_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Ok(Ok(attr)) = timeout_at(deadline.min(Instant::now() + CALL_PATIENCE), self.holders.peek(holder, ino)).await {
                return Ok(attr);
            }
            self.meta.be_current().await?;
            let attr = attr_of(&self.meta.replica().read(), ino)?;
            match attr.usage.held_from(self.meta.holder()) {
                None => {
                    self.await_seen(ino).await?;
                    return Ok(attr);
                }
                Some(now) => holder = now,
            }
            if Instant::now() >= deadline {
                return Err(MetaError::Held { ino, holder }.into());
            }
            let _ = timeout_at(deadline.min(Instant::now() + pause), changed).await;
            pause = (pause * 2).min(self.settings.ask_again);
        }
    }

    /// Gets the right to write: to buffer, after taking the file if need be, or to write through.
    pub(super) async fn claim(&self, inode: &Inode, pages: Pages) -> Result<WriteMode, FsError> {
        let (ino, me) = (inode.ino, self.meta.holder());
        let deadline = Instant::now() + self.settings.holder_patience;
        loop {
            self.meta.be_current().await?;
            if let Some(mode) = self.write_mode(inode)? {
                return Ok(mode);
            }
            if let Some((what, holder)) = self.held_elsewhere(ino)? {
                self.recall(what, holder, pages, deadline).await?;
                continue;
            }
            let _waits = self.waits.enter(ino, pages);
            // What is written through is placed by what the metadata say alone, so none of it may be
            // under way when others here begin to buffer.
            let _gate = inode.gate.write().await;
            let usage = self.usage(ino)?;
            if self.write_mode(inode)?.is_some() || usage.held_from(me).is_some() {
                continue;
            }
            let although_shared = matches!(usage, FileUse::Shared { .. });
            match self.meta.propose(Op::Own { ino, holder: me, although_shared }).await {
                Ok(_) => inode.local.lock().holding_is_in_doubt = false,
                // Somebody was faster: look again.
                Err(FsError::Meta(MetaError::Held { .. } | MetaError::Shared(_))) if Instant::now() < deadline => {}
                Err(error) => {
                    // It may still happen, while something is written through.
                    inode.local.lock().holding_is_in_doubt = true;
                    return Err(error);
                }
            }
        }
    }

    /// Another server wants the file: what is buffered goes to the metadata, and the file is free or
    /// shared when this answers.
    pub(super) async fn give_up(&self, ino: Ino) -> Result<(), FsError> {
        let inode = self.inode(ino)?;
        let _gate = inode.gate.write().await;
        let FileUse::Owned { holder, since } = self.usage(ino)? else { return Ok(()) };
        if holder != self.meta.holder() {
            return Ok(());
        }
        {
            let mut turn = inode.flushing.lock().await;
            let flushed = self.flush_locked(&inode, &mut turn, Cut::Everything).await;
            // What is over a quota is dropped, and told to whoever wrote it: the other server need not
            // wait for it.
            flushed.or_else(|error| if error.is_over_quota() { Ok(()) } else { Err(error) })?;
        }
        let shared = inode.local.lock().writers > 0;
        self.disown(&[&inode], vec![(ino, since)], shared).await
    }

    /// Gives up files that nobody here writes any more.
    pub(super) async fn give_up_idle(&self) {
        let idle: Vec<Ino> = {
            let mut idle = self.idle.lock();
            std::iter::from_fn(|| idle.pop_first()).take(GIVE_UP_MAX).collect()
        };
        self.give_up_unused(&idle).await;
        idle.into_iter().for_each(|ino| self.release(ino));
    }

    async fn give_up_unused(&self, idle: &[Ino]) {
        let inodes: Vec<Arc<Inode>> = idle.iter().filter_map(|ino| self.inode(*ino).ok()).collect();
        let me = self.meta.holder();
        let (mut gates, mut given, mut files) = (Vec::new(), Vec::new(), Vec::new());
        for inode in &inodes {
            // Somebody is writing right now; the last close comes back here.
            let Ok(gate) = inode.gate.try_write() else { continue };
            if inode.local.lock().writers > 0 {
                continue;
            }
            if inode.has_pending() {
                // Not flushed yet: later.
                self.idle.lock().insert(inode.ino);
                continue;
            }
            if let Ok(FileUse::Owned { holder, since }) = self.usage(inode.ino)
                && holder == me
            {
                gates.push(gate);
                given.push(&**inode);
                files.push((inode.ino, since));
            }
        }
        if files.is_empty() {
            return;
        }
        let count = files.len();
        if let Err(error) = self.disown(&given, files, false).await {
            debug!(count, %error, "files stay owned");
            self.idle.lock().extend(given.iter().map(|inode| inode.ino));
        }
    }

    /// The callers hold the gates alone, and nothing is pending.
    async fn disown(&self, inodes: &[&Inode], files: Vec<(Ino, u64)>, shared: bool) -> Result<(), FsError> {
        let given = self.meta.propose(Op::Disown { files, holder: self.meta.holder(), shared }).await;
        if given.is_err() {
            // It may still happen, at any time: whoever writes next takes the file anew.
            inodes.iter().for_each(|inode| inode.local.lock().holding_is_in_doubt = true);
        }
        given.map(drop)
    }

    /// Before this server stops: gives up everything that could be flushed.
    pub(super) async fn give_up_all(&self) {
        let me = self.meta.holder();
        loop {
            let held = match self.meta.replica().read().held_by(me, GIVE_UP_MAX) {
                Ok(held) => held,
                Err(error) => return warn!(%error, "files stay owned"),
            };
            let pending = self.pending.lock();
            let files: Vec<(Ino, u64)> = held.iter().copied().filter(|(ino, _)| !pending.contains_key(ino)).collect();
            drop(pending);
            if files.is_empty() {
                return;
            }
            if let Err(error) = self.disown(&[], files, false).await {
                return warn!(%error, "files stay owned until this server is back");
            }
        }
    }

    pub(super) async fn life_ended(&self) -> Vec<Ino> {
        let pending: Vec<Arc<Inode>> = self.pending.lock().values().cloned().collect();
        let mut lost = Vec::new();
        for inode in pending {
            let _gate = inode.gate.write().await;
            let mut turn = inode.flushing.lock().await;
            // Whatever was in doubt: it is not this server's business any more.
            self.forget_doubt(&inode, &mut turn);
            if inode.entry.dirty_bytes() > 0 || inode.local.lock().size.is_some() {
                lost.push(inode.ino);
            }
            inode.local.lock().noted_upto = 0;
            self.unwrite(&inode, 0..u64::MAX);
        }
        self.drained.notify_waiters();
        lost
    }

    /// Writes bytes so that they are in the metadata when this answers. The caller has entered the
    /// gate, and the file is shared: nothing of it is buffered here.
    pub(super) async fn write_through(
        &self,
        inode: &Arc<Inode>,
        place: Place,
        data: &Bytes,
        drop_privileges: bool,
        pages: Pages,
    ) -> Result<u64, FsError> {
        let ino = inode.ino;
        let _waits = self.waits.enter(ino, pages);
        let deadline = Instant::now() + self.settings.holder_patience;
        let mut turn = inode.flushing.lock().await;
        loop {
            let size = || Ok::<_, FsError>(attr_of(&self.meta.replica().read(), ino)?.size);
            let (at, data, growth) = match place {
                Place::At(offset) => (offset, data.clone(), Growth::Free),
                Place::End => {
                    let size = size()?;
                    (size, data.clone(), Growth::From(size))
                }
                Place::Within(offset) => (offset, data.slice(..within(size()?, offset, data.len())), Growth::Never),
            };
            if data.is_empty() {
                return Ok(at);
            }
            let written = match self.write_piece(inode, Place::At(at), &data, drop_privileges).await {
                Ok(_) => {
                    if growth == Growth::Never {
                        inode.local.lock().size = None;
                    }
                    self.flush_placed(inode, &mut turn, Cut::Everything, growth).await
                }
                Err(error) => Err(error),
            };
            let Err(error) = written else { return Ok(at) };
            // Nobody was told that these bytes are written; they must not be merged over what other
            // servers write from now on.
            self.unwrite(inode, at..at + data.len() as u64);
            match error {
                FsError::Meta(MetaError::SizeChanged(_) | MetaError::CellChanged { .. }) if Instant::now() < deadline => {}
                error => return Err(error),
            }
        }
    }

    pub(super) fn unwrite(&self, inode: &Inode, range: std::ops::Range<u64>) {
        inode.entry.abandon_flush();
        inode.entry.discard(range);
        let mut local = self.letting_go(inode);
        (local.size, local.mtime) = (None, None);
        local.drops_committed = local.drops_wanted;
        self.rest_if_clean(inode, &mut local);
    }
}

/// Whether what is shared since then may be taken again. A clock that jumped only makes it
/// change hands sooner.
pub(crate) fn is_over(since: Timestamp, shared_for: Duration) -> bool {
    let now = super::now();
    now < since || now.since(since) >= shared_for
}

/// See [`Shared::held_elsewhere`].
pub(super) fn held_elsewhere(ns: &Namespace, attr: &Attr, me: Holder) -> Result<Option<(Ino, Holder)>, FsError> {
    if ns.left_by(me.incarnation)? {
        // What this life had is not all there yet, whoever looks.
        let own = matches!(attr.usage, FileUse::Owned { holder, .. } if holder == me).then_some((attr.ino, me));
        if let Some(held) = own.or(ns.cover(attr.ino)?.filter(|(_, holder)| *holder == me)) {
            return Ok(Some(held));
        }
    }
    Ok(match attr.usage.held_from(me) {
        Some(holder) => Some((attr.ino, holder)),
        None => ns.cover(attr.ino)?.filter(|(_, holder)| *holder != me),
    })
}
