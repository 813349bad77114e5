use ctfs_types::Ino;

use super::super::harness::{Verdict, Volume, chunk, inline, name, node, write_op};
use crate::{CellWrite, MetaError, NewContent, Op, Quota, RenameMode};

const ROOT: Ino = Ino::ROOT;
const CELL: u64 = 1 << 20;

fn limit(volume: &mut Volume, dir: Ino, bytes: Option<u64>, files: Option<u64>) {
    volume.ok(Op::SetQuota { ino: dir, quota: Quota { bytes, files } });
}

/// A directory that allows so much below it.
fn limited(volume: &mut Volume, text: &str, bytes: Option<u64>, files: Option<u64>) -> Ino {
    let dir = volume.dir(ROOT, text);
    limit(volume, dir, bytes, files);
    dir
}

fn make(volume: &mut Volume, parent: Ino, text: &str, content: NewContent) -> Verdict {
    volume.run(Op::Make { parent, name: name(text), node: node(content, 0o755) })
}

#[track_caller]
fn refused(verdict: Verdict, dir: Ino) {
    assert_eq!(verdict, Err(MetaError::QuotaExceeded { dir }));
}

#[track_caller]
fn across(verdict: Verdict) {
    assert!(matches!(verdict, Err(MetaError::AcrossQuota { .. })), "{verdict:?}");
}

#[test]
fn the_last_block_fits_and_the_next_does_not() {
    let mut volume = Volume::new();
    let dir = limited(&mut volume, "d", Some(8192), None);
    let file = volume.file(dir, "f");
    volume.write(file, 0, chunk(1, 8192)).unwrap();
    refused(volume.write(file, 1, inline(b"x")), dir);
    assert_eq!(volume.attr(file).size, 8192, "nothing of a refused write happened");
    // Written over what is there it takes no more.
    volume.write(file, 0, chunk(2, 8000)).unwrap();
    volume.write(file, 0, chunk(3, 4096)).unwrap();
    volume.write(file, 1, chunk(4, 1)).unwrap();
}

#[test]
fn holes_are_free_and_bytes_that_are_shared_count() {
    let mut volume = Volume::new();
    let dir = limited(&mut volume, "d", Some(8192), None);
    let (file, copy) = (volume.file(dir, "f"), volume.file(dir, "copy"));
    volume.truncate(file, 1 << 50).unwrap();
    volume.write(file, 0, chunk(1, 8192)).unwrap();
    let clone = Op::CloneCells { source: file, first: 0, ino: copy, to: 0, cells: 1, size_at_least: CELL };
    refused(volume.run(clone.clone()), dir);
    volume.truncate(file, 4096).unwrap();
    volume.ok(clone);
}

#[test]
fn every_kind_of_inode_counts_and_the_directory_itself_does_not() {
    let mut volume = Volume::new();
    let kinds = [
        NewContent::File,
        NewContent::Directory,
        NewContent::Symlink { target: b"x".to_vec() },
        NewContent::Fifo,
        NewContent::Socket,
        NewContent::CharDevice { rdev: 1 },
    ];
    let dir = limited(&mut volume, "d", None, Some(kinds.len() as u64));
    for (n, kind) in kinds.iter().enumerate() {
        make(&mut volume, dir, &format!("n{n}"), kind.clone()).unwrap();
    }
    for kind in kinds {
        refused(make(&mut volume, dir, "more", kind), dir);
    }
    volume.unlink(dir, "n0").unwrap();
    make(&mut volume, dir, "more", NewContent::File).unwrap();
}

#[test]
fn a_second_name_counts_nothing() {
    let mut volume = Volume::new();
    let dir = limited(&mut volume, "d", None, Some(1));
    let file = volume.file(dir, "f");
    volume.link(file, dir, "g").unwrap();
    volume.unlink(dir, "f").unwrap();
    refused(make(&mut volume, dir, "h", NewContent::File), dir);
}

#[test]
fn of_nested_quotas_all_hold() {
    let mut volume = Volume::new();
    let outer = limited(&mut volume, "outer", Some(3 * 4096), Some(4));
    let inner = volume.dir(outer, "inner");
    limit(&mut volume, inner, Some(2 * 4096), None);
    let (file, beside) = (volume.file(inner, "f"), volume.file(outer, "g"));
    volume.write(file, 0, chunk(1, 8192)).unwrap();
    refused(volume.write(file, 1, chunk(2, 1)), inner);
    volume.write(beside, 0, chunk(3, 4096)).unwrap();
    volume.truncate(file, 0).unwrap();
    volume.write(beside, 1, chunk(4, 4096)).unwrap();
    refused(volume.write(file, 0, chunk(1, 8192)), outer);
    make(&mut volume, inner, "h", NewContent::File).unwrap();
    refused(make(&mut volume, inner, "i", NewContent::File), outer);
    limit(&mut volume, ROOT, Some(2 * 4096), None);
    refused(volume.write(file, 0, chunk(1, 1)), ROOT);
}

