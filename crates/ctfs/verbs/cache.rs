//! `ctfs cache`: this server's cache tier.

use clap::{Args, Subcommand};
use ctfs_node::{
    admin::{Request, Response},
    problem::exit,
};

use crate::{Context, errors::Outcome, ui::counted};

/// Look after this server's cache tier
#[derive(Debug, Args)]
pub struct Cache {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Empty what can be fetched again; what is only here stays
    Drop,
}

impl Cache {
    pub fn run(self, context: &Context) -> Outcome {
        let Verb::Drop = self.verb;
        let Response::CacheDrop(report) = super::ask(context, &Request::CacheDrop, super::CHANGE)? else {
            return Err(super::unexpected());
        };
        let kept = if report.kept.0 > 0 { format!("; {} kept: in use, or not yet on the stores", report.kept) } else { String::new() };
        context.ui.print(&format!("dropped {} of {}{kept}\n", report.freed, counted(report.files, "file")));
        Ok(exit::OK)
    }
}
