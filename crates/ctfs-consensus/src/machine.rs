//! Entries into state: openraft's view of the replica.
//!
//! One entry is one [`Stage::apply`] and one batch of the store, which also records how far
//! the log was applied. Its changes go to the [`Observer`] after the replica's lock is dropped.
//! A store that fails or turns out damaged ends the server's service: the state is marked bad and
//! is rebuilt from snapshot and log at the next start.
//!
//! [`Stage::apply`]: ctfs_meta::Stage::apply

use std::{fmt, fs::File, sync::Arc, time::Duration};

use ctfs_meta::{Command, SharedNamespace, StoreError};
use openraft::{
    AnyError, EntryPayload, OptionalSend, RaftSnapshotBuilder, Snapshot, StorageIOError, storage::RaftStateMachine,
};
use parking_lot::Mutex;
use tracing::{error, info, warn};

use crate::{
    health::{Health, Space, is_full},
    log::Coverage,
    observer::Observer,
    raft_types::{
        RaftEntry, RaftLogId, RaftMembership, RaftSnapshotMeta, RaftStorageError, TypeConfig, Verdicts, log_index,
    },
    snapshot::{self, Header, SLICE_BYTES, SLICE_RECORDS, SnapshotDir, SnapshotError, Writer},
    state_dir::{Reached, State, StateDir, StateError},
    unseen::Unseen,
    versioned::Versions,
};

/// The replica as openraft drives it. Clones are the same replica.
#[derive(Clone)]
pub struct StateMachine {
    inner: Arc<Inner>,
}

impl fmt::Debug for StateMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateMachine").field("applied", &self.inner.live.lock().reached.applied).finish_non_exhaustive()
    }
}

struct Inner {
    replica: SharedNamespace,
    /// What of the replica may not be shown yet.
    unseen: Arc<Unseen>,
    observer: Arc<dyn Observer>,
    states: StateDir,
    snapshots: SnapshotDir,
    /// Told of every snapshot that is durable.
    coverage: Coverage,
    health: Health,
    live: Mutex<Live>,
    /// Held while a snapshot is built: there is one cursor at a time.
    building: Mutex<()>,
    /// Where the current snapshot file stands; held while it is replaced.
    current: Mutex<Option<RaftLogId>>,
    /// Why the replica stands still since the store failed.
    failed: Mutex<Option<String>>,
}

/// The store below the replica.
struct Live {
    number: u64,
    versions: Arc<Versions>,
    reached: Reached,
}

/// What can go wrong below a call of openraft.
#[derive(Debug, thiserror::Error)]
enum MachineError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("entry {index} was applied already, the state is at {applied:?}")]
    NotNext { index: u64, applied: Option<RaftLogId> },
    #[error("the replica stands still since its store failed: {0}")]
    Failed(String),
    #[error("task broke down: {0}")]
    Panic(String),
}

impl MachineError {
    /// Whether it may be tried again when there is room.
    fn is_full(&self) -> bool {
        matches!(self, Self::Snapshot(SnapshotError::Io(error)) if is_full(error))
    }
}

/// What a snapshot takes while it is unpacked beside the old state, in sizes of its file.
const UNPACKED: u64 = 4;
/// And what it takes at least.
const SNAPSHOT_ROOM: u64 = 16 << 20;
/// One that found no room is tried again after this long.
const SNAPSHOT_PAUSE: Duration = Duration::from_secs(10);

