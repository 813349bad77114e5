//! Attributes: stat, chmod, chown, truncate, utimensat.
//!
//! The kernel checks permissions (`default_permissions`). What it leaves to us, because we ask for
//! `FUSE_HANDLE_KILLPRIV_V2`, is taking setuid, setgid and `security.capability` away when a file
//! is changed by somebody who could not have set them.

use std::time::Duration;

use ctfs_meta::{MetaError, Op, SetAttr};
use ctfs_types::{Attr, FileKind, Ino};

use super::{SetTime, Vfs, entry};
use crate::{FsError, caller::Caller, partition::Sight};

/// How long `stat` of the mountpoint waits until every server shows what it answers.
const MOUNTPOINT_PATIENCE: Duration = Duration::from_secs(2);

/// What `setattr` shall change; `None` leaves a field alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SetAttrRequest {
    /// Permission bits, or a whole `st_mode`.
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
}

impl Vfs {
    pub async fn getattr(&self, ino: Ino) -> Result<Attr, FsError> {
        if ino == Ino::ROOT {
            // `stat` of the mountpoint must answer whatever the cluster does.
            let is_cut_off = self.partition.is_cut_off();
            let patience = if is_cut_off { Duration::ZERO } else { MOUNTPOINT_PATIENCE };
            let known = tokio::time::timeout(patience, self.read(|view| view.attr_of(ino))).await;
            if let Ok(Ok(attr)) = known {
                return Ok(attr);
            }
            // The next one need not wait.
            self.partition.ask_beside();
            return self.meta.replica().read().attr(ino)?.ok_or(FsError::Stale(ino));
        }
        let since = self.content.moment();
        let (attr, sight) = self.read_with_sight(ino, |view| view.attr_of(ino)).await?;
        match attr.usage.held_from(self.meta.holder()) {
            Some(holder) if sight == Sight::Present => self.content.peek(ino, holder).await,
            _ => self.shown(attr, since).await,
        }
    }

    /// Whether this caller's chown(-1, -1) would change the mode of somebody else's file. The kernel
    /// checks that of every other chown and chmod.
    fn may_not_drop(caller: Caller, before: &Attr) -> bool {
        let mode = u32::from(before.mode);
        let setgid = mode & libc::S_ISGID != 0 && (mode & libc::S_IXGRP != 0 || !caller.keeps_setgid(before.gid));
        let drops = before.kind != FileKind::Directory && (mode & libc::S_ISUID != 0 || setgid);
        drops && caller.uid != 0 && caller.uid != before.uid
    }

    /// Changes attributes in one step and answers all of them as they are now.
    ///
    /// # Errors
    /// EFBIG over the largest size; EINVAL or EISDIR for truncating what is no file.
    pub async fn setattr(&self, caller: Caller, ino: Ino, request: SetAttrRequest) -> Result<Attr, FsError> {
        let before = self.read(|view| view.attr_of(ino)).await?;
        let now = Self::now();
        let time = |time: Option<SetTime>| {
            time.map(|time| match time {
                SetTime::Now => now,
                SetTime::At(at) => at,
            })
        };
        let mode = request.mode.map(|mode| (mode & 0o7777) as u16);
        // An empty request is chown(-1, -1), which clears the bits all the same.
        let is_chown = request.uid.is_some() || request.gid.is_some() || request == SetAttrRequest::default();
        // The kernel sends the same before it writes for somebody who may write and not keep the bits.
        let is_for_a_write = self.handles.is_open_for_writing(ino);
        if request == SetAttrRequest::default() && !is_for_a_write && Self::may_not_drop(caller, &before) {
            return Err(FsError::NotPermitted);
        }
        let truncates_unprivileged = request.size.is_some() && caller.uid != 0;
        let set = SetAttr {
            mode,
            uid: request.uid,
            gid: request.gid,
            size: request.size,
            atime: time(request.atime),
            mtime: time(request.mtime),
            drop_privileges: before.kind != FileKind::Directory && (is_chown || truncates_unprivileged),
            drop_setgid: match mode {
                Some(mode) if u32::from(mode) & libc::S_ISGID != 0 => {
                    !caller.keeps_setgid(request.gid.unwrap_or(before.gid))
                }
                _ => false,
            },
        };
        match before.kind {
            // All of a file's attributes: what is pending of earlier writes must not undo them.
            FileKind::File => self.content.truncate(ino, set).await,
            FileKind::Directory if set.size.is_some() => Err(MetaError::IsDirectory(ino).into()),
            _ if set.size.is_some() => Err(MetaError::WrongKind(ino).into()),
            _ => entry(self.meta.propose(Op::SetAttr { ino, set }).await?),
        }
    }
}
