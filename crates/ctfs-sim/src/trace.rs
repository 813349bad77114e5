//! What happened, in order: one line for each message and each answer. The same seed makes the same trace.

use std::{fmt, time::Duration};

use ctfs_types::NodeId;

/// Lines kept for whoever looks at a failure; all of them count in the hash.
const LINES_KEPT: usize = 4000;

#[derive(Default)]
pub struct Trace {
    hasher: blake3::Hasher,
    lines: std::collections::VecDeque<String>,
    count: u64,
    /// Print each line as it comes.
    pub is_loud: bool,
}

impl Trace {
    pub fn line(&mut self, now: Duration, node: NodeId, what: fmt::Arguments<'_>) {
        let line = format!("{:>11.6} s{} {what}", now.as_secs_f64(), node.0);
        if self.is_loud {
            eprintln!("{line}");
        }
        self.hasher.update(line.as_bytes());
        self.count += 1;
        if self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// Counts in the hash and stands in no line.
    pub fn count(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.count += 1;
    }

    pub fn hash(&self) -> String {
        self.hasher.finalize().to_hex()[..16].to_owned()
    }

    pub fn events(&self) -> u64 {
        self.count
    }

    pub fn last(&self, lines: usize) -> impl Iterator<Item = &String> {
        self.lines.iter().skip(self.lines.len().saturating_sub(lines))
    }
}
