//! Where the records of a replica are.

use std::{ops::ControlFlow, sync::Arc};

use ctfs_meta::{Batch, MemoryStore, Store, StoreError};

use crate::{sled_store::Record, write_behind::WriteBehind};

/// The records below one namespace. Clones are the same records.
#[derive(Debug, Clone)]
pub enum Records {
    /// In sled, the recent ones in memory before it.
    OnDisk(WriteBehind),
    /// In memory alone: the next start makes them again, from snapshot and log.
    InMemory(Arc<MemoryStore>),
}

impl Records {
    pub fn in_memory() -> Self {
        Self::InMemory(Arc::default())
    }

    /// Returns when everything written before is as durable as it gets.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        match self {
            Self::OnDisk(store) => store.checkpoint(),
            Self::InMemory(_) => Ok(()),
        }
    }

    /// Why nothing more is taken.
    pub fn failed(&self) -> Option<StoreError> {
        match self {
            Self::OnDisk(store) => store.failed(),
            Self::InMemory(_) => None,
        }
    }

    /// As [`WriteBehind::slice`].
    pub fn slice(&self, from: &[u8], records_max: usize, bytes_max: usize) -> Result<(Vec<Record>, bool), StoreError> {
        let store = match self {
            Self::OnDisk(store) => return store.slice(from, records_max, bytes_max),
            Self::InMemory(store) => store,
        };
        let (mut records, mut bytes, mut is_end) = (Vec::new(), 0, true);
        store.range(from, &[0xff; 64], &mut |key, value| {
            if records.len() >= records_max || bytes >= bytes_max {
                is_end = false;
                return ControlFlow::Break(());
            }
            bytes += key.len() + value.len();
            records.push((key.to_vec(), value.to_vec()));
            ControlFlow::Continue(())
        })?;
        Ok((records, is_end))
    }
}

impl Store for Records {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self {
            Self::OnDisk(store) => store.get(key),
            Self::InMemory(store) => store.get(key),
        }
    }

    fn range(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        match self {
            Self::OnDisk(store) => store.range(from, to, visit),
            Self::InMemory(store) => store.range(from, to, visit),
        }
    }

    fn write(&self, batch: Batch) -> Result<(), StoreError> {
        match self {
            Self::OnDisk(store) => store.write(batch),
            Self::InMemory(store) => store.write(batch),
        }
    }
}
