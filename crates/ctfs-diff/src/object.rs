//! One object of a tree, held by an `O_PATH` descriptor, and what can be read of it.
//!
//! Opening with `O_PATH` neither runs a driver nor waits for a fifo's writer, and works without any
//! permission on the object. Everything that needs more goes through `/proc/self/fd`, which leads
//! to the very object the descriptor holds, also if its name is another's by now.

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags},
    io::Errno,
};

/// Which inode, as far as the kernel can tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id {
    pub device: (u32, u32),
    pub inode: u64,
}

/// Seconds and nanoseconds.
pub type Time = (i64, u32);

/// What stat(2) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    pub kind: FileType,
    /// The twelve bits of chmod(2).
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub links: u32,
    pub device: (u32, u32),
    pub id: Id,
    /// The mount it is seen through; from kernels before 5.8 the device, which is nearly as good.
    pub mount: u64,
}

impl Stat {
    pub fn of(fd: impl AsFd) -> Result<Self, Errno> {
        let flags = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, flags)?;
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let has_mount = stat.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        Ok(Self {
            kind: FileType::from_raw_mode(u32::from(stat.stx_mode)),
            mode: u32::from(stat.stx_mode) & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            size: stat.stx_size,
            atime: (stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec),
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
            links: stat.stx_nlink,
            device: (stat.stx_rdev_major, stat.stx_rdev_minor),
            id: Id { device, inode: stat.stx_ino },
            mount: if has_mount { stat.stx_mnt_id } else { u64::from(device.0) << 32 | u64::from(device.1) },
        })
    }

    /// Whether somebody changed the object between the two.
    pub fn changed_since(&self, earlier: &Self) -> bool {
        (self.ctime, self.mtime, self.size) != (earlier.ctime, earlier.mtime, earlier.size)
    }
}

/// The word for a type.
pub fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Unknown => "unknown type",
    }
}

/// One of the two paths that were named; a symlink is followed.
pub fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

pub fn open_entry(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// A directory for listing, from its `O_PATH` descriptor.
pub fn open_directory(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    quietly(OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, |flags| {
        rustix::fs::openat(directory, c".", flags, Mode::empty())
    })
}

/// A regular file for reading, from its `O_PATH` descriptor.
pub fn open_file(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let path = proc_path(file);
    quietly(OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY, |flags| rustix::fs::openat(CWD, &*path, flags, Mode::empty()))
}

/// Only the owner and root may ask that the access time stays.
fn quietly(flags: OFlags, open: impl Fn(OFlags) -> Result<OwnedFd, Errno>) -> Result<OwnedFd, Errno> {
    match open(flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open(flags),
        other => other,
    }
}

fn proc_path(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("digits and slashes hold no NUL")
}

pub fn read_link(symlink: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    Ok(rustix::fs::readlinkat(symlink, c"", Vec::new())?.into_bytes())
}

pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// How often a list or value that grows while it is read is asked for again.
const TRIES_MAX: usize = 8;

/// Every xattr that this user may list, of any type of object.
pub fn xattrs(object: BorrowedFd<'_>) -> Result<Xattrs, Errno> {
    let path = proc_path(object);
    let list = match grown(|buffer| rustix::fs::listxattr(&*path, buffer)) {
        // A file system without xattrs; nothing is lost on it.
        Err(Errno::OPNOTSUPP) => return Ok(Xattrs::new()),
        list => list?,
    };
    let mut xattrs = Xattrs::new();
    for name in list.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        match grown(|buffer| rustix::fs::getxattr(&*path, name, buffer)) {
            Ok(value) => drop(xattrs.insert(name.to_owned(), value)),
            // Removed meanwhile.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(xattrs)
}

/// Calls with a buffer that grows until the answer fits; the kernel's limit is 64 KiB for both
/// lists and values, file systems in user space may have others.
fn grown(call: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    // Most answers fit the first time, and a call with no buffer would ask the file system twice.
    let mut len = 512;
    for _ in 0..TRIES_MAX {
        let mut buffer = vec![0; len];
        match call(&mut buffer) {
            Ok(filled) => {
                buffer.truncate(filled);
                return Ok(buffer);
            }
            Err(Errno::RANGE) => len *= 4,
            Err(error) => return Err(error),
        }
    }
    Err(Errno::RANGE)
}
