//! The store against a model, against crashes, and against disks that fail.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicI64},
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::{frame::FRAME_HEADER_BYTES, *};

/// A clock the test moves.
#[derive(Default)]
struct TestClock(AtomicU64);

impl TestClock {
    fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Duration {
        Duration::from_secs(self.0.load(Ordering::SeqCst))
    }
}

/// A disk that runs out of space or breaks on demand.
struct TestDisk {
    /// Bytes that still fit; a write that does not fit is cut short.
    space: AtomicI64,
    /// Writes and syncs until one fails; negative: none does.
    fails_in: AtomicI64,
    sync_fails: AtomicBool,
}

impl Default for TestDisk {
    fn default() -> Self {
        Self { space: i64::MAX.into(), fails_in: (-1).into(), sync_fails: false.into() }
    }
}

impl TestDisk {
    fn step(&self) -> io::Result<()> {
        match self.fails_in.fetch_sub(1, Ordering::SeqCst) {
            0 => Err(io::Error::from_raw_os_error(5)),
            left => {
                if left < 0 {
                    self.fails_in.store(-1, Ordering::SeqCst);
                }
                Ok(())
            }
        }
    }
}

impl Disk for TestDisk {
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.step()?;
        let len = bytes.len().min(self.space.load(Ordering::SeqCst).max(0) as usize);
        if len == 0 {
            return Err(io::Error::from_raw_os_error(28));
        }
        self.space.fetch_sub(len as i64, Ordering::SeqCst);
        file.write_at(&bytes[..len], offset)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.step()?;
        if self.sync_fails.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(5));
        }
        file.sync_data()
    }

    fn free(&self, _: &Path) -> io::Result<u64> {
        Ok(u64::MAX) // the test wants to see the write fail
    }
}

struct Harness {
    dir: TempDir,
    clock: Arc<TestClock>,
    disk: Arc<TestDisk>,
    settings: StoreSettings,
    store: Option<ChunkStore>,
}

const PIN: u64 = 600;

impl Harness {
    fn new() -> Self {
        Self::with(StoreSettings {
            capacity: 64 << 20,
            segment_bytes: 4 << 10,
            pin_for: Duration::from_secs(PIN),
            reserve_bytes: 0,
        })
    }

    fn with(settings: StoreSettings) -> Self {
        // Memory where there is some: these tests sync thousands of times.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let mut this = Self { dir, clock: Arc::default(), disk: Arc::default(), settings, store: None };
        this.reopen();
        this
    }

    fn reopen(&mut self) {
        self.close();
        self.store = Some(self.try_open().unwrap());
    }

    fn try_open(&self) -> Result<ChunkStore, StoreError> {
        ChunkStore::open_on(self.dir.path(), self.settings.clone(), self.clock.clone(), self.disk.clone())
    }

    fn close(&mut self) {
        self.store = None;
    }

    fn files(&self, extension: &str) -> Vec<PathBuf> {
        let items = fs::read_dir(self.dir.path().join("segments")).unwrap();
        let mut files: Vec<_> = items.map(|item| item.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|e| e == extension));
        files.sort();
        files
    }

    async fn delete(&self, id: &ChunkId) -> Deleted {
        self.clock.advance(PIN + 2);
        self.store().delete(id).await.unwrap()
    }

    fn store(&self) -> &ChunkStore {
        self.store.as_ref().unwrap()
    }
}

/// Chunk number `n`: lengths vary, odd ones do not compress.
fn chunk(n: u64) -> (ChunkId, Bytes) {
    let len = 100 + (n as usize * 137) % 900;
    let mut bytes = vec![n as u8; len];
    if n % 2 == 1 {
        blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut bytes);
    }
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    (ChunkId(*blake3::hash(&bytes).as_bytes()), bytes.into())
}

async fn put_all(store: &ChunkStore, numbers: impl IntoIterator<Item = u64>) {
    for n in numbers {
        let (id, bytes) = chunk(n);
        store.put(id, bytes).await.unwrap();
    }
}