impl StateMachine {
    pub(crate) fn new(
        state: State,
        states: StateDir,
        snapshots: SnapshotDir,
        snapshot_at: Option<RaftLogId>,
        coverage: Coverage,
        health: Health,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let State { number, versions, namespace, reached } = state;
        let inner = Inner {
            unseen: Arc::new(Unseen::starting_at(namespace.applied())),
            replica: Arc::new(parking_lot::RwLock::new(namespace)),
            observer,
            states,
            snapshots,
            coverage,
            health,
            live: Mutex::new(Live { number, versions, reached }),
            building: Mutex::new(()),
            current: Mutex::new(snapshot_at),
            failed: Mutex::new(None),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The replica, to be read by everybody and written by this machine alone.
    pub fn replica(&self) -> SharedNamespace {
        self.inner.replica.clone()
    }

    pub(crate) fn unseen(&self) -> Arc<Unseen> {
        self.inner.unseen.clone()
    }

    /// Makes the state as it is now durable, which bounds how much log a restart applies again.
    /// Blocks for the disk.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        let versions = self.inner.live.lock().versions.clone();
        versions.store().checkpoint()
    }

    /// Marks the store to be rebuilt if it was the one that failed. Blocks for the disk.
    pub(crate) fn poison_failed_store(&self) {
        let failed = self.inner.live.lock().versions.store().failed();
        if let Some(why) = failed {
            self.inner.fail(&why.to_string());
        }
    }

    /// Runs `step` on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        step: impl FnOnce(&Inner) -> Result<T, MachineError> + Send + 'static,
    ) -> Result<T, MachineError> {
        let inner = self.inner.clone();
        match ctfs_host::blocking(move || step(&inner)).await {
            Ok(result) => {
                if let Err(MachineError::Store(why)) = &result {
                    self.inner.fail(&why.to_string());
                }
                result
            }
            Err(stopped) if !stopped.is_panic() => Err(MachineError::Failed("the server is stopping".into())),
            Err(broken) => {
                // A broken invariant inside the state machine: the state in memory is in doubt.
                let why = broken.to_string();
                self.inner.fail(&why);
                Err(MachineError::Panic(why))
            }
        }
    }
}

impl Inner {
    fn check(&self) -> Result<(), MachineError> {
        match &*self.failed.lock() {
            Some(why) => Err(MachineError::Failed(why.clone())),
            None => Ok(()),
        }
    }

    /// Stops the replica for good and marks its store, so that the next start rebuilds it.
    fn fail(&self, why: &str) {
        let number = self.live.lock().number;
        error!(number, why, "the metadata store failed; it will be rebuilt at the next start");
        *self.failed.lock() = Some(why.to_owned());
        self.health.fail(&format!("the metadata store failed: {why}"));
        if let Err(error) = self.states.poison(number, why) {
            error!(%error, "the failed metadata store could not be marked");
        }
    }

    fn apply(&self, entry: RaftEntry) -> Result<Verdicts, MachineError> {
        let id = entry.log_id;
        let index = log_index(id.index);
        let (commands, membership): (Vec<Command>, _) = match entry.payload {
            EntryPayload::Blank => (Vec::new(), None),
            EntryPayload::Normal(entries) => (entries.commands, None),
            EntryPayload::Membership(membership) => (Vec::new(), Some(RaftMembership::new(Some(id), membership))),
        };
        let extra = Reached::records(id, membership.as_ref());
        let stage = self.replica.read().stage();
        if index <= stage.applied() {
            let applied = self.live.lock().reached.applied;
            return Err(MachineError::NotNext { index: id.index, applied });
        }
        // Programs go on meanwhile: openraft has one entry applied at a time, and no snapshot installed beside it.
        let staged = stage.apply(index, &commands, extra)?;
        let applied = {
            let mut namespace = self.replica.write();
            let applied = namespace.commit(staged)?;
            // Before anybody can read it.
            self.unseen.applied(index, applied.changes.iter().map(|(_, change)| change));
            applied
        };
        if !applied.diverged.is_empty() {
            error!(%index, requests = ?applied.diverged, "the log made something else of what had happened here");
        }
        {
            let mut live = self.live.lock();
            live.reached.applied = Some(id);
            if let Some(membership) = membership {
                live.reached.membership = membership;
            }
        }
        self.observer.applied(index, applied.changes);
        Ok(Verdicts(applied.verdicts))
    }

