//! What writers hear of quotas, and what becomes of bytes that are over one.

use ctfs_meta::{NewContent, NewNode, Quota, RenameMode, Reply};

use super::*;

const MIB: u64 = 1 << 20;

fn limit(cluster: &Cluster, dir: Ino, bytes: u64) {
    cluster.apply(Op::SetQuota { ino: dir, quota: Quota { bytes: Some(bytes), files: None } }).unwrap();
}

fn allocated(cluster: &Cluster) -> u64 {
    cluster.replica().read().totals(Ino::ROOT).unwrap().unwrap().allocated
}

fn is_refused<T: std::fmt::Debug>(answer: &Result<T, FsError>) -> bool {
    matches!(answer, Err(error) if error.errno() == libc::EDQUOT)
}

/// Writes pieces until one is refused; how far it came.
async fn fill(server: &harness::Server, ino: Ino, piece: usize) -> u64 {
    let mut at = 0;
    loop {
        match server.write(ino, at, pattern(1, piece), false).await {
            Ok(written) => at += u64::from(written),
            refused => {
                assert!(is_refused(&refused), "{refused:?}");
                return at;
            }
        }
        assert!(at < 1 << 30, "a quota ends every write");
    }
}

#[tokio::test]
async fn a_writer_fills_a_quota_to_the_last_block_and_close_finds_room_for_all() {
    for (bytes, piece) in [(MIB, 100_000), (3 * MIB, 1 << 20), (CELL + 4096, 4096), (8192, 1 << 20), (40_960, 777)] {
        let cluster = Cluster::new();
        let server = cluster.server(1 << 26);
        limit(&cluster, Ino::ROOT, bytes);
        let ino = cluster.make("file");
        assert_eq!(fill(&server, ino, piece).await, bytes, "{piece} bytes at a time");
        server.flush(ino).await.unwrap();
        assert_eq!(server.take_error(ino), None);
        assert_eq!((allocated(&cluster), cluster.attr(ino).size), (bytes, bytes));
        // In place there is room for ever.
        server.write(ino, 5000.min(bytes - 100), pattern(2, 100), false).await.unwrap();
        server.flush(ino).await.unwrap();
    }
}

#[tokio::test]
async fn what_other_files_have_buffered_counts() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 26);
    limit(&cluster, Ino::ROOT, MIB);
    let (first, second) = (cluster.make("first"), cluster.make("second"));
    server.write(first, 0, pattern(1, 600_000), false).await.unwrap();
    // 600,000 bytes are 147 blocks of 256.
    assert_eq!(fill(&server, second, 50_000).await, 109 * 4096);
    server.flush(first).await.unwrap();
    server.flush(second).await.unwrap();
    assert_eq!(allocated(&cluster), MIB);
}

#[tokio::test]
async fn small_files_fill_a_quota_to_the_last_sector() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 26);
    limit(&cluster, Ino::ROOT, 4096 + 512);
    for n in 0..9 {
        let ino = cluster.make(&n.to_string());
        server.write(ino, 0, pattern(1, 300), false).await.unwrap();
        if n % 2 == 0 {
            server.flush(ino).await.unwrap();
        }
    }
    let last = cluster.make("last");
    assert!(is_refused(&server.write(last, 0, pattern(1, 1), false).await));
    server.flush_all().await.unwrap();
    assert_eq!(allocated(&cluster), 4096 + 512);
}

#[tokio::test]
async fn zeros_and_holes_take_no_room() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 26);
    limit(&cluster, Ino::ROOT, 4096);
    let ino = cluster.make("file");
    for n in 0..8 {
        assert_eq!(server.write(ino, n * MIB, vec![0; 1 << 20].into(), false).await, Ok(1 << 20));
    }
    assert_eq!(server.write(ino, 1 << 40, pattern(1, 10), false).await, Ok(10));
    server.truncate(ino, SetAttr { size: Some(1 << 50), ..SetAttr::default() }).await.unwrap();
    server.flush(ino).await.unwrap();
    assert_eq!(allocated(&cluster), 4096);
}

#[tokio::test]
async fn what_is_deleted_or_cut_off_makes_room() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 26);
    limit(&cluster, Ino::ROOT, MIB);
    let (file, next) = (cluster.make("file"), cluster.make("next"));
    assert_eq!(fill(&server, file, 1 << 18).await, MIB);
    assert!(is_refused(&server.write(next, 0, pattern(1, 1), false).await));
    server.truncate(file, SetAttr { size: Some(MIB - 8192), ..SetAttr::default() }).await.unwrap();
    assert_eq!(fill(&server, next, 1 << 18).await, 8192);
    cluster.apply(Op::Unlink { parent: Ino::ROOT, name: FileName::new(b"file").unwrap() }).unwrap();
    assert_eq!(fill(&server, next, 1 << 18).await, MIB);
    server.flush(next).await.unwrap();
}

