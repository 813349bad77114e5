//! Everything a reader can see of a volume, as one comparable value.

use std::collections::{BTreeMap, BTreeSet};

use ctfs_types::{Attr, CellIndex, ChunkId, Extent, FileKind, FileName, Ino, Timestamp, codec};

use super::harness::dump;
use crate::{Namespace, Quota, QuotaUse, Totals};

/// What is seen of one inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub attr: Attr,
    pub entries: BTreeMap<FileName, Ino>,
    pub cells: BTreeMap<CellIndex, Extent>,
    pub target: Option<Vec<u8>>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Of directories.
    pub parent: Option<Ino>,
    /// Of directories.
    pub totals: Option<Totals>,
    pub quota: Quota,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    pub inodes: BTreeMap<Ino, Seen>,
    pub orphans: BTreeSet<Ino>,
    /// References, bytes and time of condemnation of each known chunk.
    pub chunks: BTreeMap<ChunkId, (u64, u32, Option<Timestamp>)>,
}

impl Tree {
    /// The same tree without what lags behind while cells wait to be freed.
    pub fn without_space(mut self) -> Self {
        for seen in self.inodes.values_mut() {
            seen.attr.allocated = 0;
            if let Some(totals) = &mut seen.totals {
                totals.allocated = 0;
            }
        }
        self.chunks.clear();
        self
    }

    /// The same tree without the moments at which chunks lost their last reference.
    pub fn without_condemnations(mut self) -> Self {
        for (.., condemned) in self.chunks.values_mut() {
            *condemned = condemned.map(|_| Timestamp::EPOCH);
        }
        self
    }
}

/// Each chunk is counted as often as records of cells name it, those that wait to be freed included.
fn count_references(ns: &Namespace, tree: &Tree) {
    let mut counted: BTreeMap<ChunkId, u64> = BTreeMap::new();
    for (_, value) in dump(ns.store(), &[7]).into_iter().filter(|(key, _)| key[0] == 6) {
        let extent: Extent = codec::decode(5, &value, 1 << 20).unwrap();
        if let Some(id) = extent.chunk() {
            *counted.entry(id).or_default() += 1;
        }
    }
    for (id, (references, ..)) in &tree.chunks {
        assert_eq!(*references, counted.remove(id).unwrap_or(0), "references of {id}");
    }
    assert!(counted.is_empty(), "cells name chunks that nobody knows: {counted:?}");
}

/// Counts are kept of directories alone, and only where there is something to count.
fn check_counts(ns: &Namespace, tree: &Tree) {
    for (key, value) in dump(ns.store(), &[25]).into_iter().filter(|(key, _)| key[0] == 24) {
        let dir = Ino(u64::from_be_bytes(key[1..].try_into().unwrap()));
        let counted: Totals = codec::decode(5, &value, 1 << 10).unwrap();
        assert_ne!(counted, Totals::default(), "counts of {dir}");
        assert_eq!(tree.inodes.get(&dir).and_then(|seen| seen.totals), Some(counted), "counts of {dir}");
    }
}

/// More cells than any file has.
pub const ALL_CELLS: u64 = 1 << 44;

