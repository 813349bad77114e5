//! Lives that end, and what must not outlive them: 9, 12, 13, 14, 16, 19.

use ctfs_types::{Ino, NodeId};
use ctfs_vfs::{Caller, LockRequest};

use super::{ahead::held, claim, millis, node, seconds, through_the_log, verdict, with_holders};
use crate::{
    network::Filter,
    programs::Care,
    server::metadata::service,
    sim::{End, Sim},
};

fn follower(sim: &mut Sim) -> NodeId {
    let leader = sim.leader();
    *sim.nodes().iter().find(|other| **other != leader).expect("there are several")
}

fn other_than(sim: &Sim, node: NodeId) -> NodeId {
    *sim.nodes().iter().find(|other| **other != node).expect("there are several")
}

/// A is merely slow: its life is ended, and then its commands arrive.
pub fn commands_after_the_end(seed: u64) -> Result<(), String> {
    let mut sim = with_holders(seed, 3);
    let slow = follower(&mut sim);
    let other = other_than(&sim, slow);
    let dir = held(&mut sim, slow, "d");
    let late_by = Some(seconds(13));
    // Nor has its pair what it did last.
    let unpaired = Filter { from: Some(slow), to: None, service: service::JOURNAL, answers: false, left: u32::MAX, late_by: None };
    let late = Filter { from: Some(slow), to: None, service: FORWARD, answers: false, left: 1, late_by };
    sim.shared.wires.lock().filters.extend([unpaired, late]);
    sim.ask(slow, move |server| async move { server.vfs.rename(dir, b"first", dir, b"moved", 0).await.expect("it holds the directory") });
    // It is on its way.
    sim.run_for(millis(100));
    // Not cut off: the votes that it would ask for meanwhile would have the others elect anew.
    sim.pause(slow, seconds(15));
    sim.run_for(seconds(12));
    let is_there = sim.ask(other, move |server| async move {
        server.vfs.lookup(dir, b"first").await.is_ok()
    });
    assert!(is_there, "what is under way cannot be here");
    sim.run_for(seconds(8));
    for node in sim.nodes() {
        let found = sim.ask(node, move |server| async move { server.vfs.lookup(dir, b"first").await });
        claim(found.is_ok(), format!("s{} shows a change of a life that had ended: {found:?}", node.0))?;
    }
    sim.all_ready();
    verdict(&sim)
}

/// `mkdir` commits, its answer is lost, and it is asked again.
pub fn a_request_asked_twice(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    let asker = follower(&mut sim);
    sim.shared.wires.lock().filters.push(Filter { from: None, to: Some(asker), service: FORWARD, answers: true, left: 1, late_by: None });
    let made = sim.ask(asker, |server| async move { server.make_dir(Ino::ROOT, "once").await });
    claim(made.is_ok(), format!("mkdir happened, and was told that {}", made.err().map_or(String::new(), |error| error.to_string())))?;
    verdict(&sim)
}

/// A wrote what nobody has, was cut off, and goes on in another life: its kernel still has the pages.
pub fn a_new_life_with_old_pages(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    let cut_off = follower(&mut sim);
    let other = other_than(&sim, cut_off);
    let file = sim.ask(cut_off, |server| async move {
        let file = server.make(Ino::ROOT, "f", 0o600).await.expect("nothing is wrong").ino;
        server.write(file, libc::O_RDWR, b"old".to_vec(), true).await.expect("nothing is wrong");
        file
    });
    sim.isolate(cut_off);
    let seen = sim.ask(cut_off, move |server| async move {
        let opened = server.vfs.open(Caller::ROOT, file, libc::O_RDWR).await.expect("it holds the file");
        server.write_with(file, opened.handle, 0, b"new".to_vec(), false).await.expect("there is room");
        let opened = server.vfs.open(Caller::ROOT, file, libc::O_RDONLY).await.expect("it holds the file");
        server.kernel.read(file, opened, 100).await.expect("it is here")
    });
    assert_eq!(&seen[..], b"new");
    sim.run_for(seconds(15));
    sim.heal();
    sim.all_ready();
    let there = sim.ask(other, move |server| async move { server.read(file, Care::Unsynced).await.expect("it is free") });
    let here = sim.ask(cut_off, move |server| async move { server.read(file, Care::Unsynced).await.expect("it serves") });
    claim(here == there, format!("a new life shows {here:?} of the old one, the others show {there:?}"))?;
    verdict(&sim)
}

