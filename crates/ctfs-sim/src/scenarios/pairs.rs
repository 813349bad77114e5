//! Journals and their copies at a pair: 4, 9, 10, 15.

use std::time::Duration;

use ctfs_meta::Op;
use ctfs_types::{Ino, NodeId};

use super::{ahead::held, begin, claim, millis, node, seconds, verdict};
use crate::{
    chunks::PINNED_FOR,
    invariants::fsync::content,
    network::Filter,
    programs::Care,
    server::{Server, metadata::service},
    sim::{End, Sim},
};

/// Who leads, whose journal it is, and who has it.
const LEADER: NodeId = NodeId(1);
const WRITER: NodeId = NodeId(2);
const PAIR: NodeId = NodeId(3);
/// Until everything is well again, in scenarios in which it must be.
const PATIENCE: Duration = Duration::from_secs(60);

/// Servers of which the third is the pair of the second, and the fourth is the next best.
fn paired(seed: u64, servers: u64) -> Sim {
    // What is synced stays in the journal alone.
    let mut sim = Sim::with(seed, |_, vfs| vfs.content.dirty_age_max = seconds(1000));
    {
        let mut wires = sim.shared.wires.lock();
        for other in 1..=servers {
            let away = if node(other) == LEADER { 9 } else { other };
            wires.set_distance(WRITER, node(other), millis(away));
            wires.set_distance(PAIR, node(other), millis(away));
        }
    }
    begin(&mut sim, servers);
    assert_eq!(sim.leader(), LEADER, "who founds leads");
    await_pair(&mut sim, WRITER, Some(PAIR));
    sim
}

/// Runs until `server` has `pair` as its pair, or none.
fn await_pair(sim: &mut Sim, server: NodeId, pair: Option<NodeId>) {
    sim.ask(server, move |server| async move { server.await_pair(|now| now == pair).await });
}

/// A file in a directory that the writer holds; nothing of it is in the journal any more.
fn held_file(sim: &mut Sim) -> (Ino, Ino) {
    let dir = held(sim, WRITER, "d");
    let file = sim.ask(WRITER, move |server| async move {
        let file = server.make(dir, "file", 0o600).await.expect("it holds the directory").ino;
        while !server.metadata_settled().await {}
        file
    });
    // What was made before the directory was held is given up meanwhile.
    sim.run_for(seconds(2));
    (dir, file)
}

/// Writes a version and syncs it.
async fn write_synced(server: &Server, file: Ino, version: u64) -> bool {
    let opened = server.vfs.open(ctfs_vfs::Caller::ROOT, file, libc::O_RDWR).await.expect("it is there");
    // Not closed: that would flush it.
    server.write_with(file, opened.handle, 0, content(version), true).await.is_ok()
}

/// The version of the file is synced, and by the journal alone: the metadata have another size.
fn sync_by_journal(sim: &mut Sim, file: Ino, version: u64) {
    let is_synced = sim.ask(WRITER, move |server| async move { write_synced(&server, file, version).await });
    assert!(is_synced, "nothing is wrong yet");
    let size = sim.look(LEADER, move |server| server.metadata.replica.read().attr(file).ok().flatten().map(|attr| attr.size));
    assert_eq!(size, Some(Some(0)), "it is not in the log");
}

/// What a server shows of the file, as soon as it shows anything.
fn read_at(sim: &mut Sim, server: NodeId, file: Ino) -> Option<Vec<u8>> {
    let read = sim.spawn(server, move |server| async move {
        loop {
            match server.read(file, Care::Unsynced).await {
                Ok(bytes) => return bytes.to_vec(),
                Err(_) => tokio::time::sleep(millis(100)).await,
            }
        }
    });
    sim.wait_for(&read, PATIENCE)
}

fn lose(sim: &mut Sim, server: NodeId) {
    sim.end(server, End::PowerCut);
    sim.wipe(server);
}

/// No copy of a journal gets to `to` any more.
fn refuse_copies(sim: &Sim, to: NodeId) {
    let none = Filter { from: None, to: Some(to), service: service::JOURNAL, answers: false, left: u32::MAX, late_by: None };
    sim.shared.wires.lock().filters.push(none);
}

fn is_version(read: Option<&[u8]>, version: u64) -> bool {
    read.is_some_and(|bytes| bytes == content(version))
}

