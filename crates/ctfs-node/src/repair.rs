//! Repair is pull: each server fetches the chunks that placement gives it and it does not hold,
//! and drops the ones it holds beyond placement once the others are known to be safe.
//!
//! No server decides for another, so no coordinator can be lost. A walk visits every chunk
//! record of the local replica; between walks, chunks that were just written or found damaged
//! are looked at one by one.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use ctfs_chunk::{ChunkError, ChunkStore, Chunks, Deleted, Ensured, Released, Server, StoreError};
use ctfs_consensus::Consensus;
use ctfs_meta::SharedNamespace;
use ctfs_types::ChunkId;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};

use crate::stop;

/// A whole walk without any reason: a missed event is noticed after this long.
const WALK_EVERY: Duration = Duration::from_secs(600);
/// A walk that could not fetch everything is made again after this long, twice as long each time
/// up to the maximum: mostly a server was being restarted, and somebody may wait for the copies.
const WALK_AGAIN: Duration = Duration::from_secs(2);
const WALK_AGAIN_MAX: Duration = Duration::from_secs(30);
/// A chunk just written is looked at after this long: its writer is still placing copies.
const SETTLE: Duration = Duration::from_secs(3);
/// Chunk records read under one hold of the replica's lock.
const PAGE: usize = 512;
/// Fetches at a time; more would push the programs' own reads aside.
const FETCHES: usize = 4;
/// Chunks remembered between walks; past it the next walk finds them anyway.
const WANTED_MAX: usize = 100_000;

/// A number for a placement: servers that walked for the same one looked for the same chunks.
pub fn placement_mark(servers: &[Server]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for server in servers {
        hasher.update(&server.node.0.to_le_bytes()).update(&server.weight.to_le_bytes());
        hasher.update(&(server.zone.len() as u64).to_le_bytes()).update(server.zone.as_bytes());
    }
    u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight of 32 bytes"))
}

pub struct Repair {
    consensus: Consensus,
    replica: SharedNamespace,
    store: Arc<ChunkStore>,
    chunks: Chunks,
    wanted: Mutex<BTreeSet<(Instant, ChunkId)>>,
    walk: AtomicBool,
    wake: Notify,
    progress: Progress,
    /// Walks in a row that could not fetch everything.
    failed_walks: AtomicU64,
}

/// What repair is doing, for `ctfs status`.
#[derive(Debug, Default)]
pub struct Progress {
    pub walking: AtomicBool,
    pub walked: AtomicU64,
    pub total: AtomicU64,
    pub fetched: AtomicU64,
    pub dropped: AtomicU64,
    /// One lock for all of it: who reads the result of one walk beside the name of another would
    /// take a server for complete that is not.
    last: Mutex<Walked>,
}

/// What the last finished walk found.
#[derive(Debug, Clone, Copy, Default)]
pub struct Walked {
    /// The placement it was made for, as [`placement_mark`].
    pub placement: u64,
    /// Log index the replica had reached before it began.
    pub at: u64,
    /// Chunks placed here that it could not get, or not keep.
    pub missing: u64,
    /// Of these, chunks the own store has no room for.
    pub refused: u64,
}

/// Chunks that belong here and are not here.
#[derive(Debug, Clone, Copy, Default)]
struct Lacking {
    all: u64,
    no_room: u64,
}

impl std::iter::Sum for Lacking {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), |sum, part| Self { all: sum.all + part.all, no_room: sum.no_room + part.no_room })
    }
}

impl Repair {
    pub fn new(consensus: Consensus, store: Arc<ChunkStore>, chunks: Chunks) -> Arc<Self> {
        Arc::new(Self {
            replica: consensus.replica(),
            consensus,
            store,
            chunks,
            wanted: Mutex::default(),
            walk: AtomicBool::new(true),
            wake: Notify::new(),
            progress: Progress::default(),
            failed_walks: AtomicU64::new(0),
        })
    }

    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    pub fn walked(&self) -> Walked {
        *self.progress.last.lock()
    }

    /// Looks at one chunk soon: it was just written, or its copy here was found damaged.
    pub fn want(&self, chunk: ChunkId) {
        let mut wanted = self.wanted.lock();
        if wanted.len() < WANTED_MAX {
            wanted.insert((Instant::now() + SETTLE, chunk));
        }
    }

