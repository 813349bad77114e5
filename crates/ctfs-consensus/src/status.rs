//! What an operator wants to know of one server's consensus.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::Ordering,
    time::Duration,
};

use ctfs_types::{LogIndex, NodeId};
use serde::Serialize;

use crate::{
    boottime::BootTime,
    core::{Core, Metrics},
    health::Space,
    raft_types::{log_index, node_id, raft_node},
};

/// The state of one server's consensus at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConsensusStatus {
    pub node: NodeId,
    pub leader: Option<NodeId>,
    pub is_leader: bool,
    pub term: u64,
    /// The local replica holds everything up to here.
    pub applied: LogIndex,
    /// Known here to be committed; the truth may be ahead of it.
    pub committed: LogIndex,
    /// Last entry of the local log.
    pub last_log: LogIndex,
    /// Known here to be applied and invalidated on every leased server.
    pub visible: LogIndex,
    /// Whether this server may read its replica without asking anyone.
    pub leased: bool,
    pub voters: BTreeSet<NodeId>,
    pub learners: BTreeSet<NodeId>,
    /// For every member at the leader; empty elsewhere.
    pub servers: BTreeMap<NodeId, ServerStatus>,
    /// Why this server takes no part any more, if so: its disk or its store failed, or it was told
    /// to end. It does not come back by itself.
    pub stopped: Option<String>,
    /// Room on the disk of log and state. [`Space::Full`]: it takes no part until there is some.
    pub space: Space,
}

/// One member as the leader sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ServerStatus {
    /// Entries up to here are on its disk.
    pub matched: LogIndex,
    /// Entries its disk lacks.
    pub lag: u64,
    /// It has applied, and told its kernel, up to here.
    pub acked: LogIndex,
    /// Changes wait for it.
    pub leased: bool,
    /// Since it last answered or asked; `None` if never in this term.
    pub last_heard: Option<Duration>,
    /// Since it last answered a heartbeat, an append or a part of a snapshot of this server; `None`
    /// if never. Its renewals do not count, nor does a connection that stands.
    pub last_answered: Option<Duration>,
    /// Whether it takes part: it answered within one lease. A new leader gives everybody one.
    pub answers: bool,
    /// Its disk is short of room, as it said itself.
    pub short_of_room: bool,
}

impl Core {
    pub fn status(&self) -> ConsensusStatus {
        let metrics = self.raft.metrics().borrow().clone();
        let membership = metrics.membership_config.membership();
        let applied = self.relay.applied_index();
        ConsensusStatus {
            node: self.me,
            leader: self.leader(),
            is_leader: self.leads(),
            term: metrics.current_term,
            applied,
            committed: LogIndex(self.committed.load(Ordering::Relaxed)).max(applied),
            last_log: metrics.last_log_index.map_or(LogIndex(0), log_index),
            visible: *self.visible.borrow(),
            leased: self.leased(),
            voters: membership.voter_ids().map(node_id).collect(),
            learners: membership.learner_ids().map(node_id).collect(),
            servers: if self.leads() { self.servers(&metrics) } else { BTreeMap::new() },
            stopped: self.view.borrow().stopped.clone(),
            space: self.health.space(),
        }
    }

    fn servers(&self, metrics: &Metrics) -> BTreeMap<NodeId, ServerStatus> {
        let (now, patient) = (BootTime::now(), self.patient.now());
        let lags = Self::lags(metrics);
        let ledger = self.ledger.lock();
        let short = self.short_of_room.lock();
        let patience = self.settings.timings.lease;
        let led_for = ledger.as_ref().map_or(Duration::ZERO, |ledger| patient.since(ledger.opened));
        let server = |node: NodeId| {
            let standing = ledger.as_ref().and_then(|ledger| ledger.standing(node));
            let (matched, lag) =
                lags.get(&raft_node(node)).copied().unwrap_or_default();
            let heard = self.clock.last(raft_node(node)).map(|heard| now.since(heard));
            let renewed = standing.and_then(|standing| standing.heard).map(|heard| patient.since(heard));
            let own = node == self.me;
            let last_answered = match own {
                true => Some(Duration::ZERO),
                false => self.clock.last_answered(raft_node(node)).map(|answered| now.since(answered)),
            };
            ServerStatus {
                matched,
                lag,
                acked: standing.map_or(LogIndex(0), |standing| standing.acked),
                leased: standing.is_some_and(|standing| standing.leased),
                last_heard: heard.into_iter().chain(renewed).min(),
                last_answered,
                answers: led_for < patience || last_answered.is_some_and(|ago| ago < patience),
                short_of_room: if own { self.health.space() != Space::Enough } else { short.contains(&node) },
            }
        };
        metrics.membership_config.nodes().map(|(&node, _)| (node_id(node), server(node_id(node)))).collect()
    }
}
