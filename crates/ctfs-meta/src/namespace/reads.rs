//! What everybody else asks of the namespace. Each answer sees one applied index, because the
//! caller holds the lock.

use std::{
    collections::BTreeMap,
    ops::{ControlFlow, Range},
};

use ctfs_types::{Attr, CellIndex, ChunkId, Extent, FileName, FileUse, Holder, Incarnation, Ino, NodeId, Timestamp, limits::COPIES_ON_EVERY};
use serde::de::DeserializeOwned;

use super::{
    ChunkRecord, DirEntry, Namespace, Totals,
    cuts::{Cut, is_dead},
    keys,
    locks::{self, Wish},
    records::{self, CookieEntry, Dentry, Inode, Left, Numbers},
    view::View,
};
use crate::{Cell, ClusterIdentity, Durability, EffectivePolicy, Lock, LockKind, LockOwner, Member, Policy, Quota, QuotaUse, StoreError, TokenRecord};

type Read<T> = Result<T, StoreError>;

/// Records of who holds what that are looked at together.
const HELD_AT_A_TIME: usize = 1024;

impl Namespace {
    pub(super) fn view(&self) -> View<'_> {
        View::ahead(&*self.store, &self.layer.records, &self.layer.sums)
    }

    fn record<T: DeserializeOwned>(&self, key: &[u8]) -> Read<Option<T>> {
        self.view().get(key)?.map(|bytes| records::decode(key, &bytes)).transpose()
    }

    /// Visits records until `visit` breaks or fails.
    fn each(&self, from: &[u8], to: &[u8], mut visit: impl FnMut(&[u8], &[u8]) -> Read<ControlFlow<()>>) -> Read<()> {
        let mut failed = None;
        self.view().range(from, to, &mut |key, value| match visit(key, value) {
            Ok(flow) => flow,
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        })?;
        failed.map_or(Ok(()), Err)
    }

    fn all<T: DeserializeOwned>(&self, kind: u8) -> Read<Vec<T>> {
        let (from, to) = keys::under(kind, &[]);
        let mut found = Vec::new();
        self.each(&from, &to, |key, value| {
            found.push(records::decode(key, value)?);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    pub(super) fn inode(&self, ino: Ino) -> Read<Option<Inode>> {
        self.record(&keys::inode(ino))
    }

    pub fn lookup(&self, parent: Ino, name: &FileName) -> Read<Option<Ino>> {
        Ok(self.record::<Dentry>(&keys::name(parent, name))?.map(|entry| entry.ino))
    }

    pub fn attr(&self, ino: Ino) -> Read<Option<Attr>> {
        Ok(self.inode(ino)?.map(|inode| inode.attr(ino)))
    }

    /// Parent of a directory; of the root: the root.
    pub fn parent(&self, dir: Ino) -> Read<Option<Ino>> {
        Ok(self.inode(dir)?.and_then(|inode| inode.dir).map(|dir| dir.parent))
    }

    /// Up to `limit` entries after cookie `after` (0 starts); without `.` and `..`.
    pub fn list(&self, dir: Ino, after: u64, limit: usize) -> Read<Vec<DirEntry>> {
        let (_, to) = keys::under(keys::COOKIE, &[dir.0]);
        let Some(first) = after.checked_add(1) else { return Ok(Vec::new()) };
        let mut entries = Vec::new();
        self.each(&keys::cookie(dir, first), &to, |key, value| {
            if entries.len() >= limit {
                return Ok(ControlFlow::Break(()));
            }
            let CookieEntry { name, ino, kind } = records::decode(key, value)?;
            let cookie = keys::number_at(key, 9).expect("cookie keys end in the cookie");
            entries.push(DirEntry { name, ino, kind, cookie });
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(entries)
    }

    /// Target of a symlink; `None` for anything else.
    pub fn readlink(&self, ino: Ino) -> Read<Option<Vec<u8>>> {
        Ok(self.inode(ino)?.filter(|inode| !inode.target.is_empty()).map(|inode| inode.target))
    }

    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Read<Option<Vec<u8>>> {
        self.view().get(&keys::xattr(ino, name))
    }

    pub fn xattr_names(&self, ino: Ino) -> Read<Vec<Vec<u8>>> {
        let (from, to) = keys::under(keys::XATTR, &[ino.0]);
        let mut names = Vec::new();
        self.each(&from, &to, |key, _| {
            names.push(key[9..].to_vec());
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(names)
    }

    /// Extents of the cells in `[first, first + cells)`, in order, holes left out.
    pub fn cells(&self, ino: Ino, first: CellIndex, cells: u64) -> Read<Vec<Cell>> {
        let cuts = self.cuts.get(&ino).map_or(&[][..], Vec::as_slice);
        if cells == 1 {
            let extent: Option<Extent> = self.record(&keys::cell(ino, first))?;
            let extent = extent.filter(|extent| !is_dead(cuts, first, extent.stamp));
            return Ok(extent.map(|extent| Cell { index: first, extent }).into_iter().collect());
        }
        let to = keys::cells_end(ino, first.saturating_add(cells));
        let mut found = Vec::new();
        self.each(&keys::cell(ino, first), &to, |key, value| {
            let index = keys::number_at(key, 9).expect("cell keys end in their index");
            let extent: Extent = records::decode(key, value)?;
            if !is_dead(cuts, index, extent.stamp) {
                found.push(Cell { index, extent });
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// Up to `limit` inodes with cells that were taken away and are not freed yet: what
    /// [`crate::Op::FreeCells`] shall go on with. Some may be gone themselves.
    pub fn unfreed(&self, limit: usize) -> Vec<Ino> {
        // What a server holds alone is freed when it has given that up.
        self.cuts.keys().copied().filter(|ino| matches!(self.cover(*ino), Ok(None))).take(limit).collect()
    }

    pub(super) fn stored_cuts(&self) -> Read<BTreeMap<Ino, Vec<Cut>>> {
        let (from, to) = keys::under(keys::CUTS, &[]);
        let mut found = BTreeMap::new();
        self.each(&from, &to, |key, value| {
            let damaged = || StoreError::Corrupt { key: key.to_vec(), why: "not cuts of an inode".into() };
            found.insert(Ino(keys::number_at(key, 1).ok_or_else(damaged)?), records::decode(key, value)?);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// The first lock held that excludes `lock`.
    pub fn conflicting_lock(&self, ino: Ino, lock: &Lock) -> Read<Option<Lock>> {
        let held: Vec<Lock> = self.record(&keys::locks(ino))?.unwrap_or_default();
        Ok(locks::blockers(&held, &[], lock).next().cloned())
    }

    /// Who waits for locks of `ino`, oldest first.
    pub fn lock_waiters(&self, ino: Ino) -> Read<Vec<Wish>> {
        Ok(self.record(&keys::waiting(ino))?.unwrap_or_default())
    }

    pub fn waits_for_lock(&self, ino: Ino, owner: LockOwner, ticket: u64) -> Read<bool> {
        Ok(self.view().get(&keys::wait(owner, ino, ticket))?.is_some())
    }

    /// Files that `holder` holds, each with the request by which it does.
    pub fn held_by(&self, holder: Holder, limit: usize) -> Read<Vec<(Ino, u64)>> {
        let (from, to) = keys::under(keys::OWNED, &[holder.node.0, holder.incarnation.0]);
        let mut inos = Vec::new();
        self.each(&from, &to, |key, _| {
            inos.extend(keys::number_at(key, 17).map(Ino));
            Ok(if inos.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        let mut held = Vec::with_capacity(inos.len());
        for ino in inos {
            if let Some(Attr { usage: FileUse::Owned { since, .. }, .. }) = self.attr(ino)? {
                held.push((ino, since));
            }
        }
        Ok(held)
    }

    /// Up to `limit` directories that `holder` holds, each with the request by which it does.
    pub fn held_directories(&self, holder: Holder, limit: usize) -> Read<Vec<(Ino, u64)>> {
        let (mut from, to) = keys::under(keys::OWNED, &[holder.node.0, holder.incarnation.0]);
        let mut held = Vec::new();
        loop {
            let mut inos = Vec::new();
            self.each(&from, &to, |key, _| {
                inos.extend(keys::number_at(key, 17).map(Ino));
                Ok(if inos.len() < HELD_AT_A_TIME { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
            })?;
            for &ino in &inos {
                if let Some(Inode { usage: FileUse::Owned { since, .. }, dir: Some(_), .. }) = self.inode(ino)? {
                    held.push((ino, since));
                    if held.len() >= limit {
                        return Ok(held);
                    }
                }
            }
            match inos.last() {
                Some(last) if inos.len() == HELD_AT_A_TIME => from = keys::owned(holder, Ino(last.0 + 1)),
                _ => return Ok(held),
            }
        }
    }

    pub fn locks(&self, ino: Ino, kind: LockKind) -> Read<Vec<Lock>> {
        let table: Vec<Lock> = self.record(&keys::locks(ino))?.unwrap_or_default();
        Ok(table.into_iter().filter(|lock| lock.kind == kind).collect())
    }

    /// Recursive counts below a directory.
    pub fn totals(&self, dir: Ino) -> Read<Option<Totals>> {
        match self.inode(dir)? {
            Some(inode) if inode.is_dir() => Ok(Some(self.counted(dir)?)),
            _ => Ok(None),
        }
    }

    fn counted(&self, dir: Ino) -> Read<Totals> {
        let key = keys::totals(dir);
        let committed: Totals = self.record(&key)?.unwrap_or_default();
        Ok(committed.plus(self.view().added(&key)).at_least_nothing())
    }

    /// Inode numbers that a client has reserved and not used, in order.
    pub fn reserved_inos(&self, client: u64) -> Read<Vec<Range<Ino>>> {
        Ok(self.reserved_ranges(client)?.into_iter().map(|(_, range)| range).collect())
    }

    /// The same with the records that they are in.
    pub(super) fn reserved_ranges(&self, client: u64) -> Read<Vec<(Vec<u8>, Range<Ino>)>> {
        let (from, to) = keys::under(keys::NUMBERS, &[client]);
        let mut found = Vec::new();
        self.each(&from, &to, |key, value| {
            let Numbers { next, end } = records::decode(key, value)?;
            found.push((key.to_vec(), next..end));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// The limits set on `dir` itself.
    pub fn quota(&self, dir: Ino) -> Read<Quota> {
        Ok(self.inode(dir)?.and_then(|inode| inode.dir).map(|dir| dir.quota).unwrap_or_default())
    }

    /// Every directory with a quota, in order of inode.
    pub fn quotas(&self) -> Read<Vec<QuotaUse>> {
        let (from, to) = keys::under(keys::QUOTA, &[]);
        let mut inos = Vec::new();
        self.each(&from, &to, |key, _| {
            inos.extend(keys::number_at(key, 1).map(Ino));
            Ok(ControlFlow::Continue(()))
        })?;
        let mut found = Vec::with_capacity(inos.len());
        for ino in inos {
            if let Some(dir) = self.inode(ino)?.and_then(|inode| inode.dir) {
                found.push(QuotaUse { dir: ino, quota: dir.quota, totals: self.counted(ino)? });
            }
        }
        Ok(found)
    }

    /// The quotas that what is below `ino` counts for, or a file itself; nearest first. Nothing of
    /// an inode without a name.
    pub fn quotas_over(&self, ino: Ino) -> Read<Vec<QuotaUse>> {
        let mut found = Vec::new();
        if self.counters.quotas == 0 {
            return Ok(found);
        }
        let mut next = Some(ino);
        while let Some(ino) = next {
            next = match self.inode(ino)? {
                Some(Inode { nlink: 0, .. }) | None => None,
                Some(Inode { dir: Some(dir), .. }) => {
                    if !dir.quota.is_none() {
                        found.push(QuotaUse { dir: ino, quota: dir.quota, totals: self.counted(ino)? });
                    }
                    (ino != Ino::ROOT).then_some(dir.parent)
                }
                Some(_) => self.first_link(ino)?.map(|(parent, _)| parent),
            };
        }
        Ok(found)
    }

    /// Up to `limit` inodes without a name, in order, after `after` ([`Ino`] 0 starts). Only those of which
    /// the log knows it: of the others, servers that are asked would say that they may open them yet.
    pub fn orphans(&self, after: Ino, limit: usize) -> Read<Vec<Ino>> {
        let (_, to) = keys::under(keys::ORPHAN, &[]);
        let from = keys::orphan(Ino(after.0.saturating_add(1)));
        let mut found = Vec::new();
        self.store.range(&from, &to, &mut |key, _| {
            if found.len() >= limit {
                return ControlFlow::Break(());
            }
            found.push(Ino(keys::number_at(key, 1).expect("orphan keys end in the inode")));
            ControlFlow::Continue(())
        })?;
        Ok(found)
    }

    pub fn chunk(&self, id: &ChunkId) -> Read<Option<ChunkRecord>> {
        self.record(&keys::chunk(id))
    }

    /// Chunks the metadata knows, condemned ones included.
    pub fn chunk_count(&self) -> u64 {
        self.counters.chunks
    }

    /// Up to `limit` chunk records with ids after `after`, in order of id.
    pub fn chunks(&self, after: Option<ChunkId>, limit: usize) -> Read<Vec<(ChunkId, ChunkRecord)>> {
        let (mut from, to) = keys::under(keys::CHUNK, &[]);
        if let Some(after) = after {
            from = keys::chunk(&after);
            from.push(0);
        }
        let mut found = Vec::new();
        self.each(&from, &to, |key, value| {
            if found.len() >= limit {
                return Ok(ControlFlow::Break(()));
            }
            found.push((chunk_id(key, 1)?, records::decode(key, value)?));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// Up to `limit` chunks condemned before `before`.
    pub fn condemned(&self, before: Timestamp, limit: usize) -> Read<Vec<ChunkId>> {
        let (from, _) = keys::under(keys::CONDEMNED, &[]);
        let to = keys::condemned(before, &ChunkId([0; 32]));
        let mut found = Vec::new();
        self.each(&from, &to, |key, _| {
            if found.len() >= limit {
                return Ok(ControlFlow::Break(()));
            }
            found.push(chunk_id(key, 17)?);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    pub fn cluster(&self) -> Read<Option<ClusterIdentity>> {
        self.record(&keys::cluster())
    }

    pub fn member(&self, node: NodeId) -> Read<Option<Member>> {
        self.record(&keys::member(node))
    }

    /// Whether a life of a server was ended, by a newer one or from outside.
    pub fn is_ended(&self, life: Incarnation) -> Read<bool> {
        Ok(self.record(&keys::floor(life.0))? == Some(keys::ENDED) || self.left_by(life)?)
    }

    /// Whether a life was ended and what it left in its journal is not all sent yet.
    pub fn left_by(&self, life: Incarnation) -> Read<bool> {
        Ok(self.counters.left > 0 && self.record::<Left>(&keys::left(life.0))?.is_some())
    }

    /// Lives that were ended and whose journals `pair` takes over.
    pub fn left_to(&self, pair: NodeId) -> Read<Vec<Holder>> {
        let mut found = Vec::new();
        if self.counters.left == 0 {
            return Ok(found);
        }
        let (from, to) = keys::under(keys::LEFT, &[]);
        self.each(&from, &to, |key, value| {
            let left: Left = records::decode(key, value)?;
            if left.pair == pair && let Some(life) = keys::number_at(key, 1) {
                found.push(Holder { node: left.node, incarnation: Incarnation(life) });
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// Of each file that has bytes of this life's journal: up to which position. And before which
    /// position nothing of the journal is needed.
    pub fn noted(&self, life: Incarnation) -> Read<(BTreeMap<Ino, u64>, u64)> {
        let kept_from: u64 = self.record(&keys::kept_from(life.0))?.unwrap_or(0);
        let (_, to) = keys::under(keys::NOTED, &[life.0]);
        let mut found = BTreeMap::new();
        self.each(&keys::noted(life.0, 1, Ino(0)), &to, |key, _| {
            if let (Some(upto), Some(ino)) = (keys::number_at(key, 9), keys::number_at(key, 17)) {
                found.insert(Ino(ino), upto);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok((found, kept_from))
    }

    pub fn members(&self) -> Read<Vec<Member>> {
        self.all(keys::MEMBER)
    }

    /// Keys of removed members.
    pub fn removed_keys(&self) -> Read<Vec<[u8; 32]>> {
        let (from, to) = keys::under(keys::REMOVED_KEY, &[]);
        let mut found = Vec::new();
        self.each(&from, &to, |key, _| {
            found.push(chunk_id(key, 1)?.0);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    pub fn token(&self, hash: &[u8; 32]) -> Read<Option<TokenRecord>> {
        self.record(&keys::token(hash))
    }

    pub fn tokens(&self) -> Read<Vec<TokenRecord>> {
        self.all(keys::TOKEN)
    }

    /// The policy set on `ino` itself.
    pub fn policy(&self, ino: Ino) -> Read<Policy> {
        Ok(self.record(&keys::policy(ino))?.unwrap_or_default())
    }

    /// Whether anything has a policy.
    pub(super) fn has_policies(&self) -> Read<bool> {
        let (from, to) = keys::under(keys::POLICY, &[]);
        let mut any = false;
        self.each(&from, &to, |_, _| {
            any = true;
            Ok(ControlFlow::Break(()))
        })?;
        Ok(any)
    }

    /// What holds for `ino`: its own policy, then that of the directories above it.
    pub fn effective_policy(&self, ino: Ino) -> Read<EffectivePolicy> {
        let (mut copies, mut cell, mut durability, mut on_partition) = (None, None, None, None);
        let mut next = Some(ino).filter(|_| self.may_have_policies);
        while let Some(ino) = next {
            let policy = self.policy(ino)?;
            copies = copies.or(policy.copies);
            cell = cell.or(policy.cell);
            durability = durability.or(policy.durability);
            on_partition = on_partition.or(policy.on_partition);
            next = match self.inode(ino)?.and_then(|inode| inode.dir) {
                _ if ino == Ino::ROOT => None,
                Some(dir) => Some(dir.parent),
                None => self.first_link(ino)?.map(|(parent, _)| parent),
            };
        }
        let durability = durability.unwrap_or_default();
        Ok(EffectivePolicy {
            // Fewer could not be on every server's disk.
            copies: if durability == Durability::All { COPIES_ON_EVERY } else { copies.unwrap_or(0) },
            cell: cell.unwrap_or_default(),
            durability,
            on_partition: on_partition.unwrap_or_default(),
        })
    }

    pub(super) fn first_link(&self, ino: Ino) -> Read<Option<(Ino, FileName)>> {
        let (from, to) = keys::under(keys::LINK, &[ino.0]);
        let mut found = None;
        self.each(&from, &to, |key, _| {
            let parent = keys::number_at(key, 9).map(Ino);
            let name = FileName::new(key.get(17..).unwrap_or_default());
            let damaged = || StoreError::Corrupt { key: key.to_vec(), why: "not a link".into() };
            found = Some((parent.ok_or_else(damaged)?, name.map_err(|_| damaged())?));
            Ok(ControlFlow::Break(()))
        })?;
        Ok(found)
    }

    /// One path of the inode from the root, for people; `None` for orphans.
    pub fn path(&self, ino: Ino) -> Read<Option<Vec<FileName>>> {
        let mut names = Vec::new();
        let mut next = ino;
        while next != Ino::ROOT {
            let Some((parent, name)) = self.first_link(next)? else { return Ok(None) };
            names.push(name);
            next = parent;
        }
        names.reverse();
        Ok(Some(names))
    }

    /// An inode that names the chunk, found by search; slow, for status and repair reports.
    pub fn file_of_chunk(&self, id: &ChunkId) -> Read<Option<Ino>> {
        let (from, to) = keys::under(keys::CELL, &[]);
        let mut found = None;
        self.each(&from, &to, |key, value| {
            let extent: Extent = records::decode(key, value)?;
            if extent.chunk() == Some(*id)
                && let (Some(ino), Some(cell)) = (keys::number_at(key, 1).map(Ino), keys::number_at(key, 9))
                && !self.cuts.get(&ino).is_some_and(|cuts| is_dead(cuts, cell, extent.stamp))
            {
                found = Some(ino);
                return Ok(ControlFlow::Break(()));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }
}

fn chunk_id(key: &[u8], at: usize) -> Read<ChunkId> {
    let bytes = key.get(at..).and_then(|tail| tail.try_into().ok());
    bytes.map(ChunkId).ok_or_else(|| StoreError::Corrupt { key: key.to_vec(), why: "not 32 bytes of hash".into() })
}
