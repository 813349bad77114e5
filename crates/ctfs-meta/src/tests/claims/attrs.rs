use ctfs_types::{Ino, Stamp, Timestamp, limits::FILE_BYTES_MAX};

use super::super::harness::{Volume, chunk, inline, node, time};
use crate::{Change, MetaError, NewContent, Op, Reply, SetAttr, XattrMode};

const ROOT: Ino = Ino::ROOT;
const CELL: u64 = 1 << 20;

fn drop_privileges() -> SetAttr {
    SetAttr { drop_privileges: true, ..SetAttr::default() }
}

#[test]
fn only_the_named_fields_change() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    let before = volume.attr(ino);
    let set = SetAttr { uid: Some(5), atime: Some(Timestamp::new(-3, 7)), ..SetAttr::default() };
    let reply = volume.set(ino, set);
    let mut expected = before;
    (expected.uid, expected.atime, expected.ctime) = (5, Timestamp::new(-3, 7), volume.now());
    assert_eq!(reply, Ok(Reply::Attr(expected.clone())));
    assert_eq!(volume.attr(ino), expected);
    assert!(volume.changes.contains(&Change::Attr { ino }));
}

#[test]
fn chmod_sets_all_twelve_bits_and_the_ctime() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.chmod(ino, 0o7751).unwrap();
    let attr = volume.attr(ino);
    assert_eq!((attr.mode, attr.ctime, attr.mtime), (0o7751, volume.now(), time(1)));
}

#[test]
fn times_set_by_hand_win_over_the_clock() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    let then = Timestamp::new(-1_000, 1);
    volume.set(ino, SetAttr { size: Some(5), mtime: Some(then), ..SetAttr::default() }).unwrap();
    assert_eq!((volume.attr(ino).mtime, volume.attr(ino).ctime), (then, volume.now()));
}

#[test]
fn truncate_moves_mtime_and_ctime() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.truncate(ino, 5).unwrap();
    assert_eq!((volume.attr(ino).mtime, volume.attr(ino).ctime), (volume.now(), volume.now()));
}

#[test]
fn growing_a_file_only_moves_its_end() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.write(ino, 0, inline(b"hello")).unwrap();
    let (cells, allocated) = (volume.ns.cells(ino, 0, 9).unwrap(), volume.attr(ino).allocated);
    volume.truncate(ino, 3 * CELL).unwrap();
    assert_eq!((volume.attr(ino).size, volume.attr(ino).allocated), (3 * CELL, allocated));
    assert_eq!(volume.ns.cells(ino, 0, 9).unwrap(), cells);
    assert!(volume.changes.iter().any(|change| matches!(change, Change::Data { offset: 5, .. })));
}

#[test]
fn shrinking_a_file_cuts_its_extents() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    for cell in 0..3 {
        volume.write(ino, cell, chunk(cell as u8, 10_000)).unwrap();
    }
    assert_eq!(volume.attr(ino).allocated, 3 * 12_288);
    volume.truncate(ino, CELL + 5_000).unwrap();
    let cells = volume.ns.cells(ino, 0, 9).unwrap();
    assert_eq!(cells.len(), 2);
    assert_eq!(cells[1].extent.data, chunk(1, 5_000));
    let stamp = Stamp(volume.attr(ino).data_version);
    assert_eq!(cells[1].extent.stamp, stamp, "who merges over the longer bytes must notice");
    assert!(cells[0].extent.stamp < stamp);
    assert_eq!(volume.attr(ino).allocated, 12_288 + 8_192);
    // The chunk of the cut cell is still whole; that of the lost one is not named any more.
    let references: Vec<_> = (0..3).map(|n| volume.references(super::super::harness::chunk_id(n))).collect();
    assert_eq!(references, [Some(1), Some(1), Some(0)]);
    // Growing again shows zeros, not the old bytes.
    volume.truncate(ino, 3 * CELL).unwrap();
    assert_eq!(volume.ns.cells(ino, 0, 9).unwrap(), cells);
}

#[test]
fn a_file_has_at_most_2_to_the_60_bytes() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.truncate(ino, FILE_BYTES_MAX).unwrap();
    assert_eq!(volume.truncate(ino, FILE_BYTES_MAX + 1), Err(MetaError::FileTooBig));
    assert_eq!(volume.truncate(ino, u64::MAX), Err(MetaError::FileTooBig));
    volume.truncate(ino, 0).unwrap();
}

#[test]
fn only_files_have_a_size_to_set() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    let fifo = volume.make(ROOT, "p", node(NewContent::Fifo, 0o600)).ino;
    assert_eq!(volume.truncate(dir, 0), Err(MetaError::WrongKind(dir)));
    assert_eq!(volume.truncate(fifo, 0), Err(MetaError::WrongKind(fifo)));
}

#[test]
fn allocated_counts_blocks_of_4096_and_inline_sectors_of_512() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.write(ino, 0, inline(&[1; 513])).unwrap();
    assert_eq!(volume.attr(ino).allocated, 1024);
    volume.write(ino, 0, chunk(1, 4097)).unwrap();
    assert_eq!(volume.attr(ino).allocated, 8192);
    volume.write(ino, 7, chunk(2, 1)).unwrap();
    assert_eq!((volume.attr(ino).allocated, volume.attr(ino).size), (8192 + 4096, 7 * CELL + 1));
}

