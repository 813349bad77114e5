use std::collections::{BTreeMap, BTreeSet};

use ctfs_types::Ino;

use super::super::harness::{Volume, chunk, inline};
use crate::{Op, RenameMode, Totals};

type Records = BTreeMap<Vec<u8>, Vec<u8>>;

const ROOT: Ino = Ino::ROOT;

fn totals(volume: &Volume, dir: Ino) -> (u64, u64, u64, u64) {
    let Totals { files, directories, bytes, allocated } = volume.ns.totals(dir).unwrap().expect("a directory");
    (files, directories, bytes, allocated)
}

#[test]
fn a_directory_knows_what_is_below_it_at_any_depth() {
    let mut volume = Volume::new();
    let a = volume.dir(ROOT, "a");
    let b = volume.dir(a, "b");
    let file = volume.file(b, "f");
    volume.write(file, 0, chunk(1, 5000)).unwrap();
    assert_eq!(totals(&volume, b), (1, 0, 5000, 8192));
    assert_eq!(totals(&volume, a), (1, 1, 5000, 8192));
    assert_eq!(totals(&volume, ROOT), (1, 2, 5000, 8192));
    volume.truncate(file, 10).unwrap();
    assert_eq!(totals(&volume, ROOT), (1, 2, 10, 4096));
    volume.unlink(b, "f").unwrap();
    assert_eq!(totals(&volume, ROOT), (0, 2, 0, 0));
    assert_eq!(volume.ns.totals(file).unwrap(), None);
}

#[test]
fn a_moved_directory_takes_its_counts_along() {
    let mut volume = Volume::new();
    let (a, b) = (volume.dir(ROOT, "a"), volume.dir(ROOT, "b"));
    let tree = volume.dir(a, "tree");
    let file = volume.file(tree, "f");
    volume.write(file, 0, inline(b"123")).unwrap();
    volume.rename(a, "tree", b, "tree", RenameMode::Replace).unwrap();
    assert_eq!(totals(&volume, a), (0, 0, 0, 0));
    assert_eq!(totals(&volume, b), (1, 1, 3, 512));
    assert_eq!(totals(&volume, ROOT), (1, 3, 3, 512));
}

#[test]
fn a_hard_linked_file_counts_once_where_its_first_name_is() {
    let mut volume = Volume::new();
    let (a, b) = (volume.dir(ROOT, "a"), volume.dir(ROOT, "b"));
    let file = volume.file(b, "f");
    volume.write(file, 0, inline(b"123")).unwrap();
    volume.link(file, b, "g").unwrap();
    assert_eq!(totals(&volume, b), (1, 0, 3, 512));
    // Directory `a` is the older one: the file now counts there.
    volume.link(file, a, "z").unwrap();
    assert_eq!((totals(&volume, a), totals(&volume, b)), ((1, 0, 3, 512), (0, 0, 0, 0)));
    assert_eq!(totals(&volume, ROOT), (1, 2, 3, 512));
    volume.write(file, 0, inline(b"1234")).unwrap();
    volume.unlink(a, "z").unwrap();
    assert_eq!((totals(&volume, a), totals(&volume, b)), ((0, 0, 0, 0), (1, 0, 4, 512)));
}

/// Exchanging a file with the directory that holds its other name once left the counts of the
/// directories above wrong: the file's home moved while the directory hung nowhere, and its counts
/// were carried to where the directory had been.
#[test]
fn exchange_with_the_directory_of_a_further_name_keeps_counts_right() {
    for swapped in [false, true] {
        let mut volume = Volume::new();
        let deep = volume.dir(ROOT, "deep");
        let dir = volume.dir(deep, "dir");
        let file = volume.file(ROOT, "f");
        volume.link(file, dir, "f").unwrap();
        let ends = [(ROOT, "f"), (deep, "dir")];
        let [one, other] = if swapped { [ends[1], ends[0]] } else { ends };
        volume.rename(one.0, one.1, other.0, other.1, RenameMode::Exchange).unwrap();
        assert_eq!(totals(&volume, deep), (1, 0, 0, 0));
        assert_eq!(totals(&volume, dir), (0, 0, 0, 0));
        assert_eq!(totals(&volume, ROOT), (1, 2, 0, 0));
    }
}

fn differing(before: &Records, after: &Records) -> BTreeSet<Vec<u8>> {
    before.keys().chain(after.keys()).filter(|key| before.get(*key) != after.get(*key)).cloned().collect()
}

fn key(kind: u8, ino: Ino) -> Vec<u8> {
    [&[kind][..], &ino.0.to_be_bytes()].concat()
}

#[test]
fn of_the_directories_above_only_their_counts_change() {
    let mut volume = Volume::new();
    let a = volume.dir(ROOT, "a");
    let b = volume.dir(a, "b");
    let before = volume.records();
    let file = volume.file(b, "f");
    let made = volume.records();
    volume.write(file, 0, inline(b"123")).unwrap();
    let written = volume.records();
    volume.rename(b, "f", b, "g", RenameMode::Replace).unwrap();
    let changes = [differing(&before, &made), differing(&made, &written), differing(&written, &volume.records())];
    for (changed, counts) in changes.iter().zip([true, true, false]) {
        for dir in [ROOT, a, b] {
            assert_eq!(changed.contains(&key(24, dir)), counts, "counts of {dir}");
        }
        for dir in [ROOT, a] {
            assert!(!changed.contains(&key(1, dir)), "inode {dir}");
        }
    }
}

#[test]
fn a_directory_renamed_in_its_parent_touches_no_counts() {
    let mut volume = Volume::new();
    let above = volume.dir(ROOT, "above");
    let top = volume.dir(above, "top");
    for text in ["a", "b"] {
        let dir = volume.dir(top, text);
        let file = volume.file(dir, "f");
        volume.write(file, 0, inline(text.as_bytes())).unwrap();
    }
    let counts = |volume: &Volume| volume.records().into_iter().filter(|(key, _)| key[0] == 24).collect::<Records>();
    let before = counts(&volume);
    volume.asked.lock().clear();
    volume.rename(top, "a", top, "c", RenameMode::Replace).unwrap();
    volume.rename(top, "c", top, "b", RenameMode::Exchange).unwrap();
    assert_eq!(counts(&volume), before);
    let asked = std::mem::take(&mut *volume.asked.lock());
    assert!(asked.contains(&key(1, top)) && !asked.contains(&key(1, above)), "nothing above is looked at");
    assert!(asked.iter().all(|key| key[0] != 24), "nor counts");
    assert_eq!(totals(&volume, top), (2, 2, 2, 1024));
}

#[test]
fn a_directory_that_is_gone_leaves_no_counts_behind() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "dir");
    volume.file(dir, "f");
    assert!(volume.records().contains_key(&key(24, dir)));
    volume.unlink(dir, "f").unwrap();
    assert!(!volume.records().contains_key(&key(24, dir)), "nothing is counted");
    volume.rmdir(ROOT, "dir").unwrap();
    volume.ok(Op::Reap { inos: vec![dir] });
    assert!(volume.records().keys().all(|key| key[0] != 24));
}
