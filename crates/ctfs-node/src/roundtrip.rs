//! How far away the other servers are, remembered from one life of this server to the next:
//! openraft wants to know its timings when it starts, before there is anybody to measure.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use ctfs_consensus::{Consensus, Timings};
use ctfs_net::Network;
use ctfs_types::NodeId;
use tokio::sync::watch;

use crate::{problem::Problem, state::StateDir, stop};

/// File in the state directory: microseconds as text.
const NAME: &str = "rtt";
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Of so many looks the fastest counts: a busy link or machine only ever makes a round trip
/// longer. A path that became longer for good is believed after five minutes.
const LOOKS: usize = 30;
/// Looks before anything is written.
const LOOKS_MIN: usize = 3;

/// The slowest round trip of the life before; `None` if nobody was measured. A file that does not
/// read counts as none, because the next minutes write it anew.
pub fn remembered(state: &StateDir) -> Option<Duration> {
    let text = String::from_utf8(state.read(NAME).ok()?).ok()?;
    text.trim().parse().ok().map(Duration::from_micros)
}

/// Settles the next life, or the first one of a server that joins.
pub fn remember(state: &StateDir, rtt: Duration) -> Result<(), Problem> {
    state.write(NAME, format!("{}\n", rtt.as_micros()).as_bytes())
}

/// Measures the members until `stop` turns true. `set_for` is what this life was started with.
pub async fn run(consensus: Consensus, network: Network, state: Arc<StateDir>, set_for: Duration, mut stop: watch::Receiver<bool>) {
    let mut meter = Meter::default();
    let mut written = remembered(&state);
    let mut warned = false;
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = stop::requested(&mut stop) => return,
        }
        let Ok(members) = consensus.replica().read().members() else { continue };
        let seen = members.iter().filter_map(|member| {
            let peer = network.peer(member.node);
            Some((member.node, peer.rtt.filter(|_| peer.connected)?))
        });
        meter.look(&members.iter().map(|member| member.node).collect::<Vec<_>>(), seen);
        let Some(slowest) = meter.slowest() else { continue };
        consensus.set_rtt(slowest);
        let timings = Timings::for_rtt(set_for);
        if !warned && timings.election_min + timings.election_max < slowest.min(Timings::RTT_MAX) * 10 {
            warned = true;
            tracing::warn!(?slowest, ?set_for, "the other servers are further away than elections here are set for; ctfs down and ctfs up sets them");
        }
        if written.is_none_or(|written| differs(written, slowest)) {
            match remember(&state, slowest) {
                Ok(()) => written = Some(slowest),
                Err(problem) => tracing::warn!(what = problem.what, why = problem.why, "cannot remember how far the other servers are"),
            }
        }
    }
}

/// Worth a write: by more than a fifth.
fn differs(a: Duration, b: Duration) -> bool {
    a.abs_diff(b) * 5 > a.max(b)
}

/// Round trips as they were last seen.
#[derive(Debug, Default)]
struct Meter(BTreeMap<NodeId, VecDeque<Duration>>);

impl Meter {
    fn look(&mut self, members: &[NodeId], seen: impl Iterator<Item = (NodeId, Duration)>) {
        self.0.retain(|node, _| members.contains(node));
        for (node, rtt) in seen {
            let looks = self.0.entry(node).or_default();
            if looks.len() == LOOKS {
                looks.pop_front();
            }
            looks.push_back(rtt);
        }
    }

    /// The longest of everybody's shortest; `None` before anybody was seen a few times.
    fn slowest(&self) -> Option<Duration> {
        self.0.values().filter(|looks| looks.len() >= LOOKS_MIN).filter_map(|looks| looks.iter().min()).max().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEAR: NodeId = NodeId(1);
    const FAR: NodeId = NodeId(2);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn the_furthest_server_counts_at_its_fastest() {
        let mut meter = Meter::default();
        for (near, far) in [(1, 900), (700, 82), (800, 140)] {
            assert_eq!(meter.slowest(), None);
            meter.look(&[NEAR, FAR], [(NEAR, ms(near)), (FAR, ms(far))].into_iter());
        }
        assert_eq!(meter.slowest(), Some(ms(82)));
        meter.look(&[NEAR], [(NEAR, ms(2))].into_iter());
        assert_eq!(meter.slowest(), Some(ms(1)), "who left counts no more");
    }

    #[test]
    fn a_path_that_became_longer_is_believed_in_the_end() {
        let mut meter = Meter::default();
        for _ in 0..LOOKS {
            meter.look(&[FAR], [(FAR, ms(10))].into_iter());
        }
        for _ in 0..LOOKS {
            assert_eq!(meter.slowest(), Some(ms(10)));
            meter.look(&[FAR], [(FAR, ms(100))].into_iter());
        }
        assert_eq!(meter.slowest(), Some(ms(100)));
    }

    #[test]
    fn what_was_measured_is_known_in_the_next_life_and_nonsense_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!(remembered(&state), None);
        state.write(NAME, b"82000\n").unwrap();
        assert_eq!(remembered(&state), Some(ms(82)));
        state.write(NAME, b"\xff far").unwrap();
        assert_eq!(remembered(&state), None);
    }

    #[test]
    fn small_changes_are_not_written() {
        assert!(!differs(ms(80), ms(90)) && differs(ms(80), ms(150)) && differs(ms(150), ms(80)) && differs(ms(0), ms(1)));
    }
}
