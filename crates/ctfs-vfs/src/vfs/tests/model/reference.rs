//! The reference: one file system in memory, slow and obvious.
//!
//! It knows nothing of servers, caches and chunks. Permissions are the kernel's business, so nobody
//! is refused anything here for who he is. A refusal is an errno.

use std::collections::BTreeMap;

use ctfs_types::{FileKind, Timestamp};

use crate::Caller;

pub type Id = u64;
pub type Errno = i32;
pub const ROOT: Id = 0;
const SETUID: u16 = 0o4000;
const SETGID: u16 = 0o2000;
pub const CAPABILITY: &[u8] = b"security.capability";

#[derive(Debug, Clone)]
pub enum Content {
    File(Vec<u8>),
    Directory { entries: BTreeMap<Vec<u8>, Id>, parent: Id },
    Symlink(Vec<u8>),
    Special(FileKind, u64),
}

#[derive(Debug, Clone)]
pub struct Node {
    pub content: Content,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// As they were last seen or set; nothing right after a change that takes the time of day.
    pub atime: Option<Timestamp>,
    pub mtime: Option<Timestamp>,
}

/// What a chmod, chown, truncate or utimensat asks for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish {
    pub mode: Option<u16>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<Timestamp>,
    pub mtime: Option<Timestamp>,
}

#[derive(Debug, Clone)]
pub struct Reference {
    pub nodes: BTreeMap<Id, Node>,
    next: Id,
}

impl Node {
    pub fn kind(&self) -> FileKind {
        match &self.content {
            Content::File(_) => FileKind::File,
            Content::Directory { .. } => FileKind::Directory,
            Content::Symlink(_) => FileKind::Symlink,
            Content::Special(kind, _) => *kind,
        }
    }

    pub fn size(&self) -> u64 {
        match &self.content {
            Content::File(bytes) => bytes.len() as u64,
            Content::Directory { entries, .. } => entries.len() as u64,
            Content::Symlink(target) => target.len() as u64,
            Content::Special(..) => 0,
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::File(bytes) => bytes,
            other => panic!("no file: {other:?}"),
        }
    }

    fn bytes_mut(&mut self) -> &mut Vec<u8> {
        self.mtime = None;
        match &mut self.content {
            Content::File(bytes) => bytes,
            other => panic!("no file: {other:?}"),
        }
    }

    pub fn part(&self, offset: u64, len: u64) -> &[u8] {
        let bytes = self.bytes();
        let from = bytes.len().min(offset as usize);
        &bytes[from..bytes.len().min(from + len as usize)]
    }

    pub fn write(&mut self, offset: u64, data: &[u8], by: Caller) {
        let bytes = self.bytes_mut();
        let end = offset as usize + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(data);
        self.xattrs.remove(CAPABILITY);
        if by.uid != 0 {
            self.drop_privileges();
        }
    }

    pub fn resize(&mut self, size: u64) {
        self.bytes_mut().resize(size as usize, 0);
    }

    pub fn zero(&mut self, offset: u64, len: u64) {
        let bytes = self.bytes_mut();
        let range = bytes.len().min(offset as usize)..bytes.len().min((offset + len) as usize);
        bytes[range].fill(0);
    }

    pub fn allocate(&mut self, mode: i32, offset: u64, len: u64) {
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            self.zero(offset, len);
        }
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 && self.size() < offset + len {
            self.resize(offset + len);
        }
        self.mtime = None;
    }

    pub fn drop_privileges(&mut self) {
        if self.kind() != FileKind::Directory {
            self.mode &= !SETUID;
            if self.mode & 0o010 != 0 {
                self.mode &= !SETGID;
            }
            self.xattrs.remove(CAPABILITY);
        }
    }
}

