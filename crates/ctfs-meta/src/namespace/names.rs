//! Names: making, linking, removing and moving them.

use ctfs_types::{
    FileKind, FileName, FileUse, Ino,
    limits::{LINKS_MAX, SYMLINK_BYTES_MAX},
};

use super::{
    Apply, Totals,
    acl::{self, Acl},
    keys,
    records::{CookieEntry, Dentry, Dir, Inode},
    txn::Outcome,
};
use crate::{Change, MetaError, NewContent, NewNode, Quota, RenameMode, Reply};

const SETGID: u16 = 0o2000;

impl Apply<'_, '_> {
    fn dentry(&mut self, parent: Ino, name: &FileName) -> Outcome<Option<Dentry>> {
        Ok(self.txn.get(&keys::name(parent, name))?)
    }

    fn entry(&mut self, parent: Ino, name: &FileName) -> Outcome<Dentry> {
        self.dentry(parent, name)?.ok_or_else(|| MetaError::NoSuchEntry { parent, name: name.clone() }.into())
    }

    pub(super) fn make(&mut self, parent: Ino, name: &FileName, node: &NewNode) -> Outcome<Reply> {
        let dir = self.directory(parent)?;
        if let Some(there) = self.dentry(parent, name)? {
            if node.exclusive || node.content != NewContent::File || there.kind != FileKind::File {
                return Err(MetaError::Exists { parent, name: name.clone() }.into());
            }
            let attr = self.inode(there.ino)?.attr(there.ino);
            return Ok(Reply::Entry { attr, made: false });
        }
        let (kind, rdev, target) = match &node.content {
            NewContent::File => (FileKind::File, 0, Vec::new()),
            NewContent::Directory => (FileKind::Directory, 0, Vec::new()),
            NewContent::Symlink { target } => {
                if target.is_empty() || target.len() > SYMLINK_BYTES_MAX || target.contains(&0) {
                    return Err(MetaError::BadTarget.into());
                }
                (FileKind::Symlink, 0, target.clone())
            }
            NewContent::Fifo => (FileKind::Fifo, 0, Vec::new()),
            NewContent::Socket => (FileKind::Socket, 0, Vec::new()),
            NewContent::CharDevice { rdev } => (FileKind::CharDevice, *rdev, Vec::new()),
            NewContent::BlockDevice { rdev } => (FileKind::BlockDevice, *rdev, Vec::new()),
        };
        let parent_dir = dir.dir.as_ref().expect("directory() answers directories");
        if kind == FileKind::Directory && parent_dir.subdirs >= LINKS_MAX - 2 {
            return Err(MetaError::TooManyLinks(parent).into());
        }
        if let Some(holder) = node.holder {
            self.is_alive(holder.node, holder.incarnation)?;
        }
        let reserved = node.ino.map(|ino| self.reserved_range(ino)).transpose()?;
        let default_acl = self.txn.get_raw(&keys::xattr(parent, acl::DEFAULT))?;
        let cell = match node.cell {
            Some(cell) => cell,
            None => self.effective_cell(parent)?,
        };

        // Decided. From here on nothing is refused.
        let ino = match (node.ino, reserved) {
            (Some(ino), Some(range)) => self.take_number(ino, range),
            _ => self.next_numbers(1),
        };
        let mut mode = node.mode & 0o7777;
        match default_acl {
            _ if kind == FileKind::Symlink => mode = 0o777,
            Some(bytes) => {
                let mut access = Acl::parse(&bytes)?;
                mode = access.inherit(mode);
                if !access.is_minimal() {
                    self.txn.put_raw(keys::xattr(ino, acl::ACCESS), access.to_bytes());
                }
                if kind == FileKind::Directory {
                    self.txn.put_raw(keys::xattr(ino, acl::DEFAULT), bytes);
                }
            }
            None => mode &= !(node.umask & 0o777),
        }
        let mut gid = node.gid;
        if dir.mode & SETGID != 0 {
            gid = dir.gid;
            if kind == FileKind::Directory {
                mode |= SETGID;
            }
        }
        let mut inode = Inode {
            kind,
            mode,
            uid: node.uid,
            gid,
            nlink: if kind == FileKind::Directory { 2 } else { 0 },
            size: target.len() as u64,
            allocated: 0,
            atime: self.at,
            mtime: self.at,
            ctime: self.at,
            btime: self.at,
            rdev,
            data_version: 1,
            cell,
            target,
            dir: (kind == FileKind::Directory).then(|| Dir::new(parent)),
            usage: FileUse::Free,
            home: None,
        };
        match node.holder.filter(|_| matches!(kind, FileKind::File | FileKind::Directory)) {
            Some(holder) => self.put_owned(ino, &mut inode, holder),
            None => self.txn.put_new(keys::inode(ino), &inode),
        }
        self.add_name(parent, name, ino)?;
        let attr = self.inode(ino)?.attr(ino);
        Ok(Reply::Entry { attr, made: true })
    }

