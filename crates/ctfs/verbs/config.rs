//! `ctfs config check`: is the file right, before a restart depends on it.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use ctfs_node::problem::{Problem, exit};

use crate::{Context, config, errors::Outcome};

/// Look at the configuration file
#[derive(Debug, Args)]
pub struct Config {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Check a file: exit status 0 when it is right, 6 when not
    Check {
        #[arg(default_value = config::DEFAULT_PATH)]
        file: PathBuf,
    },
}

impl Config {
    pub fn run(self, context: &Context) -> Outcome {
        let Verb::Check { file } = self.verb;
        let text = config::read(&file)?;
        match config::parse(&text) {
            Ok(_) => {
                context.ui.print(&format!("{} is right\n", file.display()));
                Ok(exit::OK)
            }
            Err(faults) => Err(Problem { exit: exit::PROBLEMS_FOUND, ..config::problem(&file, &faults) }),
        }
    }
}
