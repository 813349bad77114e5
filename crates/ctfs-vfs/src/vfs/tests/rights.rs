//! What Linux's own file systems do about rights and times, and the kernel leaves to a FUSE server.

use bytes::Bytes;

use super::{ALICE, ROOT, World, file, open};
use crate::{Caller, FsError, SetAttrRequest};

fn errno<T: std::fmt::Debug>(result: Result<T, FsError>) -> i32 {
    result.expect_err("it is refused").errno()
}

/// The kernel asks for the file's owner only when a chown names a user or group.
#[tokio::test]
async fn chown_to_nobody_takes_setuid_from_no_file_of_somebody_else() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    for (mode, verdict) in [(0o4755, Err(libc::EPERM)), (0o2755, Err(libc::EPERM)), (0o755, Ok(()))] {
        let set = SetAttrRequest { mode: Some(mode), ..SetAttrRequest::default() };
        vfs.setattr(Caller::ROOT, ino, set).await.unwrap();
        let answer = vfs.setattr(ALICE, ino, SetAttrRequest::default()).await;
        assert_eq!(answer.map(drop).map_err(|error| error.errno()), verdict, "{mode:o}");
        assert_eq!(u32::from(vfs.getattr(ino).await.unwrap().mode), mode);
    }
    // The kernel asks for exactly that before a write by somebody who may write and not keep the bits.
    let set = SetAttrRequest { mode: Some(0o6777), ..SetAttrRequest::default() };
    vfs.setattr(Caller::ROOT, ino, set).await.unwrap();
    open(vfs, ino, libc::O_WRONLY).await;
    assert_eq!(vfs.setattr(ALICE, ino, SetAttrRequest::default()).await.unwrap().mode, 0o777);
}

/// It goes past the kernel's page cache, where the kernel would have taken the capability itself.
#[tokio::test]
async fn an_append_by_root_takes_the_capability_and_leaves_setuid() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    let set = SetAttrRequest { mode: Some(0o4755), ..SetAttrRequest::default() };
    vfs.setattr(Caller::ROOT, ino, set).await.unwrap();
    vfs.setxattr(Caller::ROOT, ino, b"security.capability", b"cap", 0).await.unwrap();
    let handle = open(vfs, ino, libc::O_WRONLY | libc::O_APPEND).await;
    vfs.write(Caller::ROOT, ino, handle, 0, Bytes::from_static(b"x"), false, false).await.unwrap();
    assert_eq!(errno(vfs.getxattr(Caller::ROOT, ino, b"security.capability").await), libc::ENODATA);
    assert_eq!(vfs.getattr(ino).await.unwrap().mode, 0o4755);
}

#[tokio::test]
async fn an_attribute_outside_the_namespaces_is_not_asked_for_either() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    for name in [&b"foo"[..], b"system.other", b"unknown.x"] {
        assert_eq!(errno(vfs.getxattr(Caller::ROOT, ino, name).await), libc::EOPNOTSUPP);
    }
    assert_eq!(errno(vfs.getxattr(Caller::ROOT, ino, b"user.").await), libc::EINVAL);
}

#[tokio::test]
async fn removing_an_acl_that_is_not_there_succeeds() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"").await.ino;
    for name in [&b"system.posix_acl_access"[..], b"system.posix_acl_default"] {
        vfs.removexattr(Caller::ROOT, ino, name).await.unwrap();
    }
}

#[tokio::test]
async fn an_allocation_moves_the_times_also_within_the_file() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"content").await.ino;
    let handle = open(vfs, ino, libc::O_RDWR).await;
    for mode in [0, libc::FALLOC_FL_KEEP_SIZE] {
        let before = vfs.getattr(ino).await.unwrap();
        vfs.fallocate(ino, handle, 0, 3, mode).await.unwrap();
        let after = vfs.getattr(ino).await.unwrap();
        assert!(after.mtime > before.mtime && after.ctime > before.ctime);
        assert_eq!(after.size, before.size);
    }
}