impl Reference {
    pub fn new(root: Node) -> Self {
        Self { nodes: BTreeMap::from([(ROOT, root)]), next: 1 }
    }

    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[&id]
    }

    pub fn node_mut(&mut self, id: Id) -> &mut Node {
        self.nodes.get_mut(&id).expect("a node")
    }

    /// Directories, the root first, also removed ones.
    pub fn directory(&self, index: usize) -> Id {
        let all: Vec<Id> = self.nodes.iter().filter(|(_, node)| node.kind() == FileKind::Directory).map(|(&id, _)| id).collect();
        all[index % all.len()]
    }

    fn entries(&self, dir: Id) -> &BTreeMap<Vec<u8>, Id> {
        match &self.node(dir).content {
            Content::Directory { entries, .. } => entries,
            other => panic!("no directory: {other:?}"),
        }
    }

    fn entries_mut(&mut self, dir: Id) -> &mut BTreeMap<Vec<u8>, Id> {
        let node = self.node_mut(dir);
        node.mtime = None;
        match &mut node.content {
            Content::Directory { entries, .. } => entries,
            other => panic!("no directory: {other:?}"),
        }
    }

    pub fn named(&self, dir: Id, name: &[u8]) -> Option<Id> {
        self.entries(dir).get(name).copied()
    }

    pub fn links(&self, id: Id) -> u32 {
        let all = self.nodes.values().filter_map(|node| match &node.content {
            Content::Directory { entries, .. } => Some(entries.values()),
            _ => None,
        });
        let names = all.flatten().filter(|&&named| named == id).count() as u32;
        if self.node(id).kind() != FileKind::Directory {
            return names;
        }
        if id != ROOT && names == 0 {
            return 0;
        }
        let is_directory = |id: &&Id| self.node(**id).kind() == FileKind::Directory;
        2 + self.entries(id).values().filter(is_directory).count() as u32
    }

    fn alive(&self, dir: Id) -> Result<(), Errno> {
        if self.links(dir) == 0 { Err(libc::ESTALE) } else { Ok(()) }
    }

    pub fn make(&mut self, dir: Id, name: &[u8], content: Content, mode: u16, umask: u16, by: Caller) -> Result<Id, Errno> {
        self.alive(dir)?;
        if self.named(dir, name).is_some() {
            return Err(libc::EEXIST);
        }
        let is_symlink = matches!(content, Content::Symlink(_));
        let mut mode = if is_symlink { 0o777 } else { mode & !umask };
        let mut gid = by.gid;
        let (dir_mode, dir_gid) = (self.node(dir).mode, self.node(dir).gid);
        if dir_mode & SETGID != 0 {
            gid = dir_gid;
            if matches!(content, Content::Directory { .. }) {
                mode |= SETGID;
            }
        }
        let id = self.next;
        self.next += 1;
        let node = Node { content, mode, uid: by.uid, gid, xattrs: BTreeMap::new(), atime: None, mtime: None };
        self.nodes.insert(id, node);
        self.put(dir, name, id);
        Ok(id)
    }

    fn put(&mut self, dir: Id, name: &[u8], id: Id) {
        self.entries_mut(dir).insert(name.to_vec(), id);
        if let Content::Directory { parent, .. } = &mut self.node_mut(id).content {
            *parent = dir;
        }
    }

    pub fn link(&mut self, id: Id, dir: Id, name: &[u8]) -> Result<(), Errno> {
        self.alive(dir)?;
        if self.node(id).kind() == FileKind::Directory {
            return Err(libc::EINVAL);
        }
        if self.links(id) == 0 {
            return Err(libc::ESTALE);
        }
        if self.named(dir, name).is_some() {
            return Err(libc::EEXIST);
        }
        self.put(dir, name, id);
        Ok(())
    }

    pub fn unlink(&mut self, dir: Id, name: &[u8]) -> Result<(), Errno> {
        self.alive(dir)?;
        let id = self.named(dir, name).ok_or(libc::ENOENT)?;
        if self.node(id).kind() == FileKind::Directory {
            return Err(libc::EISDIR);
        }
        self.entries_mut(dir).remove(name);
        Ok(())
    }

    pub fn rmdir(&mut self, dir: Id, name: &[u8]) -> Result<(), Errno> {
        self.alive(dir)?;
        let id = self.named(dir, name).ok_or(libc::ENOENT)?;
        if self.node(id).kind() != FileKind::Directory {
            return Err(libc::ENOTDIR);
        }
        if !self.entries(id).is_empty() {
            return Err(libc::ENOTEMPTY);
        }
        self.entries_mut(dir).remove(name);
        Ok(())
    }

    fn is_below(&self, mut dir: Id, top: Id) -> bool {
        loop {
            if dir == top {
                return true;
            }
            let Content::Directory { parent, .. } = &self.node(dir).content else { return false };
            if dir == ROOT {
                return false;
            }
            dir = *parent;
        }
    }

    pub fn rename(&mut self, (from, name): (Id, &[u8]), (to, new_name): (Id, &[u8]), flags: u32) -> Result<(), Errno> {
        if flags & libc::RENAME_WHITEOUT != 0 {
            return Err(libc::EINVAL);
        }
        self.alive(from)?;
        self.alive(to)?;
        let moved = self.named(from, name).ok_or(libc::ENOENT)?;
        let there = self.named(to, new_name);
        let exchange = flags == libc::RENAME_EXCHANGE;
        if flags == libc::RENAME_NOREPLACE && there.is_some() {
            return Err(libc::EEXIST);
        }
        if exchange && there.is_none() {
            return Err(libc::ENOENT);
        }
        if there == Some(moved) {
            return Ok(());
        }
        let is_directory = |id: Id| self.node(id).kind() == FileKind::Directory;
        if is_directory(moved) && self.is_below(to, moved) {
            return Err(libc::EINVAL);
        }
        if let Some(there) = there {
            if exchange {
                if is_directory(there) && self.is_below(from, there) {
                    return Err(libc::EINVAL);
                }
                self.put(to, new_name, moved);
                self.put(from, name, there);
                return Ok(());
            }
            match (is_directory(moved), is_directory(there)) {
                (true, false) => return Err(libc::ENOTDIR),
                (false, true) => return Err(libc::EISDIR),
                (true, true) if !self.entries(there).is_empty() => return Err(libc::ENOTEMPTY),
                _ => {}
            }
        }
        self.entries_mut(from).remove(name);
        self.put(to, new_name, moved);
        Ok(())
    }

    pub fn set_attr(&mut self, id: Id, wish: Wish, by: Caller) -> Result<(), Errno> {
        let node = self.node_mut(id);
        match node.kind() {
            FileKind::File => {}
            FileKind::Directory if wish.size.is_some() => return Err(libc::EISDIR),
            _ if wish.size.is_some() => return Err(libc::EINVAL),
            _ => {}
        }
        let old_gid = node.gid;
        if let Some(mode) = wish.mode {
            node.mode = mode;
            // As chmod(2): who is not in the group may not set the group id.
            if by.uid != 0 && by.gid != wish.gid.unwrap_or(old_gid) {
                node.mode &= !SETGID;
            }
        }
        node.uid = wish.uid.unwrap_or(node.uid);
        node.gid = wish.gid.unwrap_or(node.gid);
        let nothing = wish.mode.is_none() && wish.size.is_none() && wish.atime.is_none() && wish.mtime.is_none();
        let is_chown = wish.uid.is_some() || wish.gid.is_some() || nothing;
        if is_chown || (wish.size.is_some() && by.uid != 0) {
            node.drop_privileges();
        }
        if let Some(size) = wish.size {
            node.resize(size);
        }
        node.atime = wish.atime.or(node.atime);
        node.mtime = wish.mtime.or(node.mtime);
        Ok(())
    }

    pub fn set_xattr(&mut self, id: Id, name: &[u8], value: &[u8], flags: i32) -> Result<(), Errno> {
        let xattrs = &mut self.node_mut(id).xattrs;
        match (flags, xattrs.contains_key(name)) {
            (libc::XATTR_CREATE, true) => Err(libc::EEXIST),
            (libc::XATTR_REPLACE, false) => Err(libc::ENODATA),
            _ => {
                xattrs.insert(name.to_vec(), value.to_vec());
                Ok(())
            }
        }
    }

    pub fn remove_xattr(&mut self, id: Id, name: &[u8]) -> Result<(), Errno> {
        self.node_mut(id).xattrs.remove(name).map(drop).ok_or(libc::ENODATA)
    }
}
