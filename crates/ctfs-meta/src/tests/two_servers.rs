//! Two servers whose commands happen ahead of the log wherever they hold the directory.
//!
//! Each has a replica, and a queue of commands that happened there first. At any moment a server does
//! something more, sends a part of its queue, or applies a part of the log. A command that may not be
//! ahead goes into the log behind the server's own queue; one that is refused because the other server
//! holds what it touches is tried again when that one has given it up. However all of this interleaves:
//! the log answers each command as its server did, no replica's layer differs from what the log then
//! writes, and in the end both replicas are the same and every count is right.

use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use ctfs_types::{FileKind, FileUse, Holder, Incarnation, Ino, LogIndex, NodeId, RequestId, limits::INLINE_BYTES_MAX};

use super::{
    harness::{Verdict, chunk, copy, inline, name, node, owner, record_lock, time, write_op},
    observe::observe,
};
use crate::{About, Ahead, Batch, CellWrite, Command, LockKind, MemoryStore, MetaError, Namespace, NewContent, Op, Policy, RenameMode, Reply, SetAttr, XattrMode};

/// A small generator, so that one seed is a whole history.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }

    fn of<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())].clone()
    }
}

struct Server {
    ns: Namespace,
    life: u64,
    seq: u64,
    /// Happened here, not in the log: with what they were answered.
    queue: VecDeque<(Command, Reply)>,
    /// On its way to the log, behind all that had happened when it set out.
    on_the_way: Option<(Command, Vec<Ino>)>,
}

impl Server {
    fn holder(&self) -> Holder {
        Holder { node: NodeId(self.life), incarnation: Incarnation(self.life) }
    }

    fn command(&mut self, about: About, op: Op, ticks: u64) -> Command {
        self.seq += 1;
        Command { request: RequestId { client: self.life, seq: self.seq }, answered: self.seq.saturating_sub(40), at: time(ticks), about, op }
    }
}

struct World {
    servers: Vec<Server>,
    /// Entries, and the verdicts each had at the replica that applied it first.
    log: Vec<(Vec<Command>, Option<Vec<Verdict>>)>,
    ticks: u64,
    chance: Chance,
    happened: u64,
    recalled: u64,
    /// Commands that touched what their own server holds and did not keep from going ahead.
    refused: u64,
    /// Commands about locks that no log has seen, and locks of those that one had to see later.
    locked: u64,
    settled: u64,
}

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

impl World {
    fn new(seed: u64) -> Self {
        let server = |life| Server { ns: Namespace::open(Box::new(MemoryStore::default())).unwrap(), life, seq: 0, queue: VecDeque::new(), on_the_way: None };
        Self {
            servers: vec![server(100), server(200)],
            log: Vec::new(),
            ticks: 0,
            chance: Chance(seed | 1),
            happened: 0,
            recalled: 0,
            refused: 0,
            locked: 0,
            settled: 0,
        }
    }

    /// Applies up to `most` entries at server `s`.
    fn apply(&mut self, s: usize, most: usize) {
        for _ in 0..most {
            let at = self.servers[s].ns.applied().0 as usize;
            let Some((commands, known)) = self.log.get_mut(at) else { return };
            let applied = self.servers[s].ns.apply(LogIndex(at as u64 + 1), commands, Batch::new()).unwrap();
            assert_eq!(applied.diverged, [], "what was ahead is what the log wrote: {commands:?}");
            match known {
                Some(known) => assert_eq!(*known, applied.verdicts, "replicas agree"),
                None => *known = Some(applied.verdicts),
            }
        }
    }

    /// Server `s` gets the state of the other one as a snapshot, if that is newer.
    fn replace(&mut self, s: usize) {
        let newer = &self.servers[1 - s].ns;
        if newer.applied() < self.servers[s].ns.applied() {
            return;
        }
        let snapshot = Namespace::open(Box::new(copy(newer))).unwrap();
        let mut old = std::mem::replace(&mut self.servers[s].ns, snapshot);
        let lost = self.servers[s].ns.take_ahead_of(&mut old).unwrap();
        assert_eq!(lost, [], "what was ahead of the old state is ahead of the new one");
        assert_eq!(self.servers[s].ns.ahead(), self.servers[s].queue.len());
    }

