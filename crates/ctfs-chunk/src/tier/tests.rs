mod disk;

use super::*;

const CELL: u64 = 256 << 10;

fn tier(limit: u64) -> (tempfile::TempDir, CacheTier) {
    let dir = tempfile::tempdir().unwrap();
    let tier = CacheTier::open(TierSettings::new(dir.path().join("tier"), limit)).unwrap();
    (dir, tier)
}

fn entry(tier: &CacheTier, ino: u64) -> Arc<Entry> {
    tier.entry(Ino(ino), CellSize::from_bytes(CELL).unwrap())
}

fn tag(n: u8, start: u32, len: u32) -> Tag {
    Tag { start, len, id: ctfs_types::ChunkId([n; 32]) }
}

fn read(entry: &Entry, cell: u64, range: std::ops::Range<u64>, base: Base<'_>) -> Option<Vec<u8>> {
    let mut out = vec![0xee; (range.end - range.start) as usize];
    match entry.view().read(cell, range, base, &mut out).unwrap() {
        Found::All => Some(out),
        Found::Missing => None,
    }
}

#[test]
fn a_cell_reads_as_its_tag_only() {
    let (_dir, tier) = tier(1 << 24);
    let e = entry(&tier, 7);
    let old = tag(1, 4096, 100_000);
    e.fill(0, old, &[1; 100_000]).unwrap();
    let whole = read(&e, 0, 0..CELL, Base::Chunk(old)).unwrap();
    assert!(whole[..4096].iter().all(|&b| b == 0) && whole[4096..104_096].iter().all(|&b| b == 1));
    assert!(whole[104_096..].iter().all(|&b| b == 0));
    // Another server wrote the cell: the extent names other content, so nothing is resident.
    assert_eq!(read(&e, 0, 0..CELL, Base::Chunk(tag(2, 0, 9))), None);
    // Another server cut the file: the beginning is still good.
    let cut = read(&e, 0, 0..CELL, Base::Chunk(tag(1, 4096, 10))).unwrap();
    assert_eq!(cut.iter().filter(|&&b| b == 1).count(), 10);
    assert_eq!(read(&e, 0, 0..4096, Base::Hole).unwrap(), vec![0; 4096]);
}

#[test]
fn unflushed_bytes_lie_over_any_base() {
    let (_dir, tier) = tier(1 << 24);
    let e = entry(&tier, 7);
    e.write(CELL + 20_000, &[9; 10]).unwrap();
    for base in [Base::Hole, Base::Bytes { start: 19_995, bytes: &[5; 20] }] {
        let got = read(&e, 1, 19_990..20_020, base).unwrap();
        assert_eq!(&got[10..20], &[9; 10]);
        let under = if matches!(base, Base::Hole) { 0 } else { 5 };
        assert_eq!((got[7], got[22]), (under, under));
    }
    assert_eq!(read(&e, 1, 20_000..20_010, Base::Chunk(tag(3, 0, 40_000))).unwrap(), vec![9; 10]);
    assert_eq!(read(&e, 1, 20_000..20_011, Base::Chunk(tag(3, 0, 40_000))), None);
    // The fill goes around them.
    e.fill(1, tag(3, 0, 40_000), &[3; 40_000]).unwrap();
    let got = read(&e, 1, 19_999..20_011, Base::Chunk(tag(3, 0, 40_000))).unwrap();
    assert_eq!(got, [3, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 3]);
}

#[test]
fn settling_makes_the_whole_new_content_resident() {
    let (_dir, tier) = tier(1 << 24);
    let e = entry(&tier, 7);
    // Leftovers of content that is not the base any more must not show through.
    e.fill(0, tag(1, 0, 50_000), &[1; 50_000]).unwrap();
    e.write(30_000, &[2; 100]).unwrap();
    e.begin_flush(0);
    e.write(30_050, &[3; 10]).unwrap();
    let mut content = vec![0; 40_000];
    content[..100].fill(7);
    content[30_000..30_100].fill(2);
    let new = tag(4, 0, 40_000);
    e.settle(0, Some((new, &content)), None);
    content[30_050..30_060].fill(3);
    assert_eq!(read(&e, 0, 0..40_000, Base::Chunk(new)).unwrap(), content);
    assert_eq!(e.resident(), [(0, Residency::Unflushed { dirty: 10, clean: 40_000 })]);
    assert_eq!((tier.usage().dirty, tier.usage().clean), (10, 40_000));
}

#[test]
fn a_failed_flush_keeps_every_byte_dirty() {
    let (_dir, tier) = tier(1 << 24);
    let e = entry(&tier, 7);
    e.write(0, &[1; 100]).unwrap();
    e.begin_flush(0);
    e.write(50, &[2; 100]).unwrap();
    assert_eq!(e.dirty_cells(false), [0]);
    e.abandon_flush();
    assert_eq!((tier.dirty_bytes(), e.dirty_bytes()), (150, 150));
    assert_eq!(read(&e, 0, 0..150, Base::Hole).unwrap(), [vec![1; 50], vec![2; 100]].concat());
}

