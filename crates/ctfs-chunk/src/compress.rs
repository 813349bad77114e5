//! Whether compression pays, decided the same way for the disk and for the wire.

use std::borrow::Cow;

use bytes::Bytes;

/// How stored or sent bytes were made from the raw ones. The numbers are on disk and on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Codec {
    Raw = 0,
    /// One LZ4 block, without a size in front.
    Lz4 = 1,
}

impl Codec {
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Raw),
            1 => Some(Self::Lz4),
            _ => None,
        }
    }
}

/// The first bytes decide: a photo or an archive costs 64 KiB of work instead of a whole chunk.
const SAMPLE_BYTES: usize = 64 << 10;

/// LZ4 cannot grow data by more than this factor, so a claimed length beyond it is a lie that
/// must not cost memory (LZ4 block format: one byte of length stands for at most 255 bytes).
const LZ4_GROWTH_MAX: usize = 255;

/// Compresses when the sample shrinks by an eighth or more and the whole gets smaller.
pub(crate) fn compress(raw: &[u8]) -> (Codec, Cow<'_, [u8]>) {
    let sample = &raw[..raw.len().min(SAMPLE_BYTES)];
    let packed = lz4_flex::block::compress(sample);
    if packed.len() > sample.len() - sample.len() / 8 {
        return (Codec::Raw, Cow::Borrowed(raw));
    }
    let packed = if sample.len() == raw.len() { packed } else { lz4_flex::block::compress(raw) };
    if packed.len() < raw.len() { (Codec::Lz4, Cow::Owned(packed)) } else { (Codec::Raw, Cow::Borrowed(raw)) }
}

/// Undoes [`compress`]; `None` when the bytes do not decode to exactly `raw_len` bytes.
///
/// The caller has checked `raw_len` against its own limit.
pub(crate) fn decompress(codec: Codec, stored: &[u8], raw_len: usize) -> Option<Bytes> {
    match codec {
        Codec::Raw => (stored.len() == raw_len).then(|| Bytes::copy_from_slice(stored)),
        Codec::Lz4 => {
            if raw_len > stored.len().saturating_mul(LZ4_GROWTH_MAX) {
                return None;
            }
            let mut raw = vec![0; raw_len];
            let len = lz4_flex::block::decompress_into(stored, &mut raw).ok()?;
            (len == raw_len).then(|| Bytes::from(raw))
        }
    }
}
