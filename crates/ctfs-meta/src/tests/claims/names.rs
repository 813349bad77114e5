use ctfs_types::{FileKind, Ino};

use super::super::harness::{Volume, name, node, time};
use crate::{Change, MetaError, NewContent, NewNode, Op, RenameMode, Reply};

const ROOT: Ino = Ino::ROOT;

/// Owner, group, mode and type of what was made.
fn make(volume: &mut Volume, parent: Ino, text: &str, node: NewNode) -> (u32, u32, u16, FileKind) {
    let attr = volume.make(parent, text, node);
    (attr.uid, attr.gid, attr.mode, attr.kind)
}

#[test]
fn an_empty_volume_has_a_root_directory_of_root() {
    let volume = Volume::new();
    let root = volume.attr(ROOT);
    assert_eq!((root.kind, root.mode, root.uid, root.gid), (FileKind::Directory, 0o755, 0, 0));
    assert_eq!((root.nlink, root.size), (2, 0));
    assert_eq!(volume.ns.parent(ROOT).unwrap(), Some(ROOT));
    assert_eq!(volume.ns.path(ROOT).unwrap(), Some(vec![]));
}

#[test]
fn a_made_file_has_one_link_and_the_time_of_its_command() {
    let mut volume = Volume::new();
    let attr = volume.make(ROOT, "a", node(NewContent::File, 0o4640));
    assert_eq!((attr.kind, attr.mode, attr.uid, attr.gid), (FileKind::File, 0o4640, 1000, 100));
    assert_eq!((attr.nlink, attr.size, attr.allocated), (1, 0, 0));
    let now = volume.now();
    assert_eq!((attr.atime, attr.mtime, attr.ctime, attr.btime), (now, now, now, now));
    assert_eq!(volume.lookup(ROOT, "a"), Some(attr.ino));
    assert_eq!(volume.attr(attr.ino), attr);
    assert!(volume.changes.contains(&Change::Entry { parent: ROOT, name: name("a") }));
}

#[test]
fn inode_numbers_start_at_two_and_are_never_reused() {
    let mut volume = Volume::new();
    let first = volume.file(ROOT, "a");
    assert_eq!(first, Ino(2));
    volume.unlink(ROOT, "a").unwrap();
    volume.ok(Op::Reap { inos: vec![first] });
    let dir = volume.dir(ROOT, "a");
    assert_eq!(dir, Ino(3));
    volume.rmdir(ROOT, "a").unwrap();
    assert_eq!(volume.file(ROOT, "a"), Ino(4));
}

#[test]
fn without_a_default_acl_the_umask_counts() {
    let mut volume = Volume::new();
    let node = NewNode { umask: 0o027, ..node(NewContent::File, 0o666) };
    assert_eq!(volume.make(ROOT, "a", node).mode, 0o640);
}

#[test]
fn a_symlink_has_mode_0777_and_the_length_of_its_target() {
    let mut volume = Volume::new();
    let link = NewNode { umask: 0o077, ..node(NewContent::Symlink { target: b"a/b".to_vec() }, 0o600) };
    let attr = volume.make(ROOT, "s", link);
    assert_eq!((attr.mode, attr.size, attr.nlink), (0o777, 3, 1));
    assert_eq!(volume.ns.readlink(attr.ino).unwrap(), Some(b"a/b".to_vec()));
    let file = volume.file(ROOT, "f");
    assert_eq!(volume.ns.readlink(file).unwrap(), None);
}

#[test]
fn a_symlink_target_has_1_to_4095_bytes() {
    let mut volume = Volume::new();
    for (len, right) in [(0, false), (1, true), (4095, true), (4096, false)] {
        let node = node(NewContent::Symlink { target: vec![b'x'; len] }, 0o777);
        let verdict = volume.run(Op::Make { parent: ROOT, name: name(&format!("s{len}")), node });
        assert_eq!(verdict.is_ok(), right, "{len} bytes");
        assert!(right || verdict == Err(MetaError::BadTarget));
    }
}

#[test]
fn every_kind_of_inode_can_be_made() {
    let mut volume = Volume::new();
    for (content, kind, rdev) in [
        (NewContent::Fifo, FileKind::Fifo, 0),
        (NewContent::Socket, FileKind::Socket, 0),
        (NewContent::CharDevice { rdev: 0x501 }, FileKind::CharDevice, 0x501),
        (NewContent::BlockDevice { rdev: 0x802 }, FileKind::BlockDevice, 0x802),
    ] {
        let attr = volume.make(ROOT, &format!("{kind:?}"), node(content, 0o600));
        assert_eq!((attr.kind, attr.rdev, attr.nlink, attr.mode), (kind, rdev, 1, 0o600));
    }
}

