//! The directory of the materialised state: numbered sled stores, and which of them counts.
//!
//! A replacement is filled under a new number and becomes the state when the pointer file names
//! it; so there is a whole state at every moment, the old one or the new one.

use std::{
    fs::{self, File},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use ctfs_meta::{Batch, Namespace, Store, StoreError};
use ctfs_types::codec;
use tracing::warn;

use crate::{
    durable,
    health::Health,
    raft_types::{RaftLogId, RaftMembership, log_index_of},
    records::Records,
    sled_store::{OpenError, SledStore},
    storage::StorageSettings,
    write_behind::WriteBehind,
    snapshot::{self, Header, SnapshotError},
    versioned::{VersionedStore, Versions},
};

const VERSION: u8 = 1;
const RECORD_BYTES_MAX: usize = 1 << 20;

/// Log id of the last applied entry. Keys from 0xff on are ours, ctfs-meta keeps them as they are.
const APPLIED_KEY: &[u8] = b"\xffapplied";
/// The last applied membership and its log id.
const MEMBERSHIP_KEY: &[u8] = b"\xffmembership";

/// How far the state got, as openraft counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Reached {
    pub applied: Option<RaftLogId>,
    pub membership: RaftMembership,
}

impl Reached {
    /// The records that go into an entry's batch. `membership` only when the entry has one.
    pub fn records(applied: RaftLogId, membership: Option<&RaftMembership>) -> Batch {
        let mut batch = Batch::from([(APPLIED_KEY.to_vec(), Some(codec::encode(VERSION, &applied)))]);
        if let Some(membership) = membership {
            batch.insert(MEMBERSHIP_KEY.to_vec(), Some(codec::encode(VERSION, membership)));
        }
        batch
    }

    pub fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let corrupt = |key: &[u8], why: codec::CodecError| StoreError::Corrupt { key: key.to_vec(), why: why.to_string() };
        let applied = match store.get(APPLIED_KEY)? {
            Some(bytes) => {
                Some(codec::decode(VERSION, &bytes, RECORD_BYTES_MAX).map_err(|why| corrupt(APPLIED_KEY, why))?)
            }
            None => None,
        };
        let membership = match store.get(MEMBERSHIP_KEY)? {
            Some(bytes) => codec::decode(VERSION, &bytes, RECORD_BYTES_MAX).map_err(|why| corrupt(MEMBERSHIP_KEY, why))?,
            None => RaftMembership::default(),
        };
        Ok(Self { applied, membership })
    }
}

/// An open state: the namespace, and the store below it.
pub(crate) struct State {
    pub number: u64,
    pub versions: Arc<Versions>,
    pub namespace: Namespace,
    pub reached: Reached,
}

/// Why there is no state to go on with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("state directory: {0}")]
    Io(#[from] io::Error),
    /// It was left in the middle of something, or says of itself that it is bad.
    #[error("{0}")]
    Unusable(String),
}

#[derive(Clone)]
pub(crate) struct StateDir {
    dir: PathBuf,
    cache_bytes: u64,
    verify_bytes_max: u64,
    /// No store is on disk, each start makes one in memory.
    in_memory: bool,
    health: Health,
}

impl StateDir {
    pub fn open(dir: &Path, settings: &StorageSettings, health: Health) -> io::Result<Self> {
        durable::create_dir(dir)?;
        let StorageSettings { cache_bytes, verify_bytes_max, state_in_memory: in_memory, .. } = *settings;
        Ok(Self { dir: dir.to_owned(), cache_bytes, verify_bytes_max, in_memory, health })
    }

