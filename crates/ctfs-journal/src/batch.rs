//! What travels from a journal to its copy, and back.
//!
//! ```text
//! batch:   version u8 = 1  kept from u64  first u64  count u32, then count times:  length u32  payload
//! answer:  a record, version 1, of the position or the refusal
//! ```
//!
//! Written by hand, little endian: a decoded payload is a slice of what arrived, and nothing is
//! reserved for what is only claimed.

use bytes::{Buf, Bytes};
use ctfs_types::codec::{self, CodecError};

use crate::{Position, RECORD_BYTES_MAX, Record, copies::Refusal};

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 21;
/// Longest batch as it travels: what one transfer of the network takes. A stream sends half of it.
pub const BATCH_BYTES_MAX: usize = 8 << 20;
/// Most records of a batch: with more, what is kept for each weighs more than what they carry.
pub const BATCH_RECORDS_MAX: usize = 1 << 16;
/// Longest answer.
const ANSWER_BYTES_MAX: usize = 4096;

/// Why bytes are no batch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("batch has version {found}, this program reads version {VERSION}")]
    Version { found: u8 },
    #[error("batch ends before it should")]
    Short,
    #[error("batch has {0} bytes left over")]
    LeftOver(usize),
    #[error("batch is longer than one gets, or a record of it is")]
    TooLong,
}

/// Records that follow each other, for a copy. Without any it asks what the copy has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The first record that is still needed: a copy drops those before it, and a new one begins here.
    pub kept_from: Position,
    /// The position of the first record.
    pub first: Position,
    pub payloads: Vec<Bytes>,
}

impl Batch {
    /// `records` follow each other.
    pub fn new(kept_from: Position, records: Vec<Record>) -> Self {
        let first = records.first().map_or(Position::NONE, |record| record.position);
        Self { kept_from, first, payloads: records.into_iter().map(|record| record.payload).collect() }
    }

    /// The records with their positions; `None` when positions or sizes cannot be.
    pub(crate) fn records(self) -> Option<Vec<Record>> {
        let count = self.payloads.len() as u64;
        let too_long = self.payloads.iter().any(|payload| payload.len() > RECORD_BYTES_MAX);
        // Past the half nothing that counts up by one ever gets.
        if too_long || self.kept_from.0 > u64::MAX / 2 || self.first.0 > u64::MAX / 2 || (count > 0 && self.first.0 == 0) {
            return None;
        }
        let positions = (self.first.0..).map(Position);
        Some(positions.zip(self.payloads).map(|(position, payload)| Record { position, payload }).collect())
    }

    pub fn encode(&self) -> Vec<u8> {
        let bytes: usize = self.payloads.iter().map(|payload| 4 + payload.len()).sum();
        let mut buffer = Vec::with_capacity(HEADER_BYTES + bytes);
        buffer.push(VERSION);
        buffer.extend_from_slice(&self.kept_from.0.to_le_bytes());
        buffer.extend_from_slice(&self.first.0.to_le_bytes());
        buffer.extend_from_slice(&(self.payloads.len() as u32).to_le_bytes());
        for payload in &self.payloads {
            buffer.extend_from_slice(&(payload.len() as u32).to_le_bytes());
            buffer.extend_from_slice(payload);
        }
        buffer
    }

    pub fn decode(mut bytes: Bytes) -> Result<Self, BatchError> {
        if bytes.len() > BATCH_BYTES_MAX {
            return Err(BatchError::TooLong);
        }
        match bytes.first() {
            Some(&VERSION) if bytes.len() >= HEADER_BYTES => bytes.advance(1),
            Some(&VERSION) | None => return Err(BatchError::Short),
            Some(&found) => return Err(BatchError::Version { found }),
        }
        let (kept_from, first) = (Position(bytes.get_u64_le()), Position(bytes.get_u64_le()));
        let count = bytes.get_u32_le() as usize;
        if count > BATCH_RECORDS_MAX {
            return Err(BatchError::TooLong);
        }
        if bytes.len() < count * 4 {
            return Err(BatchError::Short);
        }
        let mut payloads = Vec::with_capacity(count);
        for _ in 0..count {
            let length = bytes.try_get_u32_le().map_err(|_| BatchError::Short)? as usize;
            if length > RECORD_BYTES_MAX {
                return Err(BatchError::TooLong);
            }
            if length > bytes.len() {
                return Err(BatchError::Short);
            }
            payloads.push(bytes.split_to(length));
        }
        if bytes.is_empty() { Ok(Self { kept_from, first, payloads }) } else { Err(BatchError::LeftOver(bytes.len())) }
    }
}

/// The answer of a copy, as it travels.
pub fn encode_answer(answer: &Result<Position, Refusal>) -> Vec<u8> {
    codec::encode(VERSION, answer)
}

pub fn decode_answer(bytes: &[u8]) -> Result<Result<Position, Refusal>, CodecError> {
    codec::decode(VERSION, bytes, ANSWER_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn a_batch_reads_back_and_is_refused_when_cut_or_longer(
            kept in any::<u64>(), first in any::<u64>(), payloads in vec(vec(any::<u8>(), 0..20), 0..20), cut in any::<prop::sample::Index>()
        ) {
            let payloads = payloads.into_iter().map(Bytes::from).collect();
            let batch = Batch { kept_from: Position(kept), first: Position(first), payloads };
            let bytes = batch.encode();
            prop_assert_eq!(Batch::decode(bytes.clone().into()), Ok(batch));
            prop_assert!(Batch::decode(Bytes::copy_from_slice(&bytes[..cut.index(bytes.len())])).is_err());
            prop_assert!(Batch::decode([&bytes[..], &[0]].concat().into()).is_err());
        }

        #[test]
        fn hostile_bytes_never_panic_nor_reserve_what_they_claim(mut bytes in vec(any::<u8>(), 0..200), version in any::<bool>()) {
            if version && !bytes.is_empty() {
                bytes[0] = VERSION;
            }
            if let Ok(batch) = Batch::decode(bytes.clone().into()) {
                prop_assert!(batch.payloads.len() * 4 <= bytes.len());
                let _ = batch.records();
            }
            let _ = decode_answer(&bytes);
        }
    }

    #[test]
    fn a_claimed_count_does_not_allocate() {
        let mut bytes = Batch { kept_from: Position(1), first: Position(1), payloads: Vec::new() }.encode();
        bytes[17..21].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Batch::decode(bytes.into()), Err(BatchError::TooLong));
    }
}
