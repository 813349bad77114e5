//! How a record lies in a segment file.
//!
//! ```text
//! segment:  "CTFSJRNL"  version u32  salt u32  cluster 16  node u64  life u64  first position u64
//!           CRC-32C of these u32
//! frame:    payload length u32  CRC-32C of salt and payload u32  position u64  synced u64
//!           CRC-32C of salt and these u32  payload
//! ```
//!
//! All little endian. A segment has its size from the start, and may be one used before: what is
//! behind its last frame are zeros or old frames. The random salt in both checksums tells those
//! apart, and keeps users, whose bytes are in the payloads, from writing what looks like a frame.
//! `synced` is the last position that was known to be durable when the frame was written: it tells
//! a later reader that a bad frame before this one had been durable, and is no unfinished write.
//!
//! The log of the consensus looks alike (`ctfs-consensus/src/log/frame.rs`), with other numbers in
//! its frames and one checksum. Here the header has its own: behind a bad frame every byte may
//! begin a header, and a length that nobody vouches for would have to be followed each time.

use crate::{JournalId, Position, RECORD_BYTES_MAX, Record};

const MAGIC: [u8; 8] = *b"CTFSJRNL";
const VERSION: u32 = 1;
pub(crate) const SEGMENT_HEADER_BYTES: usize = 60;
pub(crate) const FRAME_HEADER_BYTES: usize = 28;

/// The first bytes of the segment of `id` whose first record is `first`.
pub(crate) fn segment_header(id: &JournalId, first: Position, salt: u32) -> [u8; SEGMENT_HEADER_BYTES] {
    let mut header = [0; SEGMENT_HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&salt.to_le_bytes());
    header[16..32].copy_from_slice(&id.cluster);
    header[32..40].copy_from_slice(&id.node.0.to_le_bytes());
    header[40..48].copy_from_slice(&id.incarnation.0.to_le_bytes());
    header[48..56].copy_from_slice(&first.0.to_le_bytes());
    let sum = crc32c::crc32c(&header[..56]);
    header[56..].copy_from_slice(&sum.to_le_bytes());
    header
}

/// The salt of the segment that starts with `bytes`, if it is whole and is that one of `id` whose
/// first record is `first`.
pub(crate) fn read_segment_header(bytes: &[u8], id: &JournalId, first: Position) -> Option<u32> {
    let header = bytes.get(..SEGMENT_HEADER_BYTES)?;
    let salt = u32_at(header, 12);
    (header == segment_header(id, first, salt)).then_some(salt)
}

/// A header that checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub position: Position,
    pub synced: Position,
    pub payload_bytes: usize,
    sum: u32,
}

/// How long the frame of a payload is.
pub(crate) fn frame_bytes(payload: &[u8]) -> usize {
    FRAME_HEADER_BYTES + payload.len()
}

/// Appends the frame of `record` to `buffer`.
pub(crate) fn write(buffer: &mut Vec<u8>, salt: u32, record: &Record, synced: Position) {
    let start = buffer.len();
    buffer.extend_from_slice(&(record.payload.len() as u32).to_le_bytes());
    buffer.extend_from_slice(&checksum(salt, &record.payload).to_le_bytes());
    buffer.extend_from_slice(&record.position.0.to_le_bytes());
    buffer.extend_from_slice(&synced.0.to_le_bytes());
    let sum = checksum(salt, &buffer[start..]);
    buffer.extend_from_slice(&sum.to_le_bytes());
    buffer.extend_from_slice(&record.payload);
}

/// The header at the start of `bytes`, or `None` when there is none that is intact.
fn read_header(salt: u32, bytes: &[u8]) -> Option<Header> {
    let bytes = bytes.get(..FRAME_HEADER_BYTES)?;
    let header = Header {
        position: Position(u64_at(bytes, 8)),
        synced: Position(u64_at(bytes, 16)),
        payload_bytes: u32_at(bytes, 0) as usize,
        sum: u32_at(bytes, 4),
    };
    let intact = header.payload_bytes <= RECORD_BYTES_MAX && checksum(salt, &bytes[..24]) == u32_at(bytes, 24);
    intact.then_some(header)
}

/// The frame at the start of `bytes`, header and payload, or `None` when what is there is no
/// whole, intact frame.
pub(crate) fn read(salt: u32, bytes: &[u8]) -> Option<(Header, &[u8])> {
    let header = read_header(salt, bytes)?;
    let payload = bytes.get(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + header.payload_bytes)?;
    (checksum(salt, payload) == header.sum).then_some((header, payload))
}

/// Whether an intact frame after the bad one at the start of `bytes` proves that `position` had
/// been durable. Looks at every byte, as a damaged length leads nowhere.
pub(crate) fn proves_synced(salt: u32, bytes: &[u8], position: Position) -> bool {
    // A frame cannot claim a position far beyond what a segment holds; this keeps checksums rare.
    let plausible = position.0..position.0.saturating_add(1 << 24);
    (0..bytes.len().saturating_sub(FRAME_HEADER_BYTES - 1)).any(|at| {
        plausible.contains(&u64_at(bytes, at + 8))
            && plausible.contains(&u64_at(bytes, at + 16))
            && read_header(salt, &bytes[at..]).is_some()
    })
}

/// Whether the frame of `position` begins here, whole or not.
pub(crate) fn begins(salt: u32, bytes: &[u8], position: Position) -> bool {
    read_header(salt, bytes).is_some_and(|header| header.position == position)
}

fn checksum(salt: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&salt.to_le_bytes()), bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("the caller checked the length"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("the caller checked the length"))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn record(position: u64) -> Record {
        Record { position: Position(position), payload: Bytes::from_static(b"payload") }
    }

    #[test]
    fn a_frame_reads_back_and_every_flipped_bit_is_noticed() {
        let mut bytes = Vec::new();
        write(&mut bytes, 9, &record(42), Position(41));
        let (header, payload) = read(9, &bytes).unwrap();
        assert_eq!((header.position, header.synced, payload), (Position(42), Position(41), &b"payload"[..]));
        assert_eq!(read(10, &bytes), None, "another salt");
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(9, &bad), None, "bit {bit}");
        }
        for cut in 0..bytes.len() {
            assert_eq!(read(9, &bytes[..cut]), None, "cut at {cut}");
        }
    }

    #[test]
    fn only_a_frame_of_a_later_write_proves_that_a_bad_one_was_durable() {
        let mut same_write = vec![0xaa; 33];
        write(&mut same_write, 9, &record(6), Position(4));
        assert!(!proves_synced(9, &same_write, Position(5)));
        let mut later_write = vec![0xaa; 33];
        write(&mut later_write, 9, &record(6), Position(5));
        assert!(proves_synced(9, &later_write, Position(5)));
    }
}
