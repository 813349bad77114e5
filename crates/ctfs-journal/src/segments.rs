//! The files of one journal or copy, written and read by one caller at a time; no threads here.
//!
//! ```text
//! DIR/NNNNNNNNNNNNNNNNNNNN.seg   records from that position on; as large as they get from the start
//! DIR/spare                      the next segment in the making, of no meaning
//! DIR/marks                      how far it is trimmed and synced: worth having, never waited for
//! ```
//!
//! A segment is synced before the next one begins, and has its header before it has its name. So
//! only the last one can end in an unfinished write. After a restart nothing is written behind that
//! end: a new segment begins with the next record, and what a segment holds past the first record
//! of its successor does not count.

mod recovery;

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use ctfs_types::codec;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    Disk, DiskFile, JournalError, JournalId, Position, Record,
    frame::{self, SEGMENT_HEADER_BYTES},
};

/// Longest segment that is read back. One is as long as the setting says, or as its only record.
pub(crate) const SEGMENT_BYTES_MAX: u64 = 64 << 20;

const SPARE: &str = "spare";
const MARKS: &str = "marks";
const MARKS_VERSION: u8 = 1;
const MARKS_BYTES: usize = 64;

/// What is remembered beside the records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Marks {
    /// Records up to here are no longer needed. A lower number does no harm.
    pub trimmed: Position,
    /// Records up to here had been durable, or are trimmed. A lower number does no harm.
    pub synced: Position,
}

impl Marks {
    /// Fits one sector: it is written in place.
    pub fn bytes(&self) -> [u8; MARKS_BYTES] {
        let sealed = codec::seal(MARKS_VERSION, self);
        let mut bytes = [0; MARKS_BYTES];
        bytes[0] = sealed.len() as u8;
        bytes[1..=sealed.len()].copy_from_slice(&sealed);
        bytes
    }

    fn of(bytes: &[u8]) -> Option<Self> {
        let (&length, rest) = bytes.split_first()?;
        codec::unseal(MARKS_VERSION, rest.get(..length.into())?, MARKS_BYTES).ok()
    }
}

struct Segment {
    first: u64,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    salt: u32,
    /// Where each frame begins.
    offsets: Vec<u32>,
    /// Where the last one ends.
    end: u32,
}

impl Segment {
    /// One past the last record.
    fn next(&self) -> u64 {
        self.first + self.offsets.len() as u64
    }
}

/// Reads records from the files while another thread writes.
#[derive(Clone)]
pub(crate) struct SegmentReader {
    segments: Arc<Mutex<VecDeque<Segment>>>,
}

/// Why a write did not happen.
pub(crate) enum WriteError {
    /// There was no room for a new segment. What is on the disk is as it was: try again later.
    NoRoom(io::Error),
    /// What is on the disk is unknown.
    Failed(io::Error),
}

impl From<WriteError> for io::Error {
    fn from(error: WriteError) -> Self {
        let (WriteError::NoRoom(why) | WriteError::Failed(why)) = error;
        why
    }
}

pub(crate) struct Segments {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    id: JournalId,
    segment_bytes: u64,
    reader: SegmentReader,
    /// Whether the last segment may be written behind its end.
    open: bool,
    next: Position,
    marks: Marks,
    marks_file: Arc<dyn DiskFile>,
    /// Ready to become a segment: allocated, and with no name that counts.
    spare: Option<Arc<dyn DiskFile>>,
    buffer: Vec<u8>,
}

/// The file of the segment whose first record is `first`. Twenty digits sort as numbers do.
fn segment_path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.seg"))
}

impl Segments {
    /// A new journal in `dir`, which is not there yet, whose first record will be `first`.
    pub fn create(
        disk: Arc<dyn Disk>,
        dir: &Path,
        id: JournalId,
        first: Position,
        segment_bytes: u64,
    ) -> Result<Self, JournalError> {
        let failed = |source| JournalError::io("create journal in", dir, source);
        disk.create_dir(dir).map_err(failed)?;
        let marks = Marks { trimmed: first.before(), synced: first.before() };
        let marks_file = disk.create(&dir.join(MARKS)).map_err(failed)?;
        let mut segments = Self {
            disk,
            dir: dir.to_owned(),
            id,
            segment_bytes: segment_bytes.min(SEGMENT_BYTES_MAX / 2),
            reader: SegmentReader { segments: Arc::default() },
            open: false,
            next: first,
            marks,
            marks_file,
            spare: None,
            buffer: Vec::new(),
        };
        match segments.begin() {
            Ok(()) => Ok(segments),
            Err(WriteError::NoRoom(source) | WriteError::Failed(source)) => Err(failed(source)),
        }
    }

    pub fn reader(&self) -> SegmentReader {
        self.reader.clone()
    }

    /// The last record that was written.
    pub fn written(&self) -> Position {
        self.next.before()
    }

