//! `ctfs down`: write out, unmount, end.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use clap::Args;
use ctfs_node::{
    admin::{AdminClient, ClientError, DoneReport, Request, Response},
    problem::{Code, Problem, exit},
};
use rustix::process::{Pid, PidfdFlags};

use super::launch;
use crate::{Context, choices, errors::{Outcome, spelled}, mounts, plan::Memory};

/// Write everything out, unmount and stop the daemon
///
/// Returns when the daemon is gone. Its data stays; `ctfs up` brings it back.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ctfs down\n  ctfs down --timeout 30m      a full cache over a slow line takes its time")]
pub struct Down {
    /// How long to wait for it
    #[arg(long, value_name = "TIME", value_parser = choices::duration, default_value = "5m")]
    timeout: Duration,
}

impl Down {
    pub fn run(self, context: &Context) -> Outcome {
        let until = Instant::now() + self.timeout;
        let state = &context.state;
        let pid = match AdminClient::call(state, &Request::Ping, super::LOOK.min(self.timeout)) {
            Ok(Response::Ping(ping)) => ping.pid,
            Ok(_) => return Err(super::unexpected()),
            Err(ClientError::NotRunning) => return already(context),
            Err(error) => return Err(error.into_problem(state)),
        };
        // Taken before it is told to end: the number could belong to somebody else afterwards.
        let process = match Pid::from_raw(pid as i32).map(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty())) {
            Some(Ok(process)) => Some(process),
            Some(Err(rustix::io::Errno::SRCH)) => None,
            Some(Err(error)) => return Err(Problem::io("watch the daemon", &io::Error::from(error))),
            None => return Err(super::unexpected()),
        };
        let done = match AdminClient::call(state, &Request::Down, self.timeout) {
            Ok(Response::Done(done)) => done,
            Ok(_) => return Err(super::unexpected()),
            // It went away before its answer was written, or between two calls.
            Err(ClientError::Broken(_) | ClientError::NotRunning) => DoneReport::default(),
            Err(error) => return Err(error.into_problem(state)),
        };
        if let Some(process) = process {
            wait(process, until, context)?;
        }
        // The daemon answered before it was through; now it is.
        super::say_done(context, &DoneReport { message: format!("down; `{}` brings it back", spelled("ctfs up", &context.state)), notes: done.notes });
        Ok(exit::OK)
    }
}

/// Nothing runs; a mount may be left of a daemon that was killed.
fn already(context: &Context) -> Outcome {
    let memory = Memory::load(&context.state)?;
    match memory.as_ref().and_then(Memory::mountpoint) {
        Some(path) if mounts::detach_dead(path)? => {
            context.ui.print(&format!("took the dead mount off {}; no daemon was running\n", path.display()));
        }
        _ => context.ui.print(&format!("already down (no daemon runs on {})\n", context.state.display())),
    }
    Ok(exit::OK)
}

/// Waits until the process of a pidfd has ended: it is readable then (pidfd_open(2)).
fn wait(process: OwnedFd, until: Instant, context: &Context) -> Result<(), Problem> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut watched = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd of our own, and the descriptor in it stays open for the call.
        let ready = unsafe { libc::poll(&mut watched, 1, i32::try_from(left.as_millis()).unwrap_or(i32::MAX)) };
        match ready {
            1.. => return Ok(()),
            0 if left.is_zero() => break,
            0 => {}
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(Problem::io("wait for the daemon to end", &error)),
            },
        }
    }
    Err(Problem::new(Code::TimedOut, "the daemon is still writing out")
        .why("it goes on and ends by itself")
        .try_next("ctfs down    waits again")
        .try_next(format!("tail -f {}", launch::log_path(&context.state).display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ui::Ui;

    #[test]
    fn the_end_of_a_process_is_seen_and_waiting_for_it_is_bounded() {
        let context = Context { state: "/nowhere".into(), ui: Ui::plain() };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let watch = || rustix::process::pidfd_open(Pid::from_raw(child.id() as i32).unwrap(), PidfdFlags::empty()).unwrap();
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(wait(watch(), soon, &context).unwrap_err().is(Code::TimedOut));
        let process = watch();
        child.kill().unwrap();
        wait(process, Instant::now() + Duration::from_secs(30), &context).unwrap();
        child.wait().unwrap();
    }
}