#[test]
fn in_a_setgid_directory_the_group_is_that_of_the_directory() {
    let mut volume = Volume::new();
    let shared = NewNode { gid: 5, ..node(NewContent::Directory, 0o2775) };
    let shared = volume.make(ROOT, "shared", shared).ino;
    assert_eq!(make(&mut volume, shared, "f", node(NewContent::File, 0o644)), (1000, 5, 0o644, FileKind::File));
    let below = node(NewContent::Directory, 0o755);
    assert_eq!(make(&mut volume, shared, "d", below), (1000, 5, 0o2755, FileKind::Directory));
}

#[test]
fn open_without_excl_finds_an_existing_regular_file() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    let before = volume.attr(ROOT);
    let open = NewNode { exclusive: false, uid: 77, ..node(NewContent::File, 0o600) };
    let verdict = volume.run(Op::Make { parent: ROOT, name: name("a"), node: open.clone() });
    assert_eq!(verdict, Ok(Reply::Entry { attr: volume.attr(ino), made: false }));
    assert_eq!(volume.attr(ino).uid, 1000);
    assert_eq!(volume.attr(ROOT), before);

    volume.dir(ROOT, "d");
    let verdict = volume.run(Op::Make { parent: ROOT, name: name("d"), node: open });
    assert_eq!(verdict, Err(MetaError::Exists { parent: ROOT, name: name("d") }));
    let verdict = volume.run(Op::Make { parent: ROOT, name: name("a"), node: node(NewContent::File, 0o600) });
    assert_eq!(verdict, Err(MetaError::Exists { parent: ROOT, name: name("a") }));
}

#[test]
fn a_directory_counts_its_entries_and_links_of_its_subdirectories() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    volume.file(dir, "f");
    volume.dir(dir, "x");
    volume.dir(dir, "y");
    assert_eq!((volume.attr(dir).nlink, volume.attr(dir).size), (4, 3));
    volume.rmdir(dir, "x").unwrap();
    volume.unlink(dir, "f").unwrap();
    assert_eq!((volume.attr(dir).nlink, volume.attr(dir).size), (3, 1));
    assert_eq!(volume.attr(ROOT).nlink, 3);
}

#[test]
fn a_change_of_names_moves_the_directories_times_and_no_others() {
    let mut volume = Volume::new();
    let (one, other) = (volume.dir(ROOT, "one"), volume.dir(ROOT, "other"));
    let file = volume.file(one, "f");
    let modified = volume.attr(file).mtime;
    volume.rename(one, "f", other, "g", RenameMode::Replace).unwrap();
    let now = volume.now();
    for dir in [one, other] {
        assert_eq!((volume.attr(dir).mtime, volume.attr(dir).ctime), (now, now));
        assert!(volume.attr(dir).atime < now);
    }
    assert_eq!((volume.attr(file).ctime, volume.attr(file).mtime), (now, modified));
    assert!(volume.attr(ROOT).mtime < now);
}

#[test]
fn link_and_unlink_move_the_ctime_of_the_inode() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.link(ino, ROOT, "b").unwrap();
    assert_eq!((volume.attr(ino).nlink, volume.attr(ino).ctime), (2, volume.now()));
    volume.unlink(ROOT, "a").unwrap();
    assert_eq!((volume.attr(ino).nlink, volume.attr(ino).ctime), (1, volume.now()));
    assert_eq!(volume.attr(ino).mtime, time(1));
}

#[test]
fn a_directory_or_an_orphan_gets_no_further_name() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    assert_eq!(volume.link(dir, ROOT, "e"), Err(MetaError::WrongKind(dir)));
    let file = volume.file(ROOT, "f");
    volume.unlink(ROOT, "f").unwrap();
    assert_eq!(volume.link(file, ROOT, "g"), Err(MetaError::NoSuchInode(file)));
    assert_eq!(volume.link(Ino(99), ROOT, "g"), Err(MetaError::NoSuchInode(Ino(99))));
}

