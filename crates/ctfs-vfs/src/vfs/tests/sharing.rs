//! One file on several servers.

use bytes::Bytes;
use ctfs_types::FileUse;

use super::*;
use crate::LockRequest;

async fn append(vfs: &Vfs, ino: Ino, handle: HandleId, bytes: &[u8]) {
    let written = vfs.write(Caller::ROOT, ino, handle, 0, Bytes::copy_from_slice(bytes), false, false).await.unwrap();
    assert_eq!(written as usize, bytes.len());
}

#[tokio::test]
async fn every_read_sees_every_completed_write_on_whichever_server() {
    let world = World::new(3);
    let ino = file(world.vfs(0), ROOT, "f", b"start").await.ino;
    let mut handles = Vec::new();
    for server in 0..3 {
        handles.push(open(world.vfs(server), ino, libc::O_RDWR).await);
    }
    // No flush, no close: a write that was answered is seen.
    for round in 0..12u8 {
        let writer = usize::from(round) % 3;
        write(world.vfs(writer), ino, handles[writer], u64::from(round), &[b'a' + round]).await;
        for reader in 0..3 {
            let seen = read(world.vfs(reader), ino, handles[reader]).await;
            assert_eq!(seen[usize::from(round)], b'a' + round, "round {round}, server {reader}");
            assert_eq!(world.vfs(reader).getattr(ino).await.unwrap().size, u64::from(round).max(4) + 1);
        }
    }
}

#[tokio::test]
async fn size_and_time_of_a_file_being_written_are_seen_everywhere_and_leave_it_to_its_writer() {
    let world = World::new(2);
    let (attr, opened) =
        world.vfs(0).create(Caller::ROOT, ROOT, b"log", 0o644, 0, libc::O_WRONLY | libc::O_APPEND).await.unwrap();
    for lines in 1..5u64 {
        append(world.vfs(0), attr.ino, opened.handle, b"line\n").await;
        let (here, there) =
            (world.vfs(0).getattr(attr.ino).await.unwrap(), world.vfs(1).getattr(attr.ino).await.unwrap());
        assert_eq!((there.size, there.mtime), (lines * 5, here.mtime));
        assert!(!world.vfs(1).may_cache(&there), "its writer tells nobody of the next line");
        assert!(matches!(there.usage, FileUse::Owned { .. }), "looking does not take it away");
    }
    assert_eq!(content(world.vfs(1), attr.ino).await, b"line\n".repeat(4));
}

