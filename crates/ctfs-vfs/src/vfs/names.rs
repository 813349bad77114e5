//! Directories: looking up, making, removing, moving and listing names.

use ctfs_meta::{MetaError, NewContent, NewNode, Op, RenameMode};
use ctfs_types::{Attr, FileKind, FileName, Ino, Timestamp};

use super::{Vfs, entry};
use crate::{
    FsError,
    caller::Caller,
    handles::{HandleId, OpenMode},
};

/// A time as utimensat(2) takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    Now,
    At(Timestamp),
}

/// One line of a directory listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirItem {
    /// `.`, `..` or an entry's name.
    pub name: Vec<u8>,
    pub ino: Ino,
    pub kind: FileKind,
    /// Where the listing goes on after this line.
    pub next: u64,
    /// Present if asked for, except of an entry that vanished meanwhile.
    pub attr: Option<Attr>,
}

/// Offsets below this are `.` and `..`; an entry's is its cookie plus this.
const COOKIE_BASE: u64 = 2;

impl Vfs {
    /// The attributes of what `name` in `parent` leads to.
    ///
    /// # Errors
    /// [`MetaError::NoSuchEntry`] (ENOENT), [`MetaError::NotDirectory`] (ENOTDIR).
    pub async fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr, FsError> {
        let name = FileName::new(name)?;
        let since = self.content.moment();
        let attr = self
            .read_of(parent, |view| {
                let Some(ino) = view.lookup(parent, &name)? else {
                    // Only now is it worth asking why.
                    return match view.kind(parent)? {
                        None => Err(FsError::Stale(parent)),
                        Some(kind) if kind != FileKind::Directory => Err(MetaError::NotDirectory(parent).into()),
                        Some(_) => Err(MetaError::NoSuchEntry { parent, name: name.clone() }.into()),
                    };
                };
                view.attr_of(ino)
            })
            .await?;
        self.shown(attr, since).await
    }

    /// # Errors
    /// EINVAL when `ino` is no symlink.
    pub async fn readlink(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        self.read_of(ino, |view| match view.readlink(ino)? {
            Some(target) => Ok(target),
            None => Err(view.attr_of(ino).map_or_else(|gone| gone, |_| MetaError::WrongKind(ino).into())),
        })
        .await
    }