    /// Writes the state of this moment into a file, while entries go on being applied.
    fn build(&self) -> Result<(RaftSnapshotMeta, File), MachineError> {
        let _one_at_a_time = self.building.lock();
        self.check()?;
        let (versions, mut cursor, header) = {
            // The read lock keeps appliers out until the cursor stands.
            let namespace = self.replica.read();
            let versions = self.live.lock().versions.clone();
            let cursor = versions.cursor().expect("the lock above admits one builder");
            let reached = Reached::load(versions.store())?;
            let meta = RaftSnapshotMeta {
                last_log_id: reached.applied,
                last_membership: reached.membership,
                snapshot_id: snapshot_id(reached.applied),
            };
            let header = Header { meta, applied: namespace.applied(), state_hash: namespace.state_hash() };
            (versions, cursor, header)
        };

        let (path, file) = self.snapshots.create()?;
        let written = (|| -> Result<File, MachineError> {
            let mut writer = Writer::new(file, &header)?;
            loop {
                let records = cursor.next(SLICE_RECORDS, SLICE_BYTES)?;
                if records.is_empty() {
                    return Ok(writer.finish()?);
                }
                if self.health.space() == Space::Full {
                    return Err(SnapshotError::Io(rustix::io::Errno::NOSPC.into()).into());
                }
                writer.records(&records)?;
            }
        })();
        drop(cursor);
        if written.is_err() {
            self.snapshots.discard(&path);
        }
        let file = written?;

        let mut current = self.current.lock();
        if *current > header.meta.last_log_id {
            // A newer one was installed meanwhile. Ours stays readable through its descriptor.
            self.snapshots.discard(&path);
        } else {
            self.snapshots.adopt(&path)?;
            *current = header.meta.last_log_id;
        }
        drop(current);
        // openraft purges the log behind a snapshot: from here on the store, too, must reach it.
        versions.store().checkpoint()?;
        self.cover(header.meta.last_log_id);
        info!(at = ?header.meta.last_log_id, "snapshot built");
        Ok((header.meta, rewound(file)?))
    }

    fn install(&self, meta: &RaftSnapshotMeta, file: &File) -> Result<(), MachineError> {
        self.check()?;
        // Everything is verified, and loaded beside the live state, before that is touched.
        let header = snapshot::verify(file)?;
        if header.meta != *meta {
            return Err(SnapshotError::Damaged(format!("it is {}, expected {meta}", header.meta)).into());
        }
        let state = self.states.build(Some(file))?;
        let path = match self.snapshots.path_of(file)? {
            Some(path) => {
                file.sync_all().map_err(SnapshotError::from)?;
                path
            }
            None => self.snapshots.copy_in(file)?,
        };
        // The file first: from it the next start finishes what a crash interrupts here.
        {
            let mut current = self.current.lock();
            self.snapshots.adopt(&path)?;
            *current = meta.last_log_id;
        }
        self.cover(meta.last_log_id);
        self.states.point_to(state.number).map_err(StateError::from)?;

        let State { number, versions, namespace, reached } = state;
        let (old_namespace, old) = {
            let mut replica = self.replica.write();
            self.unseen.replaced(namespace.applied());
            let mut old_namespace = std::mem::replace(&mut *replica, namespace);
            let lost = replica.take_ahead_of(&mut old_namespace)?;
            if !lost.is_empty() {
                error!(requests = ?lost, "what had happened here is not possible any more");
            }
            let mut live = self.live.lock();
            (old_namespace, std::mem::replace(&mut *live, Live { number, versions, reached }))
        };
        drop(old_namespace);
        drop(old);
        // A snapshot being built may still read the old store through its descriptors, so its
        // directory goes at once only when nobody does.
        if let Some(_nobody_builds) = self.building.try_lock()
            && let Err(error) = self.states.remove_others(number)
        {
            warn!(%error, "an old metadata store stays until the next start");
        }
        info!(at = ?meta.last_log_id, "snapshot installed");
        self.observer.installed_snapshot();
        Ok(())
    }

