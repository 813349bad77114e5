//! The cluster's own state: identity, members, tokens.

use ctfs_types::{Incarnation, NodeId};

use super::{Apply, keys, records, txn::Outcome};
use crate::{Change, ClusterIdentity, Member, MemberState, MetaError, Reply, TokenRecord};

impl Apply<'_, '_> {
    pub(super) fn member(&mut self, node: NodeId) -> Outcome<Member> {
        Ok(self.txn.get(&keys::member(node))?.ok_or(MetaError::NoSuchMember)?)
    }

    pub(super) fn put_member(&mut self, member: &Member) {
        self.txn.put(keys::member(member.node), member);
        self.changed(Change::Members);
    }

    pub(super) fn found(&mut self, cluster: &ClusterIdentity, member: &Member) -> Outcome<Reply> {
        if self.txn.get_raw(&keys::cluster())?.is_some() {
            return Err(MetaError::AlreadyFounded.into());
        }
        self.txn.put(keys::cluster(), cluster);
        self.put_member(member);
        Ok(Reply::Joined { member: member.clone() })
    }

    pub(super) fn create_token(&mut self, token: &TokenRecord) -> Outcome<Reply> {
        // Tokens that ran out are of no more use to anybody.
        let (from, to) = keys::under(keys::TOKEN, &[]);
        for (key, value) in self.txn.scan(&from, &to, usize::MAX)? {
            let old: TokenRecord = records::decode(&key, &value)?;
            if old.expires < self.at {
                self.txn.delete(key);
            }
        }
        self.txn.put(keys::token(&token.hash), token);
        self.changed(Change::Members);
        Ok(Reply::Done)
    }

    pub(super) fn revoke_token(&mut self, hash: &[u8; 32]) -> Outcome<Reply> {
        if self.txn.get_raw(&keys::token(hash))?.is_none() {
            return Err(MetaError::NoSuchToken.into());
        }
        self.txn.delete(keys::token(hash));
        self.changed(Change::Members);
        Ok(Reply::Done)
    }

    pub(super) fn join(&mut self, token: &[u8; 32], member: &Member) -> Outcome<Reply> {
        if self.txn.get_raw(&keys::removed_key(&member.key))?.is_some() {
            return Err(MetaError::KeyRemoved.into());
        }
        let mut record: TokenRecord = self.txn.get(&keys::token(token))?.ok_or(MetaError::NoSuchToken)?;
        if record.uses_left == 0 {
            return Err(MetaError::NoSuchToken.into());
        }
        if record.expires < self.at {
            return Err(MetaError::TokenExpired.into());
        }
        let mut member = member.clone();
        let (from, to) = keys::under(keys::MEMBER, &[]);
        for (key, value) in self.txn.scan(&from, &to, usize::MAX)? {
            let other: Member = records::decode(&key, &value)?;
            if other.key == member.key {
                // Ended lives stay ended, whatever the newcomer knows of them.
                if other.incarnation < member.incarnation {
                    self.forget_client(other.incarnation)?;
                }
                member.incarnation = member.incarnation.max(other.incarnation);
            } else if other.name == member.name || other.node == member.node {
                return Err(MetaError::MemberNameTaken(other.name).into());
            }
        }
        record.uses_left -= 1;
        if record.uses_left == 0 { self.txn.delete(keys::token(token)) } else { self.txn.put(keys::token(token), &record) }
        // A server that joins again is in a new life; what its earlier ones held is free.
        self.end_lives(member.node, |life| life < member.incarnation)?;
        self.put_member(&member);
        Ok(Reply::Joined { member })
    }

    pub(super) fn incarnate(
        &mut self,
        node: NodeId,
        incarnation: Incarnation,
        addresses: &[String],
        capacity: u64,
        version: &str,
    ) -> Outcome<Reply> {
        let mut member = self.member(node)?;
        if incarnation < member.incarnation {
            return Err(MetaError::StaleIncarnation.into());
        }
        if incarnation > member.incarnation {
            self.end_lives(node, |life| life < incarnation)?;
            self.forget_client(member.incarnation)?;
            (member.fenced, member.pair) = (false, None);
        }
        member.incarnation = incarnation;
        member.addresses = addresses.to_vec();
        member.capacity = capacity;
        member.version = version.to_owned();
        self.put_member(&member);
        Ok(Reply::Done)
    }

    pub(super) fn set_member_state(&mut self, node: NodeId, state: MemberState) -> Outcome<Reply> {
        let mut member = self.member(node)?;
        member.state = state;
        self.put_member(&member);
        Ok(Reply::Done)
    }

    pub(super) fn remove_member(&mut self, node: NodeId) -> Outcome<Reply> {
        let member = self.member(node)?;
        self.txn.delete(keys::member(node));
        self.txn.put(keys::removed_key(&member.key), &self.at);
        let (from, to) = keys::under(keys::MEMBER, &[]);
        for (key, value) in self.txn.scan(&from, &to, usize::MAX)? {
            let other: Member = records::decode(&key, &value)?;
            if other.pair == Some(node) {
                self.put_member(&Member { pair: None, ..other });
            }
        }
        self.end_lives(node, |_| true)?;
        self.forget_client(member.incarnation)?;
        self.changed(Change::Members);
        Ok(Reply::Done)
    }
}
