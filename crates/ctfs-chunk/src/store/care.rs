//! Care of what is stored: compaction and scrub, one segment per call. The caller sets the pace.

use std::sync::Arc;

use ctfs_types::ChunkId;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tracing::debug;

use super::{
    ChunkStore, Shared, StoreError, closed,
    frame::{Entry, FRAME_HEADER_BYTES, Frame},
    state::{Location, Segment},
    writer::Job,
};

/// One compacted segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compacted {
    pub segment: u32,
    /// Bytes of frames copied to the active segment.
    pub moved: u64,
    /// Bytes of the removed file; 0 when something new came in the way and it stays for now.
    pub freed: u64,
}

/// One scrubbed segment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrubbed {
    pub segment: u32,
    pub chunks: u64,
    pub bytes: u64,
    pub damaged: Vec<ChunkId>,
}

/// A segment with less than this share worth keeping is compacted: the disk then holds at most
/// two thirds more than needed, and each freed byte costs at most 1.5 copied ones.
const WORTH_KEEPING: f64 = 0.6;
/// The share when the store is nearly full: copying more is better than refusing writes.
const WORTH_KEEPING_WHEN_FULL: f64 = 0.85;
/// Frames read and moved together.
const GROUP_BYTES: u64 = 8 << 20;
const GROUP_FRAMES: usize = 128;

impl ChunkStore {
    /// Empties and removes the segment with the smallest share of bytes that count, if any is
    /// below six tenths. `None`: there is nothing to do.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is lost, and a segment that cannot be read is left alone from then
    /// on.
    pub async fn compact(&self) -> Result<Option<Compacted>, StoreError> {
        let _one_at_a_time = self.compacting.lock().await;
        self.shared.check_failed()?;
        let shared = self.shared.clone();
        let picked = tokio::task::spawn_blocking(move || shared.pick()).await.map_err(|_| closed())?;
        let Some((number, entries)) = picked else { return Ok(None) };
        let result = self.empty(number, entries).await;
        if let Err(StoreError::Io { .. }) = result {
            self.shared.state.lock().segment_mut(number).stuck = true;
        }
        result.map(Some)
    }

    async fn empty(&self, number: u32, entries: Vec<Entry>) -> Result<Compacted, StoreError> {
        let mut moved = 0;
        let mut rest = &entries[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |entry: &&Entry| {
                bytes += entry.frame_len();
                bytes <= GROUP_BYTES
            };
            let len = rest.iter().take(GROUP_FRAMES).take_while(fits).count().max(1);
            let (group, later) = rest.split_at(len);
            rest = later;

            let (shared, group) = (self.shared.clone(), group.to_vec());
            let frames = tokio::task::spawn_blocking(move || shared.live_frames(number, &group));
            let frames = frames.await.map_err(|_| closed())??;
            let jobs = self.jobs.as_ref().ok_or_else(closed)?;
            let mut answers = Vec::with_capacity(frames.len());
            for (location, frame) in frames {
                let (done, answer) = oneshot::channel();
                let from = (location.segment, location.offset);
                jobs.send(Job::Move { frame, from, done }).await.map_err(|_| closed())?;
                answers.push((location, answer));
            }
            for (location, answer) in answers {
                if answer.await.map_err(|_| closed())?? {
                    moved += location.frame_len();
                }
            }
        }
        // Perhaps the writer has seen by itself that the segment is empty.
        let bytes = self.shared.state.lock().segments.get(&number).map(|segment| segment.bytes);
        let freed = self.ask(|done| Job::Retire { segment: number, done }).await?;
        let gone = !self.shared.state.lock().segments.contains_key(&number);
        let total = entries.iter().map(Entry::frame_len).sum::<u64>();
        let freed = if gone { freed.max(bytes.unwrap_or(total)) } else { 0 };
        debug!(segment = number, moved, freed, "compacted a segment");
        Ok(Compacted { segment: number, moved, freed })
    }

    /// The lowest-numbered segment above `after`: how a scrub walks the store.
    pub fn next_segment(&self, after: Option<u32>) -> Option<u32> {
        let from = after.map_or(0, |after| after.saturating_add(1));
        self.shared.state.lock().segments.range(from..).map(|(number, _)| *number).next()
    }

