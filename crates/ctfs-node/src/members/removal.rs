//! `ctfs node remove`: a member goes for good, and nothing it held goes with it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use ctfs_consensus::ProposeError;
use ctfs_meta::{Member, MemberState, Op};
use ctfs_types::NodeId;
use parking_lot::Mutex;

use super::Membership;
use crate::{
    messages::{self, ServerFigures, service},
    node::placement_of,
    problem::{Code, Problem},
    repair::placement_mark,
};

/// How long `node remove` waits for copies to be made elsewhere before it says how many are left.
const EMPTY_DEADLINE: Duration = Duration::from_secs(60);
/// Removing a member may need an election besides.
const REMOVE_DEADLINE: Duration = Duration::from_secs(80);
/// How long a removal waits for its turn to change who votes, and for a new voter to catch up.
const VOTE_DEADLINE: Duration = Duration::from_secs(20);
/// Between two tries of something that is refused at once.
const TRY_AGAIN: Duration = Duration::from_millis(200);

impl Membership {
    /// Removes a member for good, from whichever server the operator asked; also this one.
    ///
    /// # Errors
    /// E0126 for an unknown name or number, E0119 without a majority, E0127 while it may hold the
    /// last copy of something and `force` is not set.
    pub async fn remove(&self, node: NodeId, force: bool) -> Result<(), Problem> {
        let deadline = Instant::now() + REMOVE_DEADLINE;
        tokio::select! {
            verdict = self.ask_until(node, force, deadline) => verdict,
            // Whoever leaves is cut off, often before the answer is there.
            () = self.left(), if node == self.node => Ok(()),
        }
    }

    async fn ask_until(&self, node: NodeId, force: bool, deadline: Instant) -> Result<(), Problem> {
        let mut asked_before = false;
        loop {
            match self.ask_leader(node, force, deadline).await {
                // An answer got lost, or another removal of the same server was under way.
                Err(problem) if problem.is(Code::NoSuchServer) && asked_before => return Ok(()),
                Err(problem) if problem.is(Code::NoQuorum) && Instant::now() < deadline => {
                    asked_before = true;
                    tokio::time::sleep(TRY_AGAIN).await;
                }
                verdict => return verdict,
            }
        }
    }

    async fn ask_leader(&self, node: NodeId, force: bool, deadline: Instant) -> Result<(), Problem> {
        let patience = deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        match self.consensus.status().leader {
            Some(leader) if leader == self.node => self.remove_here(node, force).await,
            Some(leader) => self
                .network
                .call(leader, service::REMOVE_MEMBER, messages::encode(&(node, force)), patience)
                .await
                .map_err(|error| Problem::no_quorum(&error.to_string()))
                .and_then(|reply| messages::decode(&reply).map_err(|why| Problem::internal(&why))?),
            None => Err(Problem::no_quorum("no server leads at the moment")),
        }
    }

    /// Resolves when this server is no member any more, as its own list or the others say.
    async fn left(&self) {
        let listed = || self.members().map_or(true, |members| members.iter().any(|member| member.node == self.node));
        let unlisted = async {
            while listed() {
                tokio::time::sleep(TRY_AGAIN).await;
            }
        };
        tokio::select! {
            () = unlisted => {}
            () = self.turned_away() => {}
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
        let was_up = self.pulse(node).up;
        let leaving = Leaving::announce(&self.leaving, node)?;
        if !force {
            self.empty(node, was_up).await?;
        }
        leaving.vote_goes();
        self.take_vote().await?;
        match self.propose(Op::RemoveMember { node }).await {
            Err(problem) if problem.is(Code::NoSuchServer) => Ok(()),
            other => other,
        }
    }

    /// Waits for its turn and brings the consensus to the list without whoever is leaving.
    async fn take_vote(&self) -> Result<(), Problem> {
        let deadline = tokio::time::Instant::now() + VOTE_DEADLINE;
        let late = |why: &str| Problem::no_quorum(why);
        loop {
            let followed = {
                let turn = tokio::time::timeout_at(deadline, self.turn.lock());
                let turn = turn.await.map_err(|_| late("another change of who votes does not end"))?;
                self.follow_list(&turn).await?
            };
            match followed {
                Err(ProposeError::ChangeInProgress | ProposeError::CatchingUp { .. }) if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(TRY_AGAIN).await;
                }
                followed => return followed.map_err(|error| late(&error.to_string())),
            }
        }
    }