    /// Makes anything but a directory or symlink. `mode` is a whole `st_mode`; the parent's
    /// default ACL, or else `umask`, is applied by the namespace.
    pub async fn mknod(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
        rdev: u64,
    ) -> Result<Attr, FsError> {
        let content = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => NewContent::File,
            libc::S_IFIFO => NewContent::Fifo,
            libc::S_IFSOCK => NewContent::Socket,
            libc::S_IFCHR => NewContent::CharDevice { rdev },
            libc::S_IFBLK => NewContent::BlockDevice { rdev },
            _ => return Err(FsError::Invalid("file type of mknod")),
        };
        self.make(caller, parent, name, content, mode, umask).await
    }

    pub async fn mkdir(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
    ) -> Result<Attr, FsError> {
        self.make(caller, parent, name, NewContent::Directory, mode, umask).await
    }

    pub async fn symlink(&self, caller: Caller, parent: Ino, name: &[u8], target: &[u8]) -> Result<Attr, FsError> {
        let content = NewContent::Symlink { target: target.to_vec() };
        self.make(caller, parent, name, content, 0o777, 0).await
    }

    pub(super) async fn make(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        content: NewContent,
        mode: u32,
        umask: u32,
    ) -> Result<Attr, FsError> {
        self.make_node(parent, name, new_node(caller, content, mode, umask)).await
    }

    pub(super) async fn make_node(&self, parent: Ino, name: &[u8], node: NewNode) -> Result<Attr, FsError> {
        let name = FileName::new(name)?;
        entry(self.meta.propose(Op::Make { parent, name, node }).await?)
    }

    pub async fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attr, FsError> {
        let name = FileName::new(name)?;
        let since = self.content.moment();
        let attr = entry(self.meta.propose(Op::Link { ino, parent, name }).await?)?;
        self.shown(attr, since).await
    }

    pub async fn unlink(&self, parent: Ino, name: &[u8]) -> Result<(), FsError> {
        let name = FileName::new(name)?;
        self.meta.propose(Op::Unlink { parent, name }).await.map(drop)
    }

    pub async fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<(), FsError> {
        let name = FileName::new(name)?;
        self.meta.propose(Op::Rmdir { parent, name }).await.map(drop)
    }

    /// `flags` as renameat2(2) takes them.
    ///
    /// # Errors
    /// [`FsError::Invalid`]: `RENAME_WHITEOUT`, which is for overlay file systems' upper layers, or
    /// flags that exclude each other.
    pub async fn rename(&self, from: Ino, name: &[u8], to: Ino, new_name: &[u8], flags: u32) -> Result<(), FsError> {
        let mode = match flags {
            0 => RenameMode::Replace,
            libc::RENAME_NOREPLACE => RenameMode::NoReplace,
            libc::RENAME_EXCHANGE => RenameMode::Exchange,
            _ => return Err(FsError::Invalid("flags of rename")),
        };
        let (name, new_name) = (FileName::new(name)?, FileName::new(new_name)?);
        let (moved, replaced) = {
            let ns = self.meta.replica().read();
            (ns.lookup(from, &name)?, ns.lookup(to, &new_name)?)
        };
        if let (Some(moved), Some(_)) = (moved, replaced) {
            // What was there goes for good, also when the power goes: not before the new content is safe.
            self.content.flush_if_due(moved).await?;
        }
        self.meta.propose(Op::Rename { from, name, to, new_name, mode }).await.map(drop)
    }

    /// Opens a directory. What it shows is asked for by [`Self::readdir`], which waits until that is
    /// no listing of the past; opening waits for nobody, so that `df` and `ls -d`, which open and do
    /// not list, answer also without a majority.
    ///
    /// # Errors
    /// ENOTDIR, ESTALE.
    pub async fn opendir(&self, ino: Ino) -> Result<HandleId, FsError> {
        let here = self.meta.replica().read().attr(ino)?.map(|attr| attr.kind);
        let kind = match here {
            Some(kind) => kind,
            // Made elsewhere a moment ago, or gone: worth asking.
            None => self.read_of(ino, |view| view.kind(ino)?.ok_or(FsError::Stale(ino))).await?,
        };
        if kind != FileKind::Directory {
            return Err(MetaError::NotDirectory(ino).into());
        }
        self.handles.open(ino, OpenMode::DIRECTORY, || Ok(self.meta.replica().read().attr(ino)?.map(|attr| attr.nlink)))
    }

    /// Up to `limit` lines from `offset` on (0 starts); fewer only at the end.
    ///
    /// An entry keeps its offset as long as it lives, so a program that makes or removes entries
    /// while it lists sees every other entry exactly once.
    pub async fn readdir(&self, dir: Ino, offset: u64, limit: usize, with_attrs: bool) -> Result<Vec<DirItem>, FsError> {
        let since = self.content.moment();
        let mut items = self
            .read_of(dir, |view| {
                let kind = view.kind(dir)?.ok_or(FsError::Stale(dir))?;
                if kind != FileKind::Directory {
                    return Err(MetaError::NotDirectory(dir).into());
                }
                let mut items = Vec::with_capacity(limit.min(1024));
                if offset == 0 {
                    items.push(DirItem { name: b".".into(), ino: dir, kind, next: 1, attr: None });
                }
                if offset <= 1 {
                    let parent = view.parent(dir)?.unwrap_or(dir);
                    let kind = FileKind::Directory;
                    items.push(DirItem { name: b"..".into(), ino: parent, kind, next: COOKIE_BASE, attr: None });
                }
                let room = limit.saturating_sub(items.len());
                for found in view.list(dir, offset.saturating_sub(COOKIE_BASE), room)? {
                    let attr = if with_attrs { view.attr(found.ino)? } else { None };
                    let next = found.cookie.saturating_add(COOKIE_BASE);
                    items.push(DirItem { name: found.name.into(), ino: found.ino, kind: found.kind, next, attr });
                }
                if with_attrs {
                    for item in items.iter_mut().filter(|item| item.attr.is_none()) {
                        item.attr = view.attr(item.ino)?;
                    }
                }
                Ok(items)
            })
            .await?;
        for attr in items.iter_mut().filter_map(|item| item.attr.as_mut()) {
            *attr = self.shown(attr.clone(), since).await?;
        }
        Ok(items)
    }

    pub async fn releasedir(&self, handle: HandleId) {
        self.handles.close(handle);
    }

    /// Names are durable as the directory asks when the journal has their commands, or on a majority when
    /// the log has.
    pub async fn fsyncdir(&self, dir: Ino, handle: HandleId) -> Result<(), FsError> {
        self.handles.mode(handle, dir)?;
        let class = self.meta.replica().read().effective_policy(dir)?.durability;
        let settled = if self.meta.durable(class).await? { Ok(()) } else { self.settled_as(class).await };
        self.handles.take_error(handle).map_or(settled, Err)
    }
}

pub(super) fn new_node(caller: Caller, content: NewContent, mode: u32, umask: u32) -> NewNode {
    NewNode {
        content,
        mode: (mode & 0o7777) as u16,
        umask: (umask & 0o777) as u16,
        uid: caller.uid,
        gid: caller.gid,
        // Always: the kernel has checked the rights to make a file here, not those to open one
        // that somebody else made a moment ago.
        exclusive: true,
        holder: None,
        ino: None,
        cell: None,
    }
}
