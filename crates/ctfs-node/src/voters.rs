//! Which members vote: a pure choice.

use std::collections::{BTreeMap, BTreeSet};

use ctfs_meta::{Member, MemberState};
use ctfs_types::NodeId;

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
/// A member that is away keeps its vote when there is nobody to replace it, and is never given
/// one: it would have to catch up first, and the change would wait for it in vain.
pub fn choose_voters(members: &[Member], voting: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
    let mut left: Vec<&Member> =
        members.iter().filter(|member| member.state == MemberState::Active || voting.contains(&member.node)).collect();
    let wanted = voters_wanted(left.len());
    let mut chosen: BTreeSet<NodeId> = BTreeSet::new();
    let mut per_zone: BTreeMap<&str, usize> = BTreeMap::new();
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

#[cfg(test)]
pub mod tests {
    use ctfs_types::{Incarnation, Timestamp};

    use super::*;

    pub fn member(node: u64, zone: &str, state: MemberState) -> Member {
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
            fenced: false,
            pair: None,
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

    #[test]
    fn a_member_that_is_away_is_never_given_a_vote() {
        let two = [member(1, "z", MemberState::Active), member(2, "z", MemberState::Away)];
        assert_eq!(choose_voters(&two, &nodes(&[1])), nodes(&[1]));
        let mut four: Vec<Member> = (1..=4).map(|n| member(n, "z", MemberState::Active)).collect();
        four[1].state = MemberState::Away;
        four[3].state = MemberState::Away;
        assert_eq!(choose_voters(&four, &nodes(&[1, 2, 3])), nodes(&[1, 2, 3]), "4 is no better than 2");
        assert_eq!(choose_voters(&four, &nodes(&[1])), nodes(&[1, 3]));
    }
}
