use std::{collections::BTreeSet, fs, io::Write};

use ctfs_meta::{About, Change, Command, NewContent, NewNode, Op};
use ctfs_types::{FileName, Ino, RequestId, Timestamp};
use openraft::{
    CommittedLeaderId, EntryPayload, Membership, RaftSnapshotBuilder,
    storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine},
    testing::{StoreBuilder, Suite},
};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::*;
use crate::raft_types::{Entries, RaftEntry, RaftLogId, RaftStorageError, TypeConfig};

/// Remembers what it was told.
struct Listener {
    applied: Mutex<Vec<(LogIndex, Vec<(u64, Change)>)>>,
    installed: Mutex<u32>,
    invalidated: watch::Sender<LogIndex>,
}

impl Listener {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            applied: Mutex::default(),
            installed: Mutex::default(),
            invalidated: watch::Sender::new(LogIndex(0)),
        })
    }
}

impl Observer for Listener {
    fn applied(&self, index: LogIndex, changes: Vec<(u64, Change)>) {
        self.applied.lock().push((index, changes));
    }

    fn happened(&self, _: &[Change]) {}

    fn installed_snapshot(&self) {
        *self.installed.lock() += 1;
    }

    fn invalidated(&self) -> watch::Receiver<LogIndex> {
        self.invalidated.subscribe()
    }
}

fn open(dir: &Path) -> Result<Storage, StorageError> {
    Storage::open(dir, &StorageSettings { cache_bytes: 4 << 20, ..StorageSettings::default() }, Listener::new())
}

fn id(index: u64) -> RaftLogId {
    RaftLogId::new(CommittedLeaderId::new(1, 1), index)
}

fn command(seq: u64, op: Op) -> Command {
    Command { request: RequestId { client: 1, seq }, answered: 0, at: Timestamp::default(), about: About::Ahead, op }
}

fn make(seq: u64, name: &str) -> Command {
    let node = NewNode { content: NewContent::File, mode: 0o644, umask: 0, uid: 0, gid: 0, exclusive: true, holder: None, ino: None, cell: None };
    command(seq, Op::Make { parent: Ino::ROOT, name: FileName::new(name.as_bytes()).unwrap(), node })
}

/// Entry 0 is a membership, as openraft makes it; the others make one file each, and drop some.
fn entry(index: u64) -> RaftEntry {
    let payload = if index == 0 {
        EntryPayload::Membership(Membership::new(vec![BTreeSet::from([1])], ()))
    } else if index.is_multiple_of(5) {
        let name = FileName::new(format!("file-{}", index - 2).as_bytes()).unwrap();
        EntryPayload::Normal(Entries { commands: vec![command(index, Op::Unlink { parent: Ino::ROOT, name })] })
    } else {
        EntryPayload::Normal(Entries { commands: vec![make(index, &format!("file-{index}"))] })
    };
    RaftEntry { log_id: id(index), payload }
}

/// Appends and applies, as a committed entry of a running server.
async fn commit(storage: &mut Storage, indexes: std::ops::Range<u64>) {
    let entries: Vec<_> = indexes.map(entry).collect();
    storage.log.blocking_append(entries.clone()).await.unwrap();
    for (verdicts, entry) in storage.machine.apply(entries).await.unwrap().iter().zip(1..) {
        assert!(verdicts.0.iter().all(Result::is_ok), "verdicts {verdicts:?} of the {entry}th entry");
    }
}

/// Applies from the log what the state lacks, as openraft does at start.
async fn catch_up(storage: &mut Storage) {
    use openraft::RaftLogReader;
    let applied = storage.machine.applied_state().await.unwrap().0;
    let next = applied.map_or(0, |id| id.index + 1);
    let entries = storage.log.try_get_log_entries(next..).await.unwrap();
    assert!(entries.first().is_none_or(|first| first.log_id.index == next));
    storage.machine.apply(entries).await.unwrap();
}

fn state(storage: &Storage) -> (LogIndex, [u8; 16]) {
    let namespace = storage.replica.read();
    (namespace.applied(), namespace.state_hash())
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test)
}

fn current_store(dir: &Path) -> PathBuf {
    let mut stores: Vec<_> = fs::read_dir(dir.join("state")).unwrap().map(|file| file.unwrap().path()).collect();
    stores.retain(|path| path.is_dir());
    assert_eq!(stores.len(), 1, "{stores:?}");
    stores.remove(0)
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, StateMachine), RaftStorageError> {
        let dir = tempfile::tempdir().unwrap();
        let storage = open(dir.path()).unwrap();
        Ok((dir, storage.log, storage.machine))
    }
}

