//! What a server may change without asking, because it alone holds the directory.
//!
//! The holder of a directory answers for its names and attributes, and for every file in it that has
//! no other name and that no other server holds. What it does there happens *ahead* of the log and is
//! told to the log in order, so nobody else may touch any of it meanwhile: a command of another server
//! is refused with [`MetaError::Held`], which names the directory, and may be tried again when the
//! holder has given that up.
//!
//! Subdirectories are held, or not, by themselves. What belongs to no inode (counts of chunks, the
//! members) is nobody's, and a command that needs it goes through the log.

use ctfs_types::{
    FileUse, Holder, Ino,
    rules::{Rule, keeps},
};

use super::{
    Apply, Namespace,
    ahead::Layer,
    keys,
    records::Inode,
    txn::Outcome,
};
use crate::{About, Change, Command, MetaError, Op, StoreError};

/// To whom a record belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    Inode(Ino),
    /// To one life of one server; by its number.
    Life(u64),
    /// To nobody, and is only ever added to.
    Sum,
    Volume,
}

impl Subject {
    pub fn of(key: &[u8]) -> Self {
        let number = |at| keys::number_at(key, at);
        let found = match key.first().copied().unwrap_or(0) {
            keys::INODE
            | keys::NAME
            | keys::COOKIE
            | keys::LINK
            | keys::XATTR
            | keys::CELL
            | keys::CUTS
            | keys::LOCKS
            | keys::WAITING
            | keys::ORPHAN
            | keys::POLICY => number(1).map(|ino| Self::Inode(Ino(ino))),
            keys::OWNED | keys::WAIT => number(9).map(Self::Life),
            keys::NUMBERS | keys::NOTED | keys::LEFT | keys::STREAMED => number(1).map(Self::Life),
            keys::TOTALS => Some(Self::Sum),
            // Else only a journal would name a chunk, and whoever collects chunks asks no journals.
            keys::CHUNK | keys::CONDEMNED if !keeps(Rule::ChunksAreNamedInLog) => Some(Self::Sum),
            _ => None,
        };
        found.unwrap_or(Self::Volume)
    }
}

/// Who alone may change what belongs to an inode, and the directory by which.
pub type Cover = Option<(Ino, Holder)>;

/// The rule, over whatever reads inodes.
fn cover(ino: Ino, mut inode: impl FnMut(Ino) -> Result<Option<Inode>, StoreError>) -> Result<Cover, StoreError> {
    let Some(own) = inode(ino)? else { return Ok(None) };
    if own.is_dir() {
        return Ok(holder(own.usage).map(|holder| (ino, holder)));
    }
    if own.nlink != 1 || matches!(own.usage, FileUse::Shared { .. }) {
        return Ok(None);
    }
    let Some(home) = own.home else { return Ok(None) };
    let by_home = inode(home)?.and_then(|home| holder(home.usage));
    Ok(by_home.filter(|by_home| holder(own.usage).is_none_or(|own| own == *by_home)).map(|holder| (home, holder)))
}

fn holder(usage: FileUse) -> Option<Holder> {
    match usage {
        FileUse::Owned { holder, .. } => Some(holder),
        FileUse::Free | FileUse::Shared { .. } => None,
    }
}

impl Apply<'_, '_> {
    /// Refuses a command that touched what another server alone may change, or what its own may without
    /// knowing that this command is on its way to it.
    pub(super) fn may_touch(&mut self, command: &Command) -> Outcome<()> {
        if Self::ends_lives(&command.op) {
            return Ok(());
        }
        for ino in self.txn.touched() {
            let Some((dir, holder)) = self.cover_before(ino)? else { continue };
            let is_known = match &command.about {
                About::Ahead | About::Left { .. } => true,
                About::Inodes(inos) => inos.contains(&ino) || inos.contains(&dir),
            };
            if holder.incarnation.0 != self.request.client || !is_known {
                return Err(MetaError::Held { ino: dir, holder }.into());
            }
        }
        Ok(())
    }

