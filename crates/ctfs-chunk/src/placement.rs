//! Which servers hold a chunk: weighted rendezvous hashing, spread over zones first.
//!
//! Every server computes the same answer from the same list of members: there is no table to
//! keep, and adding a server moves only the chunks that it gets. Each pair of server and chunk
//! has a pseudorandom number `h` in (0, 1); the server's score is `weight / -log2(h)`, which
//! makes it win in proportion to its weight (C. Schindelhauer and G. Schomaker, "Weighted
//! Distributed Hash Tables", SPAA 2005).
//!
//! The logarithm is computed in integers. `f64::ln` may differ in its last bit between C
//! libraries and processors, and two servers that disagree about one chunk would move it back
//! and forth.
//!
//! The order of servers is: the best server of every zone by score, then the second best of
//! every zone, and so on. So the first `k` stand in as many zones as there are.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
};

use ctfs_types::{ChunkId, NodeId};
use serde::{Deserialize, Serialize};

/// One server that takes chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    pub node: NodeId,
    /// Servers that fail together, e.g. a site.
    pub zone: String,
    /// Its share relative to the others: bytes of capacity. 0 is chosen after everyone else.
    pub weight: u64,
}

/// A server's standing for one chunk, for people: see [`Placement::explain`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    pub node: NodeId,
    pub zone: String,
    /// The larger the better, before zones are looked at. For show; the order is decided exactly.
    pub score: f64,
    /// 0 is the first choice.
    pub place: usize,
}

/// The servers that take chunks, and the rule that gives each chunk its order of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    servers: Vec<Server>,
}

/// Copies per chunk when the policy says "automatic": one lost server must not lose data, and a
/// third copy lets one be away while another is repaired.
const COPIES_AUTOMATIC: usize = 3;

impl Placement {
    /// A server named twice counts once, by its first mention.
    pub fn new(servers: Vec<Server>) -> Self {
        let mut seen = BTreeSet::new();
        Self { servers: servers.into_iter().filter(|server| seen.insert(server.node)).collect() }
    }

    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    pub fn len(&self) -> usize {
        self.servers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.servers.is_empty()
    }

    pub fn contains(&self, node: NodeId) -> bool {
        self.servers.iter().any(|server| server.node == node)
    }

    /// How many servers hold a chunk when `copies` are asked for (0 = automatic) and `servers`
    /// there are.
    pub fn copies_for(copies: u8, servers: usize) -> usize {
        let wanted = if copies == 0 { COPIES_AUTOMATIC } else { usize::from(copies) };
        wanted.min(servers)
    }

    /// Every server, first choice first.
    pub fn rank(&self, chunk: &ChunkId) -> Vec<NodeId> {
        self.order(chunk).into_iter().map(|drawn| drawn.server.node).collect()
    }

    /// The servers that should hold the chunk, first choice first.
    pub fn replicas(&self, chunk: &ChunkId, copies: u8) -> Vec<NodeId> {
        let mut ranked = self.rank(chunk);
        ranked.truncate(Self::copies_for(copies, self.servers.len()));
        ranked
    }

    /// Whether `node` is one of the servers that should hold the chunk.
    pub fn gives(&self, chunk: &ChunkId, copies: u8, node: NodeId) -> bool {
        self.replicas(chunk, copies).contains(&node)
    }

    /// [`Placement::rank`] with its reasons.
    pub fn explain(&self, chunk: &ChunkId) -> Vec<Standing> {
        let order = self.order(chunk).into_iter().enumerate();
        order
            .map(|(place, drawn)| Standing {
                node: drawn.server.node,
                zone: drawn.server.zone.clone(),
                score: drawn.server.weight as f64 / (drawn.cost as f64 / (1u64 << FRACTION_BITS) as f64),
                place,
            })
            .collect()
    }

    fn order(&self, chunk: &ChunkId) -> Vec<Drawn<'_>> {
        let mut drawn: Vec<_> = self.servers.iter().map(|server| Drawn::new(server, chunk)).collect();
        drawn.sort_by(Drawn::better_first);
        let mut taken: BTreeMap<&str, u32> = BTreeMap::new();
        for drawn in &mut drawn {
            let round = taken.entry(&drawn.server.zone).or_default();
            drawn.round = *round;
            *round += 1;
        }
        drawn.sort_by_key(|drawn| drawn.round); // stable: by score inside a round
        drawn
    }
}

