//! Recent writes in memory, in front of sled.
//!
//! The log is the truth, so what sled holds may lag behind it: a batch is kept in memory and
//! joined with the ones before, and a thread hands them to sled together, always whole batches.
//! That takes sled's own writes (two `sync_file_range` a batch) out of every command's way. After
//! a crash sled is at an earlier log entry, and the entries after it are applied again;
//! [`WriteBehind::checkpoint`] empties the memory first, and the log is cut only behind one.
//!
//! What sled was handed or asked for last stays in memory a while longer ([`Warm`]): finding a record there
//! costs a tenth of what sled takes.
//!
//! sled does not survive a full disk, so on one nothing is handed to it while memory lasts.

use std::{
    collections::{BTreeMap, btree_map},
    fmt,
    iter::Peekable,
    ops::{Bound, ControlFlow},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ctfs_meta::{Batch, Store, StoreError, merged};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::{
    health::{Health, Space},
    sled_store::{Record, SledStore},
    warm::Warm,
};

/// Bytes after which the thread writes at once; some thousand commands. Not more: sled answers nobody while it
/// takes a batch, and with four times as much a sync of the log took twice as long.
const SETTLE_BYTES: usize = 4 << 20;
/// Bytes after which writers wait for the thread: memory, and time to write at a clean end.
const RECENT_BYTES_MAX: usize = 64 << 20;
/// A batch stays in memory alone at most about this long: what a crash makes us apply again. Of what is
/// written over or deleted meanwhile sled never hears.
const SETTLE_AFTER: Duration = Duration::from_millis(500);
/// A full disk, and a thread that is waited for, are looked at again after this long.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Bookkeeping of one record in memory, besides its bytes.
const RECORD_OVERHEAD: usize = 64;

/// Where recent writes are kept. Clones are the same store.
#[derive(Clone)]
pub struct WriteBehind {
    shared: Arc<Shared>,
    /// Ends the thread when the last clone goes.
    _thread: Arc<Thread>,
}

struct Shared {
    sled: SledStore,
    health: Health,
    recent: RwLock<Recent>,
    /// Looked at after `recent`, and changed before that forgets what it handed over.
    warm: Mutex<Warm>,
    /// Held while sled takes a batch, so that batches arrive in order.
    settling: Mutex<()>,
    work: Mutex<Work>,
    wake: Condvar,
    settled: Condvar,
}

#[derive(Debug, Default)]
struct Recent {
    /// Newest first: writes since the thread last took some, and those it is giving to sled.
    fresh: Batch,
    leaving: Arc<Batch>,
}

/// What the memory says of keys in a range, in order.
struct Overlay<'a> {
    fresh: Peekable<btree_map::Range<'a, Vec<u8>, Option<Vec<u8>>>>,
    leaving: Peekable<btree_map::Range<'a, Vec<u8>, Option<Vec<u8>>>>,
}

impl<'a> Iterator for Overlay<'a> {
    /// Deletions are `None`.
    type Item = (&'a [u8], Option<&'a [u8]>);

    fn next(&mut self) -> Option<Self::Item> {
        let leaves = match (self.fresh.peek(), self.leaving.peek()) {
            (Some((fresh, _)), Some((leaving, _))) if fresh == leaving => {
                self.leaving.next();
                false
            }
            (Some((fresh, _)), Some((leaving, _))) => leaving < fresh,
            (fresh, _) => fresh.is_none(),
        };
        let (key, value) = if leaves { self.leaving.next()? } else { self.fresh.next()? };
        Some((key.as_slice(), value.as_deref()))
    }
}

#[derive(Debug, Default)]
struct Work {
    bytes: usize,
    stop: bool,
    /// Why sled takes nothing more.
    failed: Option<StoreError>,
}

struct Thread {
    shared: Arc<Shared>,
    handle: Mutex<Option<thread::JoinHandle<()>>>,
}

impl fmt::Debug for WriteBehind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteBehind").field("sled", &self.shared.sled).finish_non_exhaustive()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.shared.work.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(handle) = self.handle.lock().take()
            && handle.join().is_err()
        {
            tracing::error!("the metadata store's thread died");
        }
    }
}

impl WriteBehind {
    pub fn new(sled: SledStore, health: Health) -> Result<Self, StoreError> {
        let shared = Arc::new(Shared {
            sled,
            health,
            recent: RwLock::default(),
            warm: Mutex::default(),
            settling: Mutex::default(),
            work: Mutex::default(),
            wake: Condvar::new(),
            settled: Condvar::new(),
        });
        let worker = shared.clone();
        let handle = thread::Builder::new()
            .name("ctfs-settle".into())
            .spawn(move || worker.run())
            .map_err(|error| StoreError::Io(format!("start a thread: {error}")))?;
        let thread = Arc::new(Thread { shared: shared.clone(), handle: Mutex::new(Some(handle)) });
        Ok(Self { shared, _thread: thread })
    }

