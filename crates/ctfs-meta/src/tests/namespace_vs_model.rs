//! The namespace next to the naive model: verdict and whole volume after every step.

use std::collections::BTreeSet;

use ctfs_types::{FileKind, Ino};
use proptest::prelude::*;

use super::{
    harness::{CLIENT, Volume, copy},
    model::{Model, gives_reason},
    observe::{Tree, observe},
    steps::{Action, Step, resolve, steps},
};
use crate::{Change, Op, Reply};

/// The same with so few cells freed by one command that most cuts leave some behind, and with
/// commands that free them in between. What can be seen of bytes and sizes is at every moment what
/// the model says; chunks and space are so once all is freed.
fn run_freeing_at_most(cells: usize, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut real = Volume::freeing_at_most(cells);
    let mut model = Model::new();
    let seen = Tree::without_space;
    for (number, step) in steps.iter().enumerate() {
        // What the model forgets at once may still be named by a dead cell, and counts until it is
        // freed.
        if matches!(step.0, Action::Forget | Action::Quota) {
            continue;
        }
        let op = resolve(&model, *step);
        let before = observe(&real.ns);
        let verdict = real.run(op.clone());
        let expected = model.run(&op, real.now(), real.ticks);
        prop_assert_eq!(verdict.is_ok(), expected.is_ok(), "step {} {:?}: {:?}", number, op, verdict);
        let after = observe(&real.ns);
        prop_assert_eq!(seen(after.clone()), seen(model.tree()), "tree after step {} {:?}", number, op);
        check_changes(&op, &before, &after, &real.changes)?;
        if step.1[7] % 4 == 0 {
            let inos = real.ns.unfreed(2);
            let op = Op::FreeCells { inos };
            real.ok(op.clone());
            let freed = observe(&real.ns);
            prop_assert_eq!(seen(freed.clone()), seen(model.tree()), "tree after freeing, step {}", number);
            check_changes(&op, &after, &freed, &real.changes)?;
        }
        if step.1[7] % 16 == 1 {
            // A replica that restarts, or that a snapshot is sent to.
            let ticks = real.ticks;
            real = Volume::over(copy(&real.ns));
            real.ns = real.ns.freeing_at_most(cells);
            real.ticks = ticks;
            prop_assert_eq!(seen(observe(&real.ns)), seen(model.tree()), "tree after a restart, step {}", number);
        }
    }
    real.free_all();
    let all = Tree::without_condemnations;
    prop_assert_eq!(all(observe(&real.ns)), all(model.tree()), "once all is freed");
    Ok(())
}

fn run(steps: &[Step]) -> Result<(), TestCaseError> {
    let mut real = Volume::new();
    let mut model = Model::new();
    let mut before = observe(&real.ns);
    prop_assert_eq!(&before, &model.tree(), "empty volume");
    for (number, step) in steps.iter().enumerate() {
        let op = resolve(&model, *step);
        let verdict = real.run(op.clone());
        let expected = model.run(&op, real.now(), real.ticks);
        match (&verdict, &expected) {
            (Ok(reply), Ok(())) => check_reply(&model, &op, reply)?,
            (Err(error), Err(reasons)) => {
                prop_assert!(gives_reason(reasons, error), "step {} {:?}: {:?}, not {:?}", number, op, error, reasons);
            }
            _ => prop_assert!(false, "step {number} {op:?}: verdict {verdict:?}, model says {expected:?}"),
        }
        let after = observe(&real.ns);
        prop_assert_eq!(&after, &model.tree(), "tree after step {} {:?}", number, op);
        let reserved: Vec<_> = model.numbers.values().map(|&(next, end)| Ino(next)..Ino(end)).collect();
        prop_assert_eq!(real.ns.reserved_inos(CLIENT).unwrap(), reserved, "numbers after step {} {:?}", number, op);
        check_data_versions(&op, &before, &after)?;
        check_changes(&op, &before, &after, &real.changes)?;
        before = after;
    }
    Ok(())
}

/// Attributes in a reply are those after the command.
fn check_reply(model: &Model, op: &Op, reply: &Reply) -> Result<(), TestCaseError> {
    if let Reply::Inos { first, count } = reply {
        prop_assert_eq!(first.0 + u64::from(*count), model.next, "reply of {:?}", op);
        prop_assert_eq!(op, &Op::ReserveInos { count: *count });
    }
    if let Reply::Written { attr, stamp } = reply {
        prop_assert_eq!(attr.data_version, stamp.0, "reply of {:?}", op);
    }
    let (Reply::Entry { attr, .. } | Reply::Attr(attr) | Reply::Written { attr, .. }) = reply else { return Ok(()) };
    prop_assert_eq!(attr, &model.attr(attr.ino), "reply of {:?}", op);
    if let Op::Make { parent, name, .. } = op {
        prop_assert_eq!(model.inodes[parent].entries.get(name), Some(&attr.ino), "reply of {:?}", op);
    }
    Ok(())
}

