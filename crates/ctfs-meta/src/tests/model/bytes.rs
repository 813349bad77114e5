//! The reference model, continued: attributes, bytes, and what is seen from outside.

use ctfs_types::Stamp;

use super::*;

/// Drops setuid, setgid of a group-executable file, and `security.capability`.
///
/// A directory's bits mean something else and stay.
pub(super) fn drop_privileges_of(inode: &mut Inode) {
    if inode.attr.kind == FileKind::Directory {
        return;
    }
    inode.attr.mode &= !0o4000;
    if inode.attr.mode & 0o010 != 0 {
        inode.attr.mode &= !0o2000;
    }
    inode.xattrs.remove(&b"security.capability"[..]);
}

impl Model {
    pub(super) fn set_attr(
        &mut self,
        ino: Ino,
        set: &SetAttr,
        at: Timestamp,
    ) -> Result<(), Reasons> {
        let inode = self.inode(ino)?;
        if let Some(size) = set.size {
            let mut reasons = Reasons::new();
            match inode.attr.kind {
                FileKind::File => {}
                FileKind::Directory => reasons.extend([MetaError::IsDirectory(ino), MetaError::WrongKind(ino)]),
                _ => reasons.push(MetaError::WrongKind(ino)),
            }
            if size > FILE_BYTES_MAX {
                reasons.push(MetaError::FileTooBig);
            }
            if !reasons.is_empty() {
                return Err(reasons);
            }
            inode.attr.data_version += 1;
            cut(inode, size);
            inode.attr.size = size;
            inode.attr.mtime = at;
        }
        let attr = &mut inode.attr;
        attr.uid = set.uid.unwrap_or(attr.uid);
        attr.gid = set.gid.unwrap_or(attr.gid);
        attr.atime = set.atime.unwrap_or(attr.atime);
        attr.mtime = set.mtime.unwrap_or(attr.mtime);
        attr.mode = set.mode.map_or(attr.mode, |mode| mode & 0o7777);
        attr.ctime = at;
        if set.drop_setgid {
            attr.mode &= !0o2000;
        }
        if set.drop_privileges {
            drop_privileges_of(inode);
        }
        Ok(())
    }

    pub(super) fn set_xattr(
        &mut self,
        ino: Ino,
        key: &[u8],
        value: &[u8],
        mode: XattrMode,
        at: Timestamp,
    ) -> Result<(), Reasons> {
        let inode = self.inode(ino)?;
        match (mode, inode.xattrs.contains_key(key)) {
            (XattrMode::Create, true) => return Err(vec![MetaError::XattrExists]),
            (XattrMode::Replace, false) => return Err(vec![MetaError::NoSuchXattr]),
            _ => inode.xattrs.insert(key.to_vec(), value.to_vec()),
        };
        inode.attr.ctime = at;
        Ok(())
    }

    pub(super) fn remove_xattr(&mut self, ino: Ino, key: &[u8], at: Timestamp) -> Result<(), Reasons> {
        let inode = self.inode(ino)?;
        inode.xattrs.remove(key).ok_or(vec![MetaError::NoSuchXattr])?;
        inode.attr.ctime = at;
        Ok(())
    }

    pub(super) fn write(
        &mut self,
        ino: Ino,
        cells: &[CellWrite],
        size_at_least: u64,
    ) -> Result<(), Reasons> {
        let inode = self.file(ino)?;
        let mut reasons = Reasons::new();
        for write in cells {
            let stamp = inode.cells.get(&write.cell).map_or(Stamp(0), |extent| extent.stamp);
            if stamp != write.expect {
                reasons.push(MetaError::CellChanged { ino, cell: write.cell });
            }
        }
        if size_at_least > FILE_BYTES_MAX {
            reasons.push(MetaError::FileTooBig);
        }
        if !reasons.is_empty() {
            return Err(reasons);
        }
        inode.attr.data_version += 1;
        let stamp = Stamp(inode.attr.data_version);
        for write in cells {
            match &write.data {
                None => inode.cells.remove(&write.cell),
                Some(data) => {
                    let extent = Extent { start: write.start, data: data.clone(), stamp };
                    inode.cells.insert(write.cell, extent)
                }
            };
        }
        // Nothing may lie past the end, where growing the file later must show zeros.
        let size = inode.attr.size.max(size_at_least);
        inode.attr.size = size;
        cut(inode, size);
        for write in cells {
            let there = self.inodes[&ino].cells.get(&write.cell).and_then(Extent::chunk);
            if let (Some(data), Some(id)) = (&write.data, there) {
                self.chunks.entry(id).or_insert((data.len(), None));
            }
        }
        Ok(())
    }

