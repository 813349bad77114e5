//! How a chunk that is not here is found.
//!
//! One task per chunk does the asking, however many wait for it, and ends by itself within the
//! deadline. It asks the likeliest peer first and one more whenever the last one is late or said
//! no, and takes the first answer that matches the chunk's name.

use std::time::Duration;

use bytes::Bytes;
use ctfs_types::{ChunkId, NodeId, limits::CHUNK_BYTES_MAX};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{sync::watch, time::Instant};
use tracing::{debug, warn};

use super::{ChunkError, Chunks, Cluster, PeerError, Reasons, counters::count, hash};
use crate::Placement;

/// A fetch under way; the value appears when it has ended.
pub(super) type Flight = watch::Receiver<Option<Result<Bytes, ChunkError>>>;

/// Takes the flight from the board when its task ends, even by a panic.
struct Landing {
    chunks: Chunks,
    id: ChunkId,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.chunks.shared.flights.lock().remove(&self.id);
    }
}

impl Chunks {
    /// The whole chunk from peers. Everyone who asks while a fetch is under way shares it.
    pub(super) async fn fetch(&self, id: ChunkId) -> Result<Bytes, ChunkError> {
        let mut flight = self.board(id);
        let result = match flight.wait_for(Option::is_some).await {
            Ok(result) => result.clone(),
            Err(_) => None,
        };
        let cut_off = || ChunkError::Unavailable { id, asked: 0, reasons: Reasons::default() };
        result.unwrap_or_else(|| Err(cut_off()))
    }

    fn board(&self, id: ChunkId) -> Flight {
        let mut flights = self.shared.flights.lock();
        if let Some(flight) = flights.get(&id) {
            return flight.clone();
        }
        let (landed, flight) = watch::channel(None);
        flights.insert(id, flight.clone());
        drop(flights);
        let landing = Landing { chunks: self.clone(), id };
        tokio::spawn(async move {
            let chunks = landing.chunks.clone();
            let result = chunks.ask_peers(id).await;
            if let Ok(bytes) = &result {
                chunks.keep_later(id, bytes);
            }
            drop(landing);
            let _ = landed.send(Some(result));
        });
        flight
    }

    async fn ask_peers(&self, id: ChunkId) -> Result<Bytes, ChunkError> {
        let settings = &self.shared.settings;
        let cluster = self.cluster();
        let candidates = self.candidates(&cluster, &id);
        let mut waiting = candidates.iter().copied();
        let mut asked = Vec::new();
        let mut answers = FuturesUnordered::new();
        let mut reasons = Reasons::default();
        let mut all_said_no = true;
        let deadline = Instant::now() + settings.get_deadline;
        let mut patience = Duration::ZERO;
        loop {
            // Here nobody is being asked, or the last one is late, or one has said no.
            if let Some(node) = waiting.next() {
                asked.push(node);
                patience = self.patience(node, patience);
                answers.push(async move { (node, self.ask_peer(node, id).await) });
            }
            let late = Instant::now() + patience;
            tokio::select! {
                answer = answers.next() => match answer {
                    None => break, // everyone was asked and has answered
                    Some((_, Ok(Some(bytes)))) => {
                        count(&self.shared.counters.peer_fetches, 1);
                        count(&self.shared.counters.peer_bytes, bytes.len() as u64);
                        return Ok(bytes);
                    }
                    Some((node, Ok(None))) => reasons.0.push((node, "does not have it".to_owned())),
                    Some((node, Err(error))) => {
                        all_said_no = false;
                        reasons.0.push((node, error.to_string()));
                    }
                },
                () = tokio::time::sleep_until(late), if waiting.len() > 0 => count(&self.shared.counters.hedges, 1),
                () = tokio::time::sleep_until(deadline) => {
                    all_said_no = false;
                    let silent = asked.iter().filter(|node| reasons.0.iter().all(|(other, _)| other != *node));
                    let silent: Vec<_> = silent.map(|&node| (node, PeerError::Deadline.to_string())).collect();
                    reasons.0.extend(silent);
                    break;
                }
            }
        }
        // The own copy counts as a "no" only when it is certainly not here: a doubtful one may be
        // readable again later, and one that the disk is slow to read may still come.
        let store = &self.shared.store;
        let knows_cluster = !cluster.placement.is_empty();
        if all_said_no && knows_cluster && !store.is_doubtful(&id) && !store.holds(&id) {
            warn!(chunk = %id, asked = asked.len(), "chunk is lost");
            return Err(ChunkError::Lost { id, asked: asked.len() + 1 });
        }
        debug!(chunk = %id, %reasons, "chunk is not available");
        Err(ChunkError::Unavailable { id, asked: asked.len(), reasons })
    }

    /// Whom to ask, likeliest and nearest first. Those that seem unreachable come last rather
    /// than never: the guess may be old.
    fn candidates(&self, cluster: &Cluster, id: &ChunkId) -> Vec<NodeId> {
        let peers = &self.shared.peers;
        let everyone = cluster.everyone(id);
        let placed = Placement::copies_for(0, cluster.placement.len());
        let order = |(at, node): (usize, NodeId)| {
            let rtt = peers.rtt(node).unwrap_or(Duration::MAX);
            ((!peers.reachable(node), at >= placed, rtt, at), node)
        };
        let others = everyone.into_iter().enumerate().filter(|(_, node)| *node != self.shared.local);
        let mut candidates: Vec<_> = others.map(order).collect();
        candidates.sort();
        candidates.into_iter().map(|(_, node)| node).collect()
    }

    /// How long to wait for `node` before asking one more.
    fn patience(&self, node: NodeId, before: Duration) -> Duration {
        let rtt = self.shared.peers.rtt(node).unwrap_or_default();
        (before * 2).max(self.shared.settings.hedge_after).max(rtt * 3)
    }

    /// One peer's verified answer.
    async fn ask_peer(&self, node: NodeId, id: ChunkId) -> Result<Option<Bytes>, PeerError> {
        let Some(bytes) = self.shared.peers.get(node, id).await? else { return Ok(None) };
        if bytes.len() <= CHUNK_BYTES_MAX && hash(&bytes).await == Some(id) {
            return Ok(Some(bytes));
        }
        count(&self.shared.counters.bad_answers, 1);
        warn!(peer = %node, chunk = %id, bytes = bytes.len(), "peer sent wrong bytes");
        Err(PeerError::Failed("it sent wrong bytes".to_owned()))
    }

    /// Stores a fetched chunk in the background if it belongs here.
    fn keep_later(&self, id: ChunkId, bytes: &Bytes) {
        if !self.cluster().placement.gives(&id, 0, self.shared.local) {
            return;
        }
        let Ok(permit) = self.shared.background.clone().try_acquire_owned() else { return };
        let (chunks, bytes) = (self.clone(), bytes.clone());
        tokio::spawn(async move {
            if let Err(error) = chunks.keep(id, bytes).await {
                debug!(chunk = %id, %error, "fetched chunk was not kept");
            }
            drop(permit);
        });
    }
}
