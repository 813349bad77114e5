use ctfs_types::{CellSize, Incarnation, Ino, NodeId, limits::COPIES_ON_EVERY};

use super::super::harness::{Volume, cluster, identity, member, time, token};
use crate::{Change, Durability, EffectivePolicy, Member, MemberState, MetaError, OnPartition, Op, Policy, Reply, TokenRecord};

const ROOT: Ino = Ino::ROOT;

fn join(volume: &mut Volume, hash: u8, member: Member) -> Result<Reply, MetaError> {
    volume.run(Op::Join { token: [hash; 32], member })
}

#[test]
fn a_volume_is_founded_once() {
    let mut volume = Volume::new();
    assert_eq!(volume.ns.cluster().unwrap(), None);
    volume.ok(Op::Found { cluster: identity(), member: member(1) });
    assert_eq!(volume.ns.cluster().unwrap(), Some(identity()));
    assert_eq!(volume.ns.members().unwrap(), [member(1)]);
    assert!(volume.changes.contains(&Change::Members));
    let other = crate::ClusterIdentity { name: "other".into(), ..identity() };
    let again = volume.run(Op::Found { cluster: other, member: member(2) });
    assert_eq!(again, Err(MetaError::AlreadyFounded));
    assert_eq!(volume.ns.cluster().unwrap(), Some(identity()));
}

#[test]
fn each_join_uses_up_one_use_of_its_token() {
    let mut volume = cluster(1);
    volume.ok(Op::CreateToken { token: token(5, 2) });
    assert_eq!(join(&mut volume, 5, member(2)), Ok(Reply::Joined { member: member(2) }));
    assert!(volume.changes.contains(&Change::Members));
    assert_eq!(volume.ns.token(&[5; 32]).unwrap(), Some(token(5, 1)));
    join(&mut volume, 5, member(3)).unwrap();
    assert_eq!(join(&mut volume, 5, member(4)), Err(MetaError::NoSuchToken));
    assert_eq!(volume.ns.members().unwrap(), [member(1), member(2), member(3)]);
}

#[test]
fn a_token_without_uses_lets_nobody_in() {
    let mut volume = cluster(1);
    volume.ok(Op::CreateToken { token: token(5, 0) });
    assert_eq!(join(&mut volume, 5, member(2)), Err(MetaError::NoSuchToken));
}

#[test]
fn an_unknown_revoked_or_expired_token_is_refused() {
    let mut volume = cluster(1);
    assert_eq!(join(&mut volume, 9, member(2)), Err(MetaError::NoSuchToken));
    volume.ok(Op::CreateToken { token: token(9, 1) });
    volume.ok(Op::RevokeToken { hash: [9; 32] });
    assert_eq!(join(&mut volume, 9, member(2)), Err(MetaError::NoSuchToken));
    assert_eq!(volume.run(Op::RevokeToken { hash: [9; 32] }), Err(MetaError::NoSuchToken));
    let expires = time(volume.ticks + 1);
    volume.ok(Op::CreateToken { token: TokenRecord { expires, ..token(9, 1) } });
    volume.ok(Op::Noop);
    assert_eq!(join(&mut volume, 9, member(2)), Err(MetaError::TokenExpired));
    assert_eq!(volume.ns.members().unwrap(), [member(1)]);
}

#[test]
fn a_refused_join_costs_no_use() {
    let mut volume = cluster(2);
    volume.ok(Op::CreateToken { token: token(5, 1) });
    let taken = Member { name: "server-2".into(), ..member(3) };
    assert_eq!(join(&mut volume, 5, taken), Err(MetaError::MemberNameTaken("server-2".into())));
    assert_eq!(volume.ns.token(&[5; 32]).unwrap(), Some(token(5, 1)));
    join(&mut volume, 5, member(3)).unwrap();
}

#[test]
fn the_same_key_joining_again_is_an_update() {
    let mut volume = cluster(2);
    volume.ok(Op::CreateToken { token: token(5, 1) });
    let moved = Member { name: "renamed".into(), zone: "there".into(), capacity: 7, ..member(2) };
    join(&mut volume, 5, moved.clone()).unwrap();
    assert_eq!(volume.ns.member(NodeId(2)).unwrap(), Some(moved));
    assert_eq!(volume.ns.members().unwrap().len(), 2);
    assert_eq!(volume.ns.token(&[5; 32]).unwrap(), None, "also an update uses the token");
}

#[test]
fn a_removed_key_never_comes_back() {
    let mut volume = cluster(2);
    volume.ok(Op::RemoveMember { node: NodeId(2) });
    assert_eq!(volume.ns.member(NodeId(2)).unwrap(), None);
    assert_eq!(volume.ns.removed_keys().unwrap(), [[2; 32]]);
    assert_eq!(join(&mut volume, 200, member(2)), Err(MetaError::KeyRemoved));
    assert_eq!(volume.run(Op::RemoveMember { node: NodeId(2) }), Err(MetaError::NoSuchMember));
    // Its name is free for another server.
    join(&mut volume, 200, Member { name: "server-2".into(), ..member(3) }).unwrap();
}

