//! What reads do on a server that is cut off, by policy.

use std::time::Duration;

use ctfs_meta::{OnPartition, Op, Policy};

use super::*;
use super::claims::errno;
use crate::LockRequest;

async fn set(world: &World, dir: Ino, on_partition: OnPartition) {
    let policy = Policy { on_partition: Some(on_partition), ..Policy::default() };
    world.servers[0].meta.propose_op(Op::SetPolicy { ino: dir, policy }).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_cut_off_answers_what_it_knew_last_and_changes_nothing() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let dir = vfs.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    let ino = file(vfs, dir, "f", b"content").await.ino;
    vfs.setxattr(Caller::ROOT, ino, b"user.x", b"y", 0).await.unwrap();
    assert_eq!((vfs.is_cut_off(), vfs.stale_reads()), (false, 0));
    world.servers[0].meta.cut_off();
    assert_eq!(vfs.lookup(dir, b"f").await.unwrap().ino, ino);
    assert!(vfs.is_cut_off());
    assert_eq!(vfs.getattr(ino).await.unwrap().size, 7);
    assert_eq!(vfs.getxattr(ALICE, ino, b"user.x").await.unwrap(), b"y");
    assert_eq!(errno(vfs.lookup(dir, b"g").await), libc::ENOENT);
    let listing = vfs.opendir(dir).await.unwrap();
    assert_eq!(vfs.readdir(dir, 0, 10, true).await.unwrap().len(), 3);
    vfs.releasedir(listing).await;
    let handle = open(vfs, ino, libc::O_RDONLY).await;
    assert_eq!(read(vfs, ino, handle).await, b"content");
    assert_eq!(vfs.stale_reads(), 7, "each of them");
    assert!(vfs.cache_timeout().is_zero(), "and the kernel keeps none of it");
    assert_eq!(errno(vfs.unlink(dir, b"f").await), libc::EIO);
    assert_eq!(errno(vfs.open(Caller::ROOT, ino, libc::O_WRONLY).await), libc::EIO);
    assert_eq!(errno(vfs.setattr(Caller::ROOT, ino, crate::SetAttrRequest { mode: Some(0o600), ..Default::default() }).await), libc::EIO);
    world.servers[0].meta.is_back();
    assert_eq!(vfs.lookup(dir, b"f").await.unwrap().ino, ino);
    assert_eq!((vfs.is_cut_off(), vfs.stale_reads()), (false, 7));
}

#[tokio::test]
async fn where_the_policy_says_so_a_server_that_is_cut_off_reads_nothing() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let dir = vfs.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    let ino = file(vfs, dir, "f", b"content").await.ino;
    let handle = open(vfs, ino, libc::O_RDONLY).await;
    set(&world, dir, OnPartition::Error).await;
    world.servers[0].meta.cut_off();
    assert_eq!(errno(vfs.lookup(dir, b"f").await), libc::EIO);
    assert_eq!(errno(vfs.getattr(ino).await), libc::EIO);
    assert_eq!(errno(vfs.readdir(dir, 0, 10, false).await), libc::EIO);
    assert_eq!(errno(vfs.read_file(ino, handle, 0, 7).await), libc::EIO);
    assert_eq!(vfs.lookup(ROOT, b"d").await.unwrap().ino, dir, "above it, the past will do");
}

#[tokio::test]
async fn where_the_policy_says_so_reads_wait_until_the_others_answer() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"content").await.ino;
    let handle = open(vfs, ino, libc::O_RDONLY).await;
    set(&world, ROOT, OnPartition::Block).await;
    world.servers[0].meta.cut_off();
    let reading = tokio::spawn({
        let vfs = vfs.clone();
        async move { vfs.read_file(ino, handle, 0, 7).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!reading.is_finished() && vfs.is_cut_off());
    world.servers[0].meta.is_back();
    assert_eq!(reading.await.unwrap().unwrap().as_ref(), b"content");
    assert_eq!(vfs.stale_reads(), 0);
}

/// The others may have ended this life by then: its locks are theirs, and what it wrote was never so.
#[tokio::test]
async fn what_programs_here_wrote_or_locked_is_not_read_while_cut_off() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let (written, locked) = (file(vfs, ROOT, "written", b"old").await.ino, file(vfs, ROOT, "locked", b"old").await.ino);
    let writer = open(vfs, written, libc::O_RDWR).await;
    let locker = open(vfs, locked, libc::O_RDWR).await;
    write(vfs, written, writer, 0, b"new").await;
    let lock = LockRequest { owner: 1, exclusive: true, start: 0, end: 0, pid: 1 };
    vfs.setlk(locked, locker, lock, false, 1).await.unwrap();
    world.servers[0].meta.cut_off();
    assert_eq!(errno(vfs.read_file(written, writer, 0, 3).await), libc::EIO);
    assert_eq!(errno(vfs.read_file(locked, locker, 0, 3).await), libc::EIO);
}
