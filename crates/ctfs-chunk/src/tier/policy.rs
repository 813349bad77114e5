//! Which clean cell goes first when room is needed: S3-FIFO.
//!
//! After "FIFO queues are all you need for cache eviction" (Yang et al., SOSP 2023): what is new
//! enters a small queue (a tenth of the room) and is promoted to the main queue only when it was
//! read more than once meanwhile; what left the small queue without that is remembered as a ghost
//! for a while, and enters the main queue directly if it comes back. So a program that reads
//! everything once passes through the small queue and leaves the rest alone.
//!
//! Here the items are weighted by bytes, and the number of hits lives beside the cell, so that a
//! hit takes no lock of this structure.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

/// Hits above this count no more; two bits, as in the paper.
const HITS_MAX: u8 = 3;
/// Share of the small queue: one in this many bytes.
const SMALL_SHARE: u64 = 10;
/// Ghosts remembered while the cache holds fewer cells than this.
const GHOSTS_MIN: usize = 256;

/// How often a cell was read since it entered its queue.
#[derive(Debug, Clone, Default)]
pub(super) struct Hits(Arc<AtomicU8>);

impl Hits {
    pub(super) fn bump(&self) {
        let now = self.0.load(Ordering::Relaxed);
        if now < HITS_MAX {
            // A lost race loses a hit, which is harmless.
            self.0.store(now + 1, Ordering::Relaxed);
        }
    }

