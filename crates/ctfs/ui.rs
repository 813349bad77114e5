//! What goes to the terminal: colours, columns, numbers as people read them, JSON.

use std::io::{self, IsTerminal, Write};

use ctfs_node::problem::{Problem, exit};
use ctfs_types::ByteSize;
use serde::Serialize;

/// How to talk to whoever sits there.
#[derive(Debug, Clone, Copy)]
pub struct Ui {
    color: bool,
}

impl Ui {
    /// Colours only where a terminal is and nobody asked for none (<https://no-color.org>).
    pub fn new(no_color: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let asked = no_color || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { color: !asked && !dumb && std::io::stdout().is_terminal() && std::io::stderr().is_terminal() }
    }

    #[cfg(test)]
    pub fn plain() -> Self {
        Self { color: false }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub fn red(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    pub fn yellow(self, text: &str) -> String {
        self.paint("1;33", text)
    }

    pub fn green(self, text: &str) -> String {
        self.paint("1;32", text)
    }

    /// Writes data to stdout.
    pub fn print(self, text: &str) {
        let mut out = std::io::stdout().lock();
        let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) else { return };
        // `ctfs status | head -1` closes the pipe early; that is no error of anybody.
        if error.kind() == io::ErrorKind::BrokenPipe {
            std::process::exit(exit::OK.into());
        }
        // A script that goes on would take half a line for the answer.
        let problem = Problem::io("write to stdout", &error);
        self.talk(&format!("{}: {}\n  why   {error}\n", self.red(&format!("error[{}]", problem.code)), problem.what));
        std::process::exit(problem.exit.into());
    }

    /// Writes talk to stderr.
    pub fn talk(self, text: &str) {
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }

    /// Prints a report for machines, with the version of its shape.
    pub fn json<T: Serialize>(self, report: &T) -> Result<(), Problem> {
        let internal = |error: serde_json::Error| Problem::internal(&error.to_string());
        let mut value = serde_json::to_value(report).map_err(internal)?;
        if let Some(object) = value.as_object_mut() {
            object.insert("schema".into(), 1.into());
        }
        self.print(&format!("{}\n", serde_json::to_string_pretty(&value).map_err(internal)?));
        Ok(())
    }
}

/// Columns under a header, one space in from the left and two apart.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_content_arrangement(comfy_table::ContentArrangement::Disabled);
    table.set_header(header.iter().copied());
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((1, 1));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// `12 841`: digits in groups of three.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// `1 file`, `2 files`.
pub fn counted(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(number), if number == 1 { "" } else { "s" })
}

/// `74.0 GiB / 120.0 GiB  61 %`, with `-` for what is not known.
pub fn filled(used: Option<ByteSize>, limit: Option<ByteSize>) -> String {
    match (used, limit) {
        (Some(used), Some(limit)) => format!("{used} / {limit}  {} %", percent(used.0, limit.0)),
        (Some(used), None) => used.to_string(),
        _ => "-".into(),
    }
}

/// Whole percent, rounded down; 0 of 0 is 0.
pub fn percent(part: u64, whole: u64) -> u64 {
    let of_nothing = if part == 0 { 0 } else { 100 };
    (u128::from(part) * 100).checked_div(u128::from(whole)).unwrap_or(of_nothing) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_three() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1 000"), (412_384, "412 384"), (1_234_567, "1 234 567")] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!((counted(1, "file"), counted(2, "file")), ("1 file".into(), "2 files".into()));
    }

    #[test]
    fn a_share_of_nothing_is_nothing() {
        assert_eq!((percent(0, 0), percent(5, 0)), (0, 100));
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
    }

    #[test]
    fn columns_line_up_and_no_line_ends_in_blanks() {
        let text = table(&["a", "long header"], vec![vec!["xx".into(), "y".into()]]);
        assert_eq!(text, " a   long header\n xx  y\n");
    }
}
