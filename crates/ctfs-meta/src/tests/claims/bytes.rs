use ctfs_types::{Extent, Ino, Stamp, Timestamp, limits::FILE_BYTES_MAX};

use super::super::harness::{Volume, chunk, chunk_id, inline, node, time, write_op};
use crate::{CellWrite, Change, MetaError, NewContent, Op, Reply, SetAttr};

const ROOT: Ino = Ino::ROOT;
const CELL: u64 = 1 << 20;

fn cell(cell: u64, expect: Stamp, data: Option<ctfs_types::ExtentData>) -> CellWrite {
    CellWrite { cell, expect, start: 0, data, copies: 0 }
}

const HOLE: Stamp = Stamp(0);

fn extents(volume: &Volume, ino: Ino) -> Vec<(u64, Extent)> {
    volume.ns.cells(ino, 0, u64::MAX).unwrap().into_iter().map(|cell| (cell.index, cell.extent)).collect()
}

#[test]
fn a_write_stamps_its_cells_with_the_new_data_version() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    let cells = vec![cell(0, HOLE, Some(chunk(1, 4096))), cell(2, HOLE, Some(inline(b"abc")))];
    let reply = volume.ok(write_op(ino, cells, 2 * CELL + 3));
    let stamp = Stamp(2);
    assert_eq!(reply, Reply::Written { attr: volume.attr(ino), stamp });
    let expected = [
        (0, Extent { start: 0, data: chunk(1, 4096), stamp }),
        (2, Extent { start: 0, data: inline(b"abc"), stamp }),
    ];
    assert_eq!(extents(&volume, ino), expected);
    let attr = volume.attr(ino);
    assert_eq!((attr.size, attr.data_version), (2 * CELL + 3, stamp.0));
    assert_eq!((attr.mtime, attr.ctime), (time(0), volume.now()));
    for first in [0, 2 * CELL] {
        let told = |change: &Change| matches!(change, Change::Data { offset, .. } if *offset == first);
        assert!(volume.changes.iter().any(told), "cell at {first}");
    }
}

#[test]
fn a_writer_that_merged_over_old_bytes_is_told() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.write(ino, 0, inline(b"one")).unwrap();
    let seen = volume.stamp(ino, 0);
    volume.write(ino, 0, inline(b"two")).unwrap();
    for expect in [HOLE, seen, Stamp(u64::MAX)] {
        let late = vec![cell(0, expect, Some(inline(b"late")))];
        assert_eq!(volume.run(write_op(ino, late, 4)), Err(MetaError::CellChanged { ino, cell: 0 }));
    }
    let hole = vec![cell(1, seen, Some(inline(b"late")))];
    assert_eq!(volume.run(write_op(ino, hole, CELL + 4)), Err(MetaError::CellChanged { ino, cell: 1 }));
    assert_eq!(volume.attr(ino).size, 3);
}

#[test]
fn all_cells_are_checked_before_any_is_changed() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.write(ino, 1, inline(b"one")).unwrap();
    let before = extents(&volume, ino);
    let cells = vec![cell(0, HOLE, Some(chunk(1, 9))), cell(1, HOLE, Some(chunk(2, 9)))];
    assert_eq!(volume.run(write_op(ino, cells, CELL + 9)), Err(MetaError::CellChanged { ino, cell: 1 }));
    assert_eq!(extents(&volume, ino), before);
    assert_eq!(volume.references(chunk_id(1)), None);
}

#[test]
fn a_truncate_between_read_and_write_is_noticed() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.write(ino, 0, inline(b"12345")).unwrap();
    let seen = volume.stamp(ino, 0);
    volume.truncate(ino, 2).unwrap();
    let merged = vec![cell(0, seen, Some(inline(b"1234X")))];
    assert_eq!(volume.run(write_op(ino, merged, 5)), Err(MetaError::CellChanged { ino, cell: 0 }));
    assert_eq!(extents(&volume, ino)[0].1.data, inline(b"12"));
}

