//! Founding a volume, and who votes and who learns.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use ctfs_meta::Op;
use ctfs_types::NodeId;
use openraft::{
    ChangeMembers, EmptyNode,
    error::{ChangeMembershipError, ClientWriteError, InitializeError, RaftError},
    raft::ClientWriteResponse,
};
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    core::{Core, Metrics},
    error::ProposeError,
    raft_types::{TypeConfig, node_id, raft_node},
};

/// A server this close votes: the joint change itself then waits for little.
const PROMOTION_LAG_ENTRIES: u64 = 64;
/// A new voter gets this long to catch up before the change is given up, to be asked for again:
/// nobody else can change the membership meanwhile, also not whoever wants to remove a server
/// that will never catch up.
const PROMOTION_PATIENCE: Duration = Duration::from_secs(1);

type Changed = Result<ClientWriteResponse<TypeConfig>, RaftError<u64, ClientWriteError<u64, EmptyNode>>>;

impl Core {
    /// Makes this server the only voter of a new volume and proposes `command`. Goes on where an
    /// earlier try was interrupted.
    pub async fn found(self: &Arc<Self>, command: Op) -> Result<(), ProposeError> {
        let me = BTreeSet::from([raft_node(self.me)]);
        match self.raft.initialize(me).await {
            // NotAllowed: it was initialised before. If so by somebody else, the namespace refuses.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(RaftError::APIError(InitializeError::NotInMembers(error))) => {
                return Err(ProposeError::BadMembership(error.to_string()));
            }
            Err(RaftError::Fatal(fatal)) => return Err(ProposeError::Stopped(fatal.to_string())),
        }
        self.propose(command).await?.map(drop).map_err(ProposeError::Refused)
    }

    /// Brings the membership to exactly these voters and learners; see
    /// [`crate::Consensus::set_membership`].
    pub async fn set_membership(
        &self,
        voters: BTreeSet<NodeId>,
        learners: BTreeSet<NodeId>,
    ) -> Result<(), ProposeError> {
        let started = Instant::now();
        let deadline = started + self.settings.timings.propose_deadline;
        if voters.is_empty() {
            return Err(ProposeError::BadMembership("nobody would vote".to_owned()));
        }
        if !self.leads() {
            return Err(ProposeError::NotLeader { leader: self.leader() });
        }
        let Ok(_alone) = self.changing.try_lock() else { return Err(ProposeError::ChangeInProgress) };
        let voters: BTreeSet<u64> = voters.into_iter().map(raft_node).collect();
        let wanted: BTreeSet<u64> = voters.iter().copied().chain(learners.into_iter().map(raft_node)).collect();

        let known = |metrics: &Metrics| metrics.membership_config.nodes().map(|(&node, _)| node).collect::<BTreeSet<u64>>();
        let before = known(&self.metrics());
        let missing: BTreeMap<u64, EmptyNode> =
            wanted.difference(&before).map(|&node| (node, EmptyNode::default())).collect();
        if !missing.is_empty() {
            let adding = self.raft.change_membership(ChangeMembers::AddNodes(missing), true);
            self.change(adding, started, deadline).await?;
        }

        // More than once if the last leader left a joint membership behind.
        while self.metrics().membership_config.membership().get_joint_config().as_slice() != [voters.clone()] {
            self.await_caught_up(&voters, deadline).await?;
            let change = ChangeMembers::ReplaceAllVoters(voters.clone());
            self.change(self.raft.change_membership(change, true), started, deadline).await?;
        }

        let leaving: BTreeSet<u64> = known(&self.metrics()).difference(&wanted).copied().collect();
        if !leaving.is_empty() {
            self.remove(leaving, started, deadline).await?;
        }
        Ok(())
    }

    /// Removes learners, once they hold no lease: the next leader would not know of it.
    async fn remove(&self, leaving: BTreeSet<u64>, started: Instant, deadline: Instant) -> Result<(), ProposeError> {
        let nodes: BTreeSet<NodeId> = leaving.iter().copied().map(node_id).collect();
        let not_leader = || ProposeError::NotLeader { leader: self.leader() };
        let leased_until = self.ledger.lock().as_mut().ok_or_else(not_leader)?.leave(&nodes);
        if let Some(until) = leased_until {
            sleep(until.since(self.patient.now())).await;
        }
        let removal = self.raft.change_membership(ChangeMembers::RemoveNodes(leaving), false);
        let removed = self.change(removal, started, deadline).await;
        if removed.is_err()
            && let Some(ledger) = self.ledger.lock().as_mut()
        {
            ledger.stay(&nodes);
        }
        removed
    }

    /// Waits until every wanted voter has nearly the whole log.
    async fn await_caught_up(&self, voters: &BTreeSet<u64>, deadline: Instant) -> Result<(), ProposeError> {
        let limit = PROMOTION_LAG_ENTRIES.min(self.settings.limits.replication_lag);
        let slowest = |metrics: &Metrics| {
            let current: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
            let lags = Self::lags(metrics);
            let lag = |node: &u64| lags.get(node).map_or(u64::MAX, |&(_, lag)| lag);
            voters.difference(&current).map(|node| (lag(node), *node)).max().filter(|&(lag, _)| lag > limit)
        };
        let mut metrics = self.raft.metrics();
        let ready = |metrics: &Metrics| metrics.replication.is_none() || slowest(metrics).is_none();
        let until = deadline.min(Instant::now() + PROMOTION_PATIENCE);
        // Whether in time or not, the last look decides.
        let _ = timeout_at(until, metrics.wait_for(ready)).await.map(|found| found.map(drop));
        let metrics = self.metrics();
        if metrics.replication.is_none() {
            return Err(ProposeError::NotLeader { leader: self.leader() });
        }
        match slowest(&metrics) {
            None => Ok(()),
            Some((entries, node)) => Err(ProposeError::CatchingUp { node: node_id(node), entries }),
        }
    }

    async fn change(
        &self,
        change: impl Future<Output = Changed>,
        started: Instant,
        deadline: Instant,
    ) -> Result<(), ProposeError> {
        match timeout_at(deadline, change).await {
            Ok(Ok(_)) => Ok(()),
            Err(_) => Err(ProposeError::NoQuorum { waited: started.elapsed() }),
            Ok(Err(RaftError::Fatal(fatal))) => Err(ProposeError::Stopped(fatal.to_string())),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(other)))) => {
                Err(ProposeError::NotLeader { leader: other.leader_id.map(node_id) })
            }
            Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error)))) => Err(match error {
                ChangeMembershipError::InProgress(_) => ProposeError::ChangeInProgress,
                ChangeMembershipError::EmptyMembership(_) | ChangeMembershipError::LearnerNotFound(_) => {
                    ProposeError::BadMembership(error.to_string())
                }
            }),
        }
    }

    fn metrics(&self) -> Metrics {
        self.raft.metrics().borrow().clone()
    }
}
