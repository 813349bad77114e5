//! Chunks as the cluster holds them: read from wherever they are, written to where they belong.
//!
//! [`Chunks::get`] looks into this server's store, then asks peers, and returns bytes that match
//! their name. [`Chunks::put`] returns when enough servers have the chunk on stable storage.
//! [`Chunks::ensure`] and [`Chunks::release_surplus`] move the cluster toward what placement says,
//! one chunk on one server at a time. The `serve_*` functions are the other end of peers' calls.
//!
//! Every wait has a bound from [`ChunkSettings`]. Reading order: [`peers`] (what is needed of the
//! network), this file, [`own`] (reading this server's disk), [`fetch`] (how a chunk is found), [`store`] (how it
//! is stored).

mod counters;
mod fetch;
mod own;
mod peers;
mod store;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use ctfs_types::{ChunkId, NodeId, limits::CHUNK_BYTES_MAX};
use futures_util::future::join_all;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Semaphore;

pub use self::{
    counters::ChunkCounts,
    peers::{ChunkPeers, PeerError},
};
use self::{
    counters::{Counters, count},
    fetch::Flight,
    own::DiskReads,
};
use crate::{
    Placement,
    store::{ChunkStore, Deleted, StoreError},
};

#[derive(Debug, Clone)]
pub struct ChunkSettings {
    /// How long the own disk may take before peers are asked beside it. 1 s: a busy hard disk is
    /// faster, and asking costs the network the whole chunk.
    pub disk_patience: Duration,
    /// A get gives up after this long, whoever is still being asked.
    pub get_deadline: Duration,
    /// The next peer is asked when one has not answered after three round trips, but not before
    /// this; it doubles with each peer asked, so that a slow link is not flooded.
    pub hedge_after: Duration,
    /// How long one peer may take to store a chunk before the next in rank is tried.
    pub peer_put_deadline: Duration,
    /// A put gives up after this long.
    pub put_deadline: Duration,
    /// How long a peer may take to say what it has.
    pub ask_deadline: Duration,
}

impl Default for ChunkSettings {
    fn default() -> Self {
        Self {
            disk_patience: Duration::from_secs(1),
            get_deadline: Duration::from_secs(10),
            hedge_after: Duration::from_millis(30),
            peer_put_deadline: Duration::from_secs(3),
            put_deadline: Duration::from_secs(10),
            ask_deadline: Duration::from_secs(2),
        }
    }
}

/// What each server that was asked had to say, for logs and error messages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reasons(pub Vec<(NodeId, String)>);

impl fmt::Display for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (node, reason)) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{node}: {reason}")?;
        }
        Ok(())
    }
}

/// Why a chunk could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Some server that may have it did not answer in time; it may come back.
    #[error("chunk {id} is not available, {asked} servers were asked ({reasons})")]
    Unavailable { id: ChunkId, asked: usize, reasons: Reasons },
    /// Every server of the cluster answered, and none has a whole copy.
    #[error("chunk {id} is lost: none of the {asked} servers has it")]
    Lost { id: ChunkId, asked: usize },
    /// The metadata wants more bytes than the chunk has.
    #[error("chunk {id} has {got} bytes where {wanted} are wanted")]
    Short { id: ChunkId, got: usize, wanted: usize },
    /// This server's own store would not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a chunk is not stored as its file asks. Copies that were made stay and do no harm.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutError {
    #[error("only {got} of {wanted} servers stored the chunk ({reasons})")]
    TooFewCopies { wanted: usize, got: usize, reasons: Reasons },
    /// Too few servers stored it, and all that did not refused for want of space.
    #[error("too few chunk stores have room")]
    Full,
    #[error("a chunk of {len} bytes is over the limit of {CHUNK_BYTES_MAX}")]
    TooLong { len: usize },
}

/// A stored chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub id: ChunkId,
    /// The servers that have it on stable storage.
    pub holders: Vec<NodeId>,
}

/// Whether a server holds a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Located {
    Yes,
    No,
    Unknown(PeerError),
}

/// What [`Chunks::ensure`] found or did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ensured {
    AlreadyHere,
    Fetched,
    /// Placement does not give the chunk to this server.
    NotMine,
}

/// What [`Chunks::release_surplus`] found or did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Released {
    /// Dropped: every server that should hold it said that it does.
    Released,
    NotHeld,
    /// Placement gives the chunk to this server.
    Mine,
    /// Put or asked for a short time ago.
    Pinned,
    /// These servers should hold it and did not say that they do.
    Missing(Vec<NodeId>),
}

/// Fetched chunks being stored in the background at a time. When there are more, the copy is
/// left to repair.
const BACKGROUND_STORES: usize = 16;

