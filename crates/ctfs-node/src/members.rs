//! Who votes, who is away, who is gone: the leader's care for the list of members.
//!
//! Every server runs [`Membership::run`]; it acts only while its server leads. The list itself
//! is replicated state; the consensus membership follows it here, never the other way round.
//! Removing a member is [`removal`].

mod removal;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use ctfs_consensus::{Consensus, ProposeError};
use ctfs_meta::{Member, MemberState, MetaError, Op};
use ctfs_types::{LogIndex, NodeId};
use parking_lot::Mutex;
use tokio::sync::{MutexGuard, watch};

use crate::{
    problem::Problem,
    report::Figures,
    services::{Heard, Services},
    stop,
    voters::choose_voters,
};

/// How often the leader looks at the list without being told of a change.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A server that came back counts as back after this long, so that flapping moves no chunks.
const BACK_AFTER: Duration = Duration::from_secs(2);
/// A log that does not answer the leader for so long is called silent; one that just joined, or
/// takes in a snapshot, answers sooner.
const SILENT_LOG: Duration = Duration::from_secs(5);
/// How long the others must turn this server away before it believes that it was removed: an
/// answer given while they were themselves behind is not the last word.
const TURNED_AWAY_FOR: Duration = Duration::from_secs(3);

pub struct Membership {
    consensus: Consensus,
    services: Arc<Services>,
    network: ctfs_net::Network,
    node: NodeId,
    away_after: Duration,
    /// Log index of the last change of the list, as this server has applied it.
    changed: watch::Receiver<LogIndex>,
    /// Members being removed, so that the care below does not make them active again; `true`
    /// once their vote is to go.
    leaving: Mutex<BTreeMap<NodeId, bool>>,
    /// Held while the consensus is brought to what the list wants, and what that is, is worked
    /// out while holding it: nobody carries out what was true before somebody else's change.
    turn: tokio::sync::Mutex<()>,
    figures: Arc<Figures>,
    /// Since when this server, as leader, sees each member in its present condition.
    seen: Mutex<BTreeMap<NodeId, (bool, Instant)>>,
    /// Since when this server, as leader, has no answer from a member's log.
    silent_logs: Mutex<BTreeMap<NodeId, Instant>>,
}

/// Whether a member answers now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pulse {
    pub up: bool,
    /// Since its connection was last alive; `None` if it never was in this life of this server.
    pub silent_for: Option<Duration>,
}

impl Membership {
    pub fn new(
        consensus: Consensus,
        services: Arc<Services>,
        network: ctfs_net::Network,
        figures: Arc<Figures>,
        node: NodeId,
        away_after: Duration,
        changed: watch::Receiver<LogIndex>,
    ) -> Arc<Self> {
        Arc::new(Self {
            consensus,
            services,
            network,
            figures,
            node,
            away_after,
            changed,
            leaving: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            seen: Mutex::default(),
            silent_logs: Mutex::default(),
        })
    }

