mod disk;
mod harness;
mod model;
mod quotas;

use std::sync::atomic::Ordering::SeqCst;

use ctfs_meta::{Op, SetAttr};
use ctfs_types::FileName;
use futures_util::FutureExt;

use self::harness::{CELL, Cluster, Fate, pattern};
use super::*;

#[tokio::test]
async fn close_on_one_server_then_open_on_another_sees_it() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
    let ino = cluster.make("file");
    for (n, len) in [10, 5000, 300_000, 40, 1_000_000].into_iter().enumerate() {
        let (writer, reader) = if n % 2 == 0 { (&a, &b) } else { (&b, &a) };
        writer.truncate(ino, SetAttr { size: Some(0), ..SetAttr::default() }).await.unwrap();
        writer.write(ino, 0, pattern(n as u8, len), false).await.unwrap();
        assert_eq!(reader.read(ino, 0, 1 << 21).await.unwrap(), "", "nothing before the flush");
        writer.flush(ino).await.unwrap();
        assert!(reader.read(ino, 0, 1 << 21).await.unwrap() == pattern(n as u8, len), "{len} bytes");
        assert!(writer.read(ino, 0, 1 << 21).await.unwrap() == pattern(n as u8, len), "{len} bytes");
    }
}

#[tokio::test]
async fn resident_reads_and_writes_do_not_wait() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("file");
    let data = pattern(1, 600_000);
    server.claim(ino).await.unwrap();
    assert_eq!(server.write(ino, 0, data.clone(), false).now_or_never().unwrap(), Ok(600_000));
    assert!(server.read(ino, 0, 600_000).now_or_never().unwrap().unwrap() == data);
    server.flush(ino).await.unwrap();
    let gets = cluster.gets.load(SeqCst);
    assert!(server.read(ino, 100, 500_000).now_or_never().unwrap().unwrap() == data[100..500_100]);
    assert_eq!(server.append(ino, pattern(2, 10), false).now_or_never().unwrap(), Ok(600_000));
    assert_eq!(cluster.gets.load(SeqCst), gets, "what was written here stays here");
}

#[tokio::test]
async fn a_failed_flush_is_told_once_and_loses_nothing() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
    let ino = cluster.make("file");
    let data = pattern(3, 700_000);
    a.write(ino, 0, data.clone(), false).await.unwrap();
    cluster.failing_puts.store(1, SeqCst);
    let error = FsError::TooFewCopies { wanted: 2, synced: 1 };
    assert_eq!(a.flush(ino).await, Err(error.clone()));
    assert_eq!(a.take_error(ino), Some(error));
    assert_eq!(a.take_error(ino), None);
    assert_eq!(a.dirty_bytes(), 700_000);
    assert!(a.read(ino, 0, 1 << 20).await.unwrap() == data);

    cluster.cut_off.store(true, SeqCst);
    assert!(matches!(a.flush(ino).await, Err(FsError::NoQuorum { .. })));
    cluster.cut_off.store(false, SeqCst);
    assert_eq!(a.flush(ino).await, Ok(()));
    assert!(b.read(ino, 0, 1 << 20).await.unwrap() == data);
    assert_eq!(a.dirty_bytes(), 0);
}

/// A flush that was answered NoQuorum was merged and proposed again as if it had not happened: if
/// it had, its bytes went over what another server had written to the same place in between.
#[tokio::test]
async fn a_flush_that_happened_unanswered_is_not_merged_over_later_writes() {
    for fate in [Fate::Happens, Fate::HappensLate] {
        for (len, offset) in [(3000, 0), (300_000, 0), (2 * CELL as usize, CELL / 2)] {
            let cluster = Cluster::new();
            let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
            let ino = cluster.make("file");
            a.write(ino, offset, pattern(1, len), false).await.unwrap();
            *cluster.fate.lock() = Some(fate);
            assert!(matches!(a.flush(ino).await, Err(FsError::NoQuorum { .. })));
            cluster.deliver_late();
            b.write(ino, offset, pattern(2, len), false).await.unwrap();
            b.flush(ino).await.unwrap();
            assert_eq!(a.flush(ino).await, Ok(()));
            assert_eq!(a.dirty_bytes(), 0);
            for server in [&a, &b] {
                assert!(server.read(ino, offset, len as u32).await.unwrap() == pattern(2, len), "{fate:?} {len} bytes");
            }
        }
    }
}

