//! Replicas held against each other: the same log makes the same bytes.

use std::collections::BTreeMap;

use ctfs_types::{LogIndex, RequestId};
use proptest::prelude::*;

use super::{
    harness::{CLIENT, Verdict, Volume, copy, time},
    model::Model,
    steps::{Step, resolve, steps},
};
use crate::{About, Batch, Command, Op};

/// The commands a workload makes when each is an entry of its own, and their verdicts.
fn record(steps: &[Step]) -> (Volume, Vec<Command>, Vec<Verdict>) {
    record_over(Volume::new(), steps)
}

fn record_over(mut volume: Volume, steps: &[Step]) -> (Volume, Vec<Command>, Vec<Verdict>) {
    let mut model = Model::new();
    let (mut commands, mut verdicts) = (Vec::new(), Vec::new());
    for (number, step) in steps.iter().enumerate() {
        let op = resolve(&model, *step);
        let seq = number as u64 + 1;
        let request = RequestId { client: CLIENT, seq };
        let command = Command { request, answered: seq - 1, at: time(seq), about: About::Ahead, op };
        verdicts.extend(volume.apply(std::slice::from_ref(&command)));
        // Its verdict is compared elsewhere; here it only steers the workload.
        let _ = model.run(&command.op, command.at, seq);
        commands.push(command);
    }
    (volume, commands, verdicts)
}

/// Splits commands into entries of the given sizes, over and over.
fn pack(commands: &[Command], sizes: &[usize]) -> Vec<Vec<Command>> {
    let mut entries = Vec::new();
    let mut rest = commands;
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            return entries;
        }
        let (entry, others) = rest.split_at((*size).clamp(1, rest.len()));
        entries.push(entry.to_vec());
        rest = others;
    }
    entries
}

/// The records but those in which the log itself shows: how far it was applied, and the hash.
fn without_log(volume: &Volume) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut records = volume.records();
    records.retain(|key, _| !matches!(key[0], 17 | 18));
    records
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn replicas_that_applied_the_same_entries_are_equal_byte_for_byte(
        steps in steps(150),
        sizes in proptest::collection::vec(1..9usize, 1..6),
    ) {
        let (_, commands, _) = record(&steps);
        let (mut one, mut other) = (Volume::new(), Volume::new());
        for entry in pack(&commands, &sizes) {
            prop_assert_eq!(one.apply(&entry), other.apply(&entry));
            prop_assert_eq!(&one.changes, &other.changes);
            prop_assert_eq!(one.ns.state_hash(), other.ns.state_hash());
        }
        prop_assert_eq!(one.records(), other.records());
    }

    /// Also while cells that were taken away wait to be freed.
    #[test]
    fn packing_commands_into_entries_otherwise_makes_no_difference(
        steps in steps(150),
        sizes in proptest::collection::vec(1..9usize, 1..6),
        cells in prop_oneof![1..4usize, Just(1000)],
    ) {
        let (alone, commands, verdicts) = record_over(Volume::freeing_at_most(cells), &steps);
        let mut packed = Volume::freeing_at_most(cells);
        let answers: Vec<_> = pack(&commands, &sizes).iter().flat_map(|entry| packed.apply(entry)).collect();
        prop_assert_eq!(answers, verdicts);
        prop_assert_eq!(without_log(&packed), without_log(&alone));
    }

    #[test]
    fn a_replica_that_restarted_anywhere_stays_equal(steps in steps(60), at in any::<prop::sample::Index>()) {
        let (whole, commands, _) = record(&steps);
        let mut first = Volume::new();
        let split = at.index(commands.len());
        for command in &commands[..split] {
            first.apply(std::slice::from_ref(command));
        }
        // What was durable is all that is left of the process.
        let mut second = Volume::over(copy(&first.ns));
        prop_assert_eq!(second.ns.applied(), first.ns.applied());
        prop_assert_eq!(second.ns.state_hash(), first.ns.state_hash());
        for command in &commands[split..] {
            second.apply(std::slice::from_ref(command));
        }
        prop_assert_eq!(second.ns.state_hash(), whole.ns.state_hash());
        prop_assert_eq!(second.records(), whole.records());
    }
}

#[test]
fn the_callers_own_records_are_kept_and_do_not_change_the_hash() {
    let (mut plain, mut extra) = (Volume::new(), Volume::new());
    let command = plain.command(Op::Noop);
    let own = Batch::from([(vec![0xff, 1], Some(b"vote".to_vec()))]);
    plain.apply(std::slice::from_ref(&command));
    extra.apply_with(std::slice::from_ref(&command), own);
    assert_eq!(plain.ns.state_hash(), extra.ns.state_hash());
    assert_eq!(extra.ns.store().get(&[0xff, 1]).unwrap(), Some(b"vote".to_vec()));
}

#[test]
fn replicas_that_differ_in_one_name_differ_in_their_hash() {
    let (mut one, mut other) = (Volume::new(), Volume::new());
    one.file(ctfs_types::Ino::ROOT, "a");
    other.file(ctfs_types::Ino::ROOT, "b");
    assert_ne!(one.ns.state_hash(), other.ns.state_hash());
}

#[test]
fn an_entry_without_commands_reaches_the_store_with_the_callers_records() {
    let mut volume = Volume::new();
    let own = Batch::from([(vec![0xff, 2], Some(vec![5]))]);
    assert_eq!(volume.apply_with(&[], own), vec![]);
    assert_eq!(volume.ns.store().get(&[0xff, 2]).unwrap(), Some(vec![5]));
    let reopened = Volume::over(copy(&volume.ns));
    assert_eq!(reopened.ns.applied(), LogIndex(1));
}
