use ctfs_types::{Incarnation, Ino, NodeId};

use super::super::harness::{Volume, cluster, member, owner, record_lock};
use crate::{Lock, LockKind, LockOwner, MetaError, Op};

const END: u64 = u64::MAX;

fn volume() -> (Volume, Ino) {
    let mut volume = cluster(3);
    let ino = volume.file(Ino::ROOT, "a");
    (volume, ino)
}

fn ranges(volume: &Volume, ino: Ino, owner: LockOwner) -> Vec<(u64, u64, bool)> {
    let locks = volume.ns.locks(ino, LockKind::Record).unwrap();
    locks.iter().filter(|l| l.owner == owner).map(|l| (l.start, l.end, l.exclusive)).collect()
}

fn unlock(ino: Ino, owner: LockOwner, start: u64, end: u64) -> Op {
    Op::Unlock { ino, owner, kind: LockKind::Record, start, end }
}

fn flock(owner: LockOwner, exclusive: bool) -> Lock {
    Lock { kind: LockKind::Flock, ..record_lock(owner, exclusive, 0, END) }
}

#[test]
fn there_are_never_two_holders() {
    let (mut volume, ino) = volume();
    let (one, other) = (owner(1, 1, 1), owner(2, 1, 1));
    let held = record_lock(one, true, 0, 99);
    volume.ok(Op::Lock { ino, lock: held.clone() });
    for exclusive in [false, true] {
        let wish = record_lock(other, exclusive, 99, END);
        assert_eq!(volume.ns.conflicting_lock(ino, &wish).unwrap(), Some(held.clone()));
        let refused = Err(MetaError::Locked { holder: Box::new(held.clone()) });
        assert_eq!(volume.run(Op::Lock { ino, lock: wish }), refused);
    }
    volume.ok(Op::Lock { ino, lock: record_lock(other, true, 100, END) });
    volume.ok(unlock(ino, one, 0, END));
    volume.ok(Op::Lock { ino, lock: record_lock(other, true, 0, 99) });
    assert_eq!(ranges(&volume, ino, other), [(0, END, true)]);
}

#[test]
fn readers_share_and_keep_writers_out() {
    let (mut volume, ino) = volume();
    for n in 1..=3 {
        volume.ok(Op::Lock { ino, lock: record_lock(owner(n, 1, 1), false, 0, 9) });
    }
    let upgrade = volume.run(Op::Lock { ino, lock: record_lock(owner(1, 1, 1), true, 0, 9) });
    assert!(matches!(upgrade, Err(MetaError::Locked { .. })));
    assert_eq!(ranges(&volume, ino, owner(1, 1, 1)), [(0, 9, false)], "a refused upgrade keeps what it had");
}

#[test]
fn an_owner_splits_joins_and_upgrades_its_own_locks() {
    let (mut volume, ino) = volume();
    let me = owner(1, 1, 1);
    volume.ok(Op::Lock { ino, lock: record_lock(me, false, 0, 99) });
    volume.ok(Op::Lock { ino, lock: record_lock(me, true, 40, 59) });
    assert_eq!(ranges(&volume, ino, me), [(0, 39, false), (40, 59, true), (60, 99, false)]);
    volume.ok(unlock(ino, me, 50, 69));
    assert_eq!(ranges(&volume, ino, me), [(0, 39, false), (40, 49, true), (70, 99, false)]);
    volume.ok(Op::Lock { ino, lock: record_lock(me, false, 40, 69) });
    assert_eq!(ranges(&volume, ino, me), [(0, 99, false)]);
    volume.ok(Op::Lock { ino, lock: record_lock(me, true, 0, END) });
    assert_eq!(ranges(&volume, ino, me), [(0, END, true)]);
}

#[test]
fn flock_and_record_locks_do_not_see_each_other() {
    let (mut volume, ino) = volume();
    volume.ok(Op::Lock { ino, lock: record_lock(owner(1, 1, 1), true, 0, END) });
    volume.ok(Op::Lock { ino, lock: flock(owner(2, 1, 1), true) });
    let refused = volume.run(Op::Lock { ino, lock: flock(owner(3, 1, 1), false) });
    assert_eq!(refused, Err(MetaError::Locked { holder: Box::new(flock(owner(2, 1, 1), true)) }));
}

