//! The journal with its thread: who waits, what fails, and what the next life finds.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use proptest::prelude::*;

use super::{check_records, disk::CrashDisk, id, payload, root};
use crate::{Journal, JournalError, OldLife, Position, RECORD_BYTES_MAX, Settings, SystemDisk, lives};

/// Long past anything that ends.
const PATIENCE: Duration = Duration::from_secs(60);
const NEVER: Duration = Duration::from_secs(3600);

fn settings() -> Settings {
    Settings { segment_bytes: 4096, bytes_max: 1 << 20, recent_bytes_max: 2000, sync_after: NEVER }
}

fn create(disk: &CrashDisk, settings: Settings) -> Result<Journal, JournalError> {
    Journal::create(Arc::new(disk.clone()), root(), id(1), settings)
}

fn append(journal: &Journal, count: u64) -> Position {
    for _ in 0..count {
        let next = journal.depth().appended.0 + 1;
        journal.append(payload(next)).unwrap();
    }
    journal.depth().appended
}

fn recover(disk: &CrashDisk) -> OldLife {
    OldLife::recover(Arc::new(disk.clone()), root(), id(1)).expect("a crash is no damage")
}

/// The last record that the next life finds, after checking all of them.
fn found(disk: &CrashDisk, trimmed: Position) -> Position {
    let old = recover(disk);
    assert!(old.kept_from() <= trimmed.next());
    let last = check_records(old.kept_from(), |from| old.read(from, 1000));
    assert_eq!(last, old.last());
    last
}

#[test]
fn what_was_reported_durable_is_what_the_next_life_reads_and_then_removes() {
    let disk = CrashDisk::new();
    let journal = create(&disk, settings()).unwrap();
    let last = append(&journal, 100);
    journal.durable_blocking(last, PATIENCE).unwrap();
    let crashed = disk.after_crash(0);
    assert_eq!(lives(&crashed, root(), id(1).cluster).unwrap(), vec![id(1)]);
    assert_eq!(found(&crashed, Position::NONE), last);
    recover(&crashed).remove().unwrap();
    assert_eq!(lives(&crashed.after_crash(1), root(), id(1).cluster).unwrap(), vec![]);
}

#[test]
fn a_life_has_one_journal() {
    let disk = CrashDisk::new();
    drop(create(&disk, settings()).unwrap());
    assert!(matches!(create(&disk, settings()), Err(JournalError::Exists(_))));
}

#[test]
fn records_are_read_in_order_from_memory_and_from_the_files() {
    let disk = CrashDisk::new();
    let journal = create(&disk, settings()).unwrap();
    let last = append(&journal, 200);
    journal.durable_blocking(last, PATIENCE).unwrap();
    // Only the newest are in memory.
    assert!(journal.read_recent(Position(1), 1000).unwrap().is_none());
    assert!(journal.read_recent(last, 1000).unwrap().is_some());
    assert_eq!(check_records(Position(1), |from| journal.read(from, 1000)), last);
    let one = journal.read(Position(1), 0).unwrap();
    assert_eq!(one.len(), 1, "at least one record, however little may be read");
}

#[test]
fn records_can_be_read_before_they_are_durable() {
    let disk = CrashDisk::new();
    let journal = create(&disk, settings()).unwrap();
    let last = append(&journal, 3);
    assert_eq!(check_records(Position(1), |from| journal.read(from, 1000)), last);
    assert_eq!(journal.depth().durable, Position::NONE);
}

#[test]
fn a_record_that_nobody_waits_for_is_synced_all_the_same() {
    let disk = CrashDisk::new();
    let journal = create(&disk, Settings { sync_after: Duration::from_millis(1), ..settings() }).unwrap();
    append(&journal, 1);
    while journal.depth().durable < Position(1) {
        thread::yield_now();
    }
}

#[test]
fn closing_makes_durable_what_was_appended_and_refuses_the_rest() {
    let disk = CrashDisk::new();
    let journal = create(&disk, settings()).unwrap();
    let last = append(&journal, 30);
    journal.close().unwrap();
    assert!(matches!(journal.append(payload(31)), Err(JournalError::Closed)));
    journal.durable_blocking(last, PATIENCE).unwrap();
    assert!(matches!(journal.durable_blocking(last.next(), PATIENCE), Err(JournalError::Closed)));
    assert_eq!(found(&disk.after_crash(0), Position::NONE), last);
}