    fn get(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, hits: u8) {
        self.0.store(hits, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Live<V> {
    token: u64,
    weight: u64,
    main: bool,
    hits: Hits,
    value: V,
}

/// The queues. `K` names a cell; `V` is what its owner wants back with a victim.
///
/// A removed item leaves a stale place in its queue, told by its token, which is skipped later;
/// when stale places outnumber live ones the queues are rebuilt, so memory stays bounded by what
/// lives.
#[derive(Debug)]
pub(super) struct S3Fifo<K, V> {
    small: VecDeque<(K, u64)>,
    main: VecDeque<(K, u64)>,
    ghosts: VecDeque<K>,
    ghost_set: HashSet<K>,
    live: HashMap<K, Live<V>>,
    small_bytes: u64,
    main_bytes: u64,
    next_token: u64,
    stale: usize,
}

impl<K: Copy + Eq + Hash, V> S3Fifo<K, V> {
    pub(super) fn new() -> Self {
        Self {
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: VecDeque::new(),
            ghost_set: HashSet::new(),
            live: HashMap::new(),
            small_bytes: 0,
            main_bytes: 0,
            next_token: 0,
            stale: 0,
        }
    }

    /// Cells in the queues.
    pub(super) fn len(&self) -> usize {
        self.live.len()
    }

    /// Adds a cell; one that is there already is replaced.
    pub(super) fn insert(&mut self, key: K, weight: u64, hits: Hits, value: V) {
        self.remove(&key);
        let main = self.ghost_set.remove(&key);
        self.push(key, Live { token: 0, weight, main, hits, value });
    }

    /// Takes a cell out, because it is gone or not evictable any more.
    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let live = self.take(key)?;
        self.stale += 1;
        if self.stale > self.live.len() + 64 {
            self.compact();
        }
        Some(live.value)
    }

    /// Chooses and takes out the next cell to evict; `skip` says which must not go (pins).
    ///
    /// `None` when nothing may go.
    pub(super) fn victim(&mut self, mut skip: impl FnMut(&K) -> bool) -> Option<(K, V)> {
        // Each live item is looked at no more often than it can be passed over: once in the small
        // queue, once per hit and once to go in the main queue.
        let mut looks = self.live.len() * (HITS_MAX as usize + 2) + self.stale;
        while looks > 0 && !self.live.is_empty() {
            looks -= 1;
            let small_is_over = self.small_bytes > (self.small_bytes + self.main_bytes) / SMALL_SHARE;
            let from_small = !self.small.is_empty() && (small_is_over || self.main.is_empty());
            let queue = if from_small { &mut self.small } else { &mut self.main };
            let Some((key, token)) = queue.pop_front() else { continue };
            let Some(live) = self.live.get(&key).filter(|live| live.token == token) else {
                self.stale = self.stale.saturating_sub(1);
                continue;
            };
            let hits = live.hits.get();
            if skip(&key) {
                self.requeue(key, live.main);
            } else if from_small && hits > 1 {
                live.hits.set(0);
                self.requeue(key, true);
            } else if !from_small && hits > 0 {
                live.hits.set(hits - 1);
                self.requeue(key, true);
            } else {
                let live = self.take(&key)?;
                if from_small {
                    self.remember(key);
                }
                return Some((key, live.value));
            }
        }
        None
    }

    fn take(&mut self, key: &K) -> Option<Live<V>> {
        let live = self.live.remove(key)?;
        *if live.main { &mut self.main_bytes } else { &mut self.small_bytes } -= live.weight;
        Some(live)
    }

    fn push(&mut self, key: K, mut live: Live<V>) {
        live.token = self.next_token;
        self.next_token += 1;
        if live.main {
            self.main_bytes += live.weight;
            self.main.push_back((key, live.token));
        } else {
            self.small_bytes += live.weight;
            self.small.push_back((key, live.token));
        }
        self.live.insert(key, live);
    }

    /// Puts a live item whose place was just popped at the back of a queue.
    fn requeue(&mut self, key: K, main: bool) {
        if let Some(live) = self.take(&key) {
            self.push(key, Live { main, ..live });
        }
    }

    fn remember(&mut self, key: K) {
        if self.ghost_set.insert(key) {
            self.ghosts.push_back(key);
        }
        while self.ghosts.len() > self.live.len().max(GHOSTS_MIN) {
            if let Some(old) = self.ghosts.pop_front() {
                self.ghost_set.remove(&old);
            }
        }
    }

    fn compact(&mut self) {
        let live = &self.live;
        let lives = |(key, token): &(K, u64)| live.get(key).is_some_and(|l| l.token == *token);
        self.small.retain(lives);
        self.main.retain(lives);
        self.stale = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(keys: std::ops::Range<u64>) -> (S3Fifo<u64, ()>, HashMap<u64, Hits>) {
        let (mut queues, mut hits) = (S3Fifo::new(), HashMap::new());
        for key in keys {
            let h = Hits::default();
            hits.insert(key, h.clone());
            queues.insert(key, 10, h, ());
        }
        (queues, hits)
    }

    #[test]
    fn what_was_never_read_again_goes_first_in_order() {
        let (mut queues, _) = filled(0..5);
        let order: Vec<u64> = std::iter::from_fn(|| queues.victim(|_| false)).map(|(k, ())| k).collect();
        assert_eq!(order, [0, 1, 2, 3, 4]);
        assert_eq!((queues.small_bytes, queues.main_bytes), (0, 0));
    }

    #[test]
    fn a_scan_does_not_push_out_what_is_read_often() {
        let (mut queues, hits) = filled(0..10);
        for key in 0..10 {
            hits[&key].bump();
            hits[&key].bump();
        }
        // One long scan: every new cell comes once, and one goes for each that comes.
        for key in 100..1100 {
            queues.insert(key, 10, Hits::default(), ());
            queues.victim(|_| false).expect("something can go");
        }
        let kept = (0..10).filter(|key| queues.live.contains_key(key)).count();
        assert!(kept >= 9, "{kept} of 10 hot cells survived the scan");
    }

    #[test]
    fn a_cell_that_comes_back_soon_enters_the_main_queue() {
        let (mut queues, _) = filled(0..3);
        assert_eq!(queues.victim(|_| false), Some((0, ())));
        queues.insert(0, 10, Hits::default(), ());
        assert!(queues.live[&0].main);
        assert!(!queues.live[&1].main);
    }

    #[test]
    fn pinned_cells_stay_and_the_search_for_a_victim_ends() {
        let (mut queues, hits) = filled(0..4);
        hits.values().for_each(Hits::bump);
        assert_eq!(queues.victim(|_| true), None);
        assert_eq!(queues.len(), 4);
        assert_eq!(queues.victim(|k| *k != 2), Some((2, ())));
    }

    #[test]
    fn removed_cells_leave_no_memory_behind() {
        let mut queues: S3Fifo<u64, ()> = S3Fifo::new();
        for round in 0..10_000 {
            queues.insert(round % 7, 10, Hits::default(), ());
            queues.remove(&(round % 7));
        }
        assert!(queues.small.len() + queues.main.len() <= 128, "{}", queues.small.len());
        assert_eq!(queues.len(), 0);
        assert_eq!(queues.victim(|_| false), None);
    }
}
