use ctfs_types::{Ino, Stamp};

use super::super::{
    harness::{Volume, chunk, chunk_id, inline},
    observe::observe,
};
use crate::{Change, MetaError, Op};

const ROOT: Ino = Ino::ROOT;
const CELL: u64 = 1 << 20;
/// What one command frees here.
const BOUND: usize = 3;

/// A file of ten cells, the chunks 0 to 9 of a page each.
fn long_file() -> (Volume, Ino) {
    let mut volume = Volume::freeing_at_most(BOUND);
    let ino = volume.file(ROOT, "long");
    for n in 0..10 {
        volume.write(ino, n, chunk(n as u8, 4096)).unwrap();
    }
    (volume, ino)
}

fn cells(volume: &Volume, ino: Ino) -> Vec<u64> {
    volume.ns.cells(ino, 0, u64::MAX).unwrap().into_iter().map(|cell| cell.index).collect()
}

fn named(volume: &Volume) -> usize {
    (0..10).filter(|n| volume.references(chunk_id(*n)) == Some(1)).count()
}

#[test]
fn a_long_file_is_empty_at_once_and_freed_in_steps() {
    let (mut volume, ino) = long_file();
    volume.truncate(ino, 0).unwrap();
    assert!(volume.changes.contains(&Change::Data { ino, offset: 0, len: u64::MAX }));
    assert_eq!((volume.attr(ino).size, cells(&volume, ino)), (0, vec![]));
    assert_eq!(named(&volume), 10 - BOUND, "no more than the bound");
    assert_eq!(volume.attr(ino).allocated, (10 - BOUND as u64) * 4096, "space comes back as it is freed");
    for left in [4, 1, 0] {
        assert_eq!(volume.ns.unfreed(10), [ino]);
        let version = volume.attr(ino).data_version;
        volume.ok(Op::FreeCells { inos: vec![ino] });
        assert_eq!((named(&volume), volume.attr(ino).allocated), (left, left as u64 * 4096));
        assert!(volume.changes.contains(&Change::Attr { ino }), "its space changed");
        assert_eq!(volume.attr(ino).data_version, version, "its bytes did not");
        observe(&volume.ns);
    }
    assert_eq!(volume.ns.unfreed(10), []);
    let totals = volume.ns.totals(ROOT).unwrap().unwrap();
    assert_eq!((totals.files, totals.bytes, totals.allocated), (1, 0, 0));
}

#[test]
fn a_file_grown_again_before_all_is_freed_shows_zeros() {
    let (mut volume, ino) = long_file();
    volume.truncate(ino, CELL + 100).unwrap();
    volume.truncate(ino, 10 * CELL).unwrap();
    assert_eq!(cells(&volume, ino), [0, 1]);
    assert_eq!(volume.stamp(ino, 8), Stamp(0), "a hole, also to a writer");
    // Cell 8 was never freed; writing it gives its old chunk back.
    assert_eq!(volume.references(chunk_id(8)), Some(1));
    volume.write(ino, 8, inline(b"new")).unwrap();
    assert_eq!(volume.references(chunk_id(8)), Some(0));
    volume.free_all();
    assert_eq!(cells(&volume, ino), [0, 1, 8], "what was written since stays");
    assert_eq!(volume.attr(ino).allocated, 4096 + 4096 + 512);
    observe(&volume.ns);
}

#[test]
fn a_writer_that_merged_over_a_dead_cell_is_told() {
    let (mut volume, ino) = long_file();
    let seen = volume.stamp(ino, 9);
    volume.truncate(ino, 0).unwrap();
    let late = crate::CellWrite { cell: 9, expect: seen, start: 0, data: Some(inline(b"late")), copies: 0 };
    let op = super::super::harness::write_op(ino, vec![late], 10 * CELL);
    assert_eq!(volume.run(op), Err(MetaError::CellChanged { ino, cell: 9 }));
}