    fn store_path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("store-{number}"))
    }

    fn poison_path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("store-{number}.poisoned"))
    }

    /// The state that counts; `None` when there never was one.
    pub fn current(&self) -> Result<Option<State>, StateError> {
        if self.in_memory {
            return Ok(None);
        }
        let Some(bytes) = durable::read_if_there(&self.dir.join("current"))? else {
            return if self.numbers()?.is_empty() {
                Ok(None)
            } else {
                Err(StateError::Unusable("no pointer to the current store".into()))
            };
        };
        let number: u64 = codec::unseal(VERSION, &bytes, RECORD_BYTES_MAX)
            .map_err(|why| StateError::Unusable(format!("pointer to the current store: {why}")))?;
        if let Some(why) = durable::read_if_there(&self.poison_path(number))? {
            return Err(StateError::Unusable(format!("marked bad: {}", String::from_utf8_lossy(&why))));
        }
        if !self.store_path(number).is_dir() {
            return Err(StateError::Unusable(format!("store {number} is missing")));
        }
        let store = SledStore::open(&self.store_path(number), self.cache_bytes)?;
        let is_verified = store.bytes_on_disk()? <= self.verify_bytes_max;
        // sled asserts about some damaged pages instead of returning an error.
        let loaded = catch_unwind(AssertUnwindSafe(|| {
            let state = Self::load(number, self.on_disk(store)?)?;
            if is_verified {
                check_sum(&state.namespace)?;
            }
            Ok(state)
        }));
        loaded.unwrap_or_else(|_| Err(StateError::Unusable("reading it broke down".into()))).map(Some)
    }

    fn load(number: u64, store: Records) -> Result<State, StateError> {
        let versions = Versions::new(store);
        let reached = Reached::load(versions.store())?;
        let namespace = Namespace::open(Box::new(VersionedStore(versions.clone())))?;
        if namespace.applied() != log_index_of(reached.applied) {
            return Err(StateError::Unusable(format!(
                "namespace applied {} and log record {} disagree",
                namespace.applied(),
                log_index_of(reached.applied)
            )));
        }
        Ok(State { number, versions, namespace, reached })
    }

    /// A new state, empty or filled from `snapshot`, durable but not yet the one that counts.
    /// Nothing of it is left when this fails.
    pub fn build(&self, snapshot: Option<&File>) -> Result<State, StateError> {
        let number = self.numbers()?.last().map_or(0, |last| last + 1);
        let path = self.store_path(number);
        let built = self.fill(number, &path, snapshot);
        if built.is_err()
            && let Err(error) = SledStore::wipe(&path)
        {
            warn!(path = %path.display(), %error, "an unfinished store stays until the next start");
        }
        built
    }

    fn fill(&self, number: u64, path: &Path, snapshot: Option<&File>) -> Result<State, StateError> {
        let (header, records) = if self.in_memory {
            let records = Records::in_memory();
            (unpack(snapshot, &records)?, records)
        } else {
            let store = SledStore::open(path, self.cache_bytes)?;
            (unpack(snapshot, &store)?, self.on_disk(store)?)
        };
        let state = Self::load(number, records)?;
        if let Some(header) = header {
            agrees(&state, &header)?;
        }
        state.versions.store().checkpoint()?;
        durable::sync_dir(&self.dir)?;
        Ok(state)
    }

    fn on_disk(&self, store: SledStore) -> Result<Records, StoreError> {
        Ok(Records::OnDisk(WriteBehind::new(store, self.health.clone())?))
    }

    /// Makes store `number` the one that counts, durably.
    pub fn point_to(&self, number: u64) -> io::Result<()> {
        durable::replace(&self.dir.join("current"), &codec::seal(VERSION, &number))
    }

    /// Marks a store as bad, so that it is rebuilt at the next start.
    pub fn poison(&self, number: u64, why: &str) -> io::Result<()> {
        durable::replace(&self.poison_path(number), why.as_bytes())
    }

    /// Removes every store but `kept`, with its marks.
    pub fn remove_others(&self, kept: u64) -> io::Result<()> {
        for number in self.numbers()? {
            if number != kept {
                SledStore::wipe(&self.store_path(number))?;
                durable::remove_file(&self.poison_path(number))?;
            }
        }
        Ok(())
    }

    /// Numbers of all stores, ascending, also of those of which only the mark is left: a number
    /// is never used twice.
    fn numbers(&self) -> io::Result<Vec<u64>> {
        let mut numbers = Vec::new();
        for file in fs::read_dir(&self.dir)? {
            let name = file?.file_name();
            let number: Option<u64> =
                name.to_str().and_then(|name| name.strip_prefix("store-")?.split('.').next()?.parse().ok());
            numbers.extend(number);
        }
        numbers.sort_unstable();
        numbers.dedup();
        Ok(numbers)
    }
}

/// Puts the records of `snapshot`, if there is one, into an empty store.
fn unpack(snapshot: Option<&File>, store: &dyn Store) -> Result<Option<Header>, StateError> {
    let Some(file) = snapshot else { return Ok(None) };
    let header = snapshot::read(file, |records| {
        Ok::<_, StateError>(store.write(records.into_iter().map(|(key, value)| (key, Some(value))).collect())?)
    })?;
    Ok(Some(header))
}

/// Reads every record, and compares the sum of all with the one kept by every change: also a
/// record that is missing, or is there in an older version, is found.
fn check_sum(namespace: &Namespace) -> Result<(), StateError> {
    if namespace.count_state_hash()? == namespace.state_hash() {
        Ok(())
    } else {
        Err(StateError::Unusable("its records and its state hash disagree".into()))
    }
}

/// Whether the records of a snapshot make the state its header speaks of.
fn agrees(state: &State, header: &Header) -> Result<(), StateError> {
    let meta = &header.meta;
    if state.namespace.applied() != header.applied
        || state.namespace.state_hash() != header.state_hash
        || state.reached.applied != meta.last_log_id
        || state.reached.membership != meta.last_membership
    {
        return Err(SnapshotError::Damaged("its records make another state than its header says".into()).into());
    }
    check_sum(&state.namespace)
}
