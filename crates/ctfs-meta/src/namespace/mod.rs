//! What the namespace does with a command.
//!
//! Reading order: [`keys`] and [`records`] (what is stored), [`txn`] and [`stage`] (how an entry is applied as
//! a whole), then by subject: [`names`], [`numbers`], [`attrs`], [`bytes`], [`holding`], [`locks`], [`own_locks`], [`quotas`],
//! [`cluster`], [`lives`]; [`reads`] is what everybody else asks.

mod acl;
mod ahead;
mod attrs;
mod bytes;
mod cluster;
mod cover;
mod cuts;
mod holding;
mod keys;
mod lives;
mod locks;
mod names;
mod numbers;
mod own_locks;
mod quotas;
mod reads;
mod records;
mod stage;
mod txn;
mod view;

pub use self::{
    ahead::{AHEAD_MAX, Ahead},
    cover::Cover,
    locks::Wish,
    stage::{Applied, Stage, Staged},
};
#[cfg(test)]
pub(crate) use self::locks::{WAITERS_MAX, WAITERS_OF_LIFE_MAX};

use std::{collections::BTreeMap, sync::Arc};

use ctfs_types::{FileKind, FileName, Ino, LogIndex, RequestId, Timestamp};
use serde::{Deserialize, Serialize};

use self::{
    ahead::Layer,
    cuts::{CELLS_FREED_MAX, Cut},
    records::{Counters, Dir, Inode},
    txn::{Outcome, Txn},
    view::View,
};
use crate::{Change, MetaError, Op, Reply, Store, StoreError};

/// The replicated state of one volume.
pub struct Namespace {
    store: Arc<dyn Store>,
    counters: Counters,
    hash: u128,
    /// The records of this kind once more, because each read of a cell asks for them. Mostly empty.
    cuts: BTreeMap<Ino, Vec<Cut>>,
    /// What this server's own commands have changed that the log does not have yet.
    layer: Layer,
    /// Of clients that commands came from since it was opened, the newest request that was applied: a newer
    /// one has no verdict yet, and none is looked for.
    newest: BTreeMap<u64, u64>,
    /// Something may have a policy; most volumes have none, and each file that is made asks for it.
    may_have_policies: bool,
    /// [`CELLS_FREED_MAX`]; less in tests.
    freed_max: usize,
}

/// One entry of a directory listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    pub name: FileName,
    pub ino: Ino,
    pub kind: FileKind,
    /// Where the next listing goes on: pass it as `after`. Stable while the entry lives.
    pub cookie: u64,
}

/// What the metadata knows of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRecord {
    /// Cells that name the chunk.
    pub references: u64,
    /// Most copies any of them asked for; 0 means automatic.
    pub copies: u8,
    /// Bytes in the chunk.
    pub len: u32,
    /// When the count fell to zero; `None` while it is referenced.
    pub condemned: Option<Timestamp>,
}

/// Recursive counts of a directory, itself not included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub files: u64,
    pub directories: u64,
    /// Sum of file sizes.
    pub bytes: u64,
    /// Sum of bytes that are not holes.
    pub allocated: u64,
}

impl Totals {
    /// Files and directories.
    pub fn inodes(&self) -> u64 {
        self.files.saturating_add(self.directories)
    }

    /// A directory that was moved in the log counts what is ahead of the log where it was: for a moment
    /// that can be less than nothing there.
    fn at_least_nothing(self) -> Self {
        let at_least_nothing = |count: u64| if count > i64::MAX as u64 { 0 } else { count };
        Self {
            files: at_least_nothing(self.files),
            directories: at_least_nothing(self.directories),
            bytes: at_least_nothing(self.bytes),
            allocated: at_least_nothing(self.allocated),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            files: self.files.wrapping_add(other.files),
            directories: self.directories.wrapping_add(other.directories),
            bytes: self.bytes.wrapping_add(other.bytes),
            allocated: self.allocated.wrapping_add(other.allocated),
        }
    }

    /// Differences travel as wrapped numbers: adding one back gives the true count again.
    fn minus(self, other: Self) -> Self {
        Self {
            files: self.files.wrapping_sub(other.files),
            directories: self.directories.wrapping_sub(other.directories),
            bytes: self.bytes.wrapping_sub(other.bytes),
            allocated: self.allocated.wrapping_sub(other.allocated),
        }
    }
}

/// What a command knows while it is applied. Where in the log it stands is not part of it: a command
/// comes out the same wherever it lands.
struct Apply<'a, 'b> {
    txn: &'a mut Txn<'b>,
    counters: &'a mut Counters,
    request: RequestId,
    at: Timestamp,
    /// Cells that the command may still free.
    freed_max: usize,
    /// The life has ended, and what it had written down happens now.
    is_left: bool,
    /// What was below directories with a quota before the command.
    counted: BTreeMap<Ino, Totals>,
}