#[test]
fn unlock_all_frees_both_tables_of_one_owner_on_one_inode() {
    let (mut volume, ino) = volume();
    let other = volume.file(Ino::ROOT, "b");
    let me = owner(1, 1, 1);
    for ino in [ino, other] {
        volume.ok(Op::Lock { ino, lock: record_lock(me, true, 0, 5) });
        volume.ok(Op::Lock { ino, lock: flock(me, true) });
    }
    volume.ok(Op::UnlockAll { ino, owner: me });
    assert_eq!(volume.ns.locks(ino, LockKind::Record).unwrap(), []);
    assert_eq!(volume.ns.locks(ino, LockKind::Flock).unwrap(), []);
    assert_eq!(ranges(&volume, other, me), [(0, 5, true)]);
}

fn incarnate(node: u64, life: u64) -> Op {
    let incarnation = Incarnation(life);
    Op::Incarnate { node: NodeId(node), incarnation, addresses: vec![], capacity: 1, version: "2".into() }
}

#[test]
fn a_new_life_of_a_server_frees_the_locks_of_its_earlier_ones() {
    let (mut volume, ino) = volume();
    volume.ok(Op::Lock { ino, lock: record_lock(owner(1, 1, 1), false, 0, 5) });
    volume.ok(Op::Lock { ino, lock: record_lock(owner(2, 1, 1), false, 0, 5) });
    volume.ok(incarnate(2, 2));
    assert_eq!(ranges(&volume, ino, owner(2, 1, 1)), []);
    assert_eq!(ranges(&volume, ino, owner(1, 1, 1)), [(0, 5, false)]);
}

#[test]
fn an_ended_life_of_a_server_gets_no_locks() {
    let (mut volume, ino) = volume();
    volume.ok(incarnate(2, 2));
    let stale = Err(MetaError::StaleIncarnation);
    assert_eq!(volume.run(Op::Lock { ino, lock: record_lock(owner(2, 1, 1), false, 0, 5) }), stale);
    assert_eq!(volume.run(incarnate(2, 1)), stale);
    volume.ok(Op::Lock { ino, lock: record_lock(owner(2, 2, 1), false, 0, 5) });
    volume.ok(incarnate(2, 2));
    assert_eq!(ranges(&volume, ino, owner(2, 2, 1)), [(0, 5, false)], "a repeated report frees nothing");
}

/// A request of a removed server that arrived late once left a lock that nobody ever freed.
#[test]
fn a_removed_server_loses_its_locks_and_gets_no_more() {
    let (mut volume, ino) = volume();
    let gone = owner(2, 1, 1);
    volume.ok(Op::Lock { ino, lock: record_lock(gone, true, 0, 5) });
    volume.ok(Op::RemoveMember { node: NodeId(2) });
    assert_eq!(ranges(&volume, ino, gone), []);
    assert_eq!(volume.run(Op::Lock { ino, lock: record_lock(gone, true, 0, 5) }), Err(MetaError::NoSuchMember));
}

/// A server that joined again under its old key once kept the locks of its earlier lives for good,
/// because its report of the new life found nothing newer.
#[test]
fn a_server_that_joins_again_has_no_locks_left() {
    let (mut volume, ino) = volume();
    volume.ok(incarnate(2, 4));
    volume.ok(Op::Lock { ino, lock: record_lock(owner(2, 4, 1), true, 0, 5) });
    let again = crate::Member { incarnation: Incarnation(5), ..member(2) };
    volume.ok(Op::Join { token: [200; 32], member: again });
    assert_eq!(ranges(&volume, ino, owner(2, 4, 1)), []);
    // Nor do ended lives come back when the newcomer does not know its own number yet.
    volume.ok(Op::Join { token: [200; 32], member: crate::Member { incarnation: Incarnation(0), ..member(2) } });
    let stale = record_lock(owner(2, 4, 1), true, 0, 5);
    assert_eq!(volume.run(Op::Lock { ino, lock: stale }), Err(MetaError::StaleIncarnation));
}

#[test]
fn locks_go_with_the_inode() {
    let (mut volume, ino) = volume();
    volume.ok(Op::Lock { ino, lock: record_lock(owner(1, 1, 1), true, 0, 5) });
    volume.unlink(Ino::ROOT, "a").unwrap();
    assert_eq!(ranges(&volume, ino, owner(1, 1, 1)), [(0, 5, true)]);
    volume.ok(Op::Reap { inos: vec![ino] });
    assert_eq!(ranges(&volume, ino, owner(1, 1, 1)), []);
    let late = volume.run(Op::Lock { ino, lock: record_lock(owner(1, 1, 1), true, 0, 5) });
    assert_eq!(late, Err(MetaError::NoSuchInode(ino)));
    volume.ok(unlock(ino, owner(1, 1, 1), 0, END));
}