    /// Sends up to `most` commands of the queue as one entry, and looks that the log answers the same.
    fn send(&mut self, s: usize, most: usize) {
        let count = most.min(self.servers[s].queue.len());
        if count == 0 {
            return;
        }
        let (commands, expected): (Vec<_>, Vec<_>) = self.servers[s].queue.drain(..count).unzip();
        self.log.push((commands, None));
        let last = self.log.len() - 1;
        // The other replica answers first, or this one.
        let first = self.chance.below(2);
        self.apply(first, usize::MAX);
        let verdicts = self.log[last].1.clone().unwrap();
        let expected: Vec<Verdict> = expected.into_iter().map(Ok).collect();
        assert_eq!(verdicts, expected, "the log answers what was answered before");
    }

    /// The command on the way comes to the log, whatever its verdict.
    fn land(&mut self, s: usize) {
        if let Some((command, inos)) = self.servers[s].on_the_way.take() {
            self.log.push((vec![command], None));
            self.apply(s, usize::MAX);
            self.servers[s].ns.has_landed(&inos);
        }
    }

    /// What only this server knows of locks becomes known before the command sets out.
    fn settle(&mut self, s: usize, ops: Vec<Op>) {
        self.settled += ops.len() as u64;
        for op in ops {
            let mut command = self.servers[s].command(About::Ahead, op, self.ticks);
            let holder = self.servers[s].holder();
            match self.servers[s].ns.settle_ahead(&mut command, holder).unwrap() {
                Ahead::Happened { reply, .. } => self.servers[s].queue.push_back((command, reply)),
                other => panic!("a lock that was held is {other:?}"),
            }
        }
    }

    fn sets_out(&mut self, s: usize, op: &Op) -> Vec<Ino> {
        let ops = self.servers[s].ns.settle_locks(op).unwrap();
        self.settle(s, ops);
        self.servers[s].ns.sets_out(op).unwrap()
    }

    fn propose(&mut self, s: usize, op: Op) -> Verdict {
        self.land(s);
        let inos = self.sets_out(s, &op);
        self.send(s, usize::MAX);
        self.ticks += 1;
        let command = self.servers[s].command(About::Inodes(inos.clone()), op, self.ticks);
        self.log.push((vec![command], None));
        self.apply(s, usize::MAX);
        self.servers[s].ns.has_landed(&inos);
        self.log.last().unwrap().1.clone().unwrap().remove(0)
    }

    fn run(&mut self, s: usize, op: Op) -> Verdict {
        self.ticks += 1;
        let holder = self.servers[s].holder();
        if let Some(verdict) = self.servers[s].ns.lock_here(&op, holder).unwrap() {
            self.locked += u64::from(verdict.is_ok());
            return verdict;
        }
        let ops = self.servers[s].ns.settle_locks(&op).unwrap();
        self.settle(s, ops);
        let mut command = self.servers[s].command(About::Ahead, op.clone(), self.ticks);
        match self.servers[s].ns.apply_ahead(&mut command, holder).unwrap() {
            Ahead::Happened { reply, .. } => {
                self.happened += 1;
                self.servers[s].queue.push_back((command, reply.clone()));
                return Ok(reply);
            }
            Ahead::Refused(why) => return Err(why),
            Ahead::NotAlone => {}
        }
        if self.chance.below(4) == 0 && self.servers[s].on_the_way.is_none() {
            let inos = self.sets_out(s, &op);
            self.send(s, usize::MAX);
            self.ticks += 1;
            let command = self.servers[s].command(About::Inodes(inos.clone()), op, self.ticks);
            self.servers[s].on_the_way = Some((command, inos));
            return Err(MetaError::Answered);
        }
        for _ in 0..20 {
            match self.propose(s, op.clone()) {
                Err(MetaError::Held { ino, holder }) => {
                    self.refused += u64::from(holder == self.servers[s].holder());
                    self.recalled += 1;
                    let from = if holder == self.servers[0].holder() { 0 } else { 1 };
                    self.give_up(from, ino);
                }
                verdict => return verdict,
            }
        }
        panic!("{op:?} is refused for ever");
    }

