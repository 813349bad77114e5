use ctfs_types::Ino;

use super::super::harness::{Volume, chunk, inline};
use crate::{RenameMode, Totals};

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
