//! openraft's messages over whatever carries bytes between servers.
//!
//! [`PeerNetwork`] makes one [`Peer`] per target; a [`Peer`] encodes, calls, decodes and says in
//! openraft's words what went wrong. On the way it keeps the [`QuorumClock`]: when the last
//! heartbeat that a quorum acknowledged was *sent*, which is what leases hang on.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use ctfs_types::NodeId;
use openraft::{
    EmptyNode, RaftNetwork, RaftNetworkFactory,
    error::{InstallSnapshotError, PayloadTooLarge, RPCError, RaftError, RemoteError, Timeout, Unreachable},
    network::{Backoff, RPCOption, RPCTypes},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
        VoteResponse,
    },
};
use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    answer_time::ANSWER_TIME_MIN,
    boottime::BootTime,
    messages::{self, MESSAGE_BYTES_MAX, service},
    raft_types::{TypeConfig, node_id},
};

/// What carries calls between servers.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Sends `payload` (at most 2 MiB) to `service` of `to` and returns its answer.
    ///
    /// # Errors
    /// See [`TransportError`]; after any of them the call may have been served or not.
    async fn call(&self, to: NodeId, service: u16, payload: Vec<u8>, deadline: Duration)
    -> Result<Vec<u8>, TransportError>;

    /// Whether there is a live connection right now.
    fn reachable(&self, to: NodeId) -> bool;
}

/// Why a call brought no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    #[error("server cannot be reached")]
    Unreachable,
    #[error("no answer in time")]
    Deadline,
    /// The other side's handler said no.
    #[error("refused: {0}")]
    Refused(String),
    #[error("message too long")]
    TooLong,
    #[error("transport is closed")]
    Closed,
}

/// When each voter last acknowledged this server as leader, by the time of *sending*.
#[derive(Default)]
pub(crate) struct QuorumClock {
    acks: Mutex<Acks>,
    /// When an answer came last, whatever it said.
    answered: Mutex<BTreeMap<u64, BootTime>>,
}

#[derive(Default)]
struct Acks {
    /// Acknowledgements of an earlier term prove nothing in this one.
    term: u64,
    sent: BTreeMap<u64, BootTime>,
}

impl QuorumClock {
    /// `target` accepted a message of the leader of `term` that was sent at `sent`.
    fn acknowledged(&self, term: u64, target: u64, sent: BootTime) {
        let mut acks = self.acks.lock();
        if term > acks.term {
            *acks = Acks { term, sent: BTreeMap::new() };
        }
        if term == acks.term {
            let last = acks.sent.entry(target).or_insert(sent);
            *last = sent.max(*last);
        }
    }

    /// When the newest message was sent that a majority of each of `configs` acknowledged in
    /// `term`; this server counts as having acknowledged at `now`.
    pub fn quorum(&self, term: u64, configs: &[BTreeSet<u64>], me: u64, now: BootTime) -> Option<BootTime> {
        let acks = self.acks.lock();
        let sent = |node: &u64| match *node {
            node if node == me => Some(now),
            _ if acks.term != term => None,
            node => acks.sent.get(&node).copied(),
        };
        configs
            .iter()
            .map(|voters| {
                let mut times: Vec<BootTime> = voters.iter().filter_map(sent).collect();
                times.sort_unstable_by(|a, b| b.cmp(a));
                times.get(voters.len() / 2).copied()
            })
            .min()?
    }

    /// `target` runs and answered.
    fn answered(&self, target: u64) {
        self.answered.lock().insert(target, BootTime::now());
    }

    /// When `node` last answered a heartbeat, an append or a part of a snapshot.
    pub fn last_answered(&self, node: u64) -> Option<BootTime> {
        self.answered.lock().get(&node).copied()
    }

    /// When `node` last acknowledged anything in this term.
    pub fn last(&self, node: u64) -> Option<BootTime> {
        self.acks.lock().sent.get(&node).copied()
    }
}

/// Makes the connections of one server's openraft.
pub(crate) struct PeerNetwork {
    pub me: u64,
    pub transport: Arc<dyn Transport>,
    pub clock: Arc<QuorumClock>,
}

impl RaftNetworkFactory<TypeConfig> for PeerNetwork {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> Peer {
        Peer { me: self.me, target, transport: self.transport.clone(), clock: self.clock.clone() }
    }
}

/// One target.
pub(crate) struct Peer {
    me: u64,
    target: u64,
    transport: Arc<dyn Transport>,
    clock: Arc<QuorumClock>,
}

type RpcResult<T, E = openraft::error::Infallible> = Result<T, RPCError<u64, EmptyNode, RaftError<u64, E>>>;