#[tokio::test]
async fn a_flush_that_was_given_up_never_happens_once_the_next_one_succeeded() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
    let ino = cluster.make("file");
    a.write(ino, 0, pattern(1, 300_000), false).await.unwrap();
    *cluster.fate.lock() = Some(Fate::HappensLate);
    assert!(matches!(a.flush(ino).await, Err(FsError::NoQuorum { .. })));
    // What was written since is flushed with it, and on top of it.
    a.write(ino, 1000, pattern(2, 1000), false).await.unwrap();
    assert_eq!(a.flush(ino).await, Ok(()));
    let mut want = pattern(1, 300_000).to_vec();
    want[1000..2000].copy_from_slice(&pattern(2, 1000));
    assert!(b.read(ino, 0, 1 << 20).await.unwrap() == want);
    // All holes again, as when the first flush merged over them.
    b.truncate(ino, SetAttr { size: Some(0), ..SetAttr::default() }).await.unwrap();
    cluster.deliver_late();
    assert_eq!(b.read(ino, 0, 1 << 20).await.unwrap(), "");
}

#[tokio::test]
async fn bytes_written_while_a_flush_is_in_doubt_are_kept() {
    for fate in [Fate::Happens, Fate::HappensLate, Fate::Lost] {
        let cluster = Cluster::new();
        let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
        let ino = cluster.make("file");
        a.write(ino, 0, pattern(1, 300_000), false).await.unwrap();
        *cluster.fate.lock() = Some(fate);
        assert!(matches!(a.flush(ino).await, Err(FsError::NoQuorum { .. })));
        assert_eq!(a.dirty_bytes(), 300_000, "they may be nowhere else");
        a.write(ino, 299_000, pattern(2, 2000), false).await.unwrap();
        cluster.deliver_late();
        let mut want = pattern(1, 301_000).to_vec();
        want[299_000..].copy_from_slice(&pattern(2, 2000));
        assert!(a.read(ino, 0, 1 << 20).await.unwrap() == want, "{fate:?}");
        a.flush(ino).await.unwrap();
        for server in [&a, &b] {
            assert!(server.read(ino, 0, 1 << 20).await.unwrap() == want, "{fate:?}");
        }
        assert_eq!(a.dirty_bytes(), 0);
    }
}

/// A truncate that was answered NoQuorum may still be applied: not after a later write was synced.
#[tokio::test]
async fn a_truncate_in_doubt_cuts_nothing_that_was_synced_after_it() {
    for fate in [Fate::Happens, Fate::HappensLate, Fate::Lost] {
        let cluster = Cluster::new();
        let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
        let ino = cluster.make("file");
        a.write(ino, 0, pattern(1, 100_000), false).await.unwrap();
        a.flush(ino).await.unwrap();
        *cluster.fate.lock() = Some(fate);
        let set = SetAttr { size: Some(0), ..SetAttr::default() };
        assert!(matches!(a.truncate(ino, set).await, Err(FsError::NoQuorum { .. })));
        a.write(ino, 0, pattern(2, 50_000), false).await.unwrap();
        a.flush(ino).await.unwrap();
        cluster.deliver_late();
        let got = b.read(ino, 0, 1 << 20).await.unwrap();
        assert!(got[..50_000] == pattern(2, 50_000), "{fate:?}");
        assert_eq!(got.len(), if fate == Fate::Happens { 50_000 } else { 100_000 }, "{fate:?}");
    }
}

