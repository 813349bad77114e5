//! What went wrong, why, and what to type next: the one shape in which people see errors.
//!
//! A [`Problem`] travels as it is: from the daemon to the program over the admin socket, from a
//! cluster to a joiner over the network. [`Code`] is the table of everything that has a number;
//! numbers are never reused, because people search for them.

use std::{fmt, io, path::Path};

use serde::{Deserialize, Serialize};

/// An error as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `E0107`; a program of another version may send one this version does not know.
    pub code: String,
    /// One sentence without a full stop.
    pub what: String,
    /// The cause, when it is known; else empty.
    #[serde(default)]
    pub why: String,
    /// Commands or steps, best first.
    #[serde(default)]
    pub try_next: Vec<String>,
    /// Exit status of a program that ends because of this.
    pub exit: u8,
}

/// Exit statuses of the program, as scripts see them.
pub mod exit {
    pub const OK: u8 = 0;
    pub const FAILED: u8 = 1;
    pub const USAGE: u8 = 2;
    pub const NOT_RUNNING: u8 = 3;
    pub const DEGRADED: u8 = 4;
    pub const UNAVAILABLE: u8 = 5;
    pub const PROBLEMS_FOUND: u8 = 6;
    pub const TIMED_OUT: u8 = 7;
    pub const INTERRUPTED: u8 = 130;
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $exit:ident;)*) => {
        /// Everything that has a number.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Code {
            $($(#[$doc])* $name,)*
        }

        impl Code {
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The number as people search for it.
            pub fn number(self) -> &'static str {
                match self { $(Self::$name => $number,)* }
            }

            /// Exit status that goes with it.
            pub fn exit(self) -> u8 {
                match self { $(Self::$name => exit::$exit,)* }
            }
        }
    };
}

codes! {
    /// The operating system refused something that has no number of its own.
    Io = "E0100", FAILED;
    NotADirectory = "E0101", FAILED;
    NotEmpty = "E0102", FAILED;
    AlreadyMounted = "E0103", FAILED;
    PortInUse = "E0104", FAILED;
    /// Another daemon holds the lock of the state directory.
    StateLocked = "E0105", FAILED;
    /// The state directory belongs to another cluster than the token.
    ForeignCluster = "E0106", FAILED;
    CannotReach = "E0107", FAILED;
    TokenExpired = "E0108", FAILED;
    TokenUnknown = "E0109", FAILED;
    TokenMistyped = "E0110", USAGE;
    /// Whoever answered is not the cluster that made the token.
    WrongAuthority = "E0111", FAILED;
    StateNewer = "E0112", FAILED;
    NameTaken = "E0113", FAILED;
    /// The cluster removed this server for good.
    Removed = "E0114", FAILED;
    DiskFull = "E0115", FAILED;
    ConfigInvalid = "E0116", USAGE;
    NotRunning = "E0117", NOT_RUNNING;
    PermissionDenied = "E0118", FAILED;
    NoQuorum = "E0119", UNAVAILABLE;
    /// The mount point and the state or cache directory lie inside each other.
    PathsOverlap = "E0120", USAGE;
    /// What was asked differs from what this server was set up with.
    ChoiceDiffers = "E0121", USAGE;
    /// The path is not in this file system.
    NotInside = "E0122", FAILED;
    TimedOut = "E0123", TIMED_OUT;
    StateDamaged = "E0124", FAILED;
    JoinRefused = "E0125", FAILED;
    NoSuchServer = "E0126", FAILED;
    /// Going on could lose the last copy of something, or the majority.
    WouldLoseData = "E0127", FAILED;
    MountFailed = "E0128", FAILED;
    /// The daemon ended before it was ready.
    DiedAtStart = "E0129", FAILED;
    /// Program and daemon do not understand each other.
    VersionsDiffer = "E0130", FAILED;
    Interrupted = "E0131", INTERRUPTED;
    /// A question could not be asked because nobody sits at the terminal.
    NeedsAnswer = "E0132", USAGE;
    InvalidArgument = "E0133", USAGE;
    /// Programs have files open in the mount.
    MountBusy = "E0134", FAILED;
    /// An unknown verb or option, or a value that does not fit.
    CommandLine = "E0135", USAGE;
    /// A bug.
    Internal = "E0199", FAILED;
}

