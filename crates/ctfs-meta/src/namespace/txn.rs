//! The writes of one log entry over the store, with one layer per command that can be thrown away.

use std::{collections::BTreeMap, ops::ControlFlow};

use serde::{Serialize, de::DeserializeOwned};

use super::{keys, records};
use crate::{Batch, Change, MetaError, Store, StoreError};

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
    store: &'a dyn Store,
    /// What the store said, so that nothing is asked twice and the state hash knows the old values.
    originals: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    entry: Batch,
    command: Batch,
    pub changes: Vec<Change>,
}

impl<'a> Txn<'a> {
    pub fn new(store: &'a dyn Store) -> Self {
        Self { store, originals: BTreeMap::new(), entry: Batch::new(), command: Batch::new(), changes: Vec::new() }
    }

    /// Keeps what the command wrote.
    pub fn keep(&mut self) -> Vec<Change> {
        self.entry.append(&mut self.command);
        std::mem::take(&mut self.changes)
    }

    /// Forgets what the command wrote.
    pub fn discard(&mut self) {
        self.command.clear();
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
        match self.command.get(key).or_else(|| self.entry.get(key)) {
            Some(value) => Ok(value.clone()),
            None => self.original(key),
        }
    }

    pub fn get<T: DeserializeOwned>(&mut self, key: &[u8]) -> Result<Option<T>, StoreError> {
        self.get_raw(key)?.map(|bytes| records::decode(key, &bytes)).transpose()
    }

    pub fn put<T: Serialize>(&mut self, key: Vec<u8>, record: &T) {
        self.command.insert(key, Some(records::encode(record)));
    }

    pub fn put_raw(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.command.insert(key, Some(value));
    }

    pub fn delete(&mut self, key: Vec<u8>) {
        self.command.insert(key, None);
    }

    /// Up to `limit` records with `from <= key < to`, the writes so far included.
    pub fn scan(&mut self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        if from >= to {
            return Ok(Vec::new());
        }
        let range = from.to_vec()..to.to_vec();
        let mut overlay: BTreeMap<&[u8], &Option<Vec<u8>>> = BTreeMap::new();
        overlay.extend(self.entry.range(range.clone()).map(|(k, v)| (k.as_slice(), v)));
        overlay.extend(self.command.range(range).map(|(k, v)| (k.as_slice(), v)));
        let mut overlay = overlay.into_iter().peekable();
        let mut found = Vec::new();
        self.store.range(from, to, &mut |key, value| {
            while found.len() < limit
                && let Some((k, v)) = overlay.next_if(|(k, _)| *k < key)
            {
                found.extend(v.as_ref().map(|v| (k.to_vec(), v.clone())));
            }
            if found.len() >= limit {
                return ControlFlow::Break(());
            }
            match overlay.next_if(|(k, _)| *k == key) {
                Some((k, v)) => found.extend(v.as_ref().map(|v| (k.to_vec(), v.clone()))),
                None => found.push((key.to_vec(), value.to_vec())),
            }
            ControlFlow::Continue(())
        })?;
        for (k, v) in overlay {
            if found.len() >= limit {
                break;
            }
            found.extend(v.as_ref().map(|v| (k.to_vec(), v.clone())));
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Records with `from <= key < to` that this entry wrote and not deleted since.
    pub fn written(&self, from: &[u8], to: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
        let range = from.to_vec()..to.to_vec();
        let mut written: BTreeMap<&Vec<u8>, &Option<Vec<u8>>> = self.entry.range(range.clone()).collect();
        written.extend(self.command.range(range));
        written.into_iter().filter_map(|(key, value)| Some((key.clone(), value.clone()?))).collect()
    }

    /// The writes of the whole entry, and how they change the state hash.
    pub fn finish(mut self) -> Result<(Batch, u128), StoreError> {
        assert!(self.command.is_empty(), "each command was kept or discarded");
        let entry = std::mem::take(&mut self.entry);
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

/// What one record adds to the state hash; nothing for records that are no part of the state.
pub fn record_hash(key: &[u8], value: &[u8]) -> u128 {
    if matches!(key.first(), None | Some(&keys::STATE_HASH | &keys::CALLER)) {
        return 0;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes()).update(key).update(value);
    u128::from_le_bytes(hasher.finalize().as_bytes()[..16].try_into().expect("16 of 32 bytes"))
}