    /// Cares for the list until `stop` turns true.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut changed = self.changed.clone();
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                _ = changed.changed() => {}
                () = stop::requested(&mut stop) => return,
            }
            if !self.consensus.status().is_leader {
                self.seen.lock().clear();
                self.silent_logs.lock().clear();
                self.figures.note_unanswering(BTreeSet::new());
                continue;
            }
            if let Err(error) = self.care().await {
                tracing::debug!(%error, "care for the members did not finish");
            }
        }
    }

    /// Whether a member answers now, as this server sees it.
    pub fn pulse(&self, node: NodeId) -> Pulse {
        if node == self.node || self.network.peer(node).connected {
            return Pulse { up: true, silent_for: Some(Duration::ZERO) };
        }
        let silent_for = self.services.heard(node).map(|heard| match heard {
            // Lost this moment: the news of it is on its way.
            Heard::Connected => Duration::ZERO,
            Heard::LostAt(at) => at.elapsed(),
        });
        Pulse { up: false, silent_for }
    }

    /// Finds members whose log has not answered this leader for some time.
    fn note_silent_logs(&self) {
        let status = self.consensus.status();
        let silent = status.servers.iter().filter(|(node, server)| **node != self.node && !server.answers);
        let (now, mut since) = (Instant::now(), self.silent_logs.lock());
        *since = silent.map(|(node, _)| (*node, since.get(node).copied().unwrap_or(now))).collect();
        let found = since.iter().filter(|(_, since)| now - **since >= SILENT_LOG).map(|(node, _)| *node);
        self.figures.note_unanswering(found.collect());
    }

    async fn care(&self) -> Result<(), Problem> {
        self.note_silent_logs();
        self.mark_away(&self.members()?).await?;
        // Whoever has the turn works out what is wanted as well as this would.
        let Ok(turn) = self.turn.try_lock() else { return Ok(()) };
        self.follow_list(&turn).await?.map_err(|error| Problem::no_quorum(&error.to_string()))
    }

    /// Brings the consensus to what the list wants now.
    async fn follow_list(&self, _turn: &MutexGuard<'_, ()>) -> Result<Result<(), ProposeError>, Problem> {
        let leaving = self.leaving.lock().clone();
        let members: Vec<Member> = self.members()?.into_iter().filter(|m| leaving.get(&m.node) != Some(&true)).collect();
        let status = self.consensus.status();
        let voters = choose_voters(&members, &status.voters);
        let learners: BTreeSet<NodeId> = members.iter().map(|m| m.node).filter(|n| !voters.contains(n)).collect();
        if voters.is_empty() || (voters == status.voters && learners == status.learners) {
            return Ok(Ok(()));
        }
        tracing::info!(?voters, ?learners, "changing who votes");
        Ok(self.consensus.set_membership(voters, learners).await)
    }

    /// Proposes `Away` for whoever was silent too long and `Active` for whoever is back.
    async fn mark_away(&self, members: &[Member]) -> Result<(), Problem> {
        let now = Instant::now();
        let leaving = self.leaving.lock().clone();
        for member in members.iter().filter(|m| m.node != self.node && !leaving.contains_key(&m.node)) {
            // Without its log it learns of no change: as good as silent.
            let alive = self.pulse(member.node).up && self.figures.stopped(member.node).is_none();
            let since = {
                let mut seen = self.seen.lock();
                let entry = seen.entry(member.node).or_insert((alive, now));
                if entry.0 != alive {
                    *entry = (alive, now);
                }
                now - entry.1
            };
            let state = match (alive, member.state) {
                (false, MemberState::Active) if since >= self.away_after => MemberState::Away,
                (true, MemberState::Away) if since >= BACK_AFTER => MemberState::Active,
                _ => continue,
            };
            tracing::warn!(peer = %member.node, name = member.name, ?state, "a member changed its state");
            self.propose(Op::SetMemberState { node: member.node, state }).await?;
        }
        Ok(())
    }

    /// Whether most of the other members answer and say that this server is none.
    fn is_turned_away(&self) -> bool {
        let Ok(members) = self.members() else { return false };
        let others: Vec<_> = members.iter().filter(|m| m.node != self.node).map(|m| self.network.peer(m.node)).collect();
        let refusing = others.iter().filter(|peer| peer.refuses_us).count();
        refusing * 2 > others.len() && !others.iter().any(|peer| peer.connected)
    }

    /// Resolves when the others have turned this server away for some time.
    pub async fn turned_away(&self) {
        let mut since = None;
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            since = if self.is_turned_away() { since.or(Some(Instant::now())) } else { None };
            if since.is_some_and(|since: Instant| since.elapsed() > TURNED_AWAY_FOR) {
                return;
            }
        }
    }

    async fn propose(&self, op: Op) -> Result<(), Problem> {
        match self.consensus.propose(op).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(MetaError::NoSuchMember)) => Err(Problem::no_such_server("it")),
            Ok(Err(verdict)) => Err(Problem::internal(&verdict.to_string())),
            Err(error) => Err(Problem::no_quorum(&error.to_string())),
        }
    }

    fn members(&self) -> Result<Vec<Member>, Problem> {
        self.consensus.replica().read().members().map_err(|error| Problem::internal(&error.to_string()))
    }
}
