//! Runs a history on the servers and on the reference, and compares the answers.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use ctfs_meta::{Op, Policy};
use ctfs_types::{FileKind, Ino, Timestamp};
use proptest::prelude::*;

use super::{
    check,
    reference::{CAPABILITY, Content, Errno, Id, Node, ROOT, Reference, Wish},
    steps::{Attribute, Look, Made, OpenFlags, SERVERS, Setup, Step, Target, caller, cell_size, xattr_name},
};
use crate::{
    Caller, FsError, HandleId, SetAttrRequest, SetTime, Vfs, VfsSettings,
    vfs::tests::memory::{Cluster, Server, Weather},
};

/// An open handle.
#[derive(Debug, Clone, Copy)]
pub struct Open {
    pub at: usize,
    pub handle: HandleId,
    pub id: Id,
    pub ino: Ino,
    pub write: bool,
    pub append: bool,
}

pub struct Run {
    pub servers: Vec<Server>,
    pub reference: Reference,
    /// The inode of each node.
    pub inos: BTreeMap<Id, Ino>,
    pub open: BTreeMap<usize, Open>,
    _dir: tempfile::TempDir,
}

/// Some servers under calm weather, and the cluster they make.
pub async fn servers(setup: Setup) -> (Vec<Server>, std::sync::Arc<Cluster>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let mut settings = VfsSettings::default();
    settings.content.dirty_age_max = if setup.flushes_at_once { Duration::ZERO } else { Duration::from_secs(5) };
    settings.content.shared_for = Duration::from_millis(setup.shared_for_ms);
    settings.content.ask_again = Duration::from_millis(1);
    let servers: Vec<Server> = (1..=SERVERS as u64)
        .map(|node| cluster.server_with_cache(node, dir.path(), settings.clone(), setup.cache_bytes))
        .collect();
    let policy = Policy { cell: Some(cell_size()), ..Policy::default() };
    servers[0].meta.propose_op(Op::SetPolicy { ino: Ino::ROOT, policy }).await.unwrap();
    cluster.seed(setup.seed);
    cluster.set_weather(Weather { pauses: setup.pauses, ..Weather::default() });
    (servers, cluster, dir)
}

pub async fn run(setup: Setup, history: &[(Step, Look)]) -> Result<(), TestCaseError> {
    let mut run = Run::new(setup).await;
    for (n, (step, look)) in history.iter().enumerate() {
        let story = |error| check::told(error, &format!("step {n}, {step:?}"));
        run.step(step).await.map_err(story)?;
        run.check(look.at, look.contents).await.map_err(|error| check::told(error, &format!("after step {n}, {step:?}, {look:?}")))?;
    }
    for at in 0..SERVERS {
        run.check(at, true).await.map_err(|error| check::told(error, &format!("at the end, server {at}")))?;
    }
    Ok(())
}

fn errno<T>(result: Result<T, FsError>) -> Result<T, Errno> {
    result.map_err(|error| error.errno())
}

/// Bytes that tell who wrote them: no two seeds, and few offsets, look alike. Seed 0 writes zeros.
pub fn data(seed: u8, len: u64) -> Vec<u8> {
    let of = |n: u64| if seed == 0 { 0 } else { seed.wrapping_mul(31).wrapping_add((n / 7) as u8) | 1 };
    (0..len).map(of).collect()
}

impl Run {
    async fn new(setup: Setup) -> Self {
        let (servers, _, dir) = servers(setup).await;
        let root = servers[0].vfs.getattr(Ino::ROOT).await.unwrap();
        let root = Node {
            content: Content::Directory { entries: BTreeMap::new(), parent: ROOT },
            mode: root.mode,
            uid: root.uid,
            gid: root.gid,
            xattrs: BTreeMap::new(),
            atime: None,
            mtime: None,
        };
        Self {
            servers,
            reference: Reference::new(root),
            inos: BTreeMap::from([(ROOT, Ino::ROOT)]),
            open: BTreeMap::new(),
            _dir: dir,
        }
    }

    pub fn vfs(&self, at: usize) -> &Vfs {
        &self.servers[at].vfs
    }

