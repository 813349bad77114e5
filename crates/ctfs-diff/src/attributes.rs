//! In which attributes two objects of one type differ.

use std::collections::BTreeSet;

use rustix::fs::FileType;

use crate::{
    acl,
    finding::{Difference, Pair, What},
    object::{Stat, Xattrs},
    show,
};

/// What stat(2) says, apart from what content and links are judged by.
pub fn compare_stats(path: &[u8], stats: Pair<&Stat>, atime: bool) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut check = |what, shown: Pair<String>| {
        if shown.differ() {
            found.push(Difference::new(path, what, shown));
        }
    };
    check(What::Mode, stats.map(|stat| format!("{:04o}", stat.mode)));
    check(What::Owner, stats.map(|stat| stat.uid.to_string()));
    check(What::Group, stats.map(|stat| stat.gid.to_string()));
    if stats.source.kind == FileType::RegularFile {
        check(What::Size, stats.map(|stat| stat.size.to_string()));
    }
    check(What::Mtime, stats.map(|stat| show::time(stat.mtime.0, stat.mtime.1)));
    if atime {
        check(What::Atime, stats.map(|stat| show::time(stat.atime.0, stat.atime.1)));
    }
    if matches!(stats.source.kind, FileType::CharacterDevice | FileType::BlockDevice) {
        check(What::Device, stats.map(|stat| format!("{}:{}", stat.device.0, stat.device.1)));
    }
    found
}

/// A symlink's target, or where targets are equal the length that stat(2) gives for it: programs
/// size their buffers by that.
pub fn compare_symlinks(path: &[u8], targets: Pair<&[u8]>, stats: Pair<&Stat>) -> Option<Difference> {
    if targets.differ() {
        return Some(Difference::new(path, What::Symlink, targets.map(show::escape)));
    }
    let sizes = stats.map(|stat| stat.size);
    sizes.differ().then(|| Difference::new(path, What::Size, sizes))
}

/// One difference for each xattr and each ACL.
pub fn compare_xattrs(path: &[u8], xattrs: Pair<&Xattrs>) -> Vec<Difference> {
    let names: BTreeSet<_> = xattrs.source.keys().chain(xattrs.target.keys()).collect();
    let difference = |name: &Vec<u8>| {
        let values = xattrs.map(|xattrs| xattrs.get(name).map(Vec::as_slice));
        if !values.differ() {
            return None;
        }
        if let Some(acl) = acl::name(name) {
            match acl::compare(values) {
                acl::Verdict::Same => return None,
                acl::Verdict::Differ(shown) => return Some(Difference::new(path, What::Acl, shown).named(acl)),
                acl::Verdict::NoAcl => {}
            }
        }
        Some(Difference::new(path, What::Xattr, shown(values)).named(show::escape(name)))
    };
    names.into_iter().filter_map(difference).collect()
}

fn shown(values: Pair<Option<&[u8]>>) -> Pair<String> {
    let shown = values.map(|value| value.map_or("none".to_owned(), show::value));
    match (values.source, values.target) {
        // Long values that differ behind what is shown.
        (Some(source), Some(target)) if !shown.differ() => {
            let same = source.iter().zip(target).take_while(|(a, b)| a == b).count();
            shown.map(|shown| format!("{shown}, different from byte {same}"))
        }
        _ => shown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattrs(pairs: &[(&str, &[u8])]) -> Xattrs {
        pairs.iter().map(|(name, value)| (name.as_bytes().to_owned(), value.to_vec())).collect()
    }

    fn lines(source: &Xattrs, target: &Xattrs) -> Vec<String> {
        compare_xattrs(b"f", Pair::new(source, target)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_xattr_that_differs_is_one_line() {
        let source = xattrs(&[("user.a", b"1"), ("user.b", b"2"), ("user.c", b"")]);
        let target = xattrs(&[("user.a", b"1"), ("user.b", b"3"), ("user.d\x1b", b"\x00")]);
        assert_eq!(
            lines(&source, &target),
            ["xattr    f: user.b: \"2\" -> \"3\"", "xattr    f: user.c: \"\" -> none", "xattr    f: user.d\\u{1b}: none -> 0x00"]
        );
    }

    #[test]
    fn long_values_that_begin_alike_say_where_they_differ() {
        let mut long = vec![b'x'; 1000];
        let source = xattrs(&[("user.a", &long)]);
        long[700] = b'y';
        let line = &lines(&source, &xattrs(&[("user.a", &long)]))[0];
        assert!(line.ends_with("(1000 bytes), different from byte 700"), "{line}");
    }

    #[test]
    fn an_acl_that_is_none_is_compared_by_its_bytes() {
        let source = xattrs(&[("system.posix_acl_access", b"junk")]);
        assert_eq!(lines(&source, &Xattrs::new()), ["xattr    f: system.posix_acl_access: \"junk\" -> none"]);
    }
}
