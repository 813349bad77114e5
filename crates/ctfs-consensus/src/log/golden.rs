//! What the log writes, for the crate's [`crate::golden`].

use openraft::{CommittedLeaderId, Vote};

use super::{
    frame,
    marks::{Progress, ProgressFile, State},
};
use crate::raft_types::RaftLogId;

/// Names and bytes of everything but payloads.
pub(crate) fn records() -> Vec<(&'static str, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let id = |index| RaftLogId::new(CommittedLeaderId::new(3, 0x1122_3344), index);
    let mut framed = Vec::new();
    frame::write(&mut framed, 9, id(42), 41, b"payload");
    State { vote: Some(Vote::new_committed(4, 5)), purged: Some(id(7)) }.save(dir.path()).unwrap();
    let (progress, _) = ProgressFile::open(dir.path()).unwrap();
    progress.write(&Progress { synced: 300, committed: Some(id(299)) }).unwrap();
    let file = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    vec![
        ("log segment header", frame::segment_header(42, 9).to_vec()),
        ("log frame", framed),
        ("log state", file("state")),
        ("log progress", file("progress")),
    ]
}
