//! The reference model: inodes in a map, everything else recomputed from them each time.
//!
//! Slow and obvious on purpose. It keeps no counts, no back references and no indexes: link
//! counts, sizes of directories, recursive totals and chunk references are found by looking at
//! every inode there is. A refusal is a *set* of reasons, because which of several is reported is
//! no part of the contract.

mod bytes;

use std::{
    collections::BTreeMap,
    mem::{Discriminant, discriminant},
};

use ctfs_types::{
    Attr, CellIndex, CellSize, ChunkId, Extent, FileKind, FileName, FileUse, Ino, Timestamp,
    limits::{FILE_BYTES_MAX, SYMLINK_BYTES_MAX},
};

use self::bytes::drop_privileges_of;
use super::{harness::CLIENT, observe::{Seen, Tree}};
use crate::{CellWrite, MetaError, NewContent, NewNode, Op, Quota, RenameMode, SetAttr, Totals, XattrMode};

/// Every reason to refuse a command; one of them must be the verdict.
pub type Reasons = Vec<MetaError>;

#[derive(Debug, Clone)]
pub struct Inode {
    pub attr: Attr,
    pub entries: BTreeMap<FileName, Ino>,
    pub cells: BTreeMap<CellIndex, Extent>,
    pub target: Option<Vec<u8>>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Debug, Clone)]
pub struct Model {
    pub inodes: BTreeMap<Ino, Inode>,
    pub next: u64,
    /// Known chunks: their bytes and when they fell to no reference.
    pub chunks: BTreeMap<ChunkId, (u32, Option<Timestamp>)>,
    pub quotas: BTreeMap<Ino, Quota>,
    /// Reserved numbers, by the first of each range: which is the next, and which is past the last.
    pub numbers: BTreeMap<u64, (u64, u64)>,
}

fn attr(ino: Ino, kind: FileKind, mode: u16, at: Timestamp) -> Attr {
    Attr {
        ino,
        generation: 0,
        kind,
        mode,
        uid: 0,
        gid: 0,
        nlink: 0,
        size: 0,
        allocated: 0,
        atime: at,
        mtime: at,
        ctime: at,
        btime: at,
        rdev: 0,
        data_version: 1,
        cell: CellSize::DEFAULT,
        usage: FileUse::Free,
    }
}

/// Whether `error` is one of `reasons`, whatever it says in its fields.
pub fn gives_reason(reasons: &Reasons, error: &MetaError) -> bool {
    let kinds: Vec<Discriminant<MetaError>> = reasons.iter().map(discriminant).collect();
    kinds.contains(&discriminant(error))
}

impl Model {
    pub fn new() -> Self {
        let root = attr(Ino::ROOT, FileKind::Directory, 0o755, Timestamp::EPOCH);
        let root = Inode {
            attr: root,
            entries: BTreeMap::new(),
            cells: BTreeMap::new(),
            target: None,
            xattrs: BTreeMap::new(),
        };
        Self { inodes: BTreeMap::from([(Ino::ROOT, root)]), next: 2, chunks: BTreeMap::new(), quotas: BTreeMap::new(), numbers: BTreeMap::new() }
    }

    /// Runs one command, request `seq` of the usual client.
    pub fn run(&mut self, op: &Op, at: Timestamp, seq: u64) -> Result<(), Reasons> {
        let mut next = self.clone();
        let held = self.held_from(op);
        if let Err(mut reasons) = next.step(op, at, seq) {
            reasons.extend(held);
            return Err(reasons);
        }
        if let Some(held) = held {
            return Err(vec![held]);
        }
        let takes_away = matches!(op, Op::Unlink { .. } | Op::Rmdir { .. } | Op::Reap { .. } | Op::Punch { .. });
        for (dir, quota) in &self.quotas {
            if !takes_away && quota.refuses(self.totals(*dir), next.totals(*dir)) {
                return Err(vec![MetaError::QuotaExceeded { dir: *dir }]);
            }
        }
        next.quotas.retain(|dir, _| *dir == Ino::ROOT || next.inodes.values().any(|inode| inode.entries.values().any(|ino| ino == dir)));
        next.count_chunks(at);
        *self = next;
        Ok(())
    }