#[test]
fn unlink_is_not_for_directories_and_rmdir_only_for_empty_ones() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    let file = volume.file(dir, "f");
    assert_eq!(volume.unlink(ROOT, "d"), Err(MetaError::IsDirectory(dir)));
    assert_eq!(volume.rmdir(dir, "f"), Err(MetaError::NotDirectory(file)));
    assert_eq!(volume.rmdir(ROOT, "d"), Err(MetaError::NotEmpty(dir)));
    assert_eq!(volume.unlink(file, "x"), Err(MetaError::NotDirectory(file)));
    let missing = Err(MetaError::NoSuchEntry { parent: dir, name: name("x") });
    assert_eq!((volume.unlink(dir, "x"), volume.rmdir(dir, "x")), (missing.clone(), missing));
}

#[test]
fn an_unlinked_file_lives_on_until_it_is_reaped() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.unlink(ROOT, "a").unwrap();
    assert!(volume.changes.contains(&Change::Orphaned { ino }));
    assert_eq!(volume.attr(ino).nlink, 0);
    assert_eq!(volume.ns.orphans(Ino(0), 10).unwrap(), [ino]);
    assert_eq!(volume.ns.path(ino).unwrap(), None);
    volume.chmod(ino, 0o600).unwrap();
    volume.ok(Op::Reap { inos: vec![ino] });
    assert!(volume.changes.contains(&Change::Reaped { ino }));
    assert!(!volume.exists(ino));
    assert_eq!(volume.chmod(ino, 0o600), Err(MetaError::NoSuchInode(ino)));
    assert_eq!(volume.ns.orphans(Ino(0), 10).unwrap(), []);
}

#[test]
fn rename_over_a_file_orphans_it() {
    let mut volume = Volume::new();
    let (new, old) = (volume.file(ROOT, "new"), volume.file(ROOT, "old"));
    volume.rename(ROOT, "new", ROOT, "old", RenameMode::Replace).unwrap();
    assert_eq!((volume.lookup(ROOT, "old"), volume.lookup(ROOT, "new")), (Some(new), None));
    assert_eq!(volume.attr(old).nlink, 0);
    assert!(volume.changes.contains(&Change::Orphaned { ino: old }));
    assert_eq!(volume.attr(ROOT).size, 1);
}

#[test]
fn rename_between_two_names_of_one_inode_does_nothing() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.link(ino, ROOT, "b").unwrap();
    let (before, root) = (volume.attr(ino), volume.attr(ROOT));
    volume.rename(ROOT, "a", ROOT, "b", RenameMode::Replace).unwrap();
    volume.rename(ROOT, "a", ROOT, "a", RenameMode::Replace).unwrap();
    volume.rename(ROOT, "a", ROOT, "b", RenameMode::Exchange).unwrap();
    assert_eq!((volume.lookup(ROOT, "a"), volume.lookup(ROOT, "b")), (Some(ino), Some(ino)));
    assert_eq!((volume.attr(ino), volume.attr(ROOT)), (before, root));
}

#[test]
fn rename_replaces_only_its_own_kind_and_only_empty_directories() {
    let mut volume = Volume::new();
    let file = volume.file(ROOT, "f");
    let (empty, full) = (volume.dir(ROOT, "empty"), volume.dir(ROOT, "full"));
    volume.file(full, "x");
    let replace = RenameMode::Replace;
    assert_eq!(volume.rename(ROOT, "empty", ROOT, "full", replace), Err(MetaError::NotEmpty(full)));
    assert_eq!(volume.rename(ROOT, "empty", ROOT, "f", replace), Err(MetaError::NotDirectory(file)));
    assert_eq!(volume.rename(ROOT, "f", ROOT, "empty", replace), Err(MetaError::IsDirectory(empty)));
    volume.rename(ROOT, "full", ROOT, "empty", replace).unwrap();
    assert_eq!(volume.lookup(ROOT, "empty"), Some(full));
    assert_eq!((volume.attr(ROOT).nlink, volume.attr(ROOT).size), (3, 2));
    assert_eq!(volume.attr(empty).nlink, 0);
}

#[test]
fn a_directory_never_ends_up_below_itself() {
    let mut volume = Volume::new();
    let a = volume.dir(ROOT, "a");
    let b = volume.dir(a, "b");
    let c = volume.dir(b, "c");
    for to in [a, b, c] {
        assert_eq!(volume.rename(ROOT, "a", to, "x", RenameMode::Replace), Err(MetaError::UnderItself(a)));
    }
    // The other way round it is the target that would sink.
    volume.file(c, "f");
    assert_eq!(volume.rename(c, "f", ROOT, "a", RenameMode::Exchange), Err(MetaError::UnderItself(a)));
    assert_eq!(volume.rename(ROOT, "a", c, "f", RenameMode::Exchange), Err(MetaError::UnderItself(a)));
}

