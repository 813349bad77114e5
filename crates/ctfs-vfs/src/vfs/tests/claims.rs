//! POSIX, as one server and as several keep it.

use std::collections::BTreeSet;

use ctfs_types::Timestamp;
use futures_util::FutureExt;

use super::*;
use crate::{SetAttrRequest, SetTime};

pub fn errno<T: std::fmt::Debug>(result: Result<T, FsError>) -> i32 {
    result.expect_err("refused").errno()
}

fn chmod(mode: u32) -> SetAttrRequest {
    SetAttrRequest { mode: Some(mode), ..SetAttrRequest::default() }
}

#[tokio::test]
async fn close_on_one_server_then_open_on_another_sees_the_bytes() {
    let world = World::new(2);
    let big: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    let small = file(world.vfs(0), ROOT, "small", b"hello").await;
    let large = file(world.vfs(0), ROOT, "large", &big).await;
    assert_eq!(content(world.vfs(1), small.ino).await, b"hello");
    assert_eq!(content(world.vfs(1), large.ino).await, big);
}

#[tokio::test]
async fn an_unlinked_file_stays_readable_and_writable_while_it_is_open() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"before").await.ino;
    let handle = open(vfs, ino, libc::O_RDWR).await;
    vfs.unlink(ROOT, b"f").await.unwrap();
    assert_eq!(errno(vfs.lookup(ROOT, b"f").await), libc::ENOENT);
    assert_eq!(read(vfs, ino, handle).await, b"before");
    write(vfs, ino, handle, 0, b"AFTER!").await;
    vfs.fsync(ino, handle).await.unwrap();
    assert_eq!(read(vfs, ino, handle).await, b"AFTER!");
    assert_eq!(vfs.getattr(ino).await.unwrap().nlink, 0);

    assert_eq!(vfs.open_orphans(&[ino]), [true]);
    vfs.release(handle).await;
    assert_eq!(vfs.open_orphans(&[ino]), [false]);
    assert_eq!(errno(vfs.open(Caller::ROOT, ino, libc::O_RDONLY).await), libc::ESTALE);
}

#[tokio::test]
async fn rename_over_an_open_file_keeps_reads_working() {
    let world = World::new(2);
    let old = file(world.vfs(0), ROOT, "config", b"old").await.ino;
    let reader = open(world.vfs(0), old, libc::O_RDONLY).await;
    let new = file(world.vfs(1), ROOT, "config.new", b"new").await.ino;
    world.vfs(1).rename(ROOT, b"config.new", ROOT, b"config", 0).await.unwrap();
    assert_eq!(read(world.vfs(0), old, reader).await, b"old");
    assert_eq!(world.vfs(0).lookup(ROOT, b"config").await.unwrap().ino, new);
    assert_eq!(content(world.vfs(0), new).await, b"new");
}

#[tokio::test]
async fn rename_flags_mean_what_renameat2_says() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let (a, b) = (file(vfs, ROOT, "a", b"a").await.ino, file(vfs, ROOT, "b", b"b").await.ino);
    assert_eq!(errno(vfs.rename(ROOT, b"a", ROOT, b"b", libc::RENAME_NOREPLACE).await), libc::EEXIST);
    vfs.rename(ROOT, b"a", ROOT, b"b", libc::RENAME_EXCHANGE).await.unwrap();
    assert_eq!(vfs.lookup(ROOT, b"a").await.unwrap().ino, b);
    assert_eq!(vfs.lookup(ROOT, b"b").await.unwrap().ino, a);
    assert_eq!(errno(vfs.rename(ROOT, b"a", ROOT, b"b", libc::RENAME_WHITEOUT).await), libc::EINVAL);
}

