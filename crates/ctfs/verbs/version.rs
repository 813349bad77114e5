//! `ctfs version`.

use clap::Args;
use ctfs_node::problem::exit;
use serde::Serialize;

use crate::{Context, errors::Outcome};

/// Print the version
#[derive(Debug, Args)]
pub struct Version {
    /// For machines
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
}

impl Version {
    pub fn run(self, context: &Context) -> Outcome {
        let report = Report { version: env!("CARGO_PKG_VERSION") };
        if self.json {
            context.ui.json(&report)?;
        } else {
            context.ui.print(&format!("ctfs {}\n", report.version));
        }
        Ok(exit::OK)
    }
}
