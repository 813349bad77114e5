//! What the store knows in memory: where each chunk lies, and what each segment is worth.
//!
//! Pure: no file and no clock. About 80 bytes per chunk.
//!
//! A *grave* is a data frame on disk that no longer counts. As long as a chunk has graves and is
//! not held, one tombstone of it must stay on disk, or the grave would be taken for the chunk at
//! the next start.

use std::collections::{BTreeMap, HashMap};

use ctfs_types::ChunkId;

use super::frame::{Entry, FRAME_HEADER_BYTES};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    pub segment: u32,
    pub offset: u32,
    /// Payload bytes.
    pub stored: u32,
    /// Seconds after the store was opened until which the chunk is not deleted.
    pub pinned_until: u32,
    /// A read failed or the bytes did not match: the next put writes it again.
    pub doubtful: bool,
}

impl Location {
    pub fn at(&self, segment: u32, offset: u32) -> bool {
        self.segment == segment && self.offset == offset
    }

    pub fn frame_len(&self) -> u64 {
        FRAME_HEADER_BYTES as u64 + u64::from(self.stored)
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    /// Length of the file.
    pub bytes: u64,
    pub live_bytes: u64,
    pub live_frames: u32,
    pub tombstones: u32,
    pub salt: u64,
    /// Never appended to again.
    pub sealed: bool,
    /// Could not be emptied or removed; left alone until the store is opened again.
    pub stuck: bool,
}

impl Segment {
    pub fn tombstone_bytes(&self) -> u64 {
        u64::from(self.tombstones) * FRAME_HEADER_BYTES as u64
    }
}

#[derive(Debug, Default)]
pub struct State {
    pub index: BTreeMap<ChunkId, Location>,
    pub segments: BTreeMap<u32, Segment>,
    /// Data frames on disk that do not count, by chunk.
    pub graves: HashMap<ChunkId, u32>,
}

impl State {
    /// Takes over a frame that is durable at its place, as the newest word on its chunk.
    pub fn replay(&mut self, segment: u32, entry: &Entry) {
        if entry.tombstone {
            self.bury(&entry.id);
            self.segment_mut(segment).tombstones += 1;
        } else {
            self.hold(entry.id, segment, entry.offset, entry.stored, 0);
        }
    }

    /// Makes this frame the one that counts.
    pub fn hold(&mut self, id: ChunkId, segment: u32, offset: u32, stored: u32, pinned_until: u32) {
        let pinned_until = pinned_until.max(self.index.get(&id).map_or(0, |old| old.pinned_until));
        self.bury(&id);
        let location = Location { segment, offset, stored, pinned_until, doubtful: false };
        let into = self.segment_mut(segment);
        into.live_bytes += location.frame_len();
        into.live_frames += 1;
        self.index.insert(id, location);
    }

    /// Removes a chunk from the index; its frame becomes a grave.
    pub fn bury(&mut self, id: &ChunkId) -> Option<Location> {
        let old = self.index.remove(id)?;
        self.add_grave(*id);
        let segment = self.segment_mut(old.segment);
        segment.live_bytes -= old.frame_len();
        segment.live_frames -= 1;
        Some(old)
    }

    /// Undoes [`State::bury`].
    pub fn exhume(&mut self, id: ChunkId, location: Location) {
        self.remove_graves(&id, 1);
        let segment = self.segment_mut(location.segment);
        segment.live_bytes += location.frame_len();
        segment.live_frames += 1;
        self.index.insert(id, location);
    }

    pub fn add_grave(&mut self, id: ChunkId) {
        *self.graves.entry(id).or_default() += 1;
    }

    fn remove_graves(&mut self, id: &ChunkId, count: u32) {
        if let Some(graves) = self.graves.get_mut(id) {
            *graves = graves.saturating_sub(count);
            if *graves == 0 {
                self.graves.remove(id);
            }
        }
    }

    /// Tombstones of a segment that must outlive it: those with a grave in another segment.
    pub fn tombstones_needed(&self, entries: &[Entry]) -> Vec<ChunkId> {
        let mut own: HashMap<ChunkId, u32> = HashMap::new();
        for entry in entries.iter().filter(|entry| !entry.tombstone) {
            *own.entry(entry.id).or_default() += 1;
        }
        let mut needed: Vec<ChunkId> = entries
            .iter()
            .filter(|entry| entry.tombstone && !self.index.contains_key(&entry.id))
            .filter(|entry| self.graves.get(&entry.id).copied().unwrap_or(0) > own.get(&entry.id).copied().unwrap_or(0))
            .map(|entry| entry.id)
            .collect();
        needed.sort_unstable();
        needed.dedup();
        needed
    }

    /// Forgets a segment whose file is gone. Nothing in it is live.
    pub fn forget_segment(&mut self, number: u32, entries: &[Entry]) {
        if let Some(segment) = self.segments.remove(&number) {
            assert_eq!(segment.live_frames, 0, "a removed segment holds nothing that counts");
        }
        for entry in entries.iter().filter(|entry| !entry.tombstone) {
            self.remove_graves(&entry.id, 1);
        }
    }

    pub fn segment_mut(&mut self, number: u32) -> &mut Segment {
        self.segments.entry(number).or_default()
    }

    pub fn stored_bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.bytes).sum()
    }

    pub fn live_bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.live_bytes).sum()
    }
}
