//! Compares what one server shows with the reference.

use std::collections::BTreeMap;

use ctfs_types::{FileKind, Ino};
use proptest::prelude::*;

use super::{
    reference::{Content, Id},
    run::Run,
};
use crate::{Caller, Vfs};

const READ_BYTES: u32 = 1 << 20;

/// The error with what led to it.
pub fn told(error: TestCaseError, story: &str) -> TestCaseError {
    match error {
        TestCaseError::Fail(why) => TestCaseError::fail(format!("{story}: {why}")),
        rejected => rejected,
    }
}

/// Compares bytes, and says where they differ instead of printing them all.
pub fn same_bytes(got: &[u8], expected: &[u8], offset: u64) -> Result<(), TestCaseError> {
    if got == expected {
        return Ok(());
    }
    let first = got.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(got.len().min(expected.len()));
    let last = (got.len() == expected.len()).then(|| got.iter().zip(expected).rposition(|(a, b)| a != b)).flatten();
    let around = |bytes: &[u8]| bytes.iter().skip(first).take(8).copied().collect::<Vec<u8>>();
    Err(TestCaseError::fail(format!(
        "{} bytes instead of {}, different from {} (to {:?}): {:?} instead of {:?}",
        got.len(),
        expected.len(),
        offset + first as u64,
        last.map(|last| offset + last as u64),
        around(got),
        around(expected)
    )))
}

/// All of a file, as a program reads it that opens it now.
pub async fn read_all(vfs: &Vfs, ino: Ino) -> Result<Vec<u8>, TestCaseError> {
    let failed = |error| TestCaseError::fail(format!("reading {ino}: {error:?}"));
    let opened = vfs.open(Caller::ROOT, ino, libc::O_RDONLY).await.map_err(failed)?;
    let mut all = Vec::new();
    loop {
        let part = vfs.read_file(ino, opened.handle, all.len() as u64, READ_BYTES).await.map_err(failed)?;
        if part.is_empty() {
            break;
        }
        all.extend_from_slice(&part);
    }
    vfs.flush(ino, opened.handle, 99).await.map_err(failed)?;
    vfs.release(opened.handle).await;
    Ok(all)
}

impl Run {
    /// Compares every node, named or only open, as server `at` shows it.
    pub async fn check(&mut self, at: usize, contents: bool) -> Result<(), TestCaseError> {
        let ids: Vec<Id> = self.reference.nodes.keys().copied().collect();
        for id in ids {
            self.check_node(at, id).await.map_err(|error| told(error, &format!("node {id}, {}", self.inos[&id])))?;
            let node = self.reference.node(id);
            let is_open = self.open.values().any(|open| open.id == id && open.at == at);
            if contents && node.kind() == FileKind::File && (self.reference.links(id) > 0 || is_open) {
                let bytes = read_all(self.vfs(at), self.inos[&id]).await?;
                same_bytes(&bytes, node.bytes(), 0).map_err(|error| told(error, &format!("bytes of {}", self.inos[&id])))?;
            }
        }
        Ok(())
    }

    async fn check_node(&mut self, at: usize, id: Id) -> Result<(), TestCaseError> {
        let ino = self.inos[&id];
        let vfs = self.servers[at].vfs.clone();
        let attr = vfs.getattr(ino).await.map_err(|error| TestCaseError::fail(format!("getattr: {error:?}")))?;
        let links = self.reference.links(id);
        let node = self.reference.node_mut(id);
        prop_assert_eq!(attr.kind, node.kind());
        prop_assert_eq!((attr.mode, attr.uid, attr.gid), (node.mode, node.uid, node.gid), "modes {:o} and {:o}", attr.mode, node.mode);
        prop_assert_eq!((attr.size, attr.nlink), (node.size(), links), "size and links");
        prop_assert_eq!(*node.atime.get_or_insert(attr.atime), attr.atime, "atime");
        prop_assert_eq!(*node.mtime.get_or_insert(attr.mtime), attr.mtime, "mtime");
        let names = vfs.listxattr(Caller::ROOT, ino).await.expect("listxattr");
        let mut xattrs = BTreeMap::new();
        for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            let value = vfs.getxattr(Caller::ROOT, ino, name).await;
            prop_assert!(value.is_ok(), "{:?} is listed: {:?}", String::from_utf8_lossy(name), value);
            xattrs.insert(name.to_vec(), value.unwrap());
        }
        prop_assert_eq!(&xattrs, &node.xattrs);
        match &node.content {
            Content::File(_) => {}
            Content::Symlink(target) => prop_assert_eq!(&vfs.readlink(ino).await.expect("readlink"), target),
            Content::Special(_, rdev) => prop_assert_eq!(attr.rdev, *rdev),
            Content::Directory { entries, parent } => {
                let mut lines = BTreeMap::new();
                let mut offset = 0;
                loop {
                    let some = vfs.readdir(ino, offset, 3, false).await.expect("readdir");
                    let Some(last) = some.last() else { break };
                    offset = last.next;
                    lines.extend(some.into_iter().map(|line| (line.name, line.ino)));
                }
                let mut expected: BTreeMap<Vec<u8>, Ino> =
                    entries.iter().map(|(name, id)| (name.clone(), self.inos[id])).collect();
                expected.insert(b".".to_vec(), ino);
                // Of a removed directory the parent may be gone.
                if let (true, Some(parent)) = (links > 0, self.inos.get(parent)) {
                    expected.insert(b"..".to_vec(), *parent);
                } else {
                    lines.remove(&b".."[..]);
                }
                prop_assert_eq!(lines, expected);
            }
        }
        Ok(())
    }
}
