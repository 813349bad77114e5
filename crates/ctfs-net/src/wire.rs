//! The bytes on a stream: pure functions between slices and headers.
//!
//! Every stream opens with five bytes: `C T`, version 1, a kind, a class.
//!
//! - kind 0, *calls*: frames both ways until the stream ends. A frame is its length after this
//!   field (u32), a kind (u8: 0 request, 1 reply, 2 refused, 3 busy), the call's number (u64), the
//!   service (u16) and the payload. The class is the high byte of every service on the stream.
//! - kind 1, *bulk*: service (u16), header length (u32), body length (u32), header, body, end. The
//!   answer has a status (u8: 0 done, 1 refused, 2 busy) in place of the service.
//! - kind 2, *hello*: nothing more; the answer is the same five bytes. It proves to the dialler
//!   that it was let in and that both sides read this version.
//! - kind 3, *join*: length (u32) and request; the answer is a status (u8), length and reply.
//!
//! Integers are little endian. Lengths are checked against the limits before anything is read.

/// Payload of a small call or its reply.
pub const CALL_BYTES_MAX: usize = 2 << 20;
/// Header of a bulk transfer.
pub const BULK_HEADER_BYTES_MAX: usize = 64 << 10;
/// Body of a bulk transfer: the largest chunk and a little around it.
pub const BULK_BODY_BYTES_MAX: usize = (8 << 20) + (1 << 10);
/// Request of a stranger.
pub const JOIN_BYTES_MAX: usize = 16 << 10;
/// Reply to a stranger.
pub const JOIN_REPLY_BYTES_MAX: usize = 1 << 20;
/// Longest text of a refusal; longer ones are cut.
pub(crate) const REFUSAL_BYTES_MAX: usize = 4 << 10;

const MAGIC: [u8; 2] = *b"CT";
const VERSION: u8 = 1;

/// Why bytes from a peer make no sense. The connection they came over is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("stream does not begin as ours do")]
    Magic,
    #[error("stream has version {0}, this program reads version {VERSION}")]
    Version(u8),
    #[error("unknown kind {0}")]
    Kind(u8),
    #[error("length {0} is out of range")]
    Length(u64),
    #[error("service {service:#06x} on a stream of class {class:#04x}")]
    Class { service: u16, class: u8 },
    #[error("the stream ends in the middle")]
    Truncated,
    #[error("bytes after the end of the message")]
    Trailing,
}

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamKind {
    Calls { class: u8 },
    Bulk,
    Hello,
    Join,
}

pub(crate) const PREAMBLE_BYTES: usize = 5;

pub(crate) fn preamble(kind: StreamKind) -> [u8; PREAMBLE_BYTES] {
    let (kind, class) = match kind {
        StreamKind::Calls { class } => (0, class),
        StreamKind::Bulk => (1, 0),
        StreamKind::Hello => (2, 0),
        StreamKind::Join => (3, 0),
    };
    [MAGIC[0], MAGIC[1], VERSION, kind, class]
}

