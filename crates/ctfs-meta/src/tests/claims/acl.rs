//! Access control lists, in the bytes of `linux/posix_acl_xattr.h`.

use ctfs_types::Ino;

use super::super::harness::{Volume, node};
use crate::{MetaError, NewContent, NewNode, Op};

const ROOT: Ino = Ino::ROOT;
const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

type Entry = (u16, u16, u32);

fn acl(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&perm.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

fn base(user: u16, group: u16, other: u16) -> Vec<u8> {
    acl(&[(USER_OBJ, user, !0), (GROUP_OBJ, group, !0), (OTHER, other, !0)])
}

/// Named user 7 may read and write, as far as `mask` lets.
fn named(user: u16, group: u16, mask: u16, other: u16) -> Vec<u8> {
    acl(&[(USER_OBJ, user, !0), (USER, 6, 7), (GROUP_OBJ, group, !0), (MASK, mask, !0), (OTHER, other, !0)])
}

#[test]
fn an_access_acl_sets_the_mode_with_the_mask_as_group() {
    let mut volume = Volume::new();
    let ino = volume.make(ROOT, "a", node(NewContent::File, 0o4600)).ino;
    volume.set_xattr(ino, ACCESS, &named(6, 4, 5, 1)).unwrap();
    assert_eq!(volume.attr(ino).mode, 0o4651);
    assert_eq!(volume.xattr(ino, ACCESS), Some(named(6, 4, 5, 1)));
    assert_eq!(volume.attr(ino).ctime, volume.now());
}

#[test]
fn an_acl_of_three_entries_is_kept_as_mode_only() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.set_xattr(ino, ACCESS, &named(6, 4, 6, 0)).unwrap();
    volume.set_xattr(ino, ACCESS, &base(7, 5, 4)).unwrap();
    assert_eq!(volume.attr(ino).mode, 0o754);
    assert_eq!(volume.xattr(ino, ACCESS), None);
    assert_eq!(volume.ns.xattr_names(ino).unwrap(), Vec::<Vec<u8>>::new());
}

#[test]
fn chmod_changes_the_mask_of_an_access_acl() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.set_xattr(ino, ACCESS, &named(6, 4, 6, 0)).unwrap();
    volume.chmod(ino, 0o751).unwrap();
    assert_eq!(volume.xattr(ino, ACCESS), Some(named(7, 4, 5, 1)));
    assert_eq!(volume.attr(ino).mode, 0o751);
}

#[test]
fn an_acl_that_breaks_the_rules_is_refused() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    let right = named(6, 4, 6, 0);
    let mut wrong_version = right.clone();
    wrong_version[0] = 1;
    let (user, group, other) = ((USER_OBJ, 6, !0), (GROUP_OBJ, 4, !0), (OTHER, 0, !0));
    let bad = [
        wrong_version,
        right[..right.len() - 1].to_vec(),
        acl(&[user, group]),
        acl(&[user, user, group, other]),
        acl(&[user, (USER, 6, 7), group, other]),
        acl(&[user, group, (OTHER, 8, !0)]),
        acl(&[user, group, other, (0x40, 1, !0)]),
    ];
    for bytes in bad {
        for key in [ACCESS, DEFAULT] {
            assert_eq!(volume.set_xattr(dir, key, &bytes), Err(MetaError::BadAcl), "{key} {bytes:?}");
        }
    }
    assert_eq!(volume.attr(dir).mode, 0o755);
}

#[test]
fn hostile_acl_bytes_never_panic() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    for len in 0..64 {
        for fill in [0, 1, 2, 0xff] {
            let mut bytes = vec![fill; len];
            if len >= 4 {
                bytes[..4].copy_from_slice(&2u32.to_le_bytes());
            }
            let _ = volume.set_xattr(dir, ACCESS, &bytes);
            let _ = volume.set_xattr(dir, DEFAULT, &bytes);
        }
    }
}

#[test]
fn only_a_directory_has_a_default_acl() {
    let mut volume = Volume::new();
    let file = volume.file(ROOT, "f");
    let verdict = volume.set_xattr(file, DEFAULT, &base(7, 5, 5));
    assert!(matches!(verdict, Err(MetaError::WrongKind(_) | MetaError::BadAcl | MetaError::NotDirectory(_))));
    let dir = volume.dir(ROOT, "d");
    volume.set_xattr(dir, DEFAULT, &base(7, 5, 5)).unwrap();
    assert_eq!(volume.xattr(dir, DEFAULT), Some(base(7, 5, 5)));
    assert_eq!(volume.attr(dir).mode, 0o755);
}

#[test]
fn children_inherit_the_default_acl_instead_of_the_umask() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    volume.set_xattr(dir, DEFAULT, &named(7, 5, 7, 4)).unwrap();
    let file = NewNode { umask: 0o777, ..node(NewContent::File, 0o666) };
    let file = volume.make(dir, "f", file);
    assert_eq!(file.mode, 0o664);
    assert_eq!(volume.xattr(file.ino, ACCESS), Some(named(6, 5, 6, 4)));
    assert_eq!(volume.xattr(file.ino, DEFAULT), None);

    let below = NewNode { umask: 0o777, ..node(NewContent::Directory, 0o770) };
    let below = volume.make(dir, "below", below);
    assert_eq!(below.mode, 0o770);
    assert_eq!(volume.xattr(below.ino, ACCESS), Some(named(7, 5, 7, 0)));
    assert_eq!(volume.xattr(below.ino, DEFAULT), Some(named(7, 5, 7, 4)));

    let link = volume.make(dir, "link", node(NewContent::Symlink { target: b"x".to_vec() }, 0o777));
    assert_eq!((link.mode, volume.xattr(link.ino, ACCESS)), (0o777, None));
}

#[test]
fn a_minimal_default_acl_leaves_only_a_mode() {
    let mut volume = Volume::new();
    let dir = volume.dir(ROOT, "d");
    volume.set_xattr(dir, DEFAULT, &base(7, 5, 0)).unwrap();
    let file = volume.make(dir, "f", NewNode { umask: 0o777, ..node(NewContent::File, 0o666) });
    assert_eq!((file.mode, volume.xattr(file.ino, ACCESS)), (0o640, None));
}

#[test]
fn removing_an_access_acl_leaves_the_mode() {
    let mut volume = Volume::new();
    let ino = volume.file(ROOT, "a");
    volume.set_xattr(ino, ACCESS, &named(6, 4, 6, 0)).unwrap();
    volume.ok(Op::RemoveXattr { ino, name: ACCESS.into() });
    assert_eq!((volume.xattr(ino, ACCESS), volume.attr(ino).mode), (None, 0o660));
}