#[tokio::test]
async fn a_listing_survives_inserts_and_removals_in_between() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let stay: BTreeSet<String> = (0..40).map(|n| format!("stays-{n}")).collect();
    for name in &stay {
        file(vfs, ROOT, name, b"").await;
        file(vfs, ROOT, &name.replace("stays", "goes"), b"").await;
    }
    let (mut seen, mut offset, mut round) = (Vec::new(), 0, 0);
    loop {
        let lines = vfs.readdir(ROOT, offset, 7, true).await.unwrap();
        let Some(last) = lines.last() else { break };
        offset = last.next;
        for line in &lines {
            assert!(line.attr.as_ref().is_some_and(|attr| attr.ino == line.ino));
            seen.push(String::from_utf8(line.name.clone()).unwrap());
        }
        let _ = vfs.unlink(ROOT, format!("goes-{round}").as_bytes()).await;
        if round < 20 {
            file(vfs, ROOT, &format!("new-{round}"), b"").await;
        }
        round += 1;
    }
    let unique: BTreeSet<String> = seen.iter().cloned().collect();
    assert_eq!(unique.len(), seen.len(), "nothing twice");
    assert!(stay.is_subset(&unique), "everything that stayed, once");
    assert_eq!(&seen[..2], [".", ".."]);
}

#[tokio::test]
async fn a_removed_entry_does_not_lose_the_place_of_a_listing() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    for name in ["a", "b", "c", "d"] {
        file(vfs, ROOT, name, b"").await;
    }
    let first = vfs.readdir(ROOT, 0, 4, false).await.unwrap();
    let last = first.last().unwrap();
    vfs.unlink(ROOT, &last.name).await.unwrap();
    let rest = vfs.readdir(ROOT, last.next, 10, false).await.unwrap();
    assert_eq!(first.len() + rest.len(), 6);
}

#[tokio::test]
async fn dot_dot_is_the_parent_and_of_the_root_the_root() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let dir = vfs.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    let inner = vfs.mkdir(Caller::ROOT, dir, b"e", 0o755, 0).await.unwrap().ino;
    let dots = |lines: Vec<crate::DirItem>| (lines[0].ino, lines[1].ino);
    assert_eq!(dots(vfs.readdir(inner, 0, 10, false).await.unwrap()), (inner, dir));
    assert_eq!(dots(vfs.readdir(ROOT, 0, 10, true).await.unwrap()), (ROOT, ROOT));
}

#[tokio::test]
async fn errors_are_the_ones_that_posix_names() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    let dir = vfs.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    file(vfs, dir, "inside", b"").await;
    assert_eq!(errno(vfs.lookup(ROOT, b"none").await), libc::ENOENT);
    assert_eq!(errno(vfs.lookup(ino, b"x").await), libc::ENOTDIR);
    assert_eq!(errno(vfs.lookup(ROOT, &[b'x'; 256]).await), libc::ENAMETOOLONG);
    assert_eq!(errno(vfs.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await), libc::EEXIST);
    assert_eq!(errno(vfs.rmdir(ROOT, b"d").await), libc::ENOTEMPTY);
    assert_eq!(errno(vfs.rmdir(ROOT, b"f").await), libc::ENOTDIR);
    assert_eq!(errno(vfs.unlink(ROOT, b"d").await), libc::EISDIR);
    assert_eq!(errno(vfs.rename(ROOT, b"d", dir, b"x", 0).await), libc::EINVAL);
    assert_eq!(errno(vfs.open(Caller::ROOT, dir, libc::O_RDWR).await), libc::EISDIR);
    assert_eq!(errno(vfs.opendir(ino).await), libc::ENOTDIR);
    assert_eq!(errno(vfs.readlink(ino).await), libc::EINVAL);
    assert_eq!(errno(vfs.read_file(ino, HandleId(99), 0, 1).await), libc::EBADF);
    assert_eq!(errno(vfs.getattr(Ino(1 << 40)).await), libc::ESTALE);
    assert_eq!(errno(vfs.symlink(Caller::ROOT, ROOT, b"s", &[b'x'; 5000]).await), libc::ENAMETOOLONG);
    let handle = open(vfs, ino, libc::O_RDONLY).await;
    let refused = vfs.write(Caller::ROOT, ino, handle, 0, Bytes::from_static(b"x"), false, false).await;
    assert_eq!(errno(refused), libc::EBADF);
}

