//! The bytes on disk and on the wire, compared with `golden.txt`.
//!
//! Where this fails, what was written before is no longer read as it was meant: the version in front
//! of it must be raised. See `docs/formats.md`.

use ctfs_types::ChunkId;

use super::{
    files::Files,
    frame::{self, Entry, Frame},
};
use crate::wire;

const SALT: u64 = 0x0102_0304_0506_0708;

/// Bytes that no compressor makes smaller, and their name.
fn noise() -> (ChunkId, Vec<u8>) {
    let raw: Vec<u8> = (0..40u8).map(|n| n.wrapping_mul(89) ^ 0x5a).collect();
    (ChunkId(*blake3::hash(&raw).as_bytes()), raw)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_encoded_bytes_are_those_of_version_1() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::lock(dir.path()).unwrap();
    let (id, raw) = noise();
    let mut frame = Frame::data(id, &raw);
    let mut tombstone = Frame::tombstone(id);
    let entries = [Entry::of(&frame.header, 32), Entry::of(&tombstone.header, 128)];
    files.write_index(9, SALT, 184, &entries).unwrap();
    let index = std::fs::read(files.index_path(9)).unwrap();
    let records = [
        ("segment header", frame::segment_header(9, SALT).to_vec()),
        ("frame of data", frame.placed(SALT, 32).to_vec()),
        ("frame of a tombstone", tombstone.placed(SALT, 128).to_vec()),
        ("index file", index),
        ("packed chunk", wire::pack(&raw)),
    ];
    let text: String = records.iter().map(|(name, bytes)| format!("{name}: {}\n", hex(bytes))).collect();
    let golden = include_str!("golden.txt");
    let differs = text.lines().zip(golden.lines()).find(|(now, then)| now != then);
    assert!(text == golden, "first difference, now and then: {differs:#?}\nall of it now:\n{text}");
}

/// How well a compressor does may change with its version; what it once made must be read.
#[test]
fn what_was_once_compressed_is_read() {
    let packed = [
        &[1, 0x2c, 1, 0, 0][..],
        &[0x1f, b'x', 1, 0, 0xff, 0x13, 0x60],
        b"xxxxxx",
    ];
    assert_eq!(wire::unpack(&packed.concat(), 1 << 20).unwrap(), vec![b'x'; 300]);
}