    /// Reads and verifies every chunk that lies in `segment`. Blocks on the disk.
    ///
    /// A damaged chunk is marked and reported as by [`ChunkStore::get`]. A segment that is gone
    /// has no chunks.
    ///
    /// # Errors
    /// [`StoreError::Io`] when it cannot be told what the segment holds.
    pub fn scrub_segment(&self, segment: u32) -> Result<Scrubbed, StoreError> {
        let mut report = Scrubbed { segment, ..Scrubbed::default() };
        let Some(entries) = self.shared.entries(segment)? else { return Ok(report) };
        self.shared.files.drop_cached(segment);
        for entry in entries.iter().filter(|entry| !entry.tombstone) {
            if self.shared.counts_at(segment, entry).is_none() {
                continue;
            }
            report.chunks += 1;
            report.bytes += entry.frame_len();
            if !matches!(self.get(&entry.id), Ok(Some(_))) && self.shared.counts_at(segment, entry).is_some() {
                report.damaged.push(entry.id);
            }
        }
        Ok(report)
    }
}

impl Shared {
    /// The segment to compact next, with what it holds.
    fn pick(self: &Arc<Self>) -> Option<(u32, Vec<Entry>)> {
        let capacity = self.settings.capacity;
        let (segments, stored) = {
            let state = self.state.lock();
            (state.segments.clone(), state.stored_bytes())
        };
        let nearly_full = self.room(stored) < capacity / 10;
        let worth = if nearly_full { WORTH_KEEPING_WHEN_FULL } else { WORTH_KEEPING };
        let share = |segment: &Segment, tombstones: u64| {
            (segment.live_bytes + tombstones) as f64 / segment.bytes.max(1) as f64
        };
        let mut candidates: Vec<_> = segments
            .iter()
            .filter(|(_, segment)| segment.sealed && !segment.stuck && share(segment, 0) < worth)
            .map(|(&number, segment)| (share(segment, segment.tombstone_bytes()), number))
            .collect();
        candidates.sort_by(|a, b| a.0.total_cmp(&b.0));

        // A segment of many tombstones is worth it only when few are needed, which its entries
        // tell. Looking at more than a few per call would read too much.
        for (estimate, number) in candidates.into_iter().take(4) {
            let Ok(Some(entries)) = self.entries(number) else {
                self.state.lock().segment_mut(number).stuck = true;
                continue;
            };
            let needed = if estimate < worth { 0 } else { self.state.lock().tombstones_needed(&entries).len() };
            if share(&segments[&number], (needed * FRAME_HEADER_BYTES) as u64) < worth {
                return Some((number, entries));
            }
        }
        None
    }

    /// What a segment holds on disk; `None` when it is gone.
    fn entries(&self, number: u32) -> Result<Option<Vec<Entry>>, StoreError> {
        let Some(segment) = self.state.lock().segments.get(&number).copied() else { return Ok(None) };
        match self.files.entries(number, segment.salt, segment.bytes) {
            Ok(entries) => Ok(Some(entries)),
            Err(_) if !self.state.lock().segments.contains_key(&number) => Ok(None),
            Err(error) => Err(StoreError::io("read index of segment", &error)),
        }
    }

    /// Where the chunk lies, if this frame is the one that counts.
    fn counts_at(&self, segment: u32, entry: &Entry) -> Option<Location> {
        self.state.lock().index.get(&entry.id).copied().filter(|location| location.at(segment, entry.offset))
    }

    /// Those frames of the segment that count. A copy that is certainly bad is given up here: it
    /// must not keep the segment alive, and repair has been told.
    fn live_frames(&self, number: u32, entries: &[Entry]) -> Result<Vec<(Location, Frame)>, StoreError> {
        let mut frames = Vec::new();
        for entry in entries.iter().filter(|entry| !entry.tombstone) {
            let Some(location) = self.counts_at(number, entry) else { continue };
            let salt = self.state.lock().segments.get(&number).map_or(0, |segment| segment.salt);
            match self.read_at(&entry.id, &location, salt) {
                Ok(Some(frame)) => frames.push((location, frame)),
                Ok(None) => {
                    self.doubt(&entry.id, &location);
                    let mut state = self.state.lock();
                    if state.index.get(&entry.id).is_some_and(|now| now.at(number, entry.offset)) {
                        state.bury(&entry.id);
                    }
                }
                Err(error) => {
                    self.doubt(&entry.id, &location);
                    return Err(StoreError::io("read chunk to move", &error));
                }
            }
        }
        Ok(frames)
    }
}
