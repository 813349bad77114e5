//! Clusters in memory: servers that are down, slow, full, damaged or lying.

use std::{
    collections::BTreeMap,
    sync::{
        Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use ctfs_types::limits::COPIES_ON_EVERY;
use tempfile::TempDir;

use super::*;
use crate::{Clock, Server, StoreSettings};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Fine,
    Down,
    /// Does not look unreachable, but no call gets through.
    Cut,
    /// Answers after this many milliseconds.
    Slow(u64),
    /// Never answers.
    Silent,
    Lying,
    Full,
}

/// Every server of the cluster, and how each behaves toward the others.
#[derive(Default)]
struct World {
    servers: Mutex<BTreeMap<NodeId, (Chunks, Mood)>>,
    gets: AtomicU64,
}

/// One server's view of the others. Weak, as the world owns the servers.
struct View(Weak<World>);

impl View {
    async fn reach(&self, node: NodeId) -> Result<(Chunks, Mood), PeerError> {
        let world = self.0.upgrade().ok_or(PeerError::Unreachable)?;
        let (chunks, mood) = world.servers.lock().get(&node).cloned().ok_or(PeerError::Unreachable)?;
        match mood {
            Mood::Down | Mood::Cut => return Err(PeerError::Unreachable),
            Mood::Slow(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
            Mood::Silent => std::future::pending().await,
            Mood::Fine | Mood::Lying | Mood::Full => {}
        }
        Ok((chunks, mood))
    }
}

#[async_trait]
impl ChunkPeers for View {
    async fn get(&self, node: NodeId, id: ChunkId) -> Result<Option<Bytes>, PeerError> {
        if let Some(world) = self.0.upgrade() {
            world.gets.fetch_add(1, Ordering::SeqCst);
        }
        match self.reach(node).await? {
            (_, Mood::Lying) => Ok(Some(Bytes::from_static(b"trust me"))),
            (chunks, _) => chunks.serve_get(id).await,
        }
    }

    async fn put(&self, node: NodeId, id: ChunkId, bytes: Bytes) -> Result<(), PeerError> {
        match self.reach(node).await? {
            (_, Mood::Full) => Err(PeerError::Full),
            (chunks, _) => chunks.serve_put(id, bytes).await,
        }
    }

    async fn has(&self, node: NodeId, ids: Vec<ChunkId>) -> Result<Vec<bool>, PeerError> {
        Ok(self.reach(node).await?.0.serve_has(&ids))
    }

    fn reachable(&self, node: NodeId) -> bool {
        let mood = self.0.upgrade().and_then(|world| world.servers.lock().get(&node).map(|(_, mood)| *mood));
        mood.is_some_and(|mood| mood != Mood::Down)
    }

    fn rtt(&self, _: NodeId) -> Option<Duration> {
        Some(Duration::from_millis(1))
    }
}

#[derive(Default)]
struct TestClock(AtomicU64);

impl Clock for TestClock {
    fn now(&self) -> Duration {
        Duration::from_secs(self.0.load(Ordering::SeqCst))
    }
}

/// A disk whose reads hang while `hung` is locked.
#[derive(Default)]
struct SlowDisk {
    hung: parking_lot::RwLock<()>,
    reads: AtomicU64,
}

impl crate::store::Disk for SlowDisk {
    fn write(&self, file: &std::fs::File, bytes: &[u8], offset: u64) -> std::io::Result<usize> {
        std::os::unix::fs::FileExt::write_at(file, bytes, offset)
    }

    fn read(&self, file: &std::fs::File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let _free = self.hung.read();
        std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
    }

    fn sync(&self, file: &std::fs::File) -> std::io::Result<()> {
        file.sync_data()
    }

    fn free(&self, _: &std::path::Path) -> std::io::Result<u64> {
        Ok(u64::MAX)
    }
}

struct Setup {
    world: Arc<World>,
    clock: Arc<TestClock>,
    /// The disk of server 1.
    disk: Arc<SlowDisk>,
    _dirs: Vec<TempDir>,
}

impl Setup {
    fn new(servers: u64) -> Self {
        let world = Arc::new(World::default());
        let clock = Arc::new(TestClock::default());
        let disk = Arc::new(SlowDisk::default());
        let mut dirs = Vec::new();
        for node in 1..=servers {
            let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
            let settings = StoreSettings { reserve_bytes: 0, ..StoreSettings::with_capacity(64 << 20) };
            let disk = if node == 1 { disk.clone() } else { Arc::default() };
            let store = ChunkStore::open_on(dir.path(), settings, clock.clone(), disk).unwrap();
            let settings = ChunkSettings {
                disk_patience: Duration::from_millis(50),
                get_deadline: Duration::from_millis(1500),
                hedge_after: Duration::from_millis(20),
                peer_put_deadline: Duration::from_millis(300),
                put_deadline: Duration::from_millis(1500),
                ask_deadline: Duration::from_millis(300),
            };
            let view = Arc::new(View(Arc::downgrade(&world)));
            let chunks = Chunks::new(NodeId(node), Arc::new(store), view, settings);
            chunks.set_placement(placement(1..=servers));
            world.servers.lock().insert(NodeId(node), (chunks, Mood::Fine));
            dirs.push(dir);
        }
        Self { world, clock, disk, _dirs: dirs }
    }

    fn server(&self, node: impl Into<u64>) -> Chunks {
        self.world.servers.lock()[&NodeId(node.into())].0.clone()
    }

    fn mood(&self, node: NodeId, mood: Mood) {
        self.world.servers.lock().get_mut(&node).unwrap().1 = mood;
    }

    fn holders(&self, id: ChunkId) -> Vec<NodeId> {
        let servers = self.world.servers.lock();
        servers.iter().filter(|(_, (chunks, _))| chunks.store().holds(&id)).map(|(node, _)| *node).collect()
    }

    fn pass(&self, seconds: u64) {
        self.clock.0.fetch_add(seconds, Ordering::SeqCst);
    }
}

fn placement(nodes: impl IntoIterator<Item = u64>) -> Placement {
    Placement::new(nodes.into_iter().map(|n| Server { node: NodeId(n), zone: String::new(), weight: 1 }).collect())
}

fn sorted(mut nodes: Vec<NodeId>) -> Vec<NodeId> {
    nodes.sort();
    nodes
}

fn body(n: u64) -> Bytes {
    Bytes::from(n.to_le_bytes().repeat(500))
}

fn id_of(bytes: &[u8]) -> ChunkId {
    ChunkId(*blake3::hash(bytes).as_bytes())
}

/// A chunk whose first `places` are not server 1, so that server 1 must fetch it.
fn foreign(setup: &Setup, places: usize) -> (Bytes, Vec<NodeId>) {
    let rank = |bytes: &Bytes| setup.server(1u64).placement().rank(&id_of(bytes));
    let found = (0..).map(body).find(|bytes| !rank(bytes)[..places].contains(&NodeId(1))).unwrap();
    let rank = rank(&found);
    (found, rank)
}

#[tokio::test]
async fn a_put_is_on_the_placed_servers_and_every_server_reads_it() {
    let setup = Setup::new(5);
    for n in 0..10 {
        let stored = setup.server(1u64).put(body(n), 0).await.unwrap();
        let placed = sorted(setup.server(1u64).placement().replicas(&stored.id, 0));
        assert_eq!(sorted(stored.holders), placed);
        assert_eq!(setup.holders(stored.id), placed);
        for node in 1..=5u64 {
            assert_eq!(setup.server(node).get(stored.id, 4000).await.unwrap(), body(n));
        }
        assert_eq!(setup.server(2u64).get(stored.id, 10).await.unwrap(), body(n)[..10], "fewer bytes than it has");
        let short = setup.server(2u64).get(stored.id, 4001).await;
        assert!(matches!(short, Err(ChunkError::Short { got: 4000, wanted: 4001, .. })));
    }
    let counts = setup.server(1u64).counts();
    assert_eq!((counts.puts, counts.bad_answers, counts.put_failures), (10, 0, 0));
}

#[tokio::test]
async fn a_put_passes_over_servers_that_are_down_full_or_silent() {
    for mood in [Mood::Down, Mood::Cut, Mood::Full, Mood::Silent] {
        let setup = Setup::new(5);
        let (bytes, rank) = foreign(&setup, 1);
        setup.mood(rank[0], mood);
        let stored = setup.server(1u64).put(bytes, 3).await.unwrap();
        assert_eq!(sorted(stored.holders), sorted(rank[1..4].to_vec()), "{mood:?}");
        assert_eq!(setup.server(1u64).counts().put_detours, 1);
    }
}

#[tokio::test]
async fn a_put_needs_two_servers_and_says_who_failed() {
    let setup = Setup::new(3);
    setup.mood(NodeId(2), Mood::Down);
    assert_eq!(setup.server(1u64).put(body(0), 0).await.unwrap().holders.len(), 2, "one of three is down");
    setup.mood(NodeId(3), Mood::Cut);
    let refused = setup.server(1u64).put(body(1), 0).await.unwrap_err();
    let PutError::TooFewCopies { wanted: 2, got: 1, reasons } = refused else { panic!("{refused:?}") };
    assert_eq!(sorted(reasons.0.iter().map(|(node, _)| *node).collect()), [NodeId(2), NodeId(3)]);
    assert_eq!(setup.server(1u64).put(body(1), 1).await.unwrap().holders, [NodeId(1)], "one copy was asked for");
}

#[tokio::test]
async fn a_put_on_every_server_succeeds_when_all_that_are_up_have_it() {
    let setup = Setup::new(5);
    let stored = setup.server(1u64).put(body(0), COPIES_ON_EVERY).await.unwrap();
    assert_eq!(setup.holders(stored.id), (1..=5).map(NodeId).collect::<Vec<_>>());
    setup.mood(NodeId(2), Mood::Down);
    assert_eq!(setup.server(1u64).put(body(1), COPIES_ON_EVERY).await.unwrap().holders.len(), 4, "one is known to be away");
    for mood in [Mood::Cut, Mood::Full] {
        setup.mood(NodeId(3), mood);
        let refused = setup.server(1u64).put(body(2), COPIES_ON_EVERY).await.unwrap_err();
        match mood {
            Mood::Full => assert_eq!(refused, PutError::Full),
            _ => assert!(matches!(refused, PutError::TooFewCopies { wanted: 4, got: 3, .. }), "{refused:?}"),
        }
    }
    (3..=5).for_each(|node| setup.mood(NodeId(node), Mood::Down));
    assert!(matches!(setup.server(1u64).put(body(3), COPIES_ON_EVERY).await, Err(PutError::TooFewCopies { wanted: 2, got: 1, .. })));
}

#[tokio::test]
async fn a_server_that_goes_away_meanwhile_is_none_that_must_have_it() {
    let setup = Setup::new(3);
    setup.mood(NodeId(2), Mood::Silent);
    let first = setup.server(1u64);
    let put = first.put(body(0), COPIES_ON_EVERY);
    let gone = async {
        // Two of three have it, the put waits for the third.
        while setup.holders(id_of(&body(0))).len() < 2 {
            tokio::task::yield_now().await;
        }
        setup.mood(NodeId(2), Mood::Down);
    };
    let (stored, ()) = tokio::join!(put, gone);
    assert_eq!(sorted(stored.unwrap().holders), [NodeId(1), NodeId(3)]);
}

#[tokio::test]
async fn one_server_alone_stores_one_copy() {
    let setup = Setup::new(1);
    assert_eq!(setup.server(1u64).put(body(0), 0).await.unwrap().holders, [NodeId(1)]);
    setup.server(1u64).set_placement(Placement::default());
    assert!(matches!(setup.server(1u64).put(body(1), 0).await, Err(PutError::TooFewCopies { .. })));
}

#[tokio::test]
async fn full_everywhere_is_told_from_failed() {
    let setup = Setup::new(4);
    let (bytes, _) = foreign(&setup, 1);
    (2..=4).for_each(|node| setup.mood(NodeId(node), Mood::Full));
    setup.server(1u64).set_placement(placement(2..=4));
    assert_eq!(setup.server(1u64).put(bytes.clone(), 0).await, Err(PutError::Full));
    setup.mood(NodeId(3), Mood::Cut);
    assert!(matches!(setup.server(1u64).put(bytes, 0).await, Err(PutError::TooFewCopies { .. })));
}

#[tokio::test]
async fn a_lying_peer_is_counted_and_passed_over() {
    let setup = Setup::new(4);
    let (bytes, rank) = foreign(&setup, 3);
    let id = setup.server(rank[0].0).put(bytes.clone(), 3).await.unwrap().id;
    setup.mood(rank[0], Mood::Lying);
    setup.mood(rank[1], Mood::Lying);
    assert_eq!(setup.server(1u64).get(id, 4000).await.unwrap(), bytes);
    assert!(setup.server(1u64).counts().bad_answers >= 1);
    setup.mood(rank[2], Mood::Lying);
    let failed = setup.server(1u64).get(id, 4000).await;
    assert!(matches!(failed, Err(ChunkError::Unavailable { asked: 3, .. })), "a liar's copy may be whole: {failed:?}");
}

#[tokio::test]
async fn a_late_peer_is_hedged() {
    let setup = Setup::new(4);
    let (bytes, rank) = foreign(&setup, 3);
    let id = setup.server(rank[0].0).put(bytes.clone(), 3).await.unwrap().id;
    setup.mood(rank[0], Mood::Silent);
    setup.mood(rank[1], Mood::Slow(1200));
    let start = std::time::Instant::now();
    assert_eq!(setup.server(1u64).get(id, 4000).await.unwrap(), bytes);
    assert!(start.elapsed() < Duration::from_millis(1100), "{:?}", start.elapsed());
    assert_eq!(setup.server(1u64).counts().hedges, 2);
}

#[tokio::test]
async fn a_get_ends_within_its_deadline_and_says_who_was_asked() {
    let setup = Setup::new(4);
    let (bytes, _) = foreign(&setup, 3);
    (2..=4).for_each(|node| setup.mood(NodeId(node), Mood::Silent));
    let start = std::time::Instant::now();
    let failed = setup.server(1u64).get(id_of(&bytes), 4000).await.unwrap_err();
    assert!(start.elapsed() < Duration::from_millis(2500));
    let ChunkError::Unavailable { asked: 3, reasons, .. } = failed else { panic!("{failed:?}") };
    assert_eq!(reasons.0.len(), 3);
}

#[tokio::test]
async fn a_chunk_is_lost_only_when_every_member_said_no() {
    let setup = Setup::new(4);
    let id = id_of(b"nowhere");
    assert!(matches!(setup.server(1u64).get(id, 1).await, Err(ChunkError::Lost { asked: 4, .. })));
    setup.mood(NodeId(3), Mood::Down);
    assert!(matches!(setup.server(1u64).get(id, 1).await, Err(ChunkError::Unavailable { .. })));
    // A member that gets no chunks may still hold some.
    setup.server(1u64).set_placement(placement([1, 2, 4]));
    setup.server(1u64).set_members((1..=4).map(NodeId).collect());
    assert!(matches!(setup.server(1u64).get(id, 1).await, Err(ChunkError::Unavailable { .. })));
    setup.mood(NodeId(3), Mood::Fine);
    setup.server(3u64).store().put(id, Bytes::from_static(b"nowhere")).await.unwrap();
    assert_eq!(setup.server(1u64).get(id, 7).await.unwrap(), &b"nowhere"[..]);
}

#[tokio::test]
async fn many_readers_of_one_chunk_share_one_fetch() {
    let setup = Setup::new(4);
    let (bytes, rank) = foreign(&setup, 3);
    let id = setup.server(rank[0].0).put(bytes.clone(), 3).await.unwrap().id;
    setup.mood(rank[0], Mood::Slow(10));
    let reader = setup.server(1u64);
    for got in join_all((0..50).map(|_| reader.get(id, 4000))).await {
        assert_eq!(got.unwrap(), bytes);
    }
    assert_eq!(setup.world.gets.load(Ordering::SeqCst), 1);
    assert!(reader.shared.flights.lock().is_empty());
}

#[tokio::test]
async fn a_reader_that_gives_up_does_not_cut_off_the_others() {
    let setup = Setup::new(4);
    let (bytes, rank) = foreign(&setup, 3);
    let id = setup.server(rank[0].0).put(bytes.clone(), 3).await.unwrap().id;
    rank[..3].iter().for_each(|node| setup.mood(*node, Mood::Slow(100)));
    let reader = setup.server(1u64);
    let first = tokio::time::timeout(Duration::from_millis(10), reader.get(id, 4000)).await;
    assert!(first.is_err());
    assert_eq!(reader.get(id, 4000).await.unwrap(), bytes);
}

#[tokio::test]
async fn ensure_fetches_what_belongs_here_and_nothing_else() {
    let setup = Setup::new(4);
    let (bytes, rank) = foreign(&setup, 2);
    let id = setup.server(rank[0].0).put(bytes, 2).await.unwrap().id;
    let ensure = async |copies| setup.server(1u64).ensure(id, copies).await.unwrap();
    assert_eq!(ensure(2).await, Ensured::NotMine);
    assert_eq!(ensure(4).await, Ensured::Fetched);
    assert_eq!(ensure(4).await, Ensured::AlreadyHere);
    assert!(setup.holders(id).contains(&NodeId(1)));
    assert!(setup.server(1u64).counts().repaired >= 1);
}

#[tokio::test]
async fn a_read_that_finds_the_own_copy_damaged_fetches_it_and_repairs_it() {
    let setup = Setup::new(3);
    setup.server(1u64).store().put(id_of(b"x"), Bytes::from_static(b"not x")).await.unwrap();
    setup.server(2u64).store().put(id_of(b"x"), Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(setup.server(1u64).get(id_of(b"x"), 1).await.unwrap(), &b"x"[..]);
    // The copy is stored in the background.
    for _ in 0..500 {
        if setup.server(1u64).store().holds(&id_of(b"x")) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(setup.server(1u64).store().get(&id_of(b"x")), Ok(Some(Bytes::from_static(b"x"))));
}

#[tokio::test]
async fn surplus_is_dropped_only_when_every_placed_server_has_it() {
    let setup = Setup::new(4);
    let (bytes, rank) = foreign(&setup, 3);
    let id = id_of(&bytes);
    let release = async || setup.server(1u64).release_surplus(id, 3).await.unwrap();
    assert_eq!(release().await, Released::NotHeld);
    setup.server(1u64).store().put(id, bytes.clone()).await.unwrap();
    setup.pass(700);
    assert_eq!(release().await, Released::Missing(rank[..3].to_vec()));
    for node in &rank[..2] {
        setup.server(node.0).ensure(id, 3).await.unwrap();
    }
    assert_eq!(release().await, Released::Missing(vec![rank[2]]));
    setup.server(rank[2].0).ensure(id, 3).await.unwrap();
    setup.mood(rank[0], Mood::Cut);
    assert_eq!(release().await, Released::Missing(vec![rank[0]]), "no answer is no yes");
    setup.mood(rank[0], Mood::Fine);
    setup.server(1u64).store().has(&[id]);
    assert_eq!(release().await, Released::Pinned);
    setup.pass(700);
    assert_eq!(release().await, Released::Released);
    assert_eq!(setup.holders(id), sorted(rank[..3].to_vec()));
    let at_placed = setup.server(rank[0].0).store().delete(&id).await;
    assert_eq!(at_placed, Ok(Deleted::Pinned), "their yes pinned their copies");
    assert_eq!(setup.server(rank[0].0).release_surplus(id, 3).await, Ok(Released::Mine));
}

#[tokio::test]
async fn a_put_by_a_lying_peer_is_refused() {
    let setup = Setup::new(1);
    let refused = setup.server(1u64).serve_put(id_of(b"good"), Bytes::from_static(b"evil")).await;
    assert!(matches!(refused, Err(PeerError::Refused(_))));
    let long = Bytes::from(vec![0; CHUNK_BYTES_MAX + 1]);
    assert!(matches!(setup.server(1u64).serve_put(id_of(&long), long).await, Err(PeerError::Refused(_))));
    assert_eq!(setup.server(1u64).store().usage().chunks, 0);
}

#[tokio::test]
async fn locate_asks_everyone() {
    let setup = Setup::new(4);
    let (bytes, rank) = foreign(&setup, 2);
    let id = setup.server(1u64).put(bytes, 2).await.unwrap().id;
    setup.mood(rank[1], Mood::Silent);
    let found = setup.server(1u64).locate(id).await;
    assert_eq!(found.len(), 4);
    for (node, located) in found {
        let expected = match rank.iter().position(|other| *other == node).unwrap() {
            0 => Located::Yes,
            1 => Located::Unknown(PeerError::Deadline),
            _ => Located::No,
        };
        assert_eq!(located, expected, "{node}");
    }
}

/// Stores `count` chunks on every server.
async fn everywhere(setup: &Setup, servers: u64, count: u64) -> Vec<(ChunkId, Bytes)> {
    let mut chunks = Vec::new();
    for n in 0..count {
        let bytes = body(7000 + n);
        let id = id_of(&bytes);
        for node in 1..=servers {
            setup.server(node).store().put(id, bytes.clone()).await.unwrap();
        }
        chunks.push((id, bytes));
    }
    chunks
}

#[tokio::test]
async fn a_hung_disk_does_not_keep_a_read_from_the_copy_of_a_peer() {
    let setup = Setup::new(3);
    let chunks = everywhere(&setup, 3, 60).await;
    let server = setup.server(1u64);
    let hung = setup.disk.hung.write();
    for (id, bytes) in &chunks {
        assert_eq!(server.get(*id, 4000).await.unwrap(), *bytes);
    }
    let counts = server.counts();
    assert_eq!((counts.disk_late, counts.peer_fetches, counts.own_hits), (60, 60, 0));
    assert!(setup.disk.reads.load(Ordering::SeqCst) <= 32, "threads that a hung disk holds");
    drop(hung);
}

#[tokio::test]
async fn a_slow_disk_is_waited_for_when_nobody_else_has_the_chunk() {
    for servers in [1, 3] {
        let setup = Setup::new(servers);
        let (id, bytes) = everywhere(&setup, 1, 1).await.remove(0);
        let server = setup.server(1u64);
        let hung = setup.disk.hung.write();
        let reader = tokio::spawn(async move { server.get(id, 4000).await });
        // Peers have been asked by now, and have said no.
        while setup.server(1u64).counts().disk_late == 0 || setup.world.gets.load(Ordering::SeqCst) < servers - 1 {
            tokio::task::yield_now().await;
        }
        drop(hung);
        assert_eq!(reader.await.unwrap().unwrap(), bytes);
    }
}

#[tokio::test]
async fn a_hung_disk_that_alone_has_a_chunk_ends_the_read_in_time_and_is_named() {
    let setup = Setup::new(2);
    let (id, _) = everywhere(&setup, 1, 1).await.remove(0);
    let hung = setup.disk.hung.write();
    let failed = setup.server(1u64).get(id, 4000).await.unwrap_err();
    let ChunkError::Unavailable { reasons, .. } = failed else { panic!("a chunk that may come is not lost: {failed:?}") };
    assert!(reasons.0.iter().any(|(node, why)| *node == NodeId(1) && why.contains("disk")), "{reasons}");
    assert_eq!(setup.server(1u64).serve_get(id).await, Err(PeerError::Deadline));
    drop(hung);
}
