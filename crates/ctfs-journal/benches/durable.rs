//! One record of 4 KiB made durable by the journal, against write and fdatasync of one file.
//!
//! `cargo bench -p ctfs-journal --bench durable --profile dev [-- DIR]` prints the medians. The
//! directory says which disk is meant; without one it is the one with temporary files.

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use ctfs_journal::{Journal, JournalId, Settings, SystemDisk};
use ctfs_types::{Incarnation, NodeId};

const ROUNDS: usize = 2000;
/// The two take turns in pieces of this many, as disks have moods.
const TURN: usize = 50;
const RECORD: [u8; 4096] = [0x5a; 4096];

fn main() {
    let dir = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).map(PathBuf::from).unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::tempdir_in(dir).expect("make a directory");
    let mut plain = plain(dir.path());
    let mut journal = journal(dir.path());
    let (mut plain_times, mut journal_times) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS / TURN {
        plain_times.extend((0..TURN).map(|_| timed(&mut plain)));
        journal_times.extend((0..TURN).map(|_| timed(&mut journal)));
    }
    let (plain, journal) = (median(plain_times), median(journal_times));
    println!("write and fdatasync    {plain:>10.1?}");
    println!("append and durable     {journal:>10.1?}   {:.2} x", journal.as_secs_f64() / plain.as_secs_f64());
}

fn plain(dir: &Path) -> impl FnMut() + use<> {
    let file = OpenOptions::new().create(true).write(true).truncate(true).open(dir.join("plain")).expect("open");
    let mut at = 0;
    move || {
        file.write_all_at(&RECORD, at).expect("write");
        file.sync_data().expect("sync");
        at += RECORD.len() as u64;
    }
}

fn journal(dir: &Path) -> impl FnMut() + use<> {
    let id = JournalId { cluster: [1; 16], node: NodeId(1), incarnation: Incarnation(1) };
    let journal = Journal::create(Arc::new(SystemDisk), dir, id, Settings::default()).expect("begin");
    move || {
        let position = journal.append(Bytes::from_static(&RECORD)).expect("append");
        journal.durable_blocking(position, Duration::from_secs(60)).expect("durable");
    }
}

fn timed(step: &mut impl FnMut()) -> Duration {
    let start = Instant::now();
    step();
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
