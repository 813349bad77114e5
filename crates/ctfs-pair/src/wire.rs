//! What travels between a journal and its copy: whose it is, then the batch, then the answer.

use bytes::Bytes;
use ctfs_journal::{Batch, Copies, JournalId, Position, TransportError, decode_answer, encode_answer};
use ctfs_types::{NodeId, codec};

const VERSION: u8 = 1;
/// A name, and no batch.
const HEADER_BYTES_MAX: usize = 1 << 10;

/// Whose journal the batch is of, for a body that travels beside it.
pub fn header(id: JournalId) -> Vec<u8> {
    codec::encode(VERSION, &id)
}

/// Both in one message.
pub fn call(id: JournalId, body: &[u8]) -> Vec<u8> {
    let header = header(id);
    [&(header.len() as u32).to_le_bytes()[..], &header, body].concat()
}

/// The two parts of a [`call`].
///
/// # Errors
/// A text for a peer that is at fault.
pub fn split_call(mut call: Bytes) -> Result<(Bytes, Bytes), String> {
    let short = || "a batch of a journal ends before it should".to_owned();
    if call.len() < 4 {
        return Err(short());
    }
    let length = u32::from_le_bytes([call[0], call[1], call[2], call[3]]) as usize;
    let mut rest = call.split_off(4);
    if rest.len() < length {
        return Err(short());
    }
    let header = rest.split_to(length);
    Ok((header, rest))
}

/// Takes a batch of the life of another server.
///
/// # Errors
/// A text for a peer that is at fault.
pub(crate) async fn accept(copies: &Copies, from: NodeId, header: &[u8], batch: Bytes) -> Result<Vec<u8>, String> {
    let id: JournalId = codec::decode(VERSION, header, HEADER_BYTES_MAX).map_err(|error| error.to_string())?;
    if id.node != from {
        return Err("a journal is sent by the server whose it is".to_owned());
    }
    let batch = Batch::decode(batch).map_err(|error| error.to_string())?;
    Ok(encode_answer(&copies.accept(id, batch).await))
}

/// What the copy answered.
///
/// # Errors
/// Its refusal, or what it sent is no answer.
pub fn answer(bytes: &[u8]) -> Result<Position, TransportError> {
    let answer = decode_answer(bytes).map_err(|error| TransportError::Unreachable(error.to_string()))?;
    Ok(answer?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_comes_apart_as_it_was_put_together_and_a_short_one_is_refused() {
        let id = JournalId { cluster: [7; 16], node: NodeId(3), incarnation: ctfs_types::Incarnation(9) };
        let call = Bytes::from(call(id, b"batch"));
        let (head, body) = split_call(call.clone()).unwrap();
        assert_eq!((&head[..], &body[..]), (&header(id)[..], &b"batch"[..]));
        for length in 0..call.len() - b"batch".len() {
            assert!(split_call(call.slice(..length)).is_err(), "{length}");
        }
    }
}