#[tokio::test]
async fn a_doubt_is_ended_in_the_background_also_when_nobody_asks() {
    let cluster = Cluster::new();
    let settings = ContentSettings { dirty_age_max: Duration::ZERO, ..ContentSettings::default() };
    let server = cluster.server_with(1 << 24, settings);
    let ino = cluster.make("file");
    *cluster.fate.lock() = Some(Fate::HappensLate);
    let set = SetAttr { size: Some(10), ..SetAttr::default() };
    assert!(matches!(server.truncate(ino, set).await, Err(FsError::NoQuorum { .. })));
    let ended = async {
        while server.shared.pending.lock().contains_key(&ino) {
            server.shared.drained.notified().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap();
    cluster.deliver_late();
    assert_eq!(cluster.attr(ino).size, 0, "by then it cannot happen any more");
}

#[tokio::test]
async fn a_chunk_that_was_collected_before_its_write_was_known_to_have_happened_is_put_again() {
    for collected in [false, true] {
        let cluster = Cluster::new();
        let settings = ContentSettings { put_age_max: Duration::ZERO, ..ContentSettings::default() };
        let (a, b) = (cluster.server_with(1 << 24, settings), cluster.server(1 << 24));
        let ino = cluster.make("file");
        a.write(ino, 0, pattern(1, 100_000), false).await.unwrap();
        *cluster.fate.lock() = Some(Fate::Happens);
        assert!(matches!(a.flush(ino).await, Err(FsError::NoQuorum { .. })));
        if collected {
            cluster.delete_chunks();
        }
        let puts = cluster.puts.load(SeqCst);
        a.flush(ino).await.unwrap();
        assert!(cluster.puts.load(SeqCst) > puts);
        assert!(b.read(ino, 0, 1 << 20).await.unwrap() == pattern(1, 100_000), "collected: {collected}");
    }
}

#[tokio::test]
async fn the_cache_limit_holds_for_a_file_four_times_as_large() {
    let cluster = Cluster::new();
    let limit = 16 * CELL;
    let server = cluster.server(limit);
    let ino = cluster.make("file");
    let size = 4 * limit;
    let fits = |server: &Content| {
        let usage = server.usage();
        assert!(usage.clean + usage.dirty <= limit && usage.dirty <= limit / 2, "{usage:?}");
    };
    for n in 0..size / (128 << 10) {
        server.write(ino, n * (128 << 10), pattern(n as u8, 128 << 10), false).await.unwrap();
        fits(&server);
    }
    for n in 0..size / (128 << 10) {
        let got = server.read(ino, n * (128 << 10), 128 << 10).await.unwrap();
        assert!(got == pattern(n as u8, 128 << 10), "piece {n}");
        fits(&server);
    }
    server.flush_all().await.unwrap();
    assert_eq!(cluster.attr(ino).size, size);
    assert!(server.usage().evictions > 0);
}

#[tokio::test]
async fn writers_wait_for_room_no_longer_than_their_patience() {
    let cluster = Cluster::new();
    let settings = ContentSettings { room_patience: Duration::from_millis(50), ..ContentSettings::default() };
    let server = cluster.server_with(4 * CELL, settings);
    let ino = cluster.make("file");
    server.claim(ino).await.unwrap();
    cluster.cut_off.store(true, SeqCst);
    server.write(ino, 0, pattern(1, CELL as usize), false).await.unwrap();
    assert_eq!(server.write(ino, CELL, pattern(1, 2 * CELL as usize), false).await, Ok(CELL as u32));
    assert_eq!(server.write(ino, 2 * CELL, pattern(1, 100), false).await, Err(FsError::CacheFull));
    assert!(server.read(ino, 0, CELL as u32).await.unwrap() == pattern(1, CELL as usize));
}

#[tokio::test]
async fn a_sparse_file_stays_sparse() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
    let ino = cluster.make("file");
    let far = 5 << 40;
    a.write(ino, 100 << 20, pattern(1, 5000), false).await.unwrap();
    a.write(ino, far, pattern(2, 10), false).await.unwrap();
    let mut shown = cluster.attr(ino);
    assert!(a.overlay(&mut shown, a.moment()));
    assert_eq!((shown.size, shown.allocated), (far + 10, 5010));
    assert_eq!(a.seek(ino, 0, libc::SEEK_DATA).await, Ok(100 << 20));
    a.flush(ino).await.unwrap();
    let attr = cluster.attr(ino);
    assert_eq!(attr.size, far + 10);
    assert!(attr.allocated <= 16 << 10, "{} bytes", attr.allocated);
    for server in [&a, &b] {
        assert_eq!(server.seek(ino, 0, libc::SEEK_DATA).await, Ok(100 << 20));
        assert_eq!(server.seek(ino, 100 << 20, libc::SEEK_HOLE).await, Ok((100 << 20) + 5000));
        assert_eq!(server.seek(ino, (100 << 20) + 5000, libc::SEEK_DATA).await, Ok(far));
        assert_eq!(server.seek(ino, far, libc::SEEK_HOLE).await, Ok(far + 10));
        assert_eq!(server.read(ino, 1 << 40, 10).await.unwrap(), [0; 10][..]);
    }
    // Zeros written over a hole are no data either.
    a.write(ino, 1 << 30, vec![0; 100_000].into(), false).await.unwrap();
    a.flush(ino).await.unwrap();
    assert_eq!(cluster.attr(ino).allocated, attr.allocated);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_beside_a_truncate_sees_before_or_after() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("file");
    let data = pattern(1, CELL as usize + 20_000);
    let content = server.content.clone();
    let (whole, stop) = (data.clone(), Arc::new(AtomicBool::new(false)));
    let stopped = stop.clone();
    let reader = tokio::spawn(async move {
        while !stopped.load(Relaxed) {
            let got = content.read(ino, 0, 1 << 20, Pages::Unlocked).await.unwrap();
            // The writes below come in two pieces, so the file has one of these sizes.
            assert!([0, 10_000, whole.len()].contains(&got.len()), "{} bytes", got.len());
            assert!(got == whole[..got.len()], "zeros of a half-done truncate");
            tokio::task::yield_now().await;
        }
    });
    for _ in 0..300 {
        // Committed bytes below, unflushed ones above.
        server.write(ino, 0, data.slice(..10_000), false).await.unwrap();
        server.flush(ino).await.unwrap();
        server.write(ino, 10_000, data.slice(10_000..), false).await.unwrap();
        server.truncate(ino, SetAttr { size: Some(0), ..SetAttr::default() }).await.unwrap();
    }
    stop.store(true, Relaxed);
    reader.await.unwrap();
}

#[tokio::test]
async fn small_files_live_in_the_metadata() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
    let ino = cluster.make("file");
    a.write(ino, 0, pattern(1, 4096), false).await.unwrap();
    a.flush(ino).await.unwrap();
    assert_eq!(cluster.puts.load(SeqCst), 0);
    assert!(b.read(ino, 0, 9000).now_or_never().unwrap().unwrap() == pattern(1, 4096));
    // One byte more, and it is a chunk.
    b.append(ino, pattern(2, 1), false).await.unwrap();
    b.flush(ino).await.unwrap();
    assert_eq!(cluster.puts.load(SeqCst), 1);
    assert!(a.read(ino, 0, 9000).await.unwrap() == [pattern(1, 4096), pattern(2, 1)].concat());
}