fn holding(store: &ChunkStore, numbers: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let holds = |n: &u64| {
        let (id, bytes) = chunk(*n);
        let got = store.get(&id).unwrap();
        if let Some(got) = &got {
            assert_eq!(*got, bytes, "chunk {n}");
        }
        got.is_some()
    };
    numbers.into_iter().filter(holds).collect()
}

#[derive(Debug, Clone)]
enum Op {
    Put(u64),
    Delete(u64),
    Compact,
    Reopen,
    /// Start without the index files.
    ReopenByScan,
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0u64..24).prop_map(Op::Put),
        6 => (0u64..24).prop_map(Op::Delete),
        3 => Just(Op::Compact),
        1 => Just(Op::Reopen),
        1 => Just(Op::ReopenByScan),
    ]
}

async fn run_with_model(ops: &[Op]) {
    let mut real = Harness::new();
    let mut model: BTreeSet<u64> = BTreeSet::new();
    for op in ops {
        match op {
            Op::Put(n) => {
                put_all(real.store(), [*n]).await;
                model.insert(*n);
            }
            Op::Delete(n) => {
                let expected = if model.remove(n) { Deleted::Deleted } else { Deleted::Absent };
                assert_eq!(real.delete(&chunk(*n).0).await, expected, "{op:?}");
            }
            Op::Compact => while real.store().compact().await.unwrap().is_some() {},
            Op::Reopen => real.reopen(),
            Op::ReopenByScan => {
                real.close();
                real.files("idx").iter().for_each(|path| fs::remove_file(path).unwrap());
                real.reopen();
            }
        }
        let mut expected: Vec<_> = model.iter().map(|n| chunk(*n).0).collect();
        expected.sort();
        assert_eq!(real.store().ids(), expected, "after {op:?}");
        assert_eq!(holding(real.store(), 0..24), model.iter().copied().collect::<Vec<_>>());
        let usage = real.store().usage();
        let on_disk: u64 = real.files("seg").iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        assert_eq!((usage.stored, usage.chunks), (on_disk, model.len() as u64), "after {op:?}");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn store_agrees_with_model(ops in proptest::collection::vec(any_op(), 1..100)) {
        runtime().block_on(run_with_model(&ops));
    }
}

#[tokio::test]
async fn a_crash_in_the_last_frame_loses_no_chunk_before_it() {
    let mut real = Harness::new();
    put_all(real.store(), 0..4).await;
    let path = real.files("seg").pop().unwrap();
    let acknowledged = fs::metadata(&path).unwrap().len();
    put_all(real.store(), [5]).await;
    real.close();
    let whole = fs::read(&path).unwrap();
    for len in acknowledged..whole.len() as u64 {
        fs::write(&path, &whole[..len as usize]).unwrap();
        real.reopen();
        assert_eq!(holding(real.store(), 0..6), [0, 1, 2, 3], "cut at {len}");
        assert_eq!(fs::metadata(&path).unwrap().len(), acknowledged, "the torn tail is cut");
        put_all(real.store(), [6]).await;
        real.reopen();
        assert_eq!(holding(real.store(), 0..8), [0, 1, 2, 3, 6], "cut at {len}");
        real.close();
    }
    // Some file systems leave zeros where data was not written back.
    let mut zeros = whole.clone();
    zeros[acknowledged as usize..].fill(0);
    fs::write(&path, &zeros).unwrap();
    real.reopen();
    assert_eq!(holding(real.store(), 0..6), [0, 1, 2, 3]);
}

#[tokio::test]
async fn a_flipped_bit_never_yields_wrong_bytes_and_costs_one_chunk() {
    let mut real = Harness::new();
    put_all(real.store(), 0..3).await;
    let path = real.files("seg").pop().unwrap();
    real.close();
    let whole = fs::read(&path).unwrap();
    for at in frame::SEGMENT_HEADER_BYTES..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 1 << (at % 8);
        // Flipped while the store is open ...
        fs::write(&path, &whole).unwrap();
        real.reopen();
        fs::write(&path, &bad).unwrap();
        assert_eq!(holding(real.store(), 0..3).len(), 2, "byte {at}");
        assert_eq!(real.store().counts().damaged, 1);
        // ... and before it was opened.
        real.reopen();
        assert_eq!(holding(real.store(), 0..3).len(), 2, "byte {at}");
        real.close();
    }
}

