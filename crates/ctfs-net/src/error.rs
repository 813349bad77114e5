//! Why a call did not succeed, an identity was not accepted, a token was not a token.

use std::{io, net::SocketAddr, path::PathBuf};

/// Why the network did not deliver; one variant per reaction.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// The request was not delivered: no connection, and dialling failed or is in its back-off.
    #[error("the server cannot be reached")]
    Unreachable,
    /// No answer in time; the request may or may not have been handled.
    #[error("no answer within the deadline")]
    Deadline,
    /// The peer has as much of ours in hand as it allows; it did not handle the request.
    #[error("the server is busy")]
    Busy,
    /// The peer's handler said no, in these words.
    #[error("{0}")]
    Refused(String),
    /// Who answered is the right cluster and lets no new servers in at the moment.
    #[error("the server lets no new servers in at the moment")]
    NotAdmitted,
    /// One side is not who the other expects.
    #[error("identity: {0}")]
    Identity(String),
    /// The request is over a limit of this crate; nothing was sent.
    #[error("message is over the size limit")]
    TooLong,
    /// The connection broke, or the network was closed, after the request went out: it may or may
    /// not have been handled.
    #[error("the connection was lost")]
    Closed,
    /// The socket could not be opened.
    #[error("cannot listen on {addr}: {why}")]
    Bind { addr: SocketAddr, why: String },
}

/// Why keys or certificates could not be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{action} {path:?}: {error}")]
    Io { action: &'static str, path: PathBuf, error: io::Error },
    #[error("{0:?} holds an identity already")]
    Exists(PathBuf),
    #[error("{path:?} may be read by others (mode {mode:o}); it must be 0600")]
    Permissions { path: PathBuf, mode: u32 },
    #[error("{what} does not parse: {why}")]
    Malformed { what: &'static str, why: String },
    #[error("the certificate belongs to another key")]
    OtherKey,
    #[error("the certificate was not signed by this cluster's authority: {0}")]
    NotSigned(String),
    #[error("a name in a certificate has 1 to 64 bytes")]
    BadName,
    #[error("the key library failed: {0}")]
    Crypto(String),
}

impl From<rcgen::Error> for IdentityError {
    fn from(error: rcgen::Error) -> Self {
        Self::Crypto(error.to_string())
    }
}

impl From<IdentityError> for NetError {
    fn from(error: IdentityError) -> Self {
        Self::Identity(error.to_string())
    }
}

/// Why a text is not a usable join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The cause alone; whoever shows it says first that this is not a join token.
    #[error("one starts with \"ctfs1-\"")]
    NotAToken,
    #[error("the join token was mistyped or cut off; copy the whole line")]
    Mistyped,
    #[error("the join token has version {0}, which this program does not read")]
    Version(u8),
    /// The checksum is right and the content is not: made by a broken program.
    #[error("the join token's content does not parse")]
    Malformed,
}
