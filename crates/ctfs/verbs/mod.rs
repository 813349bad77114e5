//! One verb, one file.

pub mod cache;
pub mod config;
pub mod daemon;
pub mod df;
pub mod diff;
pub mod down;
pub mod info;
pub mod launch;
pub mod mount;
pub mod node;
pub mod nodes;
pub mod policy;
pub mod quota;
pub mod status;
pub mod sync;
pub mod token;
pub mod umount;
pub mod up;
pub mod version;

use std::{path::Path, time::Duration};

use ctfs_node::{
    admin::{AdminClient, DoneReport, Request, Response, WirePath},
    problem::{Code, Problem},
};

use crate::{Context, errors::spelled, mounts};

/// For what the daemon answers from its own memory, or after asking its peers once.
pub const LOOK: Duration = Duration::from_secs(15);
/// For what needs a majority of the servers.
pub const CHANGE: Duration = Duration::from_secs(60);
/// For what writes the cache out first.
pub const FLUSH: Duration = Duration::from_secs(900);

/// Asks the daemon of this state directory.
pub fn ask(context: &Context, request: &Request, deadline: Duration) -> Result<Response, Problem> {
    AdminClient::call(&context.state, request, deadline).map_err(|error| error.into_problem(&context.state))
}

/// The daemon answered with a document that belongs to another request.
pub fn unexpected() -> Problem {
    Problem::new(Code::VersionsDiffer, "the daemon's answer does not fit the question")
        .why("the daemon is of another version than this program")
        .try_next("restart it: ctfs down, then ctfs up")
}

/// For requests that only do something.
pub fn ask_to(context: &Context, request: &Request, deadline: Duration) -> Result<DoneReport, Problem> {
    match ask(context, request, deadline)? {
        Response::Done(done) => Ok(done),
        _ => Err(unexpected()),
    }
}

/// Says what was done.
pub fn say_done(context: &Context, done: &DoneReport) {
    let mut text = format!("{}\n", done.message);
    for note in &done.notes {
        text += &format!("  note  {}\n", spelled(note, &context.state));
    }
    context.ui.print(&text);
}

/// A path as the daemon compares it: absolute, directories without symlinks, the last component as
/// it is, because it may be a symlink inside the file system that is meant itself.
pub fn named(path: &Path) -> WirePath {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => WirePath(mounts::resolved(parent).join(name)),
        _ => WirePath(path),
    }
}