#[test]
fn the_storage_passes_the_suite_of_openraft() {
    Suite::test_all(Builder).unwrap();
}

#[test]
fn a_restart_goes_on_where_the_server_stopped() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..30).await;
        let before = state(&storage);
        assert_eq!(before.0, LogIndex(30));
        drop(storage);
        let mut storage = open(dir.path()).unwrap();
        catch_up(&mut storage).await;
        assert_eq!(state(&storage), before);
        let (applied, membership) = storage.machine.applied_state().await.unwrap();
        assert_eq!(applied, Some(id(29)));
        assert_eq!(*membership.log_id(), Some(id(0)));
    });
}

#[test]
fn the_observer_hears_of_every_entry_in_order_and_outside_the_lock() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::new();
        let mut storage = Storage::open(dir.path(), &StorageSettings::default(), listener.clone()).unwrap();
        commit(&mut storage, 0..3).await;
        let heard = listener.applied.lock();
        assert_eq!(heard.iter().map(|(index, _)| index.0).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(heard[0].1.is_empty());
        assert!(heard[1].1.contains(&(1, Change::Entry { parent: Ino::ROOT, name: FileName::new(b"file-1").unwrap() })));
    });
}

#[test]
fn a_snapshot_taken_while_writes_go_on_is_the_state_at_its_index() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..400).await;
        let at_start = state(&storage);
        let mut builder = storage.machine.get_snapshot_builder().await;
        let building = tokio::spawn(async move { builder.build_snapshot().await.unwrap() });
        for index in 400..600 {
            commit(&mut storage, index..index + 1).await;
        }
        let snapshot = building.await.unwrap();
        let at = snapshot.meta.last_log_id.unwrap().index;
        assert!(at >= 399);

        // The other server gets exactly the state that this one had at that index.
        let other = tempfile::tempdir().unwrap();
        let mut replayed = open(other.path()).unwrap();
        commit(&mut replayed, 0..at + 1).await;
        if at == 399 {
            assert_eq!(state(&replayed), at_start);
        }
        let third = tempfile::tempdir().unwrap();
        let listener = Listener::new();
        let mut installed = Storage::open(third.path(), &StorageSettings::default(), listener.clone()).unwrap();
        let before_install = installed.replica.clone();
        installed.machine.install_snapshot(&snapshot.meta, snapshot.snapshot).await.unwrap();
        assert_eq!(state(&installed), state(&replayed));
        assert_eq!(before_install.read().applied(), LogIndex(at + 1), "everybody's handle sees the new state");
        assert_eq!(*listener.installed.lock(), 1);

        // And goes on from there, also after a restart.
        installed.log.purge(id(at)).await.unwrap();
        commit(&mut installed, at + 1..600).await;
        assert_eq!(state(&installed), state(&storage));
        drop((installed, before_install));
        let mut installed = open(third.path()).unwrap();
        catch_up(&mut installed).await;
        assert_eq!(state(&installed), state(&storage));
    });
}

#[test]
fn a_snapshot_waits_for_room_on_a_full_disk() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..30).await;
        storage.health.pretend_free(Some(0));
        let mut builder = storage.machine.get_snapshot_builder().await;
        let mut building = Box::pin(builder.build_snapshot());
        for _ in 0..20 {
            assert!(futures_util::poll!(&mut building).is_pending());
            // Time enough for it to begin, were it not waiting.
            storage.machine.applied_state().await.unwrap();
        }
        assert!(!dir.path().join("snapshots/current.snap").exists());
        storage.health.pretend_free(None);
        assert_eq!(building.await.unwrap().meta.last_log_id, Some(id(29)));
    });
}

#[test]
fn a_snapshot_with_a_flipped_bit_is_refused_and_the_live_state_stays() {
    run(async {
        let source_dir = tempfile::tempdir().unwrap();
        let mut source = open(source_dir.path()).unwrap();
        commit(&mut source, 0..50).await;
        let snapshot = source.machine.build_snapshot().await.unwrap();
        let good = fs::read(source_dir.path().join("snapshots/current.snap")).unwrap();

        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..10).await;
        let before = state(&storage);
        for at in [0, 40, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 4;
            let file = storage.machine.begin_receiving_snapshot().await.unwrap();
            let mut file = file.into_std().await;
            file.write_all(&bad).unwrap();
            let received = Box::new(tokio::fs::File::from_std(file));
            assert!(storage.machine.install_snapshot(&snapshot.meta, received).await.is_err(), "byte {at}");
            assert_eq!(state(&storage), before);
        }
        commit(&mut storage, 10..12).await;
        drop(storage);
        let mut storage = open(dir.path()).unwrap();
        catch_up(&mut storage).await;
        assert_eq!(state(&storage).0, LogIndex(12));
        assert!(storage.machine.get_current_snapshot().await.unwrap().is_none());
    });
}

