//! The program's end of the admin socket. Blocking: a command line has nothing else to do.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use super::{Answer, LINE_BYTES_MAX, Request, Response, SOCKET_NAME, short_path};
use crate::problem::{Code, Problem};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no daemon is running")]
    NotRunning,
    #[error("this user may not talk to the daemon")]
    Permission,
    #[error("the daemon did not answer within {0:?}")]
    Deadline(Duration),
    /// The daemon died, or is not of our kind.
    #[error("the daemon broke off: {0}")]
    Broken(String),
    #[error("{0}")]
    Problem(Problem),
}

impl ClientError {
    /// The problem to show for a call to the daemon of `state`.
    pub fn into_problem(self, state: &Path) -> Problem {
        match self {
            Self::NotRunning => Problem::not_running(state),
            Self::Permission => Problem::new(Code::PermissionDenied, "this user may not talk to the daemon")
                .why(format!("{} is readable by root and the daemon's user only", state.display()))
                .try_next("run it as root (sudo)"),
            Self::Deadline(after) => {
                Problem::new(Code::TimedOut, format!("the daemon did not answer within {} s", after.as_secs()))
                    .try_next(format!("look into its log: {}", state.join("ctfs.log").display()))
            }
            Self::Broken(why) => Problem::new(Code::VersionsDiffer, "the daemon broke off").why(why).try_next("ctfs status"),
            Self::Problem(problem) => problem,
        }
    }
}

/// Talks to the daemon of a state directory.
pub struct AdminClient;

impl AdminClient {
    /// Sends one request and waits for its answer, at most `deadline`.
    ///
    /// # Errors
    /// [`ClientError::NotRunning`] when no socket is there or nobody listens on it.
    pub fn call(state: &Path, request: &Request, deadline: Duration) -> Result<Response, ClientError> {
        let until = Instant::now() + deadline;
        let classify = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory => ClientError::NotRunning,
            io::ErrorKind::PermissionDenied => ClientError::Permission,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Deadline(deadline),
            _ => ClientError::Broken(error.to_string()),
        };
        let left = || until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));

        let (path, _dir) = short_path(&state.join(SOCKET_NAME)).map_err(classify)?;
        let mut stream = UnixStream::connect(path).map_err(classify)?;
        let mut line = serde_json::to_vec(request).map_err(|error| ClientError::Broken(error.to_string()))?;
        line.push(b'\n');
        stream.set_write_timeout(Some(left())).map_err(classify)?;
        stream.write_all(&line).map_err(classify)?;

        let mut answer = Vec::new();
        let mut piece = [0; 8192];
        loop {
            if Instant::now() >= until {
                return Err(ClientError::Deadline(deadline));
            }
            stream.set_read_timeout(Some(left())).map_err(classify)?;
            match stream.read(&mut piece) {
                Ok(0) => break,
                Ok(read) => answer.extend_from_slice(&piece[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(classify(error)),
            }
            if answer.len() > LINE_BYTES_MAX + piece.len() {
                return Err(ClientError::Broken(format!("its answer is longer than {LINE_BYTES_MAX} bytes")));
            }
        }
        if answer.is_empty() {
            return Err(ClientError::Broken("it closed the connection without an answer".into()));
        }
        match serde_json::from_slice(&answer).map_err(|error| ClientError::Broken(error.to_string()))? {
            Answer::Ok(response) => Ok(response),
            Answer::Problem(problem) => Err(ClientError::Problem(problem)),
        }
    }
}
