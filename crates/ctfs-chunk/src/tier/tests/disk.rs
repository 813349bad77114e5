//! The tier on a disk that fills up, and in a directory that somebody else removes or cuts.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::*;

const RESERVE: u64 = 64 * CELL;

/// A tier on a disk of `size` bytes, of which others take `others`.
fn tier_on(size: u64, others: &Arc<AtomicU64>) -> (tempfile::TempDir, CacheTier) {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("tier");
    let (at, others) = (cache.clone(), others.clone());
    let free = move || size.saturating_sub(others.load(Relaxed) + walk(&at));
    let settings = TierSettings { reserve_bytes: RESERVE, ..TierSettings::new(cache, 1 << 30) };
    (dir, CacheTier::open_with(settings, Box::new(free)).unwrap())
}

fn fill(entry: &Entry, cells: std::ops::Range<u64>) {
    for cell in cells {
        entry.fill(cell, tag(cell as u8, 0, CELL as u32), &vec![cell as u8; CELL as usize]).unwrap();
    }
}

fn cache_file(dir: &Path, ino: u64) -> PathBuf {
    dir.join(format!("tier/{:02x}/00/{ino:x}", ino & 0xff))
}

fn cut(path: &Path, len: u64) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

#[test]
fn the_tier_leaves_the_reserve_of_its_disk_free() {
    let others = Arc::new(AtomicU64::new(0));
    let size = RESERVE + 40 * CELL;
    let (dir, tier) = tier_on(size, &others);
    let e = entry(&tier, 2);
    for cell in 0..120 {
        let _ = e.fill(cell, tag(cell as u8, 0, CELL as u32), &vec![7; CELL as usize]);
        assert!(size - walk(dir.path()) >= RESERVE, "after cell {cell}");
    }
    assert!(tier.usage().clean > 0, "what fits is cached");
    // Written bytes may not go, so in the end there is no room for more of them.
    let written = (0..120).take_while(|cell| e.write((200 + cell) * CELL, &vec![9; CELL as usize]).is_ok()).count() as u64;
    assert!((30..=40).contains(&written), "{written}");
    assert!(size - walk(dir.path()) >= RESERVE);
    assert_eq!(tier.usage().clean, 0);
    assert_eq!(e.write(400 * CELL, &[1; 100]), Err(TierError::Full));
    assert_eq!(tier.usage().room, 0);
    // What is tiny needs no disk.
    entry(&tier, 3).write(0, b"tiny").unwrap();
    // Flushed bytes may go again.
    for cell in 200..200 + written {
        e.begin_flush(cell);
        e.settle(cell, Some((tag(9, 0, CELL as u32), &vec![9; CELL as usize])), None);
    }
    e.write(400 * CELL, &[1; 100]).unwrap();
}

#[test]
fn cached_bytes_give_way_when_others_fill_the_disk() {
    let others = Arc::new(AtomicU64::new(0));
    let size = RESERVE + 200 * CELL;
    let (dir, tier) = tier_on(size, &others);
    let e = entry(&tier, 2);
    fill(&e, 0..60);
    e.write(300 * CELL, &vec![1; CELL as usize]).unwrap();
    assert!(tier.keep_reserve());
    assert!(tier.usage().clean >= 50 * CELL);
    others.store(190 * CELL, Relaxed);
    tier.keep_reserve();
    assert!(size - others.load(Relaxed) - walk(dir.path()) >= RESERVE);
    others.store(size, Relaxed);
    assert!(!tier.keep_reserve(), "the disk is short whatever goes");
    assert_eq!((tier.usage().clean, tier.usage().dirty), (0, CELL));
    assert!(e.fill(0, tag(1, 0, CELL as u32), &vec![1; CELL as usize]).is_err(), "nothing new is cached");
    assert_eq!(read(&e, 300, 0..CELL, Base::Hole).unwrap(), vec![1; CELL as usize]);
}

#[test]
fn bytes_that_a_flush_does_not_keep_give_their_room_back() {
    let others = Arc::new(AtomicU64::new(0));
    let (dir, tier) = tier_on(RESERVE + 100 * CELL, &others);
    let e = entry(&tier, 2);
    e.write(0, &vec![1; 4 * CELL as usize]).unwrap();
    others.store(RESERVE + 100 * CELL, Relaxed);
    assert!(!tier.keep_reserve());
    for cell in 0..3 {
        e.begin_flush(cell);
        e.settle(cell, Some((tag(1, 0, CELL as u32), &vec![1; CELL as usize])), None);
    }
    let left = std::fs::metadata(cache_file(dir.path(), 2)).unwrap().blocks() * 512;
    assert!(left <= 2 * CELL, "{left} bytes for one unflushed cell");
    assert_eq!(read(&e, 3, 0..CELL, Base::Hole).unwrap(), vec![1; CELL as usize]);
}

