//! Bytes of files in the journal, for which fsync waits.
//!
//! What a program syncs is written into the journal of this life ([`Core::write_down`]), between the
//! commands that happened here, and fsync returns when that and all before it is on the disks that it
//! asks for ([`Core::durable`]). Later the bytes become chunks that the metadata name, by a write that says
//! how much of the journal it holds ([`ctfs_meta::Noted`]); then the journal lets go of them.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use ctfs_journal::{Journal, Position};
use ctfs_meta::Durability;
use ctfs_types::{
    FileBytes, Ino,
    rules::{Rule, keeps},
};
use tokio::time::timeout;

use crate::{core::Core, error::ProposeError, record, second::Second};

/// With so much in the journal bytes of files are no longer written down. Commands still are for a while:
/// those are small and wait for nothing but the log.
const BYTES_MAX: u64 = 48 << 20;

/// Where the journal has bytes that the metadata lack.
#[derive(Default)]
pub(crate) struct Written {
    of: HashMap<Ino, VecDeque<Position>>,
    /// The first of each.
    first: BTreeSet<(Position, Ino)>,
}

impl Written {
    fn add(&mut self, ino: Ino, position: Position) {
        let positions = self.of.entry(ino).or_default();
        if positions.is_empty() {
            self.first.insert((position, ino));
        }
        positions.push_back(position);
    }

    pub fn let_go(&mut self, ino: Ino, upto: Position) {
        let Some(positions) = self.of.get_mut(&ino) else { return };
        let before = positions.front().copied();
        while positions.front().is_some_and(|position| *position <= upto) {
            positions.pop_front();
        }
        let now = positions.front().copied();
        if positions.is_empty() {
            self.of.remove(&ino);
        }
        if before != now {
            before.map(|position| self.first.remove(&(position, ino)));
            now.map(|position| self.first.insert((position, ino)));
        }
    }

    /// The first position that is needed.
    pub fn first(&self) -> Option<Position> {
        self.first.first().map(|(position, _)| *position)
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Core {
    /// Writes bytes down behind all that has happened here, and answers where; `None`: there is no journal,
    /// or no room in it. Others must not have the file meanwhile.
    pub fn write_down(&self, bytes: &FileBytes) -> Option<u64> {
        let record = record::of_bytes(bytes);
        // Locked first: who ends this life takes the journal before it clears these.
        let mut written = self.stream.written.lock();
        let journal = self.stream.journal.lock().clone().filter(|journal| journal.depth().bytes < BYTES_MAX)?;
        match journal.append(record.into()) {
            Ok(position) => {
                written.add(bytes.ino, position);
                Some(position.0)
            }
            Err(error) => {
                tracing::warn!(%error, "bytes are not written down and go to the chunk stores at once");
                None
            }
        }
    }

    /// The metadata have what was written down of a file up to there.
    pub fn let_go(&self, ino: Ino, upto: u64) {
        self.stream.let_go(ino, Position(upto));
        self.stream.trim();
    }

    /// What the journal has before this is needed by nobody.
    pub fn kept_from(&self) -> u64 {
        self.stream.journal.lock().as_ref().map_or(0, |journal| journal.depth().trimmed.next().0)
    }

    /// Whether what is in the journal counts as being on as many disks as asked for, once it is there.
    pub fn journal_counts(&self, class: Durability) -> bool {
        self.stream.second.borrow().is_enough_for(class) && self.stream.journal.lock().is_some()
    }

    /// Returns when all that happened and was written down here before the call is on as many disks as
    /// asked for. `false`: the journal alone does not do that now.
    ///
    /// # Errors
    /// [`ProposeError::LifeEnded`]: some of it is lost, and who asks for it has not been told. As
    /// [`crate::Consensus::barrier`].
    pub async fn durable(&self, class: Durability) -> Result<bool, ProposeError> {
        let Some(journal) = self.stream.journal.lock().clone() else { return Ok(false) };
        let second = self.stream.second.borrow().clone();
        if !second.is_enough_for(class) {
            return Ok(false);
        }
        let upto = journal.depth().appended;
        let here = async { journal.durable(upto).await.is_ok() };
        let there = async {
            match (class, &second) {
                (Durability::Pair, Second::Copy(copy)) if keeps(Rule::FsyncWaitsForPair) => copy.id() == journal.id() && copy.durable_at(upto).await,
                _ => true,
            }
        };
        let both = async {
            let (here, there) = tokio::join!(here, there);
            here && there
        };
        if !timeout(self.settings.timings.journal_patience, both).await.unwrap_or(false) {
            return Ok(false);
        }
        // Whoever took over meanwhile has not waited for it.
        if !self.leased() {
            self.barrier().await?;
        }
        if self.stream.is_untold() || self.replica.read().is_ended(self.incarnation()).unwrap_or(true) {
            return Err(ProposeError::LifeEnded);
        }
        let is_same = |now: &Arc<Journal>| Arc::ptr_eq(now, &journal);
        Ok(self.stream.journal.lock().as_ref().is_some_and(is_same) && self.stream.second.borrow().is(&second))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_of_the_journal_begins_with_the_first_bytes_that_are_nowhere_else() {
        let mut written = Written::default();
        assert_eq!(written.first(), None);
        for (ino, position) in [(1, 3), (2, 4), (1, 5), (1, 9)] {
            written.add(Ino(ino), Position(position));
        }
        for (ino, upto, first) in [(1, 2, 3), (3, 9, 3), (1, 3, 4), (1, 5, 4), (2, 4, 9)] {
            written.let_go(Ino(ino), Position(upto));
            assert_eq!(written.first(), Some(Position(first)), "{ino} up to {upto}");
        }
        written.let_go(Ino(1), Position(u64::MAX));
        assert_eq!(written.first(), None);
        assert!(written.of.is_empty());
    }
}
