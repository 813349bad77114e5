//! The materialised state on disk: ctfs-meta's [`Store`] over sled.
//!
//! sled holds what can be rebuilt from snapshot and log, so it need not be trusted: every value
//! carries a checksum over key and value that is compared on every read, and a store that does
//! not open or does not check is thrown away. A batch becomes durable with [`SledStore::checkpoint`]
//! and not before; until then a crash may lose it, but never half of it.

use std::{
    any::Any,
    fs::{self, File},
    io,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ctfs_meta::{Batch, Store, StoreError};

use crate::durable;

const SUM_BYTES: usize = 4;

/// How sled 0.34.7 begins its refusal of a directory that is open elsewhere.
const LOCK_REFUSED: &str = "could not acquire lock";
/// Threads of sled keep a dropped store open for a moment.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Why a store does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("metadata store {dir} is open in another process")]
    Locked { dir: PathBuf },
    #[error(transparent)]
    Unusable(#[from] StoreError),
}

/// Key and value.
pub type Record = (Vec<u8>, Vec<u8>);

/// Records of one namespace in one sled directory. Clones are the same store.
#[derive(Debug, Clone)]
pub struct SledStore {
    db: sled::Db,
    dir: PathBuf,
}

impl SledStore {
    /// Opens the store in `dir`, making an empty one where there is none.
    ///
    /// # Errors
    /// [`OpenError::Locked`] when somebody has it open; everything else means that what is in
    /// `dir` is of no use.
    pub fn open(dir: &Path, cache_bytes: u64) -> Result<Self, OpenError> {
        let config = sled::Config::new()
            .path(dir)
            .cache_capacity(cache_bytes)
            // Durability has one place, `checkpoint`; sled's own flusher would only add writes.
            .flush_every_ms(None);
        let start = Instant::now();
        loop {
            // sled 0.34 asserts about some damaged files instead of returning an error.
            let opened = catch_unwind(AssertUnwindSafe(|| config.open()))
                .map_err(|panic| StoreError::Io(format!("open sled: {}", panic_text(panic.as_ref()))))?;
            match opened {
                Ok(db) => return Ok(Self { db, dir: dir.to_owned() }),
                Err(sled::Error::Io(error)) if error.to_string().contains(LOCK_REFUSED) => {
                    if start.elapsed() > LOCK_WAIT {
                        return Err(OpenError::Locked { dir: dir.to_owned() });
                    }
                    std::thread::sleep(LOCK_WAIT / 100);
                }
                Err(error) => return Err(io_error(error).into()),
            }
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes the store takes on disk.
    pub fn bytes_on_disk(&self) -> Result<u64, StoreError> {
        self.db.size_on_disk().map_err(io_error)
    }

    /// Returns when everything written before is durable.
    ///
    /// On Linux `flush` of sled 0.34.7 ends with `sync_file_range`, which neither flushes the
    /// disk's cache nor the file's length. So the files are synced through descriptors of our own.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        self.db.flush().map_err(io_error)?;
        let sync = || -> io::Result<()> {
            for file in fs::read_dir(&self.dir)? {
                let file = file?;
                // sled removes its own old snapshots at any time.
                match (file.file_type()?.is_dir(), File::open(file.path())) {
                    (false, Ok(open)) => open.sync_data()?,
                    (true, Ok(open)) => open.sync_all()?,
                    (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
                    (_, Err(error)) => return Err(error),
                }
            }
            durable::sync_dir(&self.dir)
        };
        sync().map_err(|error| StoreError::Io(format!("sync {}: {error}", self.dir.display())))
    }

    /// Reads every record, so that damage is found now and not in the middle of an operation.
    /// Returns how many there are.
    pub fn verify(&self) -> Result<u64, StoreError> {
        catch_unwind(AssertUnwindSafe(|| {
            let mut records = 0;
            for record in self.db.iter() {
                let (key, value) = record.map_err(io_error)?;
                open_value(&key, &value)?;
                records += 1;
            }
            Ok(records)
        }))
        .unwrap_or_else(|panic| Err(StoreError::Io(format!("read sled: {}", panic_text(panic.as_ref())))))
    }

    /// Records from `from` on, until there are `records_max` or `bytes_max` is passed, and
    /// whether that was all.
    pub fn slice(&self, from: &[u8], records_max: usize, bytes_max: usize) -> Result<(Vec<Record>, bool), StoreError> {
        let mut records = Vec::new();
        let mut bytes = 0;
        for record in self.db.range(from..) {
            if records.len() >= records_max || bytes >= bytes_max {
                return Ok((records, false));
            }
            let (key, value) = record.map_err(io_error)?;
            let value = open_value(&key, &value)?.to_vec();
            bytes += key.len() + value.len();
            records.push((key.to_vec(), value));
        }
        Ok((records, true))
    }

    /// Writes the whole batch or nothing.
    ///
    /// # Errors
    /// sled's.
    pub fn put(&self, batch: &Batch) -> Result<(), StoreError> {
        let mut changes = sled::Batch::default();
        for (key, value) in batch {
            match value {
                Some(value) => changes.insert(key.as_slice(), seal_value(key, value)),
                // Most that come and go do so before sled hears of them, and it would write down that each is gone.
                None if self.db.contains_key(key).map_err(io_error)? => changes.remove(key.as_slice()),
                None => {}
            }
        }
        self.db.apply_batch(changes).map_err(io_error)
    }

    /// Removes a store that nobody has open.
    pub fn wipe(dir: &Path) -> io::Result<()> {
        durable::remove_dir(dir)
    }

    #[cfg(test)]
    pub(crate) fn raw(&self) -> &sled::Db {
        &self.db
    }
}

impl Store for SledStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.db.get(key).map_err(io_error)? {
            Some(value) => Ok(Some(open_value(key, &value)?.to_vec())),
            None => Ok(None),
        }
    }

    fn range(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        if from >= to {
            return Ok(());
        }
        for record in self.db.range(from..to) {
            let (key, value) = record.map_err(io_error)?;
            if visit(&key, open_value(&key, &value)?).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn write(&self, batch: Batch) -> Result<(), StoreError> {
        self.put(&batch)
    }
}

fn sum(key: &[u8], value: &[u8]) -> [u8; SUM_BYTES] {
    // The length keeps ("ab", "c") and ("a", "bc") apart.
    let sum = crc32c::crc32c(&(key.len() as u64).to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(sum, key), value).to_le_bytes()
}

pub(crate) fn seal_value(key: &[u8], value: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(SUM_BYTES + value.len());
    sealed.extend_from_slice(&sum(key, value));
    sealed.extend_from_slice(value);
    sealed
}

fn open_value<'a>(key: &[u8], sealed: &'a [u8]) -> Result<&'a [u8], StoreError> {
    match sealed.split_at_checked(SUM_BYTES) {
        Some((expected, value)) if expected == sum(key, value) => Ok(value),
        _ => Err(StoreError::Corrupt { key: key.to_vec(), why: "checksum does not match".into() }),
    }
}

fn io_error(error: sled::Error) -> StoreError {
    StoreError::Io(format!("sled: {error}"))
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "panic",
    }
}

