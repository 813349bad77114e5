use std::sync::atomic::Ordering;

use ctfs_meta::{About, Command, Op};
use ctfs_types::{RequestId, Timestamp};
use openraft::{CommittedLeaderId, EntryPayload, storage::RaftLogStorageExt};
use proptest::prelude::*;

use super::*;
use crate::raft_types::Entries;

fn id(term: u64, index: u64) -> RaftLogId {
    RaftLogId::new(CommittedLeaderId::new(term, 1), index)
}

/// An entry whose size grows with `weight`.
fn entry(term: u64, index: u64, weight: usize) -> RaftEntry {
    let command = |seq| Command {
        request: RequestId { client: 1, seq },
        answered: 0,
        at: Timestamp::default(),
        about: About::Ahead,
        op: Op::Noop,
    };
    let commands = (0..weight as u64).map(command).collect();
    RaftEntry { log_id: id(term, index), payload: EntryPayload::Normal(Entries { commands }) }
}

fn small() -> LogSettings {
    LogSettings { segment_bytes: 600, recent_bytes_max: 200, read_bytes_max: 1 << 20 }
}

fn open(dir: &Path) -> LogStore {
    LogStore::open(dir, small()).unwrap()
}

async fn append(log: &mut LogStore, term: u64, indexes: std::ops::Range<u64>) {
    for index in indexes {
        log.blocking_append([entry(term, index, 3)]).await.unwrap();
    }
}

async fn all(log: &mut LogStore) -> Vec<RaftEntry> {
    log.try_get_log_entries(..).await.unwrap()
}

fn indexes(entries: &[RaftEntry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.log_id.index).collect()
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
    paths.sort();
    paths
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

#[test]
fn entries_read_back_from_memory_and_from_disk_and_after_reopening() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..40).await;
        assert!(segments(dir.path()).len() > 3, "the test is about several segments");
        let expected: Vec<_> = (0..40).map(|index| entry(1, index, 3)).collect();
        assert_eq!(all(&mut log).await, expected);
        assert_eq!(indexes(&log.try_get_log_entries(5..=7).await.unwrap()), [5, 6, 7]);
        drop(log);
        let mut log = open(dir.path());
        assert_eq!(all(&mut log).await, expected);
        append(&mut log, 2, 40..45).await;
        assert_eq!(all(&mut log).await.len(), 45);
    });
}

#[test]
fn a_read_for_replication_is_bounded_but_never_empty() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = LogSettings { read_bytes_max: 60, ..small() };
        let mut log = LogStore::open(dir.path(), settings).unwrap();
        append(&mut log, 1, 0..10).await;
        let read = log.limited_get_log_entries(2, 10).await.unwrap();
        assert!((1..8).contains(&read.len()), "{}", read.len());
        assert_eq!(read[0].log_id.index, 2);
    });
}

#[test]
fn vote_and_committed_survive_reopening() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..3).await;
        log.save_vote(&RaftVote::new(7, 2)).await.unwrap();
        log.save_committed(Some(id(1, 1))).await.unwrap();
        drop(log);
        let mut log = open(dir.path());
        assert_eq!(log.read_vote().await.unwrap(), Some(RaftVote::new(7, 2)));
        assert_eq!(log.read_committed().await.unwrap(), Some(id(1, 1)));
    });
}

#[test]
fn a_damaged_vote_is_an_error() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).save_vote(&RaftVote::new(7, 2)).await.unwrap();
        let path = dir.path().join("state");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[2] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(LogStore::open(dir.path(), small()), Err(LogError::StateDamaged { .. })));
        // A lost one, too, as soon as there is a log it belongs to.
        let dir = tempfile::tempdir().unwrap();
        append(&mut open(dir.path()), 1, 0..3).await;
        std::fs::remove_file(dir.path().join("state")).unwrap();
        assert!(matches!(LogStore::open(dir.path(), small()), Err(LogError::StateMissing { .. })));
    });
}

#[test]
fn truncated_entries_are_gone_after_reopening_and_others_take_their_place() {
    for from in [0, 1, 5, 6, 7, 19] {
        run(async {
            let dir = tempfile::tempdir().unwrap();
            let mut log = open(dir.path());
            append(&mut log, 1, 0..20).await;
            log.truncate(id(1, from)).await.unwrap();
            let kept: Vec<u64> = (0..from).collect();
            assert_eq!(indexes(&all(&mut log).await), kept);
            drop(log);
            let mut log = open(dir.path());
            assert_eq!(indexes(&all(&mut log).await), kept, "truncated from {from}");
            append(&mut log, 2, from..25).await;
            drop(log);
            let entries = all(&mut open(dir.path())).await;
            assert_eq!(indexes(&entries), (0..25).collect::<Vec<_>>());
            assert!(entries.iter().all(|entry| entry.log_id.leader_id.term == if entry.log_id.index < from { 1 } else { 2 }));
        });
    }
}

