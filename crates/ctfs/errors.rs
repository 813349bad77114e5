//! How problems look on a terminal.

use std::path::Path;

use ctfs_node::problem::Problem;

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

/// A command to type, with the state directory where it is not the usual one.
pub fn spelled(step: &str, state: &Path) -> String {
    let usual = state == Path::new(STATE_DEFAULT) || std::env::var_os("CTFS_STATE").is_some_and(|dir| dir == state.as_os_str());
    match step.strip_prefix("ctfs ") {
        Some(rest) if !usual && !rest.starts_with("--state") => format!("ctfs --state {} {rest}", state.display()),
        _ => step.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use ctfs_node::problem::{Code, exit};

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
