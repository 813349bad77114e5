//! Bytes that changed elsewhere and that the kernel's pages may not show yet.
//!
//! A page of a mapping is written back as a whole, with what it held when the kernel read it. Where
//! another server wrote since, and the kernel was not told yet, that would take back a write which
//! was acknowledged. So what is written back leaves these bytes out. Telling the kernel drops the
//! page, and writes it back first: whatever it stores from then on was read after the change.

use std::{collections::HashMap, ops::Range};

use ctfs_types::Ino;
use parking_lot::Mutex;

#[derive(Debug, Default)]
pub struct Untold(Mutex<HashMap<Ino, Vec<Range<u64>>>>);

impl Untold {
    /// Before anybody can write over the change.
    pub fn add(&self, ino: Ino, range: Range<u64>) {
        self.0.lock().entry(ino).or_default().push(range);
    }

    /// The kernel has dropped its pages of one such range.
    pub fn told(&self, ino: Ino, range: &Range<u64>) {
        let mut untold = self.0.lock();
        let Some(ranges) = untold.get_mut(&ino) else { return };
        if let Some(at) = ranges.iter().position(|one| one == range) {
            ranges.swap_remove(at);
        }
        if ranges.is_empty() {
            untold.remove(&ino);
        }
    }

    /// The kernel has dropped everything, or is gone.
    pub fn told_all(&self) {
        self.0.lock().clear();
    }

    /// What of `range` the kernel's pages are right about, in order.
    pub fn rest(&self, ino: Ino, range: Range<u64>) -> Vec<Range<u64>> {
        let mut rest = vec![range];
        for gone in self.0.lock().get(&ino).into_iter().flatten() {
            rest = rest.iter().flat_map(|part| [part.start..part.end.min(gone.start), part.start.max(gone.end)..part.end]).collect();
            rest.retain(|part| part.start < part.end);
        }
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_elsewhere_is_left_out_until_it_is_told() {
        let untold = Untold::default();
        let ino = Ino(5);
        untold.add(ino, 10..20);
        untold.add(ino, 15..25);
        untold.add(ino, 90..200);
        assert_eq!(untold.rest(ino, 0..100), [0..10, 25..90]);
        assert_eq!(untold.rest(ino, 12..18), []);
        assert_eq!(untold.rest(Ino(6), 0..100), [0..100]);
        untold.told(ino, &(15..25));
        assert_eq!(untold.rest(ino, 0..100), [0..10, 20..90]);
        untold.told(ino, &(10..20));
        untold.told(ino, &(90..200));
        assert_eq!(untold.rest(ino, 0..100), [0..100]);
        assert!(untold.0.lock().is_empty());
    }
}
