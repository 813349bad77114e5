//! Lives that end with something in their journals.

use ctfs_types::{FileUse, Holder, Incarnation, Ino, NodeId};

use super::super::harness::{Verdict, Volume, cluster, inline, owner, record_lock};
use crate::{About, CellWrite, Change, Command, LockKind, MetaError, Noted, Op, SetAttr};

const OLD: Holder = holder(1, 11);
const PAIR: Holder = holder(2, 21);
const THIRD: Holder = holder(3, 31);

const fn holder(node: u64, incarnation: u64) -> Holder {
    Holder { node: NodeId(node), incarnation: Incarnation(incarnation) }
}

/// Server 1 has server 2 as its pair, holds a file, and has a lock on it.
fn held() -> (Volume, Ino) {
    let mut volume = cluster(3);
    let ino = volume.file(Ino::ROOT, "a");
    for life in [OLD, PAIR, THIRD] {
        volume.ok(incarnate(life));
    }
    by(&mut volume, OLD, Op::Own { ino, holder: OLD, although_shared: false }).unwrap();
    by(&mut volume, OLD, Op::Lock { ino, lock: record_lock(owner(1, 11, 7), true, 0, 9) }).unwrap();
    by(&mut volume, OLD, Op::SetPair { life: OLD, pair: Some(PAIR.node) }).unwrap();
    (volume, ino)
}

fn incarnate(life: Holder) -> Op {
    Op::Incarnate { node: life.node, incarnation: life.incarnation, addresses: vec![], capacity: 1, version: String::new() }
}

/// A command as the life gives it.
fn by(volume: &mut Volume, life: Holder, op: Op) -> Verdict {
    let command = volume.command(op);
    send(volume, life, command)
}

fn send(volume: &mut Volume, life: Holder, mut command: Command) -> Verdict {
    command.request.client = life.incarnation.0;
    volume.apply(&[command]).pop().expect("one verdict")
}

/// A command of `life` as `from` sends it.
fn left(volume: &mut Volume, life: Holder, from: Holder, op: Op) -> Verdict {
    let command = volume.command(op);
    send(volume, life, Command { about: About::Left { by: from }, ..command })
}

fn write(ino: Ino, volume: &Volume, text: &[u8], noted: Option<Noted>) -> Op {
    let cell = CellWrite { cell: 0, expect: volume.stamp(ino, 0), start: 0, data: Some(inline(text)), copies: 0 };
    Op::Write { ino, cells: vec![cell], size_at_least: text.len() as u64, mtime: None, drop_privileges: false, appends_at: None, noted }
}

fn noted(upto: u64) -> Option<Noted> {
    Some(Noted { upto, kept_from: 1 })
}

#[test]
fn what_a_life_with_a_pair_held_stays_held_until_the_pair_has_sent_what_it_left() {
    let (mut volume, ino) = held();
    volume.ok(Op::Fence { node: OLD.node, incarnation: OLD.incarnation });
    assert!(volume.changes.contains(&Change::Fenced { node: OLD.node, incarnation: OLD.incarnation, pair: Some(PAIR.node) }));
    assert!(volume.ns.is_ended(OLD.incarnation).unwrap(), "its own server learns of it");
    assert_eq!(volume.ns.left_to(PAIR.node).unwrap(), [OLD]);
    assert_eq!(volume.ns.left_to(THIRD.node).unwrap(), []);

    // Nobody else, and not that life itself.
    assert_eq!(volume.run(Op::Own { ino, holder: THIRD, although_shared: true }), Err(MetaError::Held { ino, holder: OLD }));
    let chmod = Op::SetAttr { ino, set: SetAttr { mode: Some(0o600), ..SetAttr::default() } };
    assert_eq!(by(&mut volume, OLD, chmod.clone()), Err(MetaError::StaleIncarnation));
    assert_eq!(left(&mut volume, OLD, THIRD, chmod.clone()), Err(MetaError::StaleIncarnation));
    assert_eq!(volume.run(Op::EndLife { life: OLD, by: THIRD }), Err(MetaError::NotTheSuccessor));
    assert_eq!(volume.ns.locks(ino, LockKind::Record).unwrap().len(), 1);

    left(&mut volume, OLD, PAIR, chmod).unwrap();
    let op = write(ino, &volume, b"left", noted(5));
    left(&mut volume, OLD, PAIR, op).unwrap();
    volume.ok(Op::EndLife { life: OLD, by: PAIR });
    assert_eq!((volume.attr(ino).mode & 0o777, volume.attr(ino).size), (0o600, 4));
    assert_eq!(volume.attr(ino).usage, FileUse::Free);
    assert_eq!(volume.ns.locks(ino, LockKind::Record).unwrap(), []);
    assert_eq!(volume.ns.left_to(PAIR.node).unwrap(), []);
    let op = write(ino, &volume, b"late", noted(6));
    assert_eq!(left(&mut volume, OLD, PAIR, op), Err(MetaError::StaleIncarnation));
}

