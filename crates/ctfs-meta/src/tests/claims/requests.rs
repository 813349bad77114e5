use std::sync::atomic::Ordering;

use ctfs_types::{Incarnation, Ino, LogIndex, NodeId, RequestId};

use super::super::{
    harness::{CLIENT, Volume, chunk, cluster, copy, name, node, owner, record_lock, time},
    observe::observe,
};
use crate::{About, Batch, Change, Command, MetaError, Namespace, NewContent, Op, RenameMode, Reply, SetAttr, Store};

const ROOT: Ino = Ino::ROOT;

fn make(text: &str) -> Op {
    Op::Make { parent: ROOT, name: name(text), node: node(NewContent::File, 0o644) }
}

fn command(client: u64, seq: u64, answered: u64, op: Op) -> Command {
    Command { request: RequestId { client, seq }, answered, at: time(seq), about: About::Inodes(Vec::new()), op }
}

/// One that happened on its server before it came to the log.
fn in_order(client: u64, seq: u64, op: Op) -> Command {
    Command { about: About::Ahead, ..command(client, seq, 0, op) }
}

#[test]
fn a_request_sent_twice_happens_once_and_is_answered_alike() {
    let mut volume = Volume::new();
    let first = command(1, 1, 0, make("a"));
    let answer = volume.apply(std::slice::from_ref(&first));
    volume.unlink(ROOT, "a").unwrap();
    let tree = observe(&volume.ns);
    assert_eq!(volume.apply(std::slice::from_ref(&first)), answer);
    assert_eq!(volume.changes, []);
    assert_eq!(observe(&volume.ns), tree);
}

#[test]
fn a_refusal_is_remembered_as_well() {
    let mut volume = Volume::new();
    let early = command(1, 1, 0, Op::Unlink { parent: ROOT, name: name("a") });
    let refused = volume.apply(std::slice::from_ref(&early));
    assert_eq!(refused, [Err(MetaError::NoSuchEntry { parent: ROOT, name: name("a") })]);
    volume.file(ROOT, "a");
    assert_eq!(volume.apply(&[early]), refused);
    assert!(volume.lookup(ROOT, "a").is_some());
}

#[test]
fn a_request_sent_twice_in_one_entry_happens_once() {
    let mut volume = Volume::new();
    let first = command(1, 1, 0, make("a"));
    let answers = volume.apply(&[first.clone(), first]);
    assert_eq!(answers[0], answers[1]);
    assert_eq!(volume.attr(ROOT).size, 1);
}

#[test]
fn equal_numbers_of_other_clients_are_other_requests() {
    let mut volume = Volume::new();
    let answers = volume.apply(&[command(1, 1, 0, make("a")), command(2, 1, 0, make("b"))]);
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(volume.attr(ROOT).size, 2);
}

#[test]
fn verdicts_the_client_has_are_forgotten() {
    let mut volume = Volume::new();
    volume.ok(Op::Noop);
    volume.ok(Op::Noop);
    let records = volume.records().len();
    for _ in 0..100 {
        volume.ok(Op::Noop);
    }
    assert_eq!(volume.records().len(), records, "one verdict stays, that of the last request");
    // What is not answered stays, also while later requests come and go.
    volume.apply(&[command(9, 1, 0, make("a"))]);
    for seq in 2..50 {
        volume.apply(&[command(9, seq, 0, Op::Noop)]);
    }
    let again = volume.apply(&[command(9, 1, 0, make("a"))]);
    assert!(matches!(again[..], [Ok(Reply::Entry { made: true, .. })]));
}

#[test]
fn a_stray_copy_of_an_answered_request_does_nothing() {
    let mut volume = Volume::new();
    let first = command(9, 1, 0, make("a"));
    volume.apply(std::slice::from_ref(&first));
    volume.apply(&[command(9, 2, 1, Op::Unlink { parent: ROOT, name: name("a") })]);
    assert_eq!(volume.apply(&[first]), [Err(MetaError::Answered)]);
    assert_eq!((volume.lookup(ROOT, "a"), volume.changes.len()), (None, 0));
    // Requests that arrive late for the first time are not stray.
    volume.apply(&[command(9, 5, 2, Op::Noop)]);
    assert!(volume.apply(&[command(9, 3, 2, make("b"))])[0].is_ok());
}