#[tokio::test]
async fn appends_of_one_server_do_not_overlap() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("log");
    let tasks = (0..8u8).map(|writer| {
        let content = server.content.clone();
        tokio::spawn(async move {
            for n in 0..40 {
                content.append(ino, vec![b'a' + writer; 100].into(), false, Pages::Unlocked).await.unwrap();
                if n % 10 == writer {
                    content.flush(ino).await.unwrap();
                }
            }
        })
    });
    futures_util::future::join_all(tasks).await.into_iter().for_each(|done| done.unwrap());
    let log = server.read(ino, 0, 1 << 20).await.unwrap();
    assert_eq!(log.len(), 8 * 40 * 100);
    assert!(log.chunks(100).all(|line| line.iter().all(|b| b == &line[0])));
}

#[tokio::test]
async fn times_and_modes_set_after_a_write_survive_its_flush() {
    // `cp -p` and `install` write, then set times and mode, then close.
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("file");
    server.write(ino, 0, pattern(1, 100_000), true).await.unwrap();
    let set = SetAttr { mtime: Some(Timestamp::new(42, 7)), mode: Some(0o4755), ..SetAttr::default() };
    let attr = server.truncate(ino, set).await.unwrap();
    assert_eq!((attr.mtime, attr.mode, attr.size), (Timestamp::new(42, 7), 0o4755, 100_000));
    server.flush(ino).await.unwrap();
    let attr = cluster.attr(ino);
    assert_eq!((attr.mtime, attr.mode, attr.size), (Timestamp::new(42, 7), 0o4755, 100_000));
    // A later write drops the bit again, at once for those who look here.
    server.write(ino, 0, pattern(2, 10), true).await.unwrap();
    let mut shown = cluster.attr(ino);
    assert!(server.overlay(&mut shown, server.moment()));
    assert_eq!(shown.mode, 0o755);
    assert!(shown.mtime > Timestamp::new(42, 7));
    server.flush(ino).await.unwrap();
    let attr = cluster.attr(ino);
    assert_eq!((attr.mode, attr.mtime), (0o755, shown.mtime));
}

