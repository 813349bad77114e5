//! `ctfs info PATH`: where a file is.

use std::path::PathBuf;

use clap::Args;
use ctfs_node::{
    admin::{CachedAs, CellKind, CellReport, HolderReport, InfoReport, Request, Response},
    problem::exit,
};
use ctfs_types::{ByteSize, limits::COPIES_ON_EVERY};

use crate::{
    Context,
    errors::Outcome,
    ui::{grouped, percent, table},
};

/// Where a file is: chunks, copies, what is cached here
#[derive(Debug, Args)]
#[command(after_help = "Holders are in placement order: the first as many as there are copies should have it.\n  node1 has it   node2 (no) lacks it   node3 (?) did not answer")]
pub struct Info {
    /// A file or directory in the file system
    path: PathBuf,

    /// List every chunk
    #[arg(long)]
    all: bool,

    /// For machines
    #[arg(long)]
    json: bool,
}

/// A screenful.
const CELLS_SHOWN: usize = 40;

impl Info {
    pub fn run(self, context: &Context) -> Outcome {
        let request = Request::Info { path: super::named(&self.path) };
        let Response::Info(report) = super::ask(context, &request, super::CHANGE)? else {
            return Err(super::unexpected());
        };
        if self.json {
            context.ui.json(&report)?;
        } else {
            context.ui.print(&render(&report, if self.all { usize::MAX } else { CELLS_SHOWN }));
        }
        Ok(exit::OK)
    }
}

fn render(report: &InfoReport, most: usize) -> String {
    let copies = match report.copies {
        0 => format!("auto, now {}", report.copies_now),
        COPIES_ON_EVERY => format!("all, now {}", report.copies_now),
        copies => format!("{copies}, now {}", report.copies_now),
    };
    let mut text = format!("{}\n", report.path);
    text += &format!("  inode   {} ({})\n", report.ino, report.kind);
    text += &format!("  size    {} ({} bytes), {} allocated\n", report.size, grouped(report.size.0), report.allocated);
    let class = report.durability.name();
    text += &format!("  policy  copies {copies}; cells of {}; durability {class}\n", report.cell);
    if let Some(holder) = &report.holder {
        text += &format!("  held    by {holder}, which alone changes it now\n");
    }
    if report.kind == "file" {
        let share = percent(report.cached.0, report.size.0).min(100);
        let dirty = if report.dirty.0 > 0 { format!(", {} not yet on the stores", report.dirty) } else { String::new() };
        text += &format!("  cached  {} here ({share} %){dirty}\n", report.cached);
    }
    if !report.cells.is_empty() {
        let rows = report.cells.iter().take(most).map(cell).collect();
        text += "\n";
        text += &table(&["cell", "offset", "length", "data", "cached", "holders"], rows);
    }
    let more = report.cells_more + report.cells.len().saturating_sub(most) as u64;
    if more > 0 {
        text += &format!(" ... and {} more\n", grouped(more));
    }
    text
}

fn cell(cell: &CellReport) -> Vec<String> {
    let data = match (&cell.kind, &cell.chunk) {
        (CellKind::Hole, _) => "hole".into(),
        (CellKind::Inline, _) => "inline".into(),
        // Sixteen digits name a chunk among 2^32 with near certainty and leave room for the holders.
        (CellKind::Chunk, Some(id)) => id.chars().take(16).collect(),
        (CellKind::Chunk, None) => "chunk".into(),
    };
    let holders = match cell.kind {
        CellKind::Chunk => cell.holders.iter().map(holder).collect::<Vec<_>>().join(", "),
        CellKind::Inline => "every server".into(),
        CellKind::Hole => "-".into(),
    };
    let cached = match cell.cached {
        CachedAs::None => "-",
        CachedAs::Clean => "clean",
        CachedAs::Dirty => "dirty",
    };
    vec![cell.index.to_string(), ByteSize(cell.offset).to_string(), ByteSize(cell.len).to_string(), data, cached.into(), holders]
}

fn holder(holder: &HolderReport) -> String {
    let mark = match holder.holds {
        Some(true) => "",
        Some(false) => " (no)",
        None => " (?)",
    };
    let why = if holder.why.is_empty() { String::new() } else { format!(": {}", holder.why) };
    format!("{}{mark}{why}", holder.name)
}

#[cfg(test)]
mod tests {
    use ctfs_meta::Durability;
    use ctfs_node::admin::WirePath;

    use super::*;

    fn report() -> InfoReport {
        let holder = |name: &str, rank, holds| HolderReport { name: name.into(), rank, holds, why: String::new() };
        let chunk = CellReport {
            index: 0,
            offset: 0,
            len: 1 << 20,
            kind: CellKind::Chunk,
            chunk: Some("ab".repeat(32)),
            holders: vec![holder("node1", 1, Some(true)), holder("node2", 2, Some(false)), holder("node3", 3, None)],
            cached: CachedAs::Clean,
        };
        let hole = CellReport { index: 1, offset: 1 << 20, len: 3 << 20, kind: CellKind::Hole, chunk: None, holders: vec![], cached: CachedAs::None };
        InfoReport {
            path: WirePath("/srv/data/a".into()),
            ino: 42,
            kind: "file".into(),
            size: ByteSize(4 << 20),
            allocated: ByteSize(1 << 20),
            copies: 0,
            copies_now: 2,
            cell: ByteSize(1 << 20),
            durability: Durability::Pair,
            holder: Some("node2".into()),
            cells: vec![chunk, hole],
            cells_more: 0,
            cached: ByteSize(1 << 20),
            dirty: ByteSize(0),
        }
    }

    #[test]
    fn info_shows_each_chunk_with_who_has_it() {
        assert_eq!(
            render(&report(), 40),
            "\
/srv/data/a
  inode   42 (file)
  size    4.0 MiB (4 194 304 bytes), 1.0 MiB allocated
  policy  copies auto, now 2; cells of 1.0 MiB; durability pair
  held    by node2, which alone changes it now
  cached  1.0 MiB here (25 %)

 cell  offset   length   data              cached  holders
 0     0 B      1.0 MiB  abababababababab  clean   node1, node2 (no), node3 (?)
 1     1.0 MiB  3.0 MiB  hole              -       -
"
        );
    }

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        assert!(render(&report(), 1).ends_with(" ... and 1 more\n"));
        let cut = InfoReport { cells_more: 1_000_000, ..report() };
        assert!(render(&cut, 1).ends_with(" ... and 1 000 001 more\n"));
    }
}