    /// The last record that is durable.
    pub fn synced(&self) -> Position {
        self.marks.synced
    }

    /// Records up to here are no longer needed.
    pub fn trimmed(&self) -> Position {
        self.marks.trimmed
    }

    /// Bytes of the records that are not trimmed, as frames.
    pub fn kept_bytes(&self) -> u64 {
        let segments = self.reader.segments.lock();
        let kept = self.marks.trimmed.0 + 1;
        let of = |segment: &Segment| {
            let skipped = kept.saturating_sub(segment.first) as usize;
            let start = segment.offsets.get(skipped).copied().unwrap_or(segment.end);
            u64::from(segment.end - start)
        };
        segments.iter().map(of).sum()
    }

    /// Whether these can be written without beginning a segment.
    pub fn has_room_for(&self, records: &[Record]) -> bool {
        let bytes: u64 = records.iter().map(|record| frame::frame_bytes(&record.payload) as u64).sum();
        self.open && u64::from(self.active().1) + bytes <= self.segment_bytes
    }

    /// Writes `records`, which follow each other and what is here. Not durable before
    /// [`Self::sync`]. After [`WriteError::NoRoom`] some of them may be written, as
    /// [`Self::written`] tells.
    pub fn write(&mut self, records: &[Record]) -> Result<(), WriteError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let result = self.write_through(records, &mut buffer);
        self.buffer = buffer;
        result
    }

    fn write_through(&mut self, records: &[Record], buffer: &mut Vec<u8>) -> Result<(), WriteError> {
        let mut offsets = Vec::new();
        let (mut salt, mut end) = self.active();
        for record in records {
            let next = self.next.0 + offsets.len() as u64;
            assert_eq!(record.position.0, next, "records are written in order, without gaps");
            let bytes = frame::frame_bytes(&record.payload) as u64;
            let at = u64::from(end) + buffer.len() as u64;
            // A record longer than a segment is the only one in its own.
            let full = at + bytes > self.segment_bytes && at > SEGMENT_HEADER_BYTES as u64;
            if !self.open || full {
                self.write_out(buffer, &mut offsets)?;
                self.sync().map_err(WriteError::Failed)?;
                self.begin()?;
                (salt, end) = self.active();
            }
            offsets.push(end + buffer.len() as u32);
            frame::write(buffer, salt, record, self.marks.synced);
        }
        self.write_out(buffer, &mut offsets)
    }

    /// Salt and end of the segment that is written to.
    fn active(&self) -> (u32, u32) {
        self.reader.segments.lock().back().map_or((0, 0), |segment| (segment.salt, segment.end))
    }

    fn write_out(&mut self, buffer: &mut Vec<u8>, offsets: &mut Vec<u32>) -> Result<(), WriteError> {
        if buffer.is_empty() {
            return Ok(());
        }
        let (file, end) = {
            let segments = self.reader.segments.lock();
            let active = segments.back().expect("a segment was begun before a frame was made");
            (active.file.clone(), active.end)
        };
        // Its room was taken before: a refusal here is no lack of room that could be waited for.
        file.write_at(buffer, end.into()).map_err(WriteError::Failed)?;
        self.next.0 += offsets.len() as u64;
        let mut segments = self.reader.segments.lock();
        let active = segments.back_mut().expect("it was there above");
        active.offsets.append(offsets);
        active.end += buffer.len() as u32;
        buffer.clear();
        Ok(())
    }

    /// Makes durable what is written.
    pub fn sync(&mut self) -> io::Result<()> {
        if self.marks.synced < self.written() {
            let file = self.reader.segments.lock().back().map(|segment| segment.file.clone());
            if let Some(file) = file {
                file.sync()?;
            }
            self.marks.synced = self.written();
            self.note_marks();
        }
        Ok(())
    }

    fn note_marks(&self) {
        if let Err(why) = self.marks_file.write_at(&self.marks.bytes(), 0) {
            warn!(dir = %self.dir.display(), %why, "could not note how far the journal is synced");
        }
    }

    /// Has a file ready for the next segment, if one may be needed soon. Not being able to is found
    /// out again when it is needed.
    pub fn prepare(&mut self) {
        let (_, end) = self.active();
        if self.spare.is_none() && u64::from(end) > self.segment_bytes / 2 {
            match self.make_spare() {
                Ok(file) => self.spare = Some(file),
                Err(why) => warn!(dir = %self.dir.display(), %why, "could not prepare a segment"),
            }
        }
    }

    fn make_spare(&self) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.create(&self.dir.join(SPARE))?;
        file.allocate(self.segment_bytes)?;
        file.sync()?;
        Ok(file)
    }

    /// Begins a segment with the next record.
    fn begin(&mut self) -> Result<(), WriteError> {
        let file = match self.spare.take() {
            Some(file) => file,
            None => self.make_spare().map_err(|error| match is_full(&error) {
                true => WriteError::NoRoom(error),
                false => WriteError::Failed(error),
            })?,
        };
        let first = self.next;
        let salt = rand::random();
        let path = segment_path(&self.dir, first.0);
        let made = file
            .write_at(&frame::segment_header(&self.id, first, salt), 0)
            .and_then(|()| file.sync())
            .and_then(|()| self.disk.rename(&self.dir.join(SPARE), &path))
            .and_then(|()| self.disk.sync_dir(&self.dir));
        made.map_err(WriteError::Failed)?;
        let mut segments = self.reader.segments.lock();
        // One without a record, left by an earlier life, has just been replaced.
        segments.retain(|segment| segment.first != first.0);
        segments.push_back(Segment { first: first.0, path, file, salt, offsets: Vec::new(), end: SEGMENT_HEADER_BYTES as u32 });
        self.open = true;
        Ok(())
    }

    /// Records up to `upto` are no longer needed; those that are not durable yet stay.
    pub fn trim(&mut self, upto: Position) -> io::Result<()> {
        let upto = upto.min(self.marks.synced);
        if upto <= self.marks.trimmed {
            return Ok(());
        }
        self.marks.trimmed = upto;
        self.note_marks();
        while let Some((path, file)) = self.take_trimmed() {
            // Each on its own and oldest first: a loss of power leaves no gap.
            if self.spare.is_none() {
                self.disk.rename(&path, &self.dir.join(SPARE))?;
                self.disk.sync_dir(&self.dir)?;
                self.spare = Some(file);
            } else {
                self.disk.remove_file(&path)?;
                self.disk.sync_dir(&self.dir)?;
            }
        }
        Ok(())
    }

    fn take_trimmed(&self) -> Option<(PathBuf, Arc<dyn DiskFile>)> {
        let mut segments = self.reader.segments.lock();
        let successor = segments.get(1)?;
        if successor.first > self.marks.trimmed.0 + 1 {
            return None;
        }
        segments.pop_front().map(|segment| (segment.path, segment.file))
    }
}