#[tokio::test]
async fn unflushed_bytes_are_flushed_in_the_background() {
    let cluster = Cluster::new();
    let settings = ContentSettings { dirty_age_max: Duration::ZERO, ..ContentSettings::default() };
    let server = cluster.server_with(1 << 24, settings);
    let ino = cluster.make("file");
    cluster.failing_puts.store(1, SeqCst);
    server.write(ino, 0, pattern(1, 300_000), false).await.unwrap();
    let flushed = async {
        while server.dirty_bytes() > 0 {
            server.shared.drained.notified().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), flushed).await.expect("a failed background flush is tried again");
    assert_eq!(server.take_error(ino), None, "nothing was lost, so nobody is told");
    assert_eq!(cluster.attr(ino).size, 300_000);
}

#[tokio::test]
async fn whole_cells_of_a_busy_file_leave_before_its_tail() {
    let cluster = Cluster::new();
    let settings = ContentSettings { dirty_inode_bytes: CELL, ..ContentSettings::default() };
    let server = cluster.server_with(1 << 24, settings);
    let ino = cluster.make("file");
    server.write(ino, 0, pattern(1, 2 * CELL as usize + 1000), false).await.unwrap();
    let flushed = async {
        while server.dirty_bytes() > 1000 {
            server.shared.drained.notified().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), flushed).await.unwrap();
    assert_eq!(server.dirty_bytes(), 1000);
    assert_eq!(cluster.attr(ino).size, 2 * CELL);
    assert_eq!(server.read(ino, 2 * CELL, 5000).await.unwrap(), pattern(1, 2 * CELL as usize + 1000)[2 * CELL as usize..]);
}

#[tokio::test]
async fn old_puts_are_put_again_before_they_are_named() {
    let cluster = Cluster::new();
    let settings = ContentSettings { put_age_max: Duration::ZERO, ..ContentSettings::default() };
    let server = cluster.server_with(1 << 24, settings);
    let ino = cluster.make("file");
    server.write(ino, 0, pattern(1, 10_000), false).await.unwrap();
    server.flush(ino).await.unwrap();
    assert_eq!(cluster.puts.load(SeqCst), 3, "and once more, because the answer came after twice that age");
}

#[tokio::test]
async fn a_removed_file_is_flushed_while_open_and_dropped_when_gone() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("file");
    server.opened(ino, true);
    server.write(ino, 0, pattern(1, 10_000), false).await.unwrap();
    cluster.apply(Op::Unlink { parent: Ino::ROOT, name: FileName::new(b"file").unwrap() }).unwrap();
    server.flush(ino).await.unwrap();
    assert!(server.read(ino, 0, 10_000).await.unwrap() == pattern(1, 10_000));
    server.write(ino, 0, pattern(2, 10_000), false).await.unwrap();
    cluster.apply(Op::Reap { inos: vec![ino] }).unwrap();
    assert_eq!(server.flush(ino).await, Err(FsError::Stale(ino)), "these bytes are nowhere");
    assert_eq!(server.usage().dirty + server.usage().clean, 0);
    assert!(matches!(server.read(ino, 0, 10).await, Err(FsError::Meta(MetaError::NoSuchInode(_)))));
}

#[tokio::test]
async fn a_read_whose_chunk_was_replaced_and_collected_starts_over() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
    let ino = cluster.make("file");
    a.write(ino, 0, pattern(1, 10_000), false).await.unwrap();
    a.flush(ino).await.unwrap();
    let (others, new) = (cluster.clone(), pattern(2, 10_000));
    *cluster.before_get.lock() = Some(Box::new(move || {
        others.delete_chunks();
        others.write_cell(ino, 0, new, 10_000);
    }));
    assert!(b.read(ino, 0, 10_000).await.unwrap() == pattern(2, 10_000));
}

