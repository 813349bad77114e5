//! Contents against a plain vector of bytes.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use bytes::Bytes;
use ctfs_meta::SetAttr;
use ctfs_types::Ino;
use proptest::prelude::*;

use super::harness::{CELL, Cluster, Fate, Server, pattern};
use crate::FsError;

/// Just over three cells.
const REACH: u64 = 3 * CELL + 10_000;

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, len: u64, seed: u8 },
    Append { len: u64, seed: u8 },
    Read { offset: u64, len: u64 },
    Truncate { size: u64 },
    Punch { offset: u64, len: u64 },
    ZeroRange { offset: u64, len: u64, keep_size: bool },
    Copy { from: u64, to: u64, len: u64 },
    Seek { offset: u64 },
    Flush,
    FailedFlush,
    /// A flush that is not answered.
    DoubtfulFlush { fate: Fate },
    /// What is late comes now.
    Deliver,
    Evict,
}

/// Offsets like real ones: small, at cell edges, anywhere.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..20_000u64,
        (0..4u64, 0..3u64).prop_map(|(cell, near)| (cell * CELL + near).saturating_sub(1)),
        (0..200u64).prop_map(|page| page * 4096),
        0..REACH
    ]
}

fn len() -> impl Strategy<Value = u64> {
    prop_oneof![1..5000u64, 1..40_000u64, Just(CELL), CELL - 2..2 * CELL]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (offset(), len(), 0..8u8).prop_map(|(offset, len, seed)| Step::Write { offset, len, seed }),
        1 => (1..9000u64, any::<u8>()).prop_map(|(len, seed)| Step::Append { len, seed }),
        4 => (offset(), len()).prop_map(|(offset, len)| Step::Read { offset, len }),
        2 => offset().prop_map(|size| Step::Truncate { size }),
        1 => (offset(), len()).prop_map(|(offset, len)| Step::Punch { offset, len }),
        1 => (offset(), len(), any::<bool>())
            .prop_map(|(offset, len, keep_size)| Step::ZeroRange { offset, len, keep_size }),
        1 => (offset(), offset(), len()).prop_map(|(from, to, len)| Step::Copy { from, to, len }),
        1 => (0..4u64, 0..4u64, 1..4u64)
            .prop_map(|(from, to, n)| Step::Copy { from: from * CELL, to: to * CELL, len: n * CELL }),
        1 => offset().prop_map(|offset| Step::Seek { offset }),
        3 => Just(Step::Flush),
        1 => Just(Step::FailedFlush),
        2 => prop_oneof![Just(Fate::Happens), Just(Fate::HappensLate), Just(Fate::Lost)]
            .prop_map(|fate| Step::DoubtfulFlush { fate }),
        1 => Just(Step::Deliver),
        2 => Just(Step::Evict),
    ]
}

/// The reference: all bytes of the file.
#[derive(Default)]
struct Model {
    bytes: Vec<u8>,
}

impl Model {
    fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset as usize + data.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset as usize..end].copy_from_slice(data);
    }

    fn part(&self, offset: u64, len: u64) -> &[u8] {
        let from = self.bytes.len().min(offset as usize);
        &self.bytes[from..self.bytes.len().min(from + len as usize)]
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let range = self.bytes.len().min(offset as usize)..self.bytes.len().min((offset + len) as usize);
        self.bytes[range].fill(0);
    }
}

/// Seed 0 writes zeros, which are dropped from chunks.
fn data(seed: u8, len: u64) -> Bytes {
    if seed == 0 { vec![0; len as usize].into() } else { pattern(seed, len as usize) }
}

async fn run(cluster: &Arc<Cluster>, server: &Server, ino: Ino, model: &mut Model, step: &Step) -> Result<(), TestCaseError> {
    match *step {
        Step::Write { offset, len, seed } => {
            let data = data(seed, len);
            prop_assert_eq!(server.write(ino, offset, data.clone(), false).await, Ok(len as u32));
            model.write(offset, &data);
        }
        Step::Append { len, seed } => {
            let data = data(seed, len);
            let end = model.bytes.len() as u64;
            prop_assert_eq!(server.append(ino, data.clone(), false).await, Ok(end));
            model.write(end, &data);
        }
        Step::Read { offset, len } => {
            let got = server.read(ino, offset, len as u32).await.unwrap();
            prop_assert!(got == model.part(offset, len), "bytes of {:?}: {}", step, difference(&got, model.part(offset, len)));
        }
        Step::Truncate { size } => {
            let attr = server.truncate(ino, SetAttr { size: Some(size), ..SetAttr::default() }).await.unwrap();
            prop_assert_eq!(attr.size, size);
            model.bytes.resize(size as usize, 0);
        }
        Step::Punch { offset, len } => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            server.allocate(ino, mode, offset, len).await.unwrap();
            model.zero(offset, len);
        }
        Step::ZeroRange { offset, len, keep_size } => {
            let keep = if keep_size { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
            server.allocate(ino, libc::FALLOC_FL_ZERO_RANGE | keep, offset, len).await.unwrap();
            model.zero(offset, len);
            if !keep_size && model.bytes.len() < (offset + len) as usize {
                model.bytes.resize((offset + len) as usize, 0);
            }
        }
        Step::Copy { from, to, len } => {
            let part = model.part(from, len).to_vec();
            let effective = part.len() as u64;
            if from < to + effective && to < from + effective {
                prop_assert!(matches!(server.copy(ino, from, ino, to, len).await, Err(FsError::Invalid(_))));
            } else {
                prop_assert_eq!(server.copy(ino, from, ino, to, len).await, Ok(effective));
                if !part.is_empty() {
                    model.write(to, &part);
                }
            }
        }
        Step::Seek { offset } => {
            let size = model.bytes.len() as u64;
            let (data, hole) =
                (server.seek(ino, offset, libc::SEEK_DATA).await, server.seek(ino, offset, libc::SEEK_HOLE).await);
            if offset >= size {
                prop_assert_eq!((&data, &hole), (&Err(FsError::PastEnd), &Err(FsError::PastEnd)));
            } else {
                // What is skipped as a hole is zero, and the hole found is not amid other bytes.
                let data = data.unwrap_or(size);
                let hole = hole.unwrap();
                prop_assert!(model.bytes[offset as usize..data as usize].iter().all(|&b| b == 0));
                prop_assert!(hole >= offset && hole <= size);
                prop_assert!(hole == size || model.bytes[hole as usize] == 0);
                prop_assert!(data == offset || hole == offset, "{} {} {}", offset, data, hole);
            }
        }
        Step::Flush => prop_assert_eq!(server.flush(ino).await, Ok(())),
        Step::FailedFlush => {
            cluster.failing_puts.store(1, SeqCst);
            let failed = server.flush(ino).await;
            cluster.failing_puts.store(0, SeqCst);
            prop_assert_eq!(server.take_error(ino), failed.err());
        }
        Step::DoubtfulFlush { fate } => {
            *cluster.fate.lock() = Some(fate);
            let failed = server.flush(ino).await;
            // Perhaps there was nothing to propose, or an earlier doubt stays.
            *cluster.fate.lock() = None;
            prop_assert_eq!(server.take_error(ino), failed.err());
        }
        Step::Deliver => cluster.deliver_late(),
        Step::Evict => {
            server.evict_all();
        }
    }
    let mut attr = cluster.attr(ino);
    assert!(server.overlay(&mut attr, server.moment()));
    prop_assert_eq!(attr.size, model.bytes.len() as u64, "size after {:?}", step);
    Ok(())
}

