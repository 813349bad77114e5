//! Crashes, faults and hostile bytes, against all of the crate.

mod copies;
pub(crate) mod disk;
mod journal;
mod killed;
mod segments;
mod stream;

use std::path::Path;

use bytes::Bytes;
use ctfs_types::{Incarnation, NodeId};

use crate::{Batch, JournalId, Position, Record};

pub(crate) const ROOT: &str = "/journals";

pub(crate) fn root() -> &'static Path {
    Path::new(ROOT)
}

pub(crate) fn id(incarnation: u64) -> JournalId {
    JournalId { cluster: [7; 16], node: NodeId(0x1122_3344), incarnation: Incarnation(incarnation) }
}

/// The payload that a test appends at `position`: told by the position alone, of some length below 300.
pub(crate) fn payload(position: u64) -> Bytes {
    let length = position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let mut bytes = position.to_le_bytes().to_vec();
    bytes.resize(8 + (length % 290) as usize, position as u8);
    Bytes::from(bytes)
}

pub(crate) fn record(position: u64) -> Record {
    Record { position: Position(position), payload: payload(position) }
}

pub(crate) fn batch(kept_from: u64, positions: std::ops::RangeInclusive<u64>) -> Batch {
    Batch::new(Position(kept_from), positions.map(record).collect())
}

/// All records from `from` on that `read` has: they must be those that were appended, without a
/// gap. Returns the last one.
pub(crate) fn check_records<E: std::fmt::Debug>(
    from: Position,
    mut read: impl FnMut(Position) -> Result<Vec<Record>, E>,
) -> Position {
    let mut next = from;
    loop {
        let records = read(next).expect("what is kept reads back");
        if records.is_empty() {
            return next.before();
        }
        for found in records {
            assert_eq!(found, record(next.0));
            next = next.next();
        }
    }
}