    fn give_up(&mut self, s: usize, ino: Ino) {
        self.send(s, usize::MAX);
        self.apply(s, usize::MAX);
        let holder = self.servers[s].holder();
        let ops = self.servers[s].ns.settle_locks_in(&[ino]).unwrap();
        self.settle(s, ops);
        self.servers[s].ns.close_ahead(&[ino]);
        if self.servers[s].ns.cover(ino).unwrap() == Some((ino, holder)) {
            let more = Op::SetAttr { ino, set: SetAttr { mode: Some(0o700), ..SetAttr::default() } };
            let mut more = self.servers[s].command(About::Ahead, more, self.ticks);
            assert_eq!(self.servers[s].ns.apply_ahead(&mut more, holder).unwrap(), Ahead::NotAlone, "it is being given up");
        }
        let usage = self.servers[s].ns.attr(ino).unwrap().expect("who is held is there").usage;
        if let FileUse::Owned { holder: held, since } = usage {
            assert_eq!(held, holder);
            let shared = self.chance.below(4) == 0;
            self.propose(s, Op::Disown { files: vec![(ino, since)], holder, shared }).unwrap();
        }
        self.servers[s].ns.open_ahead(&[ino]);
    }

    /// Every inode the server sees, in order.
    fn inodes(&self, s: usize) -> Vec<(Ino, FileKind)> {
        let ns = &self.servers[s].ns;
        let mut found = vec![(Ino::ROOT, FileKind::Directory)];
        let mut at = 0;
        while at < found.len() {
            if found[at].1 == FileKind::Directory {
                found.extend(ns.list(found[at].0, 0, usize::MAX).unwrap().into_iter().map(|entry| (entry.ino, entry.kind)));
            }
            at += 1;
        }
        found
    }

    /// What the server counts at the top is what it sees, also ahead of the log.
    fn count(&self, s: usize) {
        let inodes: BTreeSet<Ino> = self.inodes(s).into_iter().map(|(ino, _)| ino).collect();
        let totals = self.servers[s].ns.totals(Ino::ROOT).unwrap().expect("the root is a directory");
        assert_eq!(totals.inodes() + 1, inodes.len() as u64, "{totals:?}");
    }