#[test]
fn a_write_never_shrinks_and_says_how_far_the_file_reaches() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.ok(write_op(ino, vec![], 100));
    volume.ok(write_op(ino, vec![cell(0, HOLE, Some(inline(b"1")))], 1));
    assert_eq!(volume.attr(ino).size, 100);
}

#[test]
fn bytes_past_the_end_of_the_file_are_cut_off() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    let cells = vec![cell(0, HOLE, Some(inline(b"12345"))), cell(1, HOLE, Some(chunk(1, 9)))];
    volume.ok(write_op(ino, cells, 2));
    volume.truncate(ino, 3 * CELL).unwrap();
    let found = extents(&volume, ino);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].1.data, inline(b"12"));
    assert_eq!(volume.references(chunk_id(1)), None);
}

#[test]
fn cells_that_do_not_fit_are_refused() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    let too_long = CellWrite { start: CELL as u32 - 4, ..cell(0, HOLE, Some(chunk(1, 5))) };
    let overflowing = CellWrite { start: u32::MAX, ..cell(0, HOLE, Some(chunk(1, u32::MAX))) };
    let empty = cell(0, HOLE, Some(inline(b"")));
    let too_far = cell(FILE_BYTES_MAX / CELL, HOLE, Some(chunk(1, 5)));
    let farthest = cell(u64::MAX, HOLE, Some(chunk(1, 5)));
    for bad in [too_long, overflowing, empty, too_far, farthest] {
        assert!(volume.run(write_op(ino, vec![bad.clone()], CELL)).is_err(), "{bad:?}");
    }
    assert_eq!(volume.run(write_op(ino, vec![], FILE_BYTES_MAX + 1)), Err(MetaError::FileTooBig));
    assert_eq!(extents(&volume, ino), []);
    assert_eq!(volume.ns.chunk_count(), 0);
}

#[test]
fn only_files_have_bytes() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    let link = volume.make(ROOT, "s", node(NewContent::Symlink { target: b"x".to_vec() }, 0o777)).ino;
    let file = volume.file(ROOT, "f");
    for ino in [dir, link] {
        let wrong = Err(MetaError::WrongKind(ino));
        assert_eq!(volume.run(write_op(ino, vec![], 1)), wrong);
        assert_eq!(volume.run(Op::Punch { ino, first: 0, cells: 1 }), wrong);
        let clone = |source, ino| Op::CloneCells { source, first: 0, ino, to: 0, cells: 1, size_at_least: 0 };
        assert_eq!(volume.run(clone(ino, file)), wrong);
        assert_eq!(volume.run(clone(file, ino)), wrong);
    }
}

#[test]
fn punching_makes_holes_and_leaves_the_size() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    for n in 0..4 {
        volume.write(ino, n, chunk(n as u8, 5000)).unwrap();
    }
    volume.ok(Op::Punch { ino, first: 1, cells: 2 });
    let left: Vec<u64> = extents(&volume, ino).into_iter().map(|(index, _)| index).collect();
    assert_eq!(left, [0, 3]);
    let attr = volume.attr(ino);
    assert_eq!((attr.size, attr.allocated, attr.mtime), (3 * CELL + 5000, 16384, volume.now()));
    assert_eq!(volume.references(chunk_id(1)), Some(0));
    let data = Change::Data { ino, offset: CELL, len: 2 * CELL };
    assert!(volume.changes.contains(&data));
    volume.ok(Op::Punch { ino, first: 3, cells: u64::MAX });
    volume.ok(Op::Punch { ino, first: u64::MAX, cells: u64::MAX });
    assert_eq!(extents(&volume, ino).len(), 1);
}

