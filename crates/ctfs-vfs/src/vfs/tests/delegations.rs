//! Directories that a server holds: taken, used, recalled, given up.

use std::time::Duration;

use ctfs_meta::{Durability, NewContent, NewNode, Op, Policy, Reply};
use ctfs_types::{FileUse, Holder};

use super::*;
use crate::{DelegationFigures, DelegationSettings, LockRequest, Metadata};

fn settings() -> VfsSettings {
    let delegations = DelegationSettings { takes: true, idle: Duration::ZERO, ..DelegationSettings::default() };
    VfsSettings { delegations, ..VfsSettings::default() }
}

fn figures(world: &World, server: usize) -> DelegationFigures {
    world.vfs(server).delegations()
}

fn holder(world: &World, dir: Ino) -> Option<Holder> {
    match world.servers[0].meta.replica().read().attr(dir).unwrap().unwrap().usage {
        FileUse::Owned { holder, .. } => Some(holder),
        FileUse::Free | FileUse::Shared { .. } => None,
    }
}

/// A directory that server 0 has made and changed, and taken by now; with numbers for what it makes.
async fn held(world: &World) -> Ino {
    world.servers[0].meta.propose_op(Op::ReserveInos { count: 1000 }).await.unwrap();
    let dir = world.vfs(0).mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    world.vfs(0).mkdir(Caller::ROOT, dir, b"first", 0o755, 0).await.unwrap();
    while holder(world, dir).is_none() || holder(world, ROOT).is_none() {
        tokio::task::yield_now().await;
    }
    dir
}

/// Another directory like it.
async fn held_again(world: &World, beside: Ino) -> Ino {
    let dir = world.vfs(0).mkdir(Caller::ROOT, beside, b"again", 0o755, 0).await.unwrap().ino;
    world.vfs(0).mkdir(Caller::ROOT, dir, b"first", 0o755, 0).await.unwrap();
    while holder(world, dir).is_none() {
        tokio::task::yield_now().await;
    }
    dir
}

#[tokio::test]
async fn whoever_is_alone_in_a_directory_changes_it_without_asking() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    let before = figures(&world, 0).ahead;
    let below = world.vfs(0).mkdir(Caller::ROOT, dir, b"below", 0o755, 0).await.unwrap().ino;
    assert_eq!(holder(&world, below), holder(&world, dir), "held from birth");
    let made = file(world.vfs(0), below, "f", b"bytes").await;
    world.vfs(0).setxattr(Caller::ROOT, made.ino, b"user.a", b"1", 0).await.unwrap();
    world.vfs(0).rename(below, b"f", dir, b"g", 0).await.unwrap();
    world.vfs(0).unlink(dir, b"g").await.unwrap();
    assert!(figures(&world, 0).ahead >= before + 5, "{:?}", figures(&world, 0));
}

#[tokio::test]
async fn with_class_all_fsync_waits_for_every_server_that_has_a_lease() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    let class = async |durability| {
        let policy = Policy { durability: Some(durability), ..Policy::default() };
        world.servers[0].meta.propose_op(Op::SetPolicy { ino: dir, policy }).await.unwrap();
    };
    let handle = world.vfs(0).opendir(dir).await.unwrap();
    class(Durability::Quorum).await;
    world.vfs(0).mkdir(Caller::ROOT, dir, b"a", 0o755, 0).await.unwrap();
    assert!(world.servers[0].meta.ahead().is_some(), "made before the others know of it");
    world.vfs(0).fsyncdir(dir, handle).await.unwrap();
    class(Durability::All).await;
    world.vfs(0).mkdir(Caller::ROOT, dir, b"b", 0o755, 0).await.unwrap();
    let synced = tokio::spawn({
        let vfs = world.vfs(0).clone();
        async move { vfs.fsyncdir(dir, handle).await }
    });
    let mut waiting = world.cluster.waiting.subscribe();
    let waits = waiting.wait_for(|waiting| *waiting == 1);
    tokio::time::timeout(Duration::from_secs(30), waits).await.expect("nothing waits").unwrap();
    assert!(!synced.is_finished());
    // Answered when all that came before is visible, too.
    world.servers[0].meta.propose_op(Op::Noop).await.unwrap();
    synced.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_small_file_that_was_closed_in_a_held_directory_is_read_everywhere_and_replaces_another_only_when_it_is_safe() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    let bytes = vec![7; 9000];
    let extents = |ino| world.servers[0].meta.replica().read().cells(ino, 0, 9).unwrap().len();
    let old = file(world.vfs(0), dir, "old", &bytes).await;
    assert_eq!(content(world.vfs(1), old.ino).await, bytes, "whoever opens it next sees it");
    assert_eq!(extents(old.ino), 1);

    let dir = held_again(&world, dir).await;
    file(world.vfs(0), dir, "old", &bytes).await;
    let new = file(world.vfs(0), dir, "new", &bytes).await;
    assert_eq!(extents(new.ino), 0, "it may be removed again just after");
    world.vfs(0).rename(dir, b"new", dir, b"old", 0).await.unwrap();
    assert_eq!(extents(new.ino), 1, "what it replaced is gone for good");
}