pub(crate) fn decode_preamble(bytes: [u8; PREAMBLE_BYTES]) -> Result<StreamKind, WireError> {
    let [m0, m1, version, kind, class] = bytes;
    if [m0, m1] != MAGIC {
        return Err(WireError::Magic);
    }
    if version != VERSION {
        return Err(WireError::Version(version));
    }
    match (kind, class) {
        (0, class) => Ok(StreamKind::Calls { class }),
        (1, 0) => Ok(StreamKind::Bulk),
        (2, 0) => Ok(StreamKind::Hello),
        (3, 0) => Ok(StreamKind::Join),
        _ => Err(WireError::Kind(kind)),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FrameKind {
    Request,
    Reply,
    Refused,
    Busy,
}

/// Everything of a frame but its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub kind: FrameKind,
    pub call: u64,
    pub service: u16,
}

pub(crate) const FRAME_HEADER_BYTES: usize = 15;
const FRAME_FIELDS_BYTES: usize = FRAME_HEADER_BYTES - 4;

/// The header of a frame with a payload of `len` bytes, at most [`CALL_BYTES_MAX`].
pub(crate) fn frame_header(header: FrameHeader, len: usize) -> [u8; FRAME_HEADER_BYTES] {
    debug_assert!(len <= CALL_BYTES_MAX);
    let mut bytes = [0; FRAME_HEADER_BYTES];
    bytes[..4].copy_from_slice(&((FRAME_FIELDS_BYTES + len) as u32).to_le_bytes());
    bytes[4] = match header.kind {
        FrameKind::Request => 0,
        FrameKind::Reply => 1,
        FrameKind::Refused => 2,
        FrameKind::Busy => 3,
    };
    bytes[5..13].copy_from_slice(&header.call.to_le_bytes());
    bytes[13..].copy_from_slice(&header.service.to_le_bytes());
    bytes
}

/// Looks at the beginning of `bytes` for a frame: its header and its length with the header.
/// `None` means more bytes are needed. A length out of range is refused as soon as it is seen.
pub(crate) fn decode_frame(bytes: &[u8]) -> Result<Option<(FrameHeader, usize)>, WireError> {
    let Some((len, rest)) = bytes.split_first_chunk() else { return Ok(None) };
    let len = u32::from_le_bytes(*len) as usize;
    if !(FRAME_FIELDS_BYTES..=FRAME_FIELDS_BYTES + CALL_BYTES_MAX).contains(&len) {
        return Err(WireError::Length(len as u64));
    }
    let Some((&kind, rest)) = rest.split_first() else { return Ok(None) };
    let kind = match kind {
        0 => FrameKind::Request,
        1 => FrameKind::Reply,
        2 => FrameKind::Refused,
        3 => FrameKind::Busy,
        other => return Err(WireError::Kind(other)),
    };
    let Some((call, rest)) = rest.split_first_chunk() else { return Ok(None) };
    let Some((service, payload)) = rest.split_first_chunk() else { return Ok(None) };
    if payload.len() < len - FRAME_FIELDS_BYTES {
        return Ok(None);
    }
    let header = FrameHeader { kind, call: u64::from_le_bytes(*call), service: u16::from_le_bytes(*service) };
    Ok(Some((header, 4 + len)))
}

/// Lengths of the two parts of a bulk transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BulkLengths {
    pub header: usize,
    pub body: usize,
}

/// How a bulk transfer or a join was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Done,
    Refused,
    Busy,
}

fn status(byte: u8) -> Result<Status, WireError> {
    match byte {
        0 => Ok(Status::Done),
        1 => Ok(Status::Refused),
        2 => Ok(Status::Busy),
        other => Err(WireError::Kind(other)),
    }
}

pub(crate) const BULK_REQUEST_BYTES: usize = 10;
pub(crate) const BULK_REPLY_BYTES: usize = 9;

fn lengths(lengths: BulkLengths) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&(lengths.header as u32).to_le_bytes());
    bytes[4..].copy_from_slice(&(lengths.body as u32).to_le_bytes());
    bytes
}

fn decode_lengths(bytes: [u8; 8]) -> Result<BulkLengths, WireError> {
    let [h0, h1, h2, h3, b0, b1, b2, b3] = bytes;
    let header = u32::from_le_bytes([h0, h1, h2, h3]) as usize;
    let body = u32::from_le_bytes([b0, b1, b2, b3]) as usize;
    if header > BULK_HEADER_BYTES_MAX {
        return Err(WireError::Length(header as u64));
    }
    if body > BULK_BODY_BYTES_MAX {
        return Err(WireError::Length(body as u64));
    }
    Ok(BulkLengths { header, body })
}

pub(crate) fn bulk_request(service: u16, len: BulkLengths) -> [u8; BULK_REQUEST_BYTES] {
    let mut bytes = [0; BULK_REQUEST_BYTES];
    bytes[..2].copy_from_slice(&service.to_le_bytes());
    bytes[2..].copy_from_slice(&lengths(len));
    bytes
}

pub(crate) fn decode_bulk_request(bytes: [u8; BULK_REQUEST_BYTES]) -> Result<(u16, BulkLengths), WireError> {
    let [s0, s1, rest @ ..] = bytes;
    Ok((u16::from_le_bytes([s0, s1]), decode_lengths(rest)?))
}

pub(crate) fn bulk_reply(status: Status, len: BulkLengths) -> [u8; BULK_REPLY_BYTES] {
    let mut bytes = [0; BULK_REPLY_BYTES];
    bytes[0] = status as u8;
    bytes[1..].copy_from_slice(&lengths(len));
    bytes
}

pub(crate) fn decode_bulk_reply(bytes: [u8; BULK_REPLY_BYTES]) -> Result<(Status, BulkLengths), WireError> {
    let [code, rest @ ..] = bytes;
    Ok((status(code)?, decode_lengths(rest)?))
}

