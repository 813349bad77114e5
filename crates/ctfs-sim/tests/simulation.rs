//! Seeds, scenarios and broken builds, each run in a process of its own: only the first simulation of a
//! process is the same again.

use std::process::{Command, Output};

/// Random seeds of one test run; `CTFS_SIM_SEEDS` sets another number. 200 take 25 s, on a busy machine a minute.
const SEEDS: &str = "200";
/// A broken build must be caught within so many seeds.
const BROKEN_SEEDS: &str = "100";

fn simulate(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ctfs-sim")).args(args).output().expect("ctfs-sim starts")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn holds(args: &[&str]) {
    let output = simulate(args);
    assert!(output.status.success(), "ctfs-sim {}:\n{}", args.join(" "), text(&output));
}

/// That it is found, and not that the simulation broke down.
fn is_caught(args: &[&str]) {
    let output = simulate(args);
    assert_eq!(output.status.code(), Some(1), "ctfs-sim {}:\n{}", args.join(" "), text(&output));
}

#[test]
fn one_seed_gives_one_trace() {
    for seed in ["1", "2", "17"] {
        let [first, second] = [(), ()].map(|()| simulate(&["--seed", seed]));
        assert!(first.status.success(), "{}", text(&first));
        assert_eq!(text(&first), text(&second));
    }
    let [one, other] = ["1", "2"].map(|seed| simulate(&["--seed", seed]));
    assert_ne!(text(&one).split(" of ").next(), text(&other).split(" of ").next());
}