impl Namespace {
    /// Opens the state kept in `store`; an empty store is a volume before its first command, with
    /// an empty root directory (mode 0755, root:root).
    pub fn open(store: Box<dyn Store>) -> Result<Self, StoreError> {
        let counters = store.get(&keys::counters())?;
        let hash = store.get(&keys::state_hash())?;
        let mut namespace = Self { store: store.into(), counters: Counters::default(), hash: 0, cuts: BTreeMap::new(), layer: Layer::default(), newest: BTreeMap::new(), freed_max: CELLS_FREED_MAX, may_have_policies: false };
        match (counters, hash) {
            (Some(counters), Some(hash)) => {
                namespace.counters = records::decode(&keys::counters(), &counters)?;
                namespace.hash = records::decode(&keys::state_hash(), &hash)?;
                namespace.cuts = namespace.stored_cuts()?;
                namespace.may_have_policies = namespace.has_policies()?;
            }
            (None, None) => namespace.make_root()?,
            _ => {
                let why = "one of the counters and the state hash is missing".to_owned();
                return Err(StoreError::Corrupt { key: keys::counters(), why });
            }
        }
        Ok(namespace)
    }

    fn make_root(&mut self) -> Result<(), StoreError> {
        let mut txn = Txn::new(View::committed(&*self.store));
        let root = Inode {
            kind: FileKind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            nlink: 2,
            size: 0,
            allocated: 0,
            atime: Timestamp::EPOCH,
            mtime: Timestamp::EPOCH,
            ctime: Timestamp::EPOCH,
            btime: Timestamp::EPOCH,
            rdev: 0,
            data_version: 1,
            cell: Default::default(),
            target: Vec::new(),
            dir: Some(Dir::new(Ino::ROOT)),
            usage: Default::default(),
            home: None,
        };
        txn.put(keys::inode(Ino::ROOT), &root);
        txn.put(keys::counters(), &self.counters);
        txn.keep();
        let (mut batch, difference) = txn.finish()?;
        self.hash = difference;
        batch.insert(keys::state_hash(), Some(records::encode(&self.hash)));
        self.store.write(batch)
    }

    /// The same with another bound on the cells that one command frees.
    #[cfg(test)]
    pub(crate) fn freeing_at_most(mut self, cells: usize) -> Self {
        self.freed_max = cells;
        self
    }

    /// The index of the last applied entry.
    pub fn applied(&self) -> LogIndex {
        LogIndex(self.counters.applied)
    }

    /// A 128-bit sum over all records, equal on replicas that applied the same prefix.
    pub fn state_hash(&self) -> [u8; 16] {
        self.hash.to_le_bytes()
    }

    /// Sums all records again, to compare with [`Self::state_hash`].
    pub fn count_state_hash(&self) -> Result<[u8; 16], StoreError> {
        let mut sum = 0u128;
        self.store.range(&[0], &[keys::CALLER], &mut |key, value| {
            sum = sum.wrapping_add(txn::record_hash(key, value));
            std::ops::ControlFlow::Continue(())
        })?;
        Ok(sum.to_le_bytes())
    }

    /// The raw store, for snapshots.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }
}

impl<'a, 'b> Apply<'a, 'b> {
    /// For a command that happens here, ahead of the log or without it.
    fn of_one(txn: &'a mut Txn<'b>, counters: &'a mut Counters, request: RequestId, at: Timestamp, freed_max: usize) -> Self {
        Self { txn, counters, request, at, freed_max, is_left: false, counted: BTreeMap::new() }
    }
}