#[test]
fn what_comes_in_order_happens_once_and_leaves_one_record_a_life() {
    let mut volume = Volume::new();
    let commands: Vec<Command> = (1..=100u64).map(|seq| in_order(9, 2 * seq, make(&seq.to_string()))).collect();
    volume.apply(&commands[..1]);
    let of_life = |volume: &Volume| volume.records().keys().filter(|key| matches!(key[0], 16 | 28)).count();
    let records = of_life(&volume);
    volume.apply(&commands[1..60]);
    assert_eq!(of_life(&volume), records);
    // Sent again, alone and with what follows.
    assert!(volume.apply(&commands[..60]).iter().all(|verdict| *verdict == Err(MetaError::Answered)));
    let (known, new) = (40..60, 60..100);
    let verdicts = volume.apply(&commands[known.start..new.end]);
    assert!(verdicts[..known.len()].iter().all(|verdict| *verdict == Err(MetaError::Answered)));
    assert!(verdicts[known.len()..].iter().all(Result::is_ok));
    assert_eq!(volume.attr(ROOT).size, 100);
}

#[test]
fn a_refusal_of_what_comes_in_order_is_remembered() {
    let mut volume = Volume::new();
    let refused = in_order(9, 1, Op::Unlink { parent: ROOT, name: name("a") });
    let verdict = volume.apply(std::slice::from_ref(&refused));
    assert_eq!(verdict, [Err(MetaError::NoSuchEntry { parent: ROOT, name: name("a") })]);
    assert!(volume.apply(&[in_order(9, 2, make("a"))])[0].is_ok());
    assert_eq!(volume.apply(&[refused]), verdict);
    assert!(volume.lookup(ROOT, "a").is_some());
}

/// What goes through the log directly may come in any order, beside what comes in its own.
#[test]
fn what_comes_in_order_answers_for_nothing_else() {
    let mut volume = Volume::new();
    volume.apply(&[in_order(9, 5, make("a"))]);
    assert!(volume.apply(&[command(9, 3, 0, make("b"))])[0].is_ok());
    assert!(volume.apply(&[in_order(9, 6, make("c"))])[0].is_ok());
    let again = volume.apply(&[command(9, 3, 0, make("b"))]);
    assert!(matches!(again[..], [Ok(Reply::Entry { made: true, .. })]));
}

/// A new life forgets the verdicts of the ones before; their requests once could be carried out
/// again by a copy that was still under way.
#[test]
fn a_stray_request_of_an_ended_life_does_nothing() {
    let mut volume = cluster(1);
    let life = 1;
    let request = command(life, 1, 0, make("a"));
    volume.apply(std::slice::from_ref(&request));
    volume.unlink(ROOT, "a").unwrap();
    volume.ok(Op::Incarnate {
        node: NodeId(1),
        incarnation: Incarnation(life + 1),
        addresses: vec![],
        capacity: 1,
        version: "2".into(),
    });
    assert_eq!(volume.apply(&[request]), [Err(MetaError::StaleIncarnation)]);
    assert_eq!(volume.apply(&[command(life, 2, 1, make("b"))]), [Err(MetaError::StaleIncarnation)]);
    assert_eq!(volume.attr(ROOT).size, 0);
    assert!(volume.apply(&[command(life + 1, 1, 0, make("b"))])[0].is_ok());
}

#[test]
fn a_client_that_never_says_what_it_has_does_not_fill_the_store() {
    let mut volume = Volume::new();
    for seq in 1..=6000 {
        volume.apply(&[command(5, seq, 0, Op::Noop)]);
        if seq % 1000 == 0 {
            assert!(volume.records().len() < 4200, "after {seq} requests");
        }
    }
}

