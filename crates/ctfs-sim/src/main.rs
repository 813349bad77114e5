//! `ctfs-sim`: replays a seed, runs many, or runs a scenario.
//!
//! Many seeds are as many processes, because only the first simulation of a process is the same again.

use std::{
    process::{Command, ExitCode},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};

use clap::Parser;
use ctfs_sim::{
    scenarios::{SCENARIOS, Scenario},
    storm,
};
use ctfs_types::rules::{Rule, break_rule};

/// Lines of the trace that a failure shows.
const TRACE_LINES: usize = 60;

#[derive(Debug, Parser)]
#[command(about = "Runs CTFS servers on a simulated network, disk and clock, from one seed")]
struct Args {
    /// Run this seed
    #[arg(long, value_name = "N", group = "what")]
    seed: Option<u64>,

    /// Run so many seeds, each in a process of its own
    #[arg(long, value_name = "COUNT", group = "what")]
    seeds: Option<u64>,

    /// Run a scenario of the coherence notes
    #[arg(long, value_name = "NAME", group = "what")]
    scenario: Option<String>,

    /// List the scenarios and their rules
    #[arg(long, group = "what")]
    list: bool,

    /// The first of many seeds
    #[arg(long, value_name = "N", default_value_t = 1)]
    from: u64,

    /// Processes at a time [default: as many as processors]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,

    /// Run no more seeds after one has failed
    #[arg(long)]
    until_caught: bool,

    /// Print what happens as it happens
    #[arg(long)]
    trace: bool,

    /// Take a rule of coherence out: by name for a seed, "its-own" for a scenario
    #[arg(long, value_name = "RULE")]
    without: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.list {
        for scenario in SCENARIOS {
            println!("{:>2}  {:<32} {:?}", scenario.number, scenario.name, scenario.rule);
        }
        return ExitCode::SUCCESS;
    }
    if let Some(name) = &args.scenario {
        return run_scenario(name, args.from, args.without.is_some());
    }
    match (args.seed, args.seeds) {
        (None, Some(count)) => run_many(&args, count),
        (seed, _) => run_one(&args, seed.unwrap_or(1)),
    }
}

fn run_scenario(name: &str, seed: u64, is_broken: bool) -> ExitCode {
    let Some(scenario) = Scenario::of(name) else {
        eprintln!("no scenario {name:?}; see --list");
        return ExitCode::from(2);
    };
    match scenario.run(seed, is_broken) {
        Ok(()) => ExitCode::SUCCESS,
        Err(wrong) => {
            println!("scenario {} ({name}), seed {seed}: {wrong}", scenario.number);
            ExitCode::FAILURE
        }
    }
}

fn run_one(args: &Args, seed: u64) -> ExitCode {
    if let Some(name) = &args.without {
        let Some(rule) = Rule::ALL.into_iter().find(|rule| format!("{rule:?}") == *name) else {
            eprintln!("no rule {name:?}: {:?}", Rule::ALL);
            return ExitCode::from(2);
        };
        break_rule(Some(rule));
    }
    let outcome = storm::run(seed, args.trace);
    println!(
        "seed {seed}: trace {} of {} events, {} calls answered, {} at risk when faults struck, {:?} simulated",
        outcome.hash, outcome.events, outcome.answered, outcome.at_risk, outcome.simulated
    );
    if outcome.violations.is_empty() {
        return ExitCode::SUCCESS;
    }
    for line in outcome.trace.iter().rev().take(TRACE_LINES).rev() {
        println!("    {line}");
    }
    for wrong in &outcome.violations {
        println!("VIOLATION {wrong}");
    }
    println!("again: ctfs-sim --seed {seed}{}", args.without.as_ref().map_or(String::new(), |rule| format!(" --without {rule}")));
    ExitCode::FAILURE
}

/// Runs each seed in a process of its own, several at a time.
fn run_many(args: &Args, count: u64) -> ExitCode {
    let program = std::env::current_exe().expect("this program has a path");
    let jobs = args.jobs.or_else(|| std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
    let (next, failed, started) = (AtomicU64::new(args.from), AtomicU64::new(0), Instant::now());
    let end = args.from + count;
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= end || args.until_caught && failed.load(Relaxed) > 0 {
                        return;
                    }
                    let mut command = Command::new(&program);
                    command.args(["--seed", &seed.to_string()]);
                    if let Some(rule) = &args.without {
                        command.args(["--without", rule]);
                    }
                    let output = command.output().expect("this program starts");
                    // A run that broke down caught nothing.
                    let is_caught = output.status.code() == Some(1);
                    if is_caught || !output.status.success() && args.without.is_none() {
                        failed.fetch_add(1, Relaxed);
                        println!("seed {seed} FAILED\n{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    println!("{count} seeds from {} in {:.0} s: {failed} failed", args.from, started.elapsed().as_secs_f64());
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