    /// Bytes, size and attributes of a file are changed by its holder alone.
    fn held_from(&self, op: &Op) -> Option<MetaError> {
        let changed = match op {
            Op::Write { ino, .. } | Op::Punch { ino, .. } | Op::SetAttr { ino, .. } => vec![*ino],
            Op::CloneCells { source, ino, .. } => vec![*source, *ino],
            _ => vec![],
        };
        changed.into_iter().find_map(|ino| match self.inodes.get(&ino)?.attr.usage {
            FileUse::Owned { holder, .. } if holder.incarnation.0 != CLIENT => Some(MetaError::Held { ino, holder }),
            _ => None,
        })
    }

    fn step(&mut self, op: &Op, at: Timestamp, seq: u64) -> Result<(), Reasons> {
        match op {
            Op::Make { parent, name, node } => self.make(*parent, name, node, at, seq),
            Op::Link { ino, parent, name } => self.link(*ino, *parent, name, at),
            Op::Unlink { parent, name } => self.unlink(*parent, name, at),
            Op::Rmdir { parent, name } => self.rmdir(*parent, name, at),
            Op::Rename { from, name, to, new_name, mode } => self.rename((*from, name), (*to, new_name), *mode, at),
            Op::SetAttr { ino, set } => self.set_attr(*ino, set, at),
            Op::SetXattr { ino, name, value, mode } => self.set_xattr(*ino, name, value, *mode, at),
            Op::RemoveXattr { ino, name } => self.remove_xattr(*ino, name, at),
            Op::Write { ino, cells, size_at_least, mtime, drop_privileges, appends_at, noted: _ } => {
                let size = self.file(*ino)?.attr.size;
                if appends_at.is_some_and(|at| at != size) {
                    return Err(vec![MetaError::SizeChanged(*ino)]);
                }
                self.write(*ino, cells, *size_at_least)?;
                let inode = self.inode(*ino)?;
                inode.attr.mtime = mtime.unwrap_or(at);
                inode.attr.ctime = at;
                if *drop_privileges {
                    drop_privileges_of(inode);
                }
                Ok(())
            }
            Op::Punch { ino, first, cells } => {
                let inode = self.file(*ino)?;
                inode.attr.data_version += 1;
                inode.cells.retain(|cell, _| cell.checked_sub(*first).is_none_or(|past| past >= *cells));
                inode.attr.mtime = at;
                inode.attr.ctime = at;
                Ok(())
            }
            Op::CloneCells { source, first, ino, to, cells, size_at_least } => {
                self.clone_cells((*source, *first), (*ino, *to), *cells, *size_at_least)?;
                let inode = self.inode(*ino)?;
                inode.attr.mtime = at;
                inode.attr.ctime = at;
                Ok(())
            }
            Op::Own { ino, holder, although_shared } => {
                let usage = &mut self.file(*ino)?.attr.usage;
                match *usage {
                    FileUse::Owned { holder: held, .. } if held != *holder => return Err(vec![MetaError::Held { ino: *ino, holder: held }]),
                    FileUse::Shared { .. } if !although_shared => return Err(vec![MetaError::Shared(*ino)]),
                    _ => *usage = FileUse::Owned { holder: *holder, since: seq },
                }
                Ok(())
            }
            Op::Disown { files, holder, shared } => {
                for &(ino, since) in files {
                    if let Some(inode) = self.inodes.get_mut(&ino).filter(|inode| inode.attr.usage == FileUse::Owned { holder: *holder, since }) {
                        inode.attr.usage = if *shared { FileUse::Shared { since: at } } else { FileUse::Free };
                    }
                }
                Ok(())
            }
            Op::ReserveInos { count } => {
                if *count == 0 || *count > 1 << 16 {
                    return Err(vec![MetaError::BadReservation(*count)]);
                }
                if self.numbers.len() == 64 {
                    return Err(vec![MetaError::TooManyReservations]);
                }
                let end = self.next + u64::from(*count);
                self.numbers.insert(self.next, (self.next, end));
                self.next = end;
                Ok(())
            }
            Op::SetQuota { ino, quota } => {
                let reasons = self.dir_reasons(*ino, &FileName::new(b"x").expect("a name"));
                if !reasons.is_empty() {
                    return Err(reasons);
                }
                self.quotas.remove(ino);
                if !quota.is_none() {
                    self.quotas.insert(*ino, *quota);
                }
                Ok(())
            }
            Op::Reap { inos } => {
                for ino in inos {
                    if self.inodes.contains_key(ino) && *ino != Ino::ROOT && self.names_of(*ino).is_empty() {
                        self.inodes.remove(ino);
                    }
                }
                Ok(())
            }
            Op::ForgetChunks { chunks } => {
                let counted = self.references();
                self.chunks.retain(|id, _| !chunks.contains(id) || counted.contains_key(id));
                Ok(())
            }
            other => panic!("the model does not know {other:?}"),
        }
    }