#[test]
fn purged_entries_are_gone_after_reopening_and_their_segments_too() {
    for upto in [0, 4, 5, 6, 18, 19, 30] {
        run(async {
            let dir = tempfile::tempdir().unwrap();
            let mut log = open(dir.path());
            append(&mut log, 1, 0..20).await;
            let before = segments(dir.path()).len();
            log.coverage().reached(id(1, upto));
            log.purge(id(1, upto)).await.unwrap();
            let kept: Vec<u64> = (upto + 1..20).collect();
            let next = upto.max(19) + 1;
            assert_eq!(indexes(&all(&mut log).await), kept);
            if upto > 10 {
                assert!(segments(dir.path()).len() < before);
            }
            drop(log);
            let mut log = open(dir.path());
            assert_eq!(indexes(&all(&mut log).await), kept, "purged up to {upto}");
            let state = log.get_log_state().await.unwrap();
            assert_eq!(state.last_purged_log_id, Some(id(1, upto)));
            assert_eq!(state.last_log_id.unwrap().index, next - 1);
            append(&mut log, 2, next..next + 9).await;
            drop(log);
            assert_eq!(all(&mut open(dir.path())).await.last().unwrap().log_id, id(2, next + 8));
        });
    }
}

#[test]
fn a_purge_by_a_snapshot_of_a_later_term_drops_conflicting_entries_behind_it() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..20).await;
        log.coverage().reached(id(3, 9));
        log.purge(id(3, 9)).await.unwrap();
        assert!(all(&mut log).await.is_empty());
        append(&mut log, 3, 10..12).await;
        drop(log);
        assert_eq!(indexes(&all(&mut open(dir.path())).await), [10, 11]);
    });
}

/// What a reopened log says of itself: purged up to, entries.
async fn reopened(dir: &Path) -> (Option<RaftLogId>, Vec<RaftLogId>) {
    let mut log = open(dir);
    let purged = log.get_log_state().await.unwrap().last_purged_log_id;
    (purged, all(&mut log).await.into_iter().map(|entry| entry.log_id).collect())
}

fn ids(term: u64, indexes: std::ops::Range<u64>) -> Vec<RaftLogId> {
    indexes.map(|index| id(term, index)).collect()
}

#[test]
fn a_purge_that_no_durable_snapshot_reaches_is_forgotten_by_a_crash() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..20).await;
        log.coverage().reached(id(1, 398));
        log.purge(id(1, 399)).await.unwrap();
        let state = log.get_log_state().await.unwrap();
        assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(id(1, 399)), Some(id(1, 399))));
        assert!(all(&mut log).await.is_empty());
        // The vote goes into the same file as the mark and must not take it along.
        log.save_vote(&RaftVote::new(4, 2)).await.unwrap();
        drop(log);
        assert_eq!(reopened(dir.path()).await, (None, ids(1, 0..20)));
    });
}

#[test]
fn an_entry_behind_a_deferred_purge_is_acknowledged_when_the_snapshot_is_durable_and_not_before() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..20).await;
        log.purge(id(2, 399)).await.unwrap();
        let mut appender = log.clone();
        let mut waiting = Box::pin(appender.blocking_append([entry(2, 400, 3)]));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        // Answered after the append was looked at.
        log.save_vote(&RaftVote::new(4, 2)).await.unwrap();
        assert!(futures_util::poll!(&mut waiting).is_pending(), "there is a hole below it");
        log.coverage().reached(id(2, 399));
        waiting.await.unwrap();
        append(&mut log, 2, 401..405).await;
        drop((log, appender));
        assert_eq!(reopened(dir.path()).await, (Some(id(2, 399)), ids(2, 400..405)));
    });
}

#[test]
fn a_crash_while_an_entry_waits_for_the_snapshot_finds_the_log_as_it_was() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..20).await;
        log.purge(id(2, 399)).await.unwrap();
        let mut appender = log.clone();
        let mut waiting = Box::pin(appender.blocking_append([entry(2, 400, 3)]));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        log.save_vote(&RaftVote::new(4, 2)).await.unwrap();
        drop(waiting);
        drop((log, appender));
        assert_eq!(reopened(dir.path()).await, (None, ids(1, 0..20)));
    });
}

