//! `ctfs mount`: on the directory again.

use std::path::PathBuf;

use clap::Args;
use ctfs_node::{
    admin::{Request, WirePath},
    problem::exit,
};

use crate::{Context, choices, errors::Outcome, mounts};

/// Mount again after `umount`
#[derive(Debug, Args)]
pub struct Mount {
    /// Directory to mount on [default: where it was mounted]
    #[arg(value_parser = choices::absolute)]
    path: Option<PathBuf>,
}

impl Mount {
    pub fn run(self, context: &Context) -> Outcome {
        let path = self.path.map(|path| mounts::resolved(&path));
        if let Some(path) = &path {
            mounts::validate(path, &[&context.state])?;
        }
        let done = super::ask_to(context, &Request::Mount { path: path.map(WirePath) }, super::CHANGE)?;
        super::say_done(context, &done);
        Ok(exit::OK)
    }
}