#[test]
fn exchange_swaps_a_file_and_a_directory() {
    let mut volume = Volume::new();
    let (one, other) = (volume.dir(ROOT, "one"), volume.dir(ROOT, "other"));
    let (file, dir) = (volume.file(one, "x"), volume.dir(other, "y"));
    volume.rename(one, "x", other, "y", RenameMode::Exchange).unwrap();
    assert_eq!((volume.lookup(one, "x"), volume.lookup(other, "y")), (Some(dir), Some(file)));
    assert_eq!((volume.attr(one).nlink, volume.attr(other).nlink), (3, 2));
    assert_eq!(volume.ns.parent(dir).unwrap(), Some(one));
    let missing = Err(MetaError::NoSuchEntry { parent: other, name: name("z") });
    assert_eq!(volume.rename(one, "x", other, "z", RenameMode::Exchange), missing);
}

#[test]
fn noreplace_refuses_any_target() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.file(ROOT, "b");
    volume.link(ino, ROOT, "c").unwrap();
    for target in ["a", "b", "c"] {
        let exists = Err(MetaError::Exists { parent: ROOT, name: name(target) });
        assert_eq!(volume.rename(ROOT, "a", ROOT, target, RenameMode::NoReplace), exists);
    }
    volume.rename(ROOT, "a", ROOT, "d", RenameMode::NoReplace).unwrap();
    assert_eq!(volume.lookup(ROOT, "d"), Some(ino));
}

#[test]
fn a_removed_directory_takes_no_names() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    let file = volume.file(ROOT, "f");
    volume.rmdir(ROOT, "d").unwrap();
    let gone = |verdict| matches!(verdict, Err(MetaError::NoSuchInode(_) | MetaError::NoSuchEntry { .. }));
    assert!(gone(volume.run(Op::Make { parent: dir, name: name("x"), node: node(NewContent::File, 0o644) })));
    assert!(gone(volume.link(file, dir, "x")));
    assert!(gone(volume.unlink(dir, "x")));
    assert!(gone(volume.rmdir(dir, "x")));
    assert!(gone(volume.rename(ROOT, "f", dir, "x", RenameMode::Replace)));
    assert!(gone(volume.rename(dir, "x", ROOT, "y", RenameMode::Replace)));
    assert_eq!(volume.lookup(ROOT, "f"), Some(file));
}

#[test]
fn cookies_stay_where_they_are_while_entries_come_and_go() {
    let mut volume = Volume::new();
    let names = ["a", "b", "c", "d", "e", "f"];
    for text in names {
        volume.file(ROOT, text);
    }
    let before = volume.ns.list(ROOT, 0, 100).unwrap();
    // A reader stopped after "c".
    let stopped = before[2].cookie;
    volume.unlink(ROOT, "b").unwrap();
    volume.unlink(ROOT, "c").unwrap();
    volume.unlink(ROOT, "e").unwrap();
    volume.file(ROOT, "Z");
    volume.file(ROOT, "b");
    let rest: Vec<_> = volume.ns.list(ROOT, stopped, 100).unwrap();
    let seen: Vec<_> = rest.iter().map(|entry| entry.name.clone()).collect();
    assert_eq!(seen, [name("d"), name("f"), name("Z"), name("b")], "what stays is seen once, what is new may be");
    assert_eq!(rest[0], before[3]);
    assert_eq!(rest[1], before[5]);
}

#[test]
fn a_listing_goes_on_after_any_cookie() {
    let mut volume = Volume::new();
    for n in 0..10 {
        volume.file(ROOT, &format!("f{n}"));
    }
    let whole = volume.ns.list(ROOT, 0, 100).unwrap();
    for (at, entry) in whole.iter().enumerate() {
        assert_eq!(volume.ns.list(ROOT, entry.cookie, 100).unwrap(), whole[at + 1..]);
    }
    assert_eq!(volume.ns.list(ROOT, u64::MAX, 100).unwrap(), []);
    assert_eq!(volume.ns.list(ROOT, 0, 0).unwrap(), []);
    assert_eq!(volume.ns.list(Ino(99), 0, 100).unwrap(), []);
}
