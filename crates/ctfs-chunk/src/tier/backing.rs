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

#[derive(Debug, Default)]
pub(super) enum Backing {
    #[default]
    Nothing,
    /// Bytes from offset 0; beyond them zeros.
    Memory(Vec<u8>),
    /// The cache file, at natural offsets.
    File,
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
            core.sub_memory(bytes.len() as u64);
            *self = Self::File;
        }
        let fresh = matches!(self, Self::Nothing);
        let file = core.files.get(ino, fresh)?;
        *self = Self::File;
        write_all(&file, data, offset)
    }

    /// Fills `out` from `offset`; what was never written reads as zeros.
    pub(super) fn read(&self, core: &Core, ino: Ino, offset: u64, out: &mut [u8]) -> Result<(), Errno> {
        match self {
            Self::Nothing => out.fill(0),
            Self::Memory(bytes) => {
                let from = bytes.len().min(offset as usize);
                let part = &bytes[from..bytes.len().min(from + out.len())];
                out[..part.len()].copy_from_slice(part);
                out[part.len()..].fill(0);
            }
            Self::File => {
                let file = core.files.get(ino, false)?;
                let mut at = 0;
                while at < out.len() {
                    match rustix::io::pread(&*file, &mut out[at..], offset + at as u64) {
                        Ok(0) => {
                            out[at..].fill(0);
                            break;
                        }
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
            Self::File => {
                let file = core.files.get(ino, false)?;
                if range.end == u64::MAX {
                    return fs::ftruncate(&*file, range.start);
                }
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fs::fallocate(&*file, mode, range.start, range.end - range.start)
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
            Self::File => core.files.remove(ino),
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