#[tokio::test]
async fn bytes_over_a_quota_are_never_acknowledged_and_do_not_stay() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.server(1 << 26), cluster.server(1 << 26));
    limit(&cluster, Ino::ROOT, MIB);
    let (mine, other) = (cluster.make("mine"), cluster.make("other"));
    a.write(mine, 0, pattern(1, 3 * CELL as usize), false).await.unwrap();
    b.write(other, 0, pattern(2, 3 * CELL as usize), false).await.unwrap();
    a.flush(mine).await.unwrap();
    let refused = b.flush(other).await;
    assert!(is_refused(&refused), "{refused:?}");
    assert_eq!(b.take_error(other), refused.err());
    // What fits is kept, and the file ends with it.
    assert_eq!((allocated(&cluster), cluster.attr(other).size), (MIB, CELL));
    assert_eq!((b.dirty_bytes(), b.read(other, 0, 1 << 20).await.unwrap().len() as u64), (0, CELL));
    b.flush(other).await.unwrap();
    assert_eq!(b.take_error(other), None, "told once");
    cluster.apply(Op::Unlink { parent: Ino::ROOT, name: FileName::new(b"mine").unwrap() }).unwrap();
    assert_eq!(fill(&b, other, 1 << 18).await, MIB);
}

#[tokio::test]
async fn a_flush_that_nobody_asked_for_keeps_the_refusal_to_be_told() {
    let cluster = Cluster::new();
    let settings = ContentSettings { dirty_age_max: Duration::ZERO, ..ContentSettings::default() };
    let server = cluster.server_with(1 << 26, settings);
    let ino = cluster.make("file");
    server.opened(ino, true);
    server.write(ino, 0, pattern(1, 100_000), false).await.unwrap();
    // Less than is buffered already.
    limit(&cluster, Ino::ROOT, 50_000);
    let ended = async {
        while server.shared.pending.lock().contains_key(&ino) {
            server.shared.drained.notified().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap();
    server.flush(ino).await.unwrap();
    assert!(is_refused(&server.take_error(ino).map_or(Ok(()), Err)));
    assert_eq!(cluster.attr(ino).size, 0);
}

#[tokio::test]
async fn a_copy_is_cut_off_where_room_ends() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 26);
    let node = NewNode {
        content: NewContent::Directory,
        mode: 0o755,
        umask: 0,
        uid: 0,
        gid: 0,
        exclusive: true,
        holder: None,
        ino: None,
        cell: None,
    };
    let name = |text: &str| FileName::new(text.as_bytes()).unwrap();
    let Reply::Entry { attr: dir, .. } = cluster.apply(Op::Make { parent: Ino::ROOT, name: name("dir"), node }).unwrap() else {
        panic!("a directory is made");
    };
    let (source, target) = (cluster.make("source"), cluster.make("target"));
    let rename = Op::Rename { from: Ino::ROOT, name: name("target"), to: dir.ino, new_name: name("t"), mode: RenameMode::Replace };
    cluster.apply(rename).unwrap();
    let data = pattern(1, 20 * CELL as usize);
    server.write(source, 0, data.clone(), false).await.unwrap();
    let most = 5 * CELL + 3 * 4096;
    limit(&cluster, dir.ino, most);
    let mut done = 0;
    let refused = loop {
        match server.copy(source, done, target, done, 20 * CELL).await {
            Ok(copied) => done += copied,
            refused => break refused,
        }
        assert!(done < 20 * CELL, "a quota ends the copy");
    };
    assert!(is_refused(&refused), "{refused:?}");
    server.flush(target).await.unwrap();
    assert_eq!((done, cluster.attr(target).size), (most, most));
    assert!(server.read(target, 0, most as u32).await.unwrap() == data[..most as usize]);
}

#[tokio::test]
async fn fallocate_refuses_what_could_not_be_written() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 26);
    limit(&cluster, Ino::ROOT, MIB);
    let ino = cluster.make("file");
    assert!(is_refused(&server.allocate(ino, 0, 0, MIB + 1).await));
    assert_eq!(cluster.attr(ino).size, 0);
    server.allocate(ino, 0, 0, MIB).await.unwrap();
    assert_eq!(fill(&server, ino, 1 << 18).await, MIB);
    server.allocate(ino, 0, 0, MIB).await.unwrap();
}

#[tokio::test]
async fn an_append_answers_how_much_of_it_fitted() {
    let cluster = Cluster::new();
    let server = cluster.server(1 << 26);
    limit(&cluster, Ino::ROOT, 8192);
    let ino = cluster.make("file");
    server.append(ino, pattern(1, 5000), false).await.unwrap();
    let appended = server.content.append(ino, pattern(2, 5000), false, Pages::Unlocked).await;
    assert_eq!(appended, Ok((5000, 3192)));
    assert!(is_refused(&server.append(ino, pattern(3, 1), false).await));
}
