//! Directories that are held: 4, 5, 6, 7.

use ctfs_types::{Ino, NodeId};

use super::{claim, node, seconds, verdict, with_holders};
use crate::{
    network::Filter,
    server::metadata::service,
    sim::{End, Sim},
};

/// Makes a directory that `node` holds, with a file `first` in it.
pub fn held(sim: &mut Sim, node: NodeId, name: &'static str) -> Ino {
    sim.ask(node, move |server| async move {
        let dir = server.make_dir(Ino::ROOT, name).await.expect("nothing is wrong");
        server.make(dir, "first", 0o600).await.expect("nothing is wrong");
        // It is taken in the background, and numbers for what is made are reserved so.
        let before = server.vfs.delegations().ahead;
        for number in 0.. {
            assert!(number < 100, "the directory is not taken");
            tokio::time::sleep(super::millis(20)).await;
            server.make(dir, &format!("try{number}"), 0o600).await.expect("nothing is wrong");
            if server.vfs.delegations().ahead > before {
                break;
            }
        }
        while !server.metadata_settled().await {}
        // Visible everywhere, also that it is held.
        tokio::time::sleep(super::millis(200)).await;
        dir
    })
}

/// A server that does not lead.
fn follower(sim: &mut Sim) -> NodeId {
    let leader = sim.leader();
    *sim.nodes().iter().find(|other| **other != leader).expect("there are several")
}

/// A writes in a directory that it holds, then in a shared one, which commits; A dies; the second
/// survives, the first does not.
pub fn the_prefix_breaks(seed: u64) -> Result<(), String> {
    let mut sim = with_holders(seed, 3);
    let writer = follower(&mut sim);
    let reader = *sim.nodes().iter().find(|other| **other != writer).expect("there are three");
    let dir = held(&mut sim, writer, "d");
    let other = held(&mut sim, reader, "e");
    // What happened first is late on its way, and its pair does not have it yet.
    for (service, left) in [(FORWARD, 1), (service::JOURNAL, u32::MAX)] {
        sim.shared.wires.lock().filters.push(Filter { from: Some(writer), to: None, service, answers: false, left, late_by: None });
    }
    let both = sim.spawn(writer, move |server| async move {
        server.make_dir(dir, "one").await.expect("it holds the directory");
        // It is on its way by then, in a message of its own.
        tokio::time::sleep(super::millis(100)).await;
        server.make_dir(other, "two").await.map(drop)
    });
    let two = sim.wait_for(&both, seconds(20));
    sim.end(writer, End::PowerCut);
    sim.run_for(seconds(15));
    let (one, is_two) = sim.ask(reader, move |server| async move {
        let one = server.vfs.lookup(dir, b"one").await.is_ok();
        (one, server.vfs.lookup(other, b"two").await.is_ok())
    });
    claim(one || !is_two, "the second of two changes survived a crash, the first did not")?;
    claim(!matches!(two, Some(Ok(()))) || is_two, "a change that went through the log is gone")?;
    verdict(&sim)
}

/// fsync answers, the server dies for good, and what it acknowledged is gone.
pub fn fsync_while_cut_off(seed: u64) -> Result<(), String> {
    let mut sim = with_holders(seed, 3);
    let writer = follower(&mut sim);
    let reader = *sim.nodes().iter().find(|other| **other != writer).expect("there are three");
    let dir = held(&mut sim, writer, "d");
    sim.isolate(writer);
    let synced = sim.spawn(writer, move |server| async move {
        server.make(dir, "x", 0o600).await.expect("it holds the directory");
        let handle = server.vfs.opendir(dir).await.expect("it is there");
        server.vfs.fsyncdir(dir, handle).await.is_ok()
    });
    let synced = sim.wait_for(&synced, seconds(12));
    sim.end(writer, End::PowerCut);
    sim.wipe(writer);
    sim.heal();
    sim.run_for(seconds(15));
    let is_there = sim.ask(reader, move |server| async move { server.vfs.lookup(dir, b"x").await.is_ok() });
    claim(is_there || synced != Some(true), "fsync answered, and what it was about is gone with one server")?;
    verdict(&sim)
}

/// A acts ahead of the log on what B holds.
pub fn ahead_where_another_holds(seed: u64) -> Result<(), String> {
    let mut sim = with_holders(seed, 3);
    held(&mut sim, node(1), "d");
    let other = held(&mut sim, node(2), "e");
    let file = sim.ask(node(2), move |server| async move { server.vfs.lookup(other, b"first").await.expect("it is there").ino });
    let asked: Vec<_> = [1u16, 2]
        .map(|number| {
            let (node, mode) = (node(u64::from(number)), 0o600 + number);
            sim.spawn(node, move |server| async move {
                let _ = server.set_mode(file, mode).await;
                let _ = server.make(other, &format!("by-{number}"), mode).await;
            })
        })
        .into();
    for asked in &asked {
        sim.wait(asked);
    }
    sim.run_for(seconds(5));
    verdict(&sim)
}

/// A holds d1 and moves something to d2, B holds d2 and moves something to d1.
pub fn recalls_in_a_ring(seed: u64) -> Result<(), String> {
    let mut sim = with_holders(seed, 3);
    let leader = sim.leader();
    let [a, b] = sim.nodes().into_iter().filter(|node| *node != leader).collect::<Vec<_>>()[..] else { panic!("there are three") };
    // One pair of directories for each try: what was recalled twice stays shared.
    for (one, two) in [("a1", "a2"), ("b1", "b2"), ("c1", "c2"), ("d1", "d2")] {
        let (first, second) = (held(&mut sim, a, one), held(&mut sim, b, two));
        let began = sim.now();
        let asked = [(a, first, second, "a"), (b, second, first, "b")].map(|(node, from, to, name)| {
            sim.spawn(node, move |server| async move { server.vfs.rename(from, b"first", to, name.as_bytes(), 0).await })
        });
        for asked in &asked {
            sim.wait(asked).expect("nobody ends").map_err(|error| format!("a rename between two held directories: {error}"))?;
        }
        let took = sim.now() - began;
        claim(took < seconds(3), format!("two renames in a ring took {took:?}"))?;
    }
    verdict(&sim)
}

/// B's kernel knows that a name is not there; A is granted the directory and makes it, and tells nobody.
pub fn a_grant_forgets_who_cached(seed: u64) -> Result<(), String> {
    let mut sim = with_holders(seed, 3);
    let dir = sim.ask(node(1), |server| async move { server.make_dir(Ino::ROOT, "d").await.expect("nothing is wrong") });
    // Who made it may hold it from birth: it is given up by the look.
    let missing = sim.ask(node(2), move |server| async move { server.kernel.lookup(dir, b"x").await.expect("a lease").is_none() });
    assert!(missing);
    let made = sim.ask(node(1), move |server| async move {
        let before = server.vfs.delegations().ahead;
        server.make(dir, "y", 0o600).await.expect("nothing is wrong");
        for number in 0..60 {
            if server.vfs.delegations().ahead > before {
                break;
            }
            tokio::time::sleep(super::millis(10)).await;
            server.make(dir, &format!("y{number}"), 0o600).await.expect("nothing is wrong");
        }
        server.make(dir, "x", 0o600).await.expect("nothing is wrong");
        server.vfs.delegations().ahead > before
    });
    assert!(made, "the directory is not taken");
    let found = sim.ask(node(2), move |server| async move { server.kernel.lookup(dir, b"x").await });
    claim(!matches!(found, Ok(None)), "a holder made a name, and another server's kernel says that it is not there")?;
    verdict(&sim)
}

/// Of `ctfs-consensus`.
const FORWARD: u16 = 0x0201;
