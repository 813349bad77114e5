//! Who votes, who is away, who is gone: the leader's care for the list of members.
//!
//! Every server runs [`Membership::run`]; it acts only while its server leads. The list itself
//! is replicated state; the consensus membership follows it here, never the other way round.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use ctfs_consensus::Consensus;
use ctfs_meta::{Member, MemberState, MetaError, Op};
use ctfs_types::NodeId;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    stop,
    messages::{self, service},
    problem::{Code, Problem},
    node::placement_of,
    repair::placement_mark,
    report::Figures,
    services::{Heard, Services},
};

/// How often the leader looks at the list without being told of a change.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A server that came back counts as back after this long, so that flapping moves no chunks.
const BACK_AFTER: Duration = Duration::from_secs(2);
/// How long `node remove` waits for copies to be made elsewhere before it says how many are left.
const EMPTY_DEADLINE: Duration = Duration::from_secs(60);
/// Removing a member may need an election besides.
const REMOVE_DEADLINE: Duration = Duration::from_secs(80);

pub struct Membership {
    consensus: Consensus,
    services: Arc<Services>,
    network: ctfs_net::Network,
    node: NodeId,
    away_after: Duration,
    /// Members being removed, so that the care below does not make them active again; `true`
    /// once their vote is to go.
    leaving: Mutex<BTreeMap<NodeId, bool>>,
    figures: Arc<Figures>,
    /// Since when this server, as leader, sees each member in its present condition.
    seen: Mutex<BTreeMap<NodeId, (bool, Instant)>>,
}

/// How many servers vote: a majority of an odd number survives the most losses per vote.
///
/// Two servers both vote: the loss of either stops changes, but a change that was answered is
/// on both. With one voter its loss would lose answered changes.
pub fn voters_wanted(servers: usize) -> usize {
    match servers {
        0..=2 => servers,
        3 | 4 => 3,
        _ => 5,
    }
}

/// Chooses the voters among `members`, keeping present ones and spreading over zones.
///
/// A member that is away votes only when there is nobody to replace it.
pub fn choose_voters(members: &[Member], voting: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
    let wanted = voters_wanted(members.len());
    let mut chosen: BTreeSet<NodeId> = BTreeSet::new();
    let mut per_zone: BTreeMap<&str, usize> = BTreeMap::new();
    let mut left: Vec<&Member> = members.iter().collect();
    while chosen.len() < wanted && !left.is_empty() {
        let (place, best) = left
            .iter()
            .enumerate()
            .min_by_key(|(_, member)| {
                (
                    member.state == MemberState::Away,
                    // A zone more counts for more than leaving things as they are only among
                    // members that do not vote yet: moving votes costs a round of changes.
                    !voting.contains(&member.node),
                    per_zone.get(member.zone.as_str()).copied().unwrap_or(0),
                    member.joined,
                    member.node,
                )
            })
            .map(|(place, member)| (place, *member))
            .expect("the list is not empty");
        *per_zone.entry(&best.zone).or_default() += 1;
        chosen.insert(best.node);
        left.remove(place);
    }
    chosen
}

impl Membership {
    pub fn new(
        consensus: Consensus,
        services: Arc<Services>,
        network: ctfs_net::Network,
        figures: Arc<Figures>,
        node: NodeId,
        away_after: Duration,
    ) -> Arc<Self> {
        Arc::new(Self { consensus, services, network, figures, node, away_after, leaving: Mutex::default(), seen: Mutex::default() })
    }

