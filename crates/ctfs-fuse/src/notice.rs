//! Messages to the kernel that no request asked for, written to `/dev/fuse` as `fuse.h` has them.
//!
//! Written by hand, because an entry is *expired* (`FUSE_EXPIRE_ONLY`, protocol 7.38) rather than
//! thrown out: the next walk asks us again, and if the name still leads to the same inode, working
//! directories and mounts below it stay. Throwing it out would detach them. A name that is gone is
//! thrown out all the same: a directory that is only expired in its old place cannot be taken up in
//! its new one by a rename, which would fail with ESTALE.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use ctfs_types::{FileName, Ino};

use crate::mountinfo;

const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_INVAL_ENTRY: i32 = 3;
/// Since protocol 7.44.
const NOTIFY_INC_EPOCH: i32 = 8;
const EXPIRE_ONLY: u32 = 1;
/// `fuse_out_header`: length, code, and a request number that is 0 for notices.
const HEADER_BYTES: usize = 16;

/// What the kernel understands, as the handshake told.
#[derive(Debug, Default)]
pub struct Abilities {
    /// `FUSE_EXPIRE_ONLY`.
    pub expire: AtomicBool,
    /// `FUSE_NOTIFY_INC_EPOCH`.
    pub epoch: AtomicBool,
}

/// A second descriptor of the mount's `/dev/fuse`, for notices only.
#[derive(Debug)]
pub struct NoticeChannel {
    device: File,
    kernel: Arc<Abilities>,
    mountpoint: PathBuf,
}

impl NoticeChannel {
    /// `kernel` may be filled in by the handshake later.
    pub fn new(device: OwnedFd, kernel: Arc<Abilities>, mountpoint: PathBuf) -> Self {
        Self { device: File::from(device), kernel, mountpoint }
    }

    /// Makes the kernel throw out every name it knows when it comes upon it next. Waits for nobody.
    /// `false`: it cannot, or must not, because something is mounted inside, which would be detached
    /// with the name it is mounted on.
    pub fn forget_names(&self) -> bool {
        let may = self.kernel.epoch.load(Relaxed) && !mountinfo::any_inside(&self.mountpoint).unwrap_or(true);
        may && self.send(NOTIFY_INC_EPOCH, &[]).inspect_err(|error| tracing::warn!(%error, "no sweep of names")).is_ok()
    }

    /// Makes the kernel ask again for `name`, or throw it out when it is gone. Waits for the kernel's
    /// lock on the directory.
    pub fn forget_entry(&self, parent: Ino, name: &FileName, gone: bool) -> io::Result<()> {
        let mut body = Vec::with_capacity(16 + name.as_bytes().len() + 1);
        body.extend(parent.0.to_ne_bytes());
        body.extend((name.as_bytes().len() as u32).to_ne_bytes());
        let expires = self.kernel.expire.load(Relaxed) && !gone;
        body.extend(if expires { EXPIRE_ONLY } else { 0 }.to_ne_bytes());
        body.extend(name.as_bytes());
        body.push(0);
        self.send(NOTIFY_INVAL_ENTRY, &body)
    }

    /// Makes the kernel ask again for the inode's attributes. Waits for nobody.
    pub fn forget_attr(&self, ino: Ino) -> io::Result<()> {
        self.forget_inode(ino, -1, 0)
    }

    /// Drops pages in `[offset, offset + len)`, and attributes. Waits for reads and writes of those
    /// pages that are under way. `len` 0 means to the end.
    pub fn forget_pages(&self, ino: Ino, offset: u64, len: u64) -> io::Result<()> {
        let len = i64::try_from(len).unwrap_or(0);
        match i64::try_from(offset) {
            // The sum must not overflow in the kernel, either.
            Ok(offset) => self.forget_inode(ino, offset, if offset.checked_add(len).is_some() { len } else { 0 }),
            Err(_) => self.forget_attr(ino),
        }
    }

    fn forget_inode(&self, ino: Ino, offset: i64, len: i64) -> io::Result<()> {
        let mut body = Vec::with_capacity(24);
        body.extend(ino.0.to_ne_bytes());
        body.extend(offset.to_ne_bytes());
        body.extend(len.to_ne_bytes());
        self.send(NOTIFY_INVAL_INODE, &body)
    }

    fn send(&self, code: i32, body: &[u8]) -> io::Result<()> {
        let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
        message.extend(((HEADER_BYTES + body.len()) as u32).to_ne_bytes());
        message.extend(code.to_ne_bytes());
        message.extend(0u64.to_ne_bytes());
        message.extend(body);
        match rustix::io::write(&self.device, &message) {
            Ok(_) => Ok(()),
            // The kernel does not know the inode or name, so it keeps nothing of it.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(()),
            // The mount is gone, and its caches with it.
            Err(rustix::io::Errno::NODEV | rustix::io::Errno::PERM) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