impl Problem {
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Self { code: code.number().to_owned(), what: what.into(), why: String::new(), try_next: Vec::new(), exit: code.exit() }
    }

    pub fn why(mut self, why: impl Into<String>) -> Self {
        self.why = why.into();
        self
    }

    /// Adds a next step; call it once per step, best first.
    pub fn try_next(mut self, step: impl Into<String>) -> Self {
        self.try_next.push(step.into());
        self
    }

    pub fn is(&self, code: Code) -> bool {
        self.code == code.number()
    }

    /// `what` reads as verb and object: "open chunk index".
    pub fn io(what: &str, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::new(Code::DiskFull, format!("cannot {what}: the disk is full")).try_next("df -h")
            }
            io::ErrorKind::PermissionDenied => {
                Self::new(Code::PermissionDenied, format!("cannot {what}")).why(error.to_string()).try_next("run it as root (sudo)")
            }
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::new(Code::Io, format!("cannot {what}"))
                .why(error.to_string())
                .try_next("check the path; a relative one begins at the working directory"),
            _ => Self::new(Code::Io, format!("cannot {what}")).why(error.to_string()).try_next("dmesg | tail    may say more"),
        }
    }

    pub fn internal(why: &str) -> Self {
        Self::new(Code::Internal, "this should not happen; it is a bug in CTFS").why(why)
    }

    pub fn port_in_use(address: std::net::SocketAddr, why: &str) -> Self {
        Self::new(Code::PortInUse, format!("cannot listen on UDP {address}"))
            .why(why)
            .try_next(format!("ss -ulpn 'sport = :{}'    shows who listens there", address.port()))
            .try_next("choose another with --listen ADDR:PORT")
    }

    pub fn address_not_here(address: std::net::SocketAddr, why: &str) -> Self {
        Self::new(Code::PortInUse, format!("cannot listen on UDP {address}: this machine has no such address"))
            .why(why)
            .try_next("ip -brief address    shows those it has")
            .try_next(format!("choose another with --listen ADDR:PORT, or all of them: --listen 0.0.0.0:{}", address.port()))
    }

    pub fn state_locked(state: &Path) -> Self {
        Self::new(Code::StateLocked, format!("state directory {} is in use by a running daemon", state.display()))
            .try_next(format!("ctfs --state {} status", state.display()))
    }

    pub fn state_newer(state: &Path, found: u8, expected: u8) -> Self {
        Self::new(Code::StateNewer, format!("state directory {} was written by a newer ctfs", state.display()))
            .why(format!("its format is {found}, this program reads up to {expected}; nothing was touched"))
            .try_next("install the newer version again")
    }

    pub fn damaged(path: &Path, why: &str) -> Self {
        Self::new(Code::StateDamaged, format!("{} is damaged", path.display()))
            .why(why)
            .try_next("if the other servers are healthy: ctfs node remove THIS-SERVER on one of them, move the state directory away, join again")
    }

    pub fn foreign_cluster(state: &Path, cluster: &str) -> Self {
        Self::new(Code::ForeignCluster, format!("state directory {} belongs to cluster {cluster}, the token to another one", state.display()))
            .why("one state directory holds one server of one cluster")
            .try_next("to serve that cluster: run ctfs up without --join")
            .try_next("to join the other cluster: choose an empty directory with --state DIR")
    }

    pub fn cannot_reach(addresses: &[String], why: &str) -> Self {
        let addresses = if addresses.is_empty() { "no address in the token".to_owned() } else { addresses.join(", ") };
        Self::new(Code::CannotReach, format!("cannot join: no answer from {addresses}"))
            .why(why)
            .try_next("check that UDP to these addresses is open, and on the other server: ctfs status")
            .try_next("if they are not reachable from here: start the other server with --advertise ADDR:PORT and make a new token")
    }

    pub fn token_expired() -> Self {
        Self::new(Code::TokenExpired, "cannot join: the token has expired").try_next("on a server of the cluster: ctfs token")
    }

    pub fn token_unknown() -> Self {
        Self::new(Code::TokenUnknown, "cannot join: the token was used up, or the cluster does not know it")
            .try_next("on a server of the cluster: ctfs token")
    }

    pub fn token_mistyped(why: &str) -> Self {
        Self::new(Code::TokenMistyped, "this is not a join token")
            .why(why)
            .try_next("copy the whole line that `ctfs token` prints; a token begins with ctfs1-")
    }

    pub fn wrong_authority(why: &str) -> Self {
        Self::new(Code::WrongAuthority, "cannot join: whoever answers is not the cluster that made the token")
            .why(format!("{why}; the secret was not shown to it"))
            .try_next("make a new token on a server of the cluster: ctfs token")
            .try_next("if that fails too, something between the servers answers in their place")
    }

    pub fn join_refused(why: &str) -> Self {
        Self::new(Code::JoinRefused, "cannot join: the cluster refused").why(why)
    }

    pub fn name_taken(name: &str) -> Self {
        Self::new(Code::NameTaken, format!("cannot join: the cluster already has a server named {name}"))
            .try_next("choose another name: --name NAME")
            .try_next(format!("if that server is gone for good, on a server of the cluster: ctfs node remove {name}"))
    }

    pub fn removed() -> Self {
        Self::new(Code::Removed, "this server was removed from its cluster")
            .why("its key is never accepted again")
            .try_next("to come back as a new server: move the state directory away and join with a new token")
    }

    pub fn no_quorum(why: &str) -> Self {
        Self::new(Code::NoQuorum, "no majority of the servers agreed in time").why(why).try_next("ctfs status")
    }

    pub fn not_running(state: &Path) -> Self {
        Self::new(Code::NotRunning, "no daemon is running here")
            .why(format!("nothing answers on {}", state.join(crate::admin::SOCKET_NAME).display()))
            .try_next("ctfs up")
            .try_next("if its state is elsewhere: ctfs --state DIR ...")
    }

    pub fn not_inside(path: &Path) -> Self {
        Self::new(Code::NotInside, format!("{} is not in this file system", path.display()))
            .why("it does not lie below where this server has mounted it")
            .try_next("ctfs status    shows where it is mounted")
    }

    pub fn no_such_server(name: &str) -> Self {
        Self::new(Code::NoSuchServer, format!("the cluster has no server named {name}")).try_next("ctfs nodes")
    }

    pub fn metadata(why: &str) -> Self {
        Self::new(Code::StateDamaged, "the metadata of this server cannot be used")
            .why(why)
            .try_next("if the other servers are healthy: ctfs node remove THIS-SERVER on one of them, move the state directory away, join again")
    }

    pub fn chunk_store(why: &str) -> Self {
        Self::new(Code::StateDamaged, "the chunk store of this server cannot be used").why(why)
    }

    pub fn not_flushed(why: &str) -> Self {
        Self::new(Code::WouldLoseData, "not everything written here could be stored on the servers")
            .why(why)
            .try_next("bring a majority of the servers back, then try again")
    }

    pub fn no_majority_to_remove() -> Self {
        Self::new(Code::NoQuorum, "removing a server takes a majority of the voting servers, and they do not answer")
            .why("nothing was changed")
            .try_next("bring the servers that are down back: ctfs up on each")
    }

    pub fn back_again() -> Self {
        Self::new(Code::WouldLoseData, "the server came back while it was being removed").why("it was not removed").try_next("ctfs status")
    }

    /// `missing` chunks are not on the other servers yet; `walking` have not looked yet.
    pub fn would_lose(missing: u64, walking: &[String]) -> Self {
        let why = match (missing, walking) {
            (0, walking) => format!("not all of the others have looked through their chunks yet: {}", walking.join(", ")),
            (missing, _) => format!("{missing} chunks could not be copied to the others yet"),
        };
        Self::new(Code::WouldLoseData, "it may hold the last copy of something")
            .why(why)
            .try_next("ctfs status    shows how far copying is; then run this again")
            .try_next("if it is lost for ever and so be it: add --force")
    }

    pub fn nobody_to_keep() -> Self {
        Self::new(Code::WouldLoseData, "no other server is there to keep what it holds")
            .why("all others are away")
            .try_next("bring one of them back: ctfs up on each")
            .try_next("if all of them are lost for ever and so be it: add --force")
    }

    pub fn busy(open: usize) -> Self {
        Self::new(Code::MountBusy, format!("{open} open files or directories are in use"))
            .why("programs that have them open would get errors")
            .try_next("fuser -vm MOUNTPOINT    shows which")
            .try_next("ctfs umount --force    cuts them off")
    }

    pub fn last_server() -> Self {
        Self::new(Code::WouldLoseData, "this is the only server; removing it would lose everything").try_next("ctfs down")
    }

    pub fn mount_failed(path: &Path, why: &str) -> Self {
        Self::new(Code::MountFailed, format!("cannot mount on {}", path.display())).why(why)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.what)?;
        if self.why.is_empty() { Ok(()) } else { write!(f, " ({})", self.why) }
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_sorted() {
        let numbers: Vec<_> = Code::ALL.iter().map(|code| code.number()).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
    }

    #[test]
    fn a_full_disk_is_told_apart_from_other_io_errors() {
        assert!(Problem::io("write x", &io::Error::from_raw_os_error(libc::ENOSPC)).is(Code::DiskFull));
        assert!(Problem::io("write x", &io::Error::from_raw_os_error(libc::EIO)).is(Code::Io));
    }

    #[test]
    fn a_problem_of_an_older_daemon_without_steps_is_read() {
        let problem: Problem = serde_json::from_str(r#"{"code":"E0100","what":"w","exit":1}"#).unwrap();
        assert_eq!((problem.why.as_str(), problem.try_next.len()), ("", 0));
    }
}