    // Looking.

    pub fn names_of(&self, ino: Ino) -> Vec<(Ino, FileName)> {
        let all = self.inodes.iter().flat_map(|(dir, inode)| inode.entries.iter().map(move |entry| (*dir, entry)));
        all.filter(|(_, (_, to))| **to == ino).map(|(dir, (name, _))| (dir, name.clone())).collect()
    }

    fn kind(&self, ino: Ino) -> Option<FileKind> {
        self.inodes.get(&ino).map(|inode| inode.attr.kind)
    }

    pub fn is_dir(&self, ino: Ino) -> bool {
        self.kind(ino) == Some(FileKind::Directory)
    }

    pub fn is_orphan(&self, ino: Ino) -> bool {
        ino != Ino::ROOT && self.names_of(ino).is_empty()
    }

    fn inode(&mut self, ino: Ino) -> Result<&mut Inode, Reasons> {
        self.inodes.get_mut(&ino).ok_or(vec![MetaError::NoSuchInode(ino)])
    }

    fn file(&mut self, ino: Ino) -> Result<&mut Inode, Reasons> {
        let inode = self.inode(ino)?;
        match inode.attr.kind {
            FileKind::File => Ok(inode),
            FileKind::Directory => Err(vec![MetaError::IsDirectory(ino), MetaError::WrongKind(ino)]),
            _ => Err(vec![MetaError::WrongKind(ino)]),
        }
    }

    /// Why no name can be looked up, added or removed in `dir`.
    fn dir_reasons(&self, dir: Ino, name: &FileName) -> Reasons {
        match self.kind(dir) {
            None => vec![MetaError::NoSuchInode(dir)],
            Some(FileKind::Directory) if self.is_orphan(dir) => {
                vec![MetaError::NoSuchInode(dir), MetaError::NoSuchEntry { parent: dir, name: name.clone() }]
            }
            Some(FileKind::Directory) => vec![],
            Some(_) => vec![MetaError::NotDirectory(dir)],
        }
    }

    fn entry(&self, dir: Ino, name: &FileName) -> Option<Ino> {
        self.inodes.get(&dir)?.entries.get(name).copied()
    }

    /// Whether `dir` is `top` or somewhere below it.
    pub fn is_within(&self, mut dir: Ino, top: Ino) -> bool {
        loop {
            if dir == top {
                return true;
            }
            match self.names_of(dir).first() {
                Some((parent, _)) => dir = *parent,
                None => return false,
            }
        }
    }

    /// The nearest directory with a quota, from `dir` upwards.
    fn quota_root(&self, mut dir: Ino) -> Option<Ino> {
        loop {
            if self.quotas.contains_key(&dir) {
                return Some(dir);
            }
            dir = self.names_of(dir).first()?.0;
        }
    }

    /// Cells naming each chunk, over all inodes.
    fn references(&self) -> BTreeMap<ChunkId, u64> {
        let mut counted = BTreeMap::new();
        for id in self.inodes.values().flat_map(|inode| inode.cells.values()).filter_map(Extent::chunk) {
            *counted.entry(id).or_insert(0) += 1;
        }
        counted
    }

