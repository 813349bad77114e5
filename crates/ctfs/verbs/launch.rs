//! Starting the daemon without a service manager, and what it says back.
//!
//! `up` starts this same program again as `ctfs daemon` with three pipes and files: on stdin it
//! gets the [`Plan`] (so that a token is in no argument list), on stdout it answers one line of
//! JSON, a [`Hello`], and stderr is `STATE/ctfs.log`. The end of stdout without a line means that
//! it died; then the end of the log says why.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use ctfs_node::problem::{Code, Problem};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use crate::{plan::Plan, ui::Ui};

/// What the daemon says once, when its start is decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hello {
    Ready { pid: u32 },
    Failed(Problem),
}

/// Replaying a long log or fetching a snapshot of millions of files takes minutes, not more.
const START_DEADLINE: Duration = Duration::from_secs(900);
/// When to say that it is still going on.
const START_SLOW: Duration = Duration::from_secs(10);
const HELLO_BYTES_MAX: u64 = 1 << 20;
/// A log that grew past this is put aside at the next start; one older log is kept.
const LOG_BYTES_MAX: u64 = 16 << 20;
const LOG_LINES_SHOWN: usize = 8;

pub fn log_path(state: &Path) -> PathBuf {
    state.join("ctfs.log")
}

/// Starts the daemon and waits until it serves.
///
/// # Errors
/// What the daemon says, E0129 when it died without a word, E0123 when it takes too long, E0131 on
/// Ctrl-C; the daemon is told to stop then.
pub fn launch(plan: &Plan, ui: Ui) -> Result<(), Problem> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Problem::io("start the runtime", &error))?;
    runtime.block_on(start(plan, ui))
}

async fn start(plan: &Plan, ui: Ui) -> Result<(), Problem> {
    let fail = |error: io::Error| Problem::io("start the daemon", &error);
    // Listening first: a Ctrl-C from here on is ours to handle.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    let log = open_log(plan.state())?;
    let log_before = log.metadata().map(|meta| meta.len()).unwrap_or(0);
    let mut child = Command::new(std::env::current_exe().map_err(fail)?)
        .arg("--state")
        .arg(plan.state())
        .arg("daemon")
        .env_remove("CTFS_TOKEN")
        // Ready is said to whoever typed `up`, not to a service manager around the shell.
        .env_remove("NOTIFY_SOCKET")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(fail)?;
    hand_over(plan, &mut child).await?;
    let hello = tokio::select! {
        hello = tokio::time::timeout(START_DEADLINE, hello(&mut child, ui, plan.state())) => hello,
        _ = interrupt.recv() => {
            stop(&child);
            return Err(Problem::new(Code::Interrupted, "interrupted: the daemon was told to stop").try_next("ctfs status"));
        }
    };
    match hello {
        Ok(Some(Hello::Ready { .. })) => Ok(()),
        Ok(Some(Hello::Failed(problem))) => Err(problem),
        Ok(None) => Err(died(&mut child, plan.state(), log_before).await),
        Err(_) => Err(Problem::new(Code::TimedOut, format!("the daemon is not ready after {} s", START_DEADLINE.as_secs()))
            .why("it was left running; it may still come up")
            .try_next("ctfs status --wait healthy --timeout 10m")
            .try_next(format!("tail {}", log_path(plan.state()).display()))),
    }
}

async fn hand_over(plan: &Plan, child: &mut Child) -> Result<(), Problem> {
    let text = serde_json::to_vec(plan).map_err(|error| Problem::internal(&error.to_string()))?;
    let mut stdin = child.stdin.take().ok_or_else(|| Problem::internal("the daemon has no stdin"))?;
    // A daemon that died at once is reported below, with its last words, not as a broken pipe here.
    let _ = stdin.write_all(&text).await;
    let _ = stdin.shutdown().await;
    Ok(())
}

/// Reads the daemon's line; `None` when it ended without one.
async fn hello(child: &mut Child, ui: Ui, state: &Path) -> Option<Hello> {
    let stdout = child.stdout.take()?;
    let mut reader = BufReader::new(stdout.take(HELLO_BYTES_MAX));
    let mut line = String::new();
    let reading = reader.read_line(&mut line);
    tokio::pin!(reading);
    tokio::select! {
        read = &mut reading => { read.ok()?; }
        () = tokio::time::sleep(START_SLOW) => {
            ui.talk(&format!("  still starting; its log is {}\n", log_path(state).display()));
            reading.await.ok()?;
        }
    }
    serde_json::from_str(&line).ok()
}

fn stop(child: &Child) {
    let pid = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32));
    if let Some(pid) = pid {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

async fn died(child: &mut Child, state: &Path, log_before: u64) -> Problem {
    let how = match tokio::time::timeout(Duration::from_secs(5), child.wait()).await {
        Ok(Ok(status)) => status.to_string(),
        _ => "its end could not be observed".into(),
    };
    let path = log_path(state);
    let words = last_words(&path, log_before);
    Problem::new(Code::DiedAtStart, format!("the daemon ended before it was ready ({how})"))
        .why(if words.is_empty() { "it logged nothing".into() } else { words })
        .try_next(format!("less {}", path.display()))
        .try_next("watch it start: ctfs up --foreground")
}

/// The last lines written to the log after `from`.
fn last_words(log: &Path, from: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(from.max(end.saturating_sub(16 << 10))))?;
        let mut text = Vec::new();
        file.take(16 << 10).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}

fn open_log(state: &Path) -> Result<File, Problem> {
    let path = log_path(state);
    if fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_BYTES_MAX) {
        let _ = fs::rename(&path, state.join("ctfs.log.1"));
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| Problem::io(&format!("open {}", path.display()), &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemons_line_reads_as_the_documentation_spells_it() {
        assert_eq!(serde_json::to_string(&Hello::Ready { pid: 7 }).unwrap(), r#"{"ready":{"pid":7}}"#);
        let failed = Hello::Failed(Problem::token_expired());
        let line = serde_json::to_string(&failed).unwrap();
        assert!(line.starts_with(r#"{"failed":{"code":"E0108""#), "{line}");
        assert_eq!(serde_json::from_str::<Hello>(&line).unwrap(), failed);
    }

    #[test]
    fn the_last_words_are_of_this_start_only() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("ctfs.log");
        let old = "old\n".repeat(3);
        fs::write(&log, format!("{old}{}", (0..20).map(|i| format!("line {i}\n")).collect::<String>())).unwrap();
        let words = last_words(&log, old.len() as u64);
        assert_eq!((words.lines().count(), words.lines().last()), (LOG_LINES_SHOWN, Some("line 19")));
        assert_eq!(last_words(&log, fs::metadata(&log).unwrap().len()), "");
        assert_eq!(last_words(&dir.path().join("none"), 0), "");
    }

    #[test]
    fn a_log_that_grew_long_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        File::create(log_path(dir.path())).unwrap().set_len(LOG_BYTES_MAX + 1).unwrap();
        assert_eq!(open_log(dir.path()).unwrap().metadata().unwrap().len(), 0);
        assert!(dir.path().join("ctfs.log.1").exists());
    }
}
