//! Which files' sizes and times went over to the metadata lately.
//!
//! What a program sees of a file is what the metadata have, read first, and laid over it what was written here and they
//! lack. What they came to know between the two looks was missing from both: the file was seen as before the write.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use ctfs_types::Ino;

/// Files that share one count; a look that another file's hand-over disturbed is only made once more.
const STRIPES: usize = 64;

/// Taken before attributes are read from the metadata.
#[derive(Debug, Clone, Copy)]
pub struct Moment(u64);

#[derive(Debug)]
pub(super) struct Handovers {
    count: AtomicU64,
    last: [AtomicU64; STRIPES],
}

impl Handovers {
    pub fn new() -> Self {
        Self { count: AtomicU64::new(0), last: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    pub fn moment(&self) -> Moment {
        Moment(self.count.load(SeqCst))
    }

    /// The metadata have what was written to `ino`, and it is let go of next, under the lock that the caller holds.
    pub fn begin(&self, ino: Ino) {
        let now = self.count.fetch_add(1, SeqCst) + 1;
        self.of(ino).fetch_max(now, SeqCst);
    }

    /// To be asked after what was written here has been looked at.
    pub fn any_since(&self, ino: Ino, moment: Moment) -> bool {
        self.of(ino).load(SeqCst) > moment.0
    }

    fn of(&self, ino: Ino) -> &AtomicU64 {
        &self.last[ino.0 as usize % STRIPES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_read_before_a_hand_over_is_looked_at_again() {
        let handovers = Handovers::new();
        let before = handovers.moment();
        assert!(!handovers.any_since(Ino(5), before));
        handovers.begin(Ino(5));
        assert!(handovers.any_since(Ino(5), before) && !handovers.any_since(Ino(6), before));
        assert!(!handovers.any_since(Ino(5), handovers.moment()));
    }
}
