//! The bytes in the state directory and on the wire, compared with `golden.txt`.
//!
//! Where this fails, what was written before is no longer read as it was meant, or servers of
//! different versions no longer understand each other: the version in front of it must be raised.
//! See `docs/formats.md`.

use ctfs_meta::{ClusterIdentity, Member, MemberState};
use ctfs_types::{ChunkId, Incarnation, Ino, LogIndex, NodeId, Timestamp};

use crate::{
    messages::{self, HeldFile, JoinReply, JoinRequest, OpenOrphans, ServerFigures},
    problem::Problem,
    state::{ClusterRecord, StateDir},
};

fn member() -> Member {
    Member {
        node: NodeId(0x0102_0304_0506_0708),
        name: "a".into(),
        zone: "z".into(),
        key: [3; 32],
        addresses: vec!["10.0.0.1:7420".into()],
        capacity: 1 << 40,
        state: MemberState::Away,
        incarnation: Incarnation(2),
        version: "0.1.0".into(),
        fenced: false,
        pair: None,
        joined: Timestamp::new(1_000_000, 5),
    }
}

fn identity() -> ClusterIdentity {
    ClusterIdentity { id: [7; 16], name: "brave-otter".into(), ca_certificate: vec![1, 2] }
}

fn on_disk() -> Vec<(&'static str, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let record = ClusterRecord {
        identity: identity(),
        lives: 300,
        founder: true,
        took_part: true,
        name: "a".into(),
        zone: "z".into(),
    };
    state.set_cluster(&record).unwrap();
    state.set_peers(&[member()]).unwrap();
    vec![("cluster", state.read("cluster").unwrap()), ("peers", state.read("peers").unwrap())]
}

fn messages() -> Vec<(&'static str, Vec<u8>)> {
    let (first, second) = (ChunkId([1; 32]), ChunkId([2; 32]));
    let figures = ServerFigures { applied: 300, chunks: 7, version: "0.1.0".into(), ..ServerFigures::default() };
    let request = JoinRequest {
        secret: [9; 16],
        name: "a".into(),
        zone: "z".into(),
        addresses: vec!["10.0.0.1:7420".into()],
        port: 7420,
        capacity: 1 << 40,
        version: "0.1.0".into(),
    };
    let reply = JoinReply {
        cluster: identity(),
        certificate: vec![4, 5],
        authority_key: "PEM".into(),
        members: vec![member()],
    };
    vec![
        ("have chunks", messages::encode(&vec![first, second])),
        ("chunks held", messages::encode(&vec![true, false])),
        ("open orphans", messages::encode(&OpenOrphans { applied: LogIndex(300), inos: vec![Ino(5), Ino(6)] })),
        ("held file", messages::encode(&HeldFile { incarnation: Incarnation(2), ino: Ino(5) })),
        ("figures", messages::encode(&figures)),
        ("remove member", messages::encode(&(NodeId(5), true))),
        ("removed member", messages::encode(&Ok::<(), Problem>(()))),
        ("get chunk", messages::encode(&first)),
        ("join", messages::encode(&request)),
        ("joined", messages::encode(&reply)),
    ]
}

#[test]
fn the_encoded_bytes_are_those_of_version_1() {
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    let records = on_disk().into_iter().chain(messages());
    let text: String = records.map(|(name, bytes)| format!("{name}: {}\n", hex(&bytes))).collect();
    let golden = include_str!("golden.txt");
    let differs = text.lines().zip(golden.lines()).find(|(now, then)| now != then);
    assert!(text == golden, "first difference, now and then: {differs:#?}\nall of it now:\n{text}");
}
