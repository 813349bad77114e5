//! `ctfs umount`: off the directory, the daemon goes on.

use clap::Args;
use ctfs_node::{
    admin::{AdminClient, ClientError, Request, Response},
    problem::{Problem, exit},
};

use crate::{Context, errors::Outcome, mounts, plan::Memory};

/// Unmount; the daemon goes on serving the other servers
///
/// Everything is written out first. `ctfs mount` mounts again.
#[derive(Debug, Args)]
pub struct Umount {
    /// Also when programs have files open: they get errors
    #[arg(long)]
    force: bool,
}

impl Umount {
    pub fn run(self, context: &Context) -> Outcome {
        match AdminClient::call(&context.state, &Request::Umount { force: self.force }, super::FLUSH) {
            Ok(Response::Done(done)) => super::say_done(context, &done),
            Ok(_) => return Err(super::unexpected()),
            Err(ClientError::NotRunning) => {
                let memory = Memory::load(&context.state)?;
                match memory.as_ref().and_then(Memory::mountpoint) {
                    Some(path) if mounts::detach_dead(path)? => {
                        context.ui.print(&format!("took the dead mount off {}\n", path.display()));
                    }
                    _ => return Err(Problem::not_running(&context.state)),
                }
            }
            Err(error) => return Err(error.into_problem(&context.state)),
        }
        Ok(exit::OK)
    }
}
