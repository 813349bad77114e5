//! `ctfs diff SRC PATH`: are two trees the same.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, IsTerminal, Stderr, Write},
    num::NonZeroUsize,
    ops::ControlFlow,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use ctfs_diff::{Difference, Error, Event, Finding, Progress, Settings, Trouble, compare, escape};
use ctfs_node::problem::{Problem, exit};
use ctfs_types::ByteSize;
use serde::Serialize;

use crate::{Context, choices, errors::Outcome, ui::counted};

/// Compare two trees in everything a file system can hold
///
/// Names, types, content, sizes, modes, owners, groups, mtimes to the nanosecond (also of directories
/// and symlinks), hard links, devices, symlink targets, xattrs, ACLs and holes. Works on any two
/// directories or files, without a daemon, and changes nothing.
#[derive(Debug, Args)]
#[command(after_help = "Each difference is one line: what, path, in SRC -> in PATH.\n\n\
                        Exit status: 0 the same, 6 different, 1 not different as far as could be read, but not\n\
                        everything could.\n\n\
                        Examples:\n  ctfs diff /srv/data.old /srv/data\n  ctfs diff --limit 20 /backup/home /home\n  \
                        ctfs diff --json a b | jq -r '.differences[].path'")]
pub struct Diff {
    /// A directory or file
    #[arg(value_name = "SRC")]
    source: PathBuf,

    /// What should be the same
    #[arg(value_name = "PATH")]
    target: PathBuf,

    /// Compare access times too
    #[arg(long)]
    atime: bool,

    /// Enter what is mounted below SRC or PATH
    #[arg(long)]
    cross_mounts: bool,

    /// Show at most N differences and N errors; all are counted
    #[arg(long, value_name = "N", value_parser = choices::count)]
    limit: Option<u64>,

    /// Threads that read
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    threads: Option<u8>,

    /// For machines
    #[arg(long)]
    json: bool,
}

impl Diff {
    pub fn run(self, context: &Context) -> Outcome {
        let mut settings = Settings { atime: self.atime, cross_mounts: self.cross_mounts, ..Settings::default() };
        if let Some(threads) = self.threads.and_then(|threads| NonZeroUsize::new(threads.into())) {
            settings.threads = threads;
        }
        if !rustix::process::geteuid().is_root() {
            context.ui.talk("note: not root, so trusted.* attributes are not seen\n");
        }
        let mut report = Report::new(&self, BufWriter::new(io::stdout()));
        let progress = compare(&self.source, &self.target, &settings, &mut |event| report.hear(event))
            .map_err(|Error::Open { path, error }| Problem::io(&format!("open {}", path.display()), &error))?;
        report.end(progress);
        match report.failed {
            Some(error) => Err(Problem::io("write to stdout", &error)),
            None => Ok(report.tally.status()),
        }
    }
}

/// What was found, in numbers.
#[derive(Debug, Default, Serialize)]
struct Tally {
    differences_found: u64,
    /// By what differs.
    counts: BTreeMap<&'static str, u64>,
    errors_found: u64,
    /// Mount points below that were not entered.
    not_entered: u64,
    /// Names looked at.
    entries: u64,
    /// Bytes of content compared.
    bytes: u64,
}

impl Tally {
    fn status(&self) -> u8 {
        match (self.differences_found, self.errors_found) {
            (0, 0) => exit::OK,
            (0, _) => exit::FAILED,
            _ => exit::PROBLEMS_FOUND,
        }
    }

    fn verdict(&self) -> &'static str {
        match self.status() {
            exit::OK => "same",
            exit::FAILED => "unknown",
            _ => "different",
        }
    }

    /// The last line people see.
    fn summary(&self, shown: u64) -> String {
        let looked = format!("{}, {} of content", counted(self.entries, "name"), ByteSize(self.bytes));
        let mut text = match self.differences_found {
            0 if self.errors_found == 0 => format!("the same: {looked}"),
            0 => format!("no difference in what could be read: {looked}"),
            found => format!("{} in {looked}", counted(found, "difference")),
        };
        if shown < self.differences_found {
            text += &format!("; {} not shown", counted(self.differences_found - shown, "difference"));
        }
        if self.errors_found > 0 {
            text += &format!("; {}", counted(self.errors_found, "error"));
        }
        if self.not_entered > 0 {
            text += &format!("; {} not entered", counted(self.not_entered, "mount"));
        }
        text + "\n"
    }
}

/// Errors and mounts that the JSON document lists; they come after the differences and must be kept
/// until then. All are counted, and all are on stderr.
const KEPT_MAX: u64 = 1000;

/// Writes as it hears; nothing but counts is kept of differences.
struct Report<W: Write> {
    out: W,
    progress: Bar,
    json: bool,
    limit: u64,
    tally: Tally,
    errors: Vec<Trouble>,
    mounts: Vec<String>,
    /// Whoever read stdout has gone, or nothing can be written to it.
    closed: bool,
    /// Why nothing can be written to stdout while somebody wants it.
    failed: Option<io::Error>,
}