#[test]
fn chunks_are_counted_by_the_cells_that_name_them() {
    let mut volume = Volume::new();
    let (a, b) = (volume.file(ROOT, "a"), volume.file(ROOT, "b"));
    volume.write(a, 0, chunk(1, 5000)).unwrap();
    assert!(volume.changes.contains(&Change::ChunkWanted { chunk: chunk_id(1) }));
    volume.write(a, 1, chunk(1, 5000)).unwrap();
    volume.write(b, 0, chunk(1, 5000)).unwrap();
    assert_eq!(volume.references(chunk_id(1)), Some(3));
    assert_eq!(volume.ns.file_of_chunk(&chunk_id(1)).unwrap(), Some(a));
    volume.write(a, 1, chunk(2, 100)).unwrap();
    volume.truncate(a, 0).unwrap();
    assert_eq!((volume.references(chunk_id(1)), volume.references(chunk_id(2))), (Some(1), Some(0)));
    volume.unlink(ROOT, "b").unwrap();
    assert_eq!(volume.references(chunk_id(1)), Some(1), "an orphan still holds its bytes");
    volume.ok(Op::Reap { inos: vec![b] });
    assert_eq!(volume.references(chunk_id(1)), Some(0));
    assert_eq!(volume.ns.file_of_chunk(&chunk_id(1)).unwrap(), None);
}

#[test]
fn writing_the_same_chunk_again_never_condemns_it() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.write(ino, 0, chunk(1, 5000)).unwrap();
    volume.write(ino, 0, chunk(1, 5000)).unwrap();
    let record = volume.ns.chunk(&chunk_id(1)).unwrap().expect("known");
    assert_eq!((record.references, record.condemned), (1, None));
    volume.ok(Op::CloneCells { source: ino, first: 0, ino, to: 0, cells: 1, size_at_least: 0 });
    let record = volume.ns.chunk(&chunk_id(1)).unwrap().expect("known");
    assert_eq!((record.references, record.condemned, record.len), (1, None, 5000));
}

#[test]
fn a_chunk_is_forgotten_only_while_nothing_names_it() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.write(ino, 0, chunk(1, 5000)).unwrap();
    let forget = || Op::ForgetChunks { chunks: vec![chunk_id(1), chunk_id(99)] };
    volume.ok(forget());
    assert_eq!(volume.references(chunk_id(1)), Some(1));
    assert_eq!(volume.changes, []);

    volume.truncate(ino, 0).unwrap();
    let condemned = volume.now();
    let record = volume.ns.chunk(&chunk_id(1)).unwrap().expect("known");
    assert_eq!((record.references, record.condemned), (0, Some(condemned)));
    assert_eq!(volume.ns.condemned(condemned, 10).unwrap(), [], "before means before");
    let later = Timestamp::new(condemned.secs + 1, 0);
    assert_eq!(volume.ns.condemned(later, 10).unwrap(), [chunk_id(1)]);

    // Named again in time: it stays.
    volume.write(ino, 0, chunk(1, 5000)).unwrap();
    assert!(volume.changes.contains(&Change::ChunkWanted { chunk: chunk_id(1) }));
    assert_eq!(volume.ns.condemned(later, 10).unwrap(), []);
    volume.ok(forget());
    assert_eq!(volume.references(chunk_id(1)), Some(1));

    volume.ok(Op::Punch { ino, first: 0, cells: 1 });
    volume.ok(forget());
    assert!(volume.changes.contains(&Change::ChunkForgotten { chunk: chunk_id(1) }));
    assert_eq!((volume.references(chunk_id(1)), volume.ns.chunk_count()), (None, 0));
}

#[test]
fn condemned_chunks_are_told_oldest_first() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    for n in [3, 1, 2] {
        volume.write(ino, 0, chunk(n, 10)).unwrap();
    }
    volume.truncate(ino, 0).unwrap();
    let end = Timestamp::new(i64::MAX, 0);
    assert_eq!(volume.ns.condemned(end, 10).unwrap(), [chunk_id(3), chunk_id(1), chunk_id(2)]);
    assert_eq!(volume.ns.condemned(end, 1).unwrap(), [chunk_id(3)]);
    let page: Vec<_> = volume.ns.chunks(Some(chunk_id(1)), 1).unwrap().into_iter().map(|(id, _)| id).collect();
    assert_eq!(page, [chunk_id(2)]);
}

