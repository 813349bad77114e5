use std::ops::Range;

use ctfs_types::{Incarnation, Ino, NodeId, RequestId};

use super::super::harness::{Verdict, Volume, cluster, name, node, time};
use crate::{Command, INOS_RESERVED_MAX, MetaError, NewContent, NewNode, Op, Quota, Reply};

const ROOT: Ino = Ino::ROOT;
/// The first life of server 1.
const LIFE: u64 = 1;

/// Runs a command of a client, which counts its requests itself.
fn run(volume: &mut Volume, client: u64, seq: u64, op: Op) -> Verdict {
    let command = Command { request: RequestId { client, seq }, answered: seq - 1, at: time(seq), about: crate::About::Ahead, op };
    volume.apply(&[command]).remove(0)
}

fn make(text: &str, ino: u64) -> Op {
    Op::Make { parent: ROOT, name: name(text), node: NewNode { ino: Some(Ino(ino)), ..node(NewContent::File, 0o644) } }
}

/// Reserves numbers for a client by its request 1 and answers the first.
fn reserve(volume: &mut Volume, client: u64, seq: u64, count: u32) -> u64 {
    match run(volume, client, seq, Op::ReserveInos { count }) {
        Ok(Reply::Inos { first, count: got }) if got == count => first.0,
        other => panic!("{other:?}"),
    }
}

fn left(volume: &Volume, client: u64) -> Vec<Range<u64>> {
    volume.ns.reserved_inos(client).unwrap().into_iter().map(|range| range.start.0..range.end.0).collect()
}

#[test]
fn reserved_numbers_are_taken_in_order_and_those_passed_over_never() {
    let mut volume = Volume::new();
    let first = reserve(&mut volume, LIFE, 1, 5);
    assert_eq!(left(&volume, LIFE), [first..first + 5]);
    for (seq, (text, number, is_free)) in
        [("a", first, true), ("b", first, false), ("b", first + 2, true), ("c", first + 1, false), ("c", first + 4, true), ("d", first + 3, false)]
            .into_iter()
            .enumerate()
    {
        let made = run(&mut volume, LIFE, seq as u64 + 2, make(text, number));
        match is_free {
            true => assert_eq!(volume.lookup(ROOT, text), Some(Ino(number))),
            false => assert_eq!(made, Err(MetaError::NumberNotReserved(Ino(number)))),
        }
    }
    assert_eq!(left(&volume, LIFE), [], "a range that is used up is forgotten");
    assert_eq!(volume.file(ROOT, "next"), Ino(first + 5), "others number on behind it");
}

#[test]
fn a_number_is_its_clients_alone() {
    let mut volume = Volume::new();
    let first = reserve(&mut volume, LIFE, 1, 5);
    let others = reserve(&mut volume, 2, 1, 5);
    assert_eq!(others, first + 5);
    for (seq, number) in (2..).zip([0, 1, first, others + 5, u64::MAX]) {
        assert_eq!(run(&mut volume, 2, seq, make("a", number)), Err(MetaError::NumberNotReserved(Ino(number))));
    }
    assert_eq!(volume.file(ROOT, "a"), Ino(others + 5));
}

#[test]
fn a_make_that_makes_nothing_uses_up_no_number() {
    let mut volume = Volume::new();
    let there = volume.file(ROOT, "there");
    let full = volume.dir(ROOT, "full");
    volume.ok(Op::SetQuota { ino: full, quota: Quota { bytes: None, files: Some(0) } });
    let first = reserve(&mut volume, LIFE, 1, 5);
    let numbered = |exclusive| NewNode { exclusive, ino: Some(Ino(first)), ..node(NewContent::File, 0o644) };
    let refused = run(&mut volume, LIFE, 2, Op::Make { parent: ROOT, name: name("there"), node: numbered(true) });
    assert_eq!(refused, Err(MetaError::Exists { parent: ROOT, name: name("there") }));
    let found = run(&mut volume, LIFE, 3, Op::Make { parent: ROOT, name: name("there"), node: numbered(false) });
    assert_eq!(found, Ok(Reply::Entry { attr: volume.attr(there), made: false }));
    let over = run(&mut volume, LIFE, 4, Op::Make { parent: full, name: name("a"), node: numbered(true) });
    assert_eq!(over, Err(MetaError::QuotaExceeded { dir: full }));
    assert_eq!(left(&volume, LIFE), [first..first + 5]);
    run(&mut volume, LIFE, 5, make("a", first)).unwrap();
}

#[test]
fn another_range_leaves_the_ones_before_alone() {
    let mut volume = Volume::new();
    let first = reserve(&mut volume, LIFE, 1, 5);
    let range = |volume: &Volume| volume.records().into_iter().filter(|(key, _)| key[0] == 25).collect::<Vec<_>>();
    let before = range(&volume);
    let second = reserve(&mut volume, LIFE, 2, 3);
    assert_eq!(range(&volume)[..1], before[..]);
    run(&mut volume, LIFE, 3, make("b", second)).unwrap();
    run(&mut volume, LIFE, 4, make("a", first + 1)).unwrap();
    assert_eq!(left(&volume, LIFE), [first + 2..first + 5, second + 1..second + 3]);
}

#[test]
fn so_many_numbers_and_ranges_are_reserved_and_no_more() {
    let mut volume = Volume::new();
    for count in [0, INOS_RESERVED_MAX + 1, u32::MAX] {
        assert_eq!(run(&mut volume, LIFE, u64::from(count) + 1, Op::ReserveInos { count }), Err(MetaError::BadReservation(count)));
    }
    for seq in 1..=64 {
        reserve(&mut volume, 2, seq, INOS_RESERVED_MAX);
    }
    assert_eq!(run(&mut volume, 2, 65, Op::ReserveInos { count: 1 }), Err(MetaError::TooManyReservations));
    reserve(&mut volume, 3, 1, 1);
}

#[test]
fn what_an_ended_life_had_reserved_is_never_used() {
    let incarnate = Op::Incarnate { node: NodeId(1), incarnation: Incarnation(9), addresses: vec![], capacity: 1, version: "2".into() };
    let fence = Op::Fence { node: NodeId(1), incarnation: Incarnation(LIFE) };
    for end in [incarnate, fence, Op::RemoveMember { node: NodeId(1) }] {
        let mut volume = cluster(1);
        let first = reserve(&mut volume, LIFE, 1, 5);
        run(&mut volume, LIFE, 2, make("a", first)).unwrap();
        volume.ok(end);
        assert_eq!(left(&volume, LIFE), []);
        assert!(run(&mut volume, LIFE, 3, make("b", first + 1)).is_err());
        assert_eq!(volume.file(ROOT, "c"), Ino(first + 5));
    }
}
