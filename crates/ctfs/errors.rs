//! How problems look on a terminal.

use std::{ffi::OsString, path::Path};

use clap::CommandFactory;
use ctfs_node::problem::{Code, Problem};

use crate::{Context, STATE_DEFAULT};

/// What a verb ends with: an exit status, or a problem that carries one.
pub type Outcome = Result<u8, Problem>;

/// `error[E0107]: what`, then why, then what to type, one line each.
pub fn render(problem: &Problem, context: &Context) -> String {
    let mut text = format!("{}: {}\n", context.ui.red(&format!("error[{}]", problem.code)), problem.what);
    // A cause of several lines, such as the end of a log, stays readable under its label.
    for (i, line) in problem.why.lines().enumerate() {
        text += &format!("  {:<6}{line}\n", if i == 0 { "why" } else { "" });
    }
    for step in &problem.try_next {
        text += &format!("  {:<6}{}\n", "try", spelled(step, &context.state));
    }
    text
}

/// Words that say that a command is for another server than this one.
const ELSEWHERE: &[&str] = &["on a server of the cluster", "on the other server", "on that server", "on one of them", "on each"];

/// A step with the state directory in each command that is for this server, where it is not the
/// usual one.
pub fn spelled(step: &str, state: &Path) -> String {
    let usual = state == Path::new(STATE_DEFAULT) || std::env::var_os("CTFS_STATE").is_some_and(|dir| dir == state.as_os_str());
    if usual { step.to_owned() } else { with_state(step, state) }
}

fn with_state(step: &str, state: &Path) -> String {
    let clause = |clause: &str| {
        if ELSEWHERE.iter().any(|words| clause.contains(words)) {
            return clause.to_owned();
        }
        let mut text = String::new();
        let mut rest = clause;
        while let Some(at) = rest.find("ctfs ") {
            let (before, after) = (&rest[..at], &rest[at + "ctfs ".len()..]);
            let begins = before.is_empty() || before.ends_with([' ', '(']);
            let verb: String = after.chars().take_while(|c| c.is_ascii_lowercase()).collect();
            text += before;
            text += "ctfs ";
            if begins && is_verb(&verb) {
                text += &format!("--state {} ", state.display());
            }
            rest = after;
        }
        text + rest
    };
    step.split(';').map(clause).collect::<Vec<_>>().join(";")
}

fn is_verb(word: &str) -> bool {
    crate::Cli::command().find_subcommand(word).is_some()
}

/// The problem with a command line that clap does not take, in the shape of all others.
///
/// clap says it as text: a sentence, more of it on lines that are set in, tips, the usage.
pub fn usage(error: &clap::Error, args: impl Iterator<Item = OsString>) -> Problem {
    let text = error.render().to_string();
    let mut parts = text.split("\n\n").map(str::trim);
    let first = parts.next().unwrap_or_default();
    let mut lines = first.strip_prefix("error: ").unwrap_or(first).lines().map(str::trim);
    let sentence = lines.next().unwrap_or("the command line is not understood").trim_end_matches(':');
    // `invalid value 'x' for '--size <SIZE>': what is wrong with it`
    let (what, reason) = sentence.split_once("': ").map_or((sentence.to_owned(), ""), |(what, why)| (format!("{what}'"), why));
    let details = lines.map(|line| line.trim_matches(['[', ']']).to_owned()).filter(|line| !line.is_empty());
    let why: Vec<String> = Some(reason.to_owned()).filter(|reason| !reason.is_empty()).into_iter().chain(details).collect();
    let mut problem = Problem::new(Code::CommandLine, what).why(why.join("\n"));
    for part in parts {
        for tip in part.lines().filter_map(|line| line.trim().strip_prefix("tip: ")) {
            problem = problem.try_next(tip);
        }
        if let Some(usage) = part.strip_prefix("Usage: ") {
            problem = problem.try_next(usage.lines().next().unwrap_or_default());
        }
    }
    problem.try_next(format!("{} --help", verb_of(args)))
}

