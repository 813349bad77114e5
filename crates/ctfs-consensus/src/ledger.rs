//! The leader's book of read leases: who must have applied a change before it is answered.
//!
//! Pure: time comes in as an argument. The rules it keeps are those of the coherence notes:
//! applied is not visible (2), nobody is waited for longer than one lease and who does not
//! acknowledge is not renewed (6), a lease ends before a new leader may answer without it (11),
//! and a readmitted server counts for the leader at once, for itself after applying what was
//! answered without it (18).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ctfs_types::{
    Incarnation, LogIndex, NodeId,
    rules::{Rule, keeps},
};

use crate::{boottime::PatientTime, messages::Grant, settings::Timings};

/// A server this far behind is not admitted: everybody would wait while it applies them.
const ADMISSION_LAG_ENTRIES: u64 = 256;

/// Readmission waits this long after the first lapse, and doubles.
const READMISSION_PAUSE_MIN: Duration = Duration::from_secs(1);
const READMISSION_PAUSE_MAX: Duration = Duration::from_secs(300);

/// The leases of one leader's term.
#[derive(Debug)]
pub(crate) struct Ledger {
    pub term: u64,
    pub opened: PatientTime,
    /// Every change an earlier leader may have answered is at or below this.
    floor: LogIndex,
    /// The leader has applied up to here.
    applied: LogIndex,
    visible: LogIndex,
    peers: BTreeMap<NodeId, Peer>,
    lease: Duration,
    lease_used: Duration,
    pause_min: Duration,
}

#[derive(Debug, Clone)]
struct Peer {
    incarnation: Incarnation,
    acked: LogIndex,
    /// While set, answers wait for this server.
    counted_until: Option<PatientTime>,
    /// It has not acknowledged this index, which the leader applied at that time.
    owes: Option<(LogIndex, PatientTime)>,
    heard: Option<PatientTime>,
    admitted: PatientTime,
    pause: Duration,
    paused_until: PatientTime,
    /// What the leader had applied when the last lease lapsed: readmission needs that much, so
    /// that a server that is stuck is not waited for again and again.
    missed: LogIndex,
    /// On its way out of the cluster: no lease any more.
    leaving: bool,
}

impl Peer {
    fn new(now: PatientTime) -> Self {
        Self {
            incarnation: Incarnation(0),
            acked: LogIndex(0),
            counted_until: None,
            owes: None,
            heard: None,
            admitted: now,
            pause: Duration::ZERO,
            paused_until: now,
            missed: LogIndex(0),
            leaving: false,
        }
    }
}

/// One server as the leader's book has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standing {
    pub acked: LogIndex,
    pub leased: bool,
    pub heard: Option<PatientTime>,
}

impl Ledger {
    /// Opens the book of a leader elected at `now` or before: whoever may hold a lease of an
    /// earlier leader is counted until that has ended.
    ///
    /// `last_log` is the leader's last entry at or after its election.
    pub fn open(
        term: u64,
        members: &BTreeSet<NodeId>,
        last_log: LogIndex,
        applied: LogIndex,
        visible: LogIndex,
        timings: &Timings,
        now: PatientTime,
    ) -> Self {
        let until = now + timings.take_over();
        let peer = Peer { counted_until: Some(until), owes: Some((last_log, now)), ..Peer::new(now) };
        Self {
            term,
            opened: now,
            floor: last_log,
            applied,
            visible,
            peers: members.iter().map(|&node| (node, peer.clone())).collect(),
            lease: timings.lease,
            lease_used: timings.lease_used,
            pause_min: READMISSION_PAUSE_MIN.min(timings.lease),
        }
    }

    /// Everything answered is at or below this; everything at or below may be answered.
    pub fn visible(&self) -> LogIndex {
        self.visible
    }

    /// Takes the members of the committed membership. Who left is counted until its lease ends.
    pub fn members(&mut self, members: &BTreeSet<NodeId>, now: PatientTime) {
        for &node in members {
            self.peers.entry(node).or_insert_with(|| Peer::new(now));
        }
        self.peers.retain(|node, peer| members.contains(node) || peer.counted_until.is_some());
        for (node, peer) in &mut self.peers {
            if !members.contains(node) {
                peer.leaving = true;
            }
        }
    }