#[tokio::test]
async fn a_name_somebody_made_meanwhile_is_not_opened_with_the_rights_of_its_maker() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    file(vfs, ROOT, "f", b"secret").await;
    let create = |flags| vfs.create(ALICE, ROOT, b"f", 0o644, 0o022, flags);
    assert_eq!(errno(create(libc::O_RDWR).await), libc::ESTALE, "the kernel looks again and checks its mode");
    assert_eq!(errno(create(libc::O_RDWR | libc::O_EXCL).await), libc::EEXIST);
}

#[tokio::test]
async fn a_new_file_gets_mode_less_umask_and_the_group_of_a_setgid_directory() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let plain = vfs.mknod(ALICE, ROOT, b"f", libc::S_IFREG | 0o666, 0o027, 0).await.unwrap();
    assert_eq!((plain.mode, plain.uid, plain.gid), (0o640, 1000, 1000));
    let dir = vfs.mkdir(Caller::ROOT, ROOT, b"shared", 0o777, 0).await.unwrap().ino;
    let owner = SetAttrRequest { gid: Some(50), ..SetAttrRequest::default() };
    vfs.setattr(Caller::ROOT, dir, owner).await.unwrap();
    vfs.setattr(Caller::ROOT, dir, chmod(0o2775)).await.unwrap();
    assert_eq!(vfs.mknod(ALICE, dir, b"f", libc::S_IFREG | 0o644, 0, 0).await.unwrap().gid, 50);
    let below = vfs.mkdir(ALICE, dir, b"d", 0o755, 0).await.unwrap();
    assert_eq!((below.gid, below.mode & 0o2000), (50, 0o2000));
}

#[tokio::test]
async fn chown_takes_setuid_and_setgid_from_a_file_and_not_from_a_directory() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    let dir = vfs.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    let chown = SetAttrRequest { uid: Some(7), ..SetAttrRequest::default() };
    vfs.setattr(Caller::ROOT, ino, chmod(0o6755)).await.unwrap();
    vfs.setattr(Caller::ROOT, dir, chmod(0o2755)).await.unwrap();
    assert_eq!(vfs.setattr(Caller::ROOT, ino, chown).await.unwrap().mode, 0o755);
    assert_eq!(vfs.setattr(Caller::ROOT, dir, chown).await.unwrap().mode, 0o2755);
}

#[tokio::test]
async fn a_write_by_another_user_takes_setuid_away_and_one_by_root_does_not() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"x").await.ino;
    vfs.setattr(Caller::ROOT, ino, chmod(0o6777)).await.unwrap();
    let handle = open(vfs, ino, libc::O_RDWR).await;
    write(vfs, ino, handle, 0, b"root").await;
    vfs.fsync(ino, handle).await.unwrap();
    assert_eq!(vfs.getattr(ino).await.unwrap().mode, 0o6777);
    vfs.write(ALICE, ino, handle, 0, Bytes::from_static(b"alice"), false, false).await.unwrap();
    assert_eq!(vfs.getattr(ino).await.unwrap().mode, 0o777, "at once");
    vfs.fsync(ino, handle).await.unwrap();
    assert_eq!(vfs.getattr(ino).await.unwrap().mode, 0o777, "and for good");

    vfs.setattr(Caller::ROOT, ino, chmod(0o4777)).await.unwrap();
    let truncate = SetAttrRequest { size: Some(0), ..SetAttrRequest::default() };
    assert_eq!(vfs.setattr(ALICE, ino, truncate).await.unwrap().mode, 0o777);
}

