//! The writes of one log entry over the store, with one layer per command that can be thrown away.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{Bound, ControlFlow},
};

use ctfs_types::Ino;
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Totals,
    cover::{Cover, Subject},
    keys, records,
    view::View,
};
use crate::{Batch, Change, MetaError, StoreError, store::merged};

/// Why a command stopped: refused, or the store is broken.
#[derive(Debug)]
pub enum Fail {
    Verdict(MetaError),
    Store(StoreError),
}

impl From<MetaError> for Fail {
    fn from(verdict: MetaError) -> Self {
        Self::Verdict(verdict)
    }
}

impl From<StoreError> for Fail {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

pub type Outcome<T> = Result<T, Fail>;

pub struct Txn<'a> {
    store: View<'a>,
    /// What the store said, so that nothing is asked twice and the state hash knows the old values.
    originals: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    entry: Batch,
    command: Batch,
    /// What is added to counts, by key: a command that adds need not know what others have added.
    entry_added: BTreeMap<Vec<u8>, Totals>,
    command_added: BTreeMap<Vec<u8>, Totals>,
    /// Inodes of which the command looked at something or changed it.
    touched: BTreeSet<Ino>,
    /// Lives of which it did.
    lives: BTreeSet<u64>,
    /// It looked at something, or changed it, that belongs to no inode and no life.
    beyond: bool,
    pub changes: Vec<Change>,
    /// The record of the range of numbers that was used last: mostly the next one is of it, too.
    pub numbers: Option<Vec<u8>>,
    /// Who covered inodes before this command, as far as it was asked.
    pub covers: BTreeMap<Ino, Cover>,
}

impl<'a> Txn<'a> {
    pub fn new(store: View<'a>) -> Self {
        Self {
            store,
            originals: BTreeMap::new(),
            entry: Batch::new(),
            command: Batch::new(),
            entry_added: BTreeMap::new(),
            command_added: BTreeMap::new(),
            touched: BTreeSet::new(),
            lives: BTreeSet::new(),
            beyond: false,
            changes: Vec::new(),
            numbers: None,
            covers: BTreeMap::new(),
        }
    }

    /// What the next command touches is noted from here on.
    pub fn begin(&mut self) {
        self.touched.clear();
        self.lives.clear();
        self.beyond = false;
        self.covers.clear();
    }

    /// Keys that the command wrote.
    pub fn written(&self) -> Vec<Vec<u8>> {
        self.command.keys().cloned().collect()
    }

    fn note(&mut self, key: &[u8]) {
        match Subject::of(key) {
            Subject::Inode(ino) => drop(self.touched.insert(ino)),
            Subject::Life(life) => drop(self.lives.insert(life)),
            Subject::Sum => {}
            Subject::Volume => self.beyond = true,
        }
    }

    /// Inodes that the command touched, in order.
    pub fn touched(&self) -> Vec<Ino> {
        self.touched.iter().copied().collect()
    }

    /// Whether the command touched nothing but inodes and what belongs to this life.
    pub fn touches_only_life(&self, life: u64) -> bool {
        !self.beyond && self.lives.iter().all(|other| *other == life)
    }

    /// The command looked at something that others may change at any time.
    pub fn goes_beyond(&mut self) {
        self.beyond = true;
    }

    /// Keeps what the command wrote.
    pub fn keep(&mut self) -> Vec<Change> {
        // Not `append`, which builds the whole map anew.
        self.entry.extend(std::mem::take(&mut self.command));
        for (key, difference) in std::mem::take(&mut self.command_added) {
            add_to(&mut self.entry_added, key, difference);
        }
        std::mem::take(&mut self.changes)
    }

    /// Forgets what the command wrote.
    pub fn discard(&mut self) {
        self.command.clear();
        self.command_added.clear();
        self.changes.clear();
    }

    fn original(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        if let Some(known) = self.originals.get(key) {
            return Ok(known.clone());
        }
        let value = self.store.get(key)?;
        self.originals.insert(key.to_vec(), value.clone());
        Ok(value)
    }

    pub fn get_raw(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.note(key);
        self.peek_raw(key)
    }

    /// As [`Self::get_raw`], of something that does not decide what the command does to others: not
    /// noted as touched.
    pub fn peek_raw(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.command.get(key).or_else(|| self.entry.get(key)) {
            Some(value) => Ok(value.clone()),
            None => self.original(key),
        }
    }

    pub fn get<T: DeserializeOwned>(&mut self, key: &[u8]) -> Result<Option<T>, StoreError> {
        self.get_raw(key)?.map(|bytes| records::decode(key, &bytes)).transpose()
    }

    pub fn peek<T: DeserializeOwned>(&mut self, key: &[u8]) -> Result<Option<T>, StoreError> {
        self.peek_raw(key)?.map(|bytes| records::decode(key, &bytes)).transpose()
    }

