//! Opening everything a server keeps, and rebuilding what does not check.
//!
//! The truth is the log and the snapshot file. The materialised state is a convenience: one that
//! does not open, does not check or is marked bad is thrown away, and made again from the
//! snapshot; openraft then applies the log from there.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use ctfs_meta::{SharedNamespace, StoreError};
use ctfs_types::LogIndex;
use tracing::{error, info, warn};

use crate::{
    health::Health,
    log::{LogError, LogSettings, LogStore, Recovered},
    machine::StateMachine,
    observer::Observer,
    raft_types::{log_index, log_index_of},
    sled_store::OpenError,
    snapshot::{self, Header, SnapshotDir, SnapshotError},
    state_dir::{State, StateDir, StateError},
};

/// How large the store's parts are.
#[derive(Debug, Clone)]
pub struct StorageSettings {
    pub log: LogSettings,
    /// Pages of the materialised state kept in memory. sled takes about twice this; with 64 MiB an
    /// idle server of 100,000 files took 187 MiB, and the aim is under 150.
    pub cache_bytes: u64,
    /// A state and a snapshot up to this size are read and checked as a whole at start; of larger
    /// ones every record is checked when it is read. A gibibyte takes a few seconds.
    pub verify_bytes_max: u64,
    /// Keeps the state in memory alone and makes it again at each start, from snapshot and log; for the
    /// simulation.
    pub state_in_memory: bool,
}

impl Default for StorageSettings {
    fn default() -> Self {
        Self { log: LogSettings::default(), cache_bytes: 32 << 20, verify_bytes_max: 1 << 30, state_in_memory: false }
    }
}

/// Why a server cannot start from what is on its disk.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("metadata store {dir} is open in another process")]
    Locked { dir: PathBuf },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("{doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("metadata state: {0}")]
    State(String),
    /// The log begins behind what state and snapshot reach: what lies between is gone here. The
    /// other servers have it; this one must be removed and added again.
    #[error("the log begins after entry {begins_after}, the state ends at {reached}: remove this server and add it again")]
    MustBeReadded { begins_after: LogIndex, reached: LogIndex },
}

impl From<StateError> for StorageError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Open(OpenError::Locked { dir }) => Self::Locked { dir },
            StateError::Open(OpenError::Unusable(error)) | StateError::Store(error) => Self::Store(error),
            StateError::Snapshot(error) => Self::Snapshot(error),
            StateError::Io(source) => Self::State(source.to_string()),
            StateError::Unusable(why) => Self::State(why),
        }
    }
}

/// What openraft and the rest of the server stand on.
pub struct Storage {
    pub log: LogStore,
    pub machine: StateMachine,
    pub replica: SharedNamespace,
    pub health: Health,
}

impl Storage {
    /// Opens the storage in `dir`, making an empty one where there is none. Blocks for the disk.
    /// Two processes must not have one directory: the caller holds the lock for that.
    ///
    /// # Errors
    /// - [`LogError::LogDamaged`]: an acknowledged entry is not readable.
    /// - [`StorageError::MustBeReadded`]: what was lost cannot be rebuilt here.
    pub fn open(dir: &Path, settings: &StorageSettings, observer: Arc<dyn Observer>) -> Result<Self, StorageError> {
        let mut log = Recovered::read(&dir.join("log"))?;
        let snapshots = SnapshotDir::open(&dir.join("snapshots"))?;
        let state_path = dir.join("state");
        let health = Health::new(dir);
        let states = StateDir::open(&state_path, settings, health.clone())
            .map_err(|source| StorageError::Io { doing: "open state directory", path: state_path, source })?;

        let state = open_state(&states, &snapshots, settings)?;
        states.remove_others(state.number).map_err(StateError::from)?;
        let snapshot_at = match snapshots.current()? {
            Some(file) => snapshot::read_header(&file)?.meta.last_log_id,
            None => None,
        };

        let reached = log_index_of(state.reached.applied);
        let (purged, first) = log.begin();
        let begins_after = log_index_of(purged).max(LogIndex(first.map_or(0, |first| log_index(first).0 - 1)));
        if begins_after > reached {
            error!(%begins_after, %reached, "the log does not reach back to the state");
            return Err(StorageError::MustBeReadded { begins_after, reached });
        }
        // A crash came between a snapshot that was installed and the purge of the log it replaces.
        if let Some(applied) = state.reached.applied
            && !log.reaches(applied)
        {
            state.versions.store().checkpoint()?;
            log.begin_after(applied)?;
        }
        let log = LogStore::start(log, settings.log.clone(), health.clone())?;
        let coverage = log.coverage();
        if let Some(snapshot_at) = snapshot_at {
            coverage.reached(snapshot_at);
        }
        info!(%reached, dir = %dir.display(), "storage opened");
        let machine = StateMachine::new(state, states, snapshots, snapshot_at, coverage, health.clone(), observer);
        let replica = machine.replica();
        Ok(Self { log, machine, replica, health })
    }
}

/// The state to go on with: the one on disk if it is good and the snapshot is not ahead of it (a
/// crash while installing), else one from the snapshot, else an empty one.
fn open_state(states: &StateDir, snapshots: &SnapshotDir, settings: &StorageSettings) -> Result<State, StorageError> {
    let header = open_snapshot(snapshots, settings)?;
    let snapshot_at = header.as_ref().and_then(|header| header.meta.last_log_id);
    match states.current() {
        Ok(Some(state)) if state.reached.applied >= snapshot_at => return Ok(state),
        Ok(Some(_)) => warn!(?snapshot_at, "the snapshot is ahead of the metadata store"),
        Ok(None) => {}
        Err(error @ StateError::Open(OpenError::Locked { .. })) => return Err(error.into()),
        Err(why) => warn!(%why, "throwing the metadata store away; it is rebuilt"),
    }
    let snapshot = match &header {
        Some(_) => snapshots.current()?,
        None => None,
    };
    let state = match states.build(snapshot.as_ref()) {
        // Only the header of a large snapshot had been checked. Without it the old state, or the
        // log alone, must do.
        Err(StateError::Snapshot(why @ SnapshotError::Damaged(_))) => {
            warn!(%why, "the snapshot does not check");
            snapshots.set_aside()?;
            return open_state(states, snapshots, settings);
        }
        built => built?,
    };
    states.point_to(state.number).map_err(StateError::from)?;
    info!(reached = ?state.reached.applied, "metadata store built");
    Ok(state)
}

/// The header of the current snapshot; a damaged file is set aside and is as good as none.
fn open_snapshot(snapshots: &SnapshotDir, settings: &StorageSettings) -> Result<Option<Header>, StorageError> {
    let Some(file) = snapshots.current()? else { return Ok(None) };
    let bytes = file.metadata().map_err(SnapshotError::from)?.len();
    let checked = if bytes <= settings.verify_bytes_max { snapshot::verify(&file) } else { snapshot::read_header(&file) };
    match checked {
        Ok(header) => Ok(Some(header)),
        Err(SnapshotError::Damaged(why)) => {
            warn!(why, "the snapshot does not check");
            snapshots.set_aside()?;
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