#[tokio::test]
async fn a_damaged_copy_is_reported_once_and_the_next_put_repairs_it() {
    let mut real = Harness::new();
    put_all(real.store(), 0..40).await;
    let (id, bytes) = chunk(1);
    let first = real.files("seg").remove(0);
    let mut content = fs::read(&first).unwrap();
    let needle = &bytes[8..40];
    let at = content.windows(32).position(|window| window == needle).unwrap();
    content[at] ^= 0x10;
    fs::write(&first, &content).unwrap();

    let mut damaged = real.store().damaged().unwrap();
    let scrubbed = real.store().scrub_segment(1).unwrap();
    assert_eq!(scrubbed.damaged, [id]);
    assert!(scrubbed.chunks > 1);
    assert_eq!(real.store().get(&id), Ok(None));
    assert_eq!(damaged.try_recv(), Ok(id));
    assert!(damaged.try_recv().is_err(), "reported once");
    assert_eq!(real.store().has(&[id]), [false]);

    real.store().put(id, bytes).await.unwrap();
    assert_eq!(real.store().has(&[id]), [true]);
    assert_eq!(real.store().scrub_segment(1).unwrap().damaged, []);
    let mut segments = Vec::new();
    while let Some(next) = real.store().next_segment(segments.last().copied()) {
        segments.push(next);
    }
    assert_eq!(segments.len() as u64, real.store().usage().segments);
    real.reopen();
    assert_eq!(holding(real.store(), 0..40), (0..40).collect::<Vec<_>>());
}

#[tokio::test]
async fn compaction_gives_up_a_damaged_copy_and_keeps_the_rest() {
    let real = Harness::new();
    put_all(real.store(), 0..30).await;
    let first = real.files("seg").remove(0);
    let in_first: Vec<u64> = (0..30).filter(|n| real.store().shared.state.lock().index[&chunk(*n).0].segment == 1).collect();
    let (bad, rest) = in_first.split_first().unwrap();
    let (good, deleted) = rest.split_first().unwrap();
    for n in deleted {
        real.delete(&chunk(*n).0).await;
    }
    let place = real.store().shared.state.lock().index[&chunk(*bad).0];
    let file = File::options().write(true).open(&first).unwrap();
    file.write_all_at(b"?!", u64::from(place.offset) + FRAME_HEADER_BYTES as u64).unwrap();
    while real.store().compact().await.unwrap().is_some() {}
    assert!(!first.exists());
    assert_eq!(holding(real.store(), in_first.iter().copied()), [*good]);
    assert_eq!(real.store().damaged().unwrap().try_recv(), Ok(chunk(*bad).0));
}

#[tokio::test]
async fn a_missing_or_damaged_index_file_is_rebuilt_equal() {
    let mut real = Harness::new();
    put_all(real.store(), 0..60).await;
    for n in (0..60).step_by(3) {
        real.delete(&chunk(n).0).await;
    }
    real.reopen();
    let index = real.store().shared.state.lock().index.clone();
    let segments = real.store().shared.state.lock().segments.clone();
    real.close();
    let files = real.files("idx");
    let contents: Vec<_> = files.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(files.len() > 3);
    for (n, path) in files.iter().enumerate() {
        match n % 3 {
            0 => fs::remove_file(path).unwrap(),
            1 => fs::write(path, &contents[n][..contents[n].len() / 2]).unwrap(),
            _ => {
                let mut bad = contents[n].clone();
                bad[contents[n].len() / 2] ^= 1;
                fs::write(path, bad).unwrap();
            }
        }
    }
    real.reopen();
    assert_eq!(real.store().shared.state.lock().index, index);
    assert_eq!(real.store().shared.state.lock().segments, segments);
    let rebuilt: Vec<_> = files.iter().map(|path| fs::read(path).unwrap()).collect();
    assert_eq!(rebuilt, contents);
}

