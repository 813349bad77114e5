//! Files: open, read, write, fsync, close, and what else is done to bytes.

use bytes::Bytes;
use ctfs_meta::{Change, Durability, MetaError, NewContent, SetAttr};
use ctfs_types::{Attr, FileKind, FileUse, Ino};

use super::{Vfs, names::new_node};
use crate::{
    partition::Sight,
    FsError, Pages,
    caller::Caller,
    handles::{HandleId, OpenMode},
};

/// A handle, and what the kernel may do with its cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    pub handle: HandleId,
    /// The pages the kernel has from earlier are still good.
    pub keep_cache: bool,
    /// Reads and writes shall bypass the kernel's page cache.
    pub direct: bool,
    /// Closing a descriptor needs nothing done before it returns.
    pub closes_at_once: bool,
}

impl Vfs {
    /// Opens a file. `O_TRUNC` empties it before the answer.
    ///
    /// # Errors
    /// - [`FsError::Stale`]: gone, or without a name and not open here; the kernel walks the path again.
    /// - EISDIR, or EINVAL for what is neither file nor directory.
    pub async fn open(&self, caller: Caller, ino: Ino, flags: i32) -> Result<Opened, FsError> {
        let mut mode = OpenMode::from_flags(flags);
        let (attr, sight) = match mode.write {
            true => (self.read(|view| view.attr_of(ino)).await?, Sight::Present),
            false => self.read_with_sight(ino, |view| view.attr_of(ino)).await?,
        };
        match attr.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(MetaError::IsDirectory(ino).into()),
            _ => return Err(MetaError::WrongKind(ino).into()),
        }
        let attr = if mode.read && mode.write {
            // It can be mapped, and stores through a mapping ask nobody.
            self.content.claim(ino).await?;
            self.read(|view| view.attr_of(ino)).await?
        } else if sight == Sight::Present && !self.content.is_settled(&attr)? {
            self.content.settle(ino).await?;
            self.read(|view| view.attr_of(ino)).await?
        } else {
            attr
        };
        mode.direct |= wants_direct(mode) || matches!(attr.usage, FileUse::Shared { .. });
        // A close that is not told of leaves the process's locks through other descriptors: there is none now.
        let closes_at_once = !mode.write && !self.handles.is_in_use(ino);
        let handle = self.open_handle(ino, mode)?;
        if flags & libc::O_TRUNC != 0 {
            let set = SetAttr { size: Some(0), drop_privileges: caller.uid != 0, ..SetAttr::default() };
            if let Err(error) = self.content.truncate(ino, set).await {
                self.close(handle).await;
                return Err(error);
            }
        }
        let keep_cache = flags & libc::O_TRUNC == 0 && self.knows_pages(ino, attr.data_version);
        if !keep_cache {
            self.pages_are_current(ino);
        }
        Ok(Opened { handle, keep_cache, direct: mode.direct, closes_at_once })
    }

    /// Makes a file and opens it.
    ///
    /// # Errors
    /// EEXIST with `O_EXCL`. Without it, [`FsError::Stale`] for a name that somebody made since the
    /// kernel looked: it looks again and opens what is there, with the rights that takes.
    pub async fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
        flags: i32,
    ) -> Result<(Attr, Opened), FsError> {
        let mut open = OpenMode::from_flags(flags);
        open.direct |= wants_direct(open);
        let mut node = new_node(caller, NewContent::File, mode, umask);
        node.holder = open.write.then(|| self.meta.holder());
        let attr = match self.make_node(parent, name, node).await {
            Err(FsError::Meta(MetaError::Exists { parent, .. })) if flags & libc::O_EXCL == 0 => {
                return Err(FsError::Stale(parent));
            }
            made => made?,
        };
        let handle = self.open_handle(attr.ino, open)?;
        Ok((attr, Opened { handle, keep_cache: false, direct: open.direct, closes_at_once: false }))
    }

    fn open_handle(&self, ino: Ino, mode: OpenMode) -> Result<HandleId, FsError> {
        let links = || Ok(self.meta.replica().read().attr(ino)?.map(|attr| attr.nlink));
        let handle = self.handles.open(ino, mode, links)?;
        self.content.opened(ino, mode.write);
        Ok(handle)
    }

    /// Reads up to `len` bytes at `offset`; shorter only at the end of the file.
    pub async fn read_file(&self, ino: Ino, handle: HandleId, offset: u64, len: u32) -> Result<Bytes, FsError> {
        // The mode is not checked: the kernel fills pages through any handle of the inode, also one
        // that was opened for writing only.
        let mode = self.handles.mode(handle, ino)?;
        self.content.read(ino, offset, len, pages(mode)).await
    }

    /// Whether the kernel's page cache is bypassed through this handle.
    pub fn is_direct(&self, ino: Ino, handle: HandleId) -> bool {
        self.handles.mode(handle, ino).is_ok_and(|mode| mode.direct)
    }

    /// Writes `data` and answers how much of it: less than all where room ended. `drop_privileges`:
    /// the kernel says that the writer may not keep setuid and setgid bits. `from_cache`: these are
    /// pages of a mapping that the kernel writes back, so the offset holds whatever the handle was
    /// opened for.
    ///
    /// # Errors
    /// [`FsError::CacheFull`] or [`FsError::NoSpace`] (ENOSPC), [`FsError::TooBig`] (EFBIG), or EDQUOT.
    #[allow(clippy::too_many_arguments)] // As many as the kernel's request has.
    pub async fn write(
        &self,
        caller: Caller,
        ino: Ino,
        handle: HandleId,
        offset: u64,
        data: Bytes,
        drop_privileges: bool,
        from_cache: bool,
    ) -> Result<u32, FsError> {
        let mode = self.handles.mode(handle, ino)?;
        if !mode.write {
            return Err(FsError::WrongMode);
        }
        let drop_privileges = drop_privileges || caller.uid != 0;
        if from_cache {
            return self.write_pages(ino, offset, data, drop_privileges).await;
        }
        let pages = pages(mode);
        if mode.append || mode.direct {
            self.drop_capability(ino).await?;
        }
        if !mode.append {
            return self.content.write(ino, offset, data, drop_privileges, pages).await;
        }
        let (written_at, len) = self.content.append(ino, data, drop_privileges, pages).await?;
        if written_at != offset {
            // Somebody else appended since the kernel looked at the size: its pages hold our bytes
            // where they are not.
            self.invalidate(vec![Change::Data { ino, offset: offset.min(written_at), len: u64::MAX }]);
        }
        Ok(len)
    }

    /// Writes pages of a mapping. The kernel does not look at how much of them was written, so what
    /// has no room is an error, which msync(2) and fsync(2) tell; what fits is kept.
    async fn write_pages(&self, ino: Ino, offset: u64, data: Bytes, drop_privileges: bool) -> Result<u32, FsError> {
        let mut done = 0;
        while done < data.len() {
            let rest = data.slice(done..);
            let written = self.content.write_pages(ino, offset + done as u64, rest, drop_privileges).await?;
            if written == 0 {
                return Err(FsError::CacheFull);
            }
            done += written as usize;
        }
        Ok(done as u32)
    }

    /// One descriptor of the handle was closed: whoever opens the file next, anywhere, sees everything
    /// that was written. Where this server holds the directory, little is written back a moment later; elsewhere
    /// little goes into the journal, and what is more is durable when this answers. Drops the process's
    /// record locks.
    ///
    /// # Errors
    /// What this handle has not been told yet of lost writes, once.
    pub async fn flush(&self, ino: Ino, handle: HandleId, owner: u64) -> Result<(), FsError> {
        let mode = self.handles.mode(handle, ino)?;
        let written = match mode.write {
            true if self.content.flush_soon(ino) || self.content.write_down(ino).await.unwrap_or(false) => self.handles.take_error(handle).map_or(Ok(()), Err),
            true => self.write_back(ino, handle).await,
            false => Ok(()),
        };
        // Also after a failure: the descriptor is closed whatever we say.
        let unlocked = self.drop_locks_of(ino, owner).await;
        written.and(unlocked)
    }

    /// # Errors
    /// As [`Self::flush`].
    pub async fn fsync(&self, ino: Ino, handle: HandleId) -> Result<(), FsError> {
        self.handles.mode(handle, ino)?;
        let class = self.meta.replica().read().effective_policy(ino)?.durability;
        if self.is_in_journal(ino, class).await? {
            return self.handles.take_error(handle).map_or(Ok(()), Err);
        }
        self.write_back(ino, handle).await?;
        let settled = self.settled_as(class).await;
        // Also what was lost meanwhile.
        self.handles.take_error(handle).map_or(settled, Err)
    }

    /// Whether everything written to the file is durable by the journal, as its directory asks.
    async fn is_in_journal(&self, ino: Ino, class: Durability) -> Result<bool, FsError> {
        Ok(self.meta.journal_counts(class) && self.content.write_down(ino).await? && self.meta.durable(class).await?)
    }

    async fn write_back(&self, ino: Ino, handle: HandleId) -> Result<(), FsError> {
        let flushed = self.content.flush(ino).await;
        if let Some(lost) = self.content.take_error(ino) {
            self.handles.spread_error(ino, &lost);
        }
        match self.handles.take_error(handle) {
            Some(lost) => Err(lost),
            None => flushed,
        }
    }

    /// The last descriptor and mapping of the handle are gone. Drops the locks it leaves behind.
    pub async fn release(&self, handle: HandleId) {
        self.close(handle).await;
    }

    pub(super) async fn close(&self, handle: HandleId) {
        let Some((ino, mode, lock_owners)) = self.handles.close(handle) else { return };
        self.pages_are_current(ino);
        if mode.write && !self.content.may_wait(ino) {
            // Stores through a mapping can arrive after the last close; nobody is left to be told.
            if let Err(error) = self.content.flush(ino).await {
                tracing::warn!(%ino, %error, "write back after the last close");
            }
        }
        self.content.closed(ino, mode.write);
        self.drop_left_locks(ino, lock_owners).await;
    }

    /// `mode` as fallocate(2) takes it.
    pub async fn fallocate(&self, ino: Ino, handle: HandleId, offset: u64, len: u64, mode: i32) -> Result<(), FsError> {
        if !self.handles.mode(handle, ino)?.write {
            return Err(FsError::WrongMode);
        }
        self.content.allocate(ino, mode, offset, len).await
    }

    /// `SEEK_DATA` and `SEEK_HOLE`; the kernel does the others itself.
    ///
    /// # Errors
    /// [`FsError::PastEnd`] (ENXIO).
    pub async fn lseek(&self, ino: Ino, handle: HandleId, offset: u64, whence: i32) -> Result<u64, FsError> {
        self.handles.mode(handle, ino)?;
        self.content.seek(ino, offset, whence).await
    }

    /// Copies up to `len` bytes, sharing whole cells where both ranges allow it. Answers how many.
    pub async fn copy_file_range(
        &self,
        from: (Ino, HandleId, u64),
        to: (Ino, HandleId, u64),
        len: u64,
    ) -> Result<u64, FsError> {
        let ((source, source_handle, source_offset), (target, target_handle, target_offset)) = (from, to);
        self.handles.mode(source_handle, source)?;
        if !self.handles.mode(target_handle, target)?.write {
            return Err(FsError::WrongMode);
        }
        self.content.copy(source, source_offset, target, target_offset, len).await
    }
}

fn pages(mode: OpenMode) -> Pages {
    if mode.direct { Pages::Unlocked } else { Pages::Locked }
}

/// A handle that only appends cannot be mapped, and the kernel's idea of where the end is may be
/// old. Without pages there is nothing that could hold its bytes in the wrong place.
fn wants_direct(mode: OpenMode) -> bool {
    mode.append && !mode.read
}
