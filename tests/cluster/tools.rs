//! Programs that the tests run on a mount.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use crate::support::{REPO, text};

/// Path of a program that `scripts/prepare test` builds from a crate.
pub fn tool(name: &str) -> String {
    let path = Path::new(REPO).join("target/tools/bin").join(name);
    assert!(path.exists(), "{} is missing: run scripts/prepare test", path.display());
    path.display().to_string()
}

/// Path of one of the programs beside the tests.
pub fn script(name: &str) -> String {
    format!("{REPO}/tests/cluster/scripts/{name}")
}

/// A number that the environment may raise, for longer runs than the usual one.
pub fn setting(name: &str, usual: u64) -> u64 {
    match std::env::var(name) {
        Ok(value) => value.parse().unwrap_or_else(|error| panic!("{name}={value}: {error}")),
        Err(_) => usual,
    }
}

/// Runs a line of bash to its end, no longer than `limit`; what it printed, and whether it succeeded.
pub fn try_run(limit: Duration, line: &str) -> (String, bool) {
    let output = Command::new("timeout")
        .args(["-k", "5", &limit.as_secs().to_string(), "bash", "-euo", "pipefail", "-c", line])
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .expect("run timeout");
    (text(&output.stdout) + &text(&output.stderr), output.status.success())
}

/// Runs a line of bash that must succeed.
#[track_caller]
pub fn run(limit: Duration, line: &str) -> String {
    let (said, succeeded) = try_run(limit, line);
    assert!(succeeded, "{line}\nfailed or took longer than {limit:?}:\n{said}");
    said
}