/// A server with its number for one chunk.
struct Drawn<'a> {
    server: &'a Server,
    /// `-log2(h)` in fixed point; the smaller the better.
    cost: u64,
    /// How many servers of the same zone are better.
    round: u32,
}

impl<'a> Drawn<'a> {
    fn new(server: &'a Server, chunk: &ChunkId) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"ctfs place 1");
        hasher.update(&server.node.0.to_le_bytes());
        hasher.update(&chunk.0);
        let hash = hasher.finalize();
        let (first, _) = hash.as_bytes().split_first_chunk::<8>().expect("a BLAKE3 hash has 32 bytes");
        Self { server, cost: minus_log2(u64::from_le_bytes(*first)), round: 0 }
    }

    /// Compares `weight / cost` without dividing. Costs are below 2^47 and weights below 2^64.
    fn better_first(&self, other: &Self) -> Ordering {
        let mine = u128::from(self.server.weight) * u128::from(other.cost);
        let theirs = u128::from(other.server.weight) * u128::from(self.cost);
        theirs.cmp(&mine).then(self.server.node.cmp(&other.server.node))
    }
}

/// Bits behind the point of a logarithm: ties then happen once in about 2^40 pairs.
const FRACTION_BITS: u32 = 40;

/// `-log2(x / 2^64)` in fixed point with [`FRACTION_BITS`], rounded up, at least 1.
///
/// Binary digits by repeated squaring (Knuth, TAOCP 1.2.2, exercise 25 on logarithms).
fn minus_log2(x: u64) -> u64 {
    let x = x.max(1);
    let zeros = x.leading_zeros();
    let mut mantissa = x << zeros;
    let mut log = u64::from(63 - zeros);
    for _ in 0..FRACTION_BITS {
        let square = (u128::from(mantissa) * u128::from(mantissa)) >> 63;
        let carry = (square >> 64) as u64;
        log = log << 1 | carry;
        mantissa = (square >> carry) as u64;
    }
    (64 << FRACTION_BITS) - log
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn server(node: u64, zone: &str, weight: u64) -> Server {
        Server { node: NodeId(node), zone: zone.to_owned(), weight }
    }

    fn chunk(number: u64) -> ChunkId {
        ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes())
    }

    #[test]
    fn the_integer_logarithm_is_the_logarithm() {
        for x in [1, 2, 3, 1 << 32, u64::MAX / 3, u64::MAX / 2 + 1, u64::MAX - 5] {
            let exact = 64.0 - (x as f64).log2();
            let ours = minus_log2(x) as f64 / (1u64 << FRACTION_BITS) as f64;
            assert!((exact - ours).abs() < 1e-9, "{x}: {exact} {ours}");
        }
        assert_eq!(minus_log2(1), 64 << FRACTION_BITS);
        assert!(minus_log2(u64::MAX) >= 1);
    }

    /// The order is part of what servers agree on; a change of it moves all data of a cluster.
    #[test]
    fn the_order_of_servers_never_changes_between_versions() {
        let placement = Placement::new((1..=5).map(|n| server(n, if n < 3 { "a" } else { "b" }, n << 30)).collect());
        let orders: Vec<Vec<u64>> =
            (0..4).map(|n| placement.rank(&chunk(n)).into_iter().map(|node| node.0).collect()).collect();
        assert_eq!(orders, GOLDEN);
    }

    const GOLDEN: [[u64; 5]; 4] = [[2, 4, 5, 1, 3], [5, 1, 4, 2, 3], [5, 2, 4, 1, 3], [5, 1, 3, 2, 4]];

    #[test]
    fn first_choices_follow_the_weights() {
        let weights = [1u64 << 40, 2 << 40, 3 << 40, 4 << 40];
        let placement = Placement::new(weights.iter().zip(0..).map(|(&w, n)| server(n, "", w)).collect());
        let mut first = [0u32; 4];
        for n in 0..10_000 {
            first[placement.rank(&chunk(n))[0].0 as usize] += 1;
        }
        for (got, want) in first.iter().zip([1000.0, 2000.0, 3000.0, 4000.0]) {
            assert!((f64::from(*got) - want).abs() < want * 0.1, "{first:?}");
        }
    }

    #[test]
    fn a_new_server_takes_its_share_and_nothing_else_moves() {
        let old = Placement::new((0..9).map(|n| server(n, "", 1 << 40)).collect());
        let new = Placement::new((0..10).map(|n| server(n, "", 1 << 40)).collect());
        let (mut moved, total) = (0, 10_000);
        for n in 0..total {
            let before: BTreeSet<_> = old.replicas(&chunk(n), 3).into_iter().collect();
            let after: BTreeSet<_> = new.replicas(&chunk(n), 3).into_iter().collect();
            let gained: Vec<_> = after.difference(&before).collect();
            assert!(gained.is_empty() || gained == [&NodeId(9)]);
            moved += gained.len();
        }
        let share = moved as f64 / (total * 3) as f64;
        assert!((share - 0.1).abs() < 0.02, "{share}");
    }

    #[test]
    fn automatic_means_three_or_as_many_as_there_are() {
        let counts: Vec<_> = (0..6).map(|n| Placement::copies_for(0, n)).collect();
        assert_eq!(counts, [0, 1, 2, 3, 3, 3]);
        assert_eq!(Placement::copies_for(2, 9), 2);
        assert_eq!(Placement::copies_for(255, 4), 4);
    }

    #[test]
    fn a_server_of_weight_zero_is_the_last_choice() {
        let placement = Placement::new(vec![server(1, "", 0), server(2, "", 5), server(3, "", 5)]);
        assert!((0..100).all(|n| placement.rank(&chunk(n))[2] == NodeId(1)));
    }

    #[test]
    fn explain_shows_the_rank_with_scores() {
        let placement = Placement::new((0..5).map(|n| server(n, ["x", "y"][n as usize % 2], 1 << 30)).collect());
        let standings = placement.explain(&chunk(7));
        assert_eq!(standings.iter().map(|s| s.node).collect::<Vec<_>>(), placement.rank(&chunk(7)));
        assert!(standings.iter().enumerate().all(|(n, s)| s.place == n && s.score > 0.0));
    }

    proptest! {
        #[test]
        fn copies_stand_in_as_many_zones_as_possible(
            servers in proptest::collection::vec((0u64..40, 0u8..5, 1u64..1 << 50), 1..20), number: u64, copies in 1u8..6,
        ) {
            let placement = Placement::new(servers.iter().map(|&(n, z, w)| server(n, &z.to_string(), w)).collect());
            let rank = placement.rank(&chunk(number));
            let unique: BTreeSet<_> = rank.iter().collect();
            prop_assert_eq!(unique.len(), placement.len(), "every server once");

            let zone = |node: &NodeId| placement.servers().iter().find(|s| s.node == *node).unwrap().zone.clone();
            let zones: BTreeSet<_> = rank.iter().map(zone).collect();
            let replicas = placement.replicas(&chunk(number), copies);
            let used: BTreeSet<_> = replicas.iter().map(zone).collect();
            prop_assert_eq!(used.len(), replicas.len().min(zones.len()));
        }

        #[test]
        fn the_order_of_the_member_list_does_not_matter(
            servers in proptest::collection::vec((0u8..3, 1u64..1 << 50), 1..12), number: u64,
        ) {
            let list: Vec<_> = servers.iter().zip(0..).map(|(&(z, w), n)| server(n, &z.to_string(), w)).collect();
            let reversed = list.iter().rev().cloned().collect();
            prop_assert_eq!(Placement::new(list).rank(&chunk(number)), Placement::new(reversed).rank(&chunk(number)));
        }

        #[test]
        fn a_departing_server_changes_no_order_among_the_others_of_one_zone(
            weights in proptest::collection::vec(1u64..1 << 50, 2..12), number: u64, leaves: usize,
        ) {
            let list: Vec<_> = weights.iter().zip(0..).map(|(&w, n)| server(n, "", w)).collect();
            let gone = NodeId((leaves % list.len()) as u64);
            let mut expected = Placement::new(list.clone()).rank(&chunk(number));
            expected.retain(|&node| node != gone);
            let rest = list.into_iter().filter(|s| s.node != gone).collect();
            prop_assert_eq!(Placement::new(rest).rank(&chunk(number)), expected);
        }
    }
}