#[tokio::test]
async fn a_segment_whose_header_is_damaged_is_read_by_its_index() {
    let mut real = Harness::new();
    put_all(real.store(), 0..30).await;
    real.close();
    let first = real.files("seg").remove(0);
    File::options().write(true).open(first).unwrap().write_all_at(&[0; 32], 0).unwrap();
    real.reopen();
    assert_eq!(holding(real.store(), 0..30).len(), 30);
}

#[tokio::test]
async fn a_full_disk_is_an_error_and_leaves_older_chunks_intact() {
    let mut real = Harness::new();
    put_all(real.store(), 0..3).await;
    let path = real.files("seg").pop().unwrap();
    let len = fs::metadata(&path).unwrap().len();
    let (id, bytes) = chunk(5);
    for space in [0, 1, 55, 56, 57, 200] {
        real.disk.space.store(space, Ordering::SeqCst);
        assert!(matches!(real.store().put(id, bytes.clone()).await, Err(StoreError::Full { .. })), "{space}");
        assert_eq!(fs::metadata(&path).unwrap().len(), len, "nothing half-written stays");
        assert!(!real.store().holds(&id));
        assert_eq!(real.store().usage().stored, len);
    }
    real.disk.space.store(i64::MAX, Ordering::SeqCst);
    real.store().put(id, bytes).await.unwrap();
    real.reopen();
    assert_eq!(holding(real.store(), 0..6), [0, 1, 2, 5]);
}

#[tokio::test]
async fn no_more_than_the_capacity_is_taken_and_deleting_makes_room_again() {
    let mut real = Harness::new();
    real.settings.capacity = 20 << 10;
    real.reopen();
    let mut stored = Vec::new();
    let refused = loop {
        let (id, bytes) = chunk(stored.len() as u64 * 2 + 1);
        match real.store().put(id, bytes).await {
            Ok(()) => stored.push(stored.len() as u64 * 2 + 1),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, StoreError::Full { .. }), "{refused}");
    assert!(real.store().usage().stored <= 20 << 10);
    assert_eq!(holding(real.store(), stored.iter().copied()), stored);
    for n in &stored[..stored.len() / 2] {
        assert_eq!(real.delete(&chunk(*n).0).await, Deleted::Deleted);
    }
    while real.store().compact().await.unwrap().is_some() {}
    assert!(real.store().usage().free > 5 << 10, "{:?}", real.store().usage());
    put_all(real.store(), [1001]).await;
}

#[tokio::test]
async fn after_a_failed_sync_nothing_is_accepted_and_everything_is_readable() {
    let mut real = Harness::new();
    put_all(real.store(), 0..3).await;
    real.disk.sync_fails.store(true, Ordering::SeqCst);
    let (id, bytes) = chunk(7);
    assert!(matches!(real.store().put(id, bytes.clone()).await, Err(StoreError::Failed(_))));
    real.disk.sync_fails.store(false, Ordering::SeqCst);
    assert!(matches!(real.store().put(id, bytes.clone()).await, Err(StoreError::Failed(_))), "it stays so");
    real.clock.advance(PIN + 2);
    assert!(matches!(real.store().delete(&chunk(1).0).await, Err(StoreError::Failed(_))));
    assert!(real.store().failure().is_some());
    assert_eq!(holding(real.store(), 0..10), [0, 1, 2]);
    real.reopen();
    assert_eq!(holding(real.store(), 0..10), [0, 1, 2], "what was refused is not there");
    real.store().put(id, bytes).await.unwrap();
}