#[tokio::test]
async fn appends_of_several_servers_never_overlap() {
    let world = World::new(3);
    let ino = file(world.vfs(0), ROOT, "log", b"").await.ino;
    let writers = (0..3usize).map(|server| {
        let vfs = world.vfs(server).clone();
        tokio::spawn(async move {
            let handle = open(&vfs, ino, libc::O_WRONLY | libc::O_APPEND).await;
            for line in 0..40 {
                append(&vfs, ino, handle, format!("{server} {line:03}\n").as_bytes()).await;
            }
            vfs.flush(ino, handle, 1).await.unwrap();
            vfs.release(handle).await;
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    for server in 0..3 {
        let text = String::from_utf8(content(world.vfs(server), ino).await).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 120);
        for writer in 0..3 {
            let own: Vec<String> = lines.iter().filter(|line| line.starts_with(&writer.to_string())).map(|l| (*l).to_owned()).collect();
            let expected: Vec<String> = (0..40).map(|line| format!("{writer} {line:03}")).collect();
            assert_eq!(own, expected, "lines of one writer are whole and in order");
        }
    }
}

#[tokio::test]
async fn a_file_opened_where_others_write_it_goes_direct_so_that_no_shared_mapping_is_possible() {
    let world = World::new(2);
    let (attr, first) = world.vfs(0).create(Caller::ROOT, ROOT, b"db", 0o644, 0, libc::O_RDWR).await.unwrap();
    assert!(!first.direct);
    write(world.vfs(0), attr.ino, first.handle, 0, b"page").await;
    let newcomer = world.vfs(1).open(Caller::ROOT, attr.ino, libc::O_RDWR).await.unwrap();
    assert!(newcomer.direct);
    // Also one that could be mapped and was not written yet.
    let ino = file(world.vfs(0), ROOT, "shm", b"x").await.ino;
    open(world.vfs(0), ino, libc::O_RDWR).await;
    assert!(world.vfs(1).open(Caller::ROOT, ino, libc::O_RDWR).await.unwrap().direct);
}

#[tokio::test]
async fn a_file_that_is_closed_goes_back_to_everybody() {
    let world = World::new(2);
    let ino = file(world.vfs(0), ROOT, "f", b"one").await.ino;
    // The next one does not find it shared.
    let opened = world.vfs(1).open(Caller::ROOT, ino, libc::O_RDWR).await.unwrap();
    assert!(!opened.direct);
    write(world.vfs(1), ino, opened.handle, 0, b"two").await;
    assert_eq!(content(world.vfs(0), ino).await, b"two");
}

#[tokio::test]
async fn truncating_elsewhere_comes_after_every_completed_write() {
    let world = World::new(2);
    let (attr, opened) = world.vfs(0).create(Caller::ROOT, ROOT, b"f", 0o644, 0, libc::O_RDWR).await.unwrap();
    write(world.vfs(0), attr.ino, opened.handle, 0, b"0123456789").await;
    let set = crate::SetAttrRequest { size: Some(4), ..Default::default() };
    assert_eq!(world.vfs(1).setattr(Caller::ROOT, attr.ino, set).await.unwrap().size, 4);
    assert_eq!(read(world.vfs(0), attr.ino, opened.handle).await, b"0123");
    write(world.vfs(0), attr.ino, opened.handle, 6, b"x").await;
    assert_eq!(content(world.vfs(1), attr.ino).await, b"0123\0\0x");
}

/// The kernel writes back what it has of a page when another server's change takes the page from it.
async fn write_back(vfs: &Vfs, ino: Ino, handle: HandleId, offset: u64, page: &[u8]) {
    let written = vfs.write(Caller::ROOT, ino, handle, offset, Bytes::copy_from_slice(page), false, true).await.unwrap();
    assert_eq!(written as usize, page.len(), "the kernel keeps no page for what is past the end");
}

#[tokio::test]
async fn a_mapping_that_is_written_back_late_makes_no_file_longer() {
    let world = World::new(2);
    let (attr, mapped) = world.vfs(0).create(Caller::ROOT, ROOT, b"f", 0o644, 0, libc::O_RDWR).await.unwrap();
    let ino = attr.ino;
    write(world.vfs(0), ino, mapped.handle, 0, &[b'a'; 10_000]).await;
    let set = crate::SetAttrRequest { size: Some(5000), ..Default::default() };
    world.vfs(1).setattr(Caller::ROOT, ino, set).await.unwrap();
    // Shared or not.
    for other in [None, Some(open(world.vfs(1), ino, libc::O_RDWR).await)] {
        write_back(world.vfs(0), ino, mapped.handle, 8192, &[b'm'; 1808]).await;
        write_back(world.vfs(0), ino, mapped.handle, 4096, &[b'm'; 4096]).await;
        for server in 0..2 {
            assert_eq!(world.vfs(server).getattr(ino).await.unwrap().size, 5000, "server {server}");
        }
        if let Some(other) = other {
            write(world.vfs(1), ino, other, 5000, b"appended").await;
            assert_eq!(content(world.vfs(0), ino).await, [&[b'a'; 4096][..], &[b'm'; 904], b"appended"].concat());
        }
    }
}

#[tokio::test]
async fn a_copy_from_a_file_being_written_has_every_completed_write() {
    let world = World::new(2);
    let (attr, opened) = world.vfs(0).create(Caller::ROOT, ROOT, b"f", 0o644, 0, libc::O_RDWR).await.unwrap();
    let bytes = vec![7; 3 << 20];
    write(world.vfs(0), attr.ino, opened.handle, 0, &bytes).await;
    let (copy, target) = world.vfs(1).create(Caller::ROOT, ROOT, b"g", 0o644, 0, libc::O_RDWR).await.unwrap();
    let source = open(world.vfs(1), attr.ino, libc::O_RDONLY).await;
    let vfs = world.vfs(1);
    let copied = vfs.copy_file_range((attr.ino, source, 0), (copy.ino, target.handle, 0), 3 << 20).await.unwrap();
    assert_eq!(copied, 3 << 20);
    assert_eq!(content(world.vfs(0), copy.ino).await.len(), 1 << 20, "as much as one read gives");
    assert_eq!(world.vfs(0).getattr(copy.ino).await.unwrap().size, 3 << 20);
}

#[tokio::test]
async fn a_holder_that_cannot_be_asked_is_waited_for_in_bounded_time() {
    let mut settings = VfsSettings::default();
    settings.content.holder_patience = std::time::Duration::from_millis(400);
    let world = World::with(2, settings);
    let (attr, opened) = world.vfs(0).create(Caller::ROOT, ROOT, b"f", 0o644, 0, libc::O_RDWR).await.unwrap();
    write(world.vfs(0), attr.ino, opened.handle, 0, b"held").await;
    world.servers[0].meta.cut_off();
    let error = world.vfs(1).open(Caller::ROOT, attr.ino, libc::O_RDONLY).await.unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    let handle = open(world.vfs(1), file(world.vfs(1), ROOT, "other", b"fine").await.ino, libc::O_RDONLY).await;
    world.vfs(1).release(handle).await;
}

#[tokio::test]
async fn a_server_whose_life_was_ended_loses_what_it_had_not_flushed_and_says_so() {
    let world = World::new(2);
    world.found().await;
    let (attr, opened) = world.vfs(0).create(Caller::ROOT, ROOT, b"f", 0o644, 0, libc::O_RDWR).await.unwrap();
    write(world.vfs(0), attr.ino, opened.handle, 0, b"safe").await;
    world.vfs(0).fsync(attr.ino, opened.handle).await.unwrap();
    write(world.vfs(0), attr.ino, opened.handle, 4, b"not safe").await;
    let locked = open(world.vfs(0), attr.ino, libc::O_RDWR).await;
    let request = LockRequest { owner: 5, exclusive: true, start: 0, end: 9, pid: 1 };
    world.vfs(0).setlk(attr.ino, locked, request, false, 1).await.unwrap();

    let fence = ctfs_meta::Op::Fence { node: ctfs_types::NodeId(1), incarnation: ctfs_types::Incarnation(1) };
    world.servers[1].meta.propose(fence).await.unwrap();
    world.vfs(0).life_ended().await;

    assert_eq!(content(world.vfs(1), attr.ino).await, b"safe", "what was synced is there, and no more");
    let handle = open(world.vfs(1), attr.ino, libc::O_RDWR).await;
    world.vfs(1).setlk(attr.ino, handle, request, false, 1).await.expect("the lock is free");
    let error = world.vfs(0).fsync(attr.ino, opened.handle).await.unwrap_err();
    assert!(matches!(error, FsError::LostWrites { .. }), "{error}");
    let error = world.vfs(0).read_file(attr.ino, locked, 0, 10).await.unwrap_err();
    assert_eq!(error, FsError::LostLocks(attr.ino), "who believed to hold the lock does not go on");
}

/// The mark of a truncate in doubt outlived its life, and hid what the next one wrote past the size.
#[tokio::test]
async fn a_new_life_knows_nothing_of_what_was_in_doubt_in_the_old_one() {
    for seed in 0..8 {
        let world = World::new(2);
        world.found().await;
        let ino = file(world.vfs(0), ROOT, "f", &[b'x'; 20_000]).await.ino;
        let before = open(world.vfs(0), ino, libc::O_RDWR).await;
        write(world.vfs(0), ino, before, 15_000, &[b'y'; 1000]).await;
        world.cluster.seed(seed);
        world.cluster.set_weather(memory::Weather { lost: 256, ..Default::default() });
        let set = crate::SetAttrRequest { size: Some(100), ..Default::default() };
        assert_eq!(world.vfs(0).setattr(Caller::ROOT, ino, set).await.unwrap_err().errno(), libc::EIO);
        world.cluster.set_weather(memory::Weather::default());

        let fence = ctfs_meta::Op::Fence { node: ctfs_types::NodeId(1), incarnation: ctfs_types::Incarnation(1) };
        world.servers[1].meta.propose(fence).await.unwrap();
        world.vfs(0).life_ended().await;
        world.servers[0].meta.begin_life(ctfs_types::Incarnation(101)).await;

        let size = world.vfs(0).getattr(ino).await.unwrap().size;
        assert!(size == 100 || size == 20_000, "{size}");
        let handle = open(world.vfs(0), ino, libc::O_RDWR).await;
        write(world.vfs(0), ino, handle, 30_000, b"the new life's").await;
        assert_eq!(world.vfs(0).getattr(ino).await.unwrap().size, 30_014);
        assert_eq!(world.vfs(0).read_file(ino, handle, 30_000, 100).await.unwrap(), &b"the new life's"[..]);
    }
}

/// Where the end is was asked of the metadata by what is written through, and of the buffered bytes
/// by what is buffered; both at once on one server placed records over each other.
#[tokio::test]
async fn appends_stay_whole_while_a_shared_file_is_taken_again() {
    let mut settings = VfsSettings::default();
    settings.content.shared_for = std::time::Duration::from_millis(1);
    let world = World::with(2, settings);
    world.cluster.set_weather(memory::Weather { pauses: 4, ..Default::default() });
    for round in 0..40 {
        let name = format!("log-{round}");
        let (attr, first) = world.vfs(0).create(Caller::ROOT, ROOT, name.as_bytes(), 0o644, 0, libc::O_WRONLY | libc::O_APPEND).await.unwrap();
        let other = open(world.vfs(1), attr.ino, libc::O_WRONLY | libc::O_APPEND).await;
        append(world.vfs(1), attr.ino, other, b"shared--").await;
        let appends = |writer: char| {
            let vfs = world.vfs(0);
            async move {
                for record in 0..20 {
                    append(vfs, attr.ino, first.handle, format!("{writer}-{record:05}\n").as_bytes()).await;
                }
            }
        };
        tokio::join!(appends('a'), appends('b'), appends('c'));
        let text = content(world.vfs(1), attr.ino).await;
        let records: std::collections::BTreeSet<&[u8]> = text.chunks(8).collect();
        assert_eq!((text.len(), records.len()), (61 * 8, 61), "round {round}: {}", String::from_utf8_lossy(&text));
    }
}

#[tokio::test]
async fn a_hole_that_could_not_be_punched_is_not_punched_later_over_what_others_write() {
    let world = World::new(2);
    let ino = file(world.vfs(0), ROOT, "f", &[b'x'; 8000]).await.ino;
    let here = open(world.vfs(0), ino, libc::O_RDWR).await;
    let there = open(world.vfs(1), ino, libc::O_RDWR).await;
    write(world.vfs(1), ino, there, 0, b"shared").await;
    world.cluster.set_weather(memory::Weather { failed_puts: 256, ..Default::default() });
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    assert_eq!(world.vfs(0).fallocate(ino, here, 100, 5000, mode).await.unwrap_err().errno(), libc::EIO);
    world.cluster.set_weather(memory::Weather::default());
    write(world.vfs(1), ino, there, 1000, b"theirs").await;
    world.vfs(0).fsync(ino, here).await.unwrap();
    assert_eq!(&content(world.vfs(1), ino).await[998..1008], b"xxtheirsxx");
}

/// A truncate without an answer had happened, and the flush of what was written before it brought
/// the end of the file back.
#[tokio::test]
async fn a_truncate_without_an_answer_happened_or_did_not_and_stays_so() {
    for seed in 0..12 {
        let world = World::new(2);
        let ino = file(world.vfs(0), ROOT, "f", &[b'x'; 20_000]).await.ino;
        let handle = open(world.vfs(0), ino, libc::O_RDWR).await;
        write(world.vfs(0), ino, handle, 15_000, &[b'y'; 1000]).await;
        let old = read(world.vfs(0), ino, handle).await;
        world.cluster.seed(seed);
        world.cluster.set_weather(memory::Weather { lost: 256, ..Default::default() });
        let set = crate::SetAttrRequest { size: Some(100), ..Default::default() };
        assert_eq!(world.vfs(0).setattr(Caller::ROOT, ino, set).await.unwrap_err().errno(), libc::EIO);
        world.cluster.set_weather(memory::Weather::default());
        let seen = read(world.vfs(0), ino, handle).await;
        assert!(seen == old || seen == old[..100], "{} bytes", seen.len());
        assert_eq!(world.vfs(0).getattr(ino).await.unwrap().size, seen.len() as u64);
        write(world.vfs(0), ino, handle, 120, b"later").await;
        let later = read(world.vfs(0), ino, handle).await;
        assert_eq!(later.len(), seen.len().max(125));
        world.vfs(0).fsync(ino, handle).await.unwrap();
        assert!(content(world.vfs(1), ino).await == later);
    }
}