    fn some_op(&mut self, s: usize) -> Op {
        let all = self.inodes(s);
        let dirs: Vec<Ino> = all.iter().filter(|(_, kind)| *kind == FileKind::Directory).map(|(ino, _)| *ino).collect();
        let files: Vec<Ino> = all.iter().filter(|(_, kind)| *kind == FileKind::File).map(|(ino, _)| *ino).collect();
        let (mut dir, other) = (self.chance.of(&dirs), self.chance.of(&dirs));
        let home: Vec<Ino> = dirs.iter().copied().filter(|ino| ino.0 % 2 == s as u64).collect();
        if !home.is_empty() && self.chance.below(10) > 0 {
            // Mostly where the other one is not, so that holding pays.
            dir = self.chance.of(&home);
        }
        let (one, two) = (name(self.chance.of(&NAMES)), name(self.chance.of(&NAMES)));
        let mut file = if files.is_empty() { Ino(1 << 40) } else { self.chance.of(&files) };
        let mut any = self.chance.of(&all).0;
        let here = self.servers[s].ns.list(dir, 0, usize::MAX).unwrap();
        if self.chance.below(8) > 0 {
            any = dir;
            if let Some(entry) = here.iter().find(|entry| entry.kind == FileKind::File) {
                (file, any) = (entry.ino, entry.ino);
            }
        }
        let (holder, life) = (self.servers[s].holder(), self.servers[s].life);
        match self.chance.below(52) {
            0..=8 => {
                let content = match self.chance.below(8) {
                    0..=3 => NewContent::File,
                    4..=6 => NewContent::Directory,
                    _ => NewContent::Symlink { target: b"there".to_vec() },
                };
                let held = (content == NewContent::File && self.chance.below(2) == 0).then_some(holder);
                Op::Make { parent: dir, name: one, node: crate::NewNode { holder: held, ..node(content, 0o2755) } }
            }
            9..=11 => Op::Unlink { parent: dir, name: one },
            12 => Op::Rmdir { parent: dir, name: one },
            13..=15 => Op::Rename { from: dir, name: one, to: dir, new_name: two, mode: RenameMode::Replace },
            16..=17 => {
                let mode = self.chance.of(&[RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange]);
                Op::Rename { from: dir, name: one, to: other, new_name: two, mode }
            }
            18 => Op::Link { ino: file, parent: dir, name: one },
            19..=21 => Op::SetAttr { ino: any, set: SetAttr { mode: Some(0o700 + self.chance.below(8) as u16), ..SetAttr::default() } },
            22 => Op::SetAttr { ino: file, set: SetAttr { size: Some(self.chance.of(&[0, 3, 5000])), ..SetAttr::default() } },
            23..=24 => Op::SetXattr { ino: any, name: b"user.a".to_vec(), value: vec![1; self.chance.below(9)], mode: XattrMode::Set },
            25 => Op::RemoveXattr { ino: any, name: b"user.a".to_vec() },
            26..=28 => {
                let expect = self.servers[s].ns.cells(file, 0, 1).unwrap().first().map_or_else(Default::default, |cell| cell.extent.stamp);
                let big = self.chance.below(4) == 0;
                let data = if big { chunk(self.chance.below(3) as u8, 9000) } else { inline(&vec![7; 1 + self.chance.below(INLINE_BYTES_MAX)]) };
                let size = u64::from(data.len());
                write_op(file, vec![CellWrite { cell: 0, expect, start: 0, data: Some(data), copies: 0 }], size)
            }
            29..=30 => Op::Own { ino: file, holder, although_shared: self.chance.below(2) == 0 },
            31..=34 => Op::Own { ino: dir, holder, although_shared: true },
            35..=36 => Op::Lock { ino: file, lock: record_lock(owner(life, life, self.chance.below(2) as u64), self.chance.below(2) == 0, 0, 9) },
            37 => Op::Unlock { ino: file, owner: owner(life, life, self.chance.below(2) as u64), kind: LockKind::Record, start: 0, end: 4 },
            38 => Op::Reap { inos: self.servers[s].ns.orphans(Ino(0), 3).unwrap() },
            39 => Op::SetPolicy { ino: dir, policy: Policy { copies: Some(self.chance.below(3) as u8), ..Policy::default() } },
            40 => Op::ReserveInos { count: 1 + self.chance.below(40) as u32 },
            41 => Op::SetQuota { ino: dir, quota: crate::Quota { files: (self.chance.below(2) == 0).then_some(50), ..crate::Quota::default() } },
            43..=48 => Op::Lock { ino: file, lock: record_lock(owner(life, life, self.chance.below(2) as u64), self.chance.below(3) == 0, 0, 9) },
            49 => Op::AwaitLock { ino: file, lock: record_lock(owner(life, life, self.chance.below(2) as u64), true, 0, 9), ticket: self.ticks },
            50 => Op::UnlockAll { ino: file, owner: owner(life, life, self.chance.below(2) as u64) },
            42 => Op::FreeCells { inos: self.servers[s].ns.unfreed(3) },
            _ => Op::Noop,
        }
    }

    fn live(&mut self, steps: usize) {
        for s in 0..2 {
            self.propose(s, Op::ReserveInos { count: 500 }).unwrap();
        }
        for _ in 0..steps {
            let s = self.chance.below(2);
            match self.chance.below(12) {
                0 if self.chance.below(3) == 0 => self.land(s),
                0 => {
                    let most = 1 + self.chance.below(4);
                    self.send(s, most);
                }
                1..=2 => {
                    let most = 1 + self.chance.below(5);
                    self.apply(s, most);
                }
                3 if self.chance.below(12) == 0 => self.replace(s),
                3 if self.chance.below(2) == 0 => self.count(s),
                3 if self.chance.below(8) == 0 => drop(observe(&self.servers[s].ns)),
                _ => {
                    let op = self.some_op(s);
                    drop(self.run(s, op));
                }
            }
        }
        for s in 0..2 {
            self.land(s);
            let all: Vec<Ino> = self.inodes(s).into_iter().map(|(ino, _)| ino).collect();
            let ops = self.servers[s].ns.settle_locks_in(&all).unwrap();
            self.settle(s, ops);
            self.send(s, usize::MAX);
        }
        for s in 0..2 {
            self.apply(s, usize::MAX);
            assert_eq!(self.servers[s].ns.ahead(), 0, "nothing is ahead when the log has it all");
        }
        assert_eq!(self.servers[0].ns.state_hash(), self.servers[1].ns.state_hash());
        assert_eq!(observe(&self.servers[0].ns), observe(&self.servers[1].ns));
    }
}

