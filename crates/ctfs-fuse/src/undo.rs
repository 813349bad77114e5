//! Truncates that no program asked for.
//!
//! When a direct write past the end of a file fails, the kernel cuts the file off at what it takes
//! for the end (`fuse_do_truncate` in fs/fuse/file.c). A write through a handle that is answered as
//! direct is spared, unless it is asynchronous. What the kernel takes for the end may be old, and
//! others may have appended since. Such a truncate looks like ftruncate(2). But it comes from
//! the thread whose write failed, through the same handle, and names a size that the kernel has for
//! the file; one like that takes no bytes. A program that meant it is told to try again (EINTR).

use std::collections::HashMap;

use parking_lot::Mutex;

/// Sizes that the kernel may have for a file: what it was told last, and with what it wrote since.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KernelSize {
    pub told: u64,
    pub grown: u64,
}

impl KernelSize {
    fn may_be(self, size: u64) -> bool {
        size == self.told || size == self.grown
    }
}

/// Writes that failed, by handle and thread, with the sizes of their beginning.
#[derive(Debug, Default)]
pub struct FailedWrites(Mutex<HashMap<(u64, u32), KernelSize>>);

/// Marks kept: a thread that ends after a failed write leaves one until its handle is closed.
const MARKS_MAX: usize = 4096;

impl FailedWrites {
    /// Before a failed write is answered.
    pub fn add(&self, handle: u64, thread: u32, before: KernelSize) {
        let mut marks = self.0.lock();
        if marks.len() >= MARKS_MAX {
            marks.clear();
        }
        // A write in pieces: the kernel's size is the one before the first.
        let mark = marks.entry((handle, thread)).or_insert(before);
        mark.grown = mark.grown.min(before.grown);
    }

    /// Whether a truncate may be the kernel's own. The thread's next one is not.
    pub fn is_undone_by(&self, handle: u64, thread: u32, size: u64, now: Option<KernelSize>) -> bool {
        let before = self.0.lock().remove(&(handle, thread));
        before.is_some_and(|before| before.may_be(size) || now.is_some_and(|now| now.may_be(size)))
    }

    pub fn closed(&self, handle: u64) {
        self.0.lock().retain(|(marked, _), _| *marked != handle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_next_truncate_of_the_thread_to_a_size_the_kernel_has_is_its_own() {
        let failed = FailedWrites::default();
        let size = |told, grown| KernelSize { told, grown };
        assert!(!failed.is_undone_by(1, 7, 100, Some(size(100, 100))), "no write failed");
        failed.add(1, 7, size(100, 150));
        assert!(!failed.is_undone_by(1, 8, 100, None), "another thread");
        assert!(failed.is_undone_by(1, 7, 150, None));
        assert!(!failed.is_undone_by(1, 7, 150, None), "told to try again, it means it");
        failed.add(1, 7, size(100, 150));
        assert!(!failed.is_undone_by(1, 7, 90, Some(size(100, 150))), "what the kernel does not take for the end");
        failed.add(1, 7, size(100, 100));
        failed.add(2, 7, size(100, 100));
        failed.closed(1);
        assert!(!failed.is_undone_by(1, 7, 100, None) && failed.is_undone_by(2, 7, 100, None));
    }
}