/// Reads the whole volume through its public reads, checking on the way that they agree with
/// each other: listings with lookups, pages with whole listings, paths with parents.
pub fn observe(ns: &Namespace) -> Tree {
    let mut tree = Tree::default();
    tree.orphans.extend(ns.orphans(Ino(0), usize::MAX).unwrap());
    let mut queue: Vec<Ino> = vec![Ino::ROOT];
    queue.extend(&tree.orphans);
    while let Some(ino) = queue.pop() {
        if tree.inodes.contains_key(&ino) {
            continue;
        }
        let seen = observe_inode(ns, ino);
        queue.extend(seen.entries.values());
        tree.inodes.insert(ino, seen);
    }
    for (id, record) in ns.chunks(None, usize::MAX).unwrap() {
        assert_eq!(ns.chunk(&id).unwrap(), Some(record));
        tree.chunks.insert(id, (record.references, record.len, record.condemned));
    }
    assert_eq!(ns.chunk_count(), tree.chunks.len() as u64);
    if ns.ahead() == 0 {
        // These look at what is stored.
        count_references(ns, &tree);
        check_counts(ns, &tree);
    }
    let condemned: BTreeSet<_> = ns.condemned(Timestamp::new(i64::MAX, 0), usize::MAX).unwrap().into_iter().collect();
    let unnamed = tree.chunks.iter().filter(|(_, (references, ..))| *references == 0).map(|(id, _)| *id);
    assert_eq!(condemned, unnamed.collect());
    let quotas = tree.inodes.iter().filter(|(_, seen)| !seen.quota.is_none());
    let quotas: Vec<_> = quotas.map(|(dir, seen)| QuotaUse { dir: *dir, quota: seen.quota, totals: seen.totals.unwrap() }).collect();
    assert_eq!(ns.quotas().unwrap(), quotas);
    assert_eq!(ns.state_hash(), ns.count_state_hash().unwrap(), "the running hash is that of all records");
    tree
}

fn observe_inode(ns: &Namespace, ino: Ino) -> Seen {
    let attr = ns.attr(ino).unwrap().unwrap_or_else(|| panic!("inode {ino} is named but not there"));
    assert_eq!(attr.ino, ino);
    let is_dir = attr.kind == FileKind::Directory;
    let entries = if is_dir { observe_entries(ns, ino) } else { BTreeMap::new() };
    let cells = ns.cells(ino, 0, ALL_CELLS).unwrap().into_iter().map(|cell| (cell.index, cell.extent)).collect();
    let xattrs = ns.xattr_names(ino).unwrap().into_iter();
    let xattrs = xattrs.map(|key| (key.clone(), ns.xattr(ino, &key).unwrap().expect("listed xattr is there")));
    let xattrs = xattrs.collect();
    observe_path(ns, &attr);
    Seen {
        entries,
        cells,
        xattrs,
        target: ns.readlink(ino).unwrap(),
        parent: if is_dir && attr.nlink > 0 { ns.parent(ino).unwrap() } else { None },
        totals: if is_dir { ns.totals(ino).unwrap() } else { None },
        quota: ns.quota(ino).unwrap(),
        attr,
    }
}

fn observe_entries(ns: &Namespace, dir: Ino) -> BTreeMap<FileName, Ino> {
    let whole = ns.list(dir, 0, usize::MAX).unwrap();
    let mut cookie = 0;
    for entry in &whole {
        assert!(entry.cookie > cookie, "cookies of directory {dir} grow");
        cookie = entry.cookie;
        assert_eq!(ns.lookup(dir, &entry.name).unwrap(), Some(entry.ino), "{:?} in {dir}", entry.name);
        assert_eq!(ns.attr(entry.ino).unwrap().map(|attr| attr.kind), Some(entry.kind), "{:?} in {dir}", entry.name);
    }
    // The same listing in pages of two.
    let mut paged = Vec::new();
    loop {
        let page = ns.list(dir, paged.last().map_or(0, |entry: &crate::DirEntry| entry.cookie), 2).unwrap();
        if page.is_empty() {
            break;
        }
        assert!(page.len() <= 2);
        paged.extend(page);
    }
    assert_eq!(paged, whole, "pages of directory {dir}");
    let entries: BTreeMap<_, _> = whole.into_iter().map(|entry| (entry.name, entry.ino)).collect();
    assert_eq!(entries.len(), paged.len(), "a name stands once in directory {dir}");
    entries
}

/// The path of an inode leads back to it; an orphan has none.
fn observe_path(ns: &Namespace, attr: &Attr) {
    let path = ns.path(attr.ino).unwrap();
    assert_eq!(path.is_some(), attr.nlink > 0, "path of inode {}: {path:?}", attr.ino);
    if let Some(path) = path {
        let end = path.iter().try_fold(Ino::ROOT, |dir, name| ns.lookup(dir, name).unwrap());
        assert_eq!(end, Some(attr.ino), "path {path:?}");
    }
}