    /// Walks all chunks soon: the members changed, or a snapshot was installed.
    pub fn walk_soon(&self) {
        self.walk.store(true, Relaxed);
        self.wake.notify_one();
    }

    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut last_walk = Instant::now();
        loop {
            let next = self.wanted.lock().first().map(|(at, _)| *at);
            let until = next.unwrap_or(Instant::now() + WALK_EVERY).min(last_walk + WALK_EVERY);
            if !self.walk.load(Relaxed) {
                tokio::select! {
                    () = tokio::time::sleep_until(until.into()) => {}
                    () = self.wake.notified() => {}
                    () = stop::requested(&mut stop) => return,
                }
            }
            let work = async {
                if self.walk.swap(false, Relaxed) || last_walk.elapsed() >= WALK_EVERY {
                    self.walk().await;
                    last_walk = Instant::now();
                }
                self.look_at_wanted().await;
            };
            tokio::select! {
                () = work => {}
                () = stop::requested(&mut stop) => return,
            }
        }
    }

    async fn look_at_wanted(&self) {
        let now = Instant::now();
        let due: Vec<ChunkId> = {
            let mut wanted = self.wanted.lock();
            let later = wanted.split_off(&(now, ChunkId([0xff; 32])));
            std::mem::replace(&mut *wanted, later).into_iter().map(|(_, chunk)| chunk).collect()
        };
        let mut due: BTreeSet<ChunkId> = due.into_iter().collect();
        if due.remove(&WALK_MARK) {
            self.walk_soon();
        }
        let records: Vec<(ChunkId, u8)> = {
            let replica = self.replica.read();
            due.iter().filter_map(|id| replica.chunk(id).ok().flatten().filter(|r| r.references > 0).map(|r| (*id, r.copies))).collect()
        };
        if self.tend(&records).await.all > 0 {
            // Whoever should have had the chunk is unreachable: try again later, not at once.
            let mut wanted = self.wanted.lock();
            let later = now + Duration::from_secs(30);
            wanted.extend(records.iter().filter(|(id, _)| !self.store.holds(id)).map(|(id, _)| (later, *id)).take(WANTED_MAX));
        }
    }

    async fn walk(&self) {
        self.progress.walking.store(true, Relaxed);
        self.progress.walked.store(0, Relaxed);
        self.progress.total.store(self.replica.read().chunk_count(), Relaxed);
        let at = self.consensus.applied().borrow().0;
        let placement = placement_mark(self.chunks.placement().servers());
        let finished = self.walk_records().await;
        if let Some(lacking) = finished
            // Else the servers changed meanwhile: the next walk, asked for by that change, counts.
            && placement_mark(self.chunks.placement().servers()) == placement
        {
            *self.progress.last.lock() = Walked { placement, at, missing: lacking.all, refused: lacking.no_room };
        }
        self.drop_unknown().await;
        self.progress.walking.store(false, Relaxed);
        match finished {
            Some(Lacking { all: 0, .. }) => self.failed_walks.store(0, Relaxed),
            Some(lacking) => {
                tracing::warn!(missing = lacking.all, no_room = lacking.no_room, "some chunks that belong here could not be fetched");
                let failed = self.failed_walks.fetch_add(1, Relaxed).min(16) as u32;
                self.walk_after((WALK_AGAIN * 2u32.pow(failed)).min(WALK_AGAIN_MAX));
            }
            None => self.walk_after(WALK_AGAIN_MAX),
        }
    }

    /// `None` when the records cannot be read.
    async fn walk_records(&self) -> Option<Lacking> {
        let mut lacking = Vec::new();
        let mut after = None;
        loop {
            let page = match self.replica.read().chunks(after, PAGE) {
                Ok(page) => page,
                Err(error) => {
                    tracing::error!(%error, "repair cannot read the chunk records");
                    return None;
                }
            };
            let Some((last, _)) = page.last() else { return Some(lacking.into_iter().sum()) };
            after = Some(*last);
            let records: Vec<(ChunkId, u8)> =
                page.iter().filter(|(_, r)| r.references > 0).map(|(id, r)| (*id, r.copies)).collect();
            lacking.push(self.tend(&records).await);
            self.progress.walked.fetch_add(page.len() as u64, Relaxed);
        }
    }

    fn walk_after(&self, wait: Duration) {
        self.wanted.lock().insert((Instant::now() + wait, WALK_MARK));
    }

    /// Fetches what belongs here and drops what does not; returns what it failed to fetch.
    async fn tend(&self, records: &[(ChunkId, u8)]) -> Lacking {
        let slots = Semaphore::new(FETCHES);
        let work = records.iter().map(|&(id, copies)| {
            let slots = &slots;
            async move {
                let _slot = slots.acquire().await.expect("the semaphore is never closed");
                match self.chunks.ensure(id, copies).await {
                    Ok(Ensured::Fetched) => {
                        self.progress.fetched.fetch_add(1, Relaxed);
                        Lacking::default()
                    }
                    Ok(Ensured::AlreadyHere) => Lacking::default(),
                    // What an old replica calls surplus may be placed here by now.
                    Ok(Ensured::NotMine) if !self.store.holds(&id) || self.consensus.barrier().await.is_err() => Lacking::default(),
                    Ok(Ensured::NotMine) => {
                        if self.store.holds(&id) && matches!(self.chunks.release_surplus(id, copies).await, Ok(Released::Released)) {
                            self.progress.dropped.fetch_add(1, Relaxed);
                        }
                        Lacking::default()
                    }
                    Err(error) => {
                        tracing::debug!(chunk = %id, %error, "cannot fetch a chunk that belongs here");
                        let no_room = matches!(error, ChunkError::Store(StoreError::Full { .. }));
                        Lacking { all: 1, no_room: u64::from(no_room) }
                    }
                }
            }
        });
        futures_util::future::join_all(work).await.into_iter().sum()
    }

    /// Deletes copies that the metadata does not know: writes that never committed, or chunks
    /// forgotten while this server was down. The store refuses while they are pinned.
    async fn drop_unknown(&self) {
        let mut after = None;
        loop {
            let ids = self.store.ids_after(after, PAGE);
            let Some(last) = ids.last() else { return };
            after = Some(*last);
            // An old replica does not know what was written last: after a restart, or without a
            // majority, every acknowledged chunk may look unknown.
            if self.consensus.barrier().await.is_err() {
                return;
            }
            let unknown: Vec<ChunkId> = {
                let replica = self.replica.read();
                ids.into_iter().filter(|id| matches!(replica.chunk(id), Ok(None))).collect()
            };
            for id in unknown {
                if matches!(self.store.delete(&id).await, Ok(Deleted::Deleted)) {
                    self.progress.dropped.fetch_add(1, Relaxed);
                }
            }
        }
    }
}

/// Not the hash of anything that was ever stored: see [`Repair::walk_after`].
const WALK_MARK: ChunkId = ChunkId([0; 32]);
