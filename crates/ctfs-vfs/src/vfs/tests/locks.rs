//! Locks across servers: who gets them, who waits, who is woken.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::*;
use crate::LockRequest;

const PATIENCE: Duration = Duration::from_secs(10);

fn whole(owner: u64) -> LockRequest {
    range(owner, 0, i64::MAX as u64)
}

fn range(owner: u64, start: u64, end: u64) -> LockRequest {
    LockRequest { owner, exclusive: true, start, end, pid: 42 }
}

/// A file open on every server; answers its number and the handles.
async fn opened_everywhere(world: &World) -> (Ino, Vec<HandleId>) {
    let ino = file(world.vfs(0), ROOT, "f", b"").await.ino;
    let mut handles = Vec::new();
    for server in &world.servers {
        handles.push(open(&server.vfs, ino, libc::O_RDWR).await);
    }
    (ino, handles)
}

#[tokio::test]
async fn a_lock_taken_on_one_server_excludes_the_other_and_is_shown_there() {
    let world = World::new(2);
    let (ino, handles) = opened_everywhere(&world).await;
    world.vfs(0).setlk(ino, handles[0], range(1, 0, 9), false, 0).await.unwrap();
    let refused = world.vfs(1).setlk(ino, handles[1], range(1, 5, 20), false, 0).await.unwrap_err();
    assert!(is_locked(&refused) && refused.errno() == libc::EAGAIN);
    let held = world.vfs(1).getlk(ino, range(1, 5, 20)).await.unwrap().expect("held by the other");
    assert_eq!((held.start, held.end, held.pid), (0, 9, 0), "a process number of another server means nothing here");
    let held = world.vfs(0).getlk(ino, range(2, 5, 20)).await.unwrap().expect("held");
    assert_eq!(held.pid, 42);
    world.vfs(1).setlk(ino, handles[1], range(1, 10, 20), false, 0).await.unwrap();
    world.vfs(0).unlock(ino, range(1, 0, 9)).await.unwrap();
    assert_eq!(world.vfs(1).getlk(ino, range(1, 0, 9)).await.unwrap(), None);
}

#[tokio::test]
async fn a_waiter_is_woken_when_another_server_unlocks() {
    let world = World::new(2);
    let (ino, handles) = opened_everywhere(&world).await;
    world.vfs(0).setlk(ino, handles[0], whole(1), false, 0).await.unwrap();
    let (waiting, handle) = (world.vfs(1).clone(), handles[1]);
    let mut waiter = tokio::spawn(async move { waiting.setlk(ino, handle, whole(1), true, 0).await });
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut waiter).await.is_err(), "still held");
    world.vfs(0).unlock(ino, whole(1)).await.unwrap();
    tokio::time::timeout(PATIENCE, waiter).await.expect("woken").unwrap().unwrap();
}

#[tokio::test]
async fn waiters_are_served_in_the_order_they_came() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let (ino, handles) = opened_everywhere(&world).await;
    vfs.setlk(ino, handles[0], whole(1), false, 0).await.unwrap();
    let served = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let mut waiters = Vec::new();
    for owner in 2..6 {
        let (vfs, served, handle) = (vfs.clone(), served.clone(), handles[0]);
        waiters.push(tokio::spawn(async move {
            vfs.setlk(ino, handle, whole(owner), true, 0).await.unwrap();
            served.lock().push(owner);
            vfs.unlock(ino, whole(owner)).await.unwrap();
        }));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    vfs.unlock(ino, whole(1)).await.unwrap();
    for waiter in waiters {
        tokio::time::timeout(PATIENCE, waiter).await.expect("served").unwrap();
    }
    assert_eq!(*served.lock(), [2, 3, 4, 5]);
}

static SIGNAL_PENDING: AtomicBool = AtomicBool::new(false);

#[tokio::test]
async fn a_signal_ends_the_wait_and_leaves_no_lock() {
    let settings = VfsSettings {
        interrupt_check: Duration::from_millis(5),
        interrupted: |thread| thread == 7 && SIGNAL_PENDING.load(Ordering::SeqCst),
        ..VfsSettings::default()
    };
    let world = World::with(1, settings);
    let vfs = world.vfs(0);
    let (ino, handles) = opened_everywhere(&world).await;
    vfs.setlk(ino, handles[0], whole(1), false, 0).await.unwrap();
    let (waiting, handle) = (vfs.clone(), handles[0]);
    let waiter = tokio::spawn(async move { waiting.setlk(ino, handle, whole(2), true, 7).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    SIGNAL_PENDING.store(true, Ordering::SeqCst);
    let ended = tokio::time::timeout(PATIENCE, waiter).await.expect("interrupted").unwrap();
    assert_eq!(ended.unwrap_err().errno(), libc::EINTR);
    vfs.unlock(ino, whole(1)).await.unwrap();
    assert_eq!(vfs.getlk(ino, whole(3)).await.unwrap(), None);
}

#[tokio::test]
async fn closing_any_descriptor_drops_the_process_locks_and_the_last_one_those_of_the_handle() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let (ino, handles) = opened_everywhere(&world).await;
    let other = open(vfs, ino, libc::O_RDONLY).await;
    let (process, description) = (1, 2);
    vfs.setlk(ino, handles[0], range(process, 0, 9), false, 0).await.unwrap();
    vfs.setlk(ino, handles[0], range(description, 10, 19), false, 0).await.unwrap();
    vfs.flush(ino, other, process).await.unwrap();
    assert_eq!(vfs.getlk(ino, range(3, 0, 9)).await.unwrap(), None, "fcntl(2): any descriptor");
    assert!(vfs.getlk(ino, range(3, 10, 19)).await.unwrap().is_some(), "flock and OFD locks stay");
    vfs.flush(ino, handles[0], process).await.unwrap();
    vfs.release(handles[0]).await;
    assert_eq!(vfs.getlk(ino, whole(3)).await.unwrap(), None);
}

#[tokio::test]
async fn a_kernel_that_went_away_ends_waits_and_frees_locks() {
    let world = World::new(2);
    let (ino, handles) = opened_everywhere(&world).await;
    world.vfs(0).setlk(ino, handles[0], whole(1), false, 0).await.unwrap();
    let (waiting, handle) = (world.vfs(1).clone(), handles[1]);
    let waiter = tokio::spawn(async move { waiting.setlk(ino, handle, whole(1), true, 0).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    world.vfs(1).disconnect().await;
    let ended = tokio::time::timeout(PATIENCE, waiter).await.expect("ended").unwrap();
    assert_eq!(ended, Err(FsError::Shutdown));
    world.vfs(0).disconnect().await;
    assert_eq!(world.vfs(1).getlk(ino, whole(3)).await.unwrap(), None);
}