#[test]
fn histories_of_two_servers_have_enough_ahead_and_recalled_to_mean_something() {
    let (mut happened, mut recalled, mut refused, mut locked, mut settled) = (0, 0, 0, 0, 0);
    for seed in 1..20 {
        let mut world = World::new(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed));
        world.live(400);
        happened += world.happened;
        recalled += world.recalled;
        refused += world.refused;
        locked += world.locked;
        settled += world.settled;
    }
    assert!(locked > 20 && settled > 10, "{locked} locks here alone, {settled} told later");
    assert!(happened > 100 && recalled > 200, "{happened} ahead, {recalled} recalled");
    println!("{refused} were about more than their server knew");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 0, ..ProptestConfig::default() })]

    #[test]
    fn what_happens_ahead_of_the_log_is_what_the_log_makes(seed: u64) {
        World::new(seed).live(400);
    }
}

#[test]
fn most_of_what_a_lonely_server_does_is_ahead_of_the_log() {
    let mut world = World::new(7);
    let holder = world.servers[0].holder();
    world.propose(0, Op::ReserveInos { count: 1000 }).unwrap();
    world.propose(0, Op::Own { ino: Ino::ROOT, holder, although_shared: false }).unwrap();
    let Reply::Entry { attr, .. } = world.run(0, Op::Make { parent: Ino::ROOT, name: name("d"), node: node(NewContent::Directory, 0o755) }).unwrap() else {
        panic!("a directory")
    };
    for text in ["x", "y", "z"] {
        world.run(0, Op::Make { parent: attr.ino, name: name(text), node: node(NewContent::File, 0o644) }).unwrap();
    }
    assert_eq!((world.happened, world.log.len()), (4, 2), "a directory is held from birth");
    assert_eq!(observe(&world.servers[0].ns).inodes.len(), 5);
    assert_eq!(world.servers[1].ns.attr(attr.ino).unwrap(), None);
    world.send(0, usize::MAX);
    assert_eq!(world.log.len(), 3, "one entry for all of it");
    world.live(0);
}

#[test]
fn what_another_server_holds_is_refused_until_it_is_given_up() {
    let mut world = World::new(8);
    let holder = world.servers[0].holder();
    world.propose(0, Op::ReserveInos { count: 1000 }).unwrap();
    let Reply::Entry { attr: dir, .. } = world.run(0, Op::Make { parent: Ino::ROOT, name: name("d"), node: node(NewContent::Directory, 0o755) }).unwrap() else {
        panic!("a directory")
    };
    let Reply::Entry { attr: file, .. } = world.run(0, Op::Make { parent: dir.ino, name: name("f"), node: node(NewContent::File, 0o644) }).unwrap() else {
        panic!("a file")
    };
    world.propose(0, Op::Own { ino: dir.ino, holder, although_shared: false }).unwrap();
    let held = Err(MetaError::Held { ino: dir.ino, holder });
    let chmod = Op::SetAttr { ino: file.ino, set: SetAttr { mode: Some(0o600), ..SetAttr::default() } };
    assert_eq!(world.propose(1, chmod.clone()), held, "a file that has no other name");
    assert_eq!(world.propose(1, Op::Link { ino: file.ino, parent: Ino::ROOT, name: name("g") }), held);
    assert_eq!(world.propose(1, Op::Unlink { parent: dir.ino, name: name("f") }), held);
    assert_eq!(world.servers[1].ns.cover(file.ino).unwrap(), Some((dir.ino, holder)));
    assert_eq!(world.servers[1].ns.cover(Ino::ROOT).unwrap(), None);
    world.give_up(0, dir.ino);
    assert!(world.propose(1, chmod).is_ok());
}

