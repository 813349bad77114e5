//! Requests: each callback of `fuser` becomes one operation of the file system.
//!
//! Thin on purpose. What is decided here is only what belongs to the protocol: which reply a result
//! becomes, how long the kernel may keep it, and the size games of extended attributes.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Instant, SystemTime},
};

use bytes::Bytes;
use ctfs_meta::{Change, MetaError};
use ctfs_types::Ino;
use ctfs_vfs::{Caller, FsError, HandleId, LockRequest, Opened, SetAttrRequest, Vfs};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::{
    caches::Caches,
    convert::{BLOCK_BYTES, decode_dev, errno, file_attr, file_type, generation, set_time},
    listings::Usage,
    notice::{Abilities, NoticeChannel},
    replies::Replies,
    runner::Runner,
    undo::FailedWrites,
};

/// What we ask of the kernel, if it can. Left out, each with its reason:
/// `WRITEBACK_CACHE` (forbids passthrough, and write-back belongs to the cache tier),
/// `ATOMIC_O_TRUNC` (the file is emptied before the kernel finds that it is a program that runs),
/// `AUTO_INVAL_DATA` (would drop pages whenever a flush sets the mtime; we say what changed),
/// `SETXATTR_EXT`, `SECURITY_CTX`, `CREATE_SUPP_GROUP`, `ALLOW_IDMAP` (fuser 0.18 cannot parse them).
const WANTED: [InitFlags; 15] = [
    // Without it each write asks for security.capability first.
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_POSIX_LOCKS,
    InitFlags::FUSE_FLOCK_LOCKS,
    InitFlags::FUSE_DONT_MASK,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    // A symlink's target never changes.
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_BIG_WRITES,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_ASYNC_READ,
    InitFlags::FUSE_HAS_EXPIRE_ONLY,
];
/// The protocol that has `FUSE_NOTIFY_INC_EPOCH`: Linux 6.16.
const INC_EPOCH_SINCE: (u32, u32) = (7, 44);
/// One request carries at most 1 MiB: the kernel's `fs.fuse.max_pages_limit` is 256 by default.
const WRITE_BYTES_MAX: u32 = 1 << 20;
/// Read-ahead and write-back requests the kernel may have under way; its default of 16 starves a
/// reader of chunks that are a network round trip away.
const BACKGROUND_MAX: u16 = 64;
/// Lines of one directory reply. The kernel's buffer of at most 32 KiB holds about as many.
const LISTED_MAX: usize = 1024;
const LISTED_WITH_ATTRS_MAX: usize = 256;
/// Most bytes one copy request does; its reply counts in 32 bits.
const COPY_BYTES_MAX: u64 = 1 << 30;

/// One mount's requests.
pub struct Bridge {
    pub vfs: Arc<Vfs>,
    pub caches: Arc<Caches>,
    pub runner: Runner,
    /// Set by the handshake.
    pub kernel: Arc<Abilities>,
    pub channel: Arc<NoticeChannel>,
    pub failed: Arc<FailedWrites>,
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

fn ino(number: INodeNo) -> Ino {
    Ino(number.0)
}

/// Set in the kernel's number of a directory handle through which it keeps the listing.
const KEEPS_LISTING: u64 = 1 << 63;

fn handle(number: FileHandle) -> HandleId {
    HandleId(number.0 & !KEEPS_LISTING)
}

fn keeps_listing(number: FileHandle) -> bool {
    number.0 & KEEPS_LISTING != 0
}

fn fopen_flags(opened: Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_cache);
    flags.set(FopenFlags::FOPEN_DIRECT_IO, opened.direct);
    flags.set(FopenFlags::FOPEN_NOFLUSH, opened.closes_at_once);
    flags
}

