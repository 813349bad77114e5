//! Quotas as programs see them.

use ctfs_meta::{Op, Quota};

use super::*;
use crate::Metadata;

async fn limit(world: &World, dir: Ino, bytes: Option<u64>, files: Option<u64>) {
    world.servers[0].meta.propose(Op::SetQuota { ino: dir, quota: Quota { bytes, files } }).await.unwrap();
}

async fn dir(vfs: &Vfs, parent: Ino, name: &str) -> Ino {
    vfs.mkdir(Caller::ROOT, parent, name.as_bytes(), 0o755, 0).await.unwrap().ino
}

fn errno<T: std::fmt::Debug>(answer: Result<T, FsError>) -> i32 {
    answer.unwrap_err().errno()
}

#[tokio::test]
async fn statfs_shows_the_tightest_quota_as_if_it_were_a_volume() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let outer = dir(vfs, ROOT, "outer").await;
    let inner = dir(vfs, outer, "inner").await;
    let volume = vfs.statfs(ROOT);
    limit(&world, outer, Some(1 << 30), Some(10)).await;
    limit(&world, inner, Some(100 << 20), None).await;
    let big = file(vfs, outer, "big", &[1; 8192]).await;
    let small = file(vfs, inner, "small", &[1; 5000]).await;

    let seen = vfs.statfs(outer);
    assert_eq!((seen.space.total, seen.bytes_used), (1 << 30, 16_384));
    assert_eq!((seen.space.free, seen.space.available), ((1 << 30) - 16_384, (1 << 30) - 16_384));
    assert_eq!((seen.files_used, seen.space.files), (3, 7));
    assert_eq!(vfs.statfs(big.ino), seen, "of a file: what holds for it");

    let seen = vfs.statfs(small.ino);
    assert_eq!((seen.space.total, seen.space.available), (100 << 20, (100 << 20) - 8192));
    assert_eq!(seen.space.files, 7, "for files the outer one is the tighter");
    // The inner one has room, the outer one has not.
    limit(&world, outer, Some(16_384), None).await;
    assert_eq!(vfs.statfs(inner).space.available, 0);
    // A quota makes no room.
    limit(&world, outer, Some(1 << 60), Some(u64::MAX)).await;
    let seen = vfs.statfs(outer);
    assert_eq!((seen.space.total, seen.space.available), (volume.space.total, volume.space.available));
    assert_eq!(vfs.statfs(ROOT).space, volume.space);
}

#[tokio::test]
async fn write_and_names_over_a_quota_get_edquot_and_across_one_exdev() {
    let world = World::new(2);
    let (here, there) = (world.vfs(0), world.vfs(1));
    let top = dir(here, ROOT, "top").await;
    limit(&world, top, Some(8192), Some(2)).await;
    let attr = file(there, top, "f", &[1; 4000]).await;
    let handle = open(there, attr.ino, libc::O_RDWR).await;
    let write = |len: usize| there.write(Caller::ROOT, attr.ino, handle, 4000, vec![2; len].into(), false, false);
    assert_eq!(write(10_000).await.unwrap(), 4192, "what fits is written");
    assert_eq!(there.write(Caller::ROOT, attr.ino, handle, 8192, vec![2; 10].into(), false, false).await.map_err(|e| e.errno()), Err(libc::EDQUOT));
    there.flush(attr.ino, handle, 1).await.unwrap();
    there.release(handle).await;
    assert_eq!(content(here, attr.ino).await.len(), 8192);

    dir(there, top, "d").await;
    assert_eq!(errno(there.mkdir(Caller::ROOT, top, b"e", 0o755, 0).await), libc::EDQUOT);
    assert_eq!(errno(there.symlink(Caller::ROOT, top, b"e", b"x").await), libc::EDQUOT);
    let made = there.create(Caller::ROOT, top, b"e", 0o644, 0, libc::O_RDWR).await;
    assert_eq!(made.map(drop).map_err(|error| error.errno()), Err(libc::EDQUOT));
    assert_eq!(errno(there.rename(top, b"f", ROOT, b"f", 0).await), libc::EXDEV);
    assert_eq!(errno(there.link(attr.ino, ROOT, b"f").await), libc::EXDEV);
}

#[tokio::test]
async fn pages_of_a_mapping_that_do_not_all_fit_are_an_error_and_what_fits_is_kept() {
    // The kernel takes a short answer to pages that it writes back for all of them: msync and fsync
    // said 0, and the rest was gone.
    let world = World::new(1);
    let vfs = world.vfs(0);
    let top = dir(vfs, ROOT, "top").await;
    limit(&world, top, Some(8192), None).await;
    let attr = file(vfs, top, "f", b"").await;
    let handle = open(vfs, attr.ino, libc::O_RDWR).await;
    let set = crate::SetAttrRequest { size: Some(16_384), ..Default::default() };
    vfs.setattr(Caller::ROOT, attr.ino, set).await.unwrap();
    let pages = vfs.write(Caller::ROOT, attr.ino, handle, 0, vec![2; 16_384].into(), false, true).await;
    assert_eq!(errno(pages), libc::EDQUOT);
    vfs.flush(attr.ino, handle, 1).await.unwrap();
    assert_eq!(content(vfs, attr.ino).await, [[2; 8192], [0; 8192]].concat());
    vfs.release(handle).await;
}

#[tokio::test]
async fn a_file_that_is_taken_over_by_another_server_drops_what_is_over_the_quota() {
    let world = World::new(2);
    let (here, there) = (world.vfs(0), world.vfs(1));
    let attr = file(here, ROOT, "f", b"").await;
    let handle = open(here, attr.ino, libc::O_RDWR).await;
    write(here, attr.ino, handle, 0, &[1; 50_000]).await;
    limit(&world, ROOT, Some(10_000), None).await;
    // Does not wait for what can never be committed.
    assert_eq!(content(there, attr.ino).await, b"");
    assert_eq!(errno(here.fsync(attr.ino, handle).await), libc::EDQUOT);
    here.fsync(attr.ino, handle).await.unwrap();
    here.release(handle).await;
}

#[tokio::test]
async fn the_limits_of_a_directory_can_be_read_as_xattrs() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let top = dir(vfs, ROOT, "top").await;
    limit(&world, top, Some(123_456), None).await;
    assert_eq!(vfs.getxattr(ALICE, top, b"ctfs.quota.bytes").await.unwrap(), b"123456");
    assert_eq!(errno(vfs.getxattr(ALICE, top, b"ctfs.quota.files").await), libc::ENODATA);
    assert_eq!(errno(vfs.getxattr(ALICE, ROOT, b"ctfs.quota.bytes").await), libc::ENODATA);
}