/// Replicated access to chunks. Cheap to clone.
#[derive(Clone)]
pub struct Chunks {
    shared: Arc<Shared>,
}

struct Shared {
    local: NodeId,
    store: Arc<ChunkStore>,
    peers: Arc<dyn ChunkPeers>,
    settings: ChunkSettings,
    cluster: RwLock<Arc<Cluster>>,
    /// Fetches under way.
    flights: Mutex<HashMap<ChunkId, Flight>>,
    disk_reads: DiskReads,
    background: Arc<Semaphore>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Cluster {
    placement: Placement,
    /// Members that get no chunks but may hold some, e.g. those away.
    others: Vec<NodeId>,
}

impl Chunks {
    /// Starts with an empty placement: until [`Chunks::set_placement`] nothing can be put.
    pub fn new(local: NodeId, store: Arc<ChunkStore>, peers: Arc<dyn ChunkPeers>, settings: ChunkSettings) -> Self {
        let shared = Shared {
            local,
            store,
            peers,
            settings,
            cluster: RwLock::default(),
            flights: Mutex::default(),
            disk_reads: DiskReads::default(),
            background: Arc::new(Semaphore::new(BACKGROUND_STORES)),
            counters: Counters::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Who takes chunks from now on.
    pub fn set_placement(&self, placement: Placement) {
        let mut cluster = self.shared.cluster.write();
        *cluster = Arc::new(Cluster { placement, others: cluster.others.clone() });
    }

    /// All servers of the cluster, also those that placement passes over: they may hold copies,
    /// so they are asked last, and a chunk is not called lost before they have answered.
    pub fn set_members(&self, members: Vec<NodeId>) {
        let mut cluster = self.shared.cluster.write();
        *cluster = Arc::new(Cluster { placement: cluster.placement.clone(), others: members });
    }

    pub fn placement(&self) -> Placement {
        self.cluster().placement.clone()
    }

    pub fn local(&self) -> NodeId {
        self.shared.local
    }

    pub fn store(&self) -> &Arc<ChunkStore> {
        &self.shared.store
    }

    pub fn counts(&self) -> ChunkCounts {
        self.shared.counters.read()
    }

    /// The first `len` bytes of a chunk, which may hold more.
    ///
    /// From the own store, else, or when the disk is late, from peers: those that should hold it nearest first, then all
    /// others, the next one whenever one is late. From wherever, the bytes match their name.
    ///
    /// # Errors
    /// [`ChunkError::Unavailable`] within [`ChunkSettings::get_deadline`], [`ChunkError::Lost`],
    /// [`ChunkError::Short`].
    pub async fn get(&self, id: ChunkId, len: u32) -> Result<Bytes, ChunkError> {
        let bytes = self.get_whole(id).await.inspect_err(|_| count(&self.shared.counters.get_failures, 1))?;
        let wanted = len as usize;
        if bytes.len() < wanted {
            return Err(ChunkError::Short { id, got: bytes.len(), wanted });
        }
        Ok(bytes.slice(..wanted))
    }

    /// Asks every server whether it holds the chunk. Never fails, and takes at most
    /// [`ChunkSettings::ask_deadline`].
    pub async fn locate(&self, id: ChunkId) -> Vec<(NodeId, Located)> {
        let ask = |node| async move {
            let answer = match self.has(node, id).await {
                Ok(true) => Located::Yes,
                Ok(false) => Located::No,
                Err(error) => Located::Unknown(error),
            };
            (node, answer)
        };
        join_all(self.cluster().everyone(&id).into_iter().map(ask)).await
    }

    /// Repair of one chunk on this server: fetches and stores it if placement gives it to this
    /// server and it is missing.
    ///
    /// # Errors
    /// As [`Chunks::get`], and [`ChunkError::Store`].
    pub async fn ensure(&self, id: ChunkId, copies: u8) -> Result<Ensured, ChunkError> {
        if !self.cluster().placement.gives(&id, copies, self.shared.local) {
            return Ok(Ensured::NotMine);
        }
        if self.shared.store.holds(&id) {
            return Ok(Ensured::AlreadyHere);
        }
        let bytes = self.fetch(id).await?;
        self.keep(id, bytes).await?;
        Ok(Ensured::Fetched)
    }

    /// Drops this server's copy if placement does not give it the chunk and every server that
    /// should hold it says that it does. Their "yes" pins their copies, so that two servers
    /// cannot each drop theirs relying on the other.
    ///
    /// # Errors
    /// [`StoreError`] when the copy could not be deleted.
    pub async fn release_surplus(&self, id: ChunkId, copies: u8) -> Result<Released, StoreError> {
        if !self.shared.store.holds(&id) {
            return Ok(Released::NotHeld);
        }
        let placed = self.cluster().placement.replicas(&id, copies);
        if placed.contains(&self.shared.local) || placed.is_empty() {
            return Ok(Released::Mine);
        }
        let asked = join_all(placed.into_iter().map(|node| async move { (node, self.has(node, id).await) })).await;
        let missing: Vec<_> = asked.into_iter().filter(|(_, has)| *has != Ok(true)).map(|(node, _)| node).collect();
        if !missing.is_empty() {
            return Ok(Released::Missing(missing));
        }
        Ok(match self.shared.store.delete(&id).await? {
            Deleted::Deleted => {
                count(&self.shared.counters.released, 1);
                Released::Released
            }
            Deleted::Absent => Released::NotHeld,
            Deleted::Pinned => Released::Pinned,
        })
    }

    /// A peer asks for a chunk.
    ///
    /// # Errors
    /// [`PeerError::Failed`] when the disk would not read it, [`PeerError::Deadline`] when it takes
    /// longer than a get may: the peer has asked others by then.
    pub async fn serve_get(&self, id: ChunkId) -> Result<Option<Bytes>, PeerError> {
        let read = tokio::time::timeout(self.shared.settings.get_deadline, self.get_own(id));
        let bytes = read.await.map_err(|_| PeerError::Deadline)??;
        if let Some(bytes) = &bytes {
            count(&self.shared.counters.served_gets, 1);
            count(&self.shared.counters.served_get_bytes, bytes.len() as u64);
        }
        Ok(bytes)
    }

    /// A peer wants a chunk stored. Its bytes are hashed before they are believed.
    ///
    /// # Errors
    /// [`PeerError::Refused`] when the bytes are not the chunk, [`PeerError::Full`],
    /// [`PeerError::Failed`].
    pub async fn serve_put(&self, id: ChunkId, bytes: Bytes) -> Result<(), PeerError> {
        if bytes.len() > CHUNK_BYTES_MAX {
            return Err(StoreError::TooLong { len: bytes.len() }.into());
        }
        let len = bytes.len() as u64;
        if hash(&bytes).await != Some(id) {
            count(&self.shared.counters.refused_puts, 1);
            return Err(PeerError::Refused("the bytes are not the chunk they are called".to_owned()));
        }
        self.shared.store.put(id, bytes).await?;
        count(&self.shared.counters.served_puts, 1);
        count(&self.shared.counters.served_put_bytes, len);
        Ok(())
    }

    /// A peer asks which of these chunks are held here; those are pinned.
    pub fn serve_has(&self, ids: &[ChunkId]) -> Vec<bool> {
        self.shared.store.has(ids)
    }

    fn cluster(&self) -> Arc<Cluster> {
        self.shared.cluster.read().clone()
    }

    /// Stores a fetched chunk that belongs here, unless someone else just did.
    async fn keep(&self, id: ChunkId, bytes: Bytes) -> Result<(), StoreError> {
        if !self.shared.store.holds(&id) {
            self.shared.store.put(id, bytes).await?;
            count(&self.shared.counters.repaired, 1);
        }
        Ok(())
    }

    /// Whether one server holds the chunk, this one included.
    async fn has(&self, node: NodeId, id: ChunkId) -> Result<bool, PeerError> {
        if node == self.shared.local {
            return Ok(self.shared.store.holds(&id));
        }
        let asked = self.shared.peers.has(node, vec![id]);
        match tokio::time::timeout(self.shared.settings.ask_deadline, asked).await {
            Ok(Ok(answer)) => answer.first().copied().ok_or(PeerError::Failed("it answered nothing".to_owned())),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(PeerError::Deadline),
        }
    }
}

impl Cluster {
    /// Every server that may hold the chunk: by rank, then those without a place.
    fn everyone(&self, id: &ChunkId) -> Vec<NodeId> {
        let mut everyone = self.placement.rank(id);
        everyone.extend(self.others.iter().filter(|node| !self.placement.contains(**node)));
        everyone
    }
}

/// The name of these bytes; `None` when the runtime is shutting down.
async fn hash(bytes: &Bytes) -> Option<ChunkId> {
    /// About a quarter of a millisecond of hashing; longer belongs on a blocking thread.
    const INLINE_BYTES: usize = 256 << 10;
    let of = |bytes: &[u8]| ChunkId(*blake3::hash(bytes).as_bytes());
    if bytes.len() <= INLINE_BYTES {
        return Some(of(bytes));
    }
    let bytes = bytes.clone();
    tokio::task::spawn_blocking(move || of(&bytes)).await.ok()
}