    /// Takes the member out of the placement and waits until the others hold what it held.
    async fn empty(&self, node: NodeId, was_up: bool) -> Result<(), Problem> {
        let deadline = Instant::now() + EMPTY_DEADLINE;
        let mut placed_elsewhere = false;
        loop {
            // Everybody walks again after each change of the list, so a walk since the last one will
            // come; one since any later index need not.
            let since = *self.changed.borrow();
            let members = self.members()?;
            match members.iter().find(|member| member.node == node).map(|member| member.state) {
                None => return Ok(()),
                Some(MemberState::Away) if placed_elsewhere => {}
                // Also when a leader in between took it back.
                Some(_) => {
                    self.propose(Op::SetMemberState { node, state: MemberState::Away }).await?;
                    placed_elsewhere = true;
                    continue;
                }
            }
            if !self.consensus.status().is_leader {
                return Err(Problem::no_quorum("another server leads now"));
            }
            if !was_up && self.pulse(node).up {
                return Err(Problem::back_again());
            }
            self.figures.gather().await;
            let left = Left::of(&members, node, since.0, |node| self.figures.latest(node));
            match left {
                None => return Err(Problem::nobody_to_keep()),
                Some(left) if left.missing == 0 && left.walking.is_empty() => return Ok(()),
                Some(left) if Instant::now() > deadline => return Err(Problem::would_lose(left.missing, &left.walking)),
                Some(_) => tokio::time::sleep(TRY_AGAIN).await,
            }
        }
    }
}

/// What the others still lack of what a leaving member held.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    missing: u64,
    /// Names of those who have not looked since the placement is without it.
    walking: Vec<String>,
}

impl Left {
    /// `since` is the log index of the last change of the list, by which the member was away. `None`: nobody else is there to keep
    /// anything.
    fn of(members: &[Member], leaver: NodeId, since: u64, figures: impl Fn(NodeId) -> Option<ServerFigures>) -> Option<Self> {
        let placement = placement_mark(placement_of(members).servers());
        let keepers: Vec<&Member> = members.iter().filter(|m| m.node != leaver && m.state == MemberState::Active).collect();
        if keepers.is_empty() {
            return None;
        }
        let mut left = Self { missing: 0, walking: Vec::new() };
        for member in keepers {
            match figures(member.node) {
                // An earlier walk for the same servers knew nothing of what the leaver took since.
                Some(figures) if figures.walked == placement && figures.walked_at >= since => left.missing += figures.missing,
                _ => left.walking.push(member.name.clone()),
            }
        }
        Some(left)
    }
}

/// A member that is being removed, until this is dropped.
struct Leaving<'a> {
    all: &'a Mutex<BTreeMap<NodeId, bool>>,
    node: NodeId,
}

impl<'a> Leaving<'a> {
    fn announce(all: &'a Mutex<BTreeMap<NodeId, bool>>, node: NodeId) -> Result<Self, Problem> {
        let mut leaving = all.lock();
        if leaving.contains_key(&node) {
            return Err(Problem::no_quorum("its removal is under way already"));
        }
        leaving.insert(node, false);
        Ok(Self { all, node })
    }

    fn vote_goes(&self) {
        self.all.lock().insert(self.node, true);
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.all.lock().remove(&self.node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::voters::tests::member;

    const LEAVER: NodeId = NodeId(3);

    fn three() -> Vec<Member> {
        let mut members: Vec<Member> = (1..=3).map(|n| member(n, "z", MemberState::Active)).collect();
        members[2].state = MemberState::Away;
        members
    }

    fn walked(members: &[Member], walked_at: u64, missing: u64) -> ServerFigures {
        ServerFigures { walked: placement_mark(placement_of(members).servers()), walked_at, missing, ..ServerFigures::default() }
    }

    #[test]
    fn a_server_is_empty_once_all_others_have_walked_since_it_left_the_placement() {
        let members = three();
        let all = Left::of(&members, LEAVER, 10, |_| Some(walked(&members, 10, 0))).unwrap();
        assert_eq!(all, Left { missing: 0, walking: vec![] });
        let lacking = Left::of(&members, LEAVER, 10, |node| Some(walked(&members, 11, node.0))).unwrap();
        assert_eq!(lacking.missing, 1 + 2);
    }

    #[test]
    fn a_walk_for_the_same_servers_from_before_the_leaver_joined_does_not_count() {
        let members = three();
        let left = Left::of(&members, LEAVER, 10, |node| Some(walked(&members, if node.0 == 2 { 9 } else { 10 }, 0))).unwrap();
        assert_eq!(left.walking, ["s2"]);
    }

    #[test]
    fn whoever_is_not_heard_or_walked_for_other_servers_has_not_walked() {
        let (members, mut with_leaver) = (three(), three());
        with_leaver[2].state = MemberState::Active;
        let left = Left::of(&members, LEAVER, 0, |node| (node.0 == 1).then(|| walked(&with_leaver, 99, 0))).unwrap();
        assert_eq!(left.walking, ["s1", "s2"]);
    }

    #[test]
    fn the_last_server_that_is_there_is_never_empty() {
        let mut members = three();
        members[0].state = MemberState::Away;
        members[1].state = MemberState::Away;
        assert_eq!(Left::of(&members, LEAVER, 0, |_| Some(walked(&members, 99, 0))), None);
    }

    #[test]
    fn one_server_is_removed_by_one_at_a_time_and_stops_leaving_whatever_happens() {
        let all = Mutex::default();
        let leaving = Leaving::announce(&all, LEAVER).unwrap();
        assert!(Leaving::announce(&all, LEAVER).err().unwrap().is(Code::NoQuorum));
        leaving.vote_goes();
        assert_eq!(all.lock().get(&LEAVER), Some(&true));
        drop(leaving);
        assert!(all.lock().is_empty());
    }
}
