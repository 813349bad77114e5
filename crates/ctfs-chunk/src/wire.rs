//! Chunk bytes as they cross the network: `codec u8, raw length u32 little endian, payload`.
//!
//! The framing carries no checksum: whoever unpacks a chunk compares it with its BLAKE3 name.

use bytes::Bytes;

use crate::compress::{self, Codec};

const HEADER_BYTES: usize = 5;

/// Why received bytes are not a packed chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("a packed chunk has at least {HEADER_BYTES} bytes")]
    Short,
    #[error("codec {0} is unknown")]
    Codec(u8),
    #[error("a chunk of {len} bytes is over the limit of {limit}")]
    TooLong { len: usize, limit: usize },
    #[error("the packed bytes do not decode to the length they claim")]
    Malformed,
}

/// Packs bytes for sending, compressed when that pays.
pub fn pack(raw: &[u8]) -> Vec<u8> {
    let (codec, body) = compress::compress(raw);
    let mut packed = Vec::with_capacity(HEADER_BYTES + body.len());
    packed.push(codec as u8);
    packed.extend_from_slice(&(raw.len() as u32).to_le_bytes());
    packed.extend_from_slice(&body);
    packed
}

/// Unpacks what [`pack`] made; allocates at most `limit` bytes, whatever the sender claims.
pub fn unpack(packed: &[u8], limit: usize) -> Result<Bytes, WireError> {
    let (&codec, rest) = packed.split_first().ok_or(WireError::Short)?;
    let (len, body) = rest.split_first_chunk::<4>().ok_or(WireError::Short)?;
    let codec = Codec::from_byte(codec).ok_or(WireError::Codec(codec))?;
    let len = u32::from_le_bytes(*len) as usize;
    if len > limit {
        return Err(WireError::TooLong { len, limit });
    }
    compress::decompress(codec, body, len).ok_or(WireError::Malformed)
}

#[cfg(test)]
mod tests {
    use ctfs_types::limits::CHUNK_BYTES_MAX;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_travels_compressed_and_noise_does_not() {
        let text = b"<?php echo 'hello world'; ?>\n".repeat(10_000);
        assert!(pack(&text).len() < text.len() / 4);
        let mut noise = vec![0; 300_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        assert_eq!(pack(&noise).len(), noise.len() + HEADER_BYTES);
        for raw in [&text[..], &noise, b"", b"x"] {
            assert_eq!(unpack(&pack(raw), CHUNK_BYTES_MAX).unwrap(), raw);
        }
    }

    #[test]
    fn a_claimed_length_over_the_limit_is_refused_before_memory_is_taken() {
        let mut packed = vec![Codec::Lz4 as u8];
        packed.extend_from_slice(&u32::MAX.to_le_bytes());
        packed.extend_from_slice(&[0; 64]);
        assert!(matches!(unpack(&packed, 1 << 20), Err(WireError::TooLong { .. })));
        packed[1..5].copy_from_slice(&(1u32 << 20).to_le_bytes());
        assert_eq!(unpack(&packed, 1 << 20), Err(WireError::Malformed));
    }

    proptest! {
        #[test]
        fn what_was_packed_unpacks(runs in proptest::collection::vec((any::<u8>(), 1usize..3000), 0..40)) {
            let raw: Vec<u8> = runs.iter().flat_map(|&(byte, len)| std::iter::repeat_n(byte, len)).collect();
            prop_assert_eq!(unpack(&pack(&raw), CHUNK_BYTES_MAX).unwrap(), raw);
        }

        #[test]
        fn hostile_bytes_never_panic_and_never_exceed_the_limit(
            codec in 0u8..3, len in 0u32..100_000, body in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut packed = vec![codec];
            packed.extend_from_slice(&len.to_le_bytes());
            packed.extend_from_slice(&body);
            if let Ok(raw) = unpack(&packed, 50_000) {
                prop_assert!(raw.len() <= 50_000);
            }
            let _ = unpack(&body, 50_000);
        }
    }
}
