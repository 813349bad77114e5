//! What was changed here and may not be shown yet.
//!
//! A server applies an entry before the others have, so its replica is ahead of what may be answered
//! (scenario 2 of the coherence notes). Whoever reads the replica asks, under the same lock under which
//! entries are applied, when each thing it looks at was changed last, and holds its answer back until
//! that is visible. Kept are only changes above the visible index: most of the time, none.

use std::{
    collections::{HashMap, VecDeque},
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

use ctfs_meta::{Change, Subject};
use ctfs_types::LogIndex;
use parking_lot::Mutex;

/// Changes kept; past it everything counts as changed by the last entry, which costs waiting only.
const CHANGES_MAX: usize = 16384;

#[derive(Debug)]
pub(crate) struct Unseen {
    /// The replica shows entries up to here. Moved under its lock.
    shown: AtomicU64,
    visible: AtomicU64,
    changes: Mutex<Changes>,
}

#[derive(Debug, Default)]
struct Changes {
    last: HashMap<Subject, LogIndex>,
    /// The same, oldest first; also what has changed again since.
    order: VecDeque<(LogIndex, Subject)>,
    /// Everything counts as changed at this index.
    everything: LogIndex,
}

impl Unseen {
    /// Of a replica that stands at `shown`, of which nothing is known.
    pub fn starting_at(shown: LogIndex) -> Self {
        let changes = Changes { everything: shown, ..Changes::default() };
        Self { shown: AtomicU64::new(shown.0), visible: AtomicU64::new(0), changes: Mutex::new(changes) }
    }

    /// Entry `index` made `changes`. Call under the replica's lock for writing, in log order.
    pub fn applied<'a>(&self, index: LogIndex, changes: impl Iterator<Item = &'a Change>) {
        let mut kept = self.changes.lock();
        kept.cut_off(LogIndex(self.visible.load(SeqCst)));
        for subject in changes.flat_map(Change::subjects) {
            // One entry changes one thing often.
            if kept.last.insert(subject.clone(), index) != Some(index) {
                kept.order.push_back((index, subject));
            }
        }
        if kept.order.len() > CHANGES_MAX {
            *kept = Changes { everything: index, ..Changes::default() };
        }
        drop(kept);
        self.shown.store(index.0, SeqCst);
    }

    /// The replica was replaced by one that stands at `index`. Call as [`Self::applied`].
    pub fn replaced(&self, index: LogIndex) {
        *self.changes.lock() = Changes { everything: index, ..Changes::default() };
        self.shown.store(index.0, SeqCst);
    }

    /// Every leased server is there.
    pub fn visible(&self, index: LogIndex) {
        self.visible.fetch_max(index.0, SeqCst);
    }

    /// Up to where the replica is ahead of what is visible, if it is. Ask under its lock.
    pub fn ahead(&self) -> Option<LogIndex> {
        let shown = self.shown.load(SeqCst);
        (shown > self.visible.load(SeqCst)).then_some(LogIndex(shown))
    }

    /// The last change of `subject`, if it is not visible. Ask under the replica's lock.
    pub fn change_of(&self, subject: &Subject) -> Option<LogIndex> {
        let visible = LogIndex(self.visible.load(SeqCst));
        let kept = self.changes.lock();
        let last = kept.last.get(subject).copied().unwrap_or_default().max(kept.everything);
        (last > visible).then_some(last)
    }
}

