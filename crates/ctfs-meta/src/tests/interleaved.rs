//! A command comes out the same wherever in the log it lands, and whatever others do elsewhere.
//!
//! Two clients work each below a directory of its own, with chunks of its own, and name the inodes
//! that they make from ranges of their own. The log of both, mixed in any way, must make of each what
//! its commands make alone; and the only records that both may change are the counters and the counts
//! of the directory above, which are sums.

use std::collections::BTreeMap;

use ctfs_types::{ChunkId, ExtentData, Holder, Incarnation, Ino, LogIndex, NodeId, RequestId};
use proptest::prelude::*;

use super::{
    harness::{CLIENT, Verdict, Volume, copy, time},
    model::Model,
    observe::observe,
    steps::{Action, Step, resolve, steps},
};
use crate::{About, Batch, Command, Namespace, Op, Reply, Totals};

type Records = BTreeMap<Vec<u8>, Vec<u8>>;

const NUMBERS: u32 = 1000;

/// Where a workload takes place.
#[derive(Debug, Clone, Copy)]
struct Place {
    client: u64,
    dir: Ino,
    /// The first of its reserved numbers.
    first: u64,
}

impl Place {
    /// The root of the workload is the directory; what it would number from 2 is numbered from its range.
    fn ino(self, ino: Ino) -> Ino {
        if ino == Ino::ROOT { self.dir } else { Ino(self.first + ino.0 - 2) }
    }

    fn chunk(self, id: ChunkId) -> ChunkId {
        let mut id = id.0;
        id[31] = self.client as u8;
        ChunkId(id)
    }

    fn holder(self, holder: Holder) -> Holder {
        let life = holder.incarnation.0 - CLIENT + self.client;
        Holder { node: NodeId(life), incarnation: Incarnation(life) }
    }

    /// The operation in this place; an inode that it makes is number `next` of the workload.
    fn op(self, mut op: Op, next: u64) -> Op {
        match &mut op {
            Op::Make { parent, node, .. } => {
                *parent = self.ino(*parent);
                node.ino = Some(self.ino(Ino(next)));
                node.holder = node.holder.map(|holder| self.holder(holder));
            }
            Op::Link { ino, parent, .. } => (*ino, *parent) = (self.ino(*ino), self.ino(*parent)),
            Op::Unlink { parent, .. } | Op::Rmdir { parent, .. } => *parent = self.ino(*parent),
            Op::Rename { from, to, .. } => (*from, *to) = (self.ino(*from), self.ino(*to)),
            Op::Write { ino, cells, .. } => {
                *ino = self.ino(*ino);
                for write in cells {
                    if let Some(ExtentData::Chunk { id, .. }) = &mut write.data {
                        *id = self.chunk(*id);
                    }
                }
            }
            Op::CloneCells { source, ino, .. } => (*source, *ino) = (self.ino(*source), self.ino(*ino)),
            Op::SetAttr { ino, .. }
            | Op::SetXattr { ino, .. }
            | Op::RemoveXattr { ino, .. }
            | Op::Punch { ino, .. }
            | Op::SetQuota { ino, .. } => *ino = self.ino(*ino),
            Op::Own { ino, holder, .. } => (*ino, *holder) = (self.ino(*ino), self.holder(*holder)),
            Op::Disown { files, holder, .. } => {
                *holder = self.holder(*holder);
                files.iter_mut().for_each(|(ino, _)| *ino = self.ino(*ino));
            }
            Op::Reap { inos } | Op::FreeCells { inos } => inos.iter_mut().for_each(|ino| *ino = self.ino(*ino)),
            Op::ForgetChunks { chunks } => chunks.iter_mut().for_each(|id| *id = self.chunk(*id)),
            other => panic!("{other:?} is no part of these workloads"),
        }
        op
    }

    fn commands(self, steps: &[Step]) -> Vec<Command> {
        let mut model = Model::new();
        let mut commands = Vec::new();
        for step in steps.iter().filter(|step| !matches!(step.0, Action::Reserve)) {
            let mut op = resolve(&model, *step);
            if let Op::Make { node, .. } = &mut op {
                node.ino = None;
            }
            let mut ops = vec![op];
            if step.1[7] % 4 == 0 {
                ops.push(Op::FreeCells { inos: (2..model.next).map(Ino).collect() });
            }
            for op in ops {
                // After the request that reserved the numbers.
                let seq = commands.len() as u64 + 2;
                let request = RequestId { client: self.client, seq };
                let next = model.next;
                if !matches!(op, Op::FreeCells { .. }) {
                    let _ = model.run(&op, time(seq), seq);
                }
                commands.push(Command { request, answered: seq - 1, at: time(seq), about: About::Ahead, op: self.op(op, next) });
            }
        }
        commands
    }
}