#[test]
fn a_dead_cell_is_not_cloned() {
    let (mut volume, ino) = long_file();
    let copy = volume.file(ROOT, "copy");
    volume.ok(Op::Punch { ino, first: 1, cells: 9 });
    volume.ok(Op::CloneCells { source: ino, first: 0, ino: copy, to: 0, cells: 10, size_at_least: 10 * CELL });
    assert_eq!((cells(&volume, ino), cells(&volume, copy)), (vec![0], vec![0]));
    // And one that is cloned over is freed.
    volume.ok(Op::CloneCells { source: ino, first: 0, ino, to: 9, cells: 1, size_at_least: 10 * CELL });
    assert_eq!((cells(&volume, ino), volume.references(chunk_id(9))), (vec![0, 9], Some(0)));
    observe(&volume.ns);
}

#[test]
fn a_long_file_punched_twice_keeps_what_lies_between() {
    let (mut volume, ino) = long_file();
    volume.ok(Op::Punch { ino, first: 0, cells: 4 });
    volume.ok(Op::Punch { ino, first: 6, cells: u64::MAX });
    assert_eq!(cells(&volume, ino), [4, 5]);
    volume.write(ino, 9, chunk(9, 4096)).unwrap();
    assert_eq!(volume.free_all(), 1, "one command goes on with as many cuts as it may");
    assert_eq!(cells(&volume, ino), [4, 5, 9]);
    observe(&volume.ns);
}

#[test]
fn freeing_cells_leaves_an_open_orphan_alone() {
    let (mut volume, ino) = long_file();
    volume.unlink(ROOT, "long").unwrap();
    volume.truncate(ino, CELL).unwrap();
    volume.free_all();
    assert_eq!((cells(&volume, ino), volume.attr(ino).allocated), (vec![0], 4096));
    observe(&volume.ns);
}

#[test]
fn a_reaped_inode_is_gone_at_once_and_its_cells_are_freed_in_steps() {
    let (mut volume, ino) = long_file();
    let other = volume.file(ROOT, "other");
    volume.write(other, 0, chunk(100, 10)).unwrap();
    volume.unlink(ROOT, "long").unwrap();
    volume.unlink(ROOT, "other").unwrap();
    // The other one has no share of the bound left.
    volume.ok(Op::Reap { inos: vec![ino, other] });
    for gone in [ino, other] {
        assert!(!volume.exists(gone) && cells(&volume, gone).is_empty());
        assert!(volume.changes.contains(&Change::Reaped { ino: gone }));
    }
    assert_eq!(volume.ns.orphans(Ino(0), 10).unwrap(), []);
    assert_eq!((named(&volume), volume.references(chunk_id(100))), (10 - BOUND, Some(1)));
    assert_eq!(volume.ns.file_of_chunk(&chunk_id(9)).unwrap(), None, "nothing that can be read names it");
    volume.free_all();
    assert_eq!((named(&volume), volume.references(chunk_id(100))), (0, Some(0)));
    assert_eq!(volume.ns.unfreed(10), []);
    observe(&volume.ns);
}

#[test]
fn in_one_entry_what_is_written_before_a_cut_goes_and_what_is_written_after_it_stays() {
    let (mut volume, ino) = long_file();
    let write = |cell: u64, expect, n| {
        let data = Some(chunk(n, 4096));
        let write = crate::CellWrite { cell, expect, start: 0, data, copies: 0 };
        super::super::harness::write_op(ino, vec![write], 10 * CELL)
    };
    let truncate = Op::SetAttr { ino, set: crate::SetAttr { size: Some(0), ..Default::default() } };
    let old = volume.stamp(ino, 8);
    let ops = [write(8, old, 50), truncate, write(9, Stamp(0), 60)];
    let commands: Vec<_> = ops.into_iter().map(|op| volume.command(op)).collect();
    for verdict in volume.apply(&commands) {
        verdict.unwrap();
    }
    assert_eq!(cells(&volume, ino), [9]);
    assert_eq!((volume.references(chunk_id(50)), volume.references(chunk_id(60))), (Some(1), Some(1)), "dead, not freed");
    observe(&volume.ns);
    volume.free_all();
    assert_eq!(cells(&volume, ino), [9]);
    assert_eq!((volume.references(chunk_id(50)), volume.references(chunk_id(60))), (Some(0), Some(1)));
    observe(&volume.ns);
}
