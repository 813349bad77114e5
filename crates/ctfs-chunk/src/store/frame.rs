//! The bytes of a segment file, and how they are read back from a damaged one.
//!
//! ```text
//! segment header, 32 bytes        frame header, 56 bytes, then the payload
//!  0  magic "CTFS-SEG"             0  magic u32
//!  8  version u32                  4  kind u8 (1 data, 2 tombstone), codec u8, 2 zero bytes
//! 12  segment number u32           8  raw length u32
//! 16  salt u64                    12  payload length u32
//! 24  zero u32                    16  CRC-32C of the payload
//! 28  CRC-32C of the above        20  chunk id, 32 bytes
//!                                 52  CRC-32C of salt, offset in the file, and the above
//! ```
//!
//! All numbers are little endian. The salt is random per segment and enters every frame's
//! checksum together with the frame's offset: a file of CTFS may hold bytes that look like frames
//! (a backup of a chunk store, or an attack), and a scan that looks for the next frame behind a
//! damaged place must not believe them, least of all a tombstone.

use ctfs_types::{ChunkId, limits::CHUNK_BYTES_MAX};
use serde::{Deserialize, Serialize};

use crate::compress::{self, Codec};

pub const SEGMENT_HEADER_BYTES: usize = 32;
pub const FRAME_HEADER_BYTES: usize = 56;
pub const SEGMENT_VERSION: u32 = 1;
const SEGMENT_MAGIC: &[u8; 8] = b"CTFS-SEG";
const FRAME_MAGIC: [u8; 4] = [0xc7, 0xf5, 0xf4, 0x3a];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Data = 1,
    /// The chunk was deleted; frames of it that come earlier do not count.
    Tombstone = 2,
}

/// Why a file is not a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadSegment {
    Damaged,
    /// Whole, but written by another version of the program.
    Version(u32),
}

pub fn segment_header(number: u32, salt: u64) -> [u8; SEGMENT_HEADER_BYTES] {
    let mut header = [0; SEGMENT_HEADER_BYTES];
    header[..8].copy_from_slice(SEGMENT_MAGIC);
    header[8..12].copy_from_slice(&SEGMENT_VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&number.to_le_bytes());
    header[16..24].copy_from_slice(&salt.to_le_bytes());
    let sum = crc32c::crc32c(&header[..28]);
    header[28..].copy_from_slice(&sum.to_le_bytes());
    header
}

