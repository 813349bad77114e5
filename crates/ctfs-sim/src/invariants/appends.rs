//! A file that several servers append to: each piece is there once, in one order, and stays.

use super::linearizable::{Calls, Model};

pub struct Appends;

#[derive(Debug)]
pub enum Action {
    /// And fsync.
    Append(u16),
    Read,
}

#[derive(Debug, PartialEq)]
pub enum Answer {
    Done,
    Holds(Vec<u16>),
}

impl Model for Appends {
    type State = Vec<u16>;
    type Action = Action;
    type Answer = Answer;

    fn apply(state: &Vec<u16>, action: &Action) -> (Vec<u16>, Answer) {
        match action {
            Action::Append(piece) => {
                let mut next = state.clone();
                next.push(*piece);
                (next, Answer::Done)
            }
            Action::Read => (state.clone(), Answer::Holds(state.clone())),
        }
    }
}

impl Calls<Appends> {
    /// Takes a read out that may have shown what its own server was just appending.
    ///
    /// `write_through` puts the bytes into the cache tier before the metadata have placed them, and takes
    /// them out again when another server was faster: a read of the same server sees them in between.
    pub fn drop_unsure(&mut self, read: usize) {
        if self.overlaps(read, |action| matches!(action, Action::Append(_))) {
            self.drop_call(read);
        }
    }
}

/// Bytes of one piece, numbered so that a torn one shows.
pub fn piece(number: u16) -> Vec<u8> {
    format!("{number:04x}\n").into_bytes()
}

/// The pieces in a file's bytes.
///
/// # Errors
/// They are not a row of whole pieces.
pub fn pieces(bytes: &[u8]) -> Result<Vec<u16>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| format!("bytes that nobody wrote: {bytes:?}"))?;
    let lines = text.strip_suffix('\n').map_or(text, |text| text);
    if text.is_empty() {
        return Ok(Vec::new());
    }
    lines.split('\n').map(|line| u16::from_str_radix(line, 16).map_err(|_| format!("no whole pieces: {text:?}"))).collect()
}
