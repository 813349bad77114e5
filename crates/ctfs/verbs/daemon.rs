//! `ctfs daemon`: the other end of [`super::launch`].

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::fd::AsRawFd,
};

use ctfs_node::problem::Problem;

use super::launch::Hello;
use crate::{Context, daemon, errors::Outcome, plan::Plan};

/// A plan is a page of JSON.
const PLAN_BYTES_MAX: u64 = 1 << 20;

/// Serve as the plan on stdin says
#[derive(Debug, clap::Args)]
pub struct Daemon {}

impl Daemon {
    pub fn run(self, context: &Context) -> Outcome {
        close_inherited();
        let plan = receive()?;
        if plan.state() != context.state {
            return Err(Problem::internal("the plan on stdin is for another state directory"));
        }
        // Fails only for a process that leads a group already, and then it is detached already.
        let _ = rustix::process::setsid();
        let outcome = daemon::run(&plan, || say(&Hello::Ready { pid: std::process::id() }));
        if let Err(problem) = &outcome {
            // After ready nobody listens any more; the log has it then, by way of main.
            say(&Hello::Failed(problem.clone()));
        }
        outcome
    }
}

/// Closes what a careless parent left open: a pipe kept by a daemon keeps its reader waiting for ever.
fn close_inherited() {
    let first: libc::c_uint = 3;
    // SAFETY: runs before this process has opened anything of its own, so only inherited
    // descriptors go. An old kernel answers ENOSYS, and they stay.
    unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
}

fn receive() -> Result<Plan, Problem> {
    let mut text = Vec::new();
    io::stdin().lock().take(PLAN_BYTES_MAX).read_to_end(&mut text).map_err(|error| Problem::io("read the plan from stdin", &error))?;
    let plan = serde_json::from_slice(&text).map_err(|error| Problem::internal(&format!("the plan on stdin does not read: {error}; start servers with `ctfs up`")))?;
    let null = File::open("/dev/null").map_err(|error| Problem::io("open /dev/null", &error))?;
    replace(&null, libc::STDIN_FILENO);
    Ok(plan)
}

/// Says it once and closes the pipe, so that `up` can end.
fn say(hello: &Hello) {
    if let Ok(mut line) = serde_json::to_vec(hello) {
        line.push(b'\n');
        let mut out = io::stdout().lock();
        // `up` may have been interrupted; the server serves all the same.
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
    if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
        replace(&null, libc::STDOUT_FILENO);
    }
}

fn replace(file: &File, descriptor: i32) {
    // SAFETY: dup2 of an open descriptor onto a standard stream; the streams are owned by nobody.
    let result = unsafe { libc::dup2(file.as_raw_fd(), descriptor) };
    if result < 0 {
        tracing::warn!(error = %io::Error::last_os_error(), descriptor, "cannot replace a standard stream");
    }
}