    /// Condemns what lost its last reference, takes back what has one again.
    fn count_chunks(&mut self, at: Timestamp) {
        let counted = self.references();
        for (id, (_, condemned)) in &mut self.chunks {
            *condemned = if counted.contains_key(id) { None } else { condemned.or(Some(at)) };
        }
    }

    // Names.

    fn enter(&mut self, dir: Ino, name: &FileName, ino: Ino, at: Timestamp) {
        self.inodes.get_mut(&dir).expect("a directory").entries.insert(name.clone(), ino);
        self.renamed_in(dir, at);
    }

    fn leave(&mut self, dir: Ino, name: &FileName, at: Timestamp) {
        self.inodes.get_mut(&dir).expect("a directory").entries.remove(name);
        self.renamed_in(dir, at);
    }

    fn renamed_in(&mut self, dir: Ino, at: Timestamp) {
        let dir = &mut self.inodes.get_mut(&dir).expect("a directory").attr;
        (dir.mtime, dir.ctime) = (at, at);
    }

    fn touch(&mut self, ino: Ino, at: Timestamp) {
        self.inodes.get_mut(&ino).expect("an inode").attr.ctime = at;
    }

    fn make(&mut self, parent: Ino, name: &FileName, new: &NewNode, at: Timestamp, seq: u64) -> Result<(), Reasons> {
        let mut reasons = self.dir_reasons(parent, name);
        if let NewContent::Symlink { target } = &new.content
            && (target.is_empty() || target.len() > SYMLINK_BYTES_MAX)
        {
            reasons.push(MetaError::BadTarget);
        }
        if let Some(found) = self.entry(parent, name) {
            let regular = new.content == NewContent::File && self.kind(found) == Some(FileKind::File);
            if regular && !new.exclusive {
                return Ok(());
            }
            reasons.push(MetaError::Exists { parent, name: name.clone() });
        }
        let mut ino = Ino(self.next);
        if let Some(number) = new.ino {
            ino = number;
            let mut ranges = self.numbers.values_mut();
            match ranges.find(|(next, end)| (*next..*end).contains(&number.0)) {
                Some((next, _)) => *next = number.0 + 1,
                None => reasons.push(MetaError::NumberNotReserved(number)),
            }
            self.numbers.retain(|_, (next, end)| next < end);
        } else {
            self.next += 1;
        }
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let (kind, target, rdev) = match &new.content {
            NewContent::File => (FileKind::File, None, 0),
            NewContent::Directory => (FileKind::Directory, None, 0),
            NewContent::Symlink { target } => (FileKind::Symlink, Some(target.clone()), 0),
            NewContent::Fifo => (FileKind::Fifo, None, 0),
            NewContent::Socket => (FileKind::Socket, None, 0),
            NewContent::CharDevice { rdev } => (FileKind::CharDevice, None, *rdev),
            NewContent::BlockDevice { rdev } => (FileKind::BlockDevice, None, *rdev),
        };
        let above = &self.inodes[&parent].attr;
        let mut attr = attr(ino, kind, new.mode & !new.umask & 0o7777, at);
        (attr.uid, attr.gid, attr.rdev) = (new.uid, new.gid, rdev);
        if above.mode & 0o2000 != 0 {
            attr.gid = above.gid;
            if kind == FileKind::Directory {
                attr.mode |= 0o2000;
            }
        }
        if kind == FileKind::Symlink {
            attr.mode = 0o777;
        }
        if let (FileKind::File, Some(holder)) = (kind, new.holder) {
            attr.usage = FileUse::Owned { holder, since: seq };
        }
        let inode = Inode { attr, entries: BTreeMap::new(), cells: BTreeMap::new(), target, xattrs: BTreeMap::new() };
        self.inodes.insert(ino, inode);
        self.enter(parent, name, ino, at);
        Ok(())
    }