#[test]
fn the_only_directory_that_is_held_is_removed_by_nobody_else() {
    let mut world = World::new(11);
    let holder = world.servers[0].holder();
    world.propose(0, Op::ReserveInos { count: 1000 }).unwrap();
    let Reply::Entry { attr: dir, .. } = world.propose(0, Op::Make { parent: Ino::ROOT, name: name("d"), node: node(NewContent::Directory, 0o755) }).unwrap() else {
        panic!("a directory")
    };
    world.propose(0, Op::Own { ino: dir.ino, holder, although_shared: false }).unwrap();
    world.run(0, Op::Make { parent: dir.ino, name: name("f"), node: node(NewContent::File, 0o644) }).unwrap();
    let rmdir = || Op::Rmdir { parent: Ino::ROOT, name: name("d") };
    assert_eq!(world.propose(1, rmdir()), Err(MetaError::Held { ino: dir.ino, holder }), "the log does not have the file yet");
    world.send(0, usize::MAX);
    world.give_up(0, dir.ino);
    assert_eq!(world.propose(1, rmdir()), Err(MetaError::NotEmpty(dir.ino)));
}

#[test]
fn a_command_through_the_log_is_refused_when_it_is_about_more_than_its_server_knew() {
    let mut world = World::new(12);
    let holder = world.servers[0].holder();
    world.propose(0, Op::ReserveInos { count: 1000 }).unwrap();
    let make = |text: &str| Op::Make { parent: Ino::ROOT, name: name(text), node: node(NewContent::Directory, 0o755) };
    let Reply::Entry { attr: dir, .. } = world.propose(0, make("d")).unwrap() else { panic!("a directory") };
    world.propose(0, Op::Own { ino: dir.ino, holder, although_shared: false }).unwrap();
    let command = world.servers[0].command(About::Inodes(vec![Ino::ROOT]), Op::Rmdir { parent: Ino::ROOT, name: name("d") }, 9);
    world.log.push((vec![command], None));
    world.apply(0, usize::MAX);
    assert_eq!(world.log.last().unwrap().1, Some(vec![Err(MetaError::Held { ino: dir.ino, holder })]), "its holder may be changing it");
    world.propose(0, Op::Rmdir { parent: Ino::ROOT, name: name("d") }).unwrap();
}

#[test]
fn when_its_life_is_ended_what_a_server_had_ahead_did_not_happen() {
    let mut world = World::new(9);
    let holder = world.servers[0].holder();
    let member = crate::Member { node: holder.node, incarnation: holder.incarnation, ..super::harness::member(1) };
    world.propose(0, Op::Found { cluster: super::harness::identity(), member }).unwrap();
    world.propose(0, Op::ReserveInos { count: 1000 }).unwrap();
    world.propose(0, Op::Own { ino: Ino::ROOT, holder, although_shared: false }).unwrap();
    world.run(0, Op::Make { parent: Ino::ROOT, name: name("f"), node: node(NewContent::File, 0o644) }).unwrap();
    assert!(world.servers[0].ns.lookup(Ino::ROOT, &name("f")).unwrap().is_some());
    world.propose(1, Op::Fence { node: holder.node, incarnation: holder.incarnation }).unwrap();
    world.apply(0, usize::MAX);
    assert_eq!(world.servers[0].ns.lookup(Ino::ROOT, &name("f")).unwrap(), None);
    assert_eq!(world.servers[0].ns.cover(Ino::ROOT).unwrap(), None);
    let again = world.servers[0].command(About::Ahead, Op::Unlink { parent: Ino::ROOT, name: name("f") }, 99);
    let mut again = again;
    assert_eq!(world.servers[0].ns.apply_ahead(&mut again, holder).unwrap(), Ahead::NotAlone);
}

/// Found by `ctfs-sim --seed 20004`: a file was made in a held directory, and an `unlink` of another server
/// was told that there is none, because the log did not have it yet.
#[test]
fn what_the_holder_may_have_changed_is_no_reason_to_refuse_another_server() {
    let mut world = World::new(13);
    let holder = world.servers[0].holder();
    world.propose(0, Op::ReserveInos { count: 1000 }).unwrap();
    let Reply::Entry { attr: dir, .. } = world.propose(0, Op::Make { parent: Ino::ROOT, name: name("d"), node: node(NewContent::Directory, 0o755) }).unwrap() else {
        panic!("a directory")
    };
    world.propose(0, Op::Own { ino: dir.ino, holder, although_shared: false }).unwrap();
    world.run(0, Op::Make { parent: dir.ino, name: name("f"), node: node(NewContent::File, 0o644) }).unwrap();
    let unlink = || Op::Unlink { parent: dir.ino, name: name("f") };
    assert_eq!(world.propose(1, unlink()), Err(MetaError::Held { ino: dir.ino, holder }));
    world.send(0, usize::MAX);
    world.give_up(0, dir.ino);
    world.propose(1, unlink()).unwrap();
    assert!(matches!(world.propose(1, unlink()), Err(MetaError::NoSuchEntry { .. })));
}