    /// Returns when everything written before is durable in sled.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        self.shared.settle()?;
        self.shared.sled.checkpoint()
    }

    /// Why sled takes nothing more.
    pub fn failed(&self) -> Option<StoreError> {
        self.shared.work.lock().failed.clone()
    }

    /// Records from `from` on, until there are about `records_max` or `bytes_max` is passed, and
    /// whether that was all. Not empty unless it is the end.
    pub fn slice(&self, from: &[u8], records_max: usize, bytes_max: usize) -> Result<(Vec<Record>, bool), StoreError> {
        let recent = self.shared.recent.read();
        let mut start = from.to_vec();
        loop {
            let (records, is_end) = self.shared.sled.slice(&start, records_max, bytes_max)?;
            let last = records.last().map(|(key, _)| key.clone());
            let upper = match (&last, is_end) {
                (Some(last), false) => Bound::Included(last.as_slice()),
                _ => Bound::Unbounded,
            };
            let mut merged: BTreeMap<Vec<u8>, Vec<u8>> = records.into_iter().collect();
            for (key, value) in recent.overlay(Bound::Included(&start), upper) {
                match value {
                    Some(value) => merged.insert(key.to_vec(), value.to_vec()),
                    None => merged.remove(key),
                };
            }
            match last {
                // All of it was deleted meanwhile: go on behind it.
                Some(mut last) if merged.is_empty() && !is_end => {
                    last.push(0);
                    start = last;
                }
                _ => return Ok((merged.into_iter().collect(), is_end)),
            }
        }
    }
}

impl Recent {
    fn get(&self, key: &[u8]) -> Option<&Option<Vec<u8>>> {
        self.fresh.get(key).or_else(|| self.leaving.get(key))
    }

    fn overlay<'a>(&'a self, from: Bound<&'a [u8]>, to: Bound<&'a [u8]>) -> Overlay<'a> {
        let of = |layer: &'a Batch| layer.range::<[u8], _>((from, to)).peekable();
        Overlay { fresh: of(&self.fresh), leaving: of(&self.leaving) }
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let full = self.health.space() == Space::Full;
            {
                let mut work = self.work.lock();
                let due = Instant::now() + if full { LOOK_AGAIN } else { SETTLE_AFTER };
                let enough = if full { RECENT_BYTES_MAX + 1 } else { SETTLE_BYTES };
                while !work.stop && work.bytes < enough && !self.wake.wait_until(&mut work, due).timed_out() {}
                if !work.stop && full && work.bytes <= RECENT_BYTES_MAX {
                    continue;
                }
                if work.stop {
                    drop(work);
                    // The log has what is not handed over.
                    if !full && let Err(error) = self.settle() {
                        tracing::warn!(%error, "the last writes did not reach the metadata store; the log has them");
                    }
                    return;
                }
            }
            if let Err(error) = self.settle() {
                self.health.fail(&format!("the metadata store failed: {error}"));
                return;
            }
        }
    }

    /// Hands everything in memory to sled.
    fn settle(&self) -> Result<(), StoreError> {
        let _turn = self.settling.lock();
        if let Some(error) = self.work.lock().failed.clone() {
            return Err(error);
        }
        let batch = {
            let mut recent = self.recent.write();
            if recent.fresh.is_empty() {
                return Ok(());
            }
            recent.leaving = Arc::new(std::mem::take(&mut recent.fresh));
            recent.leaving.clone()
        };
        self.work.lock().bytes = 0;
        let written = self.sled.put(&batch);
        match written {
            // Readers find it in sled from here on.
            Ok(()) => {
                // Whoever asked sled before may have got what was there before.
                self.warm.lock().next_generation();
                for (key, value) in &*batch {
                    self.warm.lock().put(key, value);
                }
                self.recent.write().leaving = Arc::default();
            }
            Err(ref error) => self.work.lock().failed = Some(error.clone()),
        }
        self.settled.notify_all();
        written
    }
}

