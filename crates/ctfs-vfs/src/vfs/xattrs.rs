//! Extended attributes, access control lists among them.
//!
//! All namespaces of xattr(7) are stored alike. The kernel decides who may touch `user.*`,
//! `security.*` and `trusted.*`; hiding `trusted.*` from listings is left to the file system.

use ctfs_meta::{Durability, MetaError, OnPartition, Op, Policy, SetAttr, XattrMode};
use ctfs_types::{FileKind, Ino};

use super::Vfs;
use crate::{FsError, caller::Caller};

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
const TRUSTED: &[u8] = b"trusted.";

/// Namespaces in which programs name what they store.
const NAMESPACES: [&[u8]; 3] = [b"user.", TRUSTED, b"security."];
/// What [`ctfs_meta`] takes away from a file that changes, and Linux from one that anybody writes.
const CAPABILITY: &[u8] = b"security.capability";
/// Of a directory: what fsync waits for, of all that is below it and says nothing else.
const DURABILITY: &[u8] = b"ctfs.durability";
/// Of a directory: what reads do on a server that is cut off.
const ON_PARTITION: &[u8] = b"ctfs.on-partition";

fn is_acl(name: &[u8]) -> bool {
    name == ACL_ACCESS || name == ACL_DEFAULT
}

/// `policy` with the part of it that an extended attribute stands for; `value` is `None` where it is inherited. `None`:
/// the name stands for none.
fn with_policy(policy: Policy, name: &[u8], value: Option<&[u8]>) -> Option<Result<Policy, FsError>> {
    let changed = match name {
        DURABILITY => match value.map(Durability::of_name) {
            Some(None) => Err(FsError::Invalid("a class of durability is local, pair, quorum or all")),
            class => Ok(Policy { durability: class.flatten(), ..policy }),
        },
        ON_PARTITION => match value.map(OnPartition::of_name) {
            Some(None) => Err(FsError::Invalid("reads on a server that is cut off are stale, block or error")),
            choice => Ok(Policy { on_partition: choice.flatten(), ..policy }),
        },
        _ => return None,
    };
    Some(changed)
}

/// Whether programs can ask for, set and remove an attribute of this name.
fn check_name(name: &[u8]) -> Result<(), FsError> {
    if NAMESPACES.contains(&name) {
        return Err(FsError::Invalid("an extended attribute's name is only its namespace"));
    }
    if !is_acl(name) && !NAMESPACES.iter().any(|namespace| name.starts_with(namespace)) {
        return Err(FsError::Unsupported("extended attribute namespace"));
    }
    Ok(())
}

impl Vfs {
    /// The value of one attribute. `ctfs.durability` is what fsync waits for, `ctfs.on-partition` what reads do on a
    /// server that is cut off; `ctfs.files`, `ctfs.directories` and `ctfs.bytes` of a
    /// directory answer its recursive counts in decimal, `ctfs.quota.bytes` and `ctfs.quota.files` the
    /// limits set on it; they are not listed.
    ///
    /// # Errors
    /// ENODATA when there is none; EOPNOTSUPP outside the known namespaces.
    pub async fn getxattr(&self, caller: Caller, ino: Ino, name: &[u8]) -> Result<Vec<u8>, FsError> {
        if name.starts_with(TRUSTED) && caller.uid != 0 {
            return Err(MetaError::NoSuchXattr.into());
        }
        self.read_of(ino, |view| {
            if let Some(limit) = name.strip_prefix(b"ctfs.quota.") {
                let quota = view.quota(ino)?;
                let limit = match limit {
                    b"bytes" => quota.bytes,
                    b"files" => quota.files,
                    _ => None,
                };
                return Ok(limit.ok_or(MetaError::NoSuchXattr)?.to_string().into_bytes());
            }
            if name == DURABILITY || name == ON_PARTITION {
                view.attr_of(ino)?;
                let policy = view.policy(ino)?;
                let value = if name == DURABILITY { policy.durability.name() } else { policy.on_partition.name() };
                return Ok(value.as_bytes().to_vec());
            }
            if let Some(counter) = name.strip_prefix(b"ctfs.") {
                let totals = view.totals(ino)?.ok_or(MetaError::NoSuchXattr)?;
                let count = match counter {
                    b"files" => totals.files,
                    b"directories" => totals.directories,
                    b"bytes" => totals.bytes,
                    _ => return Err(MetaError::NoSuchXattr.into()),
                };
                return Ok(count.to_string().into_bytes());
            }
            check_name(name)?;
            match view.xattr(ino, name)? {
                Some(value) => Ok(value),
                None => Err(view.attr_of(ino).map_or_else(|gone| gone, |_| MetaError::NoSuchXattr.into())),
            }
        })
        .await
    }