#[test]
fn a_cut_cache_file_never_reads_as_zeros() {
    let (dir, tier) = tier(1 << 24);
    let e = entry(&tier, 7);
    fill(&e, 0..4);
    cut(&cache_file(dir.path(), 7), CELL + 1000);
    let whole = |cell: u64| Base::Chunk(tag(cell as u8, 0, CELL as u32));
    assert_eq!(read(&e, 0, 0..CELL, whole(0)).unwrap(), vec![0; CELL as usize]);
    assert_eq!(read(&e, 1, 0..CELL, whole(1)), None, "missing, so it is fetched");
    // A reader asks whether it is there by now: it must not be told yes for ever.
    assert!(!e.holds(1, &tag(1, 0, CELL as u32)) && !e.holds(3, &tag(3, 0, CELL as u32)));
    fill(&e, 1..4);
    for cell in 0..4 {
        assert_eq!(read(&e, cell, 0..CELL, whole(cell)).unwrap(), vec![cell as u8; CELL as usize]);
    }
    // A write past the cut makes the file long again, with zeros where cached bytes were.
    cut(&cache_file(dir.path(), 7), 10);
    e.write(6 * CELL, b"far").unwrap();
    for cell in 0..4 {
        assert_eq!(read(&e, cell, 0..CELL, whole(cell)), None);
    }
    assert_eq!(read(&e, 6, 0..3, Base::Hole).unwrap(), b"far");
    assert_eq!((tier.usage().clean, tier.usage().dirty), (0, 3));
    assert_eq!(e.take_lost(), 0, "nothing unflushed was in the part that went");
}

#[test]
fn unflushed_bytes_that_are_gone_are_an_error_until_told_and_never_zeros() {
    let (dir, tier) = tier(1 << 24);
    let e = entry(&tier, 7);
    e.write(0, &vec![1; 2 * CELL as usize]).unwrap();
    cut(&cache_file(dir.path(), 7), CELL);
    let mut out = vec![0xee; CELL as usize];
    assert!(e.view().read(1, 0..CELL, Base::Hole, &mut out).is_err());
    assert_eq!(e.view().read(1, 0..CELL, Base::Hole, &mut out), Err(TierError::Lost));
    assert_eq!(read(&e, 0, 0..CELL, Base::Hole).unwrap(), vec![1; CELL as usize], "the rest is whole");
    assert_eq!((e.dirty_bytes(), tier.dirty_bytes()), (CELL, CELL));
    // Written again, it is there again.
    e.write(CELL, &[2; 100]).unwrap();
    assert_eq!(read(&e, 1, 0..100, Base::Hole).unwrap(), [2; 100]);
    assert_eq!(e.take_lost(), CELL - 100);
    assert_eq!(e.take_lost(), 0);
    assert_eq!(read(&e, 1, 100..200, Base::Hole).unwrap(), [0; 100], "told: now it is what the metadata say");
}

#[test]
fn a_removed_cache_directory_is_made_again_and_used() {
    let dir = tempfile::tempdir().unwrap();
    // One open file, so that the other's descriptor is closed when the directory goes.
    let settings = TierSettings { open_files_max: 1, ..TierSettings::new(dir.path().join("tier"), 1 << 24) };
    let tier = CacheTier::open(settings).unwrap();
    let (clean, dirty, new) = (entry(&tier, 1), entry(&tier, 2), entry(&tier, 3));
    dirty.write(0, &[1; 50_000]).unwrap();
    fill(&clean, 0..1);
    std::fs::remove_dir_all(dir.path().join("tier")).unwrap();
    new.write(0, &[3; 100_000]).unwrap();
    assert_eq!(read(&new, 0, 0..100_000, Base::Hole).unwrap(), [3; 100_000]);
    let whole = Base::Chunk(tag(0, 0, CELL as u32));
    assert_eq!(read(&clean, 0, 0..CELL, whole), None);
    assert!(!clean.holds(0, &tag(0, 0, CELL as u32)));
    fill(&clean, 0..1);
    assert_eq!(read(&clean, 0, 0..CELL, whole).unwrap(), vec![0; CELL as usize]);
    assert_eq!(dirty.take_lost(), 50_000);
    dirty.write(0, &[2; 50_000]).unwrap();
    assert_eq!(read(&dirty, 0, 0..50_000, Base::Hole).unwrap(), [2; 50_000]);
    assert_eq!(tier.dirty_bytes(), 150_000);
}

#[test]
fn what_was_flushed_meanwhile_is_not_lost_with_its_file() {
    let (dir, tier) = tier(1 << 24);
    let e = entry(&tier, 7);
    e.write(0, &vec![1; 2 * CELL as usize]).unwrap();
    e.begin_flush(0);
    cut(&cache_file(dir.path(), 7), 0);
    let new = tag(1, 0, CELL as u32);
    e.settle(0, Some((new, &vec![1; CELL as usize])), None);
    assert_eq!(read(&e, 0, 0..CELL, Base::Chunk(new)).unwrap(), vec![1; CELL as usize]);
    assert_eq!(e.take_lost(), CELL, "only the cell that was not flushed");
}

#[test]
fn an_offset_that_the_file_system_does_not_know_is_too_big() {
    let (_dir, tier) = tier(1 << 24);
    let e = entry(&tier, 7);
    e.write(0, &[1; 50_000]).unwrap();
    // Some file systems have no such bound; where there is one, it has its own error.
    let far = e.write(17 << 40, &[2; 50_000]);
    assert!(matches!(far, Ok(()) | Err(TierError::TooBig)), "{far:?}");
    assert_eq!(super::super::entry::io_error("write cache file", rustix::io::Errno::FBIG), TierError::TooBig);
    e.discard(17 << 40..u64::MAX);
    e.discard(100 << 40..200 << 40);
    assert_eq!(read(&e, 0, 0..50_000, Base::Hole).unwrap(), [1; 50_000]);
}