#[test]
fn what_a_fault_strikes_is_under_way() {
    let output = simulate(&["--seed", "2"]);
    let text = text(&output);
    let at_risk: u64 = text.split(" answered, ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).expect("it is told");
    assert!(at_risk > 0, "{text}");
}

/// One number a line; what stands behind it says what was wrong.
#[test]
fn seeds_that_ever_failed_hold() {
    for line in include_str!("../seeds.txt").lines().filter(|line| !line.starts_with('#')) {
        let Some(seed) = line.split_whitespace().next() else { continue };
        holds(&["--seed", seed]);
    }
}

#[test]
fn random_seeds_hold() {
    let seeds = std::env::var("CTFS_SIM_SEEDS").unwrap_or_else(|_| SEEDS.to_owned());
    holds(&["--seeds", &seeds]);
}

/// Tests of the tests: without one of these rules some seed must fail.
mod broken_builds {
    use super::{BROKEN_SEEDS, is_caught};

    #[test]
    fn a_leader_that_does_not_wait_for_leases_is_caught() {
        is_caught(&["--seeds", BROKEN_SEEDS, "--without", "AnswersWaitForLeases", "--until-caught"]);
    }

    #[test]
    fn fsync_that_does_not_wait_for_the_log_is_caught() {
        is_caught(&["--seeds", BROKEN_SEEDS, "--without", "FsyncWaitsForLog", "--until-caught"]);
    }

    #[test]
    fn fsync_that_acknowledges_before_the_pair_is_caught() {
        is_caught(&["--seeds", BROKEN_SEEDS, "--without", "FsyncWaitsForPair", "--until-caught"]);
    }

    #[test]
    fn a_life_whose_files_are_free_before_its_journal_was_sent_is_caught() {
        is_caught(&["--seeds", BROKEN_SEEDS, "--without", "HeldUntilSent", "--until-caught"]);
    }

    #[test]
    fn a_log_that_takes_commands_of_lives_that_ended_is_caught() {
        is_caught(&["--seeds", BROKEN_SEEDS, "--without", "EndedLivesAreRefused", "--until-caught"]);
    }

    #[test]
    fn a_forgotten_invalidation_is_caught() {
        is_caught(&["--seeds", BROKEN_SEEDS, "--without", "TakingDropsCaches", "--until-caught"]);
    }

    #[test]
    fn a_request_that_happens_again_is_caught() {
        is_caught(&["--seeds", BROKEN_SEEDS, "--without", "RequestsHappenOnce", "--until-caught"]);
    }

    #[test]
    fn acting_ahead_on_what_another_holds_is_caught() {
        is_caught(&["--seeds", BROKEN_SEEDS, "--without", "OnlyCoveredIsAhead", "--until-caught"]);
    }

    #[test]
    fn a_command_that_overtakes_what_happened_before_is_caught() {
        is_caught(&["--seeds", BROKEN_SEEDS, "--without", "DirectFollowsStreamed", "--until-caught"]);
    }
}

/// Each scenario of the coherence notes holds, and is found when its rule is taken out.
mod scenarios {
    use super::{holds, is_caught};

    fn holds_by_its_rule(name: &str) {
        for seed in ["1", "2", "3"] {
            holds(&["--scenario", name, "--from", seed]);
        }
        is_caught(&["--scenario", name, "--without", "its-own"]);
    }

    macro_rules! scenarios {
        ($($test:ident: $name:literal,)*) => {
            $(#[test]
            fn $test() {
                holds_by_its_rule($name);
            })*

            #[test]
            fn all_are_here() {
                let listed = ctfs_sim::scenarios::SCENARIOS.iter().map(|scenario| scenario.name);
                assert_eq!(listed.collect::<Vec<_>>(), [$($name),*]);
            }
        };
    }

    scenarios! {
        scenario_1_an_acknowledgement_waits_for_no_kernel_lock: "two-mkdirs-in-one-directory",
        scenario_2_an_answer_waits_until_all_leased_servers_have_it: "an-answer-before-all-have-it",
        scenario_2_new_is_not_followed_by_old: "new-then-old",
        scenario_3_stores_of_a_mapping_count_whenever_they_come: "stores-after-the-file-went",
        scenario_4_a_crash_leaves_a_prefix: "the-prefix-breaks",
        scenario_4_fsync_waits_for_the_log: "fsync-while-cut-off",
        scenario_4_fsync_waits_for_the_pair: "fsync-before-the-pair",
        scenario_5_only_what_is_covered_happens_ahead: "ahead-where-another-holds",
        scenario_6_recalls_end_also_in_a_ring: "recalls-in-a-ring",
        scenario_7_a_grant_drops_what_others_keep: "a-grant-forgets-who-cached",
        scenario_8_a_settled_state_has_all_finished_work: "a-state-without-finished-work",
        scenario_9_a_life_that_ended_changes_nothing: "commands-after-the-end",
        scenario_9_nothing_is_free_before_it_is_sent: "free-before-it-is-sent",
        scenario_9_what_an_ended_life_is_refused_its_pair_may_send: "a-command-between-end-and-take-over",
        scenario_9_a_copy_that_was_read_takes_nothing_more: "more-after-the-copy-was-read",
        scenario_10_a_stale_copy_takes_nothing_back: "a-stale-copy-takes-over",
        scenario_10_a_pair_counts_when_the_log_names_it: "a-pair-nobody-knows-of",
        scenario_10_a_pair_is_named_when_it_has_the_journal: "a-pair-without-the-journal",
        scenario_11_the_old_leader_renews_no_lease: "the-old-leader-renews",
        scenario_12_a_request_asked_twice_happens_once: "a-request-asked-twice",
        scenario_13_a_new_life_forgets_old_pages: "a-new-life-with-old-pages",
        scenario_14_who_lost_a_lock_writes_no_more: "two-lock-holders",
        scenario_15_no_journal_alone_names_a_chunk: "a-chunk-that-a-journal-names",
        scenario_16_who_lost_its_log_votes_not: "a-wiped-server-votes",
        scenario_17_a_suspended_machine_reads_nothing_old: "a-suspended-machine",
        scenario_18_who_is_taken_back_reads_nothing_old: "readmission",
        scenario_19_an_open_inode_stays: "open-but-unlinked",
    }
}