#[test]
fn dropping_privileges_clears_setuid_setgid_and_capabilities() {
    let mut volume = Volume::new();
    let ino = volume.make(ROOT, "a", node(NewContent::File, 0o6755)).ino;
    volume.set_xattr(ino, "security.capability", b"caps").unwrap();
    volume.set_xattr(ino, "user.kept", b"x").unwrap();
    volume.set(ino, drop_privileges()).unwrap();
    assert_eq!(volume.attr(ino).mode, 0o755);
    assert_eq!(volume.xattr(ino, "security.capability"), None);
    assert_eq!(volume.xattr(ino, "user.kept"), Some(b"x".to_vec()));
}

#[test]
fn setgid_without_group_execution_means_locking_and_stays() {
    let mut volume = Volume::new();
    let ino = volume.make(ROOT, "a", node(NewContent::File, 0o6745)).ino;
    volume.set(ino, drop_privileges()).unwrap();
    assert_eq!(volume.attr(ino).mode, 0o2745);
}

#[test]
fn a_directory_keeps_its_setgid_bit_when_its_owner_changes() {
    let mut volume = Volume::new();
    let ino = volume.make(ROOT, "d", node(NewContent::Directory, 0o2775)).ino;
    volume.set(ino, SetAttr { uid: Some(3), ..drop_privileges() }).unwrap();
    assert_eq!((volume.attr(ino).mode, volume.attr(ino).uid), (0o2775, 3));
}

#[test]
fn a_write_of_the_unprivileged_drops_setuid() {
    let mut volume = Volume::new();
    let ino = volume.make(ROOT, "a", node(NewContent::File, 0o4755)).ino;
    volume.ok(Op::Write { ino, cells: vec![], size_at_least: 1, mtime: None, drop_privileges: false, appends_at: None, noted: None });
    assert_eq!((volume.attr(ino).mode, volume.attr(ino).mtime), (0o4755, volume.now()));
    volume.ok(Op::Write { ino, cells: vec![], size_at_least: 1, mtime: None, drop_privileges: true, appends_at: None, noted: None });
    assert_eq!(volume.attr(ino).mode, 0o755);
}

#[test]
fn chmod_by_a_stranger_to_the_group_loses_setgid() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.set(ino, SetAttr { mode: Some(0o6755), drop_setgid: true, ..SetAttr::default() }).unwrap();
    assert_eq!(volume.attr(ino).mode, 0o4755);
}

#[test]
fn extended_attributes_are_created_replaced_and_removed_by_the_flags() {
    let mut volume = Volume::new();
    let ino = volume.dir(ROOT, "d");
    let set = |mode, value: &[u8]| Op::SetXattr { ino, name: b"user.a".to_vec(), value: value.to_vec(), mode };
    assert_eq!(volume.run(set(XattrMode::Replace, b"0")), Err(MetaError::NoSuchXattr));
    volume.ok(set(XattrMode::Create, b"1"));
    assert_eq!(volume.attr(ino).ctime, volume.now());
    assert_eq!(volume.run(set(XattrMode::Create, b"2")), Err(MetaError::XattrExists));
    volume.ok(set(XattrMode::Replace, b"3"));
    volume.set_xattr(ino, "user.", b"").unwrap();
    assert_eq!(volume.ns.xattr_names(ino).unwrap(), [b"user.".to_vec(), b"user.a".to_vec()]);
    assert_eq!(volume.xattr(ino, "user.a"), Some(b"3".to_vec()));
    assert_eq!(volume.xattr(ino, "user."), Some(vec![]));
    volume.ok(Op::RemoveXattr { ino, name: b"user.a".to_vec() });
    assert_eq!(volume.attr(ino).ctime, volume.now());
    assert_eq!(volume.run(Op::RemoveXattr { ino, name: b"user.a".to_vec() }), Err(MetaError::NoSuchXattr));
}

#[test]
fn an_extended_attribute_has_the_limits_of_linux() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    let long = "n".repeat(255);
    volume.set_xattr(ino, &long, &[0; 65536]).unwrap();
    assert_eq!(volume.set_xattr(ino, "user.a", &[0; 65537]), Err(MetaError::XattrTooBig));
    assert_eq!(volume.set_xattr(ino, &(long + "n"), b""), Err(MetaError::XattrTooBig));
}

#[test]
fn extended_attributes_go_with_the_inode() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.set_xattr(ino, "user.a", b"1").unwrap();
    volume.unlink(ROOT, "a").unwrap();
    assert_eq!(volume.xattr(ino, "user.a"), Some(b"1".to_vec()));
    volume.ok(Op::Reap { inos: vec![ino] });
    assert_eq!(volume.xattr(ino, "user.a"), None);
    assert_eq!(volume.set_xattr(ino, "user.a", b"1"), Err(MetaError::NoSuchInode(ino)));
}
