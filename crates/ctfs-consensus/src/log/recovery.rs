//! Reading the segments back after a stop, clean or not.
//!
//! A server that lost power leaves an unfinished write at the end of the last segment: it was
//! never acknowledged and is cut. Everything else that does not check had been acknowledged, and
//! is reported instead of cut. The two are told apart by what is known to have been durable: a
//! segment is synced before the next begins, a frame says how far the log was synced when it was
//! written, and `progress` remembers it where it survived.

use std::{
    collections::VecDeque,
    fs::{self, OpenOptions},
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use tracing::{info, warn};

use super::{
    Index, LogError, Place, SegmentFile,
    flusher::{Active, segment_path},
    frame::{self, SEGMENT_HEADER_BYTES},
    marks::{Progress, ProgressFile, State},
};
use crate::{durable, raft_types::RaftLogId};

/// A log as it was found on disk.
pub(crate) struct Recovered {
    pub(super) dir: PathBuf,
    pub(super) state: State,
    pub(super) index: Index,
    pub(super) progress_file: ProgressFile,
    pub(super) progress: Progress,
    pub(super) active: Option<Active>,
}

impl Recovered {
    /// Reads the log in `dir`, making an empty one where there is none.
    pub fn read(dir: &Path) -> Result<Self, LogError> {
        recover(dir)
    }

    /// The last purged entry, and the index of the first one that is there.
    pub fn begin(&self) -> (Option<RaftLogId>, Option<u64>) {
        (self.index.purged, self.index.first())
    }

    /// Whether entry `id` is here, or was and is purged.
    pub fn reaches(&self, id: RaftLogId) -> bool {
        self.index.purged.is_some_and(|purged| purged.index >= id.index) || self.index.id_at(id.index) == Some(id)
    }

    /// Lets the log begin after `upto`, which a durable state has and this log has not: what is
    /// here is older than that state, or was never committed.
    pub fn begin_after(&mut self, upto: RaftLogId) -> Result<(), LogError> {
        let failed = |source| LogError::io("purge log in", &self.dir, source);
        self.state.purged = Some(upto);
        self.state.save(&self.dir).map_err(failed)?;
        self.index.purge(upto);
        self.progress.synced = upto.index + 1;
        self.progress_file.write_durably(&self.progress).map_err(failed)?;
        self.active = None;
        delete_forgotten(&self.dir, &mut self.index, &None)?;
        info!(dir = %self.dir.display(), %upto, "the state is ahead of the log, which begins anew behind it");
        Ok(())
    }
}

fn recover(dir: &Path) -> Result<Recovered, LogError> {
    durable::create_dir(dir).map_err(|source| LogError::io("create log directory", dir, source))?;
    let firsts = list_segments(dir)?;
    let state = match State::load(dir)? {
        Some(state) => state,
        None if firsts.is_empty() => {
            let state = State::default();
            state.save(dir).map_err(|source| LogError::io("create log state in", dir, source))?;
            state
        }
        None => return Err(LogError::StateMissing { path: dir.to_owned() }),
    };
    let (progress_file, mut progress) = ProgressFile::open(dir)?;

    let mut index = Index { vote: state.vote, purged: state.purged, committed: progress.committed, ..Index::default() };
    let mut active = None;
    for (nth, &first) in firsts.iter().enumerate() {
        let is_last = nth + 1 == firsts.len();
        match read_segment(dir, first, is_last, progress.synced, &index)? {
            Some(segment) => {
                index.files.insert(first, segment.active.segment.clone());
                index.places.extend(segment.places);
                active = Some(segment.active);
            }
            None => {
                let path = segment_path(dir, first);
                durable::remove_file(&path).map_err(|source| LogError::io("remove unfinished segment", &path, source))?;
            }
        }
    }
    index.last = index.places.back().map(|place| place.id);

    let purged_end = index.purged.map_or(0, |purged| purged.index + 1);
    let end = index.last.map_or(purged_end, |last| last.index + 1);
    if progress.synced > end.max(purged_end) {
        let (segment, offset) = match &active {
            Some(active) => (active.segment.path.clone(), active.end),
            None => (dir.to_owned(), 0),
        };
        return Err(LogError::LogDamaged { segment, offset, why: "entries that had been durable are missing at its end" });
    }
    if let (Some(purged), Some(front)) = (index.purged, index.places.front())
        && front.id.index > purged.index + 1
    {
        let segment = segment_path(dir, front.segment);
        return Err(LogError::LogDamaged { segment, offset: 0, why: "the segment before it is missing" });
    }
    // What survived is durable from here on: an unfinished write was cut with a sync, and the
    // rest was just read from files that are synced below.
    if let Some(active) = &active {
        let path = &active.segment.path;
        active.segment.file.sync_all().map_err(|source| LogError::io("sync log segment", path, source))?;
    }
    drop_purged(&mut index, &mut active);
    let end = index.last.or(index.purged).map_or(0, |last| last.index + 1);
    if progress.synced > end {
        let failed = |source| LogError::io("write log progress in", dir, source);
        progress_file.write_durably(&Progress { synced: end, ..progress }).map_err(failed)?;
    }
    progress.synced = end;
    delete_forgotten(dir, &mut index, &active)?;
    info!(dir = %dir.display(), entries = index.places.len(), last = ?index.last, purged = ?index.purged, "log opened");
    Ok(Recovered { dir: dir.to_owned(), state, index, progress_file, progress, active })
}

fn list_segments(dir: &Path) -> Result<Vec<u64>, LogError> {
    let failed = |source| LogError::io("list log directory", dir, source);
    let mut firsts = Vec::new();
    for file in fs::read_dir(dir).map_err(failed)? {
        let name = file.map_err(failed)?.file_name();
        if let Some(digits) = name.to_str().and_then(|name| name.strip_suffix(".seg"))
            && digits.len() == 20
            && let Ok(first) = digits.parse()
        {
            firsts.push(first);
        }
    }
    firsts.sort_unstable();
    Ok(firsts)
}

struct Segment {
    active: Active,
    places: VecDeque<Place>,
}

/// Reads one segment; `None`: its creation was never finished, and nothing is in it.
fn read_segment(dir: &Path, first: u64, is_last: bool, synced: u64, before: &Index) -> Result<Option<Segment>, LogError> {
    let path = segment_path(dir, first);
    let failed = |source| LogError::io("read log segment", &path, source);
    let damaged = |offset: usize, why| LogError::LogDamaged { segment: path.clone(), offset: offset as u64, why };

    let mut file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed)?;
    let Some(salt) = frame::read_segment_header(&bytes, first) else {
        // The header is synced before the first frame is written, so behind a bad one there
        // must be nothing.
        if is_last && bytes.len() <= SEGMENT_HEADER_BYTES {
            warn!(segment = %path.display(), "removing a segment whose creation was not finished");
            return Ok(None);
        }
        return Err(damaged(0, "segment header does not check"));
    };
    if let Some(last) = before.places.back()
        && last.id.index + 1 != first
    {
        return Err(damaged(0, "entries between the segments are missing"));
    }

    let mut places = VecDeque::new();
    let mut at = SEGMENT_HEADER_BYTES;
    let mut next = first;
    while at < bytes.len() {
        match frame::read(salt, &bytes[at..]) {
            Some(frame) if frame.id.index == next => {
                places.push_back(Place { id: frame.id, segment: first, offset: at as u64, bytes: frame.bytes() });
                at += frame.bytes();
                next += 1;
            }
            Some(_) => return Err(damaged(at, "an intact frame of another index")),
            None if !is_last => return Err(damaged(at, "bad frame before a later segment")),
            None if frame::proves_synced(salt, &bytes[at..], next) => {
                return Err(damaged(at, "bad frame before a later write"));
            }
            // What was purged may go, however it looks.
            None if synced > next && before.purged.is_none_or(|purged| purged.index < next) => {
                return Err(damaged(at, "bad frame where the log had been durable"));
            }
            None => {
                warn!(segment = %path.display(), offset = at, bytes = bytes.len() - at, "cutting an unfinished write");
                file.set_len(at as u64).and_then(|()| file.sync_all()).map_err(failed)?;
                break;
            }
        }
    }
    let segment = SegmentFile { file: Arc::new(file), salt, path };
    Ok(Some(Segment { active: Active { first, segment, end: at as u64 }, places }))
}

/// Forgets what a purge that was interrupted had left.
fn drop_purged(index: &mut Index, active: &mut Option<Active>) {
    let Some(purged) = index.purged else { return };
    index.purge(purged);
    // An empty log begins a new segment, unless one stands ready right behind.
    if index.places.is_empty() && active.as_ref().is_some_and(|active| active.first != purged.index + 1) {
        *active = None;
    }
}

/// Deletes the segments in which no entry is left.
fn delete_forgotten(dir: &Path, index: &mut Index, active: &Option<Active>) -> Result<(), LogError> {
    let failed = |source| LogError::io("remove purged segments in", dir, source);
    let kept = match (index.places.front(), active) {
        (Some(front), _) => front.segment,
        (None, Some(active)) => active.first,
        (None, None) => u64::MAX,
    };
    let gone: Vec<u64> = index.files.range(..kept).map(|(&first, _)| first).collect();
    for first in &gone {
        index.files.remove(first);
        fs::remove_file(segment_path(dir, *first)).map_err(failed)?;
    }
    if gone.is_empty() { Ok(()) } else { durable::sync_dir(dir).map_err(failed) }
}