/// fsync answers before the pair has it, and the server is lost.
pub fn fsync_before_the_pair(seed: u64) -> Result<(), String> {
    let mut sim = paired(seed, 3);
    let (_, file) = held_file(&mut sim);
    sync_by_journal(&mut sim, file, 1);
    sim.isolate(WRITER);
    let synced = sim.spawn(WRITER, move |server| async move { write_synced(&server, file, 2).await });
    let synced = sim.wait_for(&synced, seconds(12));
    lose(&mut sim, WRITER);
    sim.heal();
    let read = read_at(&mut sim, LEADER, file);
    claim(is_version(read.as_deref(), if synced == Some(true) { 2 } else { 1 }), "fsync answered, and what it was about is gone with one server")?;
    verdict(&sim)
}

/// The life of a server is ended, and others look at what it held before its pair has sent the journal.
pub fn free_before_it_is_sent(seed: u64) -> Result<(), String> {
    let mut sim = paired(seed, 5);
    let (_, file) = held_file(&mut sim);
    sync_by_journal(&mut sim, file, 1);
    lose(&mut sim, WRITER);
    // The pair is slow when it comes to send it.
    sim.run_for(seconds(8));
    sim.pause(PAIR, seconds(8));
    let read = read_at(&mut sim, LEADER, file);
    claim(is_version(read.as_deref(), 1), format!("of a synced file {:?} bytes were shown after its server was lost", read.map(|bytes| bytes.len())))?;
    verdict(&sim)
}

/// A command that its pair has is late on its way into the log: it arrives when the life has ended, before the
/// pair sends it.
pub fn a_command_between_end_and_take_over(seed: u64) -> Result<(), String> {
    let mut sim = paired(seed, 5);
    let (dir, _) = held_file(&mut sim);
    let late = Filter { from: Some(WRITER), to: None, service: FORWARD, answers: false, left: 1, late_by: Some(seconds(14)) };
    sim.shared.wires.lock().filters.push(late);
    let synced = sim.ask(WRITER, move |server| async move {
        server.make(dir, "late", 0o600).await.expect("it holds the directory");
        let handle = server.vfs.opendir(dir).await.expect("it is there");
        server.vfs.fsyncdir(dir, handle).await.is_ok()
    });
    assert!(synced, "nothing is wrong yet");
    // It is on its way to the log.
    sim.run_for(millis(100));
    lose(&mut sim, WRITER);
    // The life ends while the pair is slow.
    sim.run_for(seconds(8));
    sim.pause(PAIR, seconds(8));
    sim.run_for(seconds(25));
    let found = sim.ask(LEADER, move |server| async move { server.vfs.lookup(dir, b"late").await.is_ok() });
    claim(found, "a name that fsync had acknowledged is gone, because the life was refused it once")?;
    verdict(&sim)
}

/// A server is declared dead that is merely slow: its pair has read the copy, and then more comes.
pub fn more_after_the_copy_was_read(seed: u64) -> Result<(), String> {
    let mut sim = paired(seed, 3);
    let (_, file) = held_file(&mut sim);
    sync_by_journal(&mut sim, file, 1);
    // Its copy keeps no commands, so that it is read in no time.
    sim.run_for(seconds(3));
    sync_by_journal(&mut sim, file, 2);
    // It does not hear that its life was ended; its lease goes on for a moment.
    let deaf = Filter { from: None, to: Some(WRITER), service: APPEND_ENTRIES, answers: false, left: u32::MAX, late_by: None };
    sim.shared.wires.lock().filters.push(deaf);
    let life = sim.look(WRITER, |server| server.consensus.incarnation()).expect("it runs");
    sim.shared.history.lock().life_ends(sim.now(), life);
    let ended = sim.spawn(LEADER, move |server| async move { server.consensus.propose(Op::Fence { node: WRITER, incarnation: life }).await.is_ok() });
    sim.run_for(millis(600));
    let synced = sim.spawn(WRITER, move |server| async move { write_synced(&server, file, 3).await });
    let synced = sim.wait_for(&synced, seconds(10));
    sim.wait(&ended);
    sim.heal();
    let read = read_at(&mut sim, LEADER, file);
    claim(synced != Some(true) || is_version(read.as_deref(), 3), "fsync answered in a life that its pair had taken over, and what it was about is gone")?;
    claim(is_version(read.as_deref(), 2) || is_version(read.as_deref(), 3), "what was synced before is gone")?;
    verdict(&sim)
}

