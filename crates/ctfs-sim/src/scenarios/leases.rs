//! Read leases: 1, 2, 11, 17, 18.

use ctfs_types::Ino;

use super::{claim, millis, node, seconds, through_the_log, verdict};
use crate::{network::Filter, sim::Sim};

/// A makes names in a directory and so does B; each kernel holds the directory's lock until its answer,
/// and each entry needs the other kernel to drop a name there.
pub fn two_mkdirs_in_one_directory(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    let dir = sim.ask(node(1), |server| async move { server.make_dir(Ino::ROOT, "d").await.expect("nothing is wrong") });
    for round in 0..10 {
        let began = sim.now();
        let asked: Vec<_> = [1, 2]
            .map(|number| {
                sim.spawn(node(number), move |server| async move { server.make_dir(dir, &format!("{round}-{number}")).await })
            })
            .into();
        for asked in &asked {
            sim.wait(asked).expect("nobody ends").expect("nothing is wrong");
        }
        let took = sim.now() - began;
        claim(took < seconds(1), format!("two mkdirs in one directory took {took:?}"))?;
    }
    verdict(&sim)
}

/// A change is answered while a server that is leased has not told its kernel.
pub fn an_answer_before_all_have_it(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    let missing = sim.ask(node(2), |server| async move {
        server.kernel.stick(true);
        server.kernel.lookup(Ino::ROOT, b"x").await.expect("a lease").is_none()
    });
    assert!(missing);
    sim.ask(node(1), |server| async move { server.make(Ino::ROOT, "x", 0o600).await.expect("an answer") });
    let found = sim.ask(node(2), |server| async move { server.kernel.lookup(Ino::ROOT, b"x").await });
    claim(!matches!(found, Ok(None)), "a name was answered, and another server's kernel says that it is not there")?;
    sim.look_at_kernel(node(2), |kernel| kernel.stick(false));
    sim.all_ready();
    verdict(&sim)
}

/// B reads what A is just making; its program asks C, which still shows the old.
pub fn new_then_old(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    sim.ask(node(3), |server| async move {
        server.kernel.stick(true);
        assert!(server.kernel.lookup(Ino::ROOT, b"x").await.expect("a lease").is_none());
    });
    let making = sim.spawn(node(1), |server| async move { server.make(Ino::ROOT, "x", 0o600).await.map(drop) });
    while !making.is_done() {
        let seen = sim.ask(node(2), |server| async move { server.kernel.lookup(Ino::ROOT, b"x").await });
        if matches!(seen, Ok(Some(_))) {
            break;
        }
        sim.run_for(millis(10));
    }
    let then = sim.ask(node(3), |server| async move { server.kernel.lookup(Ino::ROOT, b"x").await });
    claim(!matches!(then, Ok(None)), "one server showed a new name, and then another showed that it is not there")?;
    sim.look_at_kernel(node(3), |kernel| kernel.stick(false));
    sim.wait(&making);
    verdict(&sim)
}

/// L is cut off together with S; N is elected and answers; L renews S's lease meanwhile.
pub fn the_old_leader_renews(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 5);
    let file = sim.ask(node(1), |server| async move { server.make(Ino::ROOT, "f", 0o600).await.expect("nothing is wrong").ino });
    // Its maker gives it up; else it would wait for that one's pair, which may be cut off, too.
    sim.run_for(seconds(2));
    let old = sim.leader();
    let nodes = sim.nodes();
    let with_it = *nodes.iter().find(|other| **other != old).expect("there are five");
    let others: Vec<_> = nodes.into_iter().filter(|other| ![old, with_it].contains(other)).collect();
    sim.part(&[old, with_it], &others);
    let changed = sim.spawn(others[0], move |server| async move {
        while server.set_mode(file, 0o640).await.is_err() {}
    });
    sim.wait(&changed).expect("nobody ends");
    for reader in [with_it, old] {
        let read = sim.spawn(reader, move |server| async move { server.vfs.getattr(file).await.map(|attr| attr.mode & 0o777) });
        let seen = sim.wait_for(&read, seconds(1));
        claim(!matches!(seen, Some(Ok(0o600))), format!("s{} reads the old from a leader that was replaced", reader.0))?;
    }
    sim.heal();
    sim.all_ready();
    verdict(&sim)
}

/// A machine sleeps for longer than its lease, and its timers do not know.
pub fn a_suspended_machine(seed: u64) -> Result<(), String> {
    let mut sim = through_the_log(seed, 3);
    let file = sim.ask(node(1), |server| async move { server.make(Ino::ROOT, "f", 0o600).await.expect("nothing is wrong").ino });
    let leader = sim.leader();
    // Its maker gives it up.
    sim.run_for(seconds(2));
    let sleeper = *sim.nodes().iter().find(|other| **other != leader).expect("there are three");
    sim.ask(sleeper, move |server| async move { server.vfs.getattr(file).await.map(drop).expect("a lease") });
    sim.suspend(sleeper, seconds(6));
    let read = sim.spawn(sleeper, move |server| async move { server.vfs.getattr(file).await.map(|attr| attr.mode & 0o777) });
    sim.ask(leader, move |server| async move { server.set_mode(file, 0o640).await.expect("the others go on") });
    let seen = sim.wait(&read).expect("nobody ends");
    claim(!matches!(seen, Ok(0o600)), "a machine woke up and read the old")?;
    sim.all_ready();
    verdict(&sim)
}

/// S was away while a change was answered, is taken back, and has not got the change yet.
pub fn readmission(seed: u64) -> Result<(), String> {
    let mut sim: Sim = through_the_log(seed, 3);
    let file = sim.ask(node(1), |server| async move { server.make(Ino::ROOT, "f", 0o600).await.expect("nothing is wrong").ino });
    let leader = sim.leader();
    let away = *sim.nodes().iter().find(|other| **other != leader).expect("there are three");
    sim.run_for(seconds(2));
    let no_entries = Filter { from: None, to: Some(away), service: APPEND_ENTRIES, answers: false, left: u32::MAX, late_by: None };
    let no_leases = Filter { from: Some(away), to: None, service: RENEW, answers: false, left: u32::MAX, late_by: None };
    // Its lease lapses while nothing changes; then it is not taken back for a second.
    sim.shared.wires.lock().filters.push(no_leases);
    sim.run_for(millis(4200));
    sim.shared.wires.lock().filters.push(no_entries);
    sim.ask(leader, move |server| async move { server.set_mode(file, 0o640).await.expect("the others go on") });
    // From here on leases get through, entries do not.
    sim.shared.wires.lock().filters = vec![no_entries];
    for _ in 0..150 {
        let read = sim.spawn(away, move |server| async move {
            server.vfs.getattr(file).await.map(|attr| attr.mode & 0o777)
        });
        let seen = sim.wait_for(&read, millis(10));
        claim(!matches!(seen, Some(Ok(0o600))), "a server was taken back and read the old")?;
    }
    sim.heal();
    sim.all_ready();
    verdict(&sim)
}

/// Of `ctfs-consensus`.
const APPEND_ENTRIES: u16 = 0x0101;
const RENEW: u16 = 0x0202;