impl Apply<'_, '_> {
    fn dispatch(&mut self, op: &Op) -> Outcome<Reply> {
        match op {
            Op::Noop => Ok(Reply::Done),
            Op::Make { parent, name, node } => self.make(*parent, name, node),
            Op::Link { ino, parent, name } => self.link(*ino, *parent, name),
            Op::Unlink { parent, name } => self.unlink(*parent, name),
            Op::Rmdir { parent, name } => self.rmdir(*parent, name),
            Op::Rename { from, name, to, new_name, mode } => self.rename(*from, name, *to, new_name, *mode),
            Op::SetAttr { ino, set } => self.set_attr(*ino, set),
            Op::SetXattr { ino, name, value, mode } => self.set_xattr(*ino, name, value, *mode),
            Op::RemoveXattr { ino, name } => self.remove_xattr(*ino, name),
            Op::Write { ino, cells, size_at_least, mtime, drop_privileges, appends_at, noted } => {
                self.write(*ino, cells, *size_at_least, *mtime, *drop_privileges, *appends_at, *noted)
            }
            Op::Punch { ino, first, cells } => self.punch(*ino, *first, *cells),
            Op::CloneCells { source, first, ino, to, cells, size_at_least } => {
                self.clone_cells(*source, *first, *ino, *to, *cells, *size_at_least)
            }
            Op::Reap { inos } => self.reap(inos),
            Op::ForgetChunks { chunks } => self.forget_chunks(chunks),
            Op::Own { ino, holder, although_shared } => self.own(*ino, *holder, *although_shared),
            Op::Disown { files, holder, shared } => self.disown(files, *holder, *shared),
            Op::Lock { ino, lock } => self.lock(*ino, lock, None),
            Op::AwaitLock { ino, lock, ticket } => self.lock(*ino, lock, Some(*ticket)),
            Op::WithdrawLock { ino, owner, ticket } => self.withdraw_lock(*ino, *owner, *ticket),
            Op::Overtake { ino, owner, ticket } => self.overtake(*ino, *owner, *ticket),
            Op::Unlock { ino, owner, kind, start, end } => self.unlock(*ino, *owner, *kind, *start, *end),
            Op::UnlockAll { ino, owner } => self.unlock_all(*ino, *owner),
            Op::Found { cluster, member } => self.found(cluster, member),
            Op::CreateToken { token } => self.create_token(token),
            Op::RevokeToken { hash } => self.revoke_token(hash),
            Op::Join { token, member } => self.join(token, member),
            Op::Incarnate { node, incarnation, addresses, capacity, version } => {
                self.incarnate(*node, *incarnation, addresses, *capacity, version)
            }
            Op::Fence { node, incarnation } => self.fence(*node, *incarnation),
            Op::SetMemberState { node, state } => self.set_member_state(*node, *state),
            Op::RemoveMember { node } => self.remove_member(*node),
            Op::SetPolicy { ino, policy } => self.set_policy(*ino, *policy),
            Op::FreeCells { inos } => self.free_cells(inos),
            Op::SetQuota { ino, quota } => self.set_quota(*ino, *quota),
            Op::ReserveInos { count } => self.reserve_inos(*count),
            Op::SetPair { life, pair } => self.set_pair(*life, *pair),
            Op::EndLife { life, by } => self.end_life(*life, *by),
        }
    }

    /// The inode, if it is there, named or not.
    fn inode(&mut self, ino: Ino) -> Outcome<Inode> {
        Ok(self.txn.get(&keys::inode(ino))?.ok_or(MetaError::NoSuchInode(ino))?)
    }

    /// As [`Self::inode`], of a directory above what the command is about.
    fn peek_inode(&mut self, ino: Ino) -> Outcome<Inode> {
        Ok(self.txn.peek(&keys::inode(ino))?.ok_or(MetaError::NoSuchInode(ino))?)
    }

    fn put_inode(&mut self, ino: Ino, inode: &Inode) {
        self.txn.put(keys::inode(ino), inode);
    }

    /// The inode of a directory that has a name (or is the root).
    fn directory(&mut self, ino: Ino) -> Outcome<Inode> {
        let inode = self.inode(ino)?;
        match (&inode.dir, inode.nlink) {
            (None, _) => Err(MetaError::NotDirectory(ino).into()),
            (Some(_), 0) => Err(MetaError::NoSuchInode(ino).into()),
            (Some(_), _) => Ok(inode),
        }
    }

    fn changed(&mut self, change: Change) {
        self.txn.changes.push(change);
    }

    /// Adds a (wrapped) difference to the counts of `dir` and every directory above it, of which only
    /// parents and limits are read.
    fn add_totals(&mut self, dir: Ino, difference: Totals) -> Outcome<()> {
        if difference == Totals::default() {
            return Ok(());
        }
        let mut ino = dir;
        loop {
            let inode = self.peek_inode(ino)?;
            let dir = inode.dir.ok_or(MetaError::NotDirectory(ino))?;
            self.note_totals(ino, dir.quota)?;
            self.txn.add(keys::totals(ino), difference);
            if ino == Ino::ROOT || inode.nlink == 0 {
                return Ok(());
            }
            ino = dir.parent;
        }
    }

    /// The directory whose counts include a file: that of its first name in key order.
    fn home(&mut self, ino: Ino) -> Outcome<Option<Ino>> {
        let (from, to) = keys::under(keys::LINK, &[ino.0]);
        let first = self.txn.scan(&from, &to, 1)?;
        Ok(first.first().and_then(|(key, _)| keys::number_at(key, 9)).map(Ino))
    }

    /// The same of an inode that was looked at.
    fn home_of(&mut self, ino: Ino, inode: &Inode) -> Outcome<Option<Ino>> {
        if inode.nlink == 1 { Ok(inode.home) } else { self.home(ino) }
    }

    /// What an inode counts for in the directories above it, with all that is below it.
    fn counts_for(&mut self, ino: Ino, inode: &Inode) -> Outcome<Totals> {
        let below = if inode.is_dir() { self.txn.totals(ino)? } else { Totals::default() };
        Ok(inode.contribution().plus(below))
    }

    /// Stores a file's inode and carries what changed of its size into the counts above it.
    fn put_counted(&mut self, ino: Ino, before: Totals, inode: &Inode) -> Outcome<()> {
        self.put_inode(ino, inode);
        let difference = inode.contribution().minus(before);
        if difference != Totals::default()
            && let Some(home) = self.home_of(ino, inode)?
        {
            self.add_totals(home, difference)?;
        }
        Ok(())
    }
}
