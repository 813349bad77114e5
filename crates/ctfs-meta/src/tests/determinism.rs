//! Replicas held against each other: the same log makes the same bytes.

use ctfs_types::{LogIndex, RequestId};
use proptest::prelude::*;

use super::{
    harness::{CLIENT, Verdict, Volume, copy, time},
    model::Model,
    observe::observe,
    steps::{Action, Step, resolve, steps},
};
use crate::{Batch, Command, Op, Reply};

/// The commands a workload makes when each is an entry of its own, and their verdicts.
fn record(steps: &[Step]) -> (Volume, Vec<Command>, Vec<Verdict>) {
    let mut volume = Volume::new();
    let mut model = Model::new();
    let (mut commands, mut verdicts) = (Vec::new(), Vec::new());
    for (number, step) in steps.iter().enumerate() {
        let op = resolve(&model, *step);
        let seq = number as u64 + 1;
        let request = RequestId { client: CLIENT, seq };
        let command = Command { request, answered: seq - 1, at: time(seq), op };
        verdicts.extend(volume.apply(std::slice::from_ref(&command)));
        // Its verdict is compared elsewhere; here it only steers the workload.
        let _ = model.run(&command.op, command.at, volume.ns.applied());
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

/// The verdict without what depends on log indexes.
fn without_indexes(verdict: &Verdict) -> Verdict {
    let mut verdict = verdict.clone();
    match &mut verdict {
        Ok(Reply::Written { attr, stamp }) => (attr.data_version, *stamp) = (0, LogIndex(0)),
        Ok(Reply::Attr(attr) | Reply::Entry { attr, .. }) => attr.data_version = 0,
        _ => {}
    }
    verdict
}

/// Rewrites what writers expect, as they would have seen the stamps with other packing.
///
/// Where the recorded writer was late it stays late, with a stamp nobody ever gave.
fn expect_as_packed(entries: &mut [Vec<Command>], verdicts: &[Verdict]) {
    let mut entry_of = vec![0u64];
    for (number, entry) in entries.iter().enumerate() {
        entry_of.extend(entry.iter().map(|_| number as u64 + 1));
    }
    for (command, verdict) in entries.iter_mut().flatten().zip(verdicts) {
        let Op::Write { cells, .. } = &mut command.op else { continue };
        for cell in cells {
            cell.expect = LogIndex(if verdict.is_ok() { entry_of[cell.expect.0 as usize] } else { u64::MAX });
        }
    }
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

    #[test]
    fn packing_commands_into_entries_otherwise_gives_the_same_tree(
        steps in steps(150),
        sizes in proptest::collection::vec(1..9usize, 1..6),
    ) {
        let (alone, commands, verdicts) = record(&steps);
        let mut packed = Volume::new();
        let mut entries = pack(&commands, &sizes);
        expect_as_packed(&mut entries, &verdicts);
        // A late writer may have had other reasons to be refused first; only the tree counts there.
        let answers: Vec<_> = entries.iter().flat_map(|entry| packed.apply(entry)).collect();
        for ((command, answer), verdict) in commands.iter().zip(&answers).zip(&verdicts) {
            match verdict {
                Ok(_) => prop_assert_eq!(without_indexes(answer), without_indexes(verdict), "{:?}", command.op),
                Err(_) => prop_assert!(answer.is_err(), "{:?}: {:?}, alone {:?}", command.op, answer, verdict),
            }
        }
        prop_assert_eq!(observe(&packed.ns).without_indexes(), observe(&alone.ns).without_indexes());
    }

    /// In one entry cells may be written, cut off, and written again, all with one stamp.
    #[test]
    fn packing_makes_no_difference_either_while_cells_wait_to_be_freed(
        steps in steps(150),
        sizes in proptest::collection::vec(1..9usize, 1..6),
        cells in 1..4usize,
    ) {
        let steps: Vec<Step> = steps.into_iter().filter(|step| !matches!(step.0, Action::Forget | Action::Quota)).collect();
        let (alone, commands, verdicts) = record(&steps);
        let mut packed = Volume::freeing_at_most(cells);
        let mut entries = pack(&commands, &sizes);
        expect_as_packed(&mut entries, &verdicts);
        entries.iter().for_each(|entry| drop(packed.apply(entry)));
        let tree = |volume: &Volume| observe(&volume.ns).without_indexes();
        prop_assert_eq!(tree(&packed).without_space(), tree(&alone).without_space());
        packed.ticks = commands.len() as u64;
        packed.free_all();
        prop_assert_eq!(tree(&packed).without_condemnations(), tree(&alone).without_condemnations());
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