#[tokio::test]
async fn a_file_that_is_removed_just_after_it_was_closed_takes_no_chunk_and_another_takes_one_soon() {
    let world = World::with(1, settings());
    let dir = held(&world).await;
    file(world.vfs(0), dir, "brief", &[7; 9000]).await;
    world.vfs(0).unlink(dir, b"brief").await.unwrap();
    let stays = file(world.vfs(0), dir, "stays", &[8; 9000]).await.ino;
    let taken = async {
        while world.servers[0].meta.replica().read().cells(stays, 0, 9).unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), taken).await.expect("it is written back by itself");
    assert_eq!(world.cluster.chunks(), 1, "of the one that stays");
}

#[tokio::test]
async fn whoever_looks_on_another_server_has_it_given_up_first() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    file(world.vfs(0), dir, "f", b"bytes").await;
    let seen = world.vfs(1).lookup(dir, b"f").await.unwrap();
    assert_eq!(holder(&world, dir), None);
    assert_eq!(content(world.vfs(1), seen.ino).await, b"bytes");
    assert_eq!(world.vfs(1).readdir(dir, 0, 100, true).await.unwrap().len(), 4);
    assert!(figures(&world, 0).given_up >= 1 && figures(&world, 1).recalled >= 1);
}

#[tokio::test]
async fn with_a_directory_the_files_go_that_nobody_uses() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    let mut files = Vec::new();
    for number in 0..20 {
        files.push(file(world.vfs(0), dir, &format!("f{number}"), b"bytes").await.ino);
    }
    let is_held = |ino: &Ino| matches!(world.servers[0].meta.replica().read().attr(*ino).unwrap().unwrap().usage, FileUse::Owned { .. });
    assert!(files.iter().all(is_held));
    let asked = std::time::Instant::now();
    world.vfs(1).lookup(dir, b"first").await.unwrap();
    while files.iter().any(is_held) {
        tokio::task::yield_now().await;
    }
    println!("after {:?}", asked.elapsed());
}

#[tokio::test]
async fn whoever_changes_something_on_another_server_has_it_given_up_first() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    let made = file(world.vfs(0), dir, "f", b"bytes").await;
    world.vfs(1).unlink(dir, b"f").await.unwrap();
    assert!(world.vfs(0).lookup(dir, b"f").await.is_err());
    let _ = made;
}

#[tokio::test]
async fn with_one_directory_all_are_given_up_that_were_not_changed_for_a_while() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    let mut below = Vec::new();
    for name in [b"x", b"y", b"z"] {
        below.push(world.vfs(0).mkdir(Caller::ROOT, dir, name, 0o755, 0).await.unwrap().ino);
    }
    assert!(below.iter().all(|dir| holder(&world, *dir).is_some()));
    world.vfs(1).lookup(dir, b"x").await.unwrap();
    assert!(below.iter().all(|dir| holder(&world, *dir).is_none()));
    assert_eq!(figures(&world, 0).given_up, 1);
}