#[test]
fn a_store_thrown_away_is_rebuilt_from_snapshot_and_log_to_the_same_state() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..60).await;
        storage.machine.build_snapshot().await.unwrap();
        storage.log.purge(id(50)).await.unwrap();
        commit(&mut storage, 60..80).await;
        let before = state(&storage);
        drop(storage);

        let damages: [(&str, fn(&Path)); 4] = [
            ("removed", |store| fs::remove_dir_all(store).unwrap()),
            ("overwritten", |store| fs::write(store.join("db"), vec![0x5a; 100_000]).unwrap()),
            ("without records", |store| fs::remove_file(store.join("db")).unwrap()),
            ("marked bad", |store| fs::write(store.with_extension("poisoned"), "test").unwrap()),
        ];
        for (what, damage) in damages {
            damage(&current_store(dir.path()));
            let mut storage = open(dir.path()).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(state(&storage).0 >= LogIndex(60), "{what}");
            catch_up(&mut storage).await;
            assert_eq!(state(&storage), before, "{what}");
        }
    });
}

#[test]
fn a_record_that_does_not_check_stops_the_replica_and_is_rebuilt_at_the_next_start() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..20).await;
        let before = state(&storage);
        drop(storage);

        // Not noticed at start, as in a store too large to be read as a whole.
        let settings = StorageSettings { verify_bytes_max: 0, ..StorageSettings::default() };
        let damaged = flip_every_record_but_ours(&current_store(dir.path()));
        assert!(damaged > 10);
        let mut storage = match Storage::open(dir.path(), &settings, Listener::new()) {
            Ok(storage) => storage,
            // Some record was needed for opening; then it is thrown away already.
            Err(error) => panic!("a damaged store must not keep the server from starting: {error}"),
        };
        if state(&storage).0 == LogIndex(20) {
            let more = vec![entry(21)];
            assert!(storage.machine.apply(more.clone()).await.is_err());
            assert!(storage.machine.apply(more).await.is_err(), "for good");
            drop(storage);
            storage = Storage::open(dir.path(), &settings, Listener::new()).unwrap();
        }
        catch_up(&mut storage).await;
        assert_eq!(state(&storage), before);
    });
}

fn flip_every_record_but_ours(store: &Path) -> usize {
    let store = crate::sled_store::SledStore::open(store, 1 << 20).unwrap();
    let mut damaged = 0;
    for record in store.raw().iter() {
        let (key, value) = record.unwrap();
        if key[0] != 0xff {
            let mut value = value.to_vec();
            value[0] ^= 1;
            store.raw().insert(key, value).unwrap();
            damaged += 1;
        }
    }
    store.checkpoint().unwrap();
    damaged
}

#[test]
fn a_record_that_went_missing_is_noticed_at_start() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..20).await;
        let before = state(&storage);
        drop(storage);
        let store = crate::sled_store::SledStore::open(&current_store(dir.path()), 1 << 20).unwrap();
        let (key, _) = store.raw().iter().rev().map(Result::unwrap).find(|(key, _)| key[0] == 2).unwrap();
        store.raw().remove(key).unwrap();
        store.checkpoint().unwrap();
        drop(store);
        let mut storage = open(dir.path()).unwrap();
        assert_eq!(state(&storage).0, LogIndex(0), "thrown away");
        catch_up(&mut storage).await;
        assert_eq!(state(&storage), before);
    });
}

#[test]
fn a_server_whose_log_does_not_reach_back_to_its_state_must_be_added_again() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..30).await;
        storage.machine.build_snapshot().await.unwrap();
        storage.log.purge(id(25)).await.unwrap();
        drop(storage);
        fs::remove_dir_all(current_store(dir.path())).unwrap();
        fs::remove_file(dir.path().join("snapshots/current.snap")).unwrap();
        let opened = open(dir.path());
        assert!(matches!(opened, Err(StorageError::MustBeReadded { begins_after: LogIndex(26), reached: LogIndex(0) })));
    });
}

