//! Why the journal refuses.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::Position;

/// Why something could not be written to a journal or read from it. Clones tell the same to
/// everybody who waited.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JournalError {
    /// A write or a sync failed, so what is on the disk is unknown. It stays so until the next life.
    #[error("the journal failed and takes nothing more: {0}")]
    Broken(Arc<str>),
    #[error("the journal is closed")]
    Closed,
    /// Whoever appends did not wait for room.
    #[error("the journal holds {bytes} bytes that are still needed, its limit is {limit}")]
    Full { bytes: u64, limit: u64 },
    #[error("a record of {bytes} bytes is over the limit of {limit}", limit = crate::RECORD_BYTES_MAX)]
    TooLong { bytes: usize },
    #[error("records up to {upto} are no longer kept")]
    Trimmed { upto: Position },
    /// The wait was longer than its caller allows; the record may become durable yet.
    #[error("not done in time")]
    TimedOut,
    /// Bytes that had been durable are not as they were written.
    #[error("{file} is damaged at byte {offset}: {why}")]
    Damaged { file: PathBuf, offset: u64, why: &'static str },
    #[error("the life already has a journal in {0}")]
    Exists(PathBuf),
    #[error("{what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: Arc<io::Error> },
}

impl JournalError {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { what, path: path.to_owned(), source: Arc::new(source) }
    }

    pub(crate) fn damaged(file: &Path, offset: usize, why: &'static str) -> Self {
        Self::Damaged { file: file.to_owned(), offset: offset as u64, why }
    }
}
