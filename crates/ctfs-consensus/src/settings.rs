//! Numbers and paths the consensus of one server runs with.

use std::{path::PathBuf, time::Duration};

use ctfs_types::{Incarnation, NodeId};

use crate::storage::StorageSettings;

/// What one server's consensus is started with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the log, the store and the snapshots live; made if it is not there.
    pub dir: PathBuf,
    pub node: NodeId,
    /// The life in which this server starts; also the client number of its commands, so it must be unique
    /// among all lives of all servers of the volume.
    pub incarnation: Incarnation,
    pub timings: Timings,
    pub limits: Limits,
    pub storage: StorageSettings,
    /// Whether this server may act ahead of the log where it alone may change something.
    pub acts_ahead: bool,
}

impl Settings {
    /// Settings for a LAN.
    pub fn new(dir: impl Into<PathBuf>, node: NodeId, incarnation: Incarnation) -> Self {
        Self {
            dir: dir.into(),
            node,
            incarnation,
            timings: Timings::default(),
            limits: Limits::default(),
            storage: StorageSettings::default(),
            acts_ahead: false,
        }
    }
}

/// How long things take, and how long they may.
#[derive(Debug, Clone)]
pub struct Timings {
    /// A leader's silence is broken this often; openraft sends a heartbeat every 1.5 of it. One
    /// append may take so long, and never less than `ANSWER_TIME_MIN`: a round trip and a flush.
    pub heartbeat: Duration,
    /// A follower stands for election after it has heard nothing for `election_max` (the leader
    /// lease of openraft, in which it also refuses its vote) plus a random time between
    /// `election_min` and `election_max`: with the defaults after 1.6 to 2 s.
    pub election_min: Duration,
    pub election_max: Duration,
    /// Sending and installing one part of a snapshot.
    pub install_snapshot: Duration,
    /// The leader counts a read lease this long; a change waits at most so long for one server.
    pub lease: Duration,
    /// Of which the server itself uses so much. The rest forgives a clock that stood still
    /// (coherence rule 17).
    pub lease_used: Duration,
    /// A lease is renewed at least this often.
    pub renew: Duration,
    /// After this [`crate::Consensus::propose`] gives up.
    pub propose_deadline: Duration,
    /// After this [`crate::Consensus::barrier`] gives up.
    pub barrier_deadline: Duration,
    /// After this the journal and its copy are no longer waited for: what shall be durable gets there
    /// otherwise.
    pub journal_patience: Duration,
}

impl Timings {
    /// Longest round trip timings are made for; beyond it leases would lapse between renewals.
    pub const RTT_MAX: Duration = Duration::from_millis(250);

    /// Timings for servers whose slowest round trip is `rtt`, at most [`Self::RTT_MAX`].
    ///
    /// openraft 0.9 has no pre-vote, so elections must not be started by mere delay: at least
    /// ten round trips. At 150 ms that is 1.5 s, and detection takes 4 to 5 s instead of 2.
    ///
    /// Leases last equally long whatever the round trip, because servers may run with different
    /// timings and a new leader waits for those of the old one; they are renewed earlier, so that
    /// the next one is there in time.
    pub fn for_rtt(rtt: Duration) -> Self {
        let (lan, rtt) = (Self::default(), rtt.min(Self::RTT_MAX));
        let election_min = lan.election_min.max(rtt * 10);
        let election_max = lan.election_max.max(election_min * 5 / 3);
        Self {
            heartbeat: lan.heartbeat.max(rtt * 2),
            election_min,
            election_max,
            install_snapshot: lan.install_snapshot + rtt * 10,
            renew: lan.renew - rtt * 2,
            // An election takes up to twice `election_max`; what waits for it should not fail.
            propose_deadline: lan.propose_deadline.max(election_max * 2 + lan.lease),
            journal_patience: lan.journal_patience + rtt * 4,
            ..lan
        }
    }

    /// How long a new leader takes every member for leased, counted from its election.
    ///
    /// Whoever votes has heard nothing from the old leader for `election_max`, so the last
    /// heartbeat a quorum acknowledged was sent before that, and no lease reaches further than
    /// `lease` after its sending (coherence rule 11). But never less than what a server may use
    /// of a lease granted at the very moment of the election.
    pub(crate) fn take_over(&self) -> Duration {
        self.lease - self.election_max.min(self.lease.saturating_sub(self.lease_used)) + self.margin()
    }

