//! What a record of the journal says.
//!
//! ```text
//! version u8 = 3  kind u8
//! kind 1: a command, as the codec writes it, under its own version byte
//! kind 2: bytes of a file: inode u64  seconds i64  nanoseconds u32  drops privileges u8  pieces u32,
//!         for each piece: offset u64  length u32, then the bytes of all pieces
//! ```
//!
//! Little endian. The second is written by hand, because it holds what programs wrote.

use bytes::Buf;
use ctfs_meta::Command;
use ctfs_types::{FileBytes, Ino, Timestamp, codec::{self, CodecError}};

use crate::settings::COMMAND_BYTES_MAX;

const VERSION: u8 = 3;
const COMMAND: u8 = 1;
const BYTES: u8 = 2;
const PIECE_HEADER_BYTES: usize = 12;

/// One record of a journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    Command(Command),
    Bytes(FileBytes),
}

/// Why bytes are no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("record has version {0}, this program reads version {VERSION}")]
    Version(u8),
    #[error("record is of unknown kind {0}")]
    Kind(u8),
    #[error("record ends before it should, or does not end where it should")]
    Length,
    #[error(transparent)]
    Command(#[from] CodecError),
}

pub(crate) fn of_command(command: &Command) -> Vec<u8> {
    [&[VERSION, COMMAND][..], &codec::encode(VERSION, command)].concat()
}

pub(crate) fn of_bytes(bytes: &FileBytes) -> Vec<u8> {
    let mut record = Vec::with_capacity(40 + bytes.pieces.len() * PIECE_HEADER_BYTES + bytes.len());
    record.extend_from_slice(&[VERSION, BYTES]);
    record.extend_from_slice(&bytes.ino.0.to_le_bytes());
    record.extend_from_slice(&bytes.mtime.secs.to_le_bytes());
    record.extend_from_slice(&bytes.mtime.nanos.to_le_bytes());
    record.push(u8::from(bytes.drop_privileges));
    record.extend_from_slice(&(bytes.pieces.len() as u32).to_le_bytes());
    for (offset, piece) in &bytes.pieces {
        record.extend_from_slice(&offset.to_le_bytes());
        record.extend_from_slice(&(piece.len() as u32).to_le_bytes());
    }
    for (_, piece) in &bytes.pieces {
        record.extend_from_slice(piece);
    }
    record
}

impl Record {
    /// # Errors
    /// It is no record, or of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        match *bytes {
            [VERSION, COMMAND, ref command @ ..] => Ok(Self::Command(codec::decode(VERSION, command, COMMAND_BYTES_MAX)?)),
            [VERSION, BYTES, ref rest @ ..] => decode_bytes(rest).map(Self::Bytes).ok_or(RecordError::Length),
            [VERSION, kind, ..] => Err(RecordError::Kind(kind)),
            [version, ..] if version != VERSION => Err(RecordError::Version(version)),
            _ => Err(RecordError::Length),
        }
    }
}

fn decode_bytes(mut rest: &[u8]) -> Option<FileBytes> {
    let ino = Ino(rest.try_get_u64_le().ok()?);
    let mtime = Timestamp::new(rest.try_get_i64_le().ok()?, rest.try_get_u32_le().ok()?);
    let drop_privileges = rest.try_get_u8().ok()? != 0;
    let count = rest.try_get_u32_le().ok()? as usize;
    let headers = rest.split_off(..count.checked_mul(PIECE_HEADER_BYTES)?)?;
    let mut pieces = Vec::with_capacity(count);
    for mut header in headers.chunks_exact(PIECE_HEADER_BYTES) {
        let (offset, length) = (header.get_u64_le(), header.get_u32_le());
        offset.checked_add(u64::from(length))?;
        pieces.push((offset, rest.split_off(..length as usize)?.to_vec()));
    }
    rest.is_empty().then_some(FileBytes { ino, mtime, drop_privileges, pieces })
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn file_bytes() -> impl Strategy<Value = FileBytes> {
        let pieces = vec((0..u64::MAX / 2, vec(any::<u8>(), 0..20)), 0..5);
        (any::<u64>(), any::<i64>(), 0u32..1_000_000_000, any::<bool>(), pieces).prop_map(|(ino, secs, nanos, drop_privileges, pieces)| {
            FileBytes { ino: Ino(ino), mtime: Timestamp::new(secs, nanos), drop_privileges, pieces }
        })
    }

    proptest! {
        #[test]
        fn bytes_read_back_and_are_refused_when_cut_or_longer(bytes in file_bytes(), cut in any::<prop::sample::Index>()) {
            let record = of_bytes(&bytes);
            prop_assert_eq!(Record::decode(&record), Ok(Record::Bytes(bytes)));
            prop_assert!(Record::decode(&record[..cut.index(record.len())]).is_err());
            prop_assert!(Record::decode(&[&record[..], &[0]].concat()).is_err());
        }

        #[test]
        fn hostile_bytes_never_panic(kind in 0u8..4, bytes in vec(any::<u8>(), 0..100)) {
            let _ = Record::decode(&[&[VERSION, kind], &bytes[..]].concat());
            let _ = Record::decode(&bytes);
        }
    }
}