#[test]
fn a_crash_between_the_purge_mark_and_the_entries_it_takes_is_finished_at_the_next_start() {
    run(async {
        for (purged, kept) in [(id(2, 399), vec![]), (id(3, 9), vec![]), (id(2, 30), vec![]), (id(1, 9), ids(1, 10..20))] {
            let dir = tempfile::tempdir().unwrap();
            let mut log = open(dir.path());
            append(&mut log, 1, 0..20).await;
            drop(log);
            marks::State { vote: None, purged: Some(purged) }.save(dir.path()).unwrap();
            assert_eq!(reopened(dir.path()).await, (Some(purged), kept.clone()));
            let mut log = open(dir.path());
            let next = purged.index.max(kept.last().map_or(0, |last| last.index)) + 1;
            append(&mut log, 4, next..next + 3).await;
            drop(log);
            let all: Vec<_> = kept.into_iter().chain(ids(4, next..next + 3)).collect();
            assert_eq!(reopened(dir.path()).await, (Some(purged), all));
        }
    });
}

#[test]
fn entries_that_go_on_behind_a_deferred_purge_need_not_wait() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..20).await;
        for upto in [9, 19] {
            log.purge(id(1, upto)).await.unwrap();
            append(&mut log, 1, upto + 11..upto + 21).await;
        }
        assert_eq!(indexes(&all(&mut log).await), (20..40).collect::<Vec<_>>());
        let before = segments(dir.path()).len();
        log.coverage().reached(id(1, 19));
        append(&mut log, 1, 40..41).await;
        assert!(segments(dir.path()).len() < before);
        log.purge(id(1, 30)).await.unwrap();
        drop(log);
        assert_eq!(reopened(dir.path()).await, (Some(id(1, 19)), ids(1, 20..41)));
    });
}

#[test]
fn what_waits_for_a_snapshot_that_cannot_be_installed_fails() {
    run(async {
        for purge_first in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let mut log = open(dir.path());
            append(&mut log, 1, 0..20).await;
            if purge_first {
                log.purge(id(2, 399)).await.unwrap();
                let mut appender = log.clone();
                let mut waiting = Box::pin(appender.blocking_append([entry(2, 400, 3)]));
                assert!(futures_util::poll!(&mut waiting).is_pending());
                log.coverage().failed("test");
                assert!(waiting.await.is_err());
            } else {
                log.coverage().failed("test");
                assert!(log.purge(id(2, 399)).await.is_err());
            }
            assert!(log.blocking_append([entry(2, 400, 3)]).await.is_err(), "it has stopped");
            drop(log);
            assert_eq!(reopened(dir.path()).await, (None, ids(1, 0..20)));
        }
    });
}

#[test]
fn a_purge_by_an_older_snapshot_past_a_younger_shorter_log_leaves_no_hole() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..10).await;
        // Of a leader of term 3 that nobody followed.
        append(&mut log, 3, 10..11).await;
        log.coverage().reached(id(2, 20));
        log.purge(id(2, 20)).await.unwrap();
        append(&mut log, 4, 21..24).await;
        drop(log);
        assert_eq!(reopened(dir.path()).await, (Some(id(2, 20)), ids(4, 21..24)));
    });
}

#[test]
fn an_append_that_would_leave_a_hole_is_refused() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..3).await;
        assert!(log.blocking_append([entry(1, 4, 1)]).await.is_err());
        assert!(log.blocking_append([entry(1, 2, 1)]).await.is_err());
        append(&mut log, 1, 3..4).await;
    });
}

#[test]
fn after_a_failed_sync_the_log_refuses_everything_for_good() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..3).await;
        log.shared.fail_sync_after.store(0, Ordering::SeqCst);
        assert!(log.blocking_append([entry(1, 3, 1)]).await.is_err(), "not acknowledged");
        assert!(log.blocking_append([entry(1, 4, 1)]).await.is_err());
        assert!(log.save_vote(&RaftVote::new(9, 9)).await.is_err());
        assert!(log.truncate(id(1, 1)).await.is_err());
        assert!(log.purge(id(1, 1)).await.is_err());
        assert!(log.try_get_log_entries(0..2).await.is_err());
        let why = log.shared.health.failed().unwrap();
        assert!(why.contains("injected"), "{why}");
        drop(log);
        // What had been acknowledged is there again after it was checked.
        let mut log = open(dir.path());
        assert!(all(&mut log).await.len() >= 3);
        assert_eq!(log.read_vote().await.unwrap(), None);
    });
}