#[test]
fn an_installation_that_a_crash_interrupted_is_finished_at_the_next_start() {
    run(async {
        let source_dir = tempfile::tempdir().unwrap();
        let mut source = open(source_dir.path()).unwrap();
        commit(&mut source, 0..50).await;
        source.machine.build_snapshot().await.unwrap();

        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..10).await;
        drop(storage);
        // The file has its name, the new store does not count yet.
        fs::copy(source_dir.path().join("snapshots/current.snap"), dir.path().join("snapshots/current.snap")).unwrap();
        let storage = open(dir.path()).unwrap();
        assert_eq!(state(&storage), state(&source));
    });
}

#[test]
fn a_server_killed_between_the_purge_and_the_installation_of_a_snapshot_starts_again() {
    run(async {
        // A new server, and one that was far behind: openraft purges before the snapshot is there.
        for had in [0, 10] {
            let dir = tempfile::tempdir().unwrap();
            let mut storage = open(dir.path()).unwrap();
            commit(&mut storage, 0..had).await;
            storage.log.purge(id(399)).await.unwrap();
            drop(storage);
            let mut storage = open(dir.path()).unwrap();
            catch_up(&mut storage).await;
            assert_eq!(state(&storage).0, LogIndex(had));
        }
    });
}

#[test]
fn a_server_killed_between_the_installation_of_a_snapshot_and_the_purge_goes_on_behind_it() {
    run(async {
        let source_dir = tempfile::tempdir().unwrap();
        let mut source = open(source_dir.path()).unwrap();
        commit(&mut source, 0..50).await;
        let snapshot = source.machine.build_snapshot().await.unwrap();
        let other_term = |index| RaftEntry { log_id: RaftLogId::new(CommittedLeaderId::new(3, 1), index), ..entry(index) };

        // The log is shorter, as long, longer, and ends in what a leader of a later term left
        // uncommitted.
        let logs = [(0..10, 10..10), (0..50, 50..50), (0..60, 60..60), (0..10, 10..12), (0..10, 10..80)];
        for (ours, theirs) in logs {
            let dir = tempfile::tempdir().unwrap();
            let mut storage = open(dir.path()).unwrap();
            storage.log.blocking_append(ours.clone().map(entry)).await.unwrap();
            storage.log.blocking_append(theirs.clone().map(other_term)).await.unwrap();
            fs::copy(source_dir.path().join("snapshots/current.snap"), dir.path().join("snapshots/current.snap")).unwrap();
            drop(storage);

            let mut storage = open(dir.path()).unwrap();
            assert_eq!(state(&storage), state(&source), "{ours:?} {theirs:?}");
            let next = storage.log.get_log_state().await.unwrap().last_log_id.unwrap();
            assert_eq!(next, id(ours.end.max(50) - 1), "{ours:?} {theirs:?}");
            commit_from(&mut storage, next.index + 1, 100).await;
            drop(storage);
            let mut storage = open(dir.path()).unwrap();
            catch_up(&mut storage).await;
            assert_eq!(state(&storage).0, LogIndex(100));
        }
        drop(snapshot);
    });
}

/// Applies what the log has, then appends and applies up to `end`.
async fn commit_from(storage: &mut Storage, next: u64, end: u64) {
    catch_up(storage).await;
    commit(storage, next..end).await;
}

#[test]
fn a_damaged_snapshot_is_set_aside_and_a_good_state_goes_on() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = open(dir.path()).unwrap();
        commit(&mut storage, 0..30).await;
        storage.machine.build_snapshot().await.unwrap();
        storage.log.purge(id(20)).await.unwrap();
        let before = state(&storage);
        drop(storage);
        let path = dir.path().join("snapshots/current.snap");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        let mut storage = open(dir.path()).unwrap();
        assert_eq!(state(&storage), before);
        assert!(storage.machine.get_current_snapshot().await.unwrap().is_none());
        assert!(dir.path().join("snapshots/damaged.snap").exists());
    });
}

#[test]
fn a_second_process_does_not_get_the_store_and_does_not_throw_it_away() {
    let dir = tempfile::tempdir().unwrap();
    let storage = open(dir.path()).unwrap();
    assert!(matches!(open(dir.path()), Err(StorageError::Locked { .. })));
    assert!(storage.replica.read().store().get(b"none").unwrap().is_none());
}