/// A has a lock, is cut off, and B gets it; A's program goes on.
pub fn two_lock_holders(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    let first = follower(&mut sim);
    let second = other_than(&sim, first);
    let request = LockRequest { owner: 77, exclusive: true, start: 0, end: u64::MAX, pid: 1 };
    let (file, handle) = sim.ask(first, move |server| async move {
        let file = server.make(Ino::ROOT, "f", 0o600).await.expect("nothing is wrong").ino;
        let handle = server.vfs.open(Caller::ROOT, file, libc::O_RDWR).await.expect("nothing is wrong").handle;
        server.vfs.setlk(file, handle, request, false, 0).await.expect("it is free");
        (file, handle)
    });
    sim.isolate(first);
    sim.run_for(seconds(15));
    sim.ask(second, move |server| async move {
        let handle = server.vfs.open(Caller::ROOT, file, libc::O_RDWR).await.expect("the file is free").handle;
        server.vfs.setlk(file, handle, request, false, 0).await.expect("the lock is free");
    });
    sim.heal();
    sim.ready(first);
    let written = sim.ask(first, move |server| async move { server.write_with(file, handle, 0, b"mine".to_vec(), true).await });
    claim(written.is_err(), "a program that had lost its lock wrote under it")?;
    verdict(&sim)
}

/// An entry is on two of three servers; one of these loses its disk and comes back as if nothing were.
pub fn a_wiped_server_votes(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    let leader = sim.leader();
    let others: Vec<NodeId> = sim.nodes().into_iter().filter(|other| *other != leader).collect();
    let (wiped, without) = (others[0], others[1]);
    sim.isolate(without);
    sim.ask(leader, |server| async move { server.make(Ino::ROOT, "kept", 0o600).await.expect("a majority").ino });
    sim.end(wiped, End::PowerCut);
    sim.wipe(wiped);
    sim.heal();
    sim.isolate(leader);
    sim.start(wiped);
    let seen = sim.spawn(without, |server| async move {
        loop {
            match server.vfs.lookup(Ino::ROOT, b"kept").await {
                Ok(_) => return true,
                Err(ctfs_vfs::FsError::Meta(ctfs_meta::MetaError::NoSuchEntry { .. })) => return false,
                Err(_) => tokio::time::sleep(millis(100)).await,
            }
        }
    });
    let seen = sim.wait_for(&seen, seconds(30));
    claim(seen != Some(false), "an acknowledged change is gone, because a server voted that had lost its log")?;
    verdict(&sim)
}

/// B removes the name of a file that A has open.
pub fn open_but_unlinked(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    let content = crate::invariants::fsync::content(7);
    let written = content.clone();
    let file = sim.ask(node(1), |server| async move {
        let file = server.make(Ino::ROOT, "f", 0o600).await.expect("nothing is wrong").ino;
        server.write(file, libc::O_RDWR, written, true).await.expect("nothing is wrong");
        file
    });
    let handle = sim.ask(node(2), move |server| async move { server.vfs.open(Caller::ROOT, file, libc::O_RDONLY).await.expect("it is there").handle });
    sim.ask(node(1), |server| async move { server.remove(Ino::ROOT, "f").await.expect("it is there") });
    sim.run_for(seconds(5));
    let read = sim.ask(node(2), move |server| async move { server.vfs.read_file(file, handle, 0, 1 << 20).await });
    claim(read.as_ref().is_ok_and(|bytes| bytes[..] == content[..]), format!("an open file without a name cannot be read: {:?}", read.map(|bytes| bytes.len())))?;
    // And goes when nobody has it open.
    sim.ask(node(2), move |server| async move { server.vfs.release(handle).await });
    sim.run_for(seconds(5));
    let is_there = sim.ask(node(2), move |server| async move { matches!(server.metadata.replica.read().attr(file), Ok(Some(_))) });
    claim(!is_there, "an inode without name and handle stays")?;
    verdict(&sim)
}

/// Of `ctfs-consensus`.
const FORWARD: u16 = 0x0201;
