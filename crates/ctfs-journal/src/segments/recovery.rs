//! Reading the files back after a stop, clean or not.
//!
//! What does not check at the end of the last segment is an unfinished write, that nobody was told
//! of, and does not count. Everything else that does not check had been durable, and is reported
//! instead of cut. The two are told apart by what is known to have been durable: every segment but
//! the last, whatever an intact frame says in `synced`, and `marks` where they survived.

use std::{collections::VecDeque, path::Path, sync::Arc};

use parking_lot::Mutex;
use tracing::{info, warn};

use super::{MARKS, MARKS_BYTES, Marks, SEGMENT_BYTES_MAX, Segment, SegmentReader, Segments, segment_path};
use crate::{
    Disk, DiskFile, JournalError, JournalId, Position,
    frame::{self, SEGMENT_HEADER_BYTES},
};

impl Segments {
    /// Reads what is in `dir`, and makes durable what was found. `None`: it ended before it began,
    /// and nothing was ever written to it.
    pub fn recover(
        disk: Arc<dyn Disk>,
        dir: &Path,
        id: JournalId,
        segment_bytes: u64,
    ) -> Result<Option<Self>, JournalError> {
        let failed = |source| JournalError::io("open journal in", dir, source);
        let names = disk.list(dir).map_err(|source| JournalError::io("list", dir, source))?;
        let firsts = segments_of(&names);
        if firsts.is_empty() && !names.iter().any(|name| name == MARKS) {
            return Ok(None);
        }
        let (marks_file, mut marks) = open_marks(&*disk, dir)?;
        let missing = |why| JournalError::damaged(dir, 0, why);
        let Some(&first) = firsts.first() else {
            return match marks {
                Some(marks) if marks.synced > marks.trimmed => Err(missing("records that had been durable are missing")),
                _ => Ok(None),
            };
        };

        let known_synced = marks.map_or(Position::NONE, |marks| marks.synced);
        let mut segments: VecDeque<Segment> = VecDeque::new();
        for (nth, &first) in firsts.iter().enumerate() {
            segments.push_back(read_segment(&*disk, dir, &id, first, firsts.get(nth + 1).copied(), known_synced)?);
        }
        let last = segments.back().expect("there is a first one");
        let written = Position(last.next()).before();
        // Read from memory, perhaps: durable only from here on.
        last.file.sync().map_err(failed)?;
        let marks = {
            let marks = marks.get_or_insert_default();
            if marks.synced > written {
                return Err(missing("records that had been durable are missing at its end"));
            }
            let gone = Position(first).before();
            // Frames that were trimmed before they were removed count as trimmed; a segment that
            // is gone was trimmed, whatever the marks lost.
            Marks { trimmed: marks.trimmed.min(written).max(gone), synced: written }
        };
        info!(dir = %dir.display(), first = marks.trimmed.0 + 1, last = %written, "journal opened");
        let segments = Self {
            disk,
            dir: dir.to_owned(),
            id,
            segment_bytes: segment_bytes.min(SEGMENT_BYTES_MAX / 2),
            reader: SegmentReader { segments: Arc::new(Mutex::new(segments)) },
            open: false,
            next: written.next(),
            marks,
            marks_file,
            spare: None,
            buffer: Vec::new(),
        };
        segments.note_marks();
        Ok(Some(segments))
    }
}

/// The first records of the segments among the files `names`, in order.
fn segments_of(names: &[String]) -> Vec<u64> {
    let number = |name: &String| match name.strip_suffix(".seg") {
        Some(digits) if digits.len() == 20 => digits.parse().ok(),
        _ => None,
    };
    let mut firsts: Vec<u64> = names.iter().filter_map(number).collect();
    firsts.sort_unstable();
    firsts
}

/// The file of the marks and what it says, if it says anything.
fn open_marks(disk: &dyn Disk, dir: &Path) -> Result<(Arc<dyn DiskFile>, Option<Marks>), JournalError> {
    let path = dir.join(MARKS);
    let failed = |source| JournalError::io("open", &path, source);
    let file = match disk.open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => disk.create(&path).map_err(failed)?,
        file => file.map_err(failed)?,
    };
    let mut bytes = [0; MARKS_BYTES];
    let count = file.read_at(&mut bytes, 0).map_err(failed)?;
    let marks = Marks::of(&bytes[..count]);
    Ok((file, marks))
}

/// Reads the segment of `id` that begins with record `first` and has all up to `next_first`, the
/// first one of its successor.
fn read_segment(
    disk: &dyn Disk,
    dir: &Path,
    id: &JournalId,
    first: u64,
    next_first: Option<u64>,
    synced: Position,
) -> Result<Segment, JournalError> {
    let path = segment_path(dir, first);
    let failed = |source| JournalError::io("read", &path, source);
    let damaged = |offset, why| JournalError::damaged(&path, offset, why);

    let file = disk.open(&path).map_err(failed)?;
    let length = file.bytes().map_err(failed)?;
    if length > SEGMENT_BYTES_MAX {
        return Err(damaged(0, "longer than a segment gets"));
    }
    let mut bytes = vec![0; length as usize];
    let count = file.read_at(&mut bytes, 0).map_err(failed)?;
    bytes.truncate(count);
    // It was synced before the file had its name.
    let Some(salt) = frame::read_segment_header(&bytes, id, Position(first)) else {
        return Err(damaged(0, "segment header does not check"));
    };
    let mut segment =
        Segment { first, path: path.clone(), file, salt, offsets: Vec::new(), end: SEGMENT_HEADER_BYTES as u32 };
    while next_first.is_none_or(|next_first| segment.next() < next_first) {
        let (at, next) = (segment.end as usize, Position(segment.next()));
        match frame::read(salt, &bytes[at..]) {
            Some((header, payload)) if header.position == next => {
                segment.offsets.push(at as u32);
                segment.end += frame::frame_bytes(payload) as u32;
            }
            Some(_) => return Err(damaged(at, "an intact frame of another position")),
            None if next_first.is_some() => return Err(damaged(at, "bad frame before a later segment")),
            None if frame::proves_synced(salt, &bytes[at..], next) => {
                return Err(damaged(at, "bad frame before a later write"));
            }
            None if synced >= next => return Err(damaged(at, "bad frame where the journal had been durable")),
            None => {
                // Zeros, or frames of an earlier use of the file, where nothing was begun.
                if frame::begins(salt, &bytes[at..], next) {
                    warn!(segment = %path.display(), offset = at, "leaving out an unfinished write");
                }
                break;
            }
        }
    }
    Ok(segment)
}