    pub(super) fn link(&mut self, ino: Ino, parent: Ino, name: &FileName) -> Outcome<Reply> {
        let inode = self.inode(ino)?;
        self.directory(parent)?;
        if inode.is_dir() {
            return Err(MetaError::WrongKind(ino).into());
        }
        if inode.nlink == 0 {
            return Err(MetaError::NoSuchInode(ino).into());
        }
        if inode.nlink >= LINKS_MAX {
            return Err(MetaError::TooManyLinks(ino).into());
        }
        if self.dentry(parent, name)?.is_some() {
            return Err(MetaError::Exists { parent, name: name.clone() }.into());
        }
        if let Some(home) = self.home_of(ino, &inode)? {
            self.must_share_quota(home, parent)?;
        }
        self.add_name(parent, name, ino)?;
        let attr = self.inode(ino)?.attr(ino);
        Ok(Reply::Entry { attr, made: true })
    }

    pub(super) fn unlink(&mut self, parent: Ino, name: &FileName) -> Outcome<Reply> {
        self.directory(parent)?;
        let entry = self.entry(parent, name)?;
        if entry.kind == FileKind::Directory {
            return Err(MetaError::IsDirectory(entry.ino).into());
        }
        self.remove_name(parent, name)?;
        Ok(Reply::Done)
    }

    pub(super) fn rmdir(&mut self, parent: Ino, name: &FileName) -> Outcome<Reply> {
        self.directory(parent)?;
        let entry = self.entry(parent, name)?;
        if entry.kind != FileKind::Directory {
            return Err(MetaError::NotDirectory(entry.ino).into());
        }
        self.must_be_empty(entry.ino)?;
        self.remove_name(parent, name)?;
        Ok(Reply::Done)
    }

    fn must_be_empty(&mut self, ino: Ino) -> Outcome<()> {
        let inode = self.inode(ino)?;
        match &inode.dir {
            Some(dir) if dir.entries > 0 => Err(MetaError::NotEmpty(ino).into()),
            _ => Ok(()),
        }
    }

