//! The store with a view of the past: a snapshot is read while writes go on.
//!
//! With no snapshot under way nothing is copied. While one is, a write to a key that its cursor
//! has not passed first copies the old value aside, and the cursor reads that instead. So the
//! cursor sees exactly the records of the moment it was made, in key order.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::Arc,
    time::Duration,
};

use ctfs_meta::{Batch, Store, StoreError};
use parking_lot::{Condvar, Mutex};

use crate::{records::Records, sled_store::Record};

/// Bytes of old values kept for a cursor. Past it writes wait for the cursor to move on: a
/// snapshot must end, and memory too.
const ASIDE_BYTES_MAX: usize = 256 << 20;
/// How long one such wait lasts before it looks again; only a bound, the cursor wakes waiters.
const ASIDE_WAIT: Duration = Duration::from_millis(100);

/// The live store of one namespace, shared by the namespace and a snapshot under way.
#[derive(Debug)]
pub struct Versions {
    store: Records,
    /// Also the lock between one write and one slice of the cursor.
    aside: Mutex<Option<Aside>>,
    moved: Condvar,
    aside_bytes_max: usize,
}

/// Old values for the cursor.
#[derive(Debug)]
struct Aside {
    /// Keys below are read already; `None`: all are.
    cursor: Option<Vec<u8>>,
    /// What keys at or past the cursor had; `None`: they did not exist.
    old: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    bytes: usize,
}

impl Versions {
    pub fn new(store: Records) -> Arc<Self> {
        Self::with_limit(store, ASIDE_BYTES_MAX)
    }

    fn with_limit(store: Records, aside_bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { store, aside: Mutex::new(None), moved: Condvar::new(), aside_bytes_max })
    }

    pub fn store(&self) -> &Records {
        &self.store
    }

    /// A cursor over the records as they are now. The caller keeps writers out of this call, and
    /// has one cursor at a time: `None` while there is another.
    pub fn cursor(self: &Arc<Self>) -> Option<Cursor> {
        let mut aside = self.aside.lock();
        if aside.is_some() {
            return None;
        }
        *aside = Some(Aside { cursor: Some(Vec::new()), old: BTreeMap::new(), bytes: 0 });
        Some(Cursor { versions: self.clone() })
    }
}

/// The [`Store`] a namespace owns; reads are those of the store behind it.
#[derive(Debug, Clone)]
pub struct VersionedStore(pub Arc<Versions>);

impl Store for VersionedStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.0.store.get(key)
    }

    fn range(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        self.0.store.range(from, to, visit)
    }

    fn write(&self, batch: Batch) -> Result<(), StoreError> {
        let mut aside = self.0.aside.lock();
        while aside.as_ref().is_some_and(|aside| aside.bytes > self.0.aside_bytes_max) {
            self.0.moved.wait_for(&mut aside, ASIDE_WAIT);
        }
        if let Some(aside) = aside.as_mut() {
            for key in batch.keys() {
                if aside.cursor.as_ref().is_some_and(|cursor| key >= cursor) && !aside.old.contains_key(key) {
                    let old = self.0.store.get(key)?;
                    aside.bytes += key.len() + old.as_ref().map_or(0, Vec::len);
                    aside.old.insert(key.clone(), old);
                }
            }
        }
        self.0.store.write(batch)
    }
}

/// Reads the records of the moment it was made, once, in key order. Dropping it ends the copying.
#[derive(Debug)]
pub struct Cursor {
    versions: Arc<Versions>,
}

impl Cursor {
    /// The next records; empty at the end. Writes wait meanwhile.
    pub fn next(&mut self, records_max: usize, bytes_max: usize) -> Result<Vec<Record>, StoreError> {
        let mut guard = self.versions.aside.lock();
        let aside = guard.as_mut().expect("a cursor has its copies until it is dropped");
        while let Some(cursor) = aside.cursor.take() {
            let (live, is_end) = self.versions.store.slice(&cursor, records_max, bytes_max)?;
            // The slice answers for every key up to its last one, or for all at the end.
            let next = match live.last() {
                Some((key, _)) if !is_end => Some([key.as_slice(), b"\0"].concat()),
                _ => None,
            };
            let later = next.as_ref().map(|next| aside.old.split_off(next)).unwrap_or_default();
            let mut records: BTreeMap<_, _> = live.into_iter().collect();
            for (key, old) in std::mem::replace(&mut aside.old, later) {
                aside.bytes -= key.len() + old.as_ref().map_or(0, Vec::len);
                match old {
                    Some(old) => records.insert(key, old),
                    None => records.remove(&key),
                };
            }
            aside.cursor = next;
            self.versions.moved.notify_all();
            // Empty here means only that everything in this slice is newer than the cursor.
            if !records.is_empty() {
                return Ok(records.into_iter().collect());
            }
        }
        Ok(Vec::new())
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        *self.versions.aside.lock() = None;
        self.versions.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn open(dir: &tempfile::TempDir, limit: usize) -> Arc<Versions> {
        let sled = crate::sled_store::SledStore::open(dir.path(), 1 << 20).unwrap();
        let settled = crate::write_behind::WriteBehind::new(sled, crate::health::Health::new(dir.path())).unwrap();
        Versions::with_limit(Records::OnDisk(settled), limit)
    }

    #[test]
    fn a_cursor_that_holds_too_much_makes_writes_wait_until_it_moves() {
        let dir = tempfile::tempdir().unwrap();
        let versions = open(&dir, 10);
        let store = VersionedStore(versions.clone());
        let put = |byte: u8| Batch::from([(vec![byte], Some(vec![byte; 20]))]);
        for byte in 0..4 {
            store.write(put(byte)).unwrap();
        }
        let mut cursor = versions.cursor().unwrap();
        assert!(versions.cursor().is_none(), "one cursor at a time");
        store.write(put(3)).unwrap();
        let writer = std::thread::spawn(move || store.write(put(2)));
        let mut read = Vec::new();
        loop {
            let records = cursor.next(1, usize::MAX).unwrap();
            if records.is_empty() {
                break;
            }
            read.extend(records);
        }
        writer.join().unwrap().unwrap();
        assert_eq!(read.len(), 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_cursor_reads_the_records_of_its_moment_whatever_is_written_meanwhile(
            before in any_batch(), meanwhile in proptest::collection::vec(any_batch(), 0..12), slice in 1usize..4,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let versions = open(&dir, usize::MAX);
            let store = VersionedStore(versions.clone());
            store.write(before.clone()).unwrap();
            let expected: Vec<_> = before.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();

            let mut cursor = versions.cursor().unwrap();
            let mut read = Vec::new();
            let mut writes = meanwhile.into_iter();
            loop {
                if let Some(batch) = writes.next() {
                    store.write(batch).unwrap();
                }
                let records = cursor.next(slice, usize::MAX).unwrap();
                if records.is_empty() {
                    break;
                }
                read.extend(records);
            }
            prop_assert_eq!(read, expected);
        }
    }

    fn any_batch() -> impl Strategy<Value = Batch> {
        proptest::collection::btree_map(
            proptest::collection::vec(0u8..4, 0..3),
            proptest::option::of(proptest::collection::vec(any::<u8>(), 0..4)),
            0..12,
        )
    }
}
