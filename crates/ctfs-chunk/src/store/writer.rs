//! The one thread that changes the store.
//!
//! It takes what is queued, appends it, makes all of it durable with one `fdatasync`, then lets
//! the index know and answers everyone. So nothing is visible before it is durable, and the
//! order of frames on disk is the order in which things happened.
//!
//! When an append fails half-way the file is cut back to where it was. When an `fdatasync` fails
//! nobody knows what is on the disk: the store accepts nothing more until it is opened again,
//! and what was not yet acknowledged is cut off, since the kernel may show bytes as written that
//! it has given up on.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io,
    sync::Arc,
};

use ctfs_types::ChunkId;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tracing::{debug, error, warn};

use super::{
    Deleted, Shared, StoreError, count,
    files::write_all,
    frame::{Entry, Frame, SEGMENT_HEADER_BYTES},
    state::Location,
};

type Done<T> = oneshot::Sender<Result<T, StoreError>>;

pub enum Job {
    Put {
        frame: Frame,
        done: Done<()>,
        /// Its share of the queue's bytes, given back when the job is done.
        _room: OwnedSemaphorePermit,
    },
    /// Compaction: the same frame at a new place, if the chunk is still at `from`. Answers
    /// whether it was.
    Move { frame: Frame, from: (u32, u32), done: Done<bool> },
    Delete { id: ChunkId, done: Done<Deleted> },
    /// Removes a sealed segment in which nothing counts any more. Answers how many bytes it had,
    /// 0 when something in it still counts.
    Retire { segment: u32, done: Done<u64> },
}

/// What one fdatasync covers at most: more would make the first of them wait too long.
const BATCH_BYTES_MAX: usize = 16 << 20;
const BATCH_JOBS_MAX: usize = 512;

pub struct Writer {
    shared: Arc<Shared>,
    active: Option<Active>,
    next_number: u32,
}

/// The segment that is appended to.
struct Active {
    number: u32,
    file: File,
    salt: u64,
    offset: u64,
    /// How far the file is known to be durable.
    synced: u64,
    entries: Vec<Entry>,
}

/// What was appended and is not yet durable.
#[derive(Default)]
struct Batch {
    records: Vec<Record>,
    /// Puts and moves among the records, by chunk.
    pending: HashMap<ChunkId, usize>,
    bytes: usize,
    /// Bytes that puts may still take; asked once per batch.
    room: Option<u64>,
}

enum Record {
    Put { id: ChunkId, place: Place, done: Vec<Done<()>> },
    Move { id: ChunkId, from: (u32, u32), place: Place, done: Done<bool> },
    Delete { segment: u32, done: Done<Deleted> },
}

#[derive(Clone, Copy)]
struct Place {
    segment: u32,
    offset: u32,
    stored: u32,
}

impl Writer {
    pub fn new(shared: Arc<Shared>, active: Option<(u32, Vec<Entry>)>, next_number: u32) -> Result<Self, StoreError> {
        let active = match active {
            None => None,
            Some((number, entries)) => {
                let file = OpenOptions::new().read(true).write(true).open(shared.files.segment_path(number));
                let file = file.map_err(|e| StoreError::io("open last segment", &e))?;
                let segment = *shared.state.lock().segment_mut(number);
                let (salt, offset) = (segment.salt, segment.bytes);
                Some(Active { number, file, salt, offset, synced: offset, entries })
            }
        };
        Ok(Self { shared, active, next_number })
    }

