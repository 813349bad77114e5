//! What earlier lives of a server left behind.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    Disk, JournalError, JournalId, Position, Record,
    disk::{remove_whole, sweep},
    segments::{SegmentReader, Segments},
};

/// The lives of cluster `cluster` whose journals are in `root`, oldest first for each server.
pub fn lives(disk: &dyn Disk, root: &Path, cluster: [u8; 16]) -> Result<Vec<JournalId>, JournalError> {
    let names = sweep(disk, root).map_err(|source| JournalError::io("list", root, source))?;
    Ok(names.iter().filter_map(|name| JournalId::of_dir_name(cluster, name)).collect())
}

/// The journal of a life that has ended. Nothing is appended to it any more.
pub struct OldLife {
    id: JournalId,
    disk: Arc<dyn Disk>,
    root: PathBuf,
    kept_from: Position,
    last: Position,
    reader: Option<SegmentReader>,
}

impl OldLife {
    /// Reads the journal of `id` in `root` from end to end. What is found is durable afterwards.
    ///
    /// # Errors
    /// - [`JournalError::Damaged`]: something is missing or changed that had been durable. All of
    ///   it is refused: a person must look.
    pub fn recover(disk: Arc<dyn Disk>, root: &Path, id: JournalId) -> Result<Self, JournalError> {
        let dir = root.join(id.dir_name());
        let segments = Segments::recover(disk.clone(), &dir, id, 0)?;
        let (kept_from, last, reader) = match &segments {
            Some(segments) => (segments.trimmed().next(), segments.written(), Some(segments.reader())),
            None => (Position::NONE.next(), Position::NONE, None),
        };
        Ok(Self { id, disk, root: root.to_owned(), kept_from, last, reader })
    }

    pub fn id(&self) -> JournalId {
        self.id
    }

    /// The first record that was not trimmed, or one past the last.
    pub fn kept_from(&self) -> Position {
        self.kept_from
    }

    /// The last record; what was appended after it had not been reported durable.
    pub fn last(&self) -> Position {
        self.last
    }

    /// Records from `from` on, of at most `bytes_max` but at least one; none past the last. Blocks.
    pub fn read(&self, from: Position, bytes_max: usize) -> Result<Vec<Record>, JournalError> {
        match &self.reader {
            _ if from < self.kept_from => Err(JournalError::Trimmed { upto: self.kept_from.before() }),
            Some(reader) if from <= self.last => reader.read(from, bytes_max),
            _ => Ok(Vec::new()),
        }
    }

    /// Puts the journal aside, for a person to look at: the others went on without some of it. Answers where.
    pub fn set_aside(self) -> Result<PathBuf, JournalError> {
        let name = self.id.dir_name();
        let aside = self.root.join(format!("{name}.lost"));
        self.disk
            .rename(&self.root.join(&name), &aside)
            .and_then(|()| self.disk.sync_dir(&self.root))
            .map_err(|source| JournalError::io("put aside a journal in", &self.root, source))?;
        Ok(aside)
    }

    /// Removes the journal, whose records are no longer needed. All or nothing.
    pub fn remove(self) -> Result<(), JournalError> {
        remove_whole(&*self.disk, &self.root, &self.id.dir_name())
            .map_err(|source| JournalError::io("remove journal from", &self.root, source))
    }
}