    /// The leader has applied `index`.
    pub fn applied(&mut self, index: LogIndex, now: PatientTime) {
        self.applied = self.applied.max(index);
        for peer in self.peers.values_mut() {
            if peer.owes.is_none() && peer.acked < index {
                peer.owes = Some((index, now));
            }
        }
        self.expire(now);
    }

    /// Server `node` has applied and invalidated up to `index` and asks for its lease. `quorum`
    /// is when the last message was sent that a quorum of voters acknowledged.
    pub fn acked(
        &mut self,
        node: NodeId,
        incarnation: Incarnation,
        index: LogIndex,
        quorum: Option<PatientTime>,
        now: PatientTime,
    ) -> Option<Grant> {
        self.expire(now);
        let applied = self.applied;
        let peer = self.peers.get_mut(&node)?;
        peer.heard = Some(now);
        if peer.incarnation == incarnation {
            peer.acked = peer.acked.max(index);
        } else {
            // A new life may stand behind the old one, whose store lost its tail.
            peer.incarnation = incarnation;
            peer.acked = index;
        }
        if peer.owes.is_some_and(|(owed, _)| peer.acked >= owed) {
            peer.owes = None;
        }
        if peer.owes.is_none() && peer.acked < applied {
            peer.owes = Some((applied, now));
        }
        let grant = self.grant(node, quorum, now);
        self.advance();
        grant
    }

    fn grant(&mut self, node: NodeId, quorum: Option<PatientTime>, now: PatientTime) -> Option<Grant> {
        let from = self.visible.max(self.floor);
        let peer = self.peers.get_mut(&node)?;
        let near = peer.acked.0 + ADMISSION_LAG_ENTRIES >= self.applied.0 && peer.acked >= peer.missed;
        let admitted = peer.counted_until.is_some();
        if peer.leaving || (!admitted && (!near || now < peer.paused_until)) {
            return None;
        }
        if let (false, Some((_, since))) = (admitted, &mut peer.owes) {
            *since = now;
        }
        // Nobody is waited for longer than a lease after the change that it owes.
        let patience = peer.owes.map_or(now + self.lease, |(_, since)| since + self.lease);
        let counted = (now + self.lease).min(patience);
        // Kernels may keep an answer for as long as a lease is not used: so much always lies between
        // the end of its use and the moment when nobody waits for its holder any more.
        let unused = self.lease - self.lease_used;
        let quorum_acked = if keeps(Rule::LeasesHangOnQuorum) { quorum } else { Some(now) };
        let usable = (now + self.lease_used).min(quorum_acked? + self.lease_used).min(patience - unused);
        if usable <= now {
            return None;
        }
        if !admitted {
            peer.admitted = now;
        }
        peer.counted_until = peer.counted_until.max(Some(counted));
        Some(Grant { usable: usable.since(now), from })
    }

    /// Lets go whose lease has ended.
    pub fn expire(&mut self, now: PatientTime) {
        for (node, peer) in &mut self.peers {
            if peer.counted_until.is_none_or(|until| now < until) {
                continue;
            }
            peer.counted_until = None;
            // A server that held out long is not flapping.
            let steady = now.since(peer.admitted) >= self.lease * 20;
            peer.pause = if steady { self.pause_min } else { (peer.pause * 2).clamp(self.pause_min, READMISSION_PAUSE_MAX) };
            peer.paused_until = now + peer.pause;
            peer.missed = self.applied;
            tracing::info!(%node, acked = %peer.acked, "read lease lapsed; changes no longer wait for this server");
        }
        self.advance();
    }

    fn advance(&mut self) {
        let counted = self.peers.values().filter(|peer| peer.counted_until.is_some());
        let slowest = counted.map(|peer| peer.acked).min().unwrap_or(self.applied);
        self.visible = self.visible.max(slowest.min(self.applied));
    }

    /// Grants `nodes` no lease any more; returns when the last of theirs ends.
    pub fn leave(&mut self, nodes: &BTreeSet<NodeId>) -> Option<PatientTime> {
        let leaving = self.peers.iter_mut().filter(|(node, _)| nodes.contains(node));
        leaving.filter_map(|(_, peer)| { peer.leaving = true; peer.counted_until }).max()
    }