    /// As it was before this command.
    pub fn before<T: DeserializeOwned>(&mut self, key: &[u8]) -> Result<Option<T>, StoreError> {
        let bytes = match self.entry.get(key) {
            Some(value) => value.clone(),
            None => self.original(key)?,
        };
        bytes.map(|bytes| records::decode(key, &bytes)).transpose()
    }

    pub fn put<T: Serialize>(&mut self, key: Vec<u8>, record: &T) {
        self.note(&key);
        self.command.insert(key, Some(records::encode(record)));
    }

    /// As [`Self::put`], where there has never been a record: the store need not be asked what was there.
    pub fn put_new<T: Serialize>(&mut self, key: Vec<u8>, record: &T) {
        // What was written in this entry may have been there before.
        if !self.entry.contains_key(&key) && !self.command.contains_key(&key) {
            #[cfg(test)]
            assert!(matches!(self.store.get(&key), Ok(None)), "{key:02x?} is not new");
            self.originals.entry(key.clone()).or_insert(None);
        }
        self.put(key, record);
    }

    pub fn put_raw(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.note(&key);
        self.command.insert(key, Some(value));
    }

    pub fn delete(&mut self, key: Vec<u8>) {
        self.note(&key);
        self.command.insert(key, None);
    }

    /// Up to `limit` records with `from <= key < to`, the writes so far included.
    pub fn scan(&mut self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        self.note(from);
        let mut found = Vec::new();
        if from >= to || limit == 0 {
            return Ok(found);
        }
        let bounds = (Bound::Included(from), Bound::Excluded(to));
        let mut visit = |key: &[u8], value: &[u8]| {
            found.push((key.to_vec(), value.to_vec()));
            if found.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let mut top: BTreeMap<&[u8], Option<&[u8]>> = BTreeMap::new();
        for batch in [&self.entry, &self.command] {
            top.extend(batch.range::<[u8], _>(bounds).map(|(key, value)| (key.as_slice(), value.as_deref())));
        }
        merged(top.into_iter(), |visit| self.store.range(from, to, visit), &mut visit)?;
        Ok(found)
    }

    /// Adds a (wrapped) difference to the counts under a key. Nothing else changes such a record.
    pub fn add(&mut self, key: Vec<u8>, difference: Totals) {
        debug_assert_eq!(key.first(), Some(&keys::TOTALS), "only counts are added to");
        add_to(&mut self.command_added, key, difference);
    }

    /// The recursive counts of a directory, with what was added so far.
    pub fn totals(&mut self, dir: Ino) -> Result<Totals, StoreError> {
        let key = keys::totals(dir);
        let base = self.original_totals(&key)?;
        let added = [&self.entry_added, &self.command_added].into_iter().filter_map(|added| added.get(&key));
        Ok(added.fold(base, |sum, difference| sum.plus(*difference)))
    }

    fn original_totals(&mut self, key: &[u8]) -> Result<Totals, StoreError> {
        let base: Option<Totals> = self.original(key)?.map(|bytes| records::decode(key, &bytes)).transpose()?;
        Ok(base.unwrap_or_default().plus(self.store.added(key)))
    }

    /// What all commands so far have written, and added.
    pub fn written_and_added(self) -> (Batch, BTreeMap<Vec<u8>, Totals>) {
        (self.entry, self.entry_added)
    }

    /// The writes of the whole entry, and how they change the state hash.
    pub fn finish(mut self) -> Result<(Batch, u128), StoreError> {
        assert!(self.command.is_empty() && self.command_added.is_empty(), "each command was kept or discarded");
        let mut entry = std::mem::take(&mut self.entry);
        for (key, difference) in std::mem::take(&mut self.entry_added) {
            let sum = self.original_totals(&key)?.plus(difference);
            let record = (sum != Totals::default()).then(|| records::encode(&sum));
            let written = entry.insert(key, record);
            debug_assert_eq!(written, None, "counts are changed by adding alone");
        }
        let mut difference = 0u128;
        for (key, value) in &entry {
            if let Some(old) = self.original(key)? {
                difference = difference.wrapping_sub(record_hash(key, &old));
            }
            if let Some(new) = value {
                difference = difference.wrapping_add(record_hash(key, new));
            }
        }
        Ok((entry, difference))
    }
}

/// Sums up by key; what comes to nothing is left out.
fn add_to(sums: &mut BTreeMap<Vec<u8>, Totals>, key: Vec<u8>, difference: Totals) {
    let sum = sums.get(&key).copied().unwrap_or_default().plus(difference);
    if sum == Totals::default() { sums.remove(&key) } else { sums.insert(key, sum) };
}

/// What one record adds to the state hash; nothing for records that are no part of the state.
pub fn record_hash(key: &[u8], value: &[u8]) -> u128 {
    if matches!(key.first(), None | Some(&keys::STATE_HASH | &keys::CALLER)) {
        return 0;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes()).update(key).update(value);
    u128::from_le_bytes(hasher.finalize().as_bytes()[..16].try_into().expect("16 of 32 bytes"))
}