#[tokio::test]
async fn chmod_by_somebody_outside_the_group_loses_setgid() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    let give = SetAttrRequest { uid: Some(1000), gid: Some(50), ..SetAttrRequest::default() };
    vfs.setattr(Caller::ROOT, ino, give).await.unwrap();
    assert_eq!(vfs.setattr(ALICE, ino, chmod(0o2755)).await.unwrap().mode, 0o755);
    let member = Caller { gid: 50, ..ALICE };
    assert_eq!(vfs.setattr(member, ino, chmod(0o2755)).await.unwrap().mode, 0o2755);
}

#[tokio::test]
async fn times_are_kept_to_the_nanosecond_also_before_1970() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    let (atime, mtime) = (Timestamp::new(-5, 7), Timestamp::new(4_102_444_800, 999_999_999));
    let set = SetAttrRequest {
        atime: Some(SetTime::At(atime)),
        mtime: Some(SetTime::At(mtime)),
        ..SetAttrRequest::default()
    };
    let attr = vfs.setattr(Caller::ROOT, ino, set).await.unwrap();
    assert_eq!((attr.atime, attr.mtime), (atime, mtime));
}

#[tokio::test]
async fn open_with_o_trunc_empties_the_file_and_its_cache() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"old bytes").await.ino;
    let opened = vfs.open(Caller::ROOT, ino, libc::O_RDWR | libc::O_TRUNC).await.unwrap();
    assert!(!opened.keep_cache);
    assert_eq!(vfs.getattr(ino).await.unwrap().size, 0);
    assert_eq!(read(vfs, ino, opened.handle).await, b"");
}

#[tokio::test]
async fn pages_are_kept_while_the_file_is_unchanged_and_dropped_when_it_changed_elsewhere() {
    let world = World::new(2);
    let ino = file(world.vfs(0), ROOT, "f", b"one").await.ino;
    let open_again = async |server: usize| {
        let opened = world.vfs(server).open(Caller::ROOT, ino, libc::O_RDONLY).await.unwrap();
        world.vfs(server).release(opened.handle).await;
        opened.keep_cache
    };
    assert!(open_again(0).await, "its own bytes");
    assert!(!open_again(1).await, "never opened here");
    assert!(open_again(1).await);
    let handle = open(world.vfs(0), ino, libc::O_RDWR).await;
    write(world.vfs(0), ino, handle, 0, b"two").await;
    world.vfs(0).flush(ino, handle, 1).await.unwrap();
    world.vfs(0).release(handle).await;
    assert!(!open_again(1).await);
    world.vfs(1).distrust_pages();
    assert!(!open_again(1).await);
}

#[tokio::test]
async fn appends_of_one_server_never_overlap() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "log", b"").await.ino;
    let opened = vfs.open(Caller::ROOT, ino, libc::O_WRONLY | libc::O_APPEND).await.unwrap();
    assert!(opened.direct, "no pages that could hold a line in the wrong place");
    for _ in 0..100 {
        // The kernel's idea of the end is old each time.
        write(vfs, ino, opened.handle, 0, b"line\n").await;
    }
    assert_eq!(content(vfs, ino).await, b"line\n".repeat(100));
}

