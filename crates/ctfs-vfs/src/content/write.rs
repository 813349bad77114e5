//! Writing into the cache tier, and waiting for room in it.

use std::sync::Arc;

use bytes::Bytes;
use ctfs_meta::MetaError;
use ctfs_types::{
    Ino,
    limits::FILE_BYTES_MAX,
    rules::{Rule, keeps},
};
use tokio::time::{Instant, timeout_at};

use super::{
    Inode, Local, Pages, Shared, attr_of, cache_error, now,
    sharing::WriteMode,
};
use crate::FsError;

/// Least bytes that a write is cut into where the tier is small.
const PIECE_BYTES_MIN: u64 = 64 << 10;
/// How often a write looks for room below a quota that others here are filling, too.
const QUOTA_TRIES: u32 = 4;

#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    At(u64),
    End,
    /// Pages of a mapping: they make no file longer. What lies past its end was written before
    /// somebody cut it off, and goes with that.
    Within(u64),
}

impl Shared {
    /// Answers where the bytes went and how many they were.
    pub(super) async fn write(
        &self,
        ino: Ino,
        place: Place,
        data: Bytes,
        drop_privileges: bool,
        pages: Pages,
    ) -> Result<(u64, u32), FsError> {
        let inode = self.inode(ino)?;
        let deadline = Instant::now() + self.settings.holder_patience;
        let (mut data, mut tries) = (data, 0);
        loop {
            self.meta.be_current().await?;
            let gate = inode.enter().await;
            // Looked at behind the gate: the file changes hands only before it.
            let mode = match self.write_mode(&inode)? {
                Some(mode) => mode,
                None if matches!(place, Place::Within(_)) && !keeps(Rule::LateStoresTakeTheFile) => WriteMode::Buffer,
                None => {
                    drop(gate);
                    self.claim(&inode, pages).await?;
                    continue;
                }
            };
            self.know_the_size(&inode).await?;
            let written = self.write_in_mode(&inode, mode, place, &data, drop_privileges, pages).await;
            match written {
                // Another server took the file on the way; nothing was written.
                Err(FsError::Meta(MetaError::Held { .. })) if Instant::now() < deadline => continue,
                _ => {}
            }
            if mode == WriteMode::Buffer && keeps(Rule::LateStoresTakeTheFile) {
                // A pause in between may have ended this life, and others have the file.
                self.meta.be_current().await?;
                if self.write_mode(&inode)? != Some(WriteMode::Buffer) {
                    drop(gate);
                    return Err(FsError::LostWrites { ino, why: "this server was cut off while it wrote".into() });
                }
            }
            drop(gate);
            match written {
                Err(error) if error.is_over_quota() && tries < QUOTA_TRIES => {
                    tries += 1;
                    let _waits = self.waits.enter(ino, pages);
                    self.flush_below_quotas(ino).await?;
                    data.truncate(self.fitting(&inode, place, &data)?);
                    if data.is_empty() {
                        return Err(error);
                    }
                }
                written => return written,
            }
        }
    }

    async fn write_in_mode(
        &self,
        inode: &Arc<Inode>,
        mode: WriteMode,
        place: Place,
        data: &Bytes,
        drop_privileges: bool,
        pages: Pages,
    ) -> Result<(u64, u32), FsError> {
        let piece_bytes = (self.tier.limit() / 8).max(PIECE_BYTES_MIN) as usize;
        let mut at = None;
        let mut done = 0;
        loop {
            let piece = data.slice(done..data.len().min(done + piece_bytes));
            let place = match (place, at) {
                (Place::Within(start), _) => Place::Within(start + done as u64),
                (_, Some(start)) => Place::At(start + done as u64),
                (place, None) => place,
            };
            let written = match mode {
                WriteMode::Buffer => self.write_piece(inode, place, &piece, drop_privileges).await,
                WriteMode::Through => self.write_through(inode, place, &piece, drop_privileges, pages).await,
            };
            match written {
                Ok(offset) => at = at.or(Some(offset)),
                // What was written before counts, as write(2) has it.
                Err(_) if done > 0 => return Ok((at.unwrap_or(0), done as u32)),
                Err(error) => return Err(error),
            }
            done += piece.len();
            if done >= data.len() {
                return Ok((at.unwrap_or(0), done as u32));
            }
        }
    }