/// An append that has met a full disk.
async fn waiting_append(log: &LogStore, entries: Vec<RaftEntry>) -> tokio::task::JoinHandle<Result<(), RaftStorageError>> {
    let mut appender = log.clone();
    let append = tokio::spawn(async move { appender.blocking_append(entries).await });
    while !log.shared.health.waits() {
        tokio::task::yield_now().await;
    }
    append
}

#[test]
fn a_full_disk_makes_the_log_wait_and_it_goes_on_when_there_is_room() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..3).await;
        log.shared.health.pretend_free(Some(0));
        let waiting = waiting_append(&log, (3..9).map(|index| entry(1, index, 3)).collect()).await;
        assert!(!waiting.is_finished());
        assert_eq!(log.try_get_log_entries(0..3).await.unwrap().len(), 3, "what is there is read");
        log.shared.health.pretend_free(None);
        waiting.await.unwrap().unwrap();
        assert!(!log.shared.health.waits() && log.shared.health.failed().is_none());
        append(&mut log, 1, 9..12).await;
        drop(log);
        assert_eq!(reopened(dir.path()).await, (None, ids(1, 0..12)));
    });
}

#[test]
fn a_write_that_the_disk_refused_half_way_is_written_over() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..2).await;
        let before = segments(dir.path()).len();
        // Inside a segment, and at the header of a new one.
        for index in 2..10 {
            log.shared.refuse_writes.store(i64::from(index % 4 != 0), Ordering::SeqCst);
            append(&mut log, 1, index..index + 1).await;
        }
        assert!(segments(dir.path()).len() > before);
        drop(log);
        assert_eq!(reopened(dir.path()).await, (None, ids(1, 0..10)));
    });
}

#[test]
fn a_server_that_ends_while_its_disk_is_full_has_lost_nothing() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        append(&mut log, 1, 0..3).await;
        log.shared.refuse_writes.store(i64::MAX, Ordering::SeqCst);
        let waiting = waiting_append(&log, vec![entry(1, 3, 3)]).await;
        log.shared.health.stop();
        assert!(waiting.await.unwrap().is_err(), "not acknowledged");
        drop(log);
        assert_eq!(reopened(dir.path()).await, (None, ids(1, 0..3)));
    });
}

#[test]
fn every_flipped_bit_of_acknowledged_entries_is_reported() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        append(&mut open(dir.path()), 1, 0..12).await;
        let paths = segments(dir.path());
        assert!(paths.len() >= 2);
        for path in paths {
            let good = std::fs::read(&path).unwrap();
            for byte in 0..good.len() {
                let mut bad = good.clone();
                bad[byte] ^= 1 << (byte % 8);
                std::fs::write(&path, &bad).unwrap();
                let opened = LogStore::open(dir.path(), small());
                assert!(matches!(opened, Err(LogError::LogDamaged { .. })), "byte {byte} of {path:?}: {opened:?}");
                assert_eq!(std::fs::read(&path).unwrap(), bad, "damage is left as it is");
            }
            std::fs::write(&path, &good).unwrap();
        }
        assert_eq!(all(&mut open(dir.path())).await.len(), 12);
    });
}

#[test]
fn damage_before_a_later_write_is_reported_also_when_progress_was_lost() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        append(&mut open(dir.path()), 1, 0..12).await;
        for path in segments(dir.path()) {
            let good = std::fs::read(&path).unwrap();
            let mut bad = good.clone();
            // Inside the first frame: others follow it in the segment.
            bad[frame::SEGMENT_HEADER_BYTES + 3] ^= 0x10;
            std::fs::write(&path, &bad).unwrap();
            std::fs::remove_file(dir.path().join("progress")).unwrap();
            assert!(matches!(LogStore::open(dir.path(), small()), Err(LogError::LogDamaged { .. })), "{path:?}");
            std::fs::write(&path, &good).unwrap();
        }
    });
}

