//! The two small files beside the segments.
//!
//! `state` holds what must be durable before anybody hears of it: the vote, and how far the log
//! was purged. It is replaced as a whole. `progress` is written over in place and not waited for:
//! how far the log was synced and committed. Losing it costs nothing; where it survives, recovery
//! knows that a missing tail had been acknowledged, and need not guess.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use ctfs_types::codec;
use serde::{Deserialize, Serialize};

use super::LogError;
use crate::{
    durable,
    health::sync_failed,
    raft_types::{RaftLogId, RaftVote},
};

const VERSION: u8 = 1;
const RECORD_BYTES_MAX: usize = 4096;
/// `progress` is one block of fixed size, so that a shorter record leaves no old bytes behind.
const PROGRESS_BYTES: usize = 128;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub vote: Option<RaftVote>,
    pub purged: Option<RaftLogId>,
}

impl State {
    /// Reads the file. `None`: there is none, the log was never opened.
    pub fn load(dir: &Path) -> Result<Option<Self>, LogError> {
        let path = dir.join("state");
        let Some(bytes) = durable::read_if_there(&path).map_err(|source| LogError::io("read log state", &path, source))?
        else {
            return Ok(None);
        };
        // A damaged vote cannot be guessed: voting twice in one term would elect two leaders.
        let state = codec::unseal(VERSION, &bytes, RECORD_BYTES_MAX)
            .map_err(|why| LogError::StateDamaged { path, why: why.to_string() })?;
        Ok(Some(state))
    }

    pub fn save(&self, dir: &Path) -> io::Result<()> {
        durable::replace(&dir.join("state"), &codec::seal(VERSION, self))
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// One past the last index known to be durable.
    pub synced: u64,
    pub committed: Option<RaftLogId>,
}

/// The open `progress` file.
#[derive(Debug)]
pub(super) struct ProgressFile {
    file: File,
}

impl ProgressFile {
    pub fn open(dir: &Path) -> Result<(Self, Progress), LogError> {
        let path: PathBuf = dir.join("progress");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|source| LogError::io("open log progress", &path, source))?;
        let mut block = [0; PROGRESS_BYTES];
        let progress = match file.read_exact_at(&mut block, 0) {
            Ok(()) => Self::decode(&block).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Progress::default(),
            Err(source) => return Err(LogError::io("read log progress", &path, source)),
        };
        Ok((Self { file }, progress))
    }

    /// Writes without waiting for the disk.
    pub fn write(&self, progress: &Progress) -> io::Result<()> {
        let record = codec::seal(VERSION, progress);
        let mut block = [0; PROGRESS_BYTES];
        block[0] = u8::try_from(record.len()).expect("three log numbers and a sum fit in 127 bytes");
        block[1..=record.len()].copy_from_slice(&record);
        self.file.write_all_at(&block, 0)
    }

    /// Writes and waits: before entries are taken away, what claims them must go.
    pub fn write_durably(&self, progress: &Progress) -> io::Result<()> {
        self.write(progress)?;
        self.file.sync_data().map_err(sync_failed)
    }

    fn decode(block: &[u8; PROGRESS_BYTES]) -> Option<Progress> {
        let record = block.get(1..1 + usize::from(block[0]))?;
        codec::unseal(VERSION, record, RECORD_BYTES_MAX).ok()
    }
}