#[tokio::test]
async fn xattrs_of_every_namespace_are_kept_and_trusted_ones_hidden() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    let root = Caller::ROOT;
    for name in [&b"user.a"[..], b"trusted.b", b"security.c"] {
        vfs.setxattr(root, ino, name, name, 0).await.unwrap();
        assert_eq!(vfs.getxattr(root, ino, name).await.unwrap(), name);
    }
    let listed = |bytes: Vec<u8>| bytes.split(|&b| b == 0).filter(|n| !n.is_empty()).count();
    assert_eq!(listed(vfs.listxattr(root, ino).await.unwrap()), 3);
    assert_eq!(listed(vfs.listxattr(ALICE, ino).await.unwrap()), 2);
    assert_eq!(errno(vfs.getxattr(ALICE, ino, b"trusted.b").await), libc::ENODATA);
    assert_eq!(errno(vfs.setxattr(ALICE, ino, b"trusted.b", b"", 0).await), libc::EPERM);
    assert_eq!(errno(vfs.setxattr(root, ino, b"user.", b"", 0).await), libc::EINVAL);
    for name in [&b"foo"[..], b"system.other", b"ctfs.files"] {
        assert_eq!(errno(vfs.setxattr(root, ino, name, b"", 0).await), libc::EOPNOTSUPP);
    }
    assert_eq!(errno(vfs.setxattr(root, ino, b"user.a", b"", libc::XATTR_CREATE).await), libc::EEXIST);
    assert_eq!(errno(vfs.setxattr(root, ino, b"user.z", b"", libc::XATTR_REPLACE).await), libc::ENODATA);
    vfs.removexattr(root, ino, b"user.a").await.unwrap();
    assert_eq!(errno(vfs.getxattr(root, ino, b"user.a").await), libc::ENODATA);
    assert_eq!(errno(vfs.removexattr(root, ino, b"user.a").await), libc::ENODATA);
}

#[tokio::test]
async fn names_need_not_be_utf8() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let name = b"caf\xe9\x01\n";
    let ino = vfs.mkdir(Caller::ROOT, ROOT, name, 0o755, 0).await.unwrap().ino;
    assert_eq!(vfs.lookup(ROOT, name).await.unwrap().ino, ino);
    assert_eq!(vfs.readdir(ROOT, 0, 10, false).await.unwrap()[2].name, name);
}

#[tokio::test]
async fn a_directory_knows_how_much_is_below_it() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let dir = vfs.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    let inner = vfs.mkdir(Caller::ROOT, dir, b"e", 0o755, 0).await.unwrap().ino;
    file(vfs, dir, "a", b"12345").await;
    file(vfs, inner, "b", b"123").await;
    for (name, count) in [(&b"ctfs.files"[..], "2"), (b"ctfs.directories", "1"), (b"ctfs.bytes", "8")] {
        assert_eq!(vfs.getxattr(ALICE, dir, name).await.unwrap(), count.as_bytes());
    }
    assert_eq!(vfs.listxattr(ALICE, dir).await.unwrap(), b"");
}

#[tokio::test]
async fn the_durability_class_of_a_directory_is_an_attribute_that_root_sets_and_all_below_inherits() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let name = b"ctfs.durability";
    let dir = vfs.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    let file = file(vfs, dir, "a", b"12345").await.ino;
    assert_eq!(vfs.getxattr(ALICE, file, name).await.unwrap(), b"pair");
    assert_eq!(errno(vfs.setxattr(ALICE, dir, name, b"local", 0).await), libc::EPERM);
    assert_eq!(errno(vfs.setxattr(Caller::ROOT, dir, name, b"two", 0).await), libc::EINVAL);
    assert_eq!(errno(vfs.setxattr(Caller::ROOT, file, name, b"local", 0).await), libc::ENOTDIR);
    vfs.setxattr(Caller::ROOT, dir, name, b"local", 0).await.unwrap();
    assert_eq!(vfs.getxattr(ALICE, file, name).await.unwrap(), b"local");
    assert_eq!(vfs.getxattr(ALICE, ROOT, name).await.unwrap(), b"pair");
    vfs.removexattr(Caller::ROOT, dir, name).await.unwrap();
    assert_eq!(vfs.getxattr(ALICE, file, name).await.unwrap(), b"pair");
}

#[tokio::test]
async fn statfs_answers_from_local_state_also_when_nobody_else_does() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    file(vfs, ROOT, "f", &[1; 5000]).await;
    world.servers[0].meta.cut_off();
    let statfs = vfs.statfs(ROOT);
    assert_eq!(statfs.files_used, 2);
    assert_eq!(statfs.space.total, 100 << 30);
    assert!(vfs.getattr(ROOT).await.is_ok(), "stat of the mountpoint");
}

