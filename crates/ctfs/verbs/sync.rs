//! `ctfs sync`: what every server has acknowledged, in the metadata and the chunk stores.

use clap::Args;
use ctfs_node::{admin::Request, problem::exit};

use crate::{Context, errors::Outcome};

/// Have every server put what it has acknowledged into the metadata and the chunk stores
#[derive(Debug, Args)]
pub struct Sync {}

impl Sync {
    pub fn run(self, context: &Context) -> Outcome {
        let done = super::ask_to(context, &Request::Sync, super::FLUSH)?;
        super::say_done(context, &done);
        Ok(exit::OK)
    }
}