#[test]
fn a_chunk_has_the_most_copies_any_of_its_cells_asked_for() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    let copies = |volume: &Volume| volume.ns.chunk(&chunk_id(1)).unwrap().expect("known").copies;
    for (index, wish, expected, told) in [(0, 1, 1, true), (1, 2, 2, true), (2, 1, 2, false), (3, 5, 5, true)] {
        let write = CellWrite { copies: wish, ..cell(index, HOLE, Some(chunk(1, 10))) };
        volume.ok(write_op(ino, vec![write], index * CELL + 10));
        assert_eq!(copies(&volume), expected);
        assert_eq!(volume.changes.contains(&Change::ChunkWanted { chunk: chunk_id(1) }), told, "cell {index}");
    }
}

/// Cloning once asked for the automatic number of copies, whatever the source had.
#[test]
fn a_clone_leaves_the_number_of_copies_alone() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    let write = CellWrite { copies: 1, ..cell(0, HOLE, Some(chunk(1, 10))) };
    volume.ok(write_op(ino, vec![write], 10));
    volume.ok(Op::CloneCells { source: ino, first: 0, ino, to: 5, cells: 1, size_at_least: 5 * CELL + 10 });
    let record = volume.ns.chunk(&chunk_id(1)).unwrap().expect("known");
    assert_eq!((record.references, record.copies), (2, 1));
}

#[test]
fn a_clone_shares_cells_and_holes() {
    let mut volume = Volume::new();
    let (a, b) = (volume.file(ROOT, "a"), volume.file(ROOT, "b"));
    volume.write(a, 0, chunk(1, 5000)).unwrap();
    volume.write(a, 2, inline(b"abc")).unwrap();
    volume.write(b, 2, chunk(9, 10)).unwrap();
    let op = Op::CloneCells { source: a, first: 0, ino: b, to: 1, cells: 3, size_at_least: 3 * CELL + 3 };
    let reply = volume.ok(op);
    let stamp = Stamp(3);
    assert_eq!(reply, Reply::Written { attr: volume.attr(b), stamp });
    let expected = [
        (1, Extent { start: 0, data: chunk(1, 5000), stamp }),
        (3, Extent { start: 0, data: inline(b"abc"), stamp }),
    ];
    assert_eq!(extents(&volume, b), expected);
    assert_eq!((volume.references(chunk_id(1)), volume.references(chunk_id(9))), (Some(2), Some(0)));
    assert_eq!((volume.attr(b).size, volume.attr(b).allocated), (3 * CELL + 3, 8192 + 512));
    assert_eq!(volume.attr(b).mtime, volume.now());
    assert!(volume.attr(a).mtime < volume.now());
    assert!(volume.changes.contains(&Change::Data { ino: b, offset: CELL, len: 3 * CELL }));
}

#[test]
fn a_clone_onto_itself_reads_before_it_writes() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    for n in 0..3 {
        volume.write(ino, n, chunk(n as u8, 10)).unwrap();
    }
    volume.ok(Op::CloneCells { source: ino, first: 0, ino, to: 1, cells: 3, size_at_least: 3 * CELL + 10 });
    let named: Vec<_> = extents(&volume, ino).into_iter().map(|(index, extent)| (index, extent.chunk())).collect();
    let expected = [(0, 0), (1, 0), (2, 1), (3, 2)].map(|(index, n)| (index, Some(chunk_id(n))));
    assert_eq!(named, expected);
    assert_eq!(volume.references(chunk_id(0)), Some(2));
}

#[test]
fn a_clone_of_part_of_a_cell_is_refused_where_the_target_goes_on() {
    let mut volume = Volume::new();
    let (a, b) = (volume.file(ROOT, "a"), volume.file(ROOT, "b"));
    volume.write(a, 0, chunk(1, 100)).unwrap();
    volume.write(b, 0, chunk(2, 200)).unwrap();
    let clone = |size_at_least| Op::CloneCells { source: a, first: 0, ino: b, to: 0, cells: 1, size_at_least };
    assert_eq!(volume.run(clone(100)), Err(MetaError::CellChanged { ino: b, cell: 0 }));
    assert_eq!(volume.references(chunk_id(2)), Some(1));
    volume.ok(clone(200));
    assert_eq!(volume.references(chunk_id(1)), Some(2));
}

