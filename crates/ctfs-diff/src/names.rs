//! The names in one directory, in the order of their bytes.

use std::{ffi::CStr, os::fd::BorrowedFd};

use rustix::{fs::RawDir, io::Errno};

/// One call's worth; larger ones save little.
const LISTING_BYTES: usize = 64 << 10;

/// A block of bytes and where each name begins: a directory of ten million names takes what they
/// are long, and not an allocation each.
#[derive(Debug, Default)]
pub struct Names {
    /// Each with its NUL.
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Names {
    /// Lists a directory; also returns the names that it showed more than once.
    pub fn list(directory: BorrowedFd<'_>) -> Result<(Self, Vec<Vec<u8>>), Errno> {
        let mut names = Self::default();
        let mut buffer = Vec::with_capacity(LISTING_BYTES);
        let mut listing = RawDir::new(directory, buffer.spare_capacity_mut());
        while let Some(entry) = listing.next() {
            let entry = entry?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.add(entry.file_name());
            }
        }
        let twice = names.sort();
        Ok((names, twice))
    }

    fn add(&mut self, name: &CStr) {
        self.starts.push(self.bytes.len());
        self.bytes.extend(name.to_bytes_with_nul());
    }

    fn sort(&mut self) -> Vec<Vec<u8>> {
        let Self { bytes, starts } = self;
        starts.sort_unstable_by_key(|start| at(bytes, *start));
        let mut twice = Vec::new();
        starts.dedup_by(|later, earlier| {
            let same = at(bytes, *later) == at(bytes, *earlier);
            if same {
                twice.push(at(bytes, *later).to_bytes().to_owned());
            }
            same
        });
        twice
    }

    pub fn get(&self, index: usize) -> Option<&CStr> {
        self.starts.get(index).map(|start| at(&self.bytes, *start))
    }
}

fn at(bytes: &[u8], start: usize) -> &CStr {
    CStr::from_bytes_until_nul(&bytes[start..]).expect("each name was added with its NUL")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_sorted_by_bytes_and_one_shown_twice_is_told() {
        let mut names = Names::default();
        for name in [c"b", c"a b", c"\xff", c"b", c"a"] {
            names.add(name);
        }
        assert_eq!(names.sort(), [b"b".to_vec()]);
        let sorted: Vec<_> = (0..).map_while(|i| names.get(i)).collect();
        assert_eq!(sorted, [c"a", c"a b", c"b", c"\xff"]);
    }
}
