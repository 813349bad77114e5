//! The `ctfs` program: everything an operator types.
//!
//! Most verbs ask the daemon of a state directory over its admin socket and print the answer.
//! `up` decides what a server is (flags, then the configuration file, then what an earlier `up`
//! remembered, then defaults) and starts the daemon, which is this same program.
//!
//! Data goes to stdout, talk to stderr. Exit statuses are in `ctfs_node::problem::exit`.
//!
//! Reading order: [`choices`] (what can be chosen), [`config`] (the file), [`plan`] (what it adds
//! up to), [`verbs`] (one file a verb), [`daemon`] (running the server).

mod choices;
mod config;
mod daemon;
mod errors;
mod logging;
mod memory;
mod mounts;
mod plan;
mod ui;
mod verbs;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// Where a server keeps everything that must survive.
pub const STATE_DEFAULT: &str = "/var/lib/ctfs";

#[derive(Debug, Parser)]
#[command(
    name = "ctfs",
    version,
    about = "One file system with one truth across a handful of servers",
    after_help = "First server:  ctfs up /srv/data\nNext servers:  run `ctfs token` on the first, paste the line it prints\nLook:          ctfs status\n\n\
                  Exit status: 0 ok, 1 failed, 2 usage, 3 not running, 4 degraded, 5 unavailable,\n6 problems found, 7 timed out, 130 interrupted.",
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
struct Cli {
    /// State directory of the server, which picks the daemon
    #[arg(long, global = true, value_name = "DIR", env = "CTFS_STATE", default_value = STATE_DEFAULT)]
    state: PathBuf,

    /// Plain text without colours; so does NO_COLOR
    #[arg(long, global = true)]
    no_color: bool,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start this server: create a cluster of one, join one, or come back
    Up(Box<verbs::up::Up>),
    /// Write everything out, unmount and stop the daemon
    Down(verbs::down::Down),
    /// Mount again after `umount`
    Mount(verbs::mount::Mount),
    /// Unmount; the daemon goes on serving the other servers
    #[command(visible_alias = "unmount")]
    Umount(verbs::umount::Umount),
    /// Print the line that lets the next server join
    Token(verbs::token::Token),
    /// Is all well, and if not, what to do
    Status(verbs::status::Status),
    /// List the servers
    Nodes(verbs::nodes::Nodes),
    /// Change the list of servers
    Node(verbs::node::Node),
    /// How much there is and how much still fits
    Df(verbs::df::Df),
    /// Where a file is: chunks, copies, what is cached here
    Info(verbs::info::Info),
    /// Compare two trees in everything a file system can hold
    Diff(verbs::diff::Diff),
    /// Copies and chunk size of a directory
    Policy(verbs::policy::Policy),
    /// Limits on what is below a directory
    Quota(verbs::quota::Quota),
    /// Look after this server's cache tier
    Cache(verbs::cache::Cache),
    /// Have every server put what it has acknowledged into the metadata and the chunk stores
    Sync(verbs::sync::Sync),
    /// Look at the configuration file
    Config(verbs::config::Config),
    /// Print the version
    Version(verbs::version::Version),
    /// The server itself, as `up` starts it
    #[command(hide = true)]
    Daemon(verbs::daemon::Daemon),
}

/// What every verb is given.
pub struct Context {
    /// Absolute.
    pub state: PathBuf,
    pub ui: ui::Ui,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_understood(&error),
    };
    let ui = ui::Ui::new(cli.no_color);
    let state = std::path::absolute(&cli.state).unwrap_or(cli.state);
    let context = Context { state, ui };
    let outcome = match cli.verb {
        Verb::Up(verb) => verb.run(&context),
        Verb::Down(verb) => verb.run(&context),
        Verb::Mount(verb) => verb.run(&context),
        Verb::Umount(verb) => verb.run(&context),
        Verb::Token(verb) => verb.run(&context),
        Verb::Status(verb) => verb.run(&context),
        Verb::Nodes(verb) => verb.run(&context),
        Verb::Node(verb) => verb.run(&context),
        Verb::Df(verb) => verb.run(&context),
        Verb::Info(verb) => verb.run(&context),
        Verb::Diff(verb) => verb.run(&context),
        Verb::Policy(verb) => verb.run(&context),
        Verb::Quota(verb) => verb.run(&context),
        Verb::Cache(verb) => verb.run(&context),
        Verb::Sync(verb) => verb.run(&context),
        Verb::Config(verb) => verb.run(&context),
        Verb::Version(verb) => verb.run(&context),
        Verb::Daemon(verb) => verb.run(&context),
    };
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(problem) => {
            context.ui.talk(&errors::render(&problem, &context));
            ExitCode::from(problem.exit)
        }
    }
}

/// Help that was asked for, or what is wrong with the command line.
fn not_understood(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand) {
        error.exit();
    }
    let ui = ui::Ui::new(std::env::args_os().any(|arg| arg == "--no-color"));
    let context = Context { state: STATE_DEFAULT.into(), ui };
    let problem = errors::usage(error, std::env::args_os());
    ui.talk(&errors::render(&problem, &context));
    ExitCode::from(problem.exit)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_people_see_has_a_help_text_and_the_daemon_is_hidden() {
        for verb in Cli::command().get_subcommands() {
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
            assert_eq!(verb.is_hide_set(), verb.get_name() == "daemon");
        }
    }

    #[test]
    fn a_mistyped_verb_gets_a_suggestion() {
        let error = Cli::try_parse_from(["ctfs", "statsu"]).unwrap_err().to_string();
        assert!(error.contains("'status'"), "{error}");
    }
}