/// The salt of segment `number`, from its first bytes.
pub fn parse_segment_header(bytes: &[u8], number: u32) -> Result<u64, BadSegment> {
    let header = bytes.first_chunk::<SEGMENT_HEADER_BYTES>().ok_or(BadSegment::Damaged)?;
    if header[..8] != SEGMENT_MAGIC[..] || u32_at(header, 28) != crc32c::crc32c(&header[..28]) {
        return Err(BadSegment::Damaged);
    }
    match u32_at(header, 8) {
        SEGMENT_VERSION if u32_at(header, 12) == number => Ok(u64_at(header, 16)),
        SEGMENT_VERSION => Err(BadSegment::Damaged),
        other => Err(BadSegment::Version(other)),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    pub kind: Kind,
    pub codec: Codec,
    pub raw_len: u32,
    pub stored_len: u32,
    pub payload_crc: u32,
    pub id: ChunkId,
}

impl FrameHeader {
    fn encode(&self, salt: u64, offset: u64) -> [u8; FRAME_HEADER_BYTES] {
        let mut header = [0; FRAME_HEADER_BYTES];
        header[..4].copy_from_slice(&FRAME_MAGIC);
        header[4] = self.kind as u8;
        header[5] = self.codec as u8;
        header[8..12].copy_from_slice(&self.raw_len.to_le_bytes());
        header[12..16].copy_from_slice(&self.stored_len.to_le_bytes());
        header[16..20].copy_from_slice(&self.payload_crc.to_le_bytes());
        header[20..52].copy_from_slice(&self.id.0);
        let sum = header_sum(&header, salt, offset);
        header[52..].copy_from_slice(&sum.to_le_bytes());
        header
    }

    /// The header at `offset` of a segment with this salt, if there is one.
    pub fn decode(bytes: &[u8], salt: u64, offset: u64) -> Option<Self> {
        let header = bytes.first_chunk::<FRAME_HEADER_BYTES>()?;
        if header[..4] != FRAME_MAGIC || u32_at(header, 52) != header_sum(header, salt, offset) {
            return None;
        }
        let kind = match header[4] {
            1 => Kind::Data,
            2 => Kind::Tombstone,
            _ => return None,
        };
        let codec = Codec::from_byte(header[5])?;
        let id = ChunkId(*header[20..].first_chunk::<32>()?);
        let this =
            Self { kind, codec, raw_len: u32_at(header, 8), stored_len: u32_at(header, 12), payload_crc: u32_at(header, 16), id };
        let sane = this.raw_len as usize <= CHUNK_BYTES_MAX && this.stored_len <= this.raw_len;
        sane.then_some(this)
    }

    /// Bytes of the whole frame.
    pub fn frame_len(&self) -> usize {
        FRAME_HEADER_BYTES + self.stored_len as usize
    }
}

fn header_sum(header: &[u8; FRAME_HEADER_BYTES], salt: u64, offset: u64) -> u32 {
    let sum = crc32c::crc32c(&salt.to_le_bytes());
    let sum = crc32c::crc32c_append(sum, &offset.to_le_bytes());
    crc32c::crc32c_append(sum, &header[..52])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// A frame ready to be appended anywhere.
#[derive(Debug)]
pub struct Frame {
    pub header: FrameHeader,
    /// Room for the header, then the payload; the header depends on where the frame lands.
    bytes: Vec<u8>,
}

impl Frame {
    /// Compresses `raw` when it pays. At most [`CHUNK_BYTES_MAX`] bytes, checked by the caller.
    pub fn data(id: ChunkId, raw: &[u8]) -> Self {
        let (codec, payload) = compress::compress(raw);
        let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES + payload.len());
        bytes.resize(FRAME_HEADER_BYTES, 0);
        bytes.extend_from_slice(&payload);
        let header = FrameHeader {
            kind: Kind::Data,
            codec,
            raw_len: raw.len() as u32,
            stored_len: payload.len() as u32,
            payload_crc: crc32c::crc32c(&payload),
            id,
        };
        Self { header, bytes }
    }

    pub fn tombstone(id: ChunkId) -> Self {
        let header =
            FrameHeader { kind: Kind::Tombstone, codec: Codec::Raw, raw_len: 0, stored_len: 0, payload_crc: 0, id };
        Self { header, bytes: vec![0; FRAME_HEADER_BYTES] }
    }

    /// A frame as it was read from a segment; `None` when its checksums do not match.
    pub fn read(bytes: Vec<u8>, salt: u64, offset: u64, id: &ChunkId) -> Option<Self> {
        let header = FrameHeader::decode(&bytes, salt, offset)?;
        let whole = header.kind == Kind::Data
            && header.id == *id
            && header.frame_len() == bytes.len()
            && crc32c::crc32c(&bytes[FRAME_HEADER_BYTES..]) == header.payload_crc;
        whole.then_some(Self { header, bytes })
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes to write at `offset` of the segment with this salt.
    pub fn placed(&mut self, salt: u64, offset: u64) -> &[u8] {
        let header = self.header.encode(salt, offset);
        self.bytes[..FRAME_HEADER_BYTES].copy_from_slice(&header);
        &self.bytes
    }

    /// The chunk's raw bytes, only if they are the ones its name stands for.
    pub fn verified(&self) -> Option<bytes::Bytes> {
        let raw = compress::decompress(self.header.codec, &self.bytes[FRAME_HEADER_BYTES..], self.header.raw_len as usize)?;
        (*blake3::hash(&raw).as_bytes() == self.header.id.0).then_some(raw)
    }
}

/// What an index file and a scan say of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub id: ChunkId,
    pub offset: u32,
    /// Payload bytes.
    pub stored: u32,
    pub tombstone: bool,
}

impl Entry {
    pub fn of(header: &FrameHeader, offset: u32) -> Self {
        Self { id: header.id, offset, stored: header.stored_len, tombstone: header.kind == Kind::Tombstone }
    }

    pub fn frame_len(&self) -> u64 {
        FRAME_HEADER_BYTES as u64 + u64::from(self.stored)
    }
}

/// What is left of a segment's bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scan {
    pub entries: Vec<Entry>,
    /// One past the last whole frame: what follows was never acknowledged, or is damaged.
    pub end: usize,
    /// Frames whose header is whole and whose payload is not.
    pub damaged: Vec<ChunkId>,
    /// Damaged places before `end`, with or without a name.
    pub damages: u64,
    /// Damaged places behind `end`: in the last segment the usual trace of a crash.
    pub tail_damages: u64,
}