impl Peer {
    async fn call<T, E>(&self, kind: RPCTypes, service: u16, payload: Vec<u8>, ttl: Duration) -> RpcResult<T, E>
    where
        T: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        let ttl = ttl.max(ANSWER_TIME_MIN);
        let answer = match self.transport.call(node_id(self.target), service, payload, ttl).await {
            Ok(answer) => answer,
            Err(TransportError::Deadline) => {
                let timeout = Timeout { action: kind, id: self.me, target: self.target, timeout: ttl };
                return Err(RPCError::Timeout(timeout));
            }
            // Everything else comes back at once. Only Unreachable makes openraft pause; what it
            // calls a network error it would retry in a hot loop.
            Err(error) => return Err(RPCError::Unreachable(Unreachable::new(&error))),
        };
        match messages::decode::<Result<T, RaftError<u64, E>>>(&answer) {
            Ok(Ok(response)) => {
                self.clock.answered(self.target);
                Ok(response)
            }
            // The target's openraft is dead; a pause, not a hot loop.
            Ok(Err(RaftError::Fatal(fatal))) => Err(RPCError::Unreachable(Unreachable::new(&fatal))),
            Ok(Err(refusal)) => Err(RPCError::RemoteError(RemoteError::new(self.target, refusal))),
            Err(malformed) => Err(RPCError::Unreachable(Unreachable::new(&malformed))),
        }
    }
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<u64>> {
        let (term, leads, entries) = (rpc.vote.leader_id().term, rpc.vote.is_committed(), rpc.entries.len());
        let payload = messages::encode(&rpc);
        if payload.len() > MESSAGE_BYTES_MAX && entries > 1 {
            return Err(RPCError::PayloadTooLarge(PayloadTooLarge::new_entries_hint(entries as u64 / 2)));
        }
        let sent = BootTime::now();
        let response =
            self.call(RPCTypes::AppendEntries, service::APPEND_ENTRIES, payload, option.hard_ttl()).await?;
        if leads && !matches!(response, AppendEntriesResponse::HigherVote(_)) {
            self.clock.acknowledged(term, self.target, sent);
        }
        Ok(response)
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<InstallSnapshotResponse<u64>, InstallSnapshotError> {
        let payload = messages::encode(&rpc);
        self.call(RPCTypes::InstallSnapshot, service::INSTALL_SNAPSHOT, payload, option.hard_ttl()).await
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, option: RPCOption) -> RpcResult<VoteResponse<u64>> {
        self.call(RPCTypes::Vote, service::VOTE, messages::encode(&rpc), option.hard_ttl()).await
    }

    /// Half a second at most, so that a server that comes back is found before anyone misses it.
    fn backoff(&self) -> Backoff {
        let pauses = [50, 100, 200, 400].into_iter().chain(std::iter::repeat(500));
        Backoff::new(pauses.map(Duration::from_millis))
    }
}

/// Encodes openraft's answer for [`Peer::call`].
pub(crate) fn encode_result<T: Serialize, E: Serialize>(result: &Result<T, RaftError<u64, E>>) -> Vec<u8> {
    messages::encode(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> BootTime {
        BootTime::at(Duration::from_millis(millis))
    }

    #[test]
    fn a_quorum_is_as_old_as_its_oldest_needed_voter() {
        let clock = QuorumClock::default();
        let voters = [BTreeSet::from([1, 2, 3, 4, 5])];
        assert_eq!(clock.quorum(7, &voters, 1, at(100)), None);
        clock.acknowledged(7, 2, at(50));
        clock.acknowledged(7, 3, at(20));
        assert_eq!(clock.quorum(7, &voters, 1, at(100)), Some(at(20)));
        clock.acknowledged(7, 4, at(80));
        assert_eq!(clock.quorum(7, &voters, 1, at(100)), Some(at(50)));
        // A late answer to an early message takes nothing back.
        clock.acknowledged(7, 4, at(10));
        assert_eq!(clock.quorum(7, &voters, 1, at(100)), Some(at(50)));
    }

    #[test]
    fn acknowledgements_of_another_term_do_not_count() {
        let clock = QuorumClock::default();
        let voters = [BTreeSet::from([1, 2, 3])];
        clock.acknowledged(7, 2, at(50));
        assert_eq!(clock.quorum(8, &voters, 1, at(100)), None);
        clock.acknowledged(8, 3, at(60));
        clock.acknowledged(7, 2, at(70));
        assert_eq!(clock.quorum(8, &voters, 1, at(100)), Some(at(60)));
    }

    #[test]
    fn a_joint_membership_needs_both_majorities() {
        let clock = QuorumClock::default();
        let joint = [BTreeSet::from([1, 2, 3]), BTreeSet::from([4, 5, 6])];
        clock.acknowledged(1, 2, at(90));
        clock.acknowledged(1, 4, at(30));
        assert_eq!(clock.quorum(1, &joint, 1, at(100)), None);
        clock.acknowledged(1, 6, at(40));
        assert_eq!(clock.quorum(1, &joint, 1, at(100)), Some(at(30)));
    }

    #[test]
    fn alone_the_quorum_is_now() {
        let clock = QuorumClock::default();
        assert_eq!(clock.quorum(1, &[BTreeSet::from([1])], 1, at(100)), Some(at(100)));
    }
}