impl Store for WriteBehind {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        // Before the look at what is recent: see `settle`.
        let generation = self.shared.warm.lock().generation();
        if let Some(value) = self.shared.recent.read().get(key) {
            return Ok(value.clone());
        }
        if let Some(value) = self.shared.warm.lock().get(key) {
            return Ok(value);
        }
        let value = self.shared.sled.get(key)?;
        self.shared.warm.lock().put_if(generation, key, &value);
        Ok(value)
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
        let recent = self.shared.recent.read();
        let over = recent.overlay(Bound::Included(from), Bound::Excluded(to));
        merged(over, |visit| self.shared.sled.range(from, to, visit), visit)
    }

    fn write(&self, batch: Batch) -> Result<(), StoreError> {
        let bytes: usize = batch.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Vec::len) + RECORD_OVERHEAD).sum();
        {
            let mut work = self.shared.work.lock();
            while work.failed.is_none() && work.bytes > RECENT_BYTES_MAX {
                self.shared.settled.wait_for(&mut work, LOOK_AGAIN);
            }
            if let Some(error) = work.failed.clone() {
                return Err(error);
            }
            work.bytes += bytes;
            if work.bytes >= SETTLE_BYTES {
                self.shared.wake.notify_all();
            }
        }
        self.shared.recent.write().fresh.extend(batch);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ctfs_meta::MemoryStore;
    use proptest::prelude::*;

    use super::*;

    fn all(store: &dyn Store) -> Vec<Record> {
        let mut records = Vec::new();
        store
            .range(&[0], &[0xff], &mut |key, value| {
                records.push((key.to_vec(), value.to_vec()));
                ControlFlow::Continue(())
            })
            .unwrap();
        records
    }

    fn slices(store: &WriteBehind) -> Vec<Record> {
        let (mut records, mut from) = (Vec::new(), vec![0]);
        loop {
            let (slice, is_end) = store.slice(&from, 3, 1 << 20).unwrap();
            if let Some((last, _)) = slice.last() {
                from = [last.as_slice(), b"\0"].concat();
            } else {
                assert!(is_end, "an empty slice is the end");
            }
            records.extend(slice);
            if is_end {
                return records;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_is_in_memory_and_what_is_in_sled_read_as_one_store(
            steps in proptest::collection::vec(
                (proptest::collection::vec((1u8..20, proptest::option::of(any::<u8>())), 1..6), any::<bool>()),
                1..30,
            )
        ) {
            let dir = tempfile::tempdir().unwrap();
            let real = WriteBehind::new(SledStore::open(dir.path(), 1 << 20).unwrap(), Health::new(dir.path())).unwrap();
            let model = MemoryStore::default();
            for (changes, settle) in steps {
                let batch: Batch = changes.into_iter().map(|(key, value)| (vec![key], value.map(|v| vec![v]))).collect();
                real.write(batch.clone()).unwrap();
                model.write(batch).unwrap();
                if settle {
                    real.shared.settle().unwrap();
                }
                prop_assert_eq!(all(&real), all(&model));
                prop_assert_eq!(slices(&real), all(&model));
                for key in 1u8..20 {
                    prop_assert_eq!(real.get(&[key]).unwrap(), model.get(&[key]).unwrap());
                }
            }
            drop(real);
            let reopened = SledStore::open(dir.path(), 1 << 20).unwrap();
            prop_assert_eq!(all(&reopened), all(&model), "a clean end loses nothing");
        }
    }

    #[test]
    fn who_asks_while_writes_are_handed_over_never_gets_what_was_there_before() {
        let dir = tempfile::tempdir().unwrap();
        let store = WriteBehind::new(SledStore::open(dir.path(), 1 << 20).unwrap(), Health::new(dir.path())).unwrap();
        let written: [std::sync::atomic::AtomicU32; 4] = Default::default();
        let get = |store: &WriteBehind, key: u8| {
            store.get(&[key]).unwrap().map_or(0, |value| u32::from_le_bytes(value.try_into().unwrap()))
        };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let (store, written) = (store.clone(), &written);
                scope.spawn(move || {
                    for round in 0.. {
                        let key = round % 4;
                        let before = written[key].load(std::sync::atomic::Ordering::SeqCst);
                        let got = get(&store, key as u8);
                        assert!(got >= before, "{got} where {before} was written");
                        if before >= 3996 {
                            break;
                        }
                    }
                });
            }
            for number in 1..4000u32 {
                let key = number % 4;
                store.write([(vec![key as u8], Some(number.to_le_bytes().to_vec()))].into()).unwrap();
                written[key as usize].store(number, std::sync::atomic::Ordering::SeqCst);
                if number % 3 == 0 {
                    store.shared.settle().unwrap();
                }
            }
        });
    }

    #[test]
    fn a_range_that_is_broken_off_visits_nothing_more() {
        let dir = tempfile::tempdir().unwrap();
        let store = WriteBehind::new(SledStore::open(dir.path(), 1 << 20).unwrap(), Health::new(dir.path())).unwrap();
        store.write([(vec![1], Some(vec![1])), (vec![3], Some(vec![3]))].into()).unwrap();
        store.shared.settle().unwrap();
        store.write([(vec![2], Some(vec![2])), (vec![4], Some(vec![4]))].into()).unwrap();
        for limit in 1..=4 {
            let mut seen = Vec::new();
            store
                .range(&[0], &[9], &mut |key, _| {
                    seen.push(key[0]);
                    if seen.len() == limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })
                .unwrap();
            assert_eq!(seen, (1..=limit as u8).collect::<Vec<_>>());
        }
    }
}