/// Its commands would be read as something else.
#[test]
fn an_entry_of_an_older_version_is_refused_by_name() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        append(&mut open(dir.path()), 1, 0..1).await;
        let path = segments(dir.path()).remove(0);
        let bytes = std::fs::read(&path).unwrap();
        let salt = frame::read_segment_header(&bytes, 0).unwrap();
        let (mut old, rest) = (bytes[..frame::SEGMENT_HEADER_BYTES].to_vec(), &bytes[frame::SEGMENT_HEADER_BYTES..]);
        let whole = frame::read(salt, rest).unwrap();
        let mut payload = rest[frame::FRAME_HEADER_BYTES..whole.bytes()].to_vec();
        payload[0] = 1;
        frame::write(&mut old, salt, whole.id, whole.synced, &payload);
        std::fs::write(&path, old).unwrap();
        let refused = open(dir.path()).try_get_log_entries(..).await.unwrap_err().to_string();
        assert!(refused.contains("record has version 1, this program reads version 5"), "{refused}");
    });
}

#[test]
fn a_missing_segment_is_reported() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        append(&mut open(dir.path()), 1, 0..20).await;
        let paths = segments(dir.path());
        for path in &paths[1..] {
            let bytes = std::fs::read(path).unwrap();
            std::fs::remove_file(path).unwrap();
            assert!(matches!(LogStore::open(dir.path(), small()), Err(LogError::LogDamaged { .. })), "{path:?}");
            std::fs::write(path, bytes).unwrap();
        }
        drop(open(dir.path()));
        assert_eq!(Recovered::read(dir.path()).unwrap().begin(), (None, Some(0)));
    });
}

#[test]
fn a_segment_whose_creation_was_not_finished_is_removed() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        append(&mut open(dir.path()), 1, 0..3).await;
        for content in [&b""[..], b"CTFSLOG\n", &[0; frame::SEGMENT_HEADER_BYTES]] {
            std::fs::write(flusher::segment_path(dir.path(), 3), content).unwrap();
            assert_eq!(all(&mut open(dir.path())).await.len(), 3);
        }
        append(&mut open(dir.path()), 1, 3..9).await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Power is lost inside the last write: its bytes are there in part, or garbage, in any page.
    #[test]
    fn an_unfinished_write_is_cut_and_nothing_acknowledged_is_lost(
        acknowledged in proptest::collection::vec(0usize..6, 0..8),
        unfinished in proptest::collection::vec(0usize..6, 1..4),
        hole in any::<proptest::sample::Index>(),
        keep_progress in any::<bool>(),
    ) {
        run(async {
            let dir = tempfile::tempdir().unwrap();
            let settings = LogSettings { segment_bytes: 1 << 20, ..small() };
            let open = || LogStore::open(dir.path(), settings.clone());
            let mut log = open().unwrap();
            let mut expected = Vec::new();
            for weight in &acknowledged {
                let entry = entry(1, expected.len() as u64, *weight);
                log.blocking_append([entry.clone()]).await.unwrap();
                expected.push(entry);
            }
            drop(log);
            let progress = std::fs::read(dir.path().join("progress")).unwrap();
            let durable = segments(dir.path()).last().map_or(0, |path| std::fs::metadata(path).unwrap().len() as usize);

            let mut log = open().unwrap();
            let last: Vec<_> =
                unfinished.iter().zip(expected.len() as u64..).map(|(weight, index)| entry(1, index, *weight)).collect();
            log.blocking_append(last.clone()).await.unwrap();
            drop(log);
            let path = segments(dir.path()).pop().unwrap();
            let whole = std::fs::read(&path).unwrap();

            let mut torn: Vec<Vec<u8>> = (durable.max(frame::SEGMENT_HEADER_BYTES)..whole.len()).map(|cut| whole[..cut].to_vec()).collect();
            let tail = whole.len() - durable.max(frame::SEGMENT_HEADER_BYTES);
            // A page in the middle of the write that did not reach the disk.
            let mut punched = whole.clone();
            let at = whole.len() - tail + hole.index(tail);
            let end = (at + 20).min(punched.len());
            punched[at..end].fill(0);
            torn.push(punched);

            for bytes in torn {
                std::fs::write(&path, &bytes).unwrap();
                if keep_progress {
                    std::fs::write(dir.path().join("progress"), &progress).unwrap();
                } else {
                    std::fs::remove_file(dir.path().join("progress")).unwrap();
                }
                let mut log = open().unwrap();
                let got = all(&mut log).await;
                let all_entries: Vec<_> = expected.iter().chain(&last).cloned().collect();
                assert!(got.len() >= expected.len(), "an acknowledged entry was lost");
                assert_eq!(got, all_entries[..got.len()]);
                let next = got.len() as u64;
                log.blocking_append([entry(2, next, 1)]).await.unwrap();
                drop(log);
                assert_eq!(all(&mut open().unwrap()).await.len() as u64, next + 1);
            }
        });
    }
}