/// `ctfs node remove` of whatever was typed.
fn verb_of(args: impl Iterator<Item = OsString>) -> String {
    let (mut command, mut text) = (crate::Cli::command(), "ctfs".to_owned());
    for arg in args.skip(1) {
        let Some(name) = arg.to_str() else { continue };
        let Some(verb) = command.find_subcommand(name).filter(|verb| !verb.is_hide_set()).cloned() else { continue };
        text += &format!(" {}", verb.get_name());
        command = verb;
    }
    text
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use ctfs_node::problem::exit;

    use super::*;
    use crate::ui::Ui;

    fn context(state: &str) -> Context {
        Context { state: state.into(), ui: Ui::plain() }
    }

    #[test]
    fn an_error_says_what_why_and_what_to_type() {
        let problem = Problem::cannot_reach(&["10.9.0.1:7420".into()], "no reply within 20 s");
        assert_eq!(
            render(&problem, &context(STATE_DEFAULT)),
            "error[E0107]: cannot join: no answer from 10.9.0.1:7420\n\
             \x20 why   no reply within 20 s\n\
             \x20 try   check that UDP to these addresses is open, and on the other server: ctfs status\n\
             \x20 try   if they are not reachable from here: start the other server with --advertise ADDR:PORT and make a new token\n"
        );
    }

    #[test]
    fn a_next_step_names_the_state_directory_when_it_is_not_the_usual_one() {
        let text = render(&Problem::no_quorum("x"), &context("/tmp/b"));
        assert!(text.contains("try   ctfs --state /tmp/b status"), "{text}");
    }

    #[test]
    fn every_command_for_this_server_names_its_state_directory_and_none_for_another_does() {
        let state = Path::new("/s");
        for (step, expected) in [
            ("ctfs status", "ctfs --state /s status"),
            ("restart it: ctfs down, then ctfs up", "restart it: ctfs --state /s down, then ctfs --state /s up"),
            ("ctfs status    shows how far copying is", "ctfs --state /s status    shows how far copying is"),
            ("sudo ctfs up /srv/data", "sudo ctfs --state /s up /srv/data"),
            ("wait; sooner: ctfs node remove b", "wait; sooner: ctfs --state /s node remove b"),
            ("on that server: ctfs down, then ctfs up; or here: ctfs node remove b", "on that server: ctfs down, then ctfs up; or here: ctfs --state /s node remove b"),
            ("on a server of the cluster: ctfs token", "on a server of the cluster: ctfs token"),
            ("bring them back (ctfs up on each), or wait", "bring them back (ctfs up on each), or wait"),
            ("if its state is elsewhere: ctfs --state DIR ...", "if its state is elsewhere: ctfs --state DIR ..."),
            ("a token begins with ctfs1-; ctfs is a program", "a token begins with ctfs1-; ctfs is a program"),
        ] {
            assert_eq!(with_state(step, state), expected);
        }
    }

    fn refused(line: &str) -> Problem {
        use clap::Parser;
        let args = || line.split(' ').map(OsString::from);
        usage(&crate::Cli::try_parse_from(args()).unwrap_err(), args())
    }

    #[test]
    fn a_command_line_that_is_not_understood_has_a_number_a_reason_and_what_to_type() {
        let verb = refused("ctfs statsu");
        assert_eq!((verb.code.as_str(), verb.exit, verb.what.as_str()), ("E0135", 2, "unrecognized subcommand 'statsu'"));
        assert!(verb.try_next[0].contains("'status'"), "{verb:?}");

        let option = refused("ctfs up /x --cache-siz 1GiB");
        assert_eq!(option.what, "unexpected argument '--cache-siz' found");
        assert!(option.try_next[0].contains("'--cache-size'"), "{option:?}");
        assert_eq!(option.try_next.last().unwrap(), "ctfs up --help");

        let value = refused("ctfs up /x --cache-size lots");
        assert_eq!(value.what, "invalid value 'lots' for '--cache-size <SIZE>'");
        assert!(value.why.contains("not a size"), "{value:?}");

        let choice = refused("ctfs status --wait well");
        assert!(choice.why.contains("possible values: healthy, available"), "{choice:?}");

        let missing = refused("ctfs node remove");
        assert!(missing.what.contains("required") && missing.why.contains("<NAME>"), "{missing:?}");
        assert_eq!(missing.try_next.last().unwrap(), "ctfs node remove --help");
    }

    #[test]
    fn a_cause_of_several_lines_stays_under_its_label() {
        let text = render(&Problem::new(Code::DiedAtStart, "w").why("a\nb"), &context(STATE_DEFAULT));
        assert_eq!(text, "error[E0129]: w\n  why   a\n        b\n");
    }

    #[test]
    fn exit_statuses_are_what_scripts_were_promised() {
        let address: SocketAddr = "0.0.0.0:7420".parse().unwrap();
        for (problem, status) in [
            (Problem::not_running(Path::new("/x")), 3),
            (Problem::port_in_use(address, "in use"), 1),
            (Problem::token_mistyped("short"), 2),
            (Problem::no_quorum(""), 5),
            (Problem::new(Code::TimedOut, ""), 7),
            (Problem::new(Code::Interrupted, ""), 130),
        ] {
            assert_eq!(problem.exit, status, "{problem}");
        }
        assert_eq!((exit::OK, exit::DEGRADED, exit::PROBLEMS_FOUND), (0, 4, 6));
    }
}