#[test]
fn the_limit_holds_and_only_clean_cells_go() {
    let limit = 8 * CELL;
    let (dir, tier) = tier(limit);
    let dirty = entry(&tier, 1);
    dirty.write(0, &[1; CELL as usize]).unwrap();
    let e = entry(&tier, 2);
    for cell in 0..40 {
        e.fill(cell, tag(cell as u8, 0, CELL as u32), &vec![cell as u8; CELL as usize]).unwrap();
        let usage = tier.usage();
        assert!(usage.clean + usage.dirty <= limit, "{usage:?}");
    }
    assert!(tier.usage().evictions >= 32);
    assert_eq!(read(&dirty, 0, 0..CELL, Base::Hole).unwrap(), vec![1; CELL as usize]);
    let blocks: u64 = walk(dir.path());
    assert!(blocks <= limit + (1 << 20), "holes were punched: {blocks} bytes on disk");
    // Everything dirty: nothing may go, and the tier says so.
    for cell in 1..7 {
        dirty.write(cell * CELL, &[1; CELL as usize]).unwrap();
    }
    dirty.write(7 * CELL, &[1; CELL as usize]).unwrap();
    assert_eq!(dirty.write(8 * CELL, &[1; 10]), Err(TierError::Full));
    assert_eq!(tier.usage().clean, 0);
    assert_eq!(tier.usage().dirty, limit);
}

/// Bytes on disk under `dir`.
fn walk(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut sum = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        sum += if meta.is_dir() { walk(&entry.path()) } else { meta.blocks() * 512 };
    }
    sum
}

#[test]
fn tiny_files_stay_in_memory_until_they_grow() {
    let (dir, tier) = tier(1 << 24);
    let e = entry(&tier, 0x0506);
    e.write(0, b"hello").unwrap();
    e.write(16_000, b"world").unwrap();
    assert_eq!(walk(dir.path()), 0);
    assert_eq!(tier.usage().memory, 16_005);
    e.write(16_380, b"over the edge").unwrap();
    assert_eq!(tier.usage().memory, 0);
    assert!(dir.path().join("tier/06/05/506").exists());
    let got = read(&e, 0, 0..17_000, Base::Hole).unwrap();
    assert_eq!((&got[..5], &got[16_000..16_005], &got[16_380..16_393]), (&b"hello"[..], &b"world"[..], &b"over the edge"[..]));
}

#[test]
fn discarding_cuts_tags_and_drops_unflushed_bytes() {
    let (_dir, tier) = tier(1 << 24);
    let e = entry(&tier, 7);
    let full = tag(1, 0, 100_000);
    e.fill(0, full, &[1; 100_000]).unwrap();
    e.write(CELL, &[2; 100]).unwrap();
    e.discard(60_000..u64::MAX);
    assert_eq!((tier.usage().clean, tier.usage().dirty), (60_000, 0));
    assert!(e.holds(0, &tag(1, 0, 60_000)));
    // The same chunk named in full again, by another server: the cut bytes are not here.
    assert!(!e.holds(0, &full));
    // Dropped unflushed bytes leave unknown ones behind, so the tag goes with them.
    e.write(10, &[3; 10]).unwrap();
    e.discard(15..u64::MAX);
    assert_eq!(read(&e, 0, 10..15, Base::Chunk(tag(1, 0, 15))).unwrap(), [3; 5]);
    assert_eq!(read(&e, 0, 0..15, Base::Chunk(tag(1, 0, 15))), None);
}

#[test]
fn forgetting_an_inode_gives_everything_back() {
    let (dir, tier) = tier(1 << 24);
    for ino in 1..20 {
        let e = entry(&tier, ino);
        e.fill(0, tag(1, 0, 100_000), &[1; 100_000]).unwrap();
        e.write(CELL, &[2; 100]).unwrap();
    }
    for ino in 1..20 {
        tier.forget(Ino(ino));
    }
    let usage = tier.usage();
    assert_eq!((usage.clean, usage.dirty, usage.cells, usage.memory), (0, 0, 0, 0));
    assert_eq!(walk(dir.path()), 0);
    let e = entry(&tier, 3);
    assert_eq!(read(&e, 0, 0..10, Base::Chunk(tag(1, 0, 10))), None);
}

#[test]
fn evicting_all_leaves_pinned_and_unflushed_cells() {
    let (_dir, tier) = tier(1 << 24);
    for ino in 1..4 {
        entry(&tier, ino).fill(0, tag(1, 0, 100_000), &[1; 100_000]).unwrap();
    }
    entry(&tier, 2).write(5, b"x").unwrap();
    tier.pin(Ino(3));
    assert_eq!(tier.evict_all(), 1);
    assert!(tier.peek(Ino(1)).is_none(), "an entry without bytes is dropped");
    assert_eq!(tier.resident(Ino(2)), [(0, Residency::Unflushed { dirty: 1, clean: 100_000 })]);
    assert_eq!(tier.resident(Ino(3)), [(0, Residency::Clean { bytes: 100_000 })]);
}