    /// Names, each ended by NUL, as listxattr(2) wants them.
    pub async fn listxattr(&self, caller: Caller, ino: Ino) -> Result<Vec<u8>, FsError> {
        self.read_of(ino, |view| {
            let names = view.xattr_names(ino)?;
            if names.is_empty() {
                view.attr_of(ino)?;
            }
            let shown = names.iter().filter(|name| caller.uid == 0 || !name.starts_with(TRUSTED));
            Ok(shown.flat_map(|name| name.iter().copied().chain([0])).collect())
        })
        .await
    }

    /// `flags`: 0, `XATTR_CREATE` or `XATTR_REPLACE`.
    ///
    /// # Errors
    /// EEXIST, ENODATA as the flags ask; EOPNOTSUPP outside the known namespaces.
    pub async fn setxattr(
        &self,
        caller: Caller,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        flags: i32,
    ) -> Result<(), FsError> {
        if let Some(set) = self.set_policy(caller, ino, name, Some(value)).await {
            return set;
        }
        self.may_change(caller, name)?;
        let mode = match flags {
            0 => XattrMode::Set,
            libc::XATTR_CREATE => XattrMode::Create,
            libc::XATTR_REPLACE => XattrMode::Replace,
            _ => return Err(FsError::Invalid("flags of setxattr")),
        };
        if name == ACL_ACCESS {
            self.keep_setgid_honest(caller, ino).await?;
        }
        if name == b"security.capability" && self.read(|view| view.attr_of(ino)).await?.kind == FileKind::File {
            // What earlier writes drop when they are flushed is not what is set now.
            self.content.commit_drops(ino).await?;
        }
        self.meta.propose(Op::SetXattr { ino, name: name.to_vec(), value: value.to_vec(), mode }).await.map(drop)
    }

    /// # Errors
    /// ENODATA when there is none, unless it is an access control list, as on every Linux file system.
    pub async fn removexattr(&self, caller: Caller, ino: Ino, name: &[u8]) -> Result<(), FsError> {
        if let Some(set) = self.set_policy(caller, ino, name, None).await {
            return set;
        }
        self.may_change(caller, name)?;
        match self.meta.propose(Op::RemoveXattr { ino, name: name.to_vec() }).await {
            Err(FsError::Meta(MetaError::NoSuchXattr)) if is_acl(name) => Ok(()),
            decided => decided.map(drop),
        }
    }

    /// Answers `None` for an attribute that is no policy.
    async fn set_policy(&self, caller: Caller, dir: Ino, name: &[u8], value: Option<&[u8]>) -> Option<Result<(), FsError>> {
        let before = self.meta.replica().read().policy(dir);
        let policy = match before {
            Ok(policy) => with_policy(policy, name, value)?,
            Err(error) => with_policy(Policy::default(), name, value)?.and(Err(error.into())),
        };
        Some(match policy {
            _ if caller.uid != 0 => Err(FsError::NotPermitted),
            Ok(policy) => self.meta.propose(Op::SetPolicy { ino: dir, policy }).await.map(drop),
            Err(error) => Err(error),
        })
    }

    /// Takes the capability of a file that is about to be written. For writes that the kernel sends
    /// past its page cache, it leaves this to us, whoever writes.
    pub(super) async fn drop_capability(&self, ino: Ino) -> Result<(), FsError> {
        if self.meta.replica().read().xattr(ino, CAPABILITY)?.is_none() {
            return Ok(());
        }
        match self.meta.propose(Op::RemoveXattr { ino, name: CAPABILITY.to_vec() }).await {
            Ok(_) | Err(FsError::Meta(MetaError::NoSuchXattr)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn may_change(&self, caller: Caller, name: &[u8]) -> Result<(), FsError> {
        check_name(name)?;
        // The kernel asks for CAP_SYS_ADMIN; this is the second lock on the same door.
        if name.starts_with(TRUSTED) && caller.uid != 0 {
            return Err(FsError::NotPermitted);
        }
        Ok(())
    }

    /// Setting an access ACL is a chmod: it clears setgid for whoever chmod(2) would clear it.
    async fn keep_setgid_honest(&self, caller: Caller, ino: Ino) -> Result<(), FsError> {
        let attr = self.read(|view| view.attr_of(ino)).await?;
        let setgid = libc::S_ISGID as u16;
        if attr.mode & setgid == 0 || attr.kind == FileKind::Symlink || caller.keeps_setgid(attr.gid) {
            return Ok(());
        }
        let set = SetAttr { mode: Some(attr.mode & !setgid), ..SetAttr::default() };
        match attr.kind {
            FileKind::File => self.content.truncate(ino, set).await.map(drop),
            _ => self.meta.propose(Op::SetAttr { ino, set }).await.map(drop),
        }
    }
}