fn difference(got: &[u8], want: &[u8]) -> String {
    match got.iter().zip(want).position(|(a, b)| a != b) {
        Some(at) => format!("byte {at} is {} and should be {}", got[at], want[at]),
        None => format!("{} bytes came, {} were expected", got.len(), want.len()),
    }
}

async fn check_all(server: &Server, ino: Ino, model: &Model) -> Result<(), TestCaseError> {
    let got = server.read(ino, 0, u32::MAX / 4).await.unwrap();
    prop_assert!(got == model.bytes, "{}", difference(&got, &model.bytes));
    Ok(())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    #[test]
    fn a_file_agrees_with_a_vector_of_bytes(steps in prop::collection::vec(step(), 1..40)) {
        runtime().block_on(async {
            let cluster = Cluster::new();
            // Small enough that reading evicts, and that half of it is filled by dirty bytes.
            let server = cluster.server(12 * CELL);
            let ino = cluster.make("file");
            server.opened(ino, true);
            let mut model = Model::default();
            for step in &steps {
                run(&cluster, &server, ino, &mut model, step).await?;
                let usage = server.usage();
                prop_assert!(usage.clean + usage.dirty <= usage.limit, "{:?} after {:?}", usage, step);
            }
            check_all(&server, ino, &model).await?;
            server.flush_all().await.unwrap();
            prop_assert_eq!(server.dirty_bytes(), 0);
            check_all(&server, ino, &model).await?;
            // Whoever opens the file now, elsewhere, sees the same.
            check_all(&cluster.server(1 << 22), ino, &model).await
        })?;
    }

    #[test]
    fn what_one_server_flushed_every_other_reads(steps in prop::collection::vec((step(), any::<bool>()), 1..30)) {
        runtime().block_on(async {
            let cluster = Cluster::new();
            let servers = [cluster.server(12 * CELL), cluster.server(12 * CELL)];
            let ino = cluster.make("file");
            let mut model = Model::default();
            for (step, first) in &steps {
                let server = &servers[usize::from(*first)];
                server.opened(ino, true);
                run(&cluster, server, ino, &mut model, step).await?;
                prop_assert_eq!(server.flush(ino).await, Ok(()));
                server.closed(ino, true);
                check_all(&servers[usize::from(!*first)], ino, &model).await?;
            }
            check_all(&servers[0], ino, &model).await?;
            check_all(&servers[1], ino, &model).await
        })?;
    }

    #[test]
    fn two_writers_of_different_bytes_both_keep_theirs(
        writes in prop::collection::vec((any::<bool>(), 0..300u64, 1..6u64, any::<u8>(), 0..6u8), 1..40)
    ) {
        // Even blocks of 1000 bytes are the first server's, odd ones the second's.
        runtime().block_on(async {
            let cluster = Cluster::new();
            let servers = [cluster.server(1 << 24), cluster.server(1 << 24)];
            let ino = cluster.make("file");
            let mut model = Model::default();
            for (second, block, blocks, seed, then) in writes {
                let server = &servers[usize::from(second)];
                for block in block..block + blocks {
                    let offset = (block * 2 + u64::from(second)) * 1000;
                    let data = pattern(seed, 1000);
                    server.write(ino, offset, data.clone(), false).await.unwrap();
                    model.write(offset, &data);
                }
                match then {
                    0 => server.flush(ino).await.unwrap(),
                    1 => {
                        let (a, b) = tokio::join!(servers[0].flush(ino), servers[1].flush(ino));
                        (a.unwrap(), b.unwrap());
                    }
                    2 => { server.evict_all(); }
                    _ => {}
                }
            }
            let (a, b) = tokio::join!(servers[0].flush(ino), servers[1].flush(ino));
            (a.unwrap(), b.unwrap());
            check_all(&servers[0], ino, &model).await?;
            check_all(&servers[1], ino, &model).await
        })?;
    }
}
