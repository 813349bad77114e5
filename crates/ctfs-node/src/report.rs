//! Figures: what this server knows of itself and of the others, without asking at the moment.
//!
//! `statfs` and `ctfs status` must answer whatever the cluster does, so the others' figures are
//! gathered in the background and read from here.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use ctfs_chunk::{ChunkStore, Placement, TierUsage, Usage};
use ctfs_consensus::{Consensus, Space};
use ctfs_meta::MemberState;
use ctfs_net::Network;
use ctfs_types::NodeId;
use ctfs_vfs::{SpaceReport, Vfs};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    stop,
    admin::Room,
    messages::{self, ServerFigures, service},
    repair::Repair,
};

/// How old the others' figures may get while they answer.
const GATHER_EVERY: Duration = Duration::from_secs(2);
/// Older figures say nothing of who is ill.
const OLD_AFTER: Duration = Duration::from_secs(10);
const GATHER_DEADLINE: Duration = Duration::from_secs(1);
/// `df` shows this many free inodes: numbers are 64 bits wide, and tools dislike more.
const FREE_FILES: u64 = 1 << 32;

pub struct Figures {
    network: Network,
    consensus: Consensus,
    store: Arc<ChunkStore>,
    /// The file system, and whether its cache is on the disk of the chunk store.
    vfs: OnceLock<(Arc<Vfs>, bool)>,
    node: NodeId,
    repair: OnceLock<Arc<Repair>>,
    others: Mutex<BTreeMap<NodeId, (Instant, ServerFigures)>>,
    unanswering: Mutex<BTreeSet<NodeId>>,
    space: Mutex<SpaceReport>,
}

impl Figures {
    pub fn new(network: Network, consensus: Consensus, store: Arc<ChunkStore>, node: NodeId) -> Arc<Self> {
        let figures = Self {
            network,
            consensus,
            store,
            vfs: OnceLock::new(),
            node,
            repair: OnceLock::new(),
            others: Mutex::default(),
            unanswering: Mutex::default(),
            space: Mutex::default(),
        };
        figures.count_space();
        Arc::new(figures)
    }

    pub fn watch_repair(&self, repair: Arc<Repair>) {
        assert!(self.repair.set(repair).is_ok(), "repair starts once");
    }

    /// `same_disk`: the cache is on the disk of the chunk store.
    pub fn watch_cache(&self, vfs: Arc<Vfs>, same_disk: bool) {
        assert!(self.vfs.set((vfs, same_disk)).is_ok(), "the file system starts once");
    }

    fn cache(&self) -> Option<(TierUsage, bool)> {
        self.vfs.get().map(|(vfs, same_disk)| (vfs.content().usage(), *same_disk))
    }

