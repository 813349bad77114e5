//! Between the kernel's spelling of things and ours.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ctfs_types::{Attr, FileKind, Timestamp};
use ctfs_vfs::{FsError, SetTime};
use fuser::{Errno, FileAttr, FileType, Generation, INodeNo, TimeOrNow};
use parking_lot::Mutex;

/// What programs see as `st_blksize`. Larger makes some programs allocate buffers of that size.
pub const BLOCK_BYTES: u32 = 4096;

pub fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

pub fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks: attr.allocated.div_ceil(512),
        atime: attr.atime.into(),
        mtime: attr.mtime.into(),
        ctime: attr.ctime.into(),
        crtime: attr.btime.into(),
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: encode_dev(attr.rdev),
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

pub fn generation(attr: &Attr) -> Generation {
    Generation(u64::from(attr.generation))
}

/// The answer that says "there is no such name" and lets the kernel remember it: inode 0.
pub fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// What the program is told. EIO says no more than that: why stands in the log, one a second.
pub fn errno(error: &FsError) -> Errno {
    let errno = error.errno();
    if errno == libc::EIO && LOGGED.lock().is_none_or(|at| at.elapsed() >= Duration::from_secs(1)) {
        *LOGGED.lock() = Some(Instant::now());
        tracing::warn!(%error, "a program was told EIO");
    }
    Errno::from_i32(errno)
}

/// When a failure was logged last.
static LOGGED: Mutex<Option<Instant>> = Mutex::new(None);

pub fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(requested_time(time)),
    }
}

/// Undoes how fuser 0.18 reads the kernel's `(seconds, nanoseconds)`.
///
/// The nanoseconds count forward from the seconds, also before 1970; fuser counts both backward
/// from the epoch. Taking its result apart in the same way gives the two numbers back exactly.
fn requested_time(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timestamp::new(i64::try_from(after.as_secs()).unwrap_or(i64::MAX), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            Timestamp::new(0i64.saturating_sub_unsigned(before.as_secs()), before.subsec_nanos())
        }
    }
}

/// A device number as `makedev(3)` packs it, from the 32 bits of the kernel's `new_encode_dev`.
pub fn decode_dev(dev: u32) -> u64 {
    let major = (dev & 0xf_ff00) >> 8;
    let minor = (dev & 0xff) | ((dev >> 12) & 0xf_ff00);
    libc::makedev(major, minor)
}

/// The other way; 12 bits of major and 20 of minor fit.
pub fn encode_dev(dev: u64) -> u32 {
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_round_trip() {
        for (major, minor) in [(0, 0), (1, 3), (8, 1), (259, 0), (4095, 0xf_ffff), (10, 229), (136, 300)] {
            let dev = libc::makedev(major, minor);
            assert_eq!(decode_dev(encode_dev(dev)), dev, "{major}:{minor}");
        }
        assert_eq!(encode_dev(libc::makedev(8, 1)), 0x801);
    }

    #[test]
    fn a_time_before_1970_means_what_the_program_said() {
        // utimensat({-5, 250_000_000}) reaches us as the epoch less 5.25 s.
        let from_fuser = UNIX_EPOCH - Duration::new(5, 250_000_000);
        assert_eq!(requested_time(from_fuser), Timestamp::new(-5, 250_000_000));
        assert_eq!(requested_time(UNIX_EPOCH + Duration::new(5, 7)), Timestamp::new(5, 7));
    }
}