/// Fails the Nth write or sync for every N. Whatever was acknowledged is there after a restart,
/// and whatever was deleted is not.
#[tokio::test]
async fn whichever_disk_operation_fails_what_was_acknowledged_holds() {
    for fails_in in 0.. {
        let mut real = Harness::new();
        put_all(real.store(), 0..8).await;
        real.disk.fails_in.store(fails_in, Ordering::SeqCst);
        let mut expected: BTreeSet<u64> = (0..8).collect();
        let mut open: BTreeSet<u64> = BTreeSet::new(); // either is right
        for n in 8..24 {
            let (id, bytes) = chunk(n);
            match real.store().put(id, bytes).await {
                Ok(()) => _ = expected.insert(n),
                Err(_) => _ = open.insert(n),
            }
            real.clock.advance(PIN + 2);
            match real.store().delete(&chunk(n - 8).0).await {
                Ok(_) => _ = expected.remove(&(n - 8)),
                Err(_) => _ = open.insert(n - 8),
            }
            let _ = real.store().compact().await;
        }
        let unharmed = real.disk.fails_in.load(Ordering::SeqCst) >= 0;
        real.disk.fails_in.store(-1, Ordering::SeqCst);
        real.reopen();
        let found: BTreeSet<u64> = holding(real.store(), 0..24).into_iter().filter(|n| !open.contains(n)).collect();
        let expected: BTreeSet<u64> = expected.difference(&open).copied().collect();
        assert_eq!(found, expected, "operation {fails_in}");
        if unharmed {
            assert!(fails_in > 40, "the test reached every operation");
            break;
        }
    }
}

#[tokio::test]
async fn a_chunk_that_was_put_or_asked_for_is_not_deleted_for_a_while() {
    let mut real = Harness::new();
    real.clock.advance(PIN + 2);
    put_all(real.store(), [0, 1, 2]).await;
    let delete = async |n: u64| real.store().delete(&chunk(n).0).await.unwrap();
    assert_eq!(delete(0).await, Deleted::Pinned);
    real.clock.advance(PIN / 2);
    assert_eq!(real.store().has(&[chunk(1).0, chunk(9).0]), [true, false]);
    put_all(real.store(), [2]).await;
    real.clock.advance(PIN / 2 + 2);
    assert_eq!(delete(0).await, Deleted::Deleted);
    assert_eq!(delete(0).await, Deleted::Absent);
    assert_eq!(delete(1).await, Deleted::Pinned, "asked for");
    assert_eq!(delete(2).await, Deleted::Pinned, "put again");
    real.clock.advance(PIN);
    assert_eq!(delete(1).await, Deleted::Deleted);

    real.reopen();
    assert_eq!(real.store().delete(&chunk(2).0).await, Ok(Deleted::Pinned), "pins are forgotten, so all is pinned");
    real.clock.advance(PIN + 2);
    assert_eq!(real.store().delete(&chunk(2).0).await, Ok(Deleted::Deleted));
}

#[tokio::test]
async fn a_deleted_chunk_stays_deleted_when_its_tombstone_is_compacted() {
    let mut real = Harness::new();
    put_all(real.store(), 0..8).await; // segment 1 and on: mostly kept, so graves stay in them
    real.delete(&chunk(1).0).await;
    put_all(real.store(), 100..140).await;
    for n in 100..140 {
        real.delete(&chunk(n).0).await;
    }
    while real.store().compact().await.unwrap().is_some() {}
    let kept: Vec<u64> = (0..8).filter(|n| *n != 1).collect();
    real.reopen();
    assert_eq!(holding(real.store(), (0..8).chain(100..140)), kept);
    let live = real.store().usage().live;
    assert!(real.store().usage().stored < live * 2 + (12 << 10), "{:?}", real.store().usage());
}

#[tokio::test]
async fn tombstones_alone_do_not_fill_the_disk() {
    let real = Harness::new();
    for _ in 0..10 {
        put_all(real.store(), 0..20).await;
        for n in 0..20 {
            real.delete(&chunk(n).0).await;
        }
        while real.store().compact().await.unwrap().is_some() {}
    }
    let usage = real.store().usage();
    assert_eq!((usage.chunks, usage.live), (0, 0));
    assert!(usage.stored <= 16 << 10, "{usage:?}");
}

