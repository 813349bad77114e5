//! `ctfs policy`: copies, chunk size, durability and what reads do in a partition, by directory.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use ctfs_node::{
    admin::{PolicyReport, Request, Response},
    problem::exit,
};
use ctfs_meta::{Durability, OnPartition};
use ctfs_types::{ByteSize, CellSize, limits::COPIES_ON_EVERY};

use crate::{Context, choices::Copies, errors::Outcome};

/// Copies, chunk size, durability and more of a directory
#[derive(Debug, Args)]
pub struct Policy {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Set a policy for everything below a directory that sets no other
    ///
    /// All of them concern what is written from now on.
    #[command(group(clap::ArgGroup::new("what").required(true).multiple(true)), after_help = "Examples:\n  ctfs policy set /srv/data/db --copies 3\n  ctfs policy set /srv/data/video --chunk-size 8MiB\n  ctfs policy set /srv/data/build --durability local\n  ctfs policy set /srv/data/db --on-partition block")]
    Set {
        path: PathBuf,

        /// Servers that hold each chunk: auto or a number
        #[arg(long, value_name = "N", group = "what")]
        copies: Option<Copies>,

        /// Size of a chunk: a power of two, 256KiB to 8MiB
        #[arg(long, value_name = "SIZE", value_parser = cell_size, group = "what")]
        chunk_size: Option<CellSize>,

        /// What fsync waits for: the disk of this server, of two servers, of as many as there are copies, or of all
        #[arg(long, value_name = "CLASS", value_parser = durability, group = "what")]
        durability: Option<Durability>,

        /// What reads do on a server that cannot reach most of the others: answer what it knew last, wait, or fail
        #[arg(long, value_name = "CHOICE", value_parser = on_partition, group = "what")]
        on_partition: Option<OnPartition>,
    },
    /// Show what is set and what is in force
    Show {
        path: PathBuf,

        /// For machines
        #[arg(long)]
        json: bool,
    },
}

fn durability(text: &str) -> Result<Durability, String> {
    Durability::of_name(text.as_bytes()).ok_or_else(|| "a class is local, pair, quorum or all".into())
}

fn on_partition(text: &str) -> Result<OnPartition, String> {
    OnPartition::of_name(text.as_bytes()).ok_or_else(|| "it is stale, block or error".into())
}

fn cell_size(text: &str) -> Result<CellSize, String> {
    let size: ByteSize = text.parse().map_err(|error| format!("{error}"))?;
    CellSize::from_bytes(size.0).ok_or_else(|| "a chunk is a power of two, 256KiB to 8MiB".into())
}

impl Policy {
    pub fn run(self, context: &Context) -> Outcome {
        let (request, json) = match self.verb {
            Verb::Set { path, copies, chunk_size, durability, on_partition } => {
                let (path, copies) = (super::named(&path), copies.map(Copies::number));
                (Request::PolicySet { path, copies, cell: chunk_size, durability, on_partition }, false)
            }
            Verb::Show { path, json } => (Request::PolicyShow { path: super::named(&path) }, json),
        };
        match super::ask(context, &request, super::CHANGE)? {
            Response::Policy(report) if json => context.ui.json(&report)?,
            Response::Policy(report) => context.ui.print(&render(&report)),
            _ => return Err(super::unexpected()),
        }
        Ok(exit::OK)
    }
}

fn render(report: &PolicyReport) -> String {
    let origin = |set: bool| if set { "set here" } else { "inherited" };
    let copies = match report.copies {
        0 => "auto".into(),
        COPIES_ON_EVERY => "all".into(),
        copies => copies.to_string(),
    };
    format!(
        "{}\n  copies      {copies} ({}), now {}\n  chunk size  {} ({})\n  durability  {} ({})\n  cut off     {} ({})\n",
        report.path,
        origin(report.copies_set.is_some()),
        report.copies_now,
        report.cell,
        origin(report.cell_set.is_some()),
        report.durability.name(),
        origin(report.durability_set.is_some()),
        match report.on_partition {
            OnPartition::Stale => "reads are answered as last known",
            OnPartition::Block => "reads wait",
            OnPartition::Error => "reads fail",
        },
        origin(report.on_partition_set.is_some()),
    )
}

#[cfg(test)]
mod tests {
    use ctfs_node::admin::WirePath;

    use super::*;

    #[test]
    fn a_policy_says_what_is_in_force_and_where_it_comes_from() {
        let report = PolicyReport {
            path: WirePath("/srv/data/db".into()),
            copies_set: Some(3),
            cell_set: None,
            copies: 3,
            cell: ByteSize(1 << 20),
            copies_now: 2,
            durability_set: None,
            durability: Durability::Pair,
            on_partition_set: None,
            on_partition: OnPartition::Stale,
        };
        assert_eq!(render(&report), "/srv/data/db\n  copies      3 (set here), now 2\n  chunk size  1.0 MiB (inherited)\n  durability  pair (inherited)\n  cut off     reads are answered as last known (inherited)\n");
    }

    #[test]
    fn a_class_of_durability_is_one_of_four() {
        for class in Durability::EACH {
            assert_eq!(durability(class.name()), Ok(class));
        }
        assert!(durability("two").is_err());
    }

    #[test]
    fn a_chunk_size_is_a_power_of_two_in_range() {
        assert!(cell_size("1MiB").is_ok() && cell_size("8MiB").is_ok() && cell_size("256KiB").is_ok());
        for bad in ["3MiB", "16MiB", "4096", "x"] {
            assert!(cell_size(bad).is_err(), "{bad}");
        }
    }
}
