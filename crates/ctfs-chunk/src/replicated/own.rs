//! Reading this server's own disk, which may hang.
//!
//! A read that is late goes on beside the question to peers, and the first whole copy is taken. The
//! thread of a read that never ends is left to itself: each holds one of the permits for disk reads,
//! so a hung disk costs a bounded number of threads, and once they are gone every read asks peers.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ctfs_types::ChunkId;
use parking_lot::Mutex;
use tokio::{
    sync::Semaphore,
    time::{timeout, timeout_at},
};
use tracing::warn;

use super::{ChunkError, Chunks, counters::count};
use crate::store::StoreError;

/// Reads of the own disk at a time; more would only queue in the kernel and take threads. Also the
/// most threads that a hung disk can hold on to.
const DISK_READS: usize = 32;

/// The reads of the own disk that are under way.
pub(super) struct DiskReads {
    permits: Arc<Semaphore>,
    began: Arc<Mutex<Began>>,
}

/// When each began, by number; the numbers grow, so the first is the oldest.
#[derive(Default)]
struct Began {
    next: u64,
    reads: BTreeMap<u64, Instant>,
}

impl Default for DiskReads {
    fn default() -> Self {
        Self { permits: Arc::new(Semaphore::new(DISK_READS)), began: Arc::default() }
    }
}

impl DiskReads {
    /// Whether a read has been under way for longer than `patience`.
    fn is_late(&self, patience: Duration) -> bool {
        self.began.lock().reads.first_key_value().is_some_and(|(_, began)| began.elapsed() >= patience)
    }

    /// Reads on a blocking thread. Dropped, the read goes on, holding its permit.
    async fn run<T: Send + 'static>(&self, read: impl FnOnce() -> T + Send + 'static) -> Result<T, StoreError> {
        let cut_off = |why: String| StoreError::Failed(format!("read of a chunk was cut off: {why}"));
        let permit = self.permits.clone().acquire_owned().await.map_err(|e| cut_off(e.to_string()))?;
        let underway = Underway::new(&self.began);
        let read = tokio::task::spawn_blocking(move || {
            let _held = (permit, underway);
            read()
        });
        read.await.map_err(|e| cut_off(e.to_string()))
    }
}

struct Underway {
    number: u64,
    began: Arc<Mutex<Began>>,
}

impl Underway {
    fn new(began: &Arc<Mutex<Began>>) -> Self {
        let mut now = began.lock();
        let number = now.next;
        now.next += 1;
        now.reads.insert(number, Instant::now());
        Self { number, began: began.clone() }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.began.lock().reads.remove(&self.number);
    }
}

impl Chunks {
    /// The whole chunk, from the own disk or from peers.
    pub(super) async fn get_whole(&self, id: ChunkId) -> Result<Bytes, ChunkError> {
        let settings = &self.shared.settings;
        let deadline = tokio::time::Instant::now() + settings.get_deadline;
        // While one read hangs, no other waits for the disk alone.
        let hung = self.shared.disk_reads.is_late(settings.disk_patience);
        let patience = if hung { Duration::ZERO } else { settings.disk_patience.min(settings.get_deadline) };
        let own = self.get_own(id);
        tokio::pin!(own);
        match timeout(patience, &mut own).await {
            Ok(Ok(Some(bytes))) => return Ok(self.count_own(bytes)),
            Ok(_) => return self.fetch(id).await,
            Err(_) => {}
        }
        if !hung {
            warn!(chunk = %id, ?patience, "the own disk is late, asking peers");
        }
        count(&self.shared.counters.disk_late, 1);
        let fetched = self.fetch(id);
        tokio::pin!(fetched);
        let error = tokio::select! {
            read = &mut own => return match read {
                Ok(Some(bytes)) => Ok(self.count_own(bytes)),
                _ => fetched.await,
            },
            fetched = &mut fetched => match fetched {
                Ok(bytes) => return Ok(bytes),
                Err(error) => error,
            },
        };
        // Nobody else has it, or can be reached: the disk may still answer.
        match timeout_at(deadline, own).await {
            Ok(Ok(Some(bytes))) => return Ok(self.count_own(bytes)),
            Ok(_) => return Err(error),
            Err(_) => {}
        }
        Err(match error {
            ChunkError::Unavailable { id, asked, mut reasons } => {
                reasons.0.push((self.shared.local, "its own disk does not answer".to_owned()));
                ChunkError::Unavailable { id, asked: asked + 1, reasons }
            }
            other => other,
        })
    }

    fn count_own(&self, bytes: Bytes) -> Bytes {
        count(&self.shared.counters.own_hits, 1);
        count(&self.shared.counters.own_bytes, bytes.len() as u64);
        bytes
    }

    /// Reads the own store without blocking the runtime, for as long as the disk takes.
    pub(super) async fn get_own(&self, id: ChunkId) -> Result<Option<Bytes>, StoreError> {
        if !self.shared.store.holds(&id) {
            return Ok(None);
        }
        let store = self.shared.store.clone();
        let bytes = self.shared.disk_reads.run(move || store.get(&id)).await.and_then(|read| read);
        if let Err(error) = &bytes {
            warn!(chunk = %id, %error, "could not read the own copy of a chunk");
        }
        bytes
    }
}