impl Changes {
    fn cut_off(&mut self, visible: LogIndex) {
        while let Some((index, _)) = self.order.front()
            && *index <= visible
            && let Some((index, subject)) = self.order.pop_front()
        {
            if self.last.get(&subject) == Some(&index) {
                self.last.remove(&subject);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ctfs_types::{FileName, Ino};

    use super::*;

    fn attr(ino: u64) -> Change {
        Change::Attr { ino: Ino(ino) }
    }

    fn inode(ino: u64) -> Subject {
        Subject::Inode(Ino(ino))
    }

    fn apply(unseen: &Unseen, index: u64, changes: &[Change]) {
        unseen.applied(LogIndex(index), changes.iter());
    }

    #[test]
    fn a_change_is_unseen_until_it_is_visible_and_only_of_what_it_changed() {
        let unseen = Unseen::starting_at(LogIndex(0));
        assert_eq!(unseen.ahead(), None);
        apply(&unseen, 1, &[attr(5)]);
        apply(&unseen, 2, &[attr(6)]);
        assert_eq!(unseen.ahead(), Some(LogIndex(2)));
        assert_eq!(unseen.change_of(&inode(5)), Some(LogIndex(1)));
        assert_eq!(unseen.change_of(&inode(6)), Some(LogIndex(2)));
        assert_eq!(unseen.change_of(&inode(7)), None);
        unseen.visible(LogIndex(1));
        assert_eq!((unseen.change_of(&inode(5)), unseen.change_of(&inode(6))), (None, Some(LogIndex(2))));
        unseen.visible(LogIndex(2));
        assert_eq!((unseen.ahead(), unseen.change_of(&inode(6))), (None, None));
        unseen.visible(LogIndex(1));
        assert_eq!(unseen.ahead(), None, "what was visible stays so");
    }

    #[test]
    fn the_last_change_of_a_thing_counts() {
        let unseen = Unseen::starting_at(LogIndex(0));
        apply(&unseen, 1, &[attr(5), attr(5)]);
        apply(&unseen, 2, &[attr(5)]);
        unseen.visible(LogIndex(1));
        apply(&unseen, 3, &[attr(6)]);
        assert_eq!(unseen.change_of(&inode(5)), Some(LogIndex(2)), "cutting off the first one leaves the second");
        assert_eq!(unseen.changes.lock().order.len(), 2);
    }

    #[test]
    fn a_name_is_neither_its_directory_nor_its_neighbour() {
        let unseen = Unseen::starting_at(LogIndex(0));
        let name = |text: &str| FileName::new(text.as_bytes()).unwrap();
        apply(&unseen, 1, &[Change::Entry { parent: Ino(1), name: name("a") }]);
        let at = Some(LogIndex(1));
        assert_eq!(unseen.change_of(&Subject::Name(Ino(1), name("a"))), at);
        assert_eq!(unseen.change_of(&Subject::Names(Ino(1))), at, "a listing shows it");
        assert_eq!(unseen.change_of(&Subject::Name(Ino(1), name("b"))), None);
        assert_eq!(unseen.change_of(&inode(1)), None);
    }

    #[test]
    fn of_a_replica_just_opened_or_replaced_nothing_may_be_shown_before_it_is_visible() {
        let unseen = Unseen::starting_at(LogIndex(9));
        assert_eq!((unseen.ahead(), unseen.change_of(&inode(5))), (Some(LogIndex(9)), Some(LogIndex(9))));
        unseen.visible(LogIndex(9));
        assert_eq!((unseen.ahead(), unseen.change_of(&inode(5))), (None, None));
        unseen.replaced(LogIndex(20));
        assert_eq!((unseen.ahead(), unseen.change_of(&inode(5))), (Some(LogIndex(20)), Some(LogIndex(20))));
        unseen.visible(LogIndex(20));
        assert_eq!(unseen.change_of(&inode(5)), None);
    }

    #[test]
    fn the_list_is_bounded_and_what_it_lost_counts_as_changed() {
        let unseen = Unseen::starting_at(LogIndex(0));
        let entries = CHANGES_MAX as u64 + 1;
        (1..=entries).for_each(|index| apply(&unseen, index, &[attr(index)]));
        assert_eq!(unseen.change_of(&inode(u64::MAX)), Some(LogIndex(entries)));
        assert!(unseen.changes.lock().order.len() <= CHANGES_MAX);
        unseen.visible(LogIndex(entries));
        assert_eq!(unseen.change_of(&inode(1)), None);
    }

    #[test]
    fn visible_changes_are_not_kept() {
        let unseen = Unseen::starting_at(LogIndex(0));
        for index in 1..1000 {
            apply(&unseen, index, &[attr(index)]);
            unseen.visible(LogIndex(index));
        }
        let kept = unseen.changes.lock();
        assert!(kept.order.len() <= 1 && kept.last.len() <= 1);
    }
}