/// The pair is away, its server goes on without one and is lost; the pair returns with its old copy.
pub fn a_stale_copy_takes_over(seed: u64) -> Result<(), String> {
    let mut sim = paired(seed, 3);
    let (dir, file) = held_file(&mut sim);
    sync_by_journal(&mut sim, file, 1);
    sim.end(PAIR, End::PowerCut);
    // Nobody else gets to be the pair.
    refuse_copies(&sim, LEADER);
    let synced = sim.ask(WRITER, move |server| async move {
        server.make(dir, "more", 0o600).await.expect("a majority is there");
        write_synced(&server, file, 2).await
    });
    claim(synced, "fsync takes the way of the log without a pair")?;
    await_pair(&mut sim, WRITER, None);
    lose(&mut sim, WRITER);
    sim.heal();
    sim.start(PAIR);
    sim.ready(PAIR);
    // It takes over what the life left.
    sim.run_for(seconds(20));
    let read = read_at(&mut sim, LEADER, file);
    claim(is_version(read.as_deref(), 2), "an old copy of a journal took back what fsync had acknowledged since")?;
    verdict(&sim)
}

/// The pair is away, its server takes another and is lost; the first pair returns with its old copy.
pub fn a_pair_nobody_knows_of(seed: u64) -> Result<(), String> {
    let mut sim = paired(seed, 5);
    let (dir, file) = held_file(&mut sim);
    sync_by_journal(&mut sim, file, 1);
    sim.end(PAIR, End::PowerCut);
    sim.ask(WRITER, move |server| async move { server.make(dir, "more", 0o600).await.map(drop).expect("a majority is there") });
    await_pair(&mut sim, WRITER, Some(node(4)));
    sync_by_journal(&mut sim, file, 2);
    lose(&mut sim, WRITER);
    sim.start(PAIR);
    sim.ready(PAIR);
    let read = read_at(&mut sim, LEADER, file);
    claim(is_version(read.as_deref(), 2), "what only the second pair had is gone with one server")?;
    verdict(&sim)
}

/// A server names another pair, which has nothing of its journal yet, and is lost.
pub fn a_pair_without_the_journal(seed: u64) -> Result<(), String> {
    let mut sim = paired(seed, 3);
    let (dir, file) = held_file(&mut sim);
    sync_by_journal(&mut sim, file, 1);
    refuse_copies(&sim, LEADER);
    sim.part(&[WRITER], &[PAIR]);
    // Something to send, so that it is noticed.
    sim.ask(WRITER, move |server| async move { server.make(dir, "more", 0o600).await.map(drop).expect("a majority is there") });
    await_pair(&mut sim, WRITER, None);
    sim.run_for(seconds(3));
    lose(&mut sim, WRITER);
    sim.heal();
    let read = read_at(&mut sim, LEADER, file);
    claim(is_version(read.as_deref(), 1), "what the pair had is gone with one server, because another was named that had nothing")?;
    verdict(&sim)
}

/// A file is flushed where its server acts ahead of the log. If only the journal names its chunk then, nobody
/// keeps it: the server is lost, and its pair is away for longer than chunks are pinned.
pub fn a_chunk_that_a_journal_names(seed: u64) -> Result<(), String> {
    let mut sim = paired(seed, 5);
    let (_, file) = held_file(&mut sim);
    sync_by_journal(&mut sim, file, 1);
    // From here on nothing that happens there gets into the log.
    let forward = Filter { from: Some(WRITER), to: None, service: FORWARD, answers: false, left: u32::MAX, late_by: None };
    sim.shared.wires.lock().filters.push(forward);
    drop(sim.spawn(WRITER, |server| async move { server.vfs.flush_all().await.is_ok() }));
    sim.run_for(millis(500));
    sim.end(PAIR, End::PowerCut);
    lose(&mut sim, WRITER);
    sim.run_for(PINNED_FOR + seconds(15));
    sim.start(PAIR);
    sim.ready(PAIR);
    let read = read_at(&mut sim, LEADER, file);
    claim(is_version(read.as_deref(), 1), "a chunk was dropped that only a journal named, and with it what fsync had acknowledged")?;
    verdict(&sim)
}

/// Of `ctfs-consensus`.
const FORWARD: u16 = 0x0201;
const APPEND_ENTRIES: u16 = 0x0101;