/// Finds the whole frames in `bytes`, a segment from its first byte.
pub fn scan(bytes: &[u8], salt: u64) -> Scan {
    let mut found = Scan { end: SEGMENT_HEADER_BYTES.min(bytes.len()), ..Scan::default() };
    let mut at = SEGMENT_HEADER_BYTES;
    while at < bytes.len() {
        let Some(header) = header_in(bytes, at, salt) else {
            found.tail_damages += 1;
            match (at + 1..bytes.len()).find(|&at| header_in(bytes, at, salt).is_some()) {
                Some(next) => at = next,
                None => break,
            }
            continue;
        };
        let next = at + header.frame_len();
        if crc32c::crc32c(&bytes[at + FRAME_HEADER_BYTES..next]) == header.payload_crc {
            found.entries.push(Entry::of(&header, at as u32));
            found.end = next;
            found.damages += std::mem::take(&mut found.tail_damages);
        } else {
            // The length is under the header's checksum, so the next frame is where it says.
            found.tail_damages += 1;
            found.damaged.push(header.id);
        }
        at = next;
    }
    found
}

/// The header at `at`, if its whole frame lies inside `bytes`.
fn header_in(bytes: &[u8], at: usize, salt: u64) -> Option<FrameHeader> {
    // The first byte turns away nearly every position of a search, before the slice is made.
    if bytes[at] != FRAME_MAGIC[0] {
        return None;
    }
    let header = FrameHeader::decode(&bytes[at..], salt, at as u64)?;
    (at + header.frame_len() <= bytes.len()).then_some(header)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id_of(raw: &[u8]) -> ChunkId {
        ChunkId(*blake3::hash(raw).as_bytes())
    }

    fn segment(chunks: &[&[u8]], salt: u64) -> Vec<u8> {
        let mut bytes = segment_header(7, salt).to_vec();
        for raw in chunks {
            let offset = bytes.len() as u64;
            bytes.extend_from_slice(Frame::data(id_of(raw), raw).placed(salt, offset));
        }
        bytes
    }

    #[test]
    fn a_scan_steps_over_a_damaged_header_and_over_a_damaged_payload() {
        let good = segment(&[b"one", b"two", b"three"], 9);
        let all = scan(&good, 9);
        assert_eq!((all.entries.len(), all.end, all.damages), (3, good.len(), 0));

        let mut header = good.clone();
        header[all.entries[1].offset as usize + 3] ^= 1;
        let found = scan(&header, 9);
        assert_eq!((found.entries, found.damages), (vec![all.entries[0], all.entries[2]], 1));

        let mut payload = good.clone();
        payload[all.entries[1].offset as usize + FRAME_HEADER_BYTES] ^= 1;
        let found = scan(&payload, 9);
        assert_eq!((found.entries, found.damaged), (vec![all.entries[0], all.entries[2]], vec![id_of(b"two")]));
    }

    #[test]
    fn a_frame_inside_a_chunk_is_not_believed_even_behind_damage() {
        let victim = id_of(b"victim");
        let hostile = Frame::tombstone(victim).placed(1, 0).repeat(20);
        let mut bytes = segment(&[&hostile, b"after"], 9);
        bytes[SEGMENT_HEADER_BYTES] ^= 1; // the header of the hostile chunk is lost
        let found = scan(&bytes, 9);
        assert_eq!(found.entries.iter().map(|e| e.id).collect::<Vec<_>>(), [id_of(b"after")]);
    }

    #[test]
    fn a_segment_of_another_version_is_told_from_a_damaged_one() {
        let mut header = segment_header(7, 9);
        assert_eq!(parse_segment_header(&header, 7), Ok(9));
        assert_eq!(parse_segment_header(&header, 8), Err(BadSegment::Damaged));
        header[8] = 2;
        assert_eq!(parse_segment_header(&header, 7), Err(BadSegment::Damaged));
        let sum = crc32c::crc32c(&header[..28]);
        header[28..].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(parse_segment_header(&header, 7), Err(BadSegment::Version(2)));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), salt: u64) {
            let _ = scan(&bytes, salt);
            let _ = parse_segment_header(&bytes, 1);
            let _ = FrameHeader::decode(&bytes, salt, 0);
        }

        #[test]
        fn a_flipped_bit_never_yields_wrong_bytes(raw in proptest::collection::vec(any::<u8>(), 1..200), bit: usize) {
            let mut bytes = Frame::data(id_of(&raw), &raw).placed(5, 32).to_vec();
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Frame::read(bytes, 5, 32, &id_of(&raw)).is_none());
        }
    }
}
