//! From a journal to a copy, over a way that loses, repeats, delays and refuses.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::sync::{Semaphore, mpsc};

use super::{batch, check_records, disk::CrashDisk, id, payload, root};
use crate::{
    Batch, Copies, CopySettings, End, Journal, JournalId, Position, Refusal, Settings, Stream, StreamSettings, Transport,
    TransportError,
};

const SETTINGS: StreamSettings = StreamSettings {
    batch_bytes: 3000,
    patience: Duration::from_secs(60),
    pause: Duration::from_millis(1),
    pause_max: Duration::from_millis(4),
    trim_after: Duration::from_millis(1),
    gather_for: Duration::ZERO,
};

fn journal() -> Arc<Journal> {
    let settings = Settings {
        segment_bytes: 4096,
        bytes_max: 1 << 20,
        recent_bytes_max: 2000,
        sync_after: Duration::from_millis(1),
    };
    Arc::new(Journal::create(Arc::new(CrashDisk::new()), root(), id(1), settings).unwrap())
}

fn copies() -> Copies {
    let settings = CopySettings { segment_bytes: 4096, bytes_max: 10 << 20 };
    Copies::open(Arc::new(CrashDisk::new()), root(), id(1).cluster, settings).unwrap()
}

fn append(journal: &Journal, count: u64) -> Position {
    for _ in 0..count {
        journal.append(payload(journal.depth().appended.0 + 1)).unwrap();
    }
    journal.depth().appended
}

/// Waits, not for ever, until the copy has `position`.
async fn reached(stream: &Stream, position: Position) {
    let reached = tokio::time::timeout(Duration::from_secs(60), stream.durable_at(position));
    reached.await.expect("it gets there").expect("the stream goes on");
}

/// Hands each batch over, and goes on when it is told to.
struct Gate {
    copies: Arc<Copies>,
    seen: mpsc::UnboundedSender<Batch>,
    open: Semaphore,
}

#[async_trait]
impl Transport for Gate {
    async fn send(&self, id: JournalId, batch: Batch) -> Result<Position, TransportError> {
        self.seen.send(batch.clone()).unwrap();
        self.open.acquire().await.unwrap().forget();
        Ok(self.copies.accept(id, batch).await?)
    }
}

fn gate() -> (Arc<Gate>, mpsc::UnboundedReceiver<Batch>) {
    let (seen, batches) = mpsc::unbounded_channel();
    (Arc::new(Gate { copies: Arc::new(copies()), seen, open: Semaphore::new(0) }), batches)
}

#[tokio::test]
async fn a_copy_of_nothing_counts_when_it_is_there() {
    let (gate, mut batches) = gate();
    let stream = Stream::start(journal(), gate.clone(), SETTINGS);
    batches.recv().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(20), stream.durable_at(Position::NONE)).await.is_err(), "nobody has answered");
    gate.open.add_permits(1);
    reached(&stream, Position::NONE).await;
    assert!(gate.copies.fence(id(1), 1).await.unwrap().is_some());
}

#[tokio::test]
async fn a_lone_record_goes_out_at_once_and_what_comes_meanwhile_goes_as_one_batch() {
    let journal = journal();
    let (gate, mut batches) = gate();
    let stream = Stream::start(journal.clone(), gate.clone(), SETTINGS);
    assert!(batches.recv().await.unwrap().payloads.is_empty(), "first it asks");
    gate.open.add_permits(1);
    let one = append(&journal, 1);
    assert_eq!(batches.recv().await.unwrap().payloads.len(), 1);
    append(&journal, 5);
    assert!(batches.try_recv().is_err(), "one batch at a time");
    gate.open.add_permits(1);
    reached(&stream, one).await;
    assert_eq!(batches.recv().await.unwrap(), batch(1, 2..=6));
    gate.open.add_permits(1);
    reached(&stream, Position(6)).await;
}

#[tokio::test]
async fn what_nobody_waits_for_gathers_and_goes_out_when_somebody_does_or_in_time() {
    let journal = journal();
    let (gate, mut batches) = gate();
    gate.open.add_permits(100);
    let never = Duration::from_secs(3600);
    let stream = Stream::start(journal.clone(), gate.clone(), StreamSettings { gather_for: never, ..SETTINGS });
    assert!(batches.recv().await.unwrap().payloads.is_empty(), "first it asks");
    append(&journal, 3);
    let more = tokio::time::timeout(Duration::from_millis(30), batches.recv()).await;
    assert!(more.is_err(), "nobody waits for {more:?}");
    let last = append(&journal, 2);
    reached(&stream, last).await;
    assert_eq!(batches.recv().await.unwrap(), batch(1, 1..=5));
    drop(stream);

    let _stream = Stream::start(journal.clone(), gate, StreamSettings { gather_for: Duration::from_millis(1), ..SETTINGS });
    assert!(batches.recv().await.unwrap().payloads.is_empty(), "first it asks");
    append(&journal, 1);
    assert_eq!(batches.recv().await.unwrap(), batch(1, 6..=6), "in time");
}

#[tokio::test]
async fn what_is_in_flight_is_bounded() {
    let journal = journal();
    let last = append(&journal, 300);
    let (gate, mut batches) = gate();
    gate.open.add_permits(1000);
    let stream = Stream::start(journal, gate, SETTINGS);
    reached(&stream, last).await;
    let mut count = 0;
    while let Ok(batch) = batches.try_recv() {
        count += batch.payloads.len();
        assert!(batch.payloads.iter().map(|payload| payload.len()).sum::<usize>() <= SETTINGS.batch_bytes);
    }
    assert_eq!(count, 300);
}