impl<W: Write> Report<W> {
    fn new(verb: &Diff, out: W) -> Self {
        Self {
            out,
            progress: Bar::new(),
            json: verb.json,
            limit: verb.limit.unwrap_or(u64::MAX),
            tally: Tally::default(),
            errors: Vec::new(),
            mounts: Vec::new(),
            closed: false,
            failed: None,
        }
    }

    fn hear(&mut self, event: Event) -> ControlFlow<()> {
        match event {
            Event::Found(Finding::Difference(difference)) => self.difference(&difference),
            Event::Found(Finding::Trouble(trouble)) => self.trouble(trouble),
            Event::Found(Finding::NotEntered { path }) => self.mount(&path),
            Event::Progress(progress) => {
                // What waits in the buffer is news for whoever watches.
                self.flush();
                self.progress.show(progress);
            }
        }
        // `ctfs diff a b | head` wants no more, and what was found so far decides the status.
        if self.closed { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn difference(&mut self, difference: &Difference) {
        let first = self.tally.differences_found == 0;
        self.tally.differences_found += 1;
        *self.tally.counts.entry(difference.what.as_str()).or_default() += 1;
        if self.tally.differences_found > self.limit {
            return;
        }
        self.progress.clear();
        if self.json {
            let text = serde_json::to_string(difference).expect("strings serialise");
            let before = if first { "{\n  \"differences\": [\n    " } else { ",\n    " };
            self.write(&format!("{before}{text}"));
        } else {
            self.write(&format!("{difference}\n"));
        }
    }

    fn trouble(&mut self, trouble: Trouble) {
        self.tally.errors_found += 1;
        if self.tally.errors_found <= self.limit {
            self.progress.say(&format!("error: {trouble}\n"));
        }
        if self.json && self.tally.errors_found <= self.limit.min(KEPT_MAX) {
            self.errors.push(trouble);
        }
    }

    fn mount(&mut self, path: &[u8]) {
        self.tally.not_entered += 1;
        let path = escape(path);
        if self.tally.not_entered <= self.limit {
            self.progress.say(&format!("note: {path}: something is mounted there, not entered (--cross-mounts)\n"));
        }
        if self.json && self.tally.not_entered <= self.limit.min(KEPT_MAX) {
            self.mounts.push(path);
        }
    }

    fn end(&mut self, progress: Progress) {
        self.progress.clear();
        (self.tally.entries, self.tally.bytes) = (progress.entries, progress.bytes);
        if self.json {
            let shown = self.tally.differences_found.min(self.limit);
            let before = if shown == 0 { "{\n  \"differences\": [" } else { "\n  " };
            let end = JsonEnd { errors: &self.errors, mounts: &self.mounts, tally: &self.tally, verdict: self.tally.verdict(), schema: 1 };
            let text = serde_json::to_string_pretty(&end).expect("strings and numbers serialise");
            let text = text.strip_prefix('{').unwrap_or(&text).to_owned();
            self.write(&format!("{before}],{text}\n"));
        } else {
            let summary = self.tally.summary(self.tally.differences_found.min(self.limit));
            self.write(&summary);
        }
        self.flush();
    }

    fn write(&mut self, text: &str) {
        let written = self.out.write_all(text.as_bytes());
        self.note(written);
    }

    fn flush(&mut self) {
        let flushed = self.out.flush();
        self.note(flushed);
    }

    fn note(&mut self, written: io::Result<()>) {
        let Err(error) = written else { return };
        self.closed = true;
        if error.kind() != io::ErrorKind::BrokenPipe {
            self.failed.get_or_insert(error);
        }
    }
}

/// What follows the differences in the one JSON object.
#[derive(Serialize)]
struct JsonEnd<'a> {
    errors: &'a [Trouble],
    mounts: &'a [String],
    #[serde(flatten)]
    tally: &'a Tally,
    verdict: &'static str,
    schema: u32,
}

/// How far it is, on stderr, when somebody sits there and it takes longer than a moment.
struct Bar {
    terminal: bool,
    started: Instant,
    shown: Option<Instant>,
    err: Stderr,
}

impl Bar {
    /// Shorter work is done before anybody asks.
    const AFTER: Duration = Duration::from_secs(1);
    /// Often enough to be seen moving.
    const EVERY: Duration = Duration::from_millis(200);

    fn new() -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self { terminal: io::stderr().is_terminal() && !dumb, started: Instant::now(), shown: None, err: io::stderr() }
    }

    fn show(&mut self, progress: Progress) {
        let now = Instant::now();
        if !self.terminal || now - self.started < Self::AFTER || self.shown.is_some_and(|shown| now - shown < Self::EVERY) {
            return;
        }
        self.shown = Some(now);
        let _ = write!(self.err.lock(), "\r\x1b[Kcompared {} names, {} of content", progress.entries, ByteSize(progress.bytes));
    }

    fn clear(&mut self) {
        if self.shown.take().is_some() {
            let _ = write!(self.err.lock(), "\r\x1b[K");
        }
    }

    fn say(&mut self, text: &str) {
        self.clear();
        let _ = self.err.lock().write_all(text.as_bytes());
    }
}
