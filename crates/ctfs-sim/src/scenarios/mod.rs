//! The scenarios of the coherence notes, each with the rule that prevents it.
//!
//! A scenario is a script that brings a careless version into the trap and says what is wrong; with its
//! rule taken out it must find something. The rules are those of [`ctfs_types::rules`]. Numbers are those of
//! the notes.

mod ahead;
mod leases;
mod lives;
mod mappings;
mod pairs;
mod states;

use std::time::Duration;

use ctfs_types::{
    NodeId,
    rules::{Rule, break_rule},
};

use crate::{invariants::holders::Listener, sim::Sim};

/// One scenario.
pub struct Scenario {
    /// In the coherence notes.
    pub number: u32,
    pub name: &'static str,
    pub rule: Rule,
    /// Runs it with a seed; says what is wrong.
    script: fn(u64) -> Result<(), String>,
}

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    Scenario { number: 1, name: "two-mkdirs-in-one-directory", rule: Rule::NoticesWaitForNoLock, script: leases::two_mkdirs_in_one_directory },
    Scenario { number: 2, name: "an-answer-before-all-have-it", rule: Rule::AnswersWaitForLeases, script: leases::an_answer_before_all_have_it },
    Scenario { number: 2, name: "new-then-old", rule: Rule::ReadsWaitForVisible, script: leases::new_then_old },
    Scenario { number: 3, name: "stores-after-the-file-went", rule: Rule::LateStoresTakeTheFile, script: mappings::stores_after_the_file_went },
    Scenario { number: 4, name: "the-prefix-breaks", rule: Rule::DirectFollowsStreamed, script: ahead::the_prefix_breaks },
    Scenario { number: 4, name: "fsync-while-cut-off", rule: Rule::FsyncWaitsForLog, script: ahead::fsync_while_cut_off },
    Scenario { number: 4, name: "fsync-before-the-pair", rule: Rule::FsyncWaitsForPair, script: pairs::fsync_before_the_pair },
    Scenario { number: 5, name: "ahead-where-another-holds", rule: Rule::OnlyCoveredIsAhead, script: ahead::ahead_where_another_holds },
    Scenario { number: 6, name: "recalls-in-a-ring", rule: Rule::WaitingGivesUp, script: ahead::recalls_in_a_ring },
    Scenario { number: 7, name: "a-grant-forgets-who-cached", rule: Rule::TakingDropsCaches, script: ahead::a_grant_forgets_who_cached },
    Scenario { number: 8, name: "a-state-without-finished-work", rule: Rule::SettlingAsksHolders, script: states::a_state_without_finished_work },
    Scenario { number: 9, name: "commands-after-the-end", rule: Rule::EndedLivesAreRefused, script: lives::commands_after_the_end },
    Scenario { number: 9, name: "free-before-it-is-sent", rule: Rule::HeldUntilSent, script: pairs::free_before_it_is_sent },
    Scenario { number: 9, name: "a-command-between-end-and-take-over", rule: Rule::RefusalsAreForgotten, script: pairs::a_command_between_end_and_take_over },
    Scenario { number: 9, name: "more-after-the-copy-was-read", rule: Rule::FencedBeforeRead, script: pairs::more_after_the_copy_was_read },
    Scenario { number: 10, name: "a-stale-copy-takes-over", rule: Rule::NotedIsNotSent, script: pairs::a_stale_copy_takes_over },
    Scenario { number: 10, name: "a-pair-nobody-knows-of", rule: Rule::PairIsRecorded, script: pairs::a_pair_nobody_knows_of },
    Scenario { number: 10, name: "a-pair-without-the-journal", rule: Rule::PairHasAll, script: pairs::a_pair_without_the_journal },
    Scenario { number: 11, name: "the-old-leader-renews", rule: Rule::LeasesHangOnQuorum, script: leases::the_old_leader_renews },
    Scenario { number: 12, name: "a-request-asked-twice", rule: Rule::RequestsHappenOnce, script: lives::a_request_asked_twice },
    Scenario { number: 13, name: "a-new-life-with-old-pages", rule: Rule::NewLifeForgets, script: lives::a_new_life_with_old_pages },
    Scenario { number: 14, name: "two-lock-holders", rule: Rule::LostLocksEndHandles, script: lives::two_lock_holders },
    Scenario { number: 15, name: "a-chunk-that-a-journal-names", rule: Rule::ChunksAreNamedInLog, script: pairs::a_chunk_that_a_journal_names },
    Scenario { number: 16, name: "a-wiped-server-votes", rule: Rule::LostLogVotesNot, script: lives::a_wiped_server_votes },
    Scenario { number: 17, name: "a-suspended-machine", rule: Rule::LeasesCountSuspend, script: leases::a_suspended_machine },
    Scenario { number: 18, name: "readmission", rule: Rule::ReadmissionCatchesUp, script: leases::readmission },
    Scenario { number: 19, name: "open-but-unlinked", rule: Rule::OpenInodesStay, script: lives::open_but_unlinked },
];

impl Scenario {
    pub fn of(name: &str) -> Option<&'static Self> {
        SCENARIOS.iter().find(|scenario| scenario.name == name)
    }

    /// Runs the script, with the rule or without it.
    ///
    /// # Errors
    /// What is wrong.
    pub fn run(&self, seed: u64, is_broken: bool) -> Result<(), String> {
        break_rule(is_broken.then_some(self.rule));
        (self.script)(seed)
    }
}

fn node(number: u64) -> NodeId {
    NodeId(number)
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Servers that hold no directories: every change goes through the log.
fn through_the_log(seed: u64, servers: u64) -> Sim {
    let mut sim = Sim::with(seed, |_, vfs| vfs.delegations.takes = false);
    begin(&mut sim, servers);
    sim
}

/// Servers that hold directories.
fn with_holders(seed: u64, servers: u64) -> Sim {
    let mut sim = Sim::new(seed);
    begin(&mut sim, servers);
    sim
}

fn begin(sim: &mut Sim, servers: u64) {
    let is_loud = std::env::var_os("CTFS_SIM_TRACE").is_some();
    sim.shared.trace.lock().is_loud = is_loud;
    Listener::install(&sim.shared, if is_loud { tracing::Level::DEBUG } else { tracing::Level::ERROR });
    sim.found(servers);
    // Nothing is under way when a script begins.
    for node in sim.nodes() {
        sim.ask(node, |server| async move { server.await_pair(|pair| pair.is_some()).await });
    }
}

/// What was noted while the scenario ran.
fn verdict(sim: &Sim) -> Result<(), String> {
    let wrong = sim.shared.history.lock().check(true);
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

/// `Err` with what is wrong, unless it is as it must be.
fn claim(holds: bool, otherwise: impl Into<String>) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}