#[test]
fn a_member_reports_its_new_life() {
    let mut volume = cluster(2);
    let node = NodeId(2);
    let op = Op::Incarnate {
        node,
        incarnation: Incarnation(8),
        addresses: vec!["b:2".into()],
        capacity: 99,
        version: "0.2.0".into(),
    };
    volume.ok(op.clone());
    assert!(volume.changes.contains(&Change::Members));
    let seen = volume.ns.member(node).unwrap().expect("member");
    let expected = Member {
        incarnation: Incarnation(8),
        addresses: vec!["b:2".into()],
        capacity: 99,
        version: "0.2.0".into(),
        ..member(2)
    };
    assert_eq!(seen, expected);
    volume.ok(Op::RemoveMember { node });
    assert_eq!(volume.run(op), Err(MetaError::NoSuchMember));
}

#[test]
fn a_member_can_be_away_and_return() {
    let mut volume = cluster(2);
    let node = NodeId(2);
    for state in [MemberState::Away, MemberState::Active] {
        volume.ok(Op::SetMemberState { node, state });
        assert!(volume.changes.contains(&Change::Members));
        assert_eq!(volume.ns.member(node).unwrap().map(|member| member.state), Some(state));
    }
    let nobody = Op::SetMemberState { node: NodeId(9), state: MemberState::Away };
    assert_eq!(volume.run(nobody), Err(MetaError::NoSuchMember));
}

fn policy(copies: Option<u8>, cell: Option<u64>) -> Policy {
    Policy { copies, cell: cell.map(|bytes| CellSize::from_bytes(bytes).expect("a cell size")), durability: None, on_partition: None }
}

fn effective(copies: u8, cell: u64) -> EffectivePolicy {
    EffectivePolicy { copies, cell: CellSize::from_bytes(cell).expect("a cell size"), durability: Durability::Pair, on_partition: OnPartition::Stale }
}

#[test]
fn a_policy_is_inherited_field_by_field() {
    let mut volume = Volume::new();
    let a = volume.dir(ROOT, "a");
    let b = volume.dir(a, "b");
    let file = volume.file(b, "f");
    assert_eq!(volume.ns.effective_policy(file).unwrap(), effective(0, 1 << 20));
    volume.ok(Op::SetPolicy { ino: a, policy: policy(Some(2), Some(1 << 18)) });
    volume.ok(Op::SetPolicy { ino: b, policy: policy(Some(5), None) });
    assert_eq!(volume.ns.effective_policy(file).unwrap(), effective(5, 1 << 18));
    assert_eq!(volume.ns.effective_policy(a).unwrap(), effective(2, 1 << 18));
    assert_eq!(volume.ns.effective_policy(ROOT).unwrap(), effective(0, 1 << 20));
    assert_eq!(volume.ns.policy(b).unwrap(), policy(Some(5), None));
    assert_eq!(volume.ns.policy(file).unwrap(), Policy::default());
    volume.ok(Op::SetPolicy { ino: b, policy: Policy::default() });
    assert_eq!(volume.ns.effective_policy(file).unwrap(), effective(2, 1 << 18));
}

#[test]
fn what_shall_be_on_every_disk_has_a_copy_on_every_server_whatever_its_copies() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "a");
    let file = volume.file(dir, "f");
    volume.ok(Op::SetPolicy { ino: dir, policy: Policy { durability: Some(Durability::All), ..policy(Some(2), None) } });
    assert_eq!(volume.ns.effective_policy(file).unwrap().copies, COPIES_ON_EVERY);
    let beyond = Op::SetPolicy { ino: dir, policy: policy(Some(COPIES_ON_EVERY), None) };
    assert!(matches!(volume.run(beyond), Err(MetaError::BadPolicy(_))), "it comes with the class alone");
}

#[test]
fn a_cell_size_holds_for_files_made_from_now_on() {
    let mut volume = Volume::new();
    let old = volume.file(ROOT, "old");
    volume.ok(Op::SetPolicy { ino: ROOT, policy: policy(None, Some(8 << 20)) });
    let new = volume.file(ROOT, "new");
    assert_eq!((volume.attr(old).cell.bytes(), volume.attr(new).cell.bytes()), (1 << 20, 8 << 20));
    // Grids that differ share no cells.
    let clone = Op::CloneCells { source: old, first: 0, ino: new, to: 0, cells: 1, size_at_least: 0 };
    assert_eq!(volume.run(clone), Err(MetaError::WrongKind(new)));
}

#[test]
fn a_policy_has_at_most_16_copies_and_is_for_directories() {
    let mut volume = Volume::new();
    let file = volume.file(ROOT, "f");
    volume.ok(Op::SetPolicy { ino: ROOT, policy: policy(Some(16), None) });
    let verdict = volume.run(Op::SetPolicy { ino: ROOT, policy: policy(Some(17), None) });
    assert!(matches!(verdict, Err(MetaError::BadPolicy(_))));
    assert_eq!(volume.ns.policy(ROOT).unwrap(), policy(Some(16), None));
    let on_file = volume.run(Op::SetPolicy { ino: file, policy: policy(Some(1), None) });
    assert_eq!(on_file, Err(MetaError::NotDirectory(file)));
}