pub(crate) const JOIN_REQUEST_BYTES: usize = 4;
pub(crate) const JOIN_REPLY_BYTES: usize = 5;

pub(crate) fn decode_join_request(bytes: [u8; JOIN_REQUEST_BYTES]) -> Result<usize, WireError> {
    let len = u32::from_le_bytes(bytes) as usize;
    if len > JOIN_BYTES_MAX { Err(WireError::Length(len as u64)) } else { Ok(len) }
}

pub(crate) fn join_reply(status: Status, len: usize) -> [u8; JOIN_REPLY_BYTES] {
    let [a, b, c, d] = (len as u32).to_le_bytes();
    [status as u8, a, b, c, d]
}

pub(crate) fn decode_join_reply(bytes: [u8; JOIN_REPLY_BYTES]) -> Result<(Status, usize), WireError> {
    let [code, len @ ..] = bytes;
    let len = u32::from_le_bytes(len) as usize;
    if len > JOIN_REPLY_BYTES_MAX { Err(WireError::Length(len as u64)) } else { Ok((status(code)?, len)) }
}

/// A refusal as it travels: cut to its limit at a character.
pub(crate) fn refusal(mut text: String) -> Vec<u8> {
    if text.len() > REFUSAL_BYTES_MAX {
        let cut = (0..=REFUSAL_BYTES_MAX).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(cut);
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_length_of_four_gigabytes_is_refused_from_its_first_four_bytes() {
        assert_eq!(decode_frame(&[0xff; 4]), Err(WireError::Length(u64::from(u32::MAX))));
        assert_eq!(decode_frame(&[0xff; 3]), Ok(None));
        assert_eq!(decode_frame(&10u32.to_le_bytes()), Err(WireError::Length(10)));
    }

    #[test]
    fn the_bytes_of_version_one_stay_what_they_are() {
        assert_eq!(preamble(StreamKind::Calls { class: 3 }), [b'C', b'T', 1, 0, 3]);
        let header = FrameHeader { kind: FrameKind::Reply, call: 0x0102, service: 0x0301 };
        assert_eq!(frame_header(header, 5), [16, 0, 0, 0, 1, 2, 1, 0, 0, 0, 0, 0, 0, 1, 3]);
        let len = BulkLengths { header: 1, body: 2 };
        assert_eq!(bulk_request(0x0401, len), [1, 4, 1, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(bulk_reply(Status::Busy, len), [2, 1, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(join_reply(Status::Refused, 3), [1, 3, 0, 0, 0]);
    }

    #[test]
    fn an_unknown_version_is_named() {
        assert_eq!(decode_preamble([b'C', b'T', 9, 0, 0]), Err(WireError::Version(9)));
        assert_eq!(decode_preamble([b'G', b'E', b'T', b' ', b'/']), Err(WireError::Magic));
    }

    #[test]
    fn a_long_refusal_is_cut_at_a_character() {
        let cut = refusal("é".repeat(REFUSAL_BYTES_MAX));
        assert!(cut.len() <= REFUSAL_BYTES_MAX && String::from_utf8(cut).is_ok());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), head: [u8; 10]) {
            if let Ok(Some((_, len))) = decode_frame(&bytes) {
                prop_assert!(len <= bytes.len());
            }
            let [a, b, c, d, e, ..] = head;
            let _ = decode_preamble([a, b, c, d, e]);
            let _ = decode_join_reply([a, b, c, d, e]);
            let _ = decode_join_request([a, b, c, d]);
            let _ = decode_bulk_request(head);
            let [rest @ .., _] = head;
            let _ = decode_bulk_reply(rest);
        }

        #[test]
        fn frames_read_back_and_no_prefix_is_a_frame(call: u64, service: u16, payload in prop::collection::vec(any::<u8>(), 0..40), kind in 0u8..4) {
            let kind = [FrameKind::Request, FrameKind::Reply, FrameKind::Refused, FrameKind::Busy][usize::from(kind)];
            let header = FrameHeader { kind, call, service };
            let mut bytes = frame_header(header, payload.len()).to_vec();
            bytes.extend_from_slice(&payload);
            prop_assert_eq!(decode_frame(&bytes), Ok(Some((header, bytes.len()))));
            for len in 0..bytes.len() {
                prop_assert_eq!(decode_frame(&bytes[..len]), Ok(None));
            }
        }
    }
}
