use ctfs_types::{FileUse, Holder, Incarnation, Ino, NodeId};

use super::super::harness::{CLIENT, Volume, cluster, node, write_op};
use crate::{Change, MetaError, NewContent, NewNode, Op, SetAttr};

/// The life of a server whose commands [`Volume::run`] makes.
const OWN: Holder = Holder { node: NodeId(1), incarnation: Incarnation(CLIENT) };
const OTHER: Holder = Holder { node: NodeId(2), incarnation: Incarnation(1) };

fn volume() -> (Volume, Ino) {
    let mut volume = cluster(3);
    let ino = volume.file(Ino::ROOT, "a");
    (volume, ino)
}

fn own(ino: Ino, holder: Holder) -> Op {
    Op::Own { ino, holder, although_shared: false }
}

fn disown(volume: &Volume, ino: Ino, holder: Holder, shared: bool) -> Op {
    let FileUse::Owned { since, .. } = volume.attr(ino).usage else { panic!("nobody holds {ino}") };
    Op::Disown { files: vec![(ino, since)], holder, shared }
}

fn holds(volume: &Volume, ino: Ino, who: Holder) -> bool {
    matches!(volume.attr(ino).usage, FileUse::Owned { holder, .. } if holder == who)
}

#[test]
fn giving_up_late_does_not_end_a_newer_holding() {
    let (mut volume, ino) = volume();
    volume.ok(own(ino, OWN));
    let late = disown(&volume, ino, OWN, false);
    volume.ok(own(ino, OWN));
    volume.ok(late);
    assert!(holds(&volume, ino, OWN));
}

#[test]
fn nobody_but_the_holder_changes_a_held_file() {
    let (mut volume, ino) = volume();
    let copy = volume.file(Ino::ROOT, "copy");
    volume.ok(own(ino, OTHER));
    let held = Err(MetaError::Held { ino, holder: OTHER });
    let clone = Op::CloneCells { source: ino, first: 0, ino: copy, to: 0, cells: 1, size_at_least: 0 };
    for op in [
        write_op(ino, vec![], 5),
        Op::SetAttr { ino, set: SetAttr { size: Some(0), ..SetAttr::default() } },
        Op::Punch { ino, first: 0, cells: 1 },
        own(ino, OWN),
        clone,
    ] {
        assert_eq!(volume.run(op), held);
    }
    let give_up = disown(&volume, ino, OTHER, false);
    volume.ok(give_up);
    volume.ok(write_op(ino, vec![], 5));
    assert_eq!(volume.attr(ino).usage, FileUse::Free);
}

#[test]
fn taking_a_file_tells_every_kernel_to_drop_it() {
    let (mut volume, ino) = volume();
    volume.ok(own(ino, OWN));
    assert!(volume.changes.contains(&Change::Data { ino, offset: 0, len: u64::MAX }));
    assert!(volume.changes.contains(&Change::Attr { ino }));
}

#[test]
fn a_shared_file_is_taken_only_by_who_says_so() {
    let (mut volume, ino) = volume();
    volume.ok(own(ino, OWN));
    let share = disown(&volume, ino, OWN, true);
    volume.ok(share);
    assert!(matches!(volume.attr(ino).usage, FileUse::Shared { .. }));
    assert_eq!(volume.run(own(ino, OWN)), Err(MetaError::Shared(ino)));
    volume.ok(Op::Own { ino, holder: OWN, although_shared: true });
    assert!(holds(&volume, ino, OWN));
}

#[test]
fn a_server_gives_up_only_what_it_holds() {
    let (mut volume, ino) = volume();
    volume.ok(own(ino, OTHER));
    let give_up = disown(&volume, ino, OWN, false);
    volume.ok(give_up);
    assert!(holds(&volume, ino, OTHER));
}

#[test]
fn what_an_ended_life_held_is_free_and_it_takes_nothing_more() {
    let (mut volume, ino) = volume();
    let node_one = Holder { node: NodeId(1), incarnation: Incarnation(1) };
    volume.ok(own(ino, node_one));
    let born = NewNode { holder: Some(node_one), ..node(NewContent::File, 0o644) };
    let made = volume.make(Ino::ROOT, "born", born.clone()).ino;
    assert!(holds(&volume, made, node_one));
    let (incarnation, addresses) = (Incarnation(2), vec![]);
    volume.ok(Op::Incarnate { node: NodeId(1), incarnation, addresses, capacity: 1, version: String::new() });
    for ino in [ino, made] {
        assert_eq!(volume.attr(ino).usage, FileUse::Free);
        assert_eq!(volume.run(own(ino, node_one)), Err(MetaError::StaleIncarnation));
    }
    let op = Op::Make { parent: Ino::ROOT, name: super::super::harness::name("late"), node: born };
    assert_eq!(volume.run(op), Err(MetaError::StaleIncarnation));
}

#[test]
fn a_fenced_life_loses_what_it_holds_and_does_nothing_more() {
    let (mut volume, ino) = volume();
    let (one, life) = (NodeId(1), Incarnation(1));
    let holder = Holder { node: one, incarnation: life };
    volume.ok(own(ino, holder));
    let lock = super::super::harness::record_lock(super::super::harness::owner(1, 1, 7), true, 0, 9);
    volume.ok(Op::Lock { ino, lock: lock.clone() });
    volume.ok(Op::Fence { node: one, incarnation: life });
    assert!(volume.changes.contains(&Change::Fenced { node: one, incarnation: life, pair: None }));
    assert_eq!(volume.attr(ino).usage, FileUse::Free);
    assert_eq!(volume.ns.locks(ino, crate::LockKind::Record).unwrap(), []);
    assert!(volume.ns.is_ended(life).unwrap());
    assert_eq!(volume.run(own(ino, holder)), Err(MetaError::StaleIncarnation));
    assert_eq!(volume.run(Op::Lock { ino, lock }), Err(MetaError::StaleIncarnation));
    // The server goes on in a new life, which a late copy of the fence does not touch.
    let incarnation = Incarnation(2);
    volume.ok(Op::Incarnate { node: one, incarnation, addresses: vec![], capacity: 1, version: String::new() });
    volume.ok(own(ino, Holder { node: one, incarnation }));
    volume.ok(Op::Fence { node: one, incarnation: life });
    assert!(holds(&volume, ino, Holder { node: one, incarnation }));
}

#[test]
fn an_append_is_refused_when_the_file_has_grown() {
    let (mut volume, ino) = volume();
    let append = |at: u64, to: u64| Op::Write {
        ino,
        cells: vec![],
        size_at_least: to,
        mtime: None,
        drop_privileges: false,
        appends_at: Some(at),
        noted: None,
    };
    volume.ok(append(0, 5));
    assert_eq!(volume.run(append(0, 7)), Err(MetaError::SizeChanged(ino)));
    volume.ok(append(5, 7));
    assert_eq!(volume.attr(ino).size, 7);
}

#[test]
fn a_reaped_file_leaves_nothing_at_its_holder() {
    let (mut volume, ino) = volume();
    volume.ok(own(ino, OTHER));
    volume.ok(Op::Unlink { parent: Ino::ROOT, name: super::super::harness::name("a") });
    volume.ok(Op::Reap { inos: vec![ino] });
    // Nothing is left to be found when the holder's life ends.
    volume.ok(Op::RemoveMember { node: OTHER.node });
}
