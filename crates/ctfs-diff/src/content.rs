//! The bytes of two files of one size, and which of the zeros are stored.
//!
//! What is a hole on both sides is not read; everything else is read on both, so a file system that
//! calls data a hole does not get away with it.
//!
//! Where holes begin and end depends on the block size of a file system, and small ones cost
//! nothing, so a hole counts by whole aligned blocks of [`HOLE_BLOCK`]: one that is nothing but hole
//! here, and there nothing but data, all of it zeros. A block that is partly hole on a side agrees
//! with everything. Space that is allocated and was never written is a hole, as lseek(2) has it.

use std::{ops::ControlFlow, os::fd::BorrowedFd};

use rustix::{fs::SeekFrom, io::Errno};

use crate::finding::Pair;

/// The largest block size of common file systems (a page on some machines, ext4's bigalloc); with
/// less, a copy on such a one would never be right, with more, less would be noticed.
pub const HOLE_BLOCK: usize = 64 << 10;
/// Large enough that a call costs little beside its bytes; two of them for each thread.
const WINDOW: usize = 1 << 20;

/// Room for a window of each side.
#[derive(Debug)]
pub struct Buffers(Pair<Box<[u8]>>);

impl Default for Buffers {
    fn default() -> Self {
        let window = || vec![0; WINDOW].into_boxed_slice();
        Self(Pair::new(window(), window()))
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// How many bytes differ, and where the first is.
    pub differing: u64,
    pub first: u64,
    /// Bytes that are a hole on this side and stored zeros on the other.
    pub holes: Pair<u64>,
    pub first_hole: u64,
    /// The caller asked to stop: the verdict is of the beginning.
    pub stopped: bool,
}

/// Why content could not be compared, by side.
pub type Failed = Pair<Option<String>>;

/// Compares `size` bytes of two files; `read` is told how far it got.
pub fn compare(files: Pair<BorrowedFd<'_>>, size: u64, buffers: &mut Buffers, read: &dyn Fn(u64) -> ControlFlow<()>) -> Result<Verdict, Failed> {
    let mut verdict = Verdict::default();
    let mut maps = files.map(|file| Map::new(file, size));
    let mut offset = 0;
    while offset < size {
        let next = maps.source.hole_end(offset).min(maps.target.hole_end(offset));
        // Aligned again, so that each window is whole blocks.
        let next = if next >= size { size } else { next - next % HOLE_BLOCK as u64 };
        if next > offset {
            if read(0).is_break() {
                return Ok(Verdict { stopped: true, ..verdict });
            }
            offset = next;
            continue;
        }
        let len = WINDOW.min(usize::try_from(size - offset).unwrap_or(WINDOW));
        let filled = Pair::new(fill(files.source, &mut buffers.0.source[..len], offset), fill(files.target, &mut buffers.0.target[..len], offset));
        filled.both().map_err(|failed| failed.map(|why| why.map(|why| why.to_string())))?;
        judge(&mut verdict, &mut maps, offset, Pair::new(&buffers.0.source[..len], &buffers.0.target[..len]));
        offset += len as u64;
        if read(len as u64).is_break() {
            return Ok(Verdict { stopped: true, ..verdict });
        }
    }
    Ok(verdict)
}

fn judge(verdict: &mut Verdict, maps: &mut Pair<Map<'_>>, offset: u64, bytes: Pair<&[u8]>) {
    for (i, (source, target)) in bytes.source.chunks(HOLE_BLOCK).zip(bytes.target.chunks(HOLE_BLOCK)).enumerate() {
        let start = offset + (i * HOLE_BLOCK) as u64;
        if source != target {
            let first = source.iter().zip(target).take_while(|(a, b)| a == b).count();
            if verdict.differing == 0 {
                verdict.first = start + first as u64;
            }
            verdict.differing += source[first..].iter().zip(&target[first..]).filter(|(a, b)| a != b).count() as u64;
            continue;
        }
        if source.len() < HOLE_BLOCK {
            continue;
        }
        let block = HOLE_BLOCK as u64;
        let holes = Pair::new(maps.source.hole_bytes(start, start + block), maps.target.hole_bytes(start, start + block));
        let side = match (holes.source, holes.target) {
            (hole, 0) if hole == block => &mut verdict.holes.source,
            (0, hole) if hole == block => &mut verdict.holes.target,
            _ => continue,
        };
        // The bytes are equal, so where a hole is one these are zeros. A file system that calls
        // other bytes a hole is told of in the same words.
        *side += block;
        if verdict.holes.source + verdict.holes.target == block {
            verdict.first_hole = start;
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Unfilled {
    #[error("read at byte {0}: {1}")]
    Failed(u64, Errno),
    #[error("the file ends at byte {0}, before its size")]
    Short(u64),
}

fn fill(file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<(), Unfilled> {
    let mut filled = 0;
    while filled < buffer.len() {
        let at = offset + filled as u64;
        match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut buffer[filled..], at)) {
            Ok(0) => return Err(Unfilled::Short(at)),
            Ok(len) => filled += len,
            Err(error) => return Err(Unfilled::Failed(at, error)),
        }
    }
    Ok(())
}

/// Where a file has data and where holes, asked as needed and in order.
#[derive(Debug)]
struct Map<'a> {
    file: BorrowedFd<'a>,
    size: u64,
    /// The stretch that was asked for last.
    start: u64,
    end: u64,
    hole: bool,
}

impl<'a> Map<'a> {
    fn new(file: BorrowedFd<'a>, size: u64) -> Self {
        let mut map = Self { file, size, start: 0, end: 0, hole: false };
        if size < HOLE_BLOCK as u64 {
            // Nothing in it could count; two calls less for each small file.
            map.end = size;
        }
        map
    }

    /// Moves to the stretch that holds `offset`, which is below the size.
    fn seek(&mut self, offset: u64) {
        if (self.start..self.end).contains(&offset) {
            return;
        }
        self.start = offset;
        (self.end, self.hole) = match rustix::fs::seek(self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => (data.min(self.size), true),
            // No data up to the end.
            Err(Errno::NXIO) => (self.size, true),
            Ok(_) => match rustix::fs::seek(self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => (hole.min(self.size), false),
                _ => (self.size, false),
            },
            // A file system that cannot tell: it stores everything, as far as anybody can see.
            Err(_) => (self.size, false),
        };
    }

    /// Where the hole at `offset` ends; `offset` itself when there is none.
    fn hole_end(&mut self, offset: u64) -> u64 {
        self.seek(offset);
        if self.hole { self.end } else { offset }
    }

    fn hole_bytes(&mut self, from: u64, to: u64) -> u64 {
        let (mut offset, mut bytes) = (from, 0);
        while offset < to {
            self.seek(offset);
            let end = self.end.min(to);
            bytes += if self.hole { end - offset } else { 0 };
            offset = end;
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, os::{fd::AsFd, unix::fs::FileExt}};

    use super::*;

    const BLOCK: u64 = HOLE_BLOCK as u64;

    /// A file of `size` with zeros or other bytes written at the given places.
    fn file(size: u64, written: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in written {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    fn verdict(source: &File, target: &File, size: u64) -> Verdict {
        compare(Pair::new(source.as_fd(), target.as_fd()), size, &mut Buffers::default(), &|_| ControlFlow::Continue(())).unwrap()
    }

    #[test]
    fn each_differing_byte_is_counted_and_the_first_is_named() {
        let mut bytes = vec![7; 3 << 20];
        let source = file(3 << 20, &[(0, &bytes)]);
        assert_eq!(verdict(&source, &source, 3 << 20), Verdict::default());
        bytes[1_048_575] ^= 1;
        bytes[3_000_000] ^= 0x80;
        let target = file(3 << 20, &[(0, &bytes)]);
        assert_eq!(verdict(&source, &target, 3 << 20), Verdict { differing: 2, first: 1_048_575, ..Verdict::default() });
    }

    #[test]
    fn stored_zeros_where_the_other_has_a_hole_are_counted_in_whole_blocks() {
        let size = 10 * BLOCK;
        let source = file(size, &[]);
        let zeros = vec![0; 2 * HOLE_BLOCK];
        let target = file(size, &[(3 * BLOCK, &zeros)]);
        assert_eq!(verdict(&source, &target, size), Verdict { holes: Pair::new(2 * BLOCK, 0), first_hole: 3 * BLOCK, ..Verdict::default() });
        assert_eq!(verdict(&target, &source, size), Verdict { holes: Pair::new(0, 2 * BLOCK), first_hole: 3 * BLOCK, ..Verdict::default() });
    }

    #[test]
    fn a_hole_that_one_side_rounds_to_its_blocks_is_no_difference() {
        let size = 10 * BLOCK;
        let source = file(size, &[(5 * BLOCK, b"middle")]);
        // What a file system of 64 KiB blocks makes of the same writes.
        let mut block = vec![0; HOLE_BLOCK];
        block[..6].copy_from_slice(b"middle");
        let target = file(size, &[(5 * BLOCK, &block)]);
        assert_eq!(verdict(&source, &target, size), Verdict::default());
    }

    #[test]
    fn a_change_inside_a_hole_is_a_difference_of_content_alone() {
        let size = 10 * BLOCK;
        let target = file(size, &[(5 * BLOCK + 17, b"x")]);
        assert_eq!(verdict(&file(size, &[]), &target, size), Verdict { differing: 1, first: 5 * BLOCK + 17, ..Verdict::default() });
    }

    #[test]
    fn holes_of_both_are_not_read_however_large() {
        let size = 1 << 43;
        let (source, target) = (file(size, &[(1 << 42, b"x")]), file(size, &[(1 << 42, b"x")]));
        assert_eq!(verdict(&source, &target, size), Verdict::default());
    }

    #[test]
    fn a_file_that_ends_before_its_size_is_told_by_side() {
        let (mut source, target) = (tempfile::tempfile().unwrap(), file(1000, &[]));
        source.write_all(b"short").unwrap();
        let failed = compare(Pair::new(source.as_fd(), target.as_fd()), 1000, &mut Buffers::default(), &|_| ControlFlow::Continue(())).unwrap_err();
        assert_eq!(failed, Pair::new(Some("the file ends at byte 5, before its size".into()), None));
    }

    #[test]
    fn comparing_stops_when_it_is_told_to() {
        let both = file(4 << 20, &[(0, &vec![1; 4 << 20])]);
        let stop = |_| ControlFlow::Break(());
        assert!(compare(Pair::new(both.as_fd(), both.as_fd()), 4 << 20, &mut Buffers::default(), &stop).unwrap().stopped);
    }
}
