//! Inode numbers: the next of the volume, or one that a client has set aside.
//!
//! A command that takes the next number of the volume has another outcome where others come before
//! it. A client that has reserved a range names the number itself. Each range is a record of its own,
//! and is used from its first number to its last; what is passed over, and what is left when the life
//! of the client ends, is never used.

use ctfs_types::{Incarnation, Ino};

use super::{
    Apply, keys,
    records::{self, Numbers},
    txn::Outcome,
};
use crate::{INOS_RESERVED_MAX, MetaError, Reply};

/// Ranges that one client has at a time: each number that is taken is looked up among them. Two are
/// enough for a server that reserves the next range before it needs it; the others are for ranges of
/// which the end was never used.
pub const RESERVATIONS_MAX: usize = 64;

/// A range and where it stands.
pub struct Reserved {
    key: Vec<u8>,
    end: Ino,
}

impl Apply<'_, '_> {
    /// The next `count` numbers of the volume; answers the first.
    pub(super) fn next_numbers(&mut self, count: u32) -> Ino {
        let first = Ino(self.counters.next_ino);
        self.counters.next_ino += u64::from(count);
        first
    }

    pub(super) fn reserve_inos(&mut self, count: u32) -> Outcome<Reply> {
        if !(1..=INOS_RESERVED_MAX).contains(&count) {
            return Err(MetaError::BadReservation(count).into());
        }
        let client = self.request.client;
        let (from, to) = keys::under(keys::NUMBERS, &[client]);
        if self.txn.scan(&from, &to, RESERVATIONS_MAX)?.len() >= RESERVATIONS_MAX {
            return Err(MetaError::TooManyReservations.into());
        }
        let first = self.next_numbers(count);
        let end = Ino(self.counters.next_ino);
        self.txn.put(keys::numbers(client, first), &Numbers { next: first, end });
        Ok(Reply::Inos { first, count })
    }

    /// The range of this client that has `ino` and has not used it.
    pub(super) fn reserved_range(&mut self, ino: Ino) -> Outcome<Reserved> {
        if let Some(key) = self.txn.numbers.clone()
            && keys::number_at(&key, 1) == Some(self.request.client)
            && let Some(Numbers { next, end }) = self.txn.get(&key)?
            && (next..end).contains(&ino)
        {
            return Ok(Reserved { key, end });
        }
        let (from, _) = keys::under(keys::NUMBERS, &[self.request.client]);
        let mut to = keys::numbers(self.request.client, ino);
        to.push(0);
        // No range before the last one that begins at or below the number reaches as far.
        let (key, value) = self.txn.scan(&from, &to, usize::MAX)?.pop().ok_or(MetaError::NumberNotReserved(ino))?;
        let Numbers { next, end } = records::decode(&key, &value)?;
        if !(next..end).contains(&ino) {
            return Err(MetaError::NumberNotReserved(ino).into());
        }
        self.txn.numbers = Some(key.clone());
        Ok(Reserved { key, end })
    }

    /// Uses up a range as far as `ino`.
    pub(super) fn take_number(&mut self, ino: Ino, Reserved { key, end }: Reserved) -> Ino {
        let next = Ino(ino.0 + 1);
        if next < end { self.txn.put(key, &Numbers { next, end }) } else { self.txn.delete(key) }
        ino
    }

    /// Nobody uses what a life that has ended had set aside.
    pub(super) fn burn_numbers(&mut self, life: Incarnation) -> Outcome<()> {
        let (from, to) = keys::under(keys::NUMBERS, &[life.0]);
        for (key, _) in self.txn.scan(&from, &to, usize::MAX)? {
            self.txn.delete(key);
        }
        Ok(())
    }
}