#[tokio::test]
async fn a_directory_that_nobody_uses_is_given_up_unasked_and_one_that_is_in_use_is_not() {
    let mut settings = settings();
    settings.delegations.unused = Duration::from_millis(60);
    let world = World::with(2, settings);
    let dir = held(&world).await;
    let make = async |name: &[u8]| world.vfs(0).mkdir(Caller::ROOT, dir, name, 0o755, 0).await.unwrap().ino;
    let (unused, written, locked, touched) = (make(b"unused").await, make(b"written").await, make(b"locked").await, make(b"touched").await);
    assert!([unused, written, locked, touched].iter().all(|dir| holder(&world, *dir).is_some()));
    let (_, open) = world.vfs(0).create(Caller::ROOT, written, b"f", 0o644, 0, libc::O_RDWR).await.unwrap();
    let lockable = file(world.vfs(0), locked, "f", b"").await;
    let lock_handle = world.vfs(0).open(Caller::ROOT, lockable.ino, libc::O_RDONLY).await.unwrap().handle;
    let lock = LockRequest { owner: 7, exclusive: false, start: 0, end: u64::MAX, pid: 1 };
    world.vfs(0).setlk(lockable.ino, lock_handle, lock, false, 1).await.unwrap();
    while holder(&world, unused).is_some() || holder(&world, dir).is_some() {
        world.vfs(0).setxattr(Caller::ROOT, touched, b"user.a", b"1", 0).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for kept in [written, locked, touched] {
        assert!(holder(&world, kept).is_some(), "in use");
    }
    world.vfs(0).release(open.handle).await;
    world.vfs(0).unlock(lockable.ino, lock).await.unwrap();
    world.vfs(0).release(lock_handle).await;
    while [written, locked, touched].iter().any(|dir| holder(&world, *dir).is_some()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(figures(&world, 0).given_up, 0, "nobody asked");
}

#[tokio::test]
async fn a_directory_that_is_recalled_again_soon_stays_shared() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    world.vfs(1).lookup(dir, b"first").await.unwrap();
    world.vfs(0).mkdir(Caller::ROOT, dir, b"again", 0o755, 0).await.unwrap();
    while holder(&world, dir).is_none() {
        tokio::task::yield_now().await;
    }
    world.vfs(1).lookup(dir, b"again").await.unwrap();
    assert_eq!(figures(&world, 0).shared, 1);
    let usage = || world.servers[0].meta.replica().read().attr(dir).unwrap().unwrap().usage;
    assert!(matches!(usage(), FileUse::Shared { .. }));
    world.vfs(0).mkdir(Caller::ROOT, dir, b"more", 0o755, 0).await.unwrap();
    world.vfs(0).mkdir(Caller::ROOT, dir, b"and more", 0o755, 0).await.unwrap();
    assert!(matches!(usage(), FileUse::Shared { .. }), "nobody takes it for now");
}

#[tokio::test]
async fn a_holder_that_is_cut_off_is_waited_for_in_bounded_time_and_then_its_end_frees_all() {
    let mut settings = settings();
    settings.delegations.patience = Duration::from_millis(50);
    settings.delegations.ask_again = Duration::from_millis(5);
    let world = World::with(2, settings);
    world.found().await;
    let dir = held(&world).await;
    world.servers[0].meta.cut_off();
    let refused = world.vfs(1).lookup(dir, b"first").await;
    assert!(matches!(refused, Err(FsError::Meta(MetaError::Held { .. }))), "{refused:?}");
    let holder = holder(&world, dir).unwrap();
    world.servers[1].meta.propose_op(Op::Fence { node: holder.node, incarnation: holder.incarnation }).await.unwrap();
    world.vfs(1).lookup(dir, b"first").await.unwrap();
}

#[tokio::test]
async fn while_it_is_not_known_whether_a_directory_was_given_up_nothing_happens_there_ahead_of_the_log() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    world.cluster.set_weather(memory::Weather { lost: 256, ..memory::Weather::default() });
    while world.vfs(0).give_up(dir).await.is_ok() {}
    world.cluster.set_weather(memory::Weather::default());
    let ahead = figures(&world, 0).ahead;
    // It has a say in the log, whichever way that went.
    world.vfs(0).mkdir(Caller::ROOT, dir, b"later", 0o755, 0).await.unwrap();
    assert_eq!(figures(&world, 0).ahead, ahead);
    world.vfs(1).lookup(dir, b"later").await.unwrap();
}

#[tokio::test]
async fn two_servers_that_write_one_directory_in_turn_both_go_on_and_lose_nothing() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    for round in 0..50 {
        for server in 0..2 {
            let name = format!("{server}-{round}");
            world.vfs(server).mkdir(Caller::ROOT, dir, name.as_bytes(), 0o755, 0).await.unwrap();
        }
    }
    for server in 0..2 {
        assert_eq!(world.vfs(server).readdir(dir, 0, 1000, true).await.unwrap().len(), 103);
    }
}

#[tokio::test]
async fn a_quota_has_directories_below_it_given_up_and_none_is_taken_there() {
    let world = World::with(2, settings());
    let dir = held(&world).await;
    let quota = ctfs_meta::Quota { files: Some(100), ..ctfs_meta::Quota::default() };
    world.vfs(1).propose(Op::SetQuota { ino: ROOT, quota }).await.unwrap();
    assert_eq!((holder(&world, dir), holder(&world, ROOT)), (None, None));
    let node = NewNode { content: NewContent::Directory, mode: 0o755, umask: 0, uid: 0, gid: 0, exclusive: true, holder: None, ino: None, cell: None };
    let name = ctfs_types::FileName::new(b"n").unwrap();
    let Reply::Entry { .. } = world.vfs(0).propose(Op::Make { parent: dir, name, node }).await.unwrap() else { panic!("an entry") };
    let refused = world.servers[0].meta.propose_op(Op::Own { ino: dir, holder: world.servers[0].meta.holder(), although_shared: true }).await;
    assert!(matches!(refused, Err(FsError::Meta(MetaError::WrongKind(_)))), "{refused:?}");
}

#[tokio::test]
async fn what_every_server_did_is_in_the_metadata_once_all_are_settled() {
    let world = World::with(2, settings());
    world.found().await;
    let dir = held(&world).await;
    let made = file(world.vfs(0), dir, "f", &[7; 9000]).await.ino;
    let known = || {
        let replica = world.servers[1].meta.replica().read();
        (replica.attr(made).unwrap().map(|attr| attr.size), replica.cells(made, 0, 9).unwrap().len())
    };
    assert_eq!(known().1, 0, "it is not written back yet");
    let index = world.vfs(1).settle_everywhere().await.unwrap();
    assert_eq!(known(), (Some(9000), 1));
    assert_eq!(index, world.servers[1].meta.replica().read().applied());
}