    /// Works until the store is dropped and the queue is empty.
    pub fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(job) = queue.blocking_recv() {
            let mut batch = Batch::default();
            let mut jobs = 1;
            self.take(job, &mut batch);
            while batch.bytes < BATCH_BYTES_MAX && jobs < BATCH_JOBS_MAX {
                let Ok(job) = queue.try_recv() else { break };
                self.take(job, &mut batch);
                jobs += 1;
            }
            self.commit(batch);
            self.retire_dead();
        }
    }

    fn take(&mut self, job: Job, batch: &mut Batch) {
        match job {
            Job::Put { frame, done, _room } => self.take_put(frame, done, batch),
            Job::Move { frame, from, done } => self.take_move(frame, from, done, batch),
            Job::Delete { id, done } => self.take_delete(id, done, batch),
            Job::Retire { segment, done } => {
                self.commit(std::mem::take(batch));
                let _ = done.send(self.retire(segment));
            }
        }
    }

    fn take_put(&mut self, frame: Frame, done: Done<()>, batch: &mut Batch) {
        let id = frame.header.id;
        if let Some(&at) = batch.pending.get(&id)
            && let Record::Put { done: waiting, .. } = &mut batch.records[at]
        {
            waiting.push(done);
            return;
        }
        if self.shared.pin_if_held(&id) {
            let _ = done.send(Ok(()));
            return;
        }
        let needed = frame.len() as u64;
        let shared = &self.shared;
        let room = batch.room.get_or_insert_with(|| {
            let stored = shared.state.lock().stored_bytes();
            shared.room(stored)
        });
        if needed > *room {
            let _ = done.send(Err(StoreError::Full { needed, free: *room }));
            return;
        }
        *room -= needed;
        match self.append(frame) {
            Ok(place) => {
                batch.bytes += needed as usize;
                batch.pending.insert(id, batch.records.len());
                batch.records.push(Record::Put { id, place, done: vec![done] });
            }
            Err(error) => _ = done.send(Err(error)),
        }
    }

    fn take_move(&mut self, frame: Frame, from: (u32, u32), done: Done<bool>, batch: &mut Batch) {
        let id = frame.header.id;
        let there = self.shared.state.lock().index.get(&id).is_some_and(|location| location.at(from.0, from.1));
        if !there || batch.pending.contains_key(&id) {
            let _ = done.send(Ok(false));
            return;
        }
        let len = frame.len();
        match self.append(frame) {
            Ok(place) => {
                batch.bytes += len;
                batch.pending.insert(id, batch.records.len());
                batch.records.push(Record::Move { id, from, place, done });
            }
            Err(error) => _ = done.send(Err(error)),
        }
    }

    fn take_delete(&mut self, id: ChunkId, done: Done<Deleted>, batch: &mut Batch) {
        // Buried before the tombstone is written: a put that comes now must not believe that the
        // chunk is held, and queues behind the tombstone.
        let buried: Result<Location, Deleted> = {
            let mut state = self.shared.state.lock();
            match state.index.get(&id) {
                _ if batch.pending.contains_key(&id) => Err(Deleted::Pinned),
                None => Err(Deleted::Absent),
                Some(location) if self.shared.is_pinned(location) => Err(Deleted::Pinned),
                Some(_) => state.bury(&id).ok_or(Deleted::Absent),
            }
        };
        let location = match buried {
            Ok(location) => location,
            Err(verdict) => {
                let _ = done.send(Ok(verdict));
                return;
            }
        };
        match self.append(Frame::tombstone(id)) {
            Ok(place) => {
                batch.bytes += super::frame::FRAME_HEADER_BYTES;
                batch.records.push(Record::Delete { segment: place.segment, done });
            }
            Err(error) => {
                self.shared.state.lock().exhume(id, location);
                let _ = done.send(Err(error));
            }
        }
    }

    /// Writes a frame behind the last one. Not durable yet; nothing half-written stays.
    fn append(&mut self, mut frame: Frame) -> Result<Place, StoreError> {
        self.shared.check_failed()?;
        let len = frame.len() as u64;
        let full = |active: &Active| {
            active.offset + len > self.shared.settings.segment_bytes && active.offset > SEGMENT_HEADER_BYTES as u64
        };
        if self.active.as_ref().is_some_and(full) {
            self.seal()?;
        }
        let shared = self.shared.clone();
        let active = self.active()?;
        let offset = active.offset;
        if let Err(error) = write_all(&*shared.disk, &active.file, frame.placed(active.salt, offset), offset) {
            let cut = active.file.set_len(offset);
            return Err(match cut {
                Ok(()) if is_full(&error) => StoreError::Full { needed: len, free: 0 },
                _ => self.fail("write to segment", &error),
            });
        }
        active.offset += len;
        active.entries.push(Entry::of(&frame.header, offset as u32));
        let place = Place { segment: active.number, offset: offset as u32, stored: frame.header.stored_len };
        shared.state.lock().segment_mut(place.segment).bytes = offset + len;
        Ok(place)
    }

    fn active(&mut self) -> Result<&mut Active, StoreError> {
        if self.active.is_none() {
            let number = self.next_number;
            let created = self.shared.files.create(&*self.shared.disk, number);
            let (file, salt) = created.map_err(|error| match is_full(&error) {
                true => StoreError::Full { needed: SEGMENT_HEADER_BYTES as u64, free: 0 },
                false => StoreError::io("create segment", &error),
            })?;
            self.next_number += 1;
            let offset = SEGMENT_HEADER_BYTES as u64;
            {
                let mut state = self.shared.state.lock();
                let segment = state.segment_mut(number);
                segment.salt = salt;
                segment.bytes = offset;
            }
            self.active = Some(Active { number, file, salt, offset, synced: offset, entries: Vec::new() });
        }
        Ok(self.active.as_mut().expect("set above"))
    }

    /// Finishes the active segment: durable, then its index file.
    fn seal(&mut self) -> Result<(), StoreError> {
        self.sync()?;
        let Some(active) = self.active.take() else { return Ok(()) };
        let Active { number, salt, offset, entries, .. } = active;
        if let Err(error) = self.shared.files.write_index(number, salt, offset, &entries) {
            // The next start scans the segment instead.
            warn!(segment = number, %error, "could not write the index of a segment");
        }
        self.shared.state.lock().segment_mut(number).sealed = true;
        debug!(segment = number, bytes = offset, "sealed a segment");
        Ok(())
    }

    /// Makes all that was appended durable.
    fn sync(&mut self) -> Result<(), StoreError> {
        self.shared.check_failed()?;
        let Some(active) = self.active.as_mut().filter(|active| active.synced < active.offset) else { return Ok(()) };
        count(&self.shared.counters.syncs, 1);
        match self.shared.disk.sync(&active.file) {
            Ok(()) => {
                active.synced = active.offset;
                Ok(())
            }
            Err(error) => Err(self.fail("sync segment", &error)),
        }
    }

    /// Stops accepting anything, and cuts off what nobody was told is durable.
    fn fail(&mut self, what: &str, error: &io::Error) -> StoreError {
        let why = format!("{what}: {error}");
        error!(what, %error, "chunk store accepts nothing more until it is opened again");
        let _ = self.shared.failed.set(why.clone());
        if let Some(active) = &mut self.active {
            // Best effort: a frame that stays was never in the index and is only read at the next
            // start, where its checksums are looked at.
            let _ = active.file.set_len(active.synced);
            active.offset = active.synced;
            active.entries.retain(|entry| u64::from(entry.offset) < active.synced);
            self.shared.state.lock().segment_mut(active.number).bytes = active.synced;
        }
        StoreError::Failed(why)
    }

    /// Makes the batch durable, then visible, then answers.
    fn commit(&mut self, batch: Batch) {
        if batch.records.is_empty() {
            return;
        }
        if let Err(error) = self.sync() {
            for record in batch.records {
                record.refuse(&error);
            }
            return;
        }
        let pinned_until = self.shared.pin_end();
        let mut answers: Vec<Box<dyn FnOnce()>> = Vec::with_capacity(batch.records.len());
        {
            let mut state = self.shared.state.lock();
            for record in batch.records {
                match record {
                    Record::Put { id, place, done } => {
                        state.hold(id, place.segment, place.offset, place.stored, pinned_until);
                        count(&self.shared.counters.puts, 1);
                        count(&self.shared.counters.put_bytes, u64::from(place.stored));
                        answers.push(Box::new(move || {
                            for done in done {
                                let _ = done.send(Ok(()));
                            }
                        }));
                    }
                    Record::Move { id, from, place, done } => {
                        let there = state.index.get(&id).is_some_and(|location| location.at(from.0, from.1));
                        if there {
                            state.hold(id, place.segment, place.offset, place.stored, 0);
                        } else {
                            state.add_grave(id);
                        }
                        answers.push(Box::new(move || _ = done.send(Ok(there))));
                    }
                    Record::Delete { segment, done } => {
                        state.segment_mut(segment).tombstones += 1;
                        count(&self.shared.counters.deletes, 1);
                        answers.push(Box::new(move || _ = done.send(Ok(Deleted::Deleted))));
                    }
                }
            }
        }
        for answer in answers {
            answer();
        }
    }

    /// Removes the sealed segments in which nothing counts.
    fn retire_dead(&mut self) {
        let dead: Vec<u32> = {
            let state = self.shared.state.lock();
            let dead = state.segments.iter().filter(|(_, segment)| {
                // Many tombstones are left to compaction, which looks how many are still needed:
                // moving them on forever would never end.
                segment.sealed && !segment.stuck && segment.live_frames == 0 && segment.tombstone_bytes() * 4 <= segment.bytes
            });
            dead.map(|(number, _)| *number).collect()
        };
        for number in dead {
            match self.retire(number) {
                Ok(_) => {}
                Err(StoreError::Failed(_)) => return,
                Err(error) => {
                    warn!(segment = number, %error, "could not remove a segment");
                    self.shared.state.lock().segment_mut(number).stuck = true;
                }
            }
        }
    }

    /// Removes a sealed segment in which nothing counts; its tombstones that are still needed
    /// move on first.
    fn retire(&mut self, number: u32) -> Result<u64, StoreError> {
        self.shared.check_failed()?;
        let segment = match self.shared.state.lock().segments.get(&number) {
            Some(segment) if segment.sealed && segment.live_frames == 0 => *segment,
            _ => return Ok(0),
        };
        let shared = self.shared.clone();
        let entries = shared.files.entries(number, segment.salt, segment.bytes);
        let entries = entries.map_err(|e| StoreError::io("read index of segment", &e))?;
        let needed = shared.state.lock().tombstones_needed(&entries);
        for id in &needed {
            let place = self.append(Frame::tombstone(*id))?;
            shared.state.lock().segment_mut(place.segment).tombstones += 1;
        }
        self.sync()?;
        shared.files.remove(number).map_err(|e| StoreError::io("remove segment", &e))?;
        shared.state.lock().forget_segment(number, &entries);
        debug!(segment = number, bytes = segment.bytes, tombstones = needed.len(), "removed a segment");
        Ok(segment.bytes)
    }
}

impl Record {
    fn refuse(self, error: &StoreError) {
        match self {
            Self::Put { done, .. } => {
                for done in done {
                    let _ = done.send(Err(error.clone()));
                }
            }
            Self::Move { done, .. } => _ = done.send(Err(error.clone())),
            Self::Delete { done, .. } => _ = done.send(Err(error.clone())),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::WriteZero)
}