    /// Tells of files that another server may change ahead of the log from here on, because the directory
    /// that has their only name is held: given up, moved there, or with one name less. Not of one that went
    /// from one directory of its holder to another: nobody else knows of it, and what only its holder knows,
    /// as locks, must stay sayable ahead of the log.
    pub(super) fn tell_newly_covered(&mut self) -> Outcome<()> {
        if self.counters.delegated == 0 || !self.moves_covers()? {
            return Ok(());
        }
        for ino in self.txn.touched() {
            // Of what is made now no kernel keeps anything but its maker's.
            if self.txn.before::<Inode>(&keys::inode(ino))?.is_none() {
                continue;
            }
            let before = self.cover_before(ino)?.map(|(_, holder)| holder);
            if self.cover_now(ino)?.is_some_and(|(dir, holder)| dir != ino && Some(holder) != before) {
                self.changed(Change::Covered { ino });
            }
        }
        Ok(())
    }

    /// Whether the command changed anything by which what was there before is covered. Most do not.
    fn moves_covers(&mut self) -> Outcome<bool> {
        for key in self.txn.written() {
            if key.first() == Some(&keys::INODE) {
                let by_which = |inode: Inode| (inode.usage, inode.nlink, inode.home);
                let before = self.txn.before(&key)?.map(by_which);
                if before.is_some() && before != self.txn.peek(&key)?.map(by_which) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn cover_now(&mut self, ino: Ino) -> Outcome<Cover> {
        Ok(cover(ino, |ino| self.txn.peek(&keys::inode(ino)))?)
    }

    /// Who covered the inode before this command.
    pub(super) fn cover_before(&mut self, ino: Ino) -> Outcome<Cover> {
        if let Some(known) = self.txn.covers.get(&ino) {
            return Ok(*known);
        }
        let cover = cover(ino, |ino| self.txn.before(&keys::inode(ino)))?;
        self.txn.covers.insert(ino, cover);
        Ok(cover)
    }

    /// Whose holdings have ended is not asked.
    fn ends_lives(op: &Op) -> bool {
        matches!(op, Op::Join { .. } | Op::Incarnate { .. } | Op::Fence { .. } | Op::EndLife { .. } | Op::RemoveMember { .. })
    }

    /// Whether everything that the command touched is this holder's alone, or new.
    pub(super) fn is_covered(&mut self, holder: Holder, layer: &Layer) -> Outcome<bool> {
        if !self.txn.touches_only_life(self.request.client) {
            return Ok(false);
        }
        for ino in self.txn.touched() {
            let is_new = self.txn.before::<Inode>(&keys::inode(ino))?.is_none();
            // A holding counts when its command was answered: every leased server knows of it then, and
            // has dropped what it kept.
            let is_mine = |(dir, by): (Ino, Holder)| by == holder && !layer.is_closed(dir) && !layer.is_on_the_way(dir);
            if (layer.is_on_the_way(ino) || layer.is_newly_covered(ino) || !is_new && !self.cover_before(ino)?.is_some_and(is_mine)) && keeps(Rule::OnlyCoveredIsAhead) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether some directory at or below `dir` is held by anybody.
    pub(super) fn held_below(&mut self, dir: Ino) -> Outcome<Cover> {
        if self.counters.delegated == 0 {
            return Ok(None);
        }
        let (from, to) = keys::under(keys::OWNED, &[]);
        for (key, _) in self.txn.scan(&from, &to, usize::MAX)? {
            let Some(held) = keys::number_at(&key, 17).map(Ino) else { continue };
            let Some(Inode { usage, dir: Some(_), .. }) = self.txn.peek(&keys::inode(held))? else { continue };
            if let Some(holder) = holder(usage)
                && self.is_at_or_below(held, dir)?
            {
                return Ok(Some((held, holder)));
            }
        }
        Ok(None)
    }

    fn is_at_or_below(&mut self, mut ino: Ino, dir: Ino) -> Outcome<bool> {
        loop {
            if ino == dir {
                return Ok(true);
            }
            if ino == Ino::ROOT {
                return Ok(false);
            }
            match self.txn.peek::<Inode>(&keys::inode(ino))?.and_then(|inode| inode.dir) {
                Some(dir) if dir.parent != ino => ino = dir.parent,
                _ => return Ok(false),
            }
        }
    }
}

impl Namespace {
    /// Who alone may change names and attributes of the inode and therefore knows them, and the
    /// directory by which: whoever else wants to know has it give that up first.
    pub fn cover(&self, ino: Ino) -> Result<Cover, StoreError> {
        if self.delegated() == 0 {
            return Ok(None);
        }
        cover(ino, |ino| self.inode(ino))
    }

    /// Directories that servers hold.
    pub fn delegated(&self) -> u64 {
        self.counters.delegated
    }
}