/// A volume with two places.
fn places() -> (Volume, [Place; 2]) {
    let mut volume = Volume::new();
    let dirs = ["one", "other"].map(|text| volume.dir(Ino::ROOT, text));
    let places = [(CLIENT + 10, dirs[0]), (CLIENT + 20, dirs[1])].map(|(client, dir)| {
        let request = RequestId { client, seq: 1 };
        let command = Command { request, answered: 0, at: time(1), about: About::Ahead, op: Op::ReserveInos { count: NUMBERS } };
        match volume.apply(&[command]).remove(0) {
            Ok(Reply::Inos { first, count: NUMBERS }) => Place { client, dir, first: first.0 },
            other => panic!("{other:?}"),
        }
    });
    (volume, places)
}

fn reopened(volume: &Volume, freed_max: usize) -> Namespace {
    Volume::over(copy(&volume.ns)).ns.freeing_at_most(freed_max)
}

/// Applies entries, each `stride` indexes after the one before.
fn apply(ns: &mut Namespace, entries: &[&[Command]], stride: u64) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for commands in entries {
        let index = LogIndex(ns.applied().0 + stride);
        verdicts.extend(ns.apply(index, commands, Batch::new()).expect("memory store").verdicts);
    }
    verdicts
}

/// The records but the counters, the hash and the counts of the root.
fn own_records(ns: &Namespace) -> Records {
    let mut records = super::harness::dump(ns.store(), &[0xff]);
    records.retain(|key, _| !matches!(key[0], 17 | 18) && *key != [&[24][..], &Ino::ROOT.0.to_be_bytes()].concat());
    records
}

fn changed(before: &Records, after: &Records) -> BTreeMap<Vec<u8>, Option<Vec<u8>>> {
    let keys = before.keys().chain(after.keys()).filter(|key| before.get(*key) != after.get(*key));
    keys.map(|key| (key.clone(), after.get(key).cloned())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn what_others_do_elsewhere_and_where_commands_land_makes_no_difference(
        one in steps(80),
        other in steps(80),
        order in proptest::collection::vec(any::<bool>(), 400),
        sizes in proptest::collection::vec(1..5usize, 1..6),
        stride in 1..50u64,
        freed_max in prop_oneof![1..4usize, Just(1000)],
    ) {
        let (volume, places) = places();
        let base = own_records(&volume.ns);
        let commands = [places[0].commands(&one), places[1].commands(&other)];
        let alone = commands.each_ref().map(|commands| {
            let mut ns = reopened(&volume, freed_max);
            let entries: Vec<&[Command]> = commands.chunks(1).collect();
            let verdicts = apply(&mut ns, &entries, 1);
            (ns, verdicts)
        });

        // Both, in any order, several to an entry, at other indexes.
        let mut rest = commands.each_ref().map(|commands| commands.iter());
        let (mut log, mut whose) = (Vec::new(), Vec::new());
        for side in order.into_iter().map(usize::from).chain([0; 200]).chain([1; 200]) {
            if let Some(command) = rest[side].next() {
                log.push(command.clone());
                whose.push(side);
            }
        }
        let mut entries = Vec::new();
        let mut left = &log[..];
        for size in sizes.iter().cycle() {
            if left.is_empty() {
                break;
            }
            let (entry, later) = left.split_at((*size).min(left.len()));
            entries.push(entry);
            left = later;
        }
        let mut both = reopened(&volume, freed_max);
        let verdicts = apply(&mut both, &entries, stride);

        for (side, (_, expected)) in alone.iter().enumerate() {
            let answers = verdicts.iter().zip(&whose).filter(|(_, by)| **by == side).map(|(verdict, _)| verdict.clone());
            prop_assert_eq!(&answers.collect::<Vec<_>>(), expected);
        }
        let changes = alone.each_ref().map(|(ns, _)| changed(&base, &own_records(ns)));
        let shared: Vec<_> = changes[0].keys().filter(|key| changes[1].contains_key(*key)).collect();
        prop_assert!(shared.is_empty(), "both write {:02x?}", shared);
        let mut expected = base;
        for (key, value) in changes.into_iter().flatten() {
            match value {
                Some(value) => expected.insert(key, value),
                None => expected.remove(&key),
            };
        }
        prop_assert_eq!(own_records(&both), expected);

        let totals = |ns: &Namespace| ns.totals(Ino::ROOT).unwrap().unwrap();
        let sum = |count: fn(&Totals) -> u64| {
            count(&totals(&alone[0].0)) + count(&totals(&alone[1].0)) - count(&totals(&volume.ns))
        };
        let now = totals(&both);
        let summed = [sum(|t| t.files), sum(|t| t.directories), sum(|t| t.bytes), sum(|t| t.allocated)];
        prop_assert_eq!([now.files, now.directories, now.bytes, now.allocated], summed);
        observe(&both);
    }
}