#[test]
fn a_trimmed_record_is_read_no_more_and_its_room_is_free() {
    let disk = CrashDisk::new();
    let journal = create(&disk, settings()).unwrap();
    let last = append(&journal, 100);
    journal.durable_blocking(last, PATIENCE).unwrap();
    journal.trim(Position(60));
    assert!(matches!(journal.read(Position(60), 1000), Err(JournalError::Trimmed { upto: Position(60) })));
    assert_eq!(check_records(Position(61), |from| journal.read(from, 1000)), last);
    assert_eq!(journal.depth().records, 40);
    journal.trim(last);
    assert_eq!((journal.depth().records, journal.depth().bytes), (0, 0));
}

#[test]
fn writers_wait_for_room_until_records_are_both_durable_and_trimmed() {
    let disk = CrashDisk::new();
    let journal = create(&disk, Settings { bytes_max: 5000, ..settings() }).unwrap();
    while journal.depth().bytes < 5000 {
        append(&journal, 1);
    }
    let last = journal.depth().appended;
    assert!(matches!(journal.room_blocking(Duration::ZERO), Err(JournalError::TimedOut)));
    // Trimmed, but the thread has not been asked to make them durable.
    journal.trim(last);
    assert!(matches!(journal.room_blocking(Duration::ZERO), Err(JournalError::TimedOut)));
    let waiting = thread::scope(|scope| {
        let waiting = scope.spawn(|| journal.room_blocking(PATIENCE));
        journal.durable_blocking(last, PATIENCE).unwrap();
        waiting.join().unwrap()
    });
    waiting.unwrap();
}

#[test]
fn who_does_not_wait_for_room_is_refused_at_twice_the_limit() {
    let disk = CrashDisk::new();
    let journal = create(&disk, Settings { bytes_max: 5000, ..settings() }).unwrap();
    let refused = (1..).find_map(|at| journal.append(payload(at)).err()).unwrap();
    assert!(matches!(refused, JournalError::Full { bytes, limit: 10_000 } if bytes > 9000), "{refused}");
    let long = Bytes::from(vec![0; RECORD_BYTES_MAX + 1]);
    assert!(matches!(journal.append(long), Err(JournalError::TooLong { .. })));
}

#[test]
fn a_full_disk_is_waited_for_and_nothing_is_lost() {
    let disk = CrashDisk::new();
    let journal = create(&disk, settings()).unwrap();
    disk.set_full(true);
    let last = append(&journal, 100);
    while !journal.depth().waits_for_disk {
        thread::yield_now();
    }
    assert!(journal.depth().durable < last);
    disk.set_full(false);
    journal.durable_blocking(last, PATIENCE).unwrap();
    assert!(!journal.depth().waits_for_disk);
    assert_eq!(found(&disk.after_crash(0), Position::NONE), last);
}

#[tokio::test]
async fn the_asynchronous_waits_end_as_the_blocking_ones_do() {
    let disk = CrashDisk::new();
    let journal = create(&disk, Settings { bytes_max: 5000, ..settings() }).unwrap();
    while journal.depth().bytes < 5000 {
        append(&journal, 1);
    }
    let last = journal.depth().appended;
    let room = journal.room();
    journal.trim(last);
    let (durable, room) = tokio::join!(journal.durable(last), room);
    durable.unwrap();
    room.unwrap();
    journal.close().unwrap();
    assert!(matches!(journal.durable(last.next()).await, Err(JournalError::Closed)));
}