    fn dir(&self, index: usize) -> (Id, Ino) {
        let id = self.reference.directory(index);
        (id, self.inos[&id])
    }

    fn target(&self, target: Target) -> Option<Id> {
        match target {
            Target::Named(place) => self.reference.named(self.reference.directory(place.dir), place.name()),
            Target::Opened(slot) => self.open.get(&slot).map(|open| open.id),
        }
    }

    async fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Open { at, who, place, flags, slot } => {
                self.close(slot).await?;
                self.open(at, caller(who), place.dir, place.name(), flags, slot).await
            }
            Step::Reopen { slot, of, access } => {
                let Some(of) = self.open.get(&of).copied() else { return Ok(()) };
                if self.open.contains_key(&slot) {
                    return Ok(());
                }
                let opened = self.vfs(of.at).open(Caller::ROOT, of.ino, access).await;
                prop_assert!(opened.is_ok(), "{:?}", opened);
                let open = Open { handle: opened.unwrap().handle, write: access != libc::O_RDONLY, append: false, ..of };
                self.open.insert(slot, open);
                Ok(())
            }
            Step::Close { slot } => self.close(slot).await,
            Step::Read { slot, offset, len } => {
                let Some(open) = self.open.get(&slot) else { return Ok(()) };
                let got = self.vfs(open.at).read_file(open.ino, open.handle, offset, len as u32).await;
                let got = got.map_err(|error| TestCaseError::fail(format!("read: {error:?}")))?;
                check::same_bytes(&got, self.reference.node(open.id).part(offset, len), offset)
            }
            Step::Write { slot, who, offset, len, seed } => self.write(slot, caller(who), offset, &data(seed, len)).await,
            Step::Allocate { slot, mode, offset, len } => {
                let Some(open) = self.open.get(&slot).copied() else { return Ok(()) };
                let real = errno(self.vfs(open.at).fallocate(open.ino, open.handle, offset, len, mode).await);
                prop_assert_eq!(real, if open.write { Ok(()) } else { Err(libc::EBADF) });
                if open.write {
                    self.reference.node_mut(open.id).allocate(mode, offset, len);
                }
                Ok(())
            }
            Step::Copy { from, to, read_at, write_at, len } => self.copy(from, to, read_at, write_at, len).await,
            Step::Seek { slot, offset } => self.seek(slot, offset).await,
            Step::Sync { slot } => {
                let Some(open) = self.open.get(&slot) else { return Ok(()) };
                prop_assert_eq!(errno(self.vfs(open.at).fsync(open.ino, open.handle).await), Ok(()));
                Ok(())
            }
            Step::Race { slot, base, lane, ref deeds, seed } => self.race(slot, base, lane, deeds, seed).await,
            Step::Make { at, who, place, made, mode, umask } => {
                self.make(at, caller(who), place.dir, place.name(), made, mode, umask).await
            }
            Step::Rmdir { at, place } => {
                let (dir, ino) = self.dir(place.dir);
                let real = errno(self.vfs(at).rmdir(ino, place.name()).await);
                prop_assert_eq!(real, self.reference.rmdir(dir, place.name()));
                Ok(())
            }
            Step::Unlink { at, place } => {
                let (dir, ino) = self.dir(place.dir);
                let real = errno(self.vfs(at).unlink(ino, place.name()).await);
                prop_assert_eq!(real, self.reference.unlink(dir, place.name()));
                Ok(())
            }
            Step::Rename { at, from, to, flags } => {
                let ((from_dir, from_ino), (to_dir, to_ino)) = (self.dir(from.dir), self.dir(to.dir));
                let real = errno(self.vfs(at).rename(from_ino, from.name(), to_ino, to.name(), flags).await);
                prop_assert_eq!(real, self.reference.rename((from_dir, from.name()), (to_dir, to.name()), flags));
                Ok(())
            }
            Step::Link { at, source, to } => {
                let Some(id) = self.target(source) else { return Ok(()) };
                let (dir, ino) = self.dir(to.dir);
                let real = errno(self.vfs(at).link(self.inos[&id], ino, to.name()).await).map(drop);
                prop_assert_eq!(real, self.reference.link(id, dir, to.name()));
                Ok(())
            }
            Step::SetAttr { at, who, target, attribute } => self.set_attr(at, caller(who), target, attribute).await,
            Step::SetXattr { at, target, name, len, flags } => {
                let Some(id) = self.target(target) else { return Ok(()) };
                let (name, value) = (xattr_name(name), vec![len as u8; len]);
                let real = errno(self.vfs(at).setxattr(Caller::ROOT, self.inos[&id], name, &value, flags).await);
                prop_assert_eq!(real, self.reference.set_xattr(id, name, &value, flags));
                Ok(())
            }
            Step::RemoveXattr { at, target, name } => {
                let Some(id) = self.target(target) else { return Ok(()) };
                let real = errno(self.vfs(at).removexattr(Caller::ROOT, self.inos[&id], xattr_name(name)).await);
                prop_assert_eq!(real, self.reference.remove_xattr(id, xattr_name(name)));
                Ok(())
            }
            Step::Reap => self.reap().await,
            Step::Background { at } => {
                self.vfs(at).content().work_in_background().await;
                Ok(())
            }
            Step::Evict { at } => {
                self.vfs(at).content().evict_all();
                Ok(())
            }
        }
    }

    async fn open(&mut self, at: usize, who: Caller, dir: usize, name: &[u8], flags: OpenFlags, slot: usize) -> Result<(), TestCaseError> {
        let (dir, dir_ino) = self.dir(dir);
        let looked_up = errno(self.vfs(at).lookup(dir_ino, name).await).map(|attr| attr.ino);
        let there = self.reference.named(dir, name);
        prop_assert_eq!(looked_up.ok(), there.map(|id| self.inos[&id]), "lookup: {:?}", looked_up);
        let opened = match there {
            Some(_) if flags.create && flags.exclusive => return Ok(()),
            None if !flags.create => return Ok(()),
            None => {
                let made = errno(self.vfs(at).create(who, dir_ino, name, 0o664, 0o002, flags.bits()).await);
                let id = self.reference.make(dir, name, Content::File(Vec::new()), 0o664, 0o002, who);
                prop_assert_eq!(made.as_ref().map(drop), id.as_ref().map(drop));
                let (Ok((attr, opened)), Ok(id)) = (made, id) else { return Ok(()) };
                self.inos.insert(id, attr.ino);
                (id, attr.ino, opened)
            }
            Some(id) => {
                let ino = self.inos[&id];
                let opened = errno(self.vfs(at).open(who, ino, flags.bits()).await);
                let expected = match self.reference.node(id).kind() {
                    FileKind::File => Ok(()),
                    FileKind::Directory => Err(libc::EISDIR),
                    _ => Err(libc::EINVAL),
                };
                prop_assert_eq!(opened.as_ref().map(drop), expected.as_ref().map(drop));
                let Ok(opened) = opened else { return Ok(()) };
                if flags.truncate {
                    let node = self.reference.node_mut(id);
                    node.resize(0);
                    if who.uid != 0 {
                        node.drop_privileges();
                    }
                }
                (id, ino, opened)
            }
        };
        let (id, ino, opened) = opened;
        let open = Open { at, handle: opened.handle, id, ino, write: flags.writes(), append: flags.append };
        self.open.insert(slot, open);
        Ok(())
    }

    async fn close(&mut self, slot: usize) -> Result<(), TestCaseError> {
        let Some(open) = self.open.remove(&slot) else { return Ok(()) };
        prop_assert_eq!(errno(self.vfs(open.at).flush(open.ino, open.handle, slot as u64 + 1).await), Ok(()), "close");
        self.vfs(open.at).release(open.handle).await;
        Ok(())
    }

    /// Before a write into its page cache, the kernel takes the file's capability away by itself.
    pub async fn kernel_drops_capability(&self, open: Open) -> Result<(), TestCaseError> {
        match errno(self.vfs(open.at).removexattr(Caller::ROOT, open.ino, CAPABILITY).await) {
            Ok(()) | Err(libc::ENODATA) => Ok(()),
            Err(errno) => Err(TestCaseError::fail(format!("removing the capability: {errno}"))),
        }
    }

    async fn write(&mut self, slot: usize, who: Caller, offset: u64, data: &[u8]) -> Result<(), TestCaseError> {
        let Some(open) = self.open.get(&slot).copied() else { return Ok(()) };
        if open.write {
            self.kernel_drops_capability(open).await?;
        }
        let bytes = Bytes::copy_from_slice(data);
        let real = errno(self.vfs(open.at).write(who, open.ino, open.handle, offset, bytes, false, false).await);
        if !open.write {
            prop_assert_eq!(real, Err(libc::EBADF));
            return Ok(());
        }
        prop_assert_eq!(real, Ok(data.len() as u32));
        let node = self.reference.node_mut(open.id);
        let offset = if open.append { node.size() } else { offset };
        node.write(offset, data, who);
        Ok(())
    }

    async fn copy(&mut self, from: usize, to: usize, read_at: u64, write_at: u64, len: u64) -> Result<(), TestCaseError> {
        let (Some(source), Some(target)) = (self.open.get(&from).copied(), self.open.get(&to).copied()) else {
            return Ok(());
        };
        // The kernel copies within one mount, and never to a handle that appends.
        if source.at != target.at || target.append {
            return Ok(());
        }
        if target.write {
            self.kernel_drops_capability(target).await?;
        }
        let (from, to) = ((source.ino, source.handle, read_at), (target.ino, target.handle, write_at));
        let real = errno(self.vfs(source.at).copy_file_range(from, to, len).await);
        if !target.write {
            prop_assert_eq!(real, Err(libc::EBADF));
            return Ok(());
        }
        self.reference.node_mut(target.id).xattrs.remove(CAPABILITY);
        let part = self.reference.node(source.id).part(read_at, len).to_vec();
        let len = part.len() as u64;
        if source.id == target.id && read_at < write_at + len && write_at < read_at + len {
            prop_assert_eq!(real, Err(libc::EINVAL));
            return Ok(());
        }
        prop_assert_eq!(real, Ok(len));
        if len > 0 {
            let node = self.reference.node_mut(target.id);
            node.write(write_at, &part, Caller::ROOT);
            node.drop_privileges();
        }
        Ok(())
    }

    /// Where holes are is up to the file system; that they read as zeros is not.
    async fn seek(&mut self, slot: usize, offset: u64) -> Result<(), TestCaseError> {
        let Some(open) = self.open.get(&slot).copied() else { return Ok(()) };
        let data = errno(self.vfs(open.at).lseek(open.ino, open.handle, offset, libc::SEEK_DATA).await);
        let hole = errno(self.vfs(open.at).lseek(open.ino, open.handle, offset, libc::SEEK_HOLE).await);
        let bytes = self.reference.node(open.id).bytes();
        let size = bytes.len() as u64;
        if offset >= size {
            prop_assert_eq!((data, hole), (Err(libc::ENXIO), Err(libc::ENXIO)));
            return Ok(());
        }
        let until = match data {
            Ok(data) => data,
            Err(errno) => {
                prop_assert_eq!(errno, libc::ENXIO);
                size
            }
        };
        prop_assert!((offset..=size).contains(&until), "data at {until}");
        prop_assert!(bytes[offset as usize..until as usize].iter().all(|&byte| byte == 0), "data before {until} is passed over");
        let hole = hole.unwrap_or(u64::MAX);
        prop_assert!((offset..=size).contains(&hole), "hole at {hole}");
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    async fn make(&mut self, at: usize, who: Caller, dir: usize, name: &[u8], made: Made, mode: u16, umask: u16) -> Result<(), TestCaseError> {
        let (dir, ino) = self.dir(dir);
        let (wide, mask) = (u32::from(mode), u32::from(umask));
        let vfs = self.vfs(at);
        let (real, content) = match made {
            Made::Directory => {
                let content = Content::Directory { entries: BTreeMap::new(), parent: dir };
                (vfs.mkdir(who, ino, name, wide, mask).await, content)
            }
            Made::Symlink => {
                let target = format!("to/{mode}").into_bytes();
                (vfs.symlink(who, ino, name, &target).await, Content::Symlink(target))
            }
            Made::File => (vfs.mknod(who, ino, name, wide | libc::S_IFREG, mask, 0).await, Content::File(Vec::new())),
            Made::Fifo => {
                (vfs.mknod(who, ino, name, wide | libc::S_IFIFO, mask, 0).await, Content::Special(FileKind::Fifo, 0))
            }
            Made::Device => {
                let content = Content::Special(FileKind::CharDevice, 259);
                (vfs.mknod(who, ino, name, wide | libc::S_IFCHR, mask, 259).await, content)
            }
        };
        let real = errno(real);
        let id = self.reference.make(dir, name, content, mode, umask, who);
        prop_assert_eq!(real.as_ref().map(drop), id.as_ref().map(drop));
        if let (Ok(attr), Ok(id)) = (real, id) {
            self.inos.insert(id, attr.ino);
        }
        Ok(())
    }

    async fn set_attr(&mut self, at: usize, who: Caller, target: Target, attribute: Attribute) -> Result<(), TestCaseError> {
        let Some(id) = self.target(target) else { return Ok(()) };
        let time = |secs: Option<i64>| secs.map(|secs| Timestamp::new(secs, 123_456_789));
        let mut wish = Wish::default();
        match attribute {
            Attribute::Mode(mode) => wish.mode = Some(mode),
            Attribute::Owner { uid, gid } => (wish.uid, wish.gid) = (uid, gid),
            Attribute::Size(size) => wish.size = Some(size),
            Attribute::Times { atime, mtime } => (wish.atime, wish.mtime) = (time(atime), time(mtime)),
            Attribute::Nothing => {}
        }
        let request = SetAttrRequest {
            mode: wish.mode.map(u32::from),
            uid: wish.uid,
            gid: wish.gid,
            size: wish.size,
            atime: wish.atime.map(SetTime::At),
            mtime: wish.mtime.map(SetTime::At),
        };
        // Who may ask for nothing depends on what is open for writing; root may.
        let who = if request == SetAttrRequest::default() { Caller::ROOT } else { who };
        let real = errno(self.vfs(at).setattr(who, self.inos[&id], request).await);
        prop_assert_eq!(real.as_ref().map(drop).map_err(|errno| *errno), self.reference.set_attr(id, wish, who));
        let node = self.reference.node(id);
        if let Ok(attr) = real {
            prop_assert_eq!((attr.size, attr.mode, attr.uid, attr.gid), (node.size(), node.mode, node.uid, node.gid));
        }
        Ok(())
    }

    /// What is open nowhere and has no name goes; each server is asked, as the collector does.
    async fn reap(&mut self) -> Result<(), TestCaseError> {
        let orphans: Vec<Id> = self.reference.nodes.keys().copied().filter(|&id| self.reference.links(id) == 0).collect();
        let inos: Vec<Ino> = orphans.iter().map(|id| self.inos[id]).collect();
        let answers: Vec<Vec<bool>> = self.servers.iter().map(|server| server.vfs.open_orphans(&inos)).collect();
        let mut gone = Vec::new();
        for (n, &id) in orphans.iter().enumerate() {
            for (at, answer) in answers.iter().enumerate() {
                let open = self.open.values().any(|open| open.id == id && open.at == at);
                prop_assert_eq!(answer[n], open, "whether {} is open on {}", id, at);
            }
            if answers.iter().all(|answer| !answer[n]) {
                gone.push(id);
            }
        }
        let inos = gone.iter().map(|id| self.inos[id]).collect();
        let reaped = self.servers[0].meta.propose_op(Op::Reap { inos }).await;
        prop_assert!(reaped.is_ok());
        for id in gone {
            self.reference.nodes.remove(&id);
            self.inos.remove(&id);
        }
        Ok(())
    }
}