    /// Cares for the list until `stop` turns true. `changed` fires when the list changed.
    pub async fn run(self: Arc<Self>, mut changed: watch::Receiver<u64>, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                _ = changed.changed() => {}
                () = stop::requested(&mut stop) => return,
            }
            if !self.consensus.status().is_leader {
                self.seen.lock().clear();
                continue;
            }
            if let Err(error) = self.care().await {
                tracing::debug!(%error, "care for the members did not finish");
            }
        }
    }

    async fn care(&self) -> Result<(), Problem> {
        let members = self.members()?;
        self.mark_away(&members).await?;
        let members = self.members()?;
        let leaving = self.leaving.lock().clone();
        let staying: Vec<Member> = members.into_iter().filter(|m| leaving.get(&m.node) != Some(&true)).collect();
        self.vote(&staying).await
    }

    async fn vote(&self, members: &[Member]) -> Result<(), Problem> {
        let status = self.consensus.status();
        let voters = choose_voters(members, &status.voters);
        let learners: BTreeSet<NodeId> = members.iter().map(|m| m.node).filter(|n| !voters.contains(n)).collect();
        if voters.is_empty() || (voters == status.voters && learners == status.learners) {
            return Ok(());
        }
        tracing::info!(?voters, ?learners, "changing who votes");
        self.consensus.set_membership(voters, learners).await.map_err(|error| Problem::no_quorum(&error.to_string()))
    }

    /// Proposes `Away` for whoever was silent too long and `Active` for whoever is back.
    async fn mark_away(&self, members: &[Member]) -> Result<(), Problem> {
        let now = Instant::now();
        let leaving = self.leaving.lock().clone();
        for member in members.iter().filter(|m| m.node != self.node && !leaving.contains_key(&m.node)) {
            let alive = self.is_up(member.node);
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

    /// Removes a member for good, from whichever server the operator asked.
    ///
    /// # Errors
    /// E0126 for an unknown name or number, E0119 without a majority, E0127 while it may hold the
    /// last copy of something and `force` is not set.
    pub async fn remove(&self, node: NodeId, force: bool) -> Result<(), Problem> {
        let deadline = Instant::now() + REMOVE_DEADLINE;
        loop {
            let status = self.consensus.status();
            let verdict = match status.leader {
                Some(leader) if leader == self.node => self.remove_here(node, force).await,
                Some(leader) => self
                    .network
                    .call(leader, service::REMOVE_MEMBER, messages::encode(&(node, force)), REMOVE_DEADLINE)
                    .await
                    .map_err(|error| Problem::no_quorum(&error.to_string()))
                    .and_then(|reply| messages::decode(&reply).map_err(|why| Problem::internal(&why))?),
                None => Err(Problem::no_quorum("no server leads at the moment")),
            };
            match verdict {
                Err(problem) if problem.is(Code::NoQuorum) && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                verdict => return verdict,
            }
        }
    }

    /// The leader's part: first its chunks are placed elsewhere and seen to be there, then it
    /// loses its vote, then its place in the list; whoever leaves the list is cut off at once and
    /// could neither hand out a chunk nor agree to its own removal.
    pub async fn remove_here(&self, node: NodeId, force: bool) -> Result<(), Problem> {
        let members = self.members()?;
        if !members.iter().any(|m| m.node == node) {
            return Err(Problem::no_such_server(&node.to_string()));
        }
        if members.len() == 1 {
            return Err(Problem::last_server());
        }
        // Without a majority nothing can be removed, and a half-done removal would surprise
        // whoever brings the server back instead.
        if !self.consensus.leased() {
            return Err(Problem::no_majority_to_remove());
        }
        let was_up = self.is_up(node);
        self.leaving.lock().insert(node, false);
        let staying: Vec<Member> = members.into_iter().filter(|m| m.node != node).collect();
        let result = async {
            if !force {
                self.empty(node, &staying, was_up).await?;
            }
            self.leaving.lock().insert(node, true);
            self.vote(&staying).await?;
            match self.propose(Op::RemoveMember { node }).await {
                Err(problem) if problem.is(Code::NoSuchServer) => Ok(()),
                other => other,
            }
        }
        .await;
        self.leaving.lock().remove(&node);
        result
    }

    fn is_up(&self, node: NodeId) -> bool {
        node == self.node || matches!(self.services.heard(node), Some(Heard::Connected)) || self.network.peer(node).connected
    }

    /// Takes the member out of the placement and waits until the others hold what it held.
    async fn empty(&self, node: NodeId, staying: &[Member], was_up: bool) -> Result<(), Problem> {
        self.propose(Op::SetMemberState { node, state: MemberState::Away }).await?;
        let without = placement_mark(placement_of(&self.members()?).servers());
        let deadline = Instant::now() + EMPTY_DEADLINE;
        loop {
            if !was_up && self.is_up(node) {
                return Err(Problem::back_again());
            }
            let mut left = 0;
            let mut walking = Vec::new();
            for member in staying.iter().filter(|m| m.state == MemberState::Active) {
                let figures = if member.node == self.node {
                    Some(self.figures.local())
                } else {
                    self.figures.of(member.node).map(|(_, figures)| figures)
                };
                match figures {
                    Some(figures) if figures.walked == without => left += figures.missing,
                    _ => walking.push(member.name.clone()),
                }
            }
            if left == 0 && walking.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Problem::would_lose(left, &walking));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
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

#[cfg(test)]
mod tests {
    use ctfs_types::{Incarnation, Timestamp};

    use super::*;

    fn member(node: u64, zone: &str, state: MemberState) -> Member {
        Member {
            node: NodeId(node),
            name: format!("s{node}"),
            zone: zone.into(),
            key: [node as u8; 32],
            addresses: vec![],
            capacity: 1,
            state,
            incarnation: Incarnation(1),
            version: String::new(),
            joined: Timestamp::new(node as i64, 0),
        }
    }

    fn nodes(numbers: &[u64]) -> BTreeSet<NodeId> {
        numbers.iter().copied().map(NodeId).collect()
    }

    #[test]
    fn one_two_three_three_five_servers_vote() {
        let wanted: Vec<usize> = (0..8).map(voters_wanted).collect();
        assert_eq!(wanted, [0, 1, 2, 3, 3, 5, 5, 5]);
    }

    #[test]
    fn a_lost_voter_is_replaced_by_a_learner() {
        let mut members: Vec<Member> = (1..=4).map(|n| member(n, "z", MemberState::Active)).collect();
        let voting = nodes(&[1, 2, 3]);
        assert_eq!(choose_voters(&members, &voting), voting);
        members[1].state = MemberState::Away;
        assert_eq!(choose_voters(&members, &voting), nodes(&[1, 3, 4]));
    }

    #[test]
    fn with_nobody_to_replace_it_a_lost_voter_keeps_its_vote() {
        let mut members: Vec<Member> = (1..=3).map(|n| member(n, "z", MemberState::Active)).collect();
        members[2].state = MemberState::Away;
        assert_eq!(choose_voters(&members, &nodes(&[1, 2, 3])), nodes(&[1, 2, 3]));
    }

    #[test]
    fn new_voters_come_from_zones_without_one() {
        let members = vec![
            member(1, "a", MemberState::Active),
            member(2, "a", MemberState::Active),
            member(3, "a", MemberState::Active),
            member(4, "b", MemberState::Active),
            member(5, "c", MemberState::Active),
        ];
        let four = choose_voters(&members[..4], &nodes(&[1]));
        assert!(four.contains(&NodeId(4)), "{four:?}");
    }
}