#[cfg(test)]
mod tests {
    use ctfs_meta::MemoryStore;
    use proptest::prelude::*;

    use super::*;

    const CACHE_BYTES: u64 = 1 << 20;

    fn batch(changes: &[(&[u8], Option<&[u8]>)]) -> Batch {
        changes.iter().map(|(key, value)| (key.to_vec(), value.map(<[u8]>::to_vec))).collect()
    }

    fn all(store: &dyn Store, from: &[u8], to: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut records = Vec::new();
        store
            .range(from, to, &mut |key, value| {
                records.push((key.to_vec(), value.to_vec()));
                ControlFlow::Continue(())
            })
            .unwrap();
        records
    }

    /// What every store must do, in the order a reader would try it.
    fn conforms(store: &dyn Store) {
        assert_eq!(store.get(b"a").unwrap(), None);
        store.write(batch(&[(b"a", Some(b"1")), (b"b", Some(b"")), (b"b\0", Some(b"3")), (b"\xff", Some(b"4"))])).unwrap();
        assert_eq!(store.get(b"a").unwrap().as_deref(), Some(&b"1"[..]));
        assert_eq!(store.get(b"b").unwrap().as_deref(), Some(&b""[..]));
        assert_eq!(all(store, b"a", b"b\0").len(), 2, "the end is exclusive, the start inclusive");
        assert_eq!(all(store, b"b", b"b"), vec![]);
        assert_eq!(all(store, b"c", b"a"), vec![], "a range backwards is empty");
        let mut visited = 0;
        store
            .range(b"", b"\xff\xff", &mut |_, _| {
                visited += 1;
                if visited == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .unwrap();
        assert_eq!(visited, 2, "break ends the visit");
        store.write(batch(&[(b"a", None), (b"b", Some(b"new")), (b"zz", None)])).unwrap();
        assert_eq!(store.get(b"a").unwrap(), None);
        let keys: Vec<_> = all(store, b"", b"\xff\xff").into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, vec![b"b".to_vec(), b"b\0".to_vec(), b"\xff".to_vec()]);
    }

    #[test]
    fn the_store_in_memory_conforms() {
        conforms(&MemoryStore::default());
    }

    #[test]
    fn the_store_over_sled_conforms() {
        let dir = tempfile::tempdir().unwrap();
        conforms(&SledStore::open(dir.path(), CACHE_BYTES).unwrap());
    }

    #[test]
    fn a_checkpointed_batch_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path(), CACHE_BYTES).unwrap();
        store.write(batch(&[(b"k", Some(b"v"))])).unwrap();
        store.checkpoint().unwrap();
        drop(store);
        let store = SledStore::open(dir.path(), CACHE_BYTES).unwrap();
        assert_eq!(store.get(b"k").unwrap().as_deref(), Some(&b"v"[..]));
        assert_eq!(store.verify().unwrap(), 1);
    }

    #[test]
    fn a_bit_that_flips_in_a_value_is_reported_on_every_way_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path(), CACHE_BYTES).unwrap();
        store.write(batch(&[(b"k", Some(b"value"))])).unwrap();
        let mut bad = store.raw().get(b"k").unwrap().unwrap().to_vec();
        bad[6] ^= 1;
        store.raw().insert(b"k", bad).unwrap();
        assert!(matches!(store.get(b"k"), Err(StoreError::Corrupt { .. })));
        assert!(matches!(store.range(b"a", b"z", &mut |_, _| ControlFlow::Continue(())), Err(StoreError::Corrupt { .. })));
        assert!(matches!(store.slice(b"", 10, 1000), Err(StoreError::Corrupt { .. })));
        assert!(matches!(store.verify(), Err(StoreError::Corrupt { .. })));
    }

    #[test]
    fn a_value_under_another_key_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path(), CACHE_BYTES).unwrap();
        store.write(batch(&[(b"k", Some(b"value"))])).unwrap();
        let value = store.raw().get(b"k").unwrap().unwrap();
        store.raw().insert(b"other", value).unwrap();
        assert!(matches!(store.get(b"other"), Err(StoreError::Corrupt { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn sled_and_memory_agree_after_every_batch(
            batches in proptest::collection::vec(
                proptest::collection::btree_map(
                    proptest::collection::vec(0u8..4, 0..4),
                    proptest::option::of(proptest::collection::vec(any::<u8>(), 0..8)),
                    0..6,
                ),
                1..20,
            ),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let sled = SledStore::open(dir.path(), CACHE_BYTES).unwrap();
            let memory = MemoryStore::default();
            for batch in batches {
                sled.write(batch.clone()).unwrap();
                memory.write(batch).unwrap();
                prop_assert_eq!(all(&sled, b"", b"\xff"), all(&memory, b"", b"\xff"));
                prop_assert_eq!(all(&sled, b"\x01", b"\x02\x01"), all(&memory, b"\x01", b"\x02\x01"));
            }
        }
    }
}