#[tokio::test]
async fn a_reader_keeps_its_chunk_while_compaction_moves_it() {
    let mut real = Harness::new();
    real.settings.pin_for = Duration::ZERO;
    real.reopen();
    put_all(real.store(), 0..200).await;
    let store = Arc::new(real.store.take().unwrap());
    let reader = store.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let reading = std::thread::spawn(move || {
        let mut rounds = 0;
        while !stopped.load(Ordering::SeqCst) || rounds == 0 {
            assert_eq!(holding(&reader, (0..200).step_by(4)).len(), 50);
            rounds += 1;
        }
    });
    for n in (0..200).filter(|n| n % 4 != 0) {
        real.clock.advance(10);
        assert_eq!(store.delete(&chunk(n).0).await, Ok(Deleted::Deleted));
        store.compact().await.unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    reading.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_puts_share_few_syncs_and_equal_chunks_are_stored_once() {
    let mut real = Harness::new();
    real.settings.segment_bytes = 1 << 20;
    real.reopen();
    let store = Arc::new(real.store.take().unwrap());
    let puts: Vec<_> = (0..400)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { put_all(&store, [n % 200]).await })
        })
        .collect();
    for put in puts {
        put.await.unwrap();
    }
    let counts = store.counts();
    assert_eq!(store.usage().chunks, 200);
    assert_eq!(counts.puts, 200);
    assert!(counts.syncs < 200, "{counts:?}");
}

#[tokio::test]
async fn large_chunks_are_compressed_when_it_pays_and_limited() {
    let real = Harness::with(StoreSettings { reserve_bytes: 0, ..StoreSettings::with_capacity(1 << 30) });
    let text = Bytes::from(b"select * from wp_posts where id = 1;\n".repeat(50_000));
    let id = ChunkId(*blake3::hash(&text).as_bytes());
    real.store().put(id, text.clone()).await.unwrap();
    assert_eq!(real.store().get(&id), Ok(Some(text.clone())));
    assert!(real.store().usage().live < text.len() as u64 / 4);
    let long = Bytes::from(vec![0; CHUNK_BYTES_MAX + 1]);
    assert_eq!(real.store().put(id, long).await, Err(StoreError::TooLong { len: CHUNK_BYTES_MAX + 1 }));
}

#[tokio::test]
async fn bytes_stored_under_a_wrong_name_are_never_returned() {
    let real = Harness::new();
    real.store().put(chunk(1).0, chunk(2).1).await.unwrap();
    assert_eq!(real.store().get(&chunk(1).0), Ok(None));
}

#[tokio::test]
async fn ids_come_in_pages() {
    let real = Harness::new();
    put_all(real.store(), 0..50).await;
    let mut paged = Vec::new();
    loop {
        let page = real.store().ids_after(paged.last().copied(), 7);
        if page.is_empty() {
            break;
        }
        paged.extend(page);
    }
    assert_eq!(paged, real.store().ids());
    assert_eq!(paged.len(), 50);
}

#[test]
fn a_store_is_open_once_and_only_in_a_version_it_knows() {
    let mut real = Harness::new();
    assert_eq!(real.try_open().err(), Some(StoreError::Locked));
    real.close();
    let mut header = frame::segment_header(1, 2);
    header[8] = 9;
    let sum = crc32c::crc32c(&header[..28]);
    header[28..].copy_from_slice(&sum.to_le_bytes());
    fs::write(real.dir.path().join("segments/00000001.seg"), header).unwrap();
    assert_eq!(real.try_open().err(), Some(StoreError::Version { segment: 1, version: 9 }));
}

#[tokio::test]
async fn leftovers_of_a_crash_while_files_were_made_are_removed() {
    let mut real = Harness::new();
    put_all(real.store(), 0..3).await;
    real.close();
    let dir = real.dir.path().join("segments");
    fs::write(dir.join("00000002.seg"), [0; 20]).unwrap();
    fs::write(dir.join("00000001.tmp"), b"half").unwrap();
    fs::write(dir.join("00000009.idx"), b"orphan").unwrap();
    real.reopen();
    assert_eq!(holding(real.store(), 0..3), [0, 1, 2]);
    assert_eq!((real.files("seg").len(), real.files("tmp").len(), real.files("idx").len()), (1, 0, 1), "only what belongs to the whole segment");
    put_all(real.store(), 3..20).await;
    real.reopen();
    assert_eq!(holding(real.store(), 0..20).len(), 20);
}