    /// Takes [`Self::leave`] back.
    pub fn stay(&mut self, nodes: &BTreeSet<NodeId>) {
        self.peers.iter_mut().filter(|(node, _)| nodes.contains(node)).for_each(|(_, peer)| peer.leaving = false);
    }

    pub fn standing(&self, node: NodeId) -> Option<Standing> {
        let peer = self.peers.get(&node)?;
        Some(Standing { acked: peer.acked, leased: peer.counted_until.is_some(), heard: peer.heard })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);
    const LIFE: Incarnation = Incarnation(1);

    fn at(millis: u64) -> PatientTime {
        PatientTime::at(Duration::from_millis(1_000_000 + millis))
    }

    /// Elected at 0 with 10 entries, all members acknowledged at 10 ms.
    fn steady() -> Ledger {
        let members = BTreeSet::from([A, B, C]);
        let mut ledger = Ledger::open(1, &members, LogIndex(10), LogIndex(10), LogIndex(0), &Timings::default(), at(0));
        for node in [A, B, C] {
            assert!(ledger.acked(node, LIFE, LogIndex(10), Some(at(10)), at(10)).is_some());
        }
        assert_eq!(ledger.visible(), LogIndex(10));
        ledger
    }

    fn ack(ledger: &mut Ledger, node: NodeId, index: u64, now: u64) -> Option<Grant> {
        ledger.acked(node, LIFE, LogIndex(index), Some(at(now)), at(now))
    }

    #[test]
    fn a_change_is_visible_once_every_leased_server_has_it() {
        let mut ledger = steady();
        ledger.applied(LogIndex(11), at(20));
        ack(&mut ledger, A, 11, 20);
        ack(&mut ledger, B, 11, 21);
        assert_eq!(ledger.visible(), LogIndex(10));
        ack(&mut ledger, C, 11, 22);
        assert_eq!(ledger.visible(), LogIndex(11));
    }

    #[test]
    fn a_silent_server_delays_a_change_by_at_most_one_lease() {
        let mut ledger = steady();
        ledger.applied(LogIndex(11), at(100));
        ack(&mut ledger, A, 11, 100);
        ack(&mut ledger, B, 11, 100);
        ledger.expire(at(3009));
        assert_eq!(ledger.visible(), LogIndex(10));
        ack(&mut ledger, A, 11, 2000);
        ack(&mut ledger, B, 11, 2000);
        ledger.expire(at(3011));
        assert_eq!(ledger.visible(), LogIndex(11));
    }

    #[test]
    fn who_renews_without_acknowledging_is_not_waited_for_longer() {
        let mut ledger = steady();
        ledger.applied(LogIndex(11), at(100));
        for now in (100..3100).step_by(500) {
            ack(&mut ledger, A, 11, now);
            ack(&mut ledger, B, 11, now);
            if let Some(grant) = ack(&mut ledger, C, 10, now) {
                assert!(at(now) + grant.usable <= at(2100), "C's kernel would show it after C is let go");
            }
            assert_eq!(ledger.visible(), LogIndex(10));
        }
        ledger.expire(at(3101));
        assert_eq!(ledger.visible(), LogIndex(11));
        assert_eq!(ack(&mut ledger, C, 10, 3200), None);
    }

    #[test]
    fn a_readmitted_server_must_apply_what_was_answered_without_it() {
        let mut ledger = steady();
        ledger.applied(LogIndex(12), at(100));
        ack(&mut ledger, A, 12, 2900);
        ack(&mut ledger, B, 12, 2900);
        ledger.expire(at(3200));
        assert_eq!(ledger.visible(), LogIndex(12));
        ledger.applied(LogIndex(13), at(3250));
        ack(&mut ledger, A, 13, 3250);
        ack(&mut ledger, B, 13, 3250);
        assert_eq!(ack(&mut ledger, C, 11, 3300), None, "one second of pause after a lapse");
        assert_eq!(ack(&mut ledger, C, 11, 4300), None, "still lacks what it let lapse");
        let grant = ack(&mut ledger, C, 12, 4300).expect("readmitted");
        assert_eq!(grant.from, LogIndex(13));
        // It counts for the leader at once.
        ledger.applied(LogIndex(14), at(4301));
        ack(&mut ledger, A, 14, 4302);
        ack(&mut ledger, B, 14, 4302);
        assert_eq!(ledger.visible(), LogIndex(13));
    }