/// Two threads append and wait, and note what they were told is durable.
fn appenders(journal: &Journal, durable: &AtomicU64) {
    // Positions decide payloads, so only one at a time may choose one.
    let turn = parking_lot::Mutex::new(());
    thread::scope(|scope| {
        for pace in [1, 7] {
            let turn = &turn;
            scope.spawn(move || {
                for _ in 0..15 {
                    for _ in 0..pace {
                        let _turn = turn.lock();
                        if journal.append(payload(journal.depth().appended.0 + 1)).is_err() {
                            return;
                        }
                    }
                    let last = journal.depth().appended;
                    match journal.durable_blocking(last, PATIENCE) {
                        Ok(()) => drop(durable.fetch_max(last.0, Ordering::SeqCst)),
                        Err(_) => return,
                    }
                    if pace == 7 {
                        journal.trim(Position(last.0.saturating_sub(30)));
                    }
                }
            });
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_loss_of_power_at_any_step_takes_nothing_that_was_reported(power in 0u64..150, seed in any::<u64>()) {
        let disk = CrashDisk::new();
        disk.cut_power_after(power);
        let (durable, mut trimmed) = (AtomicU64::new(0), Position::NONE);
        if let Ok(journal) = create(&disk, settings()) {
            appenders(&journal, &durable);
            trimmed = journal.depth().trimmed;
        }
        let last = found(&disk.after_crash(seed), trimmed);
        prop_assert!(last.0 >= durable.load(Ordering::SeqCst));
    }
}

#[test]
fn after_any_failed_step_nothing_is_reported_that_is_not_durable_and_all_waits_end() {
    let mut broken = 0;
    for nth in 1..100 {
        let disk = CrashDisk::new();
        disk.fail_nth(nth);
        let (durable, mut trimmed) = (AtomicU64::new(0), Position::NONE);
        if let Ok(journal) = create(&disk, settings()) {
            appenders(&journal, &durable);
            trimmed = journal.depth().trimmed;
            if let Err(why) = journal.append(Bytes::new()) {
                assert!(matches!(why, JournalError::Broken(_)), "{why}");
                assert!(matches!(journal.durable_blocking(Position(1), PATIENCE), Err(JournalError::Broken(_))));
                assert!(matches!(journal.room_blocking(PATIENCE), Err(JournalError::Broken(_))));
                assert!(matches!(journal.read(Position(1), 10), Err(JournalError::Broken(_))));
                broken += 1;
            }
        }
        for seed in 0..3 {
            let old = recover(&disk.after_crash(seed));
            assert!(old.last().0 >= durable.load(Ordering::SeqCst), "failed step {nth}, seed {seed}");
            assert!(old.kept_from() <= trimmed.next());
        }
    }
    assert!(broken > 10, "{broken} runs broke the journal");
}

#[test]
fn a_failed_sync_fails_all_who_wait_although_the_next_sync_would_succeed() {
    let disk = CrashDisk::new();
    let journal = create(&disk, settings()).unwrap();
    // The write of the record, then its sync.
    disk.fail_nth(2);
    let first = append(&journal, 1);
    assert!(matches!(journal.durable_blocking(first, PATIENCE), Err(JournalError::Broken(_))));
    assert!(matches!(journal.append(payload(2)), Err(JournalError::Broken(_))));
    assert!(matches!(journal.close(), Err(JournalError::Broken(_))));
}

#[test]
fn on_a_real_disk_many_segments_are_written_trimmed_and_recovered() {
    let dir = tempfile::tempdir().unwrap();
    let small = Settings { segment_bytes: 64 << 10, bytes_max: 64 << 20, ..settings() };
    let journal = Journal::create(Arc::new(SystemDisk), dir.path(), id(1), small).unwrap();
    for _ in 0..20 {
        let last = append(&journal, 200);
        journal.durable_blocking(last, PATIENCE).unwrap();
        journal.trim(Position(last.0 - 100));
    }
    // Longer than a segment: it gets one of its own.
    let long = Bytes::from(vec![1; 100 << 10]);
    let last = journal.append(long.clone()).unwrap();
    journal.close().unwrap();
    let old = OldLife::recover(Arc::new(SystemDisk), dir.path(), id(1)).unwrap();
    assert_eq!((old.kept_from(), old.last()), (Position(3901), Position(4001)));
    assert_eq!(old.read(last, 10).unwrap()[0].payload, long);
    old.remove().unwrap();
    assert_eq!(lives(&SystemDisk, dir.path(), id(1).cluster).unwrap(), vec![]);
}