    /// Renames as rename(2) and renameat2(2) of Linux say.
    pub(super) fn rename(&mut self, from: Ino, name: &FileName, to: Ino, new_name: &FileName, mode: RenameMode) -> Outcome<Reply> {
        // Decide.
        self.directory(from)?;
        let target_dir = self.directory(to)?;
        let moved = self.entry(from, name)?;
        let there = self.dentry(to, new_name)?;
        let is_dir = |entry: &Dentry| entry.kind == FileKind::Directory;
        match (mode, &there) {
            (RenameMode::NoReplace, Some(_)) => return Err(MetaError::Exists { parent: to, name: new_name.clone() }.into()),
            (RenameMode::Exchange, None) => return Err(MetaError::NoSuchEntry { parent: to, name: new_name.clone() }.into()),
            _ => {}
        }
        if let Some(there) = &there
            && there.ino == moved.ino
        {
            return Ok(Reply::Done);
        }
        self.must_share_quota(from, to)?;
        // What stays in its directory cannot come to be below itself.
        if from != to && is_dir(&moved) {
            self.must_not_be_below(to, moved.ino)?;
        }
        if let (RenameMode::Exchange, Some(there)) = (mode, &there)
            && from != to
            && is_dir(there)
        {
            self.must_not_be_below(from, there.ino)?;
        }
        if let (RenameMode::Replace, Some(there)) = (mode, &there) {
            match (is_dir(&moved), is_dir(there)) {
                (true, false) => return Err(MetaError::NotDirectory(there.ino).into()),
                (false, true) => return Err(MetaError::IsDirectory(there.ino).into()),
                (true, true) => self.must_be_empty(there.ino)?,
                (false, false) => {}
            }
        }
        let replaces_dir = there.as_ref().is_some_and(is_dir);
        let subdirs = target_dir.dir.as_ref().map_or(0, |dir| dir.subdirs);
        if is_dir(&moved) && from != to && !replaces_dir && subdirs >= LINKS_MAX - 2 {
            return Err(MetaError::TooManyLinks(to).into());
        }

        // Change. What stays in its directory counts where it did.
        let recounts = from != to;
        if let (RenameMode::Exchange, Some(there)) = (mode, &there) {
            let mut swap = [(from, name, to, new_name, &moved), (to, new_name, from, name, there)];
            // A directory leaves last and is back first: while it hangs nowhere, no hard-linked
            // file's home may move into or out of it, because counts follow its parent upwards.
            swap.sort_by_key(|(.., entry)| is_dir(entry));
            for (dir, name, .., entry) in &swap {
                self.unhook(*dir, name, entry.ino, recounts)?;
            }
            for (.., dir, name, entry) in swap.iter().rev() {
                self.hook(*dir, name, entry.ino, recounts)?;
            }
            return Ok(Reply::Done);
        }
        if there.is_some() {
            self.remove_name(to, new_name)?;
        }
        self.unhook(from, name, moved.ino, recounts)?;
        self.hook(to, new_name, moved.ino, recounts)?;
        Ok(Reply::Done)
    }

    /// Walks up from `dir`; a directory must not end up below itself.
    fn must_not_be_below(&mut self, dir: Ino, moved: Ino) -> Outcome<()> {
        let mut ino = dir;
        loop {
            if ino == moved {
                return Err(MetaError::UnderItself(moved).into());
            }
            if ino == Ino::ROOT {
                return Ok(());
            }
            let inode = self.peek_inode(ino)?;
            ino = inode.dir.ok_or(MetaError::NotDirectory(ino))?.parent;
        }
    }

    /// Gives an inode one more name.
    fn add_name(&mut self, parent: Ino, name: &FileName, ino: Ino) -> Outcome<()> {
        let mut inode = self.inode(ino)?;
        if !inode.is_dir() {
            inode.nlink += 1;
            self.put_inode(ino, &inode);
        }
        self.hook(parent, name, ino, true)
    }

    /// Takes a name away; with its last one the inode becomes an orphan.
    fn remove_name(&mut self, parent: Ino, name: &FileName) -> Outcome<()> {
        let ino = self.entry(parent, name)?.ino;
        self.unhook(parent, name, ino, true)?;
        let mut inode = self.inode(ino)?;
        inode.nlink = if inode.is_dir() { 0 } else { inode.nlink - 1 };
        inode.home = if inode.nlink == 1 { self.home(ino)? } else { None };
        self.end_holding(ino, &mut inode);
        self.put_quota(ino, &mut inode, Quota::default());
        self.put_inode(ino, &inode);
        if inode.nlink == 0 {
            self.txn.put_new(keys::orphan(ino), &());
            self.changed(Change::Orphaned { ino });
        }
        Ok(())
    }