    fn current_bytes(&self) -> u64 {
        let file = self.snapshots.current().ok().flatten();
        file.and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len())
    }

    fn cover(&self, upto: Option<RaftLogId>) {
        if let Some(upto) = upto {
            self.coverage.reached(upto);
        }
    }

    fn current_snapshot(&self) -> Result<Option<(RaftSnapshotMeta, File)>, MachineError> {
        let Some(file) = self.snapshots.current()? else { return Ok(None) };
        let header = snapshot::read_header(&file)?;
        Ok(Some((header.meta, rewound(file)?)))
    }
}

/// Ids must differ between any two files, also of one index: receivers join pieces by them.
fn snapshot_id(at: Option<RaftLogId>) -> String {
    match at {
        Some(id) => format!("{}-{}-{:08x}", id.leader_id.term, id.index, rand::random::<u32>()),
        None => format!("empty-{:08x}", rand::random::<u32>()),
    }
}

fn rewound(mut file: File) -> Result<File, SnapshotError> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<RaftLogId>, RaftMembership), RaftStorageError> {
        let live = self.inner.live.lock();
        Ok((live.reached.applied, live.reached.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Verdicts>, RaftStorageError>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<RaftEntry> = entries.into_iter().collect();
        let Some(first) = entries.first().map(|entry| entry.log_id) else { return Ok(Vec::new()) };
        self.blocking(move |inner| {
            inner.check()?;
            entries.into_iter().map(|entry| inner.apply(entry)).collect()
        })
        .await
        .map_err(|error| StorageIOError::apply(first, AnyError::new(&error)).into())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<tokio::fs::File>, RaftStorageError> {
        let (_, file) = self
            .blocking(|inner| Ok(inner.snapshots.create()?))
            .await
            .map_err(|error| StorageIOError::write_snapshot(None, AnyError::new(&error)))?;
        Ok(Box::new(tokio::fs::File::from_std(file)))
    }

    async fn install_snapshot(
        &mut self,
        meta: &RaftSnapshotMeta,
        snapshot: Box<tokio::fs::File>,
    ) -> Result<(), RaftStorageError> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            StorageIOError::write_snapshot(Some(meta.signature()), AnyError::from_dyn(error, None))
        };
        let mut snapshot = *snapshot;
        // Its last write may still be under way, and its error unheard.
        tokio::io::AsyncWriteExt::flush(&mut snapshot).await.map_err(|error| failed(&error))?;
        let file = snapshot.into_std().await;
        let bytes = file.metadata().map_err(|error| failed(&error))?.len();
        self.inner.health.await_room_for(bytes.saturating_mul(UNPACKED) + SNAPSHOT_ROOM, "install a snapshot").await;
        let wanted = meta.clone();
        let installed = self.blocking(move |inner| inner.install(&wanted, &file)).await;
        if let Err(error) = &installed {
            self.inner.coverage.failed(&error.to_string());
        }
        Ok(installed.map_err(|error| failed(&error))?)
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, RaftStorageError> {
        let current = self
            .blocking(|inner| inner.current_snapshot())
            .await
            .map_err(|error| StorageIOError::read_snapshot(None, AnyError::new(&error)))?;
        Ok(current.map(|(meta, file)| Snapshot { meta, snapshot: Box::new(tokio::fs::File::from_std(file)) }))
    }
}

impl RaftSnapshotBuilder<TypeConfig> for StateMachine {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, RaftStorageError> {
        // Of about the size of the one before. openraft would end for want of room; it waits instead.
        let before = self.blocking(|inner| Ok(inner.current_bytes())).await.unwrap_or(0);
        let built = loop {
            self.inner.health.await_room_for(before + SNAPSHOT_ROOM, "build a snapshot").await;
            match self.blocking(|inner| inner.build()).await {
                Err(error) if error.is_full() && !self.inner.health.stopping() => {
                    warn!(%error, "no room for a snapshot; it is tried again");
                    tokio::time::sleep(SNAPSHOT_PAUSE).await;
                }
                built => break built,
            }
        };
        let (meta, file) = built.map_err(|error| StorageIOError::write_snapshot(None, AnyError::new(&error)))?;
        Ok(Snapshot { meta, snapshot: Box::new(tokio::fs::File::from_std(file)) })
    }
}
