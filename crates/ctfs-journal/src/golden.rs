//! The bytes on disk and on the wire, compared with `golden.txt`.
//!
//! Where this fails, what was written before is no longer read as it was meant, or servers of
//! different versions no longer understand each other: the version in front of it must be raised.
//! See `docs/formats.md`.

use std::sync::Arc;

use bytes::Bytes;
use ctfs_types::{Incarnation, NodeId, codec};

use crate::{
    Batch, Copies, CopySettings, JournalId, Position, Record, Refusal,
    copies::keeper::{Fence, seal_fences},
    encode_answer, frame,
    segments::Marks,
    tests::disk::CrashDisk,
    tests::root,
};

fn id() -> JournalId {
    JournalId { cluster: *b"cluster of bytes", node: NodeId(0x1122_3344_5566_7788), incarnation: Incarnation(9) }
}

fn record() -> Record {
    Record { position: Position(42), payload: Bytes::from_static(b"payload") }
}

fn records() -> Vec<(&'static str, Vec<u8>)> {
    let mut framed = Vec::new();
    frame::write(&mut framed, 9, &record(), Position(41));
    let fence = Fence { node: id().node.0, incarnation: 9, epoch: 300 };
    let refusals = [
        Refusal::Fenced { epoch: 300 },
        Refusal::Diverged { position: Position(300) },
        Refusal::Gap { has: Position(300) },
        Refusal::Full,
        Refusal::Invalid,
        Refusal::Failed("why".into()),
        Refusal::Superseded { epoch: 300 },
    ];
    let mut records = vec![
        ("directory", id().dir_name().into_bytes()),
        ("segment header", frame::segment_header(&id(), Position(42), 9).to_vec()),
        ("frame", framed),
        ("marks", Marks { trimmed: Position(7), synced: Position(300) }.bytes().to_vec()),
        ("fences", seal_fences(id().cluster, &[fence])),
        ("journal id", codec::encode(1, &id())),
        ("batch", Batch::new(Position(7), vec![record(), Record { position: Position(43), payload: Bytes::new() }]).encode()),
        ("accepted", encode_answer(&Ok(Position(300)))),
    ];
    records.extend(refusals.into_iter().map(|refusal| ("refused", encode_answer(&Err(refusal)))));
    records
}

#[test]
fn the_encoded_bytes_are_those_of_version_1() {
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    let text: String = records().iter().map(|(name, bytes)| format!("{name}: {}\n", hex(bytes))).collect();
    let golden = include_str!("golden.txt");
    let differs = text.lines().zip(golden.lines()).find(|(now, then)| now != then);
    assert!(text == golden, "first difference, now and then: {differs:#?}\nall of it now:\n{text}");
}

#[tokio::test]
async fn files_written_by_version_1_are_read() {
    let golden = |name: &str| -> Vec<u8> {
        let line = include_str!("golden.txt").lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        let line = line.expect("it is in the file").as_bytes();
        line.chunks(2).map(|hex| u8::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap()).collect()
    };
    let disk = CrashDisk::new();
    let dir = root().join(String::from_utf8(golden("directory")).unwrap());
    crate::Disk::create_dir(&disk, &dir).unwrap();
    disk.set(&dir.join("00000000000000000042.seg"), [golden("segment header"), golden("frame")].concat());
    disk.set(&root().join("fences"), golden("fences"));
    let copies = Copies::open(Arc::new(disk), root(), id().cluster, CopySettings::default()).unwrap();
    let fenced = copies.fence(id(), 300).await.unwrap().expect("there is a copy");
    assert_eq!(fenced.records(Position(42), 1000).unwrap(), vec![record()]);
    let status = &copies.list().await.unwrap()[0];
    assert_eq!((status.last, status.fenced), (Position(42), Some(300)));
}