#[tokio::test]
async fn what_another_server_appends_survives_a_punch_up_to_the_end() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("file");
    let (size, more) = (CELL + 5000, CELL + 9000);
    let whole = pattern(1, more as usize);
    server.write(ino, 0, whole.slice(..size as usize), false).await.unwrap();
    server.flush(ino).await.unwrap();
    let (others, tail) = (cluster.clone(), whole.slice(CELL as usize..));
    *cluster.before_propose.lock() = Some(Box::new(move || others.write_cell(ino, 1, tail, more)));
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    server.allocate(ino, mode, 0, size).await.unwrap();
    server.flush(ino).await.unwrap();
    let got = server.read(ino, 0, 1 << 20).await.unwrap();
    assert!(got[..size as usize].iter().all(|&byte| byte == 0));
    assert!(got[size as usize..] == whole[size as usize..]);
}

#[tokio::test]
async fn what_another_server_appends_survives_a_copy_that_shares_the_last_cell() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let (source, target) = (cluster.make("source"), cluster.make("target"));
    let data = pattern(1, CELL as usize + 5000);
    server.write(source, 0, data.clone(), false).await.unwrap();
    server.flush(source).await.unwrap();
    server.copy(source, 0, target, 0, CELL).await.unwrap();
    server.flush(target).await.unwrap();
    let (others, longer) = (cluster.clone(), pattern(2, 9000));
    let (size, tail) = (CELL + 9000, longer.slice(5000..));
    // After the first cell was shared, and after the copy looked where the target ends.
    *cluster.before_propose.lock() = Some(Box::new(move || {
        let later = others.clone();
        *others.before_propose.lock() = Some(Box::new(move || later.write_cell(target, 1, longer, size)));
    }));
    server.copy(source, 0, target, 0, u64::MAX / 2).await.unwrap();
    server.flush(target).await.unwrap();
    let got = server.read(target, 0, 1 << 20).await.unwrap();
    assert!(got[..data.len()] == data);
    assert!(got[data.len()..] == tail);
}

#[tokio::test]
async fn copies_share_whole_cells() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
    let (source, target) = (cluster.make("source"), cluster.make("target"));
    let data = pattern(1, 3 * CELL as usize + 77);
    a.write(source, 0, data.clone(), false).await.unwrap();
    assert_eq!(a.copy(source, 0, target, 0, u64::MAX / 2).await, Ok(data.len() as u64));
    let puts = cluster.puts.load(SeqCst);
    a.flush(target).await.unwrap();
    assert_eq!(cluster.puts.load(SeqCst), puts, "no byte was put twice");
    assert!(b.read(target, 0, 1 << 20).await.unwrap() == data);
}

#[tokio::test]
async fn a_file_read_in_order_is_fetched_ahead() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server(1 << 24), cluster.server(1 << 24));
    let ino = cluster.make("file");
    a.write(ino, 0, pattern(1, 12 * CELL as usize), false).await.unwrap();
    a.flush(ino).await.unwrap();
    for n in 0..4 {
        b.read(ino, n * CELL / 2, (CELL / 2) as u32).await.unwrap();
    }
    let ahead = async {
        while b.resident(ino).len() < 6 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), ahead).await.unwrap();
    assert!(cluster.gets.load(SeqCst) as usize <= 12, "each cell at most once");
}

#[tokio::test]
async fn entries_of_closed_clean_files_leave_memory() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("file");
    server.opened(ino, true);
    server.write(ino, 0, pattern(1, 10_000), false).await.unwrap();
    server.closed(ino, true);
    assert_eq!(server.shared.inodes.lock().len(), 1, "unflushed bytes keep it");
    server.flush(ino).await.unwrap();
    server.closed(ino, true);
    assert_eq!(server.shared.inodes.lock().len(), 0);
    assert_eq!(server.resident(ino).len(), 1, "its bytes stay cached");
    server.evict_all();
    assert!(server.shared.tier.peek(ino).is_none());
}