    pub(super) fn clone_cells(
        &mut self,
        (source, first): (Ino, CellIndex),
        (ino, to): (Ino, CellIndex),
        cells: u64,
        size_at_least: u64,
    ) -> Result<(), Reasons> {
        let mut reasons = self.file(source).err().unwrap_or_default();
        reasons.extend(self.file(ino).err().unwrap_or_default());
        if size_at_least > FILE_BYTES_MAX {
            reasons.push(MetaError::FileTooBig);
        }
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let copied: Vec<_> = self.inodes[&source].cells.range(first..first + cells).map(|(k, v)| (*k, v.clone())).collect();
        let inode = self.file(ino)?;
        inode.attr.data_version += 1;
        let stamp = Stamp(inode.attr.data_version);
        inode.cells.retain(|cell, _| !(to..to + cells).contains(cell));
        inode.cells.extend(copied.into_iter().map(|(k, extent)| (k - first + to, Extent { stamp, ..extent })));
        inode.attr.size = inode.attr.size.max(size_at_least);
        Ok(())
    }

    /// Everything a reader should see.
    pub fn tree(&self) -> Tree {
        let counted = self.references();
        Tree {
            inodes: self.inodes.keys().map(|ino| (*ino, self.seen(*ino))).collect(),
            orphans: self.inodes.keys().copied().filter(|ino| self.is_orphan(*ino)).collect(),
            chunks: self
                .chunks
                .iter()
                .map(|(id, (len, condemned))| (*id, (counted.get(id).copied().unwrap_or(0), *len, *condemned)))
                .collect(),
        }
    }

    fn seen(&self, ino: Ino) -> Seen {
        let inode = &self.inodes[&ino];
        let is_dir = self.is_dir(ino);
        Seen {
            attr: self.attr(ino),
            entries: inode.entries.clone(),
            cells: inode.cells.clone(),
            target: inode.target.clone(),
            xattrs: inode.xattrs.clone(),
            parent: match (is_dir, self.names_of(ino).first()) {
                (true, Some((parent, _))) => Some(*parent),
                (true, None) if ino == Ino::ROOT => Some(Ino::ROOT),
                _ => None,
            },
            totals: is_dir.then(|| self.totals(ino)),
            quota: self.quotas.get(&ino).copied().unwrap_or_default(),
        }
    }

    pub fn attr(&self, ino: Ino) -> Attr {
        let inode = &self.inodes[&ino];
        let mut attr = inode.attr.clone();
        let names = self.names_of(ino);
        match attr.kind {
            FileKind::Directory => {
                let below = inode.entries.values().filter(|ino| self.is_dir(**ino)).count();
                attr.nlink = if self.is_orphan(ino) { 0 } else { 2 + below as u32 };
                attr.size = inode.entries.len() as u64;
            }
            FileKind::Symlink => {
                attr.nlink = names.len() as u32;
                attr.size = inode.target.as_ref().map_or(0, Vec::len) as u64;
            }
            _ => attr.nlink = names.len() as u32,
        }
        attr.allocated = inode.cells.values().map(allocated).sum();
        attr
    }

    /// Each inode counts once, where its smallest (directory, name) stands.
    pub(super) fn totals(&self, dir: Ino) -> Totals {
        let mut totals = Totals::default();
        for ino in self.inodes.keys().copied().filter(|ino| *ino != dir && *ino != Ino::ROOT) {
            let Some((home, _)) = self.names_of(ino).into_iter().min() else { continue };
            if !self.is_within(home, dir) {
                continue;
            }
            let attr = self.attr(ino);
            if attr.kind == FileKind::Directory {
                totals.directories += 1;
            } else {
                totals.files += 1;
                totals.bytes += attr.size;
                totals.allocated += attr.allocated;
            }
        }
        totals
    }
}

fn allocated(extent: &Extent) -> u64 {
    let unit = if extent.chunk().is_some() { 4096 } else { 512 };
    u64::from(extent.data.len()).next_multiple_of(unit)
}

/// Cuts what lies at or past `size`; the data version is that of the command that cuts.
fn cut(inode: &mut Inode, size: u64) {
    let grid = inode.attr.cell;
    let mut kept = BTreeMap::new();
    for (cell, mut extent) in std::mem::take(&mut inode.cells) {
        let room = size.saturating_sub(grid.start_of(cell)).min(grid.bytes()) as u32;
        if extent.start >= room {
            continue;
        }
        if extent.end() > room {
            let left = room - extent.start;
            match &mut extent.data {
                ctfs_types::ExtentData::Inline(bytes) => bytes.truncate(left as usize),
                ctfs_types::ExtentData::Chunk { len, .. } => *len = left,
            }
            extent.stamp = Stamp(inode.attr.data_version);
        }
        kept.insert(cell, extent);
    }
    inode.cells = kept;
}