    #[test]
    fn a_flapping_server_is_readmitted_ever_later() {
        let mut ledger = steady();
        let (mut now, mut pauses) = (100, Vec::new());
        for index in 11..16 {
            ledger.applied(LogIndex(index), at(now));
            ack(&mut ledger, C, index - 1, now);
            now += 3100;
            ledger.expire(at(now));
            let lapsed = now;
            while ack(&mut ledger, C, index, now).is_none() {
                now += 100;
            }
            pauses.push((now - lapsed) / 1000);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16]);
    }

    #[test]
    fn a_server_far_behind_is_not_admitted() {
        let mut ledger = steady();
        ledger.applied(LogIndex(5000), at(100));
        ledger.expire(at(3200));
        assert_eq!(ack(&mut ledger, C, 4990, 5000), None);
        ledger.applied(LogIndex(6000), at(5000));
        assert_eq!(ack(&mut ledger, C, 5000, 5000), None);
        assert!(ack(&mut ledger, C, 5990, 5001).is_some());
    }

    #[test]
    fn a_new_leader_answers_nothing_before_the_old_leases_are_over() {
        let timings = Timings::default();
        let members = BTreeSet::from([A, B, C]);
        let mut ledger = Ledger::open(2, &members, LogIndex(10), LogIndex(11), LogIndex(7), &timings, at(0));
        ack(&mut ledger, A, 11, 10);
        ack(&mut ledger, B, 11, 10);
        ledger.expire(at(2000));
        assert_eq!(ledger.visible(), LogIndex(7));
        ledger.expire(at(2101));
        assert_eq!(ledger.visible(), LogIndex(11));
    }

    #[test]
    fn a_new_leaders_grants_name_all_that_may_have_been_answered() {
        let members = BTreeSet::from([A, B, C]);
        let mut ledger =
            Ledger::open(2, &members, LogIndex(10), LogIndex(8), LogIndex(7), &Timings::default(), at(0));
        assert_eq!(ack(&mut ledger, B, 8, 10).expect("granted").from, LogIndex(10));
    }

    #[test]
    fn without_a_quorum_there_are_no_leases() {
        let mut ledger = steady();
        assert_eq!(ledger.acked(B, LIFE, LogIndex(10), None, at(100)), None);
        let grant = ledger.acked(B, LIFE, LogIndex(10), Some(at(100)), at(2000)).expect("quorum is not that old");
        assert!(grant.usable <= Duration::from_millis(100));
        assert_eq!(ledger.acked(B, LIFE, LogIndex(10), Some(at(100)), at(2100)), None);
    }

    #[test]
    fn who_leaves_gets_no_lease_and_is_waited_for_until_its_last_one_ends() {
        let mut ledger = steady();
        assert_eq!(ledger.leave(&BTreeSet::from([C])), Some(at(3010)));
        assert_eq!(ack(&mut ledger, C, 10, 1000), None);
        ledger.applied(LogIndex(11), at(1100));
        ack(&mut ledger, A, 11, 1100);
        ack(&mut ledger, B, 11, 1100);
        assert_eq!(ledger.visible(), LogIndex(10));
        ledger.stay(&BTreeSet::from([C]));
        assert!(ack(&mut ledger, C, 11, 1200).is_some());
        assert_eq!(ledger.visible(), LogIndex(11));
    }

    #[test]
    fn a_new_life_of_a_server_starts_from_what_it_says() {
        let mut ledger = steady();
        ledger.acked(C, Incarnation(2), LogIndex(4), Some(at(100)), at(100));
        assert_eq!(ledger.standing(C).expect("member").acked, LogIndex(4));
        assert_eq!(ledger.visible(), LogIndex(10), "what was visible stays so");
    }
}
