//! POSIX ACLs in their xattr form (`linux/posix_acl_xattr.h`, version 2), compared as the sets of
//! entries they are: the order among named users, or groups, means nothing.

use std::collections::BTreeSet;

use crate::finding::Pair;

const VERSION: u32 = 2;
/// Of entries that name nobody the id means nothing.
const NOBODY: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    tag: u16,
    id: u32,
    permissions: u16,
}

impl Entry {
    /// As setfacl(1) takes it, ids as numbers.
    fn shown(self) -> String {
        let who = match self.tag {
            0x01 => "user:".into(),
            0x02 => format!("user:{}", self.id),
            0x04 => "group:".into(),
            0x08 => format!("group:{}", self.id),
            0x10 => "mask:".into(),
            0x20 => "other:".into(),
            tag => format!("{tag:#x}:{}", self.id),
        };
        let bit = |mask, letter| if self.permissions & mask != 0 { letter } else { '-' };
        let strange = if self.permissions > 7 { format!("({:#x})", self.permissions) } else { String::new() };
        format!("{who}:{}{}{}{strange}", bit(4, 'r'), bit(2, 'w'), bit(1, 'x'))
    }
}

fn decode(bytes: &[u8]) -> Option<BTreeSet<Entry>> {
    let (version, entries) = bytes.split_first_chunk::<4>()?;
    let (entries, rest) = entries.as_chunks::<8>();
    if u32::from_le_bytes(*version) != VERSION || !rest.is_empty() {
        return None;
    }
    let entry = |bytes: &[u8; 8]| {
        let tag = u16::from_le_bytes([bytes[0], bytes[1]]);
        let id = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        Entry { tag, id: if matches!(tag, 0x02 | 0x08) { id } else { NOBODY }, permissions: u16::from_le_bytes([bytes[2], bytes[3]]) }
    };
    Some(entries.iter().map(entry).collect())
}

/// `access` or `default`, when the xattr is an ACL.
pub fn name(xattr: &[u8]) -> Option<&'static str> {
    match xattr {
        b"system.posix_acl_access" => Some("access"),
        b"system.posix_acl_default" => Some("default"),
        _ => None,
    }
}

/// How two ACLs relate.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Same,
    /// The entries that are on one side only.
    Differ(Pair<String>),
    /// One is none that we can read; compare the bytes.
    NoAcl,
}

pub fn compare(acls: Pair<Option<&[u8]>>) -> Verdict {
    let decoded = acls.map(|acl| acl.map_or(Some(None), |acl| decode(acl).map(Some)));
    let (Some(source), Some(target)) = (decoded.source, decoded.target) else { return Verdict::NoAcl };
    if source == target {
        return Verdict::Same;
    }
    let only = |here: &Option<BTreeSet<Entry>>, there: &Option<BTreeSet<Entry>>| {
        let Some(here) = here else { return "none".to_owned() };
        let there = there.clone().unwrap_or_default();
        let entries: Vec<_> = here.difference(&there).map(|entry| entry.shown()).collect();
        if entries.is_empty() { "no such entry".into() } else { entries.join(",") }
    };
    Verdict::Differ(Pair::new(only(&source, &target), only(&target, &source)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(permissions.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn the_order_of_entries_and_the_id_of_nobody_mean_nothing() {
        let one = acl(&[(1, 6, NOBODY), (2, 7, 77), (2, 4, 1000), (4, 5, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY)]);
        let other = acl(&[(1, 6, 0), (2, 4, 1000), (2, 7, 77), (4, 5, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY)]);
        assert_eq!(compare(Pair::new(Some(&one), Some(&other))), Verdict::Same);
    }

    #[test]
    fn only_the_entries_that_differ_are_told() {
        let one = acl(&[(1, 6, NOBODY), (2, 7, 77)]);
        let other = acl(&[(1, 6, NOBODY), (2, 5, 77), (8, 4, 9)]);
        assert_eq!(compare(Pair::new(Some(&one), Some(&other))), Verdict::Differ(Pair::new("user:77:rwx".into(), "user:77:r-x,group:9:r--".into())));
        assert_eq!(compare(Pair::new(None, Some(&one))), Verdict::Differ(Pair::new("none".into(), "user::rw-,user:77:rwx".into())));
    }

    #[test]
    fn bytes_that_are_no_acl_are_said_to_be_none() {
        for bytes in [&b""[..], b"\x02\0\0\0abc", b"\x03\0\0\0"] {
            assert_eq!(compare(Pair::new(Some(bytes), None)), Verdict::NoAcl, "{bytes:?}");
        }
    }
}
