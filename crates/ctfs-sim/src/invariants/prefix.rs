//! A crash leaves a prefix: of names that one program makes in their order, those that are left are the
//! first ones, and all that it synced.

use std::collections::BTreeMap;

use ctfs_types::{Incarnation, Ino};

/// What one program did in a directory of its own.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// The life of the server it runs on.
    pub life: Incarnation,
    /// Names 0, 1, 2... were asked for, so many.
    pub asked: u64,
    /// So many were answered.
    pub answered: u64,
    /// So many were there when fsync of the directory answered.
    pub synced: u64,
    /// That life has not ended: all that was answered must be there.
    pub unbroken: bool,
}

/// By directory.
#[derive(Default)]
pub struct Sequences(pub BTreeMap<Ino, Sequence>);

impl Sequences {
    pub fn begin(&mut self, dir: Ino, life: Incarnation) {
        self.0.insert(dir, Sequence { life, asked: 0, answered: 0, synced: 0, unbroken: true });
    }

    /// # Panics
    /// It was not begun.
    pub fn of(&mut self, dir: Ino) -> &mut Sequence {
        self.0.get_mut(&dir).expect("it was begun")
    }

    pub fn life_ends(&mut self, life: Incarnation) {
        for sequence in self.0.values_mut().filter(|sequence| sequence.life == life) {
            sequence.unbroken = false;
        }
    }
}

impl Sequence {
    /// What is wrong with what is left; `there`: the numbers that were found.
    pub fn check(&self, dir: Ino, mut there: Vec<u64>) -> Option<String> {
        there.sort_unstable();
        let is_prefix = there.iter().enumerate().all(|(at, number)| at as u64 == *number);
        let count = there.len() as u64;
        let least = if self.unbroken { self.answered } else { self.synced };
        if is_prefix && count >= least && count <= self.asked {
            return None;
        }
        Some(format!("directory {dir}: {self:?}, and {there:?} are left"))
    }
}