    /// This server's own figures.
    pub fn local(&self) -> ServerFigures {
        let cache = self.cache();
        let store = self.store.usage();
        let store_free = match cache {
            Some((cache, true)) => free_beside_cache(&store, &cache),
            _ => store.free,
        };
        let cache = cache.map(|(usage, _)| usage).unwrap_or_default();
        let consensus = self.consensus.status();
        let walked = self.repair.get().map(|repair| repair.walked()).unwrap_or_default();
        ServerFigures {
            applied: self.consensus.applied().borrow().0,
            cache_used: cache.clean + cache.dirty,
            cache_limit: cache.limit,
            store_used: store.stored,
            store_capacity: store.capacity,
            store_free,
            chunks: store.chunks,
            missing: walked.missing,
            walked: walked.placement,
            walked_at: walked.at,
            refused: walked.refused,
            stopped: consensus.stopped,
            room: match consensus.space {
                Space::Enough => Room::Enough,
                Space::Low => Room::Low,
                Space::Full => Room::Full,
            },
            unanswering: self.unanswering.lock().iter().copied().collect(),
            store_failed: self.store.failure(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// The last figures of another server, and how old they are.
    pub fn of(&self, node: NodeId) -> Option<(Duration, ServerFigures)> {
        self.others.lock().get(&node).map(|(at, figures)| (at.elapsed(), figures.clone()))
    }

    /// Those of any server, this one included.
    pub fn latest(&self, node: NodeId) -> Option<ServerFigures> {
        if node == self.node { Some(self.local()) } else { self.of(node).map(|(_, figures)| figures) }
    }

    /// Why a server that answers takes no part in the log: it says so itself, or the leader does.
    pub fn stopped(&self, node: NodeId) -> Option<String> {
        let own_word = self.latest(node).and_then(|figures| figures.stopped);
        own_word.or_else(|| self.is_unanswering(node).then(|| "its log does not answer the leader".to_owned()))
    }

    /// Whether a leader said so lately.
    fn is_unanswering(&self, node: NodeId) -> bool {
        let others = self.others.lock();
        let lately = others.values().filter(|(at, _)| at.elapsed() < OLD_AFTER);
        self.unanswering.lock().contains(&node) || lately.into_iter().any(|(_, figures)| figures.unanswering.contains(&node))
    }

    /// What this server, as leader, found; nobody when it does not lead.
    pub fn note_unanswering(&self, nodes: BTreeSet<NodeId>) {
        *self.unanswering.lock() = nodes;
    }

    pub fn space(&self) -> SpaceReport {
        *self.space.lock()
    }

    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        loop {
            self.gather().await;
            self.count_space();
            tokio::select! {
                () = tokio::time::sleep(GATHER_EVERY) => {}
                () = stop::requested(&mut stop) => return,
            }
        }
    }

    /// Asks all others for their figures, at most [`GATHER_DEADLINE`].
    pub async fn gather(&self) {
        let Ok(members) = self.consensus.replica().read().members() else { return };
        let asked = members.iter().filter(|m| m.node != self.node).map(|member| async {
            let reply = self.network.call(member.node, service::REPORT, Vec::new(), GATHER_DEADLINE).await.ok()?;
            let figures = messages::decode::<ServerFigures>(&reply).ok()?;
            Some((member.node, (Instant::now(), figures)))
        });
        let answers = futures_util::future::join_all(asked).await;
        let mut others = self.others.lock();
        others.retain(|node, _| members.iter().any(|m| m.node == *node));
        others.extend(answers.into_iter().flatten());
    }

    fn count_space(&self) {
        let Ok(members) = self.consensus.replica().read().members() else { return };
        let others = self.others.lock();
        let mut used = Vec::new();
        let mut free = Vec::new();
        for member in members.iter().filter(|m| m.state == MemberState::Active) {
            let figures = if member.node == self.node {
                self.local()
            } else {
                // Nobody said otherwise yet: the room it told the cluster when it started.
                let unheard = ServerFigures { store_free: member.capacity, ..ServerFigures::default() };
                others.get(&member.node).map_or(unheard, |(_, figures)| figures.clone())
            };
            used.push(figures.store_used);
            free.push(figures.store_free);
        }
        drop(others);
        let copies = Placement::copies_for(0, free.len()).max(1);
        // What is written here passes through this server's cache.
        let refuses = self.cache().is_some_and(|(cache, _)| cache.room == 0 && cache.dirty == 0);
        let available = if refuses { 0 } else { logical_bytes_free(&free, copies) };
        let taken = used.iter().sum::<u64>() / copies as u64;
        *self.space.lock() = SpaceReport { total: taken + available, free: available, available, files: FREE_FILES };
    }
}

/// What the chunk store may still take of a disk that it shares with the cache. Cached bytes give
/// way to chunks; the cache's reserve is the larger one, and below it no write is taken.
fn free_beside_cache(store: &Usage, cache: &TierUsage) -> u64 {
    store.capacity.saturating_sub(store.stored).min(cache.room)
}

/// Bytes of content that fit when each is stored on `copies` different servers with this much
/// room: the largest L with sum(min(free, L)) >= copies * L.
pub fn logical_bytes_free(free: &[u64], copies: usize) -> u64 {
    if free.len() < copies || copies == 0 {
        return 0;
    }
    let fits = |content: u64| {
        let stored: u128 = free.iter().map(|&f| u128::from(f.min(content))).sum();
        stored >= content as u128 * copies as u128
    };
    let (mut low, mut high) = (0, free.iter().copied().max().unwrap_or(0).saturating_mul(free.len() as u64));
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_bytes_count_as_room_for_chunks_and_the_reserve_of_the_cache_does_not() {
        let store = |stored| Usage { stored, capacity: 1000, free: 10, ..Usage::default() };
        let cache = |room| TierUsage { room, clean: 300, ..TierUsage::default() };
        assert_eq!(free_beside_cache(&store(100), &cache(310)), 310);
        assert_eq!(free_beside_cache(&store(100), &cache(0)), 0, "the store's own reserve is smaller");
        assert_eq!(free_beside_cache(&store(900), &cache(310)), 100, "the capacity holds");
    }

    #[test]
    fn one_full_server_of_three_leaves_no_room_for_three_copies() {
        assert_eq!(logical_bytes_free(&[100, 100, 0], 3), 0);
        assert_eq!(logical_bytes_free(&[100, 100, 0], 2), 100);
    }

    #[test]
    fn a_large_server_cannot_hold_two_copies_of_one_chunk() {
        assert_eq!(logical_bytes_free(&[1000, 10, 10], 2), 20);
        assert_eq!(logical_bytes_free(&[50, 50, 50, 50], 2), 100);
        assert_eq!(logical_bytes_free(&[7], 1), 7);
        assert_eq!(logical_bytes_free(&[7], 2), 0);
    }
}
