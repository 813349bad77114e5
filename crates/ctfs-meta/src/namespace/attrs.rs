//! Attributes, extended attributes and policies.

use ctfs_types::{
    CellSize, FileKind, Ino,
    limits::{XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX},
};

use super::{
    Apply,
    acl::{self, Acl},
    keys,
    records::Inode,
    txn::Outcome,
};
use crate::{Change, MetaError, Policy, Reply, SetAttr, XattrMode};

const SETUID: u16 = 0o4000;
const SETGID: u16 = 0o2000;
const GROUP_EXECUTE: u16 = 0o010;
const CAPABILITY: &[u8] = b"security.capability";
/// More copies than this only slow writes down; no cluster we build for has use for them.
const COPIES_MAX: u8 = 16;

impl Apply<'_, '_> {
    pub(super) fn set_attr(&mut self, ino: Ino, set: &SetAttr) -> Outcome<Reply> {
        let mut inode = self.inode(ino)?;
        self.may_change(ino, &inode)?;
        if let Some(size) = set.size {
            self.may_have_size(ino, &inode, size)?;
        }
        let access = match set.mode {
            Some(_) if inode.kind != FileKind::Symlink => self.txn.get_raw(&keys::xattr(ino, acl::ACCESS))?,
            _ => None,
        };
        let access = access.map(|bytes| Acl::parse(&bytes)).transpose()?;

        let before = inode.contribution();
        if let Some(mode) = set.mode {
            inode.mode = mode & 0o7777;
            if let Some(mut access) = access {
                access.chmod(mode);
                self.txn.put_raw(keys::xattr(ino, acl::ACCESS), access.to_bytes());
            }
        }
        if set.drop_setgid {
            inode.mode &= !SETGID;
        }
        inode.uid = set.uid.unwrap_or(inode.uid);
        inode.gid = set.gid.unwrap_or(inode.gid);
        if set.drop_privileges {
            self.drop_privileges(ino, &mut inode);
        }
        if let Some(size) = set.size {
            self.resize(ino, &mut inode, size)?;
            inode.mtime = self.at;
        }
        inode.atime = set.atime.unwrap_or(inode.atime);
        inode.mtime = set.mtime.unwrap_or(inode.mtime);
        inode.ctime = self.at;
        self.put_counted(ino, before, &inode)?;
        self.changed(Change::Attr { ino });
        Ok(Reply::Attr(inode.attr(ino)))
    }

    /// What Linux does when the unprivileged write to a file, and when anybody changes its owner.
    pub(super) fn drop_privileges(&mut self, ino: Ino, inode: &mut Inode) {
        if inode.is_dir() {
            return;
        }
        inode.mode &= !SETUID;
        if inode.mode & GROUP_EXECUTE != 0 {
            inode.mode &= !SETGID;
        }
        self.txn.delete(keys::xattr(ino, CAPABILITY));
    }

    pub(super) fn set_xattr(&mut self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Outcome<Reply> {
        let mut inode = self.inode(ino)?;
        if name.is_empty() || name.len() > XATTR_NAME_BYTES_MAX || name.contains(&0) || value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(MetaError::XattrTooBig.into());
        }
        let key = keys::xattr(ino, name);
        let there = self.txn.get_raw(&key)?.is_some();
        match mode {
            XattrMode::Create if there => return Err(MetaError::XattrExists.into()),
            XattrMode::Replace if !there => return Err(MetaError::NoSuchXattr.into()),
            _ => {}
        }
        let is_acl = name == acl::ACCESS || name == acl::DEFAULT;
        if is_acl && inode.kind == FileKind::Symlink {
            return Err(MetaError::WrongKind(ino).into());
        }
        if name == acl::DEFAULT && !inode.is_dir() {
            return Err(MetaError::WrongKind(ino).into());
        }
        if is_acl && value.len() <= 4 {
            // An empty list takes the list away, as setfacl -b asks.
            self.txn.delete(key);
        } else if name == acl::ACCESS {
            let mut access = Acl::parse(value)?;
            inode.mode = inode.mode & !0o777 | access.mode_bits();
            if access.is_minimal() { self.txn.delete(key) } else { self.txn.put_raw(key, access.to_bytes()) }
        } else if is_acl {
            self.txn.put_raw(key, Acl::parse(value)?.to_bytes());
        } else {
            self.txn.put_raw(key, value.to_vec());
        }
        inode.ctime = self.at;
        self.put_inode(ino, &inode);
        self.changed(Change::Attr { ino });
        Ok(Reply::Attr(inode.attr(ino)))
    }

    pub(super) fn remove_xattr(&mut self, ino: Ino, name: &[u8]) -> Outcome<Reply> {
        let mut inode = self.inode(ino)?;
        let key = keys::xattr(ino, name);
        if self.txn.get_raw(&key)?.is_none() {
            return Err(MetaError::NoSuchXattr.into());
        }
        self.txn.delete(key);
        inode.ctime = self.at;
        self.put_inode(ino, &inode);
        self.changed(Change::Attr { ino });
        Ok(Reply::Attr(inode.attr(ino)))
    }

    pub(super) fn set_policy(&mut self, ino: Ino, policy: Policy) -> Outcome<Reply> {
        self.directory(ino)?;
        if let Some(copies) = policy.copies
            && copies > COPIES_MAX
        {
            return Err(MetaError::BadPolicy(format!("{copies} copies; the most is {COPIES_MAX}, and 0 means automatic")).into());
        }
        if policy == Policy::default() { self.txn.delete(keys::policy(ino)) } else { self.txn.put(keys::policy(ino), &policy) }
        self.changed(Change::Attr { ino });
        Ok(Reply::Done)
    }

    /// The grid of a file made in `dir` now: the nearest policy above that names one.
    pub(super) fn effective_cell(&mut self, dir: Ino) -> Outcome<CellSize> {
        let mut ino = dir;
        loop {
            let policy: Option<Policy> = self.txn.peek(&keys::policy(ino))?;
            if let Some(cell) = policy.and_then(|policy| policy.cell) {
                return Ok(cell);
            }
            if ino == Ino::ROOT {
                return Ok(CellSize::DEFAULT);
            }
            let inode = self.peek_inode(ino)?;
            ino = inode.dir.ok_or(MetaError::NotDirectory(ino))?.parent;
        }
    }
}
