//! Which server may hold bytes of a file that are not here yet, and changes of a directory.
//!
//! What holding a directory means is said in [`super::cover`]; this is about files.
//!
//! One server at a time may buffer what it writes to a file. That it does is part of the state, so
//! everybody knows whom to ask before they read, and a change of the file's bytes, size or times by
//! anybody else is refused with [`MetaError::Held`] until the holder has given up the file. Where
//! several servers use a file at once nobody holds it: they write through.

use ctfs_types::{
    FileKind, FileUse, Holder, Incarnation, Ino, NodeId,
    rules::{Rule, keeps},
};

use super::{Apply, keys, records::Inode, txn::Outcome};
use crate::{Change, Member, MetaError, Reply};

impl Apply<'_, '_> {
    /// Refuses whoever is not the holder of a held file.
    pub(super) fn may_change(&self, ino: Ino, inode: &Inode) -> Outcome<()> {
        match inode.usage {
            FileUse::Owned { holder, .. } if holder.incarnation.0 != self.request.client => Err(MetaError::Held { ino, holder }.into()),
            _ => Ok(()),
        }
    }

    /// Refuses a life of a server that has ended: nobody would ever free what it gets.
    pub(super) fn is_alive(&mut self, node: NodeId, incarnation: Incarnation) -> Outcome<()> {
        if self.is_left {
            return Ok(());
        }
        match self.txn.peek::<Member>(&keys::member(node))? {
            Some(member) if incarnation < member.incarnation || (member.fenced && incarnation == member.incarnation) && keeps(Rule::EndedLivesAreRefused) => Err(MetaError::StaleIncarnation.into()),
            Some(_) => Ok(()),
            None if self.txn.peek_raw(&keys::cluster())?.is_some() => Err(MetaError::NoSuchMember.into()),
            None => Ok(()),
        }
    }

    pub(super) fn own(&mut self, ino: Ino, holder: Holder, although_shared: bool) -> Outcome<Reply> {
        let mut inode = self.inode(ino)?;
        match inode.kind {
            FileKind::File => {}
            // One below a quota is not held: what happens ahead of the log asks for no limits.
            FileKind::Directory if inode.nlink > 0 && (self.counters.quotas == 0 || self.quota_root(ino)?.is_none()) => {}
            _ => return Err(MetaError::WrongKind(ino).into()),
        }
        self.is_alive(holder.node, holder.incarnation)?;
        match inode.usage {
            FileUse::Owned { holder: held, .. } if held != holder => return Err(MetaError::Held { ino, holder: held }.into()),
            FileUse::Shared { .. } if !although_shared => return Err(MetaError::Shared(ino).into()),
            _ => {}
        }
        self.put_owned(ino, &mut inode, holder);
        // What the holder writes from here on is told to nobody: kernels must ask again.
        if inode.is_dir() {
            if keeps(Rule::TakingDropsCaches) {
                self.changed(Change::Children { dir: ino });
            }
        } else {
            self.changed(Change::Data { ino, offset: 0, len: u64::MAX });
        }
        self.changed(Change::Attr { ino });
        self.changed(Change::Usage { ino });
        Ok(Reply::Attr(inode.attr(ino)))
    }

    /// Makes the holder the one that may buffer, and stores the inode.
    pub(super) fn put_owned(&mut self, ino: Ino, inode: &mut Inode, holder: Holder) {
        let taken = !matches!(inode.usage, FileUse::Owned { .. });
        self.counters.delegated += u64::from(inode.is_dir() && taken);
        inode.usage = FileUse::Owned { holder, since: self.request.seq };
        self.txn.put(keys::owned(holder, ino), &());
        self.put_inode(ino, inode);
    }

    pub(super) fn disown(&mut self, files: &[(Ino, u64)], holder: Holder, shared: bool) -> Outcome<Reply> {
        for &(ino, since) in files {
            if let Some(inode) = self.txn.get::<Inode>(&keys::inode(ino))?
                && inode.usage == (FileUse::Owned { holder, since })
            {
                self.put_disowned(ino, inode, holder, shared);
            }
        }
        Ok(Reply::Done)
    }

    /// A directory without a name is held by nobody: whoever removes it must not wait for its holder.
    pub(super) fn end_holding(&mut self, ino: Ino, inode: &mut Inode) {
        if let (true, FileUse::Owned { holder, .. }) = (inode.is_dir(), inode.usage) {
            self.txn.delete(keys::owned(holder, ino));
            self.counters.delegated -= 1;
            inode.usage = FileUse::Free;
            self.changed(Change::Usage { ino });
        }
    }

    fn put_disowned(&mut self, ino: Ino, mut inode: Inode, holder: Holder, shared: bool) {
        self.txn.delete(keys::owned(holder, ino));
        self.counters.delegated -= u64::from(inode.is_dir());
        inode.usage = if shared { FileUse::Shared { since: self.at } } else { FileUse::Free };
        self.put_inode(ino, &inode);
        self.changed(Change::Usage { ino });
    }

    /// Frees the files held by lives of `node` that have ended. What they had buffered is lost.
    pub(super) fn disown_ended(&mut self, node: NodeId, ended: impl Fn(Incarnation) -> bool) -> Outcome<()> {
        let (from, to) = keys::under(keys::OWNED, &[node.0]);
        for (key, _) in self.txn.scan(&from, &to, usize::MAX)? {
            let (incarnation, ino) = keys::number_at(&key, 9).zip(keys::number_at(&key, 17)).expect("as keys::owned makes it");
            let holder = Holder { node, incarnation: Incarnation(incarnation) };
            if ended(holder.incarnation) {
                let inode = self.inode(Ino(ino))?;
                self.put_disowned(Ino(ino), inode, holder, false);
            }
        }
        Ok(())
    }
}
