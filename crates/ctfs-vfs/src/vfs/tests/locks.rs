//! Locks across servers: who gets them, who waits, who is woken.

use std::{
    collections::BTreeMap,
    sync::{
        LazyLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use ctfs_meta::Op;
use ctfs_types::{Incarnation, NodeId};
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use super::*;
use crate::{LockRequest, Metadata};

mod unanswered;

const PATIENCE: Duration = Duration::from_secs(10);

fn whole(owner: u64) -> LockRequest {
    range(owner, 0, i64::MAX as u64)
}

fn range(owner: u64, start: u64, end: u64) -> LockRequest {
    LockRequest { owner, exclusive: true, start, end, pid: 42 }
}

fn shared(owner: u64) -> LockRequest {
    LockRequest { exclusive: false, ..whole(owner) }
}

/// Asks for a lock and waits for it, in a task of its own.
fn wait_for(world: &World, server: usize, ino: Ino, handle: HandleId, request: LockRequest) -> JoinHandle<Result<(), FsError>> {
    let vfs = world.vfs(server).clone();
    tokio::spawn(async move { vfs.setlk(ino, handle, request, true, 0).await })
}

async fn ends<T>(task: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, task).await.expect("in time")
}

/// Returns when so many stand in the queue.
async fn queue_is(world: &World, ino: Ino, waiting: usize) {
    let replica = world.servers[0].meta.replica();
    ends(async {
        while replica.read().lock_waiters(ino).unwrap().len() != waiting {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
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
    let waiter = wait_for(&world, 1, ino, handles[1], whole(1));
    queue_is(&world, ino, 1).await;
    world.vfs(0).unlock(ino, whole(1)).await.unwrap();
    ends(waiter).await.unwrap().unwrap();
    assert!(world.vfs(0).getlk(ino, whole(1)).await.unwrap().is_some());
}

#[tokio::test]
async fn waiters_are_served_in_the_order_they_came_whatever_their_server() {
    let world = World::new(3);
    let (ino, handles) = opened_everywhere(&world).await;
    world.vfs(0).setlk(ino, handles[0], whole(1), false, 0).await.unwrap();
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut waiters = Vec::new();
    for (place, server) in [2, 1, 0, 2, 1].into_iter().enumerate() {
        let (vfs, served, handle, owner) = (world.vfs(server).clone(), served.clone(), handles[server], 2 + place as u64);
        waiters.push(tokio::spawn(async move {
            vfs.setlk(ino, handle, whole(owner), true, 0).await.unwrap();
            served.lock().push(place);
            vfs.unlock(ino, whole(owner)).await.unwrap();
        }));
        queue_is(&world, ino, place + 1).await;
    }
    world.vfs(0).unlock(ino, whole(1)).await.unwrap();
    for waiter in waiters {
        ends(waiter).await.unwrap();
    }
    assert_eq!(*served.lock(), [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn three_servers_that_contend_get_turns_within_one_of_each_other() {
    let world = World::new(3);
    let (ino, handles) = opened_everywhere(&world).await;
    let turns: Arc<Mutex<BTreeMap<usize, u64>>> = Arc::default();
    let mut contenders = Vec::new();
    for server in 0..3 {
        let (vfs, meta, turns, handle) = (world.vfs(server).clone(), world.servers[server].meta.clone(), turns.clone(), handles[server]);
        contenders.push(tokio::spawn(async move {
            for _ in 0..20 {
                vfs.setlk(ino, handle, whole(1), true, 0).await.unwrap();
                let spread = {
                    let mut turns = turns.lock();
                    *turns.entry(server).or_default() += 1;
                    let of = |server| turns.get(&server).copied().unwrap_or(0);
                    (0..3).map(of).max().unwrap() - (0..3).map(of).min().unwrap()
                };
                assert!(spread <= 1, "{:?}", turns.lock());
                // Holds on until all who have turns left want one.
                let others = |turns: &BTreeMap<usize, u64>| {
                    (0..3).filter(|other| *other != server && turns.get(other).copied().unwrap_or(0) < 20).count()
                };
                while meta.replica().read().lock_waiters(ino).unwrap().len() < others(&turns.lock()) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                vfs.unlock(ino, whole(1)).await.unwrap();
            }
        }));
    }
    for contender in contenders {
        ends(contender).await.unwrap();
    }
}

/// On a local disk both are granted: `flock -s` that runs `flock -s`, and a writer came in between.
#[tokio::test]
async fn a_reader_whom_only_waiting_writers_keep_out_gets_in_after_a_while() {
    let reader_patience = Duration::from_millis(20);
    let world = World::with(2, VfsSettings { reader_patience, interrupt_check: reader_patience, ..VfsSettings::default() });
    let (ino, handles) = opened_everywhere(&world).await;
    world.vfs(0).setlk(ino, handles[0], shared(1), false, 0).await.unwrap();
    let writer = wait_for(&world, 1, ino, handles[1], whole(2));
    queue_is(&world, ino, 1).await;
    let other = open(world.vfs(0), ino, libc::O_RDWR).await;
    ends(world.vfs(0).setlk(ino, other, shared(3), true, 0)).await.unwrap();
    assert!(!writer.is_finished());
    world.vfs(0).unlock(ino, shared(3)).await.unwrap();
    world.vfs(0).unlock(ino, shared(1)).await.unwrap();
    ends(writer).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_cycle_over_two_files_and_two_servers_is_told_as_a_deadlock() {
    let world = World::new(2);
    let (first, on_first) = opened_everywhere(&world).await;
    let second = file(world.vfs(0), ROOT, "g", b"").await.ino;
    let on_second = [open(world.vfs(0), second, libc::O_RDWR).await, open(world.vfs(1), second, libc::O_RDWR).await];
    world.vfs(0).setlk(first, on_first[0], whole(1), false, 0).await.unwrap();
    world.vfs(1).setlk(second, on_second[1], whole(1), false, 0).await.unwrap();
    let waiter = wait_for(&world, 0, second, on_second[0], whole(1));
    queue_is(&world, second, 1).await;
    let told = ends(world.vfs(1).setlk(first, on_first[1], whole(1), true, 0)).await.unwrap_err();
    assert_eq!(told.errno(), libc::EDEADLK);
    world.vfs(1).unlock(second, whole(1)).await.unwrap();
    ends(waiter).await.unwrap().unwrap();
}

#[tokio::test]
async fn of_two_readers_that_both_upgrade_the_second_gets_edeadlk_and_keeps_what_it_has() {
    let world = World::new(2);
    let (ino, handles) = opened_everywhere(&world).await;
    for server in 0..2 {
        world.vfs(server).setlk(ino, handles[server], shared(1), false, 0).await.unwrap();
    }
    let upgrade = wait_for(&world, 0, ino, handles[0], whole(1));
    queue_is(&world, ino, 1).await;
    let told = ends(world.vfs(1).setlk(ino, handles[1], whole(1), true, 0)).await.unwrap_err();
    assert_eq!(told.errno(), libc::EDEADLK);
    queue_is(&world, ino, 1).await;
    world.vfs(1).unlock(ino, whole(1)).await.unwrap();
    ends(upgrade).await.unwrap().unwrap();
}

/// Makes servers 1 and 2 members in the lives they are in.
#[tokio::test]
async fn the_locks_of_an_ended_life_pass_to_the_next_waiter_and_its_own_waits_end() {
    let world = World::new(2);
    world.found().await;
    let (ino, handles) = opened_everywhere(&world).await;
    world.vfs(1).setlk(ino, handles[1], whole(1), false, 0).await.unwrap();
    let of_ended = wait_for(&world, 1, ino, handles[1], whole(2));
    queue_is(&world, ino, 1).await;
    let waiter = wait_for(&world, 0, ino, handles[0], whole(1));
    queue_is(&world, ino, 2).await;
    Metadata::propose(&*world.servers[0].meta, Op::RemoveMember { node: NodeId(2) }).await.unwrap();
    ends(waiter).await.unwrap().unwrap();
    assert_eq!(ends(of_ended).await.unwrap(), Err(MetaError::StaleIncarnation.into()));
}

#[tokio::test]
async fn a_replica_that_was_replaced_is_asked_and_the_wait_goes_on() {
    let world = World::new(2);
    let (ino, handles) = opened_everywhere(&world).await;
    world.vfs(0).setlk(ino, handles[0], whole(1), false, 0).await.unwrap();
    let waiter = wait_for(&world, 1, ino, handles[1], whole(1));
    queue_is(&world, ino, 1).await;
    world.vfs(1).replaced();
    world.vfs(0).unlock(ino, whole(1)).await.unwrap();
    ends(waiter).await.unwrap().unwrap();
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
    queue_is(&world, ino, 1).await;
    SIGNAL_PENDING.store(true, Ordering::SeqCst);
    let ended = tokio::time::timeout(PATIENCE, waiter).await.expect("interrupted").unwrap();
    assert_eq!(ended.unwrap_err().errno(), libc::EINTR);
    queue_is(&world, ino, 0).await;
    vfs.unlock(ino, whole(1)).await.unwrap();
    assert_eq!(vfs.getlk(ino, whole(3)).await.unwrap(), None);
}

/// Said when the waiter's signals are looked at, and heard before the answer is given.
type Gate = (Mutex<Option<mpsc::Sender<()>>>, Mutex<Option<mpsc::Receiver<()>>>);
static GATE: LazyLock<Gate> = LazyLock::new(Gate::default);

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_granted_before_the_signal_was_heard_is_kept() {
    let settings = VfsSettings {
        interrupted: |thread| {
            let Some(looking) = (thread == 8).then(|| GATE.0.lock().take()).flatten() else { return false };
            let go = GATE.1.lock().take().unwrap();
            looking.send(()).unwrap();
            go.recv().unwrap();
            true
        },
        ..VfsSettings::default()
    };
    let world = World::with(1, settings);
    let vfs = world.vfs(0);
    let (ino, handles) = opened_everywhere(&world).await;
    vfs.setlk(ino, handles[0], whole(1), false, 0).await.unwrap();
    let ((looking, looked_at), (go, gone)) = (mpsc::channel(), mpsc::channel());
    *GATE.0.lock() = Some(looking);
    *GATE.1.lock() = Some(gone);
    let (waiting, handle) = (vfs.clone(), handles[0]);
    let waiter = tokio::spawn(async move { waiting.setlk(ino, handle, whole(2), true, 8).await });
    tokio::task::spawn_blocking(move || looked_at.recv().unwrap()).await.unwrap();
    vfs.unlock(ino, whole(1)).await.unwrap();
    go.send(()).unwrap();
    assert_eq!(ends(waiter).await.unwrap(), Ok(()));
    assert!(vfs.getlk(ino, whole(3)).await.unwrap().is_some());
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
async fn a_file_that_is_only_read_here_closes_at_once_but_not_while_it_is_written_or_locked_here() {
    let world = World::new(1);
    let vfs = world.vfs(0);
    let ino = file(vfs, ROOT, "f", b"bytes").await.ino;
    let open = async |flags: i32| vfs.open(Caller::ROOT, ino, flags).await.unwrap();
    let reader = open(libc::O_RDONLY).await;
    assert!(reader.closes_at_once);
    let writer = open(libc::O_RDWR).await;
    assert!(!writer.closes_at_once && !open(libc::O_RDONLY).await.closes_at_once);
    vfs.release(writer.handle).await;
    assert!(open(libc::O_RDONLY).await.closes_at_once);
    vfs.setlk(ino, reader.handle, shared(1), false, 0).await.unwrap();
    assert!(!open(libc::O_RDONLY).await.closes_at_once, "its close gives back the process's lock");
    vfs.release(reader.handle).await;
    assert_eq!(vfs.getlk(ino, whole(2)).await.unwrap(), None, "given back with the last descriptor");
}

#[tokio::test]
async fn a_lock_of_a_file_closed_here_is_not_found_in_the_way_by_whoever_asks_next_here() {
    // close(2) does not wait for the release, so `flock -n` twice in a row failed.
    let world = World::new(1);
    let vfs = world.vfs(0);
    let (ino, handles) = opened_everywhere(&world).await;
    let next = open(vfs, ino, libc::O_RDWR).await;
    vfs.setlk(ino, handles[0], whole(1), false, 0).await.unwrap();
    let leaving = vfs.leaving(ino);
    let release = async {
        vfs.release(handles[0]).await;
        drop(leaving);
    };
    let (locked, seen, ()) =
        tokio::join!(biased; vfs.setlk(ino, next, whole(2), false, 0), vfs.getlk(ino, whole(2)), release);
    locked.unwrap();
    assert_eq!(seen.unwrap(), None);

    // Somebody who has the lock is not waited for.
    let leaving = vfs.leaving(ino);
    vfs.release(open(vfs, ino, libc::O_RDWR).await).await;
    drop(leaving);
    let last = open(vfs, ino, libc::O_RDWR).await;
    assert!(is_locked(&vfs.setlk(ino, last, whole(3), false, 0).await.unwrap_err()));
}

#[tokio::test]
async fn a_kernel_that_went_away_ends_waits_and_frees_locks() {
    let world = World::new(2);
    let (ino, handles) = opened_everywhere(&world).await;
    world.vfs(0).setlk(ino, handles[0], whole(1), false, 0).await.unwrap();
    let waiter = wait_for(&world, 1, ino, handles[1], whole(1));
    queue_is(&world, ino, 1).await;
    world.vfs(1).disconnect().await;
    queue_is(&world, ino, 0).await;
    let ended = tokio::time::timeout(PATIENCE, waiter).await.expect("ended").unwrap();
    assert_eq!(ended, Err(FsError::Shutdown));
    world.vfs(0).disconnect().await;
    assert_eq!(world.vfs(1).getlk(ino, whole(3)).await.unwrap(), None);
}
