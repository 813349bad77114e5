//! How one entry lies in a segment file.
//!
//! ```text
//! segment:  "CTFSLOG\n"  version u32  first index u64  salt u32  CRC-32C of these u32
//! frame:    length u32  CRC-32C u32  index u64  synced u64  term u64  leader u64  payload
//! ```
//!
//! All little endian. The checksum of a frame covers everything in it but itself, and begins with
//! the segment's salt: payloads carry bytes of users, who must not be able to write what looks
//! like a frame. `synced` is one past the last index that was known to be durable when the frame
//! was written: it tells a later reader that a bad frame before this one had been acknowledged,
//! and is no unfinished write.

use openraft::CommittedLeaderId;

use crate::raft_types::RaftLogId;

const MAGIC: [u8; 8] = *b"CTFSLOG\n";
const VERSION: u32 = 1;
pub(super) const SEGMENT_HEADER_BYTES: usize = 28;
pub(super) const FRAME_HEADER_BYTES: usize = 40;
/// Largest payload. Proposers pack 64 KiB, one command may have 1 MiB; a damaged length must not
/// make a reader look further than this.
pub(super) const PAYLOAD_BYTES_MAX: usize = 16 << 20;

/// The first bytes of a segment whose first entry is `first`.
pub(super) fn segment_header(first: u64, salt: u32) -> [u8; SEGMENT_HEADER_BYTES] {
    let mut header = [0; SEGMENT_HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..20].copy_from_slice(&first.to_le_bytes());
    header[20..24].copy_from_slice(&salt.to_le_bytes());
    let sum = crc32c::crc32c(&header[..24]);
    header[24..].copy_from_slice(&sum.to_le_bytes());
    header
}

/// The salt of the segment that starts with `bytes` and shall begin with entry `first`; `None`
/// when its header is incomplete or damaged.
pub(super) fn read_segment_header(bytes: &[u8], first: u64) -> Option<u32> {
    let header = bytes.get(..SEGMENT_HEADER_BYTES)?;
    let salt = u32_at(header, 20);
    (header == segment_header(first, salt)).then_some(salt)
}

/// A frame that checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub id: RaftLogId,
    pub synced: u64,
    pub payload_bytes: usize,
}

impl Frame {
    pub fn bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.payload_bytes
    }
}

/// Appends the frame of one entry to `buffer`.
pub(super) fn write(buffer: &mut Vec<u8>, salt: u32, id: RaftLogId, synced: u64, payload: &[u8]) {
    let start = buffer.len();
    buffer.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    buffer.extend_from_slice(&[0; 4]);
    for number in [id.index, synced, id.leader_id.term, id.leader_id.node_id] {
        buffer.extend_from_slice(&number.to_le_bytes());
    }
    buffer.extend_from_slice(payload);
    let sum = checksum(salt, &buffer[start..]);
    buffer[start + 4..start + 8].copy_from_slice(&sum.to_le_bytes());
}

/// The frame at the start of `bytes`, or `None` when what is there is no whole, intact frame.
pub(super) fn read(salt: u32, bytes: &[u8]) -> Option<Frame> {
    let header = bytes.get(..FRAME_HEADER_BYTES)?;
    let payload_bytes = u32_at(header, 0) as usize;
    if payload_bytes > PAYLOAD_BYTES_MAX {
        return None;
    }
    let frame = bytes.get(..FRAME_HEADER_BYTES + payload_bytes)?;
    if checksum(salt, frame) != u32_at(header, 4) {
        return None;
    }
    let leader = CommittedLeaderId::new(u64_at(header, 24), u64_at(header, 32));
    Some(Frame { id: RaftLogId::new(leader, u64_at(header, 8)), synced: u64_at(header, 16), payload_bytes })
}

/// Whether an intact frame after the bad one at the start of `bytes` proves that entry `index`
/// had been durable. Looks at every byte, as a damaged length leads nowhere.
pub(super) fn proves_synced(salt: u32, bytes: &[u8], index: u64) -> bool {
    // A frame cannot claim an index far beyond what a segment holds; this keeps checksums rare.
    let plausible = index..index.saturating_add(1 << 24);
    let mut at = 0;
    while let Some(header) = bytes.get(at..at + FRAME_HEADER_BYTES) {
        let length = u32_at(header, 0) as usize;
        if length <= PAYLOAD_BYTES_MAX
            && plausible.contains(&u64_at(header, 8))
            && let Some(frame) = read(salt, &bytes[at..])
        {
            if frame.synced > index {
                return true;
            }
            at += frame.bytes();
            continue;
        }
        at += 1;
    }
    false
}

fn checksum(salt: u32, frame: &[u8]) -> u32 {
    let sum = crc32c::crc32c_append(crc32c::crc32c(&salt.to_le_bytes()), &frame[..4]);
    crc32c::crc32c_append(sum, &frame[8..])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("the caller checked the length"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("the caller checked the length"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_reads_back_and_every_flipped_bit_is_noticed() {
        let id = RaftLogId::new(CommittedLeaderId::new(3, 7), 42);
        let mut bytes = Vec::new();
        write(&mut bytes, 9, id, 41, b"payload");
        assert_eq!(read(9, &bytes), Some(Frame { id, synced: 41, payload_bytes: 7 }));
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
        let id = |index| RaftLogId::new(CommittedLeaderId::new(1, 1), index);
        let mut same_write = vec![0xaa; 33];
        write(&mut same_write, 9, id(6), 5, b"x");
        assert!(!proves_synced(9, &same_write, 5));
        let mut later_write = vec![0xaa; 33];
        write(&mut later_write, 9, id(6), 6, b"x");
        assert!(proves_synced(9, &later_write, 5));
    }
}