/// The refusal was remembered as the verdict of the request, and the pair, which sent the same one, got it
/// for an answer: what fsync had acknowledged was gone.
#[test]
fn what_an_ended_life_is_refused_its_pair_may_send() {
    let (mut volume, ino) = held();
    volume.ok(Op::Fence { node: OLD.node, incarnation: OLD.incarnation });
    let command = volume.command(Op::SetAttr { ino, set: SetAttr { mode: Some(0o600), ..SetAttr::default() } });
    let sent_by = |from| Command { about: About::Left { by: from }, ..command.clone() };
    assert_eq!(send(&mut volume, OLD, command.clone()), Err(MetaError::StaleIncarnation), "it comes late");
    assert_eq!(send(&mut volume, OLD, sent_by(holder(2, 20))), Err(MetaError::StaleIncarnation), "so does an earlier life of the pair");
    send(&mut volume, OLD, sent_by(PAIR)).unwrap();
    assert_eq!(volume.attr(ino).mode & 0o777, 0o600);
    assert_eq!(send(&mut volume, OLD, sent_by(PAIR)), Err(MetaError::Answered));
}

#[test]
fn bytes_of_a_journal_are_written_once_whoever_sends_them() {
    let (mut volume, ino) = held();
    let op = write(ino, &volume, b"one", noted(3));
    by(&mut volume, OLD, op).unwrap();
    volume.ok(Op::Fence { node: OLD.node, incarnation: OLD.incarnation });
    assert_eq!(volume.ns.noted(OLD.incarnation).unwrap().0.get(&ino), Some(&3));
    for upto in [2, 3] {
        let op = write(ino, &volume, b"old", noted(upto));
        assert_eq!(left(&mut volume, OLD, PAIR, op), Err(MetaError::NotedBefore(ino)));
    }
    // The server itself is back before its pair is done.
    let next = holder(1, 12);
    let op = write(ino, &volume, b"newer", noted(9));
    left(&mut volume, OLD, next, op).unwrap();
    let op = write(ino, &volume, b"older", noted(8));
    assert_eq!(left(&mut volume, OLD, PAIR, op), Err(MetaError::NotedBefore(ino)));
    volume.ok(incarnate(next));
    assert_eq!(volume.run(Op::EndLife { life: OLD, by: PAIR }), Err(MetaError::NotTheSuccessor));
    assert_eq!(volume.attr(ino).usage, FileUse::Free);
    assert_eq!(volume.ns.noted(OLD.incarnation).unwrap(), Default::default());
    assert_eq!(volume.ns.left_to(PAIR.node).unwrap(), []);
}

#[test]
fn the_next_life_sends_what_the_last_one_left() {
    let (mut volume, ino) = held();
    let op = write(ino, &volume, b"left", noted(1));
    assert_eq!(left(&mut volume, OLD, PAIR, op.clone()), Err(MetaError::StaleIncarnation), "nobody has ended it");
    assert_eq!(left(&mut volume, OLD, OLD, op.clone()), Err(MetaError::StaleIncarnation), "it is no later one");
    left(&mut volume, OLD, holder(1, 12), op).unwrap();
    assert_eq!(volume.attr(ino).size, 4);
}

#[test]
fn a_pair_is_another_member_and_named_by_a_life_that_goes_on() {
    let (mut volume, _) = held();
    for pair in [OLD.node, NodeId(77)] {
        volume.run(Op::SetPair { life: OLD, pair: Some(pair) }).unwrap_err();
    }
    volume.ok(Op::SetPair { life: OLD, pair: None });
    assert_eq!(volume.ns.member(OLD.node).unwrap().unwrap().pair, None);
    volume.ok(Op::Fence { node: OLD.node, incarnation: OLD.incarnation });
    assert_eq!(volume.run(Op::SetPair { life: OLD, pair: Some(PAIR.node) }), Err(MetaError::StaleIncarnation));
    assert_eq!(volume.ns.left_to(PAIR.node).unwrap(), [], "without a pair nobody is waited for");
}

#[test]
fn notes_of_what_the_journal_no_longer_has_go_with_later_ones() {
    let (mut volume, ino) = held();
    for upto in 1..=300 {
        let op = write(ino, &volume, b"x", Some(Noted { upto, kept_from: upto }));
        by(&mut volume, OLD, op).unwrap();
    }
    assert_eq!(volume.ns.noted(OLD.incarnation).unwrap(), ([(ino, 300)].into(), 300));
    assert_eq!(volume.records().keys().filter(|key| key[0] == 26).count(), 2);
}
