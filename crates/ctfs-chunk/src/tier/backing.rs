//! Where one inode's cached bytes are: nowhere yet, in memory while tiny, else in its file.

use std::{ops::Range, os::fd::OwnedFd};

use ctfs_types::Ino;
use rustix::{
    fs::{self, FallocateFlags},
    io::Errno,
};

use super::Core;

/// Most bytes of a file that are kept in memory instead of a cache file. Making, opening and
/// removing a file costs more than these bytes; at four pages, most files of a source tree fit.
pub(super) const MEMORY_FILE_BYTES_MAX: u64 = 16 << 10;

/// Holes are made of whole pages; the last one reaches past the end of the file.
const PAGE: u64 = 4096;

#[derive(Debug, Default)]
pub(super) enum Backing {
    #[default]
    Nothing,
    /// Bytes from offset 0; beyond them zeros.
    Memory(Vec<u8>),
    /// The cache file, at natural offsets. Its last byte written lies before `len`, so a shorter
    /// file is one that somebody cut.
    File { len: u64 },
}

impl Backing {
    pub(super) fn in_memory(&self) -> bool {
        matches!(self, Self::Memory(_))
    }

    pub(super) fn write(&mut self, core: &Core, ino: Ino, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let end = offset + data.len() as u64;
        if matches!(self, Self::Nothing) && end <= MEMORY_FILE_BYTES_MAX && core.memory_has_room() {
            *self = Self::Memory(Vec::new());
        }
        if let Self::Memory(bytes) = self {
            if end <= MEMORY_FILE_BYTES_MAX {
                if bytes.len() < end as usize {
                    core.add_memory(end - bytes.len() as u64);
                    bytes.resize(end as usize, 0);
                }
                bytes[offset as usize..end as usize].copy_from_slice(data);
                return Ok(());
            }
            let file = core.files.get(ino, true)?;
            write_all(&file, bytes, 0)?;
            let len = bytes.len() as u64;
            core.sub_memory(len);
            *self = Self::File { len };
        }
        let before = match self {
            Self::File { len } => Some(*len),
            _ => None,
        };
        let file = core.files.get(ino, before.is_none())?;
        let before = before.unwrap_or(0);
        *self = Self::File { len: before };
        write_all(&file, data, offset)?;
        *self = Self::File { len: before.max(end) };
        Ok(())
    }

    /// Whether bytes that end at `end` would be in memory once written.
    pub(super) fn stays_in_memory(&self, core: &Core, end: u64) -> bool {
        !matches!(self, Self::File { .. }) && end <= MEMORY_FILE_BYTES_MAX && core.memory_has_room()
    }

    /// How much of the file is left, if it is shorter than what was written: somebody removed it
    /// or cut it off.
    pub(super) fn cut(&self, core: &Core, ino: Ino) -> Option<u64> {
        let Self::File { len } = self else { return None };
        match core.files.get(ino, false).and_then(|file| fs::fstat(&*file)) {
            Ok(stat) => u64::try_from(stat.st_size).ok().filter(|size| size < len),
            Err(Errno::NOENT | Errno::NOTDIR) => Some(0),
            // Not known: whoever reads or writes will see.
            Err(_) => None,
        }
    }

    /// From here on only the first `left` bytes are believed to be there.
    pub(super) fn shorten(&mut self, left: u64) {
        if let Self::File { len } = self {
            *len = left.min(*len);
        }
    }

    /// Fills `out` from `offset`, with bytes that were written. An end of the file before them is an
    /// error: the file was cut.
    pub(super) fn read(&self, core: &Core, ino: Ino, offset: u64, out: &mut [u8]) -> Result<(), Errno> {
        match self {
            Self::Nothing => out.fill(0),
            Self::Memory(bytes) => {
                let from = bytes.len().min(offset as usize);
                let part = &bytes[from..bytes.len().min(from + out.len())];
                out[..part.len()].copy_from_slice(part);
                out[part.len()..].fill(0);
            }
            Self::File { .. } => {
                let file = core.files.get(ino, false)?;
                let mut at = 0;
                while at < out.len() {
                    match rustix::io::pread(&*file, &mut out[at..], offset + at as u64) {
                        Ok(0) => return Err(Errno::NODATA),
                        Ok(n) => at += n,
                        Err(Errno::INTR) => {}
                        Err(errno) => return Err(errno),
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives the disk space of `range` back; its bytes mean nothing afterwards.
    pub(super) fn punch(&mut self, core: &Core, ino: Ino, range: Range<u64>) -> Result<(), Errno> {
        match self {
            Self::Nothing => Ok(()),
            Self::Memory(bytes) => {
                if range.start < bytes.len() as u64 && range.end >= bytes.len() as u64 {
                    core.sub_memory(bytes.len() as u64 - range.start);
                    bytes.truncate(range.start as usize);
                    bytes.shrink_to_fit();
                }
                Ok(())
            }
            // Past what was written there is nothing, perhaps not even an offset that the file
            // system knows.
            Self::File { len } if range.start >= *len => Ok(()),
            Self::File { len } => {
                let file = core.files.get(ino, false)?;
                if range.end == u64::MAX {
                    *len = range.start;
                    return fs::ftruncate(&*file, range.start);
                }
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let end = range.end.min(len.next_multiple_of(PAGE));
                fs::fallocate(&*file, mode, range.start, end - range.start)
            }
        }
    }

    /// Drops all of it.
    pub(super) fn clear(&mut self, core: &Core, ino: Ino) -> Result<(), Errno> {
        match std::mem::take(self) {
            Self::Nothing => Ok(()),
            Self::Memory(bytes) => {
                core.sub_memory(bytes.len() as u64);
                Ok(())
            }
            Self::File { .. } => core.files.remove(ino),
        }
    }
}

fn write_all(file: &OwnedFd, data: &[u8], offset: u64) -> Result<(), Errno> {
    let mut at = 0;
    while at < data.len() {
        match rustix::io::pwrite(file, &data[at..], offset + at as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => at += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