#[test]
fn a_clone_past_the_largest_file_is_refused() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    for (first, to, cells) in [(0, FILE_BYTES_MAX / CELL, 1), (u64::MAX, 0, 1), (0, u64::MAX, 1), (0, 0, u64::MAX)] {
        let op = Op::CloneCells { source: ino, first, ino, to, cells, size_at_least: 0 };
        assert_eq!(volume.run(op), Err(MetaError::FileTooBig), "{first} {to} {cells}");
    }
}

#[test]
fn reap_leaves_alone_what_has_a_name() {
    let mut volume = Volume::new();
    let (dir, file) = (volume.dir(ROOT, "d"), volume.file(ROOT, "f"));
    volume.ok(Op::Reap { inos: vec![ROOT, dir, file, Ino(99), Ino(0)] });
    assert!(volume.exists(ROOT) && volume.exists(dir) && volume.exists(file));
    assert_eq!(volume.changes, []);
}

#[test]
fn each_change_of_the_bytes_moves_the_data_version_by_one() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    assert_eq!((volume.attr(ino).data_version, volume.attr(ROOT).data_version), (1, 1));
    let cells = vec![cell(0, HOLE, Some(chunk(1, 4096))), cell(1, HOLE, Some(chunk(2, 4096)))];
    let ops = [
        write_op(ino, cells, CELL + 4096),
        Op::CloneCells { source: ino, first: 0, ino, to: 2, cells: 2, size_at_least: 4 * CELL },
        Op::Punch { ino, first: 3, cells: 1 },
        Op::SetAttr { ino, set: SetAttr { size: Some(CELL + 5), ..SetAttr::default() } },
        Op::SetAttr { ino, set: SetAttr { size: Some(CELL + 5), ..SetAttr::default() } },
    ];
    let mut stamps = Vec::new();
    for (number, op) in ops.into_iter().enumerate() {
        // What is about other inodes, and what is refused, leaves it alone.
        volume.file(ROOT, &format!("other-{number}"));
        volume.write(ino, 9, chunk(1, 1 << 21)).unwrap_err();
        volume.ok(op);
        assert_eq!(volume.attr(ino).data_version, number as u64 + 2);
        stamps.push((0..4).map(|cell| volume.stamp(ino, cell).0).collect::<Vec<_>>());
    }
    // The clone leaves its source alone, the truncate what lies before its end.
    let expected = [[2, 2, 0, 0], [2, 2, 3, 3], [2, 2, 3, 0], [2, 5, 0, 0], [2, 5, 0, 0]];
    assert_eq!(stamps, expected);
    volume.chmod(ino, 0o600).unwrap();
    assert_eq!(volume.attr(ino).data_version, 6);
}

#[test]
fn cells_cloned_onto_themselves_stay_with_a_new_stamp() {
    let mut volume = Volume::freeing_at_most(1);
    let ino = volume.file(ROOT, "a");
    for n in 0..4 {
        volume.write(ino, n, chunk(n as u8, 4096)).unwrap();
    }
    // Cells 2 and 3 are dead but for one that is freed at once.
    volume.ok(Op::Punch { ino, first: 1, cells: 3 });
    volume.ok(Op::CloneCells { source: ino, first: 0, ino, to: 0, cells: 4, size_at_least: 4 * CELL });
    let stamp = Stamp(volume.attr(ino).data_version);
    assert_eq!(extents(&volume, ino), [(0, Extent { start: 0, data: chunk(0, 4096), stamp })]);
    volume.free_all();
    assert_eq!(extents(&volume, ino).len(), 1);
    assert_eq!((volume.references(chunk_id(0)), volume.references(chunk_id(3))), (Some(1), Some(0)));
    super::super::observe::observe(&volume.ns);
}