#[test]
fn a_quota_below_what_there_is_lets_things_shrink_and_change_in_place() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    let file = volume.file(dir, "f");
    volume.write(file, 0, chunk(1, 40_000)).unwrap();
    limit(&mut volume, dir, Some(4096), Some(0));
    volume.rename(dir, "f", dir, "g", RenameMode::Replace).unwrap();
    volume.write(file, 0, chunk(2, 40_000)).unwrap();
    volume.write(file, 0, chunk(2, 30_000)).unwrap();
    volume.chmod(file, 0o600).unwrap();
    refused(volume.write(file, 1, inline(b"x")), dir);
    volume.truncate(file, 10_000).unwrap();
    refused(volume.write(file, 0, chunk(3, 30_000)), dir);
    volume.unlink(dir, "g").unwrap();
}

#[test]
fn nothing_moves_across_the_edge_of_a_quota() {
    let mut volume = Volume::new();
    let (a, b) = (limited(&mut volume, "a", None, Some(9)), limited(&mut volume, "b", None, Some(9)));
    let below = volume.dir(a, "below");
    let file = volume.file(a, "f");
    volume.file(b, "g");
    volume.dir(ROOT, "tree");
    let replace = RenameMode::Replace;
    across(volume.rename(a, "f", b, "f", replace));
    across(volume.rename(a, "f", ROOT, "f", replace));
    across(volume.rename(ROOT, "tree", a, "tree", replace));
    across(volume.rename(a, "f", b, "g", RenameMode::Exchange));
    across(volume.link(file, b, "f"));
    across(volume.link(file, ROOT, "f"));
    // Inside of it, and where no quota is, as ever.
    volume.rename(a, "f", below, "f", replace).unwrap();
    volume.link(file, a, "f").unwrap();
    volume.rename(ROOT, "tree", ROOT, "wood", replace).unwrap();
    limit(&mut volume, a, None, None);
    volume.rename(a, "f", ROOT, "f", replace).unwrap();
}

#[test]
fn a_quota_follows_its_directory_and_ends_with_it() {
    let mut volume = Volume::new();
    let a = limited(&mut volume, "a", None, Some(1));
    let elsewhere = volume.dir(ROOT, "elsewhere");
    volume.rename(ROOT, "a", elsewhere, "b", RenameMode::Replace).unwrap();
    volume.file(a, "f");
    refused(make(&mut volume, a, "g", NewContent::File), a);
    assert_eq!(volume.ns.quotas_over(a).unwrap().len(), 1);
    volume.unlink(a, "f").unwrap();
    volume.rmdir(elsewhere, "b").unwrap();
    assert_eq!(volume.ns.quotas().unwrap(), []);
    assert_eq!(volume.ns.quotas_over(a).unwrap(), []);
    // With the last quota gone nothing is walked for one.
    volume.file(ROOT, "f");
    volume.rename(ROOT, "f", elsewhere, "f", RenameMode::Replace).unwrap();
}

#[test]
fn an_unlinked_file_counts_no_more() {
    let mut volume = Volume::new();
    let dir = limited(&mut volume, "d", Some(4096), Some(1));
    let file = volume.file(dir, "f");
    volume.write(file, 0, chunk(1, 4096)).unwrap();
    volume.unlink(dir, "f").unwrap();
    let next = volume.file(dir, "g");
    volume.write(next, 0, chunk(2, 4096)).unwrap();
    volume.write(file, 1, chunk(3, 4096)).unwrap();
    assert_eq!(volume.ns.quotas_over(file).unwrap(), []);
}

#[test]
fn a_file_asks_the_quotas_from_its_directory_upwards() {
    let mut volume = Volume::new();
    let outer = limited(&mut volume, "outer", Some(100_000), None);
    let inner = volume.dir(outer, "inner");
    limit(&mut volume, inner, None, Some(7));
    let file = volume.file(inner, "f");
    let over: Vec<Ino> = volume.ns.quotas_over(file).unwrap().iter().map(|quota| quota.dir).collect();
    assert_eq!(over, [inner, outer]);
    let dirs: Vec<Ino> = volume.ns.quotas_over(inner).unwrap().iter().map(|quota| quota.dir).collect();
    assert_eq!(dirs, [inner, outer]);
    assert_eq!(volume.ns.quotas_over(ROOT).unwrap(), []);
}

#[test]
fn only_directories_have_quotas() {
    let mut volume = Volume::new();
    let file = volume.file(ROOT, "f");
    let quota = Quota { bytes: Some(1), files: None };
    assert_eq!(volume.run(Op::SetQuota { ino: file, quota }), Err(MetaError::NotDirectory(file)));
}

/// Two cells in one command of which the first shrinks: the sum decides.
#[test]
fn a_command_is_judged_as_a_whole() {
    let mut volume = Volume::new();
    let dir = limited(&mut volume, "d", Some(8192), None);
    let file = volume.file(dir, "f");
    volume.write(file, 1, chunk(1, 8192)).unwrap();
    let cell = |cell, data, expect| CellWrite { cell, expect, start: 0, data, copies: 0 };
    let cells = vec![cell(0, Some(chunk(2, 8192)), volume.stamp(file, 0)), cell(1, None, volume.stamp(file, 1))];
    volume.ok(write_op(file, cells, CELL));
}