fn reply_empty(result: Result<(), FsError>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// The size protocol of getxattr(2) and listxattr(2): size 0 asks how much room it takes.
fn reply_xattr(result: Result<Vec<u8>, FsError>, size: u32, reply: ReplyXattr) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Before the end of a directory is answered through a handle that keeps the listing.
fn listing_ends(caches: &Caches, channel: &NoticeChannel, dir: Ino) {
    if caches.listings.ends(dir)
        && let Err(error) = channel.forget_pages(dir, 0, 0)
    {
        tracing::warn!(%error, "the kernel did not drop a listing; its handle may see it once more");
    }
}

impl Bridge {
    fn replies(&self) -> Replies {
        Replies { vfs: self.vfs.clone(), caches: self.caches.clone(), asked: Instant::now() }
    }
}

impl Filesystem for Bridge {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in WANTED {
            if config.add_capabilities(flag).is_err() {
                tracing::info!(?flag, "this kernel does not have it");
            }
        }
        let (can_expire, abi) = (config.capabilities().contains(InitFlags::FUSE_HAS_EXPIRE_ONLY), config.kernel_abi());
        self.kernel.expire.store(can_expire, Relaxed);
        self.kernel.epoch.store((abi.0, abi.1) >= INC_EPOCH_SINCE, Relaxed);
        // Each answers the nearest value it takes; then that is the best there is.
        if let Err(nearest) = config.set_max_write(WRITE_BYTES_MAX) {
            let _ = config.set_max_write(nearest);
        }
        if let Err(nearest) = config.set_max_readahead(WRITE_BYTES_MAX) {
            let _ = config.set_max_readahead(nearest);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_MAX * 3 / 4);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (replies, parent, name) = (self.replies(), ino(parent), name.as_bytes().to_vec());
        self.runner.run(async move {
            match replies.vfs.lookup(parent, &name).await {
                Err(FsError::Meta(MetaError::NoSuchEntry { name, .. })) => replies.absent(parent, name, reply),
                result => {
                    if let Ok(attr) = &result {
                        replies.let_go_elsewhere(parent, attr).await;
                    }
                    replies.entry(parent, result, reply);
                }
            }
        });
    }

    fn forget(&self, _request: &Request, number: INodeNo, lookups: u64) {
        self.caches.forgotten(ino(number), lookups);
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let replies = self.replies();
        self.runner.run(async move {
            let result = replies.vfs.getattr(ino(number)).await;
            replies.attr(result, reply);
        });
    }

    fn setattr(
        &self,
        request: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (replies, caller) = (self.replies(), caller(request));
        let set = SetAttrRequest { mode, uid, gid, size, atime: atime.map(set_time), mtime: mtime.map(set_time) };
        let undoes = size.zip(handle).filter(|(size, handle)| {
            self.failed.is_undone_by(handle.0, request.pid(), *size, self.caches.size(ino(number)))
        });
        self.runner.run(async move {
            let result = match undoes {
                Some((size, _)) => match replies.vfs.getattr(ino(number)).await {
                    Ok(attr) if attr.size != size => return reply.error(Errno::EINTR),
                    result => result,
                },
                None => replies.vfs.setattr(caller, ino(number), set).await,
            };
            replies.attr(result, reply);
        });
    }

    fn readlink(&self, _request: &Request, number: INodeNo, reply: ReplyData) {
        let vfs = self.vfs.clone();
        self.runner.run(async move {
            match vfs.readlink(ino(number)).await {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (replies, caller, parent, name) = (self.replies(), caller(request), ino(parent), name.as_bytes().to_vec());
        self.runner.run(async move {
            let result = replies.vfs.mknod(caller, parent, &name, mode, umask, decode_dev(rdev)).await;
            replies.entry(parent, result, reply);
        });
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let (replies, caller, parent, name) = (self.replies(), caller(request), ino(parent), name.as_bytes().to_vec());
        self.runner.run(async move {
            let result = replies.vfs.mkdir(caller, parent, &name, mode, umask).await;
            replies.entry(parent, result, reply);
        });
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (vfs, name) = (self.vfs.clone(), name.as_bytes().to_vec());
        self.runner.run(async move { reply_empty(vfs.unlink(ino(parent), &name).await, reply) });
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (vfs, name) = (self.vfs.clone(), name.as_bytes().to_vec());
        self.runner.run(async move { reply_empty(vfs.rmdir(ino(parent), &name).await, reply) });
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (replies, caller, parent, name) = (self.replies(), caller(request), ino(parent), name.as_bytes().to_vec());
        let target = target.as_os_str().as_bytes().to_vec();
        self.runner.run(async move {
            let result = replies.vfs.symlink(caller, parent, &name, &target).await;
            replies.entry(parent, result, reply);
        });
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (vfs, name, new_name) = (self.vfs.clone(), name.as_bytes().to_vec(), new_name.as_bytes().to_vec());
        self.runner.run(async move {
            reply_empty(vfs.rename(ino(parent), &name, ino(new_parent), &new_name, flags.bits()).await, reply);
        });
    }

    fn link(&self, _request: &Request, number: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (replies, parent, name) = (self.replies(), ino(parent), name.as_bytes().to_vec());
        self.runner.run(async move {
            let result = replies.vfs.link(ino(number), parent, &name).await;
            replies.entry(parent, result, reply);
        });
    }

    fn open(&self, request: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (vfs, caller) = (self.vfs.clone(), caller(request));
        self.runner.run(async move {
            match vfs.open(caller, ino(number), flags.0).await {
                Ok(opened) => reply.opened(FileHandle(opened.handle.0), fopen_flags(opened)),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (replies, caller, parent, name) = (self.replies(), caller(request), ino(parent), name.as_bytes().to_vec());
        self.runner.run(async move {
            let (attr, opened) = match replies.vfs.create(caller, parent, &name, mode, umask, flags).await {
                Ok(made) => made,
                Err(error) => return reply.error(errno(&error)),
            };
            let timeout = replies.vfs.cache_timeout();
            let permits = replies.caches.permits(timeout, replies.asked);
            replies.caches.looked_up(attr.ino, attr.size);
            // One timeout serves for both here.
            let both = replies.attr_timeout(&permits, &attr).min(permits.entry(parent));
            let handle = FileHandle(opened.handle.0);
            reply.created(&both, &file_attr(&attr), generation(&attr), handle, fopen_flags(opened));
            drop(permits);
            replies.look_at_the_lease_again(timeout, || vec![Change::Attr { ino: attr.ino }]);
        });
    }

    fn read(
        &self,
        _request: &Request,
        number: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let vfs = self.vfs.clone();
        self.runner.run(async move {
            match vfs.read_file(ino(number), handle(fh), offset, size).await {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => return reply.error(errno(&error)),
            }
            // Without a lease nobody waits until the kernel has dropped pages that change elsewhere.
            if vfs.cache_timeout().is_zero() && !vfs.is_direct(ino(number), handle(fh)) {
                vfs.invalidate(vec![Change::Data { ino: ino(number), offset, len: size.into() }]);
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        number: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (vfs, data) = (self.vfs.clone(), Bytes::copy_from_slice(data));
        let from_cache = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        // Pages of a mapping are written back by whoever happens to run; that says nothing of
        // who changed them, and the kernel took the bits away when the page was first touched.
        let caller = if from_cache { Caller::ROOT } else { caller(request) };
        let drop_privileges = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let (caches, failed, thread) = (self.caches.clone(), self.failed.clone(), request.pid());
        let before = caches.size(ino(number));
        self.runner.run(async move {
            let wanted = data.len();
            let result = vfs.write(caller, ino(number), handle(fh), offset, data, drop_privileges, from_cache).await;
            if !from_cache {
                let written = *result.as_ref().unwrap_or(&0);
                // Asynchronous ones the kernel takes for failed when they are short.
                if (written as usize) < wanted
                    && let Some(before) = before
                    && (flags.0 & libc::O_DIRECT != 0 || vfs.is_direct(ino(number), handle(fh)))
                {
                    failed.add(fh.0, thread, before);
                }
                if written > 0 {
                    caches.wrote(ino(number), offset.saturating_add(written.into()));
                }
            }
            match result {
                Ok(written) => reply.written(written),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn flush(&self, _request: &Request, number: INodeNo, fh: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        let vfs = self.vfs.clone();
        self.runner.run(async move { reply_empty(vfs.flush(ino(number), handle(fh), owner.0).await, reply) });
    }

    fn release(
        &self,
        _request: &Request,
        number: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let vfs = self.vfs.clone();
        let leaving = vfs.leaving(ino(number));
        let failed = self.failed.clone();
        self.runner.run(async move {
            vfs.release(handle(fh)).await;
            failed.closed(fh.0);
            drop(leaving);
            reply.ok();
        });
    }

    fn fsync(&self, _request: &Request, number: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let vfs = self.vfs.clone();
        self.runner.run(async move { reply_empty(vfs.fsync(ino(number), handle(fh)).await, reply) });
    }

    fn opendir(&self, _request: &Request, number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let (replies, dir) = (self.replies(), ino(number));
        self.runner.run(async move {
            let handle = match replies.vfs.opendir(dir).await {
                Ok(handle) => handle,
                Err(error) => return reply.error(errno(&error)),
            };
            let permits = replies.caches.permits(replies.vfs.cache_timeout(), replies.asked);
            // Where no name may be kept, no listing may, either.
            let usage = if permits.entry(dir).is_zero() { Usage::Ask } else { replies.caches.listings.opened(dir, Instant::now()) };
            let (mark, flags) = match usage {
                Usage::Ask => (0, FopenFlags::empty()),
                Usage::Fill => (KEEPS_LISTING, FopenFlags::FOPEN_CACHE_DIR),
                Usage::Keep => (KEEPS_LISTING, FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE),
            };
            reply.opened(FileHandle(handle.0 | mark), flags);
        });
    }

    fn readdir(&self, _request: &Request, number: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let (replies, channel, dir) = (self.replies(), self.channel.clone(), ino(number));
        self.runner.run(async move {
            let lines = match replies.vfs.readdir(dir, offset, LISTED_MAX, false).await {
                Ok(lines) => lines,
                Err(error) => return reply.error(errno(&error)),
            };
            if keeps_listing(fh) {
                if lines.is_empty() {
                    listing_ends(&replies.caches, &channel, dir);
                } else {
                    replies.caches.listings.listed(dir, None);
                }
            }
            for line in lines {
                if reply.add(INodeNo(line.ino.0), line.next, file_type(line.kind), OsStr::from_bytes(&line.name)) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        number: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let (replies, channel, dir) = (self.replies(), self.channel.clone(), ino(number));
        self.runner.run(async move {
            let lines = match replies.vfs.readdir(dir, offset, LISTED_WITH_ATTRS_MAX, true).await {
                Ok(lines) => lines,
                Err(error) => return reply.error(errno(&error)),
            };
            if keeps_listing(fh) && lines.is_empty() {
                listing_ends(&replies.caches, &channel, dir);
            }
            let timeout = replies.vfs.cache_timeout();
            let permits = replies.caches.permits(timeout, replies.asked);
            let entry = permits.entry(dir);
            if keeps_listing(fh) && !lines.is_empty() {
                replies.caches.listings.listed(dir, Some(replies.asked + entry));
            }
            let mut told = Vec::new();
            for line in lines {
                let Some(attr) = line.attr else { continue };
                let both = entry.min(replies.attr_timeout(&permits, &attr));
                let (number, name) = (INodeNo(line.ino.0), OsStr::from_bytes(&line.name));
                if reply.add(number, line.next, name, &both, &file_attr(&attr), generation(&attr)) {
                    break;
                }
                // The kernel counts no lookup for these two.
                if line.name != b"." && line.name != b".." {
                    replies.caches.looked_up(attr.ino, attr.size);
                    told.push(Change::Attr { ino: attr.ino });
                }
            }
            reply.ok();
            drop(permits);
            replies.look_at_the_lease_again(timeout, || told);
        });
    }

    fn releasedir(&self, _request: &Request, number: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        let (vfs, caches) = (self.vfs.clone(), self.caches.clone());
        self.runner.run(async move {
            if keeps_listing(fh) {
                caches.listings.closed(ino(number));
            }
            vfs.releasedir(handle(fh)).await;
            reply.ok();
        });
    }

    fn fsyncdir(&self, _request: &Request, number: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let vfs = self.vfs.clone();
        self.runner.run(async move { reply_empty(vfs.fsyncdir(ino(number), handle(fh)).await, reply) });
    }

    fn statfs(&self, _request: &Request, number: INodeNo, reply: ReplyStatfs) {
        let statfs = self.vfs.statfs(ino(number));
        let block = u64::from(BLOCK_BYTES);
        let space = statfs.space;
        reply.statfs(
            space.total / block,
            space.free / block,
            space.available / block,
            statfs.files_used.saturating_add(space.files),
            space.files,
            BLOCK_BYTES,
            ctfs_types::limits::NAME_BYTES_MAX as u32,
            BLOCK_BYTES,
        );
    }

    fn setxattr(
        &self,
        request: &Request,
        number: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (vfs, caller, name, value) = (self.vfs.clone(), caller(request), name.as_bytes().to_vec(), value.to_vec());
        self.runner.run(async move {
            reply_empty(vfs.setxattr(caller, ino(number), &name, &value, flags).await, reply);
        });
    }

    fn getxattr(&self, request: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (vfs, caller, name) = (self.vfs.clone(), caller(request), name.as_bytes().to_vec());
        self.runner.run(async move { reply_xattr(vfs.getxattr(caller, ino(number), &name).await, size, reply) });
    }

    fn listxattr(&self, request: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        let (vfs, caller) = (self.vfs.clone(), caller(request));
        self.runner.run(async move { reply_xattr(vfs.listxattr(caller, ino(number)).await, size, reply) });
    }

    fn removexattr(&self, request: &Request, number: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (vfs, caller, name) = (self.vfs.clone(), caller(request), name.as_bytes().to_vec());
        self.runner.run(async move { reply_empty(vfs.removexattr(caller, ino(number), &name).await, reply) });
    }

    fn access(&self, _request: &Request, _number: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks by itself (`default_permissions`).
        reply.ok();
    }

    fn getlk(
        &self,
        _request: &Request,
        number: INodeNo,
        _fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let vfs = self.vfs.clone();
        let wanted = LockRequest { owner: owner.0, exclusive: kind == libc::F_WRLCK, start, end, pid };
        self.runner.run(async move {
            match vfs.getlk(ino(number), wanted).await {
                Ok(Some(held)) => {
                    let kind = if held.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                    reply.locked(held.start, held.end, kind, held.pid);
                }
                Ok(None) => reply.locked(start, end, libc::F_UNLCK, 0),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn setlk(
        &self,
        request: &Request,
        number: INodeNo,
        fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let (vfs, thread) = (self.vfs.clone(), request.pid());
        let wanted = LockRequest { owner: owner.0, exclusive: kind == libc::F_WRLCK, start, end, pid };
        self.runner.run_long(async move {
            let result = match kind {
                libc::F_UNLCK => vfs.unlock(ino(number), wanted).await,
                libc::F_RDLCK | libc::F_WRLCK => vfs.setlk(ino(number), handle(fh), wanted, sleep, thread).await,
                _ => Err(FsError::Invalid("kind of lock")),
            };
            reply_empty(result, reply);
        });
    }

    fn bmap(&self, _request: &Request, _number: INodeNo, _blocksize: u32, _index: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _number: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _request: &Request,
        _number: INodeNo,
        _fh: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // Files are always ready; after this answer the kernel says so by itself.
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        _request: &Request,
        number: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let vfs = self.vfs.clone();
        self.runner.run(async move {
            reply_empty(vfs.fallocate(ino(number), handle(fh), offset, length, mode).await, reply);
        });
    }

    fn lseek(&self, _request: &Request, number: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let vfs = self.vfs.clone();
        self.runner.run(async move {
            let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
            match vfs.lseek(ino(number), handle(fh), offset, whence).await.map(i64::try_from) {
                Ok(Ok(offset)) => reply.offset(offset),
                Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let vfs = self.vfs.clone();
        self.runner.run(async move {
            let from = (ino(ino_in), handle(fh_in), offset_in);
            let to = (ino(ino_out), handle(fh_out), offset_out);
            match vfs.copy_file_range(from, to, len.min(COPY_BYTES_MAX)).await {
                Ok(copied) => reply.written(copied as u32),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }
}
