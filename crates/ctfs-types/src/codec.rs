//! The one codec: how values become bytes on disk and wire.
//!
//! A *record* is one version byte, then bincode 2 in its standard configuration (little endian,
//! variable-length integers). A *sealed* record is followed by the CRC-32C of all bytes before
//! it, little endian, for places where nothing else would notice a flipped bit.
//!
//! Decoding never panics, never allocates more than `limit`, and refuses trailing bytes, so a
//! record has exactly one spelling.

use std::cell::Cell;

use serde::{Serialize, de::DeserializeOwned};

/// Why bytes did not decode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("record is empty")]
    Empty,
    #[error("record has version {found}, this program reads version {expected}")]
    Version { found: u8, expected: u8 },
    #[error("record of {len} bytes is over the limit of {limit}")]
    TooLong { len: usize, limit: usize },
    #[error("checksum does not match")]
    Checksum,
    #[error("record does not decode: {0}")]
    Malformed(String),
}

/// Bincode reserves memory for a claimed length before it sees the bytes; this bounds the claim.
const DECODE_BYTES_MAX: usize = 64 << 20;

/// What a thread keeps to encode the next record in; a larger one is encoded in memory of its own.
const SCRATCH_BYTES_MAX: usize = 1 << 20;

thread_local! {
    /// Where records grow step by step, before each gets memory of its size.
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<DECODE_BYTES_MAX>()
}

/// Encodes `value` behind a version byte.
pub fn encode<T: Serialize>(version: u8, value: &T) -> Vec<u8> {
    SCRATCH.with(|scratch| {
        let mut bytes = scratch.take();
        bytes.clear();
        bytes.push(version);
        bincode::serde::encode_into_std_write(value, &mut bytes, bincode::config::standard())
            .expect("writing to memory does not fail, and our types have no unencodable values");
        let record = bytes.as_slice().to_vec();
        if bytes.capacity() <= SCRATCH_BYTES_MAX {
            scratch.set(bytes);
        }
        record
    })
}

/// Decodes a record of exactly this version, of at most `limit` bytes.
pub fn decode<T: DeserializeOwned>(version: u8, bytes: &[u8], limit: usize) -> Result<T, CodecError> {
    if bytes.len() > limit {
        return Err(CodecError::TooLong { len: bytes.len(), limit });
    }
    let (&found, body) = bytes.split_first().ok_or(CodecError::Empty)?;
    if found != version {
        return Err(CodecError::Version { found, expected: version });
    }
    let (value, used) = bincode::serde::decode_from_slice(body, config())
        .map_err(|error| CodecError::Malformed(error.to_string()))?;
    if used == body.len() { Ok(value) } else { Err(CodecError::Malformed(format!("{} bytes left over", body.len() - used))) }
}

/// Encodes `value` and appends a CRC-32C.
pub fn seal<T: Serialize>(version: u8, value: &T) -> Vec<u8> {
    let mut bytes = encode(version, value);
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Checks and decodes what [`seal`] made.
pub fn unseal<T: DeserializeOwned>(version: u8, bytes: &[u8], limit: usize) -> Result<T, CodecError> {
    let split = bytes.len().checked_sub(4).ok_or(CodecError::Empty)?;
    let (record, sum) = bytes.split_at(split);
    if crc32c::crc32c(record).to_le_bytes() != sum {
        return Err(CodecError::Checksum);
    }
    decode(version, record, limit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::FileName;

    #[test]
    fn a_flipped_bit_in_a_sealed_record_is_noticed() {
        let sealed = seal(1, &(7u64, "text".to_owned()));
        for bit in 0..sealed.len() * 8 {
            let mut bad = sealed.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(unseal::<(u64, String)>(1, &bad, 1024).is_err(), "bit {bit}");
        }
        assert_eq!(unseal(1, &sealed, 1024), Ok((7u64, "text".to_owned())));
    }

    #[test]
    fn the_encoded_bytes_are_those_of_version_1() {
        let value = (250u8, 250u64, 251u16, 300u32, 1u64 << 40, -3i64, Some("ab".to_owned()), vec![true, false], [7u8; 2]);
        let bytes = [
            1, 250, 250, 251, 251, 0, 251, 44, 1, 253, 0, 0, 0, 0, 0, 1, 0, 0, 5, 1, 2, b'a', b'b', 2, 1, 0, 7, 7,
        ];
        assert_eq!(encode(1, &value), bytes);
        assert_eq!(seal(1, &value), [&bytes[..], &[206, 120, 87, 0]].concat());
    }

    #[test]
    fn a_claimed_length_does_not_allocate() {
        let mut bytes = vec![1, 253];
        bytes.extend_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(decode::<Vec<u8>>(1, &bytes, 1024), Err(CodecError::Malformed(_))));
    }

    #[test]
    fn a_bad_name_on_the_wire_does_not_decode() {
        let bytes = encode(1, &b"a/b".to_vec());
        assert!(decode::<FileName>(1, &bytes, 1024).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<(FileName, Vec<String>, Option<u64>)>(1, &bytes, 4096);
            let _ = unseal::<Vec<(u64, FileName)>>(1, &bytes, 4096);
        }
    }
}