    fn link(&mut self, ino: Ino, parent: Ino, name: &FileName, at: Timestamp) -> Result<(), Reasons> {
        let mut reasons = self.dir_reasons(parent, name);
        match self.kind(ino) {
            None => reasons.push(MetaError::NoSuchInode(ino)),
            Some(kind) => {
                if kind == FileKind::Directory {
                    reasons.push(MetaError::WrongKind(ino));
                }
                if self.is_orphan(ino) {
                    reasons.push(MetaError::NoSuchInode(ino));
                }
            }
        }
        if self.entry(parent, name).is_some() {
            reasons.push(MetaError::Exists { parent, name: name.clone() });
        }
        if let Some((home, _)) = self.names_of(ino).into_iter().min()
            && self.quota_root(home) != self.quota_root(parent)
        {
            reasons.push(MetaError::AcrossQuota { from: home, to: parent });
        }
        if !reasons.is_empty() {
            return Err(reasons);
        }
        self.enter(parent, name, ino, at);
        self.touch(ino, at);
        Ok(())
    }

    fn unlink(&mut self, parent: Ino, name: &FileName, at: Timestamp) -> Result<(), Reasons> {
        let found = self.present(parent, name)?;
        if self.is_dir(found) {
            return Err(vec![MetaError::IsDirectory(found)]);
        }
        self.leave(parent, name, at);
        self.touch(found, at);
        Ok(())
    }

    fn rmdir(&mut self, parent: Ino, name: &FileName, at: Timestamp) -> Result<(), Reasons> {
        let found = self.present(parent, name)?;
        if !self.is_dir(found) {
            return Err(vec![MetaError::NotDirectory(found)]);
        }
        if !self.inodes[&found].entries.is_empty() {
            return Err(vec![MetaError::NotEmpty(found)]);
        }
        self.leave(parent, name, at);
        self.touch(found, at);
        Ok(())
    }

    fn present(&self, dir: Ino, name: &FileName) -> Result<Ino, Reasons> {
        let mut reasons = self.dir_reasons(dir, name);
        match self.entry(dir, name) {
            Some(found) if reasons.is_empty() => Ok(found),
            Some(_) => Err(reasons),
            None => {
                reasons.push(MetaError::NoSuchEntry { parent: dir, name: name.clone() });
                Err(reasons)
            }
        }
    }

    fn rename(
        &mut self,
        (from, name): (Ino, &FileName),
        (to, new_name): (Ino, &FileName),
        mode: RenameMode,
        at: Timestamp,
    ) -> Result<(), Reasons> {
        let mut reasons = self.present(from, name).err().unwrap_or_default();
        reasons.extend(self.dir_reasons(to, new_name));
        let moved = self.entry(from, name);
        let target = self.entry(to, new_name);
        if mode == RenameMode::NoReplace && target.is_some() {
            reasons.push(MetaError::Exists { parent: to, name: new_name.clone() });
        }
        if mode == RenameMode::Exchange && target.is_none() {
            reasons.push(MetaError::NoSuchEntry { parent: to, name: new_name.clone() });
        }
        if let Some(moved) = moved
            && self.is_dir(moved)
            && self.is_within(to, moved)
        {
            reasons.push(MetaError::UnderItself(moved));
        }
        if let (Some(moved), Some(target)) = (moved, target) {
            if moved == target && reasons.is_empty() {
                return Ok(());
            }
            match (mode, self.is_dir(moved), self.is_dir(target)) {
                (RenameMode::Exchange, _, true) if self.is_within(from, target) => {
                    reasons.push(MetaError::UnderItself(target));
                }
                (RenameMode::Replace, true, false) => reasons.push(MetaError::NotDirectory(target)),
                (RenameMode::Replace, false, true) => reasons.push(MetaError::IsDirectory(target)),
                (RenameMode::Replace, true, true) if !self.inodes[&target].entries.is_empty() => {
                    reasons.push(MetaError::NotEmpty(target));
                }
                _ => {}
            }
        }
        if self.quota_root(from) != self.quota_root(to) {
            reasons.push(MetaError::AcrossQuota { from, to });
        }
        let (Some(moved), true) = (moved, reasons.is_empty()) else {
            return Err(reasons);
        };
        self.leave(from, name, at);
        self.enter(to, new_name, moved, at);
        if let (RenameMode::Exchange, Some(target)) = (mode, target) {
            self.enter(from, name, target, at);
        }
        for ino in [Some(moved), target].into_iter().flatten() {
            self.touch(ino, at);
        }
        Ok(())
    }
}
