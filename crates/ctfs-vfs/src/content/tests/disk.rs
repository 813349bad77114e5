//! File contents over a cache disk that fills up, and a cache directory that others remove or cut.

use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::AtomicU64,
};

use super::*;

const RESERVE: u64 = 16 * CELL;

/// Bytes on disk under `dir`.
fn taken(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let of = |path: &Path| std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512);
    entries.flatten().map(|e| if e.path().is_dir() { taken(&e.path()) } else { of(&e.path()) }).sum()
}

fn cut(server: &harness::Server, ino: Ino, len: u64) {
    let path = server.dir().join(format!("tier/{:02x}/{:02x}/{:x}", ino.0 & 0xff, ino.0 >> 8 & 0xff, ino.0));
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

#[tokio::test]
async fn on_a_full_disk_writes_are_flushed_and_evicted_and_else_refused() {
    let cluster = Cluster::new();
    let others = Arc::new(AtomicU64::new(0));
    let size = RESERVE + 12 * CELL;
    let settings = ContentSettings { room_patience: Duration::from_secs(20), ..ContentSettings::default() };
    let seen = others.clone();
    let server = cluster.server_on(1 << 30, settings, RESERVE, move |dir| size.saturating_sub(seen.load(SeqCst) + taken(dir)));
    let ino = cluster.make("file");
    // Far more than the disk takes: each piece waits until earlier ones were flushed and evicted.
    for n in 0..60 {
        server.write(ino, n * CELL, pattern(n as u8, CELL as usize), false).await.unwrap();
        assert!(size - taken(server.dir()) >= RESERVE, "after cell {n}");
    }
    for n in 0..60 {
        assert!(server.read(ino, n * CELL, CELL as u32).await.unwrap() == pattern(n as u8, CELL as usize), "cell {n}");
        assert!(size - taken(server.dir()) >= RESERVE, "after reading cell {n}");
    }
    server.flush_all().await.unwrap();
    assert!(server.usage().room > 0);
    // Others take the rest: nothing is left to be flushed, so nobody is kept waiting.
    others.store(size, SeqCst);
    server.evict_all();
    assert_eq!(server.usage().room, 0);
    assert_eq!(server.write(ino, 0, pattern(1, CELL as usize), false).await, Err(FsError::CacheFull));
    assert_eq!(FsError::CacheFull.errno(), libc::ENOSPC);
    assert!(server.read(ino, 0, CELL as u32).await.unwrap() == pattern(0, CELL as usize), "reads go past the cache");
    assert_eq!(server.usage().clean, 0);
}

#[tokio::test]
async fn clean_bytes_that_were_cut_off_are_fetched_again() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("file");
    let data = pattern(5, 3 * CELL as usize);
    server.write(ino, 0, data.clone(), false).await.unwrap();
    server.flush(ino).await.unwrap();
    for left in [2 * CELL + 5, 100, 0] {
        cut(&server, ino, left);
        assert!(server.read(ino, 0, 3 * CELL as u32).await.unwrap() == data, "cut to {left}");
        cut(&server, ino, left);
        // A piece of a cell is written over what was cut off.
        server.write(ino, CELL + 7, data.slice(CELL as usize + 7..CELL as usize + 50), false).await.unwrap();
        server.flush(ino).await.unwrap();
        assert!(server.read(ino, 0, 3 * CELL as u32).await.unwrap() == data, "cut to {left}, written");
    }
    std::fs::remove_dir_all(server.dir().join("tier")).unwrap();
    let other = cluster.make("other");
    server.write(other, 0, data.clone(), false).await.unwrap();
    assert!(server.read(other, 0, 3 * CELL as u32).await.unwrap() == data);
    assert!(server.read(ino, 0, 3 * CELL as u32).await.unwrap() == data);
    server.flush(other).await.unwrap();
}

#[tokio::test]
async fn lost_writes_are_told_once_and_read_as_an_error_or_the_older_bytes() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("file");
    let old = pattern(1, CELL as usize);
    server.write(ino, 0, old.clone(), false).await.unwrap();
    server.flush(ino).await.unwrap();
    server.write(ino, 0, pattern(2, 2 * CELL as usize), false).await.unwrap();
    cut(&server, ino, 0);
    for _ in 0..2 {
        assert_eq!(server.read(ino, 0, 100).await.unwrap_err().errno(), libc::EIO);
    }
    assert!(matches!(server.flush(ino).await, Err(FsError::LostWrites { .. })));
    assert!(matches!(server.take_error(ino), Some(FsError::LostWrites { .. })));
    assert_eq!(server.flush(ino).await, Ok(()));
    assert_eq!(server.take_error(ino), None);
    assert!(server.read(ino, 0, 2 * CELL as u32).await.unwrap() == old, "the file did not grow by zeros");
    server.write(ino, 0, pattern(3, CELL as usize), false).await.unwrap();
    server.flush(ino).await.unwrap();
    assert!(server.read(ino, 0, 2 * CELL as u32).await.unwrap() == pattern(3, CELL as usize));
    assert_eq!(server.dirty_bytes(), 0);
}

#[tokio::test]
async fn a_background_flush_keeps_the_news_of_lost_writes_for_the_next_fsync() {
    let cluster = Cluster::new();
    let settings = ContentSettings { dirty_age_max: Duration::ZERO, ..ContentSettings::default() };
    let server = cluster.server_with(1 << 24, settings);
    let ino = cluster.make("file");
    server.opened(ino, true);
    server.claim(ino).await.unwrap();
    // On a runtime of one thread nothing runs in the background before the first wait.
    server.write(ino, 0, pattern(2, CELL as usize), false).now_or_never().unwrap().unwrap();
    cut(&server, ino, 0);
    let flushed = async {
        while server.shared.inode(ino).unwrap().has_pending() {
            server.shared.drained.notified().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), flushed).await.unwrap();
    assert_eq!(server.flush(ino).await, Ok(()));
    assert!(matches!(server.take_error(ino), Some(FsError::LostWrites { .. })));
}

#[tokio::test]
async fn past_the_largest_cache_file_sizes_and_holes_work_and_writes_are_too_big() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 24);
    let ino = cluster.make("file");
    let far = 20 << 40;
    server.write(ino, 0, pattern(1, 50_000), false).await.unwrap();
    server.truncate(ino, SetAttr { size: Some(far), ..SetAttr::default() }).await.unwrap();
    assert!(server.read(ino, 0, 50_000).await.unwrap() == pattern(1, 50_000));
    assert_eq!(server.read(ino, far - 10, 100).await.unwrap(), [0; 10][..]);
    // ext4 ends at 16 TiB; XFS and others take it.
    match server.write(ino, far - 50_000, pattern(2, 50_000), false).await {
        Ok(_) => assert!(server.read(ino, far - 50_000, 50_000).await.unwrap() == pattern(2, 50_000)),
        Err(error) => assert_eq!(error.errno(), libc::EFBIG),
    }
    server.flush(ino).await.unwrap();
    assert_eq!(cluster.attr(ino).size, far);
    server.truncate(ino, SetAttr { size: Some(10), ..SetAttr::default() }).await.unwrap();
    assert!(server.read(ino, 0, 100).await.unwrap() == pattern(1, 50_000)[..10]);
}