impl SegmentReader {
    /// Records from `from` on: those of one segment, of at most `bytes_max` as frames, but at least
    /// one. None when `from` has not been written.
    pub fn read(&self, from: Position, bytes_max: usize) -> Result<Vec<Record>, JournalError> {
        let (file, path, salt, start, bytes) = {
            let segments = self.segments.lock();
            let at = segments.partition_point(|segment| segment.first <= from.0);
            let Some(segment) = at.checked_sub(1).map(|at| &segments[at]) else {
                return Err(JournalError::Trimmed { upto: gone(&segments) });
            };
            let Some(&start) = segment.offsets.get((from.0 - segment.first) as usize) else {
                return Ok(Vec::new());
            };
            let later = &segment.offsets[(from.0 - segment.first) as usize + 1..];
            let limit = u64::from(start) + bytes_max as u64;
            let whole = later.partition_point(|&end| u64::from(end) <= limit);
            let end = match whole.checked_sub(1) {
                _ if u64::from(segment.end) <= limit => segment.end,
                Some(last) => later[last],
                None => later.first().copied().unwrap_or(segment.end),
            };
            (segment.file.clone(), segment.path.clone(), segment.salt, start, end - start)
        };
        let mut bytes = vec![0; bytes as usize];
        let count = file.read_at(&mut bytes, start.into()).map_err(|source| JournalError::io("read", &path, source))?;
        bytes.truncate(count);
        parse(Bytes::from(bytes), salt, from, start).map_err(|offset| {
            // The file may have been given to a new segment meanwhile.
            let segments = self.segments.lock();
            if segments.iter().any(|segment| segment.salt == salt && segment.path == path) {
                JournalError::damaged(&path, offset, "a frame that had been intact is not")
            } else {
                JournalError::Trimmed { upto: gone(&segments) }
            }
        })
    }
}

/// The records in `bytes`, which were at `start` in their file; or where they stop making sense.
fn parse(bytes: Bytes, salt: u32, from: Position, start: u32) -> Result<Vec<Record>, usize> {
    let mut records = Vec::new();
    let mut at = 0;
    let mut position = from;
    while at < bytes.len() || records.is_empty() {
        match frame::read(salt, &bytes[at..]) {
            Some((header, payload)) if header.position == position => {
                records.push(Record { position, payload: bytes.slice_ref(payload) });
                at += frame::frame_bytes(payload);
                position = position.next();
            }
            _ => return Err(start as usize + at),
        }
    }
    Ok(records)
}

/// The last record before the first that is in a file.
fn gone(segments: &VecDeque<Segment>) -> Position {
    segments.front().map_or(Position(u64::MAX), |segment| Position(segment.first).before())
}

/// Whether something was refused for lack of room, and nothing else is wrong.
pub(crate) fn is_full(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::NOSPC, Errno::DQUOT].iter().any(|full| error.raw_os_error() == Some(full.raw_os_error()))
}
