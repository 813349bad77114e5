//! The admin protocol: how the program on a server talks to the daemon on the same server.
//!
//! One connection to `STATE/admin.sock` carries one request, a JSON object on one line such as
//! `{"verb":"status"}`, and one answer on one line: `{"ok": ...}` or `{"problem": ...}`. Lines
//! are at most [`LINE_BYTES_MAX`] long. The socket is 0600 in a 0700 directory, and the peer's
//! credentials must be root's or the daemon's own.
//!
//! Reading order: [`request`] (what can be asked), [`report`] (what is answered), [`socket`]
//! (the daemon's end), [`client`] (the program's end).

pub mod client;
pub mod report;
pub mod request;
pub mod socket;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use client::{AdminClient, ClientError};
pub use report::*;
pub use request::{Limit, Request, Response, WirePath};
pub use socket::{AdminSocket, serve};

use crate::problem::Problem;

/// Name of the socket in the state directory.
pub const SOCKET_NAME: &str = "admin.sock";

/// Longest request or answer. A status of a few dozen servers has some 20 KiB; the largest answer
/// is the extents of a huge file, which handlers cut off at [`CELLS_SHOWN_MAX`].
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// Most cells an [`InfoReport`] lists; with three holders each they stay well under [`LINE_BYTES_MAX`].
pub const CELLS_SHOWN_MAX: usize = 1000;

/// Answers admin requests. Implemented by the node, and by a few lines in tests.
#[async_trait::async_trait]
pub trait AdminHandler: Send + Sync + 'static {
    async fn handle(&self, request: Request) -> Result<Response, Problem>;
}

/// What goes back over the socket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    Ok(Response),
    Problem(Problem),
}

impl From<Result<Response, Problem>> for Answer {
    fn from(result: Result<Response, Problem>) -> Self {
        match result {
            Ok(response) => Self::Ok(response),
            Err(problem) => Self::Problem(problem),
        }
    }
}

/// `sockaddr_un` holds 108 bytes of path; a longer one is reached through its open directory.
///
/// The returned descriptor must live as long as the path is used.
fn short_path(socket: &Path) -> std::io::Result<(PathBuf, Option<std::os::fd::OwnedFd>)> {
    use std::os::{fd::AsRawFd, unix::ffi::OsStrExt};

    use rustix::fs::{Mode, OFlags};

    if socket.as_os_str().as_bytes().len() < 100 {
        return Ok((socket.to_owned(), None));
    }
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let dir = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok((Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name), Some(dir)))
}