/// The data version moves by one whenever bytes or size changed, and stands still when the command was
/// about something else. Whatever cell is not as it was has it as its stamp.
fn check_data_versions(op: &Op, before: &Tree, after: &Tree) -> Result<(), TestCaseError> {
    for (ino, now) in after.inodes.iter().filter(|(_, seen)| seen.attr.kind == FileKind::File) {
        let Some(was) = before.inodes.get(ino) else { continue };
        let touched = match op {
            Op::Write { ino: to, .. } | Op::Punch { ino: to, .. } | Op::CloneCells { ino: to, .. } => to == ino,
            Op::SetAttr { ino: to, set } => to == ino && set.size.is_some(),
            _ => false,
        };
        if (&was.cells, was.attr.size) != (&now.cells, now.attr.size) {
            prop_assert!(touched, "{:?} changed bytes of inode {}", op, ino);
            prop_assert_eq!(now.attr.data_version, was.attr.data_version + 1, "data version of {} after {:?}", ino, op);
            for (cell, extent) in now.cells.iter().filter(|(cell, extent)| was.cells.get(cell) != Some(extent)) {
                prop_assert_eq!(extent.stamp.0, now.attr.data_version, "cell {} of {} after {:?}", cell, ino, op);
            }
        } else if !touched {
            prop_assert_eq!(now.attr.data_version, was.attr.data_version, "data version of {} after {:?}", ino, op);
        }
    }
    Ok(())
}

/// Whatever a kernel may have cached and is now different was named in the changes: a stale
/// cache on another server is a broken promise.
fn check_changes(op: &Op, before: &Tree, after: &Tree, changes: &[Change]) -> Result<(), TestCaseError> {
    for ino in before.inodes.keys().chain(after.inodes.keys()).collect::<BTreeSet<_>>() {
        let (was, now) = (before.inodes.get(ino), after.inodes.get(ino));
        let entries = |seen: Option<&super::observe::Seen>| seen.map(|seen| seen.entries.clone()).unwrap_or_default();
        let (old, new) = (entries(was), entries(now));
        for name in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
            let told = changes.contains(&Change::Entry { parent: *ino, name: name.clone() });
            prop_assert!(told || old.get(name) == new.get(name), "{:?} did not tell of {:?} in {}", op, name, ino);
        }
        match (was, now) {
            (Some(was), Some(now)) => {
                let told = changes.iter().any(|change| tells_attr(change, *ino));
                prop_assert!(told || was.attr == now.attr, "{:?} did not tell of attributes of {}", op, ino);
                for cell in was.cells.keys().chain(now.cells.keys()) {
                    let told = changes.iter().any(|change| tells_data(change, *ino, now.attr.cell.start_of(*cell)));
                    let same = was.cells.get(cell) == now.cells.get(cell);
                    prop_assert!(told || same, "{:?} did not tell of cell {} of {}", op, cell, ino);
                }
                let told = changes.contains(&Change::Orphaned { ino: *ino });
                let orphaned = after.orphans.contains(ino) && !before.orphans.contains(ino);
                prop_assert_eq!(told, orphaned, "{:?} orphaning {}", op, ino);
            }
            (Some(_), None) => {
                prop_assert!(changes.contains(&Change::Reaped { ino: *ino }), "{:?} did not tell {} is gone", op, ino);
            }
            _ => {}
        }
    }
    for (id, now) in &after.chunks {
        let fresh = now.0 > 0 && before.chunks.get(id).is_none_or(|was| was.0 == 0);
        let told = changes.contains(&Change::ChunkWanted { chunk: *id });
        prop_assert!(told || !fresh, "{:?} did not tell that {} is wanted", op, id);
    }
    for id in before.chunks.keys().filter(|id| !after.chunks.contains_key(id)) {
        let told = changes.contains(&Change::ChunkForgotten { chunk: *id });
        prop_assert!(told, "{:?} did not tell that {} is forgotten", op, id);
    }
    Ok(())
}

/// The kernel drops the directory's attributes along with an entry of it.
fn tells_attr(change: &Change, about: Ino) -> bool {
    match change {
        Change::Attr { ino } | Change::Data { ino, .. } | Change::Orphaned { ino } | Change::Usage { ino } => *ino == about,
        Change::Entry { parent, .. } => *parent == about,
        _ => false,
    }
}

/// A change is told from the first differing byte; the start of its cell is close enough to know
/// that the cell was meant.
fn tells_data(change: &Change, about: Ino, cell_start: u64) -> bool {
    let Change::Data { ino, offset, len } = change else { return false };
    let end = offset.saturating_add(*len);
    *ino == about && *offset < cell_start + (1 << 20) && end > cell_start
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 800, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn namespace_agrees_with_model(steps in steps(120)) {
        run(&steps)?;
    }

    #[test]
    fn what_is_freed_later_is_gone_at_once(steps in steps(120), cells in 1..4usize) {
        run_freeing_at_most(cells, &steps)?;
    }
}
