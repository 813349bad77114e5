//! Lives of servers: how they end, and who sends what they left in their journals.
//!
//! A life holds files and directories, and writes down what it acknowledges before the log has it. When it
//! is ended from outside ([`crate::Op::Fence`]), its pair has that journal. Until the pair has sent what is in
//! it ([`crate::About::Left`]) and said so ([`crate::Op::EndLife`]), all that the life held stays held, so
//! nobody sees what was before. The server itself may come back earlier and send the same: each command
//! happens once, by its request, and each write of journalled bytes once, by what it says of the journal
//! ([`Noted`]).

use ctfs_types::{
    Holder, Incarnation, Ino, NodeId,
    rules::{Rule, keeps},
};

use super::{Apply, keys, records::Left, txn::Outcome};
use crate::{About, Change, Command, Member, MetaError, Noted, Reply};

/// Notes that are no longer needed and go with one that is new.
const NOTES_DROPPED_MAX: usize = 64;

impl Apply<'_, '_> {
    pub(super) fn fence(&mut self, node: NodeId, incarnation: Incarnation) -> Outcome<Reply> {
        let member = self.member(node)?;
        if member.incarnation != incarnation || member.fenced {
            return Ok(Reply::Done);
        }
        match member.pair {
            Some(pair) if keeps(Rule::HeldUntilSent) => {
                self.txn.put(keys::left(incarnation.0), &Left { node, pair });
                self.counters.left += 1;
            }
            _ => {
                self.end_lives(node, |life| life <= incarnation)?;
                self.forget_client(incarnation)?;
            }
        }
        self.changed(Change::Fenced { node, incarnation, pair: member.pair });
        self.put_member(&Member { fenced: true, ..member });
        Ok(Reply::Done)
    }

    pub(super) fn set_pair(&mut self, life: Holder, pair: Option<NodeId>) -> Outcome<Reply> {
        self.is_alive(life.node, life.incarnation)?;
        let member = self.member(life.node)?;
        if member.incarnation != life.incarnation {
            return Err(MetaError::StaleIncarnation.into());
        }
        if let Some(pair) = pair {
            self.member(pair)?;
            if pair == life.node {
                return Err(MetaError::NotTheSuccessor.into());
            }
        }
        self.put_member(&Member { pair, ..member });
        Ok(Reply::Done)
    }

    pub(super) fn end_life(&mut self, life: Holder, by: Holder) -> Outcome<Reply> {
        if !self.is_successor(life.incarnation.0, by)? {
            return Err(MetaError::NotTheSuccessor.into());
        }
        self.end_lives(life.node, |ended| ended <= life.incarnation)?;
        self.forget_client(life.incarnation)?;
        let member = self.member(life.node)?;
        if member.incarnation == life.incarnation {
            self.put_member(&Member { pair: None, ..member });
        }
        Ok(Reply::Done)
    }

    /// Whether a command may happen, as far as the life that gave it goes: one that was ended only gives
    /// what others send of its journal, and others send only what a life left that has ended.
    pub(super) fn life_may(&mut self, command: &Command) -> Outcome<()> {
        let client = command.request.client;
        match command.about {
            About::Left { by } if self.is_successor(client, by)? || self.is_next_life(client, by)? => Ok(()),
            About::Left { .. } => Err(MetaError::StaleIncarnation.into()),
            _ if self.left(client)?.is_some() && keeps(Rule::EndedLivesAreRefused) => Err(MetaError::StaleIncarnation.into()),
            _ => Ok(()),
        }
    }

    fn left(&mut self, life: u64) -> Outcome<Option<Left>> {
        // Mostly there is none, and nobody looks.
        Ok(if self.counters.left == 0 { None } else { self.txn.get(&keys::left(life))? })
    }

    /// Whether `by` takes over from a life that was ended: a later one of its server, or the pair's present one.
    fn is_successor(&mut self, life: u64, by: Holder) -> Outcome<bool> {
        let Some(left) = self.left(life)? else { return Ok(false) };
        if by.node == left.node {
            return Ok(by.incarnation.0 > life);
        }
        let member: Option<Member> = self.txn.peek(&keys::member(by.node))?;
        Ok(by.node == left.pair && member.is_some_and(|member| member.incarnation == by.incarnation && !member.fenced))
    }

    /// Whether `by` is what comes after the present life of a server, which nobody has ended.
    fn is_next_life(&mut self, life: u64, by: Holder) -> Outcome<bool> {
        let member: Option<Member> = self.txn.peek(&keys::member(by.node))?;
        Ok(member.is_some_and(|member| member.incarnation.0 == life && !member.fenced && by.incarnation > member.incarnation))
    }

    pub(super) fn end_lives(&mut self, node: NodeId, ended: impl Fn(Incarnation) -> bool) -> Outcome<()> {
        self.release_everywhere(|owner| owner.node == node && ended(owner.incarnation))?;
        self.disown_ended(node, ended)
    }

    /// A client is one life of a server: nobody asks for its verdicts any more, and what of it is
    /// still under way is not carried out.
    pub(super) fn forget_client(&mut self, life: Incarnation) -> Outcome<()> {
        self.burn_numbers(life)?;
        for kind in [keys::VERDICT, keys::NOTED] {
            let (from, to) = keys::under(kind, &[life.0]);
            for (key, _) in self.txn.scan(&from, &to, usize::MAX)? {
                self.txn.delete(key);
            }
        }
        self.txn.delete(keys::streamed(life.0));
        if self.left(life.0)?.is_some() {
            self.txn.delete(keys::left(life.0));
            self.counters.left -= 1;
        }
        self.txn.put(keys::floor(life.0), &keys::ENDED);
        Ok(())
    }

    /// Refuses a write whose journalled bytes are in the file, maybe under newer ones. Only of what others send
    /// of a life: itself it goes forward.
    pub(super) fn may_note(&mut self, ino: Ino, noted: Noted) -> Outcome<()> {
        let client = self.request.client;
        let (_, to) = keys::under(keys::NOTED, &[client]);
        let from = keys::noted(client, noted.upto, Ino(0));
        let later = self.txn.scan(&from, &to, usize::MAX)?;
        let is_known = later.iter().any(|(key, _)| keys::number_at(key, 17) == Some(ino.0));
        if is_known && keeps(Rule::NotedIsNotSent) { Err(MetaError::NotedBefore(ino).into()) } else { Ok(()) }
    }

    pub(super) fn note(&mut self, ino: Ino, noted: Noted) -> Outcome<()> {
        let client = self.request.client;
        // The journal's files may go back farther: what nobody notes any more must not be sent from them.
        let kept_from: u64 = self.txn.get(&keys::kept_from(client))?.unwrap_or(0);
        let kept_from = kept_from.max(noted.kept_from);
        self.txn.put(keys::kept_from(client), &kept_from);
        let (from, to) = (keys::noted(client, 1, Ino(0)), keys::noted(client, kept_from, Ino(0)));
        for (key, _) in self.txn.scan(&from, &to, NOTES_DROPPED_MAX)? {
            self.txn.delete(key);
        }
        self.txn.put(keys::noted(client, noted.upto, ino), &());
        Ok(())
    }
}