    /// Puts an inode into a directory: entry, cookie, link record, times, and unless it only changes
    /// its name there, counts.
    fn hook(&mut self, parent: Ino, name: &FileName, ino: Ino, recounts: bool) -> Outcome<()> {
        let before = if recounts { self.home_besides(ino, None)? } else { None };
        let mut inode = self.inode(ino)?;
        inode.ctime = self.at;
        match &mut inode.dir {
            Some(dir) => dir.parent = parent,
            None => inode.home = (inode.nlink == 1).then_some(parent),
        }
        self.put_inode(ino, &inode);

        let mut dir_inode = self.directory(parent)?;
        let dir = dir_inode.dir.as_mut().expect("directory() answers directories");
        let cookie = dir.next_cookie;
        dir.next_cookie += 1;
        dir.entries += 1;
        if inode.is_dir() {
            dir.subdirs += 1;
            dir_inode.nlink += 1;
        }
        (dir_inode.mtime, dir_inode.ctime) = (self.at, self.at);
        self.put_inode(parent, &dir_inode);
        self.txn.put(keys::name(parent, name), &Dentry { ino, kind: inode.kind, cookie });
        self.txn.put_new(keys::cookie(parent, cookie), &CookieEntry { name: name.clone(), ino, kind: inode.kind });
        self.txn.put_new(keys::link(ino, parent, name), &());
        if recounts {
            self.recount(ino, &inode, before, parent, true)?;
        }
        self.tell_of_name(parent, name, ino);
        Ok(())
    }

    /// Takes an inode out of a directory; link counts stay with the caller.
    fn unhook(&mut self, parent: Ino, name: &FileName, ino: Ino, recounts: bool) -> Outcome<()> {
        let entry = self.entry(parent, name)?;
        let before = if recounts { self.home_besides(ino, Some(parent))? } else { None };
        let mut inode = self.inode(ino)?;
        inode.ctime = self.at;
        self.put_inode(ino, &inode);

        let mut dir_inode = self.directory(parent)?;
        let dir = dir_inode.dir.as_mut().expect("directory() answers directories");
        dir.entries -= 1;
        if inode.is_dir() {
            dir.subdirs -= 1;
            dir_inode.nlink -= 1;
        }
        (dir_inode.mtime, dir_inode.ctime) = (self.at, self.at);
        self.put_inode(parent, &dir_inode);
        self.txn.delete(keys::name(parent, name));
        self.txn.delete(keys::cookie(parent, entry.cookie));
        self.txn.delete(keys::link(ino, parent, name));
        if recounts {
            self.recount(ino, &inode, before, parent, false)?;
        }
        self.tell_of_name(parent, name, ino);
        Ok(())
    }

    /// The home of anything but a directory. With one name there is nothing to look for: it is `only`.
    fn home_besides(&mut self, ino: Ino, only: Option<Ino>) -> Outcome<Option<Ino>> {
        match self.inode(ino)? {
            inode if inode.is_dir() => Ok(None),
            inode if inode.nlink == 1 => Ok(only),
            _ => self.home(ino),
        }
    }

    /// Moves what the inode counts for from the directory that had it to the one that has it now.
    fn recount(&mut self, ino: Ino, inode: &Inode, before: Option<Ino>, parent: Ino, added: bool) -> Outcome<()> {
        let counts = self.counts_for(ino, inode)?;
        if inode.is_dir() {
            let difference = if added { counts } else { Totals::default().minus(counts) };
            return self.add_totals(parent, difference);
        }
        let after = self.home_besides(ino, added.then_some(parent))?;
        if before != after {
            if let Some(dir) = before {
                self.add_totals(dir, Totals::default().minus(counts))?;
            }
            if let Some(dir) = after {
                self.add_totals(dir, counts)?;
            }
        }
        Ok(())
    }

    fn tell_of_name(&mut self, parent: Ino, name: &FileName, ino: Ino) {
        self.changed(Change::Entry { parent, name: name.clone() });
        self.changed(Change::Attr { ino: parent });
        self.changed(Change::Attr { ino });
    }
}