    /// Writes bytes, waiting for room if there is none. The caller has entered the gate.
    pub(super) async fn write_piece(
        &self,
        inode: &Arc<Inode>,
        place: Place,
        data: &[u8],
        drop_privileges: bool,
    ) -> Result<u64, FsError> {
        match self.try_write(inode, place, data, drop_privileges) {
            Err(FsError::CacheFull) => {}
            done => return done,
        }
        let deadline = Instant::now() + self.settings.room_patience;
        loop {
            // Registered before looking, so that a flush that ends in between is not missed.
            let drained = self.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            match self.try_write(inode, place, data, drop_privileges) {
                // Nothing is left to be flushed, so waiting would not make room.
                Err(FsError::CacheFull) if self.tier.dirty_bytes() == 0 => return Err(FsError::CacheFull),
                Err(FsError::CacheFull) => {}
                done => return done,
            }
            self.kick.notify_one();
            timeout_at(deadline, drained).await.map_err(|_| FsError::CacheFull)?;
        }
    }

    /// Writes bytes if there is room. Never waits.
    ///
    /// # Errors
    /// [`FsError::CacheFull`] also when unflushed bytes would take more than half of the tier: the
    /// other half is for reading.
    fn try_write(
        &self,
        inode: &Arc<Inode>,
        place: Place,
        data: &[u8],
        drop_privileges: bool,
    ) -> Result<u64, FsError> {
        let dirty = self.tier.dirty_bytes();
        if dirty > 0 && dirty + data.len() as u64 > self.tier.limit() / 2 {
            return Err(FsError::CacheFull);
        }
        // Held over the write: two appends must not find the same end.
        let mut local = inode.local.lock();
        let size = || {
            let attr = attr_of(&self.meta.replica().read(), inode.ino)?;
            Ok::<_, FsError>(attr.size.max(local.size.unwrap_or(0)))
        };
        let (offset, data) = match place {
            Place::At(offset) => (offset, data),
            Place::End => (size()?, data),
            Place::Within(offset) => (offset, &data[..within(size()?, offset, data.len())]),
        };
        let end = offset.checked_add(data.len() as u64).filter(|&end| end <= FILE_BYTES_MAX).ok_or(FsError::TooBig)?;
        self.set_aside(inode, local.size, offset, data)?;
        inode.entry.write(offset, data).map_err(|error| cache_error(inode.ino, error))?;
        if !data.is_empty() {
            local.size = local.size.max(Some(end));
            local.unnoted.insert(offset..end);
            self.touch(inode, &mut local, drop_privileges);
        }
        let much = inode.entry.dirty_bytes() > self.settings.dirty_inode_bytes;
        if much && !local.in_background {
            self.kick.notify_one();
        }
        Ok(offset)
    }

    /// Notes that the file was changed here, now.
    pub(super) fn touch(&self, inode: &Arc<Inode>, local: &mut Local, drop_privileges: bool) {
        local.mtime = Some(now());
        local.drops_wanted += u64::from(drop_privileges);
        self.has_something_pending(inode, local);
    }

    /// The background looks after it if nobody else does.
    pub(super) fn has_something_pending(&self, inode: &Arc<Inode>, local: &mut Local) {
        if local.since.is_none() {
            local.since = Some(std::time::Instant::now());
            self.pending.lock().insert(inode.ino, inode.clone());
        }
    }

    /// Has the background look after it no more if nothing is left to be flushed; answers whether so.
    pub(super) fn rest_if_clean(&self, inode: &Inode, local: &mut Local) -> bool {
        if local.in_doubt {
            // The background has to find out.
            return false;
        }
        self.settle_aside(inode);
        if local.attributes_pending() || inode.entry.dirty_bytes() > 0 {
            return false;
        }
        local.since = None;
        (local.due, local.lingers_since) = (false, None);
        self.pending.lock().remove(&inode.ino);
        true
    }
}

/// How many of `len` bytes at `offset` lie before the end of the file.
pub(super) fn within(size: u64, offset: u64, len: usize) -> usize {
    usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(len)
}