#[test]
fn a_refused_command_changes_nothing() {
    let mut volume = cluster(1);
    let dir = volume.dir(ROOT, "d");
    let file = volume.file(dir, "f");
    volume.write(file, 0, chunk(1, 5000)).unwrap();
    volume.ok(Op::Lock { ino: file, lock: record_lock(owner(1, 1, 1), true, 0, 9) });
    let lock = record_lock(owner(1, 1, 2), false, 5, 5);
    let refused = [
        make("d"),
        Op::Unlink { parent: ROOT, name: name("d") },
        Op::Rmdir { parent: ROOT, name: name("d") },
        Op::Link { ino: file, parent: dir, name: name("f") },
        Op::Rename { from: ROOT, name: name("d"), to: dir, new_name: name("x"), mode: RenameMode::Replace },
        Op::SetAttr { ino: file, set: SetAttr { mode: Some(0), size: Some(u64::MAX), ..SetAttr::default() } },
        Op::RemoveXattr { ino: file, name: b"user.x".to_vec() },
        Op::Lock { ino: file, lock },
        Op::RevokeToken { hash: [1; 32] },
    ];
    for op in refused {
        let (tree, hash) = (observe(&volume.ns), volume.ns.state_hash());
        let records = volume.records();
        let verdict = volume.run(op.clone());
        assert!(verdict.is_err(), "{op:?}");
        assert_eq!(volume.changes, [], "{op:?}");
        assert_eq!(observe(&volume.ns), tree, "{op:?}");
        assert_ne!(volume.ns.state_hash(), hash, "the applied index is part of the state");
        // The counters with the applied index, the hash, the new verdict, the forgotten one and
        // how far the client has its answers.
        let now = volume.records();
        let keys: std::collections::BTreeSet<_> = records.keys().chain(now.keys()).collect();
        let differing = keys.into_iter().filter(|key| records.get(*key) != now.get(*key)).count();
        assert!(differing <= 5, "{op:?} changed {differing} records");
    }
}

#[test]
fn a_refused_command_leaves_its_entry_neighbours_alone() {
    let mut volume = Volume::new();
    let answers = volume.apply(&[
        command(1, 1, 0, make("a")),
        command(1, 2, 0, make("a")),
        command(1, 3, 0, Op::Unlink { parent: ROOT, name: name("a") }),
        command(1, 4, 0, make("a")),
    ]);
    let right: Vec<bool> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(right, [true, false, true, true]);
    assert_eq!(volume.lookup(ROOT, "a"), Some(Ino(3)), "the refused command used up no number");
}

#[test]
fn an_entry_reaches_the_store_in_one_batch() {
    let mut volume = Volume::new();
    let before = volume.writes.load(Ordering::Relaxed);
    let commands: Vec<Command> = (1..=20).map(|seq| command(1, seq, 0, make(&format!("f{seq}")))).collect();
    volume.apply_with(&commands, Batch::from([(vec![0xff], Some(vec![1]))]));
    assert_eq!(volume.writes.load(Ordering::Relaxed), before + 1);
    assert_eq!(volume.ns.store().get(&[0xff]).unwrap(), Some(vec![1]));
    assert_eq!(volume.attr(ROOT).size, 20);
}

#[test]
fn entries_of_the_consensus_layer_use_up_indexes() {
    let mut volume = Volume::new();
    let commands = [command(1, 1, 0, make("a"))];
    volume.ns.apply(LogIndex(7), &commands, Batch::new()).unwrap();
    assert_eq!(volume.ns.applied(), LogIndex(7));
    assert_eq!(volume.attr(Ino(2)).data_version, 1);
}

#[test]
#[should_panic(expected = "in order")]
fn an_entry_is_never_applied_twice() {
    let mut volume = Volume::new();
    volume.ns.apply(LogIndex(7), &[], Batch::new()).unwrap();
    let _ = volume.ns.apply(LogIndex(7), &[], Batch::new());
}

#[test]
fn a_change_names_the_client_whose_command_did_it() {
    let mut volume = Volume::new();
    let commands = [command(3, 1, 0, make("a")), command(4, 1, 0, make("b"))];
    let applied = volume.ns.apply(LogIndex(1), &commands, Batch::new()).unwrap();
    for (client, text) in [(3, "a"), (4, "b")] {
        let change = Change::Entry { parent: ROOT, name: name(text) };
        let by: Vec<u64> = applied.changes.iter().filter(|(_, c)| *c == change).map(|(by, _)| *by).collect();
        assert_eq!(by, [client]);
    }
    assert!(applied.changes.iter().all(|(by, _)| *by != CLIENT));
}

#[test]
fn a_state_of_an_older_version_is_refused_by_name() {
    let store = copy(&Volume::new().ns);
    let old = ctfs_types::codec::encode(1, &(5u64, 2u64, 0u64, 0u64));
    store.write(Batch::from([(vec![17], Some(old))])).unwrap();
    let refused = Namespace::open(Box::new(store)).err().expect("refused").to_string();
    assert!(refused.contains("version 1") && refused.contains("reads version 5"), "{refused}");
}
