//! The bytes on disk and on the wire, compared with `golden.txt`. Commands and verdicts have a
//! comparison of their own in `ctfs-meta`.
//!
//! Where this fails, what was written before is no longer read as it was meant, or servers of
//! different versions no longer understand each other: the version in front of it must be raised.
//! See `docs/formats.md`. openraft's own types are here too: an update of it may change them.

use std::{collections::BTreeSet, time::Duration};

use ctfs_meta::{About, Command, Op, Reply};
use ctfs_types::{Incarnation, LogIndex, RequestId, Timestamp, codec};
use openraft::{
    CommittedLeaderId, EmptyNode, Entry, EntryPayload, Membership, SnapshotMeta, Vote,
    error::RaftError,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
        VoteResponse,
    },
};

use crate::{
    log,
    messages::{
        self, Answer, AwaitVisible, Fate, Forward, Forwarded, Grant, ReadIndex, ReadIndexed, Renew, Renewed, Visible,
    },
    network::encode_result,
    raft_types::{Entries, RaftEntry, RaftLogId, RaftMembership, TypeConfig},
    sled_store,
    snapshot::{Header, Writer},
    state_dir::Reached,
};

const SECOND: Duration = Duration::from_millis(1500);

fn id(index: u64) -> RaftLogId {
    RaftLogId::new(CommittedLeaderId::new(3, 0x1122_3344), index)
}

fn command() -> Command {
    let request = RequestId { client: 1 << 40, seq: 300 };
    Command { request, answered: 299, at: Timestamp::new(1_000_000, 5), about: About::Ahead, op: Op::Noop }
}

fn membership() -> RaftMembership {
    let voters = [BTreeSet::from([1, 2, 3]), BTreeSet::from([2, 3, 4])];
    let nodes: std::collections::BTreeMap<u64, EmptyNode> = (1..=5).map(|node| (node, EmptyNode {})).collect();
    RaftMembership::new(Some(id(11)), Membership::new(voters.to_vec(), nodes))
}

fn entries() -> Vec<RaftEntry> {
    vec![
        Entry { log_id: id(12), payload: EntryPayload::Blank },
        Entry { log_id: id(13), payload: EntryPayload::Normal(Entries { commands: vec![command()] }) },
        Entry { log_id: id(14), payload: EntryPayload::Membership(membership().membership().clone()) },
    ]
}

fn meta() -> SnapshotMeta<u64, EmptyNode> {
    SnapshotMeta { last_log_id: Some(id(20)), last_membership: membership(), snapshot_id: "20-1".into() }
}

/// A whole snapshot file.
fn snapshot() -> Vec<u8> {
    let mut file = tempfile::tempfile().unwrap();
    let header = Header { meta: meta(), applied: LogIndex(21), state_hash: [8; 16] };
    let mut writer = Writer::new(file.try_clone().unwrap(), &header).unwrap();
    writer.records(&vec![(vec![1, 2], vec![3]), (vec![4], vec![])]).unwrap();
    writer.finish().unwrap();
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
    bytes
}

fn on_disk() -> Vec<(&'static str, Vec<u8>)> {
    let mut records = log::golden::records();
    for (name, entry) in ["blank", "commands", "membership"].into_iter().zip(entries()) {
        records.push((name, codec::encode(log::ENTRY_VERSION, &entry)));
    }
    records.push(("snapshot", snapshot()));
    records.push(("value in sled", sled_store::seal_value(b"key", b"value")));
    for (key, value) in Reached::records(id(14), Some(&membership())) {
        let name = if key == b"\xffapplied" { "applied" } else { "membership record" };
        records.push((name, value.expect("it is written")));
    }
    records
}

fn ok(response: impl serde::Serialize) -> Vec<u8> {
    encode_result(&Ok::<_, RaftError<u64, openraft::error::Infallible>>(response))
}

fn messages() -> Vec<(&'static str, Vec<u8>)> {
    let answer = Answer { index: LogIndex(400), verdicts: vec![Ok(Reply::Done)] };
    let answers = vec![Fate::Answered(answer), Fate::Unsure, Fate::NoSpace];
    let grant = Grant { usable: SECOND, from: LogIndex(8) };
    let append = AppendEntriesRequest::<TypeConfig> {
        vote: Vote::new_committed(4, 5),
        prev_log_id: Some(id(11)),
        entries: entries(),
        leader_commit: Some(id(10)),
    };
    let install = InstallSnapshotRequest::<TypeConfig> {
        vote: Vote::new_committed(4, 5),
        meta: meta(),
        offset: 1 << 20,
        data: vec![1, 2, 3],
        done: true,
    };
    vec![
        ("append entries", messages::encode(&append)),
        ("appended", ok(AppendEntriesResponse::<u64>::Success)),
        ("appended in part", ok(AppendEntriesResponse::<u64>::PartialSuccess(Some(id(12))))),
        ("append conflicts", ok(AppendEntriesResponse::<u64>::Conflict)),
        ("append of an old leader", ok(AppendEntriesResponse::<u64>::HigherVote(Vote::new(5, 6)))),
        ("vote", messages::encode(&VoteRequest::<u64> { vote: Vote::new(5, 6), last_log_id: Some(id(14)) })),
        ("voted", ok(VoteResponse::new(Vote::<u64>::new(5, 6), Some(id(14)), true))),
        ("install snapshot", messages::encode(&install)),
        ("installed snapshot", ok(InstallSnapshotResponse { vote: Vote::<u64>::new(5, 6) })),
        ("forward", messages::encode(&Forward { patience: SECOND, together: vec![vec![command()]] })),
        ("forwarded to no leader", messages::encode(&Forwarded::NotLeader)),
        ("forwarded", messages::encode(&Forwarded::Answers(answers))),
        ("renew", messages::encode(&Renew { incarnation: Incarnation(7), acked: LogIndex(300), short_of_room: true })),
        ("renewed by no leader", messages::encode(&Renewed::NotLeader)),
        (
            "renewed",
            messages::encode(&Renewed::Heard { grant: Some(grant), visible: LogIndex(9), committed: LogIndex(10), short_of_room: true }),
        ),
        ("read index", messages::encode(&ReadIndex { applied: LogIndex(300), patience: SECOND })),
        ("read index of no leader", messages::encode(&ReadIndexed::NotLeader)),
        ("read index without a quorum", messages::encode(&ReadIndexed::NoQuorum)),
        ("read index found", messages::encode(&ReadIndexed::At(LogIndex(300)))),
        ("await visible", messages::encode(&AwaitVisible { index: LogIndex(300), patience: SECOND })),
        ("visible to no leader", messages::encode(&Visible::NotLeader)),
        ("visible", messages::encode(&Visible::UpTo(LogIndex(300)))),
    ]
}

#[test]
fn the_encoded_bytes_are_those_of_version_5() {
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    let records = on_disk().into_iter().chain(messages());
    let text: String = records.map(|(name, bytes)| format!("{name}: {}\n", hex(&bytes))).collect();
    let golden = include_str!("golden.txt");
    let differs = text.lines().zip(golden.lines()).find(|(now, then)| now != then);
    assert!(text == golden, "first difference, now and then: {differs:#?}\nall of it now:\n{text}");
}