/// A leader that was cut off for a while packs what waits into one entry: the end of a life, and behind it
/// what that life sent meanwhile. That it is refused there is no divergence.
#[test]
fn the_end_of_a_life_and_what_it_sent_too_late_may_share_an_entry() {
    let mut world = World::new(10);
    let holder = world.servers[0].holder();
    let member = crate::Member { node: holder.node, incarnation: holder.incarnation, ..super::harness::member(1) };
    world.propose(0, Op::Found { cluster: super::harness::identity(), member }).unwrap();
    world.propose(0, Op::ReserveInos { count: 1000 }).unwrap();
    world.propose(0, Op::Own { ino: Ino::ROOT, holder, although_shared: false }).unwrap();
    world.run(0, Op::Make { parent: Ino::ROOT, name: name("f"), node: node(NewContent::File, 0o644) }).unwrap();
    let (late, _) = world.servers[0].queue.pop_front().unwrap();
    let fence = Op::Fence { node: holder.node, incarnation: holder.incarnation };
    let fence = world.servers[1].command(About::Inodes(vec![]), fence, 98);
    world.log.push((vec![fence, late], None));
    // Asserts that nothing diverged.
    world.apply(0, usize::MAX);
    assert_eq!(world.log.last().unwrap().1, Some(vec![Ok(Reply::Done), Err(MetaError::StaleIncarnation)]));
    assert_eq!(world.servers[0].ns.lookup(Ino::ROOT, &name("f")).unwrap(), None);
    assert_eq!(world.servers[0].ns.ahead(), 0);
}

#[test]
fn counts_are_right_while_the_log_takes_what_is_ahead_one_by_one() {
    let mut world = World::new(10);
    let holder = world.servers[0].holder();
    world.propose(0, Op::ReserveInos { count: 1000 }).unwrap();
    world.propose(0, Op::Own { ino: Ino::ROOT, holder, although_shared: false }).unwrap();
    let make = || Op::Make { parent: Ino::ROOT, name: name("f"), node: node(NewContent::Fifo, 0o644) };
    let unlink = || Op::Unlink { parent: Ino::ROOT, name: name("f") };
    for op in [make(), unlink(), make(), unlink(), make(), unlink(), make()] {
        world.run(0, op).unwrap();
    }
    for step in 0..8 {
        world.send(0, 1);
        world.apply(0, 1);
        world.count(0);
        if step == 3 {
            world.run(0, unlink()).unwrap();
            world.count(0);
        }
    }
    assert_eq!(world.servers[0].ns.ahead(), 0);
}

#[test]
fn a_file_that_comes_under_a_holding_is_told_of_and_one_that_is_made_there_is_not() {
    let mut world = World::new(13);
    let holder = world.servers[0].holder();
    world.propose(0, Op::ReserveInos { count: 1000 }).unwrap();
    world.propose(0, Op::Own { ino: Ino::ROOT, holder, although_shared: false }).unwrap();
    let told = |world: &mut World, op: Op| {
        let command = world.servers[0].command(About::Ahead, op, 1);
        let at = world.servers[0].ns.applied().next();
        let applied = world.servers[0].ns.apply(at, &[command], Batch::new()).unwrap();
        assert!(applied.verdicts[0].is_ok(), "{:?}", applied.verdicts);
        applied.changes.iter().filter(|(_, change)| matches!(change, crate::Change::Covered { .. })).count()
    };
    assert_eq!(told(&mut world, Op::Make { parent: Ino::ROOT, name: name("f"), node: node(NewContent::File, 0o644) }), 0);
    let file = world.servers[0].ns.lookup(Ino::ROOT, &name("f")).unwrap().unwrap();
    assert_eq!(told(&mut world, Op::Link { ino: file, parent: Ino::ROOT, name: name("g") }), 0, "with two names it is nobody's");
    assert_eq!(told(&mut world, Op::Unlink { parent: Ino::ROOT, name: name("g") }), 1);
}