    /// What clocks and task switches may differ by.
    pub(crate) fn margin(&self) -> Duration {
        self.lease / 30
    }
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(250),
            election_min: Duration::from_millis(600),
            election_max: Duration::from_millis(1000),
            install_snapshot: Duration::from_secs(10),
            lease: Duration::from_secs(3),
            lease_used: Duration::from_secs(2),
            renew: Duration::from_secs(1),
            propose_deadline: Duration::from_secs(8),
            barrier_deadline: Duration::from_secs(5),
            journal_patience: Duration::from_secs(1),
        }
    }
}

/// How much of things there may be.
#[derive(Debug, Clone)]
pub struct Limits {
    /// A snapshot is made after so many entries.
    pub snapshot_entries: u64,
    /// So many entries behind a snapshot stay in the log, for servers that lag a little.
    pub log_entries_kept: u64,
    /// A server further behind than this is not ready to vote.
    pub replication_lag: u64,
    /// Bytes of a snapshot in one call; a call holds at most 2 MiB.
    pub snapshot_part_bytes: u64,
    /// Entries in one append. 16 of at most 112 KiB stay under the 2 MiB of a call.
    pub append_entries: u64,
    /// Commands of this server, and commands of others at the leader, that may wait; whoever
    /// comes then waits for a place, until its deadline.
    pub queued_commands: usize,
    /// An entry takes what waits up to this size. Larger entries save little (the fsync is paid
    /// already) and delay everything behind them on a thin link.
    pub entry_bytes: usize,
    pub entry_commands: usize,
    /// Entries the leader has in flight. One leaves the disk idle while the network works; many
    /// make small entries and share fewer fsyncs.
    pub entries_in_flight: usize,
    /// Calls with forwarded commands a follower has in flight.
    pub forwards_in_flight: usize,
}

/// Largest command, encoded. A 64 KiB extended attribute fits; anything that can be longer (the
/// cells of a large file) is cut into several commands by the proposer.
pub const COMMAND_BYTES_MAX: usize = 112 << 10;

impl Default for Limits {
    fn default() -> Self {
        Self {
            snapshot_entries: 20_000,
            log_entries_kept: 5_000,
            replication_lag: 5_000,
            snapshot_part_bytes: 1 << 20,
            append_entries: 16,
            queued_commands: 4_096,
            entry_bytes: 64 << 10,
            entry_commands: 512,
            entries_in_flight: 2,
            forwards_in_flight: 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elections_wait_for_ten_round_trips() {
        let wan = Timings::for_rtt(Duration::from_millis(150));
        assert!(wan.election_min >= Duration::from_millis(1500));
        assert!(wan.election_max > wan.election_min && wan.election_min > wan.heartbeat);
        assert!(wan.propose_deadline > wan.election_max * 2);
        let lan = Timings::for_rtt(Duration::from_millis(1));
        assert_eq!(lan.election_min, Timings::default().election_min);
    }

    #[test]
    fn a_lease_lasts_until_the_next_one_at_every_distance() {
        for rtt in [0, 1, 80, 150, 250, 9000].map(Duration::from_millis) {
            let (timings, rtt) = (Timings::for_rtt(rtt), rtt.min(Timings::RTT_MAX));
            // A grant counts from the last heartbeat a quorum acknowledged, and openraft sends
            // one every 1.5 heartbeats.
            let granted = timings.lease_used - (timings.heartbeat * 3 / 2 + rtt);
            assert!(granted >= timings.renew + rtt * 2, "{rtt:?}: {timings:?}");
            assert!(timings.renew > rtt, "{rtt:?}: the answer comes before the question is asked anew");
        }
    }

    #[test]
    fn a_new_leader_waits_for_every_lease_of_the_old_one() {
        for timings in [Timings::default(), Timings::for_rtt(Duration::from_millis(150))] {
            assert!(timings.take_over() > timings.lease_used);
            assert!(timings.take_over() + timings.election_max > timings.lease);
        }
    }
}