/// `df` and `ls -d` open a directory and do not list it; without a lease that took the five seconds
/// of a barrier.
#[tokio::test]
async fn cut_off_from_the_majority_a_directory_opens_at_once() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let dir = vfs.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    world.servers[0].meta.cut_off();
    for dir in [ROOT, dir] {
        let handle = vfs.opendir(dir).now_or_never().expect("waits for nobody").unwrap();
        vfs.releasedir(handle).await;
    }
    assert_eq!(errno(vfs.opendir(ino).await), libc::ENOTDIR);
}

#[tokio::test]
async fn a_failed_flush_is_reported_once_on_every_handle_that_was_open() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    let (a, b) = (open(vfs, ino, libc::O_RDWR).await, open(vfs, ino, libc::O_RDWR).await);
    write(vfs, ino, a, 0, b"x").await;
    world.servers[0].meta.cut_off();
    assert_eq!(errno(vfs.fsync(ino, a).await), libc::EIO);
    assert_eq!(errno(vfs.flush(ino, b, 1).await), libc::EIO);
}

#[tokio::test]
async fn writes_lost_with_the_cache_are_told_once_on_every_handle_and_never_read_as_zeros() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", &[1; 50_000]).await.ino;
    let (a, b) = (open(vfs, ino, libc::O_RDWR).await, open(vfs, ino, libc::O_RDWR).await);
    write(vfs, ino, a, 0, &[2; 100_000]).await;
    let cached = world.dir().join(format!("tier-1/{:02x}/{:02x}/{:x}", ino.0 & 0xff, ino.0 >> 8 & 0xff, ino.0));
    std::fs::OpenOptions::new().write(true).open(cached).unwrap().set_len(0).unwrap();
    for handle in [a, b] {
        assert_eq!(errno(vfs.fsync(ino, handle).await), libc::EIO);
        assert_eq!(vfs.fsync(ino, handle).await, Ok(()), "told once");
    }
    assert_eq!(read(vfs, ino, a).await, [1; 50_000]);
}

#[tokio::test]
async fn a_kernel_that_went_away_leaves_nothing_open() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    let handle = open(vfs, ino, libc::O_RDWR).await;
    write(vfs, ino, handle, 0, b"kept").await;
    vfs.disconnect().await;
    assert_eq!(vfs.open_handles(), 0);
    assert_eq!(content(vfs, ino).await, b"kept");
}

/// What was written here and what the metadata know are looked at one after the other, and a flush moves it across.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_file_that_only_grows_never_shows_an_older_size_or_time_while_it_is_flushed() {
    let world = World::new(1);
    let vfs = world.vfs(0).clone();
    let ino = file(&vfs, ROOT, "f", b"").await.ino;
    let handle = open(&vfs, ino, libc::O_RDWR).await;
    let (written, mut flushed) = tokio::sync::watch::channel(());
    let flusher = {
        let vfs = vfs.clone();
        tokio::spawn(async move {
            while flushed.changed().await.is_ok() {
                vfs.fsync(ino, handle).await.unwrap();
            }
        })
    };
    let mut before = vfs.getattr(ino).await.unwrap();
    for round in 0..5000u64 {
        write(&vfs, ino, handle, round, b"x").await;
        written.send_replace(());
        for look in 0..6 {
            let seen = match look % 3 {
                0 => vfs.getattr(ino).await.unwrap(),
                1 => vfs.lookup(ROOT, b"f").await.unwrap(),
                _ => {
                    let lines = vfs.readdir(ROOT, 0, 10, true).await.unwrap();
                    lines.into_iter().find_map(|line| (line.ino == ino).then_some(line.attr)).flatten().unwrap()
                }
            };
            assert_eq!(seen.size, round + 1, "round {round}, look {look}");
            assert!(seen.mtime >= before.mtime, "round {round}, look {look}");
            before = seen;
        }
    }
    drop(written);
    flusher.await.unwrap();
}