#[tokio::test]
async fn a_fence_ends_the_stream_and_all_who_wait_for_it() {
    let journal = journal();
    let (gate, _batches) = gate();
    gate.open.add_permits(1000);
    let stream = Stream::start(journal.clone(), gate.clone(), SETTINGS);
    let last = append(&journal, 5);
    reached(&stream, last).await;
    gate.copies.fence(id(1), 9).await.unwrap();
    let last = append(&journal, 1);
    assert!(matches!(stream.durable_at(last).await, Err(End::Fenced { epoch: 9 })));
}

#[tokio::test]
async fn a_copy_with_other_records_ends_the_stream() {
    let journal = journal();
    let (gate, _batches) = gate();
    gate.open.add_permits(1000);
    // It has more than was ever appended.
    gate.copies.accept(id(1), batch(1, 1..=5)).await.unwrap();
    append(&journal, 2);
    let stream = Stream::start(journal, gate, SETTINGS);
    assert!(matches!(stream.durable_at(Position(1)).await, Err(End::Diverged { .. })));
}

#[tokio::test]
async fn a_closed_journal_ends_the_stream() {
    let journal = journal();
    let (gate, _batches) = gate();
    gate.open.add_permits(1000);
    let stream = Stream::start(journal.clone(), gate, SETTINGS);
    journal.close().unwrap();
    assert!(matches!(stream.durable_at(Position(1)).await, Err(End::Journal(_))));
}

#[tokio::test]
async fn a_trim_reaches_the_copy_although_nothing_more_is_appended() {
    let journal = journal();
    let (gate, _batches) = gate();
    gate.open.add_permits(1000);
    let stream = Stream::start(journal.clone(), gate.clone(), SETTINGS);
    let last = append(&journal, 50);
    reached(&stream, last).await;
    journal.trim(Position(40));
    while gate.copies.list().await.unwrap()[0].kept_from < Position(41) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_copy_that_lost_what_it_had_gets_it_again() {
    let journal = journal();
    let (gate, _batches) = gate();
    gate.open.add_permits(10_000);
    let stream = Stream::start(journal.clone(), gate.clone(), SETTINGS);
    let last = append(&journal, 100);
    reached(&stream, last).await;
    gate.copies.remove(id(1)).await.unwrap();
    append(&journal, 1);
    while gate.copies.list().await.unwrap().first().is_none_or(|copy| copy.last < Position(101)) {
        tokio::task::yield_now().await;
    }
    reached(&stream, Position(101)).await;
    let fenced = gate.copies.fence(id(1), 1).await.unwrap().unwrap();
    assert_eq!(check_records(Position(1), |from| fenced.records(from, 5000)), Position(101));
}

/// Does to each batch what the seed says.
struct Bad {
    copies: Arc<Copies>,
    random: Mutex<StdRng>,
    late: Mutex<Vec<Batch>>,
    good: AtomicBool,
    troubles: AtomicUsize,
}

#[async_trait]
impl Transport for Bad {
    async fn send(&self, id: JournalId, batch: Batch) -> Result<Position, TransportError> {
        let lost = || Err(TransportError::Unreachable("lost".into()));
        let chance = if self.good.load(Ordering::SeqCst) { 100 } else { self.random.lock().random_range(0..10) };
        if chance < 6 {
            self.troubles.fetch_add(1, Ordering::SeqCst);
        }
        match chance {
            0 => return lost(),
            // The answer is lost.
            1 => {
                let _ = self.copies.accept(id, batch).await;
                return lost();
            }
            2 => drop(self.copies.accept(id, batch.clone()).await),
            // Arrives some time later, as well.
            3 => self.late.lock().push(batch.clone()),
            4 => return Err(Refusal::Full.into()),
            // Takes longer than anybody waits.
            5 => {
                self.late.lock().push(batch);
                return std::future::pending().await;
            }
            _ => {}
        }
        if chance == 6 {
            let late = self.late.lock().pop();
            if let Some(late) = late {
                let _ = self.copies.accept(id, late).await;
            }
        }
        Ok(self.copies.accept(id, batch).await?)
    }
}

#[tokio::test]
async fn whatever_the_way_does_the_copy_is_a_prefix_and_has_all_in_the_end() {
    for seed in 0..6 {
        let journal = journal();
        let copies = Arc::new(copies());
        let bad = Arc::new(Bad {
            copies: copies.clone(),
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            late: Mutex::default(),
            good: AtomicBool::new(false),
            troubles: AtomicUsize::new(0),
        });
        // Short, so that it is used up often; an answer that takes longer is only asked for again.
        let settings = StreamSettings { patience: Duration::from_millis(25), ..SETTINGS };
        let stream = Stream::start(journal.clone(), bad.clone(), settings);
        let mut random = StdRng::seed_from_u64(!seed);
        for _ in 0..40 {
            let last = append(&journal, random.random_range(1..20));
            if random.random_bool(0.5) {
                reached(&stream, last).await;
                assert!(copies.list().await.unwrap()[0].last >= last, "seed {seed}");
            }
            if random.random_bool(0.3) {
                journal.trim(stream.watch().borrow().durable);
            }
        }
        // A way that works again: all of it arrives.
        bad.good.store(true, Ordering::SeqCst);
        let last = append(&journal, 1);
        reached(&stream, last).await;
        assert!(bad.troubles.load(Ordering::SeqCst) > 0, "seed {seed}");
        let kept_from = copies.list().await.unwrap()[0].kept_from;
        assert!(kept_from <= journal.depth().trimmed.next());
        let fenced = copies.fence(id(1), 1).await.unwrap().unwrap();
        assert_eq!(check_records(kept_from, |from| fenced.records(from, 5000)), last, "seed {seed}");
    }
}
