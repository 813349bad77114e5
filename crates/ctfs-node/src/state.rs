//! The state directory: who may use it, and what it says about the cluster it belongs to.
//!
//! ```text
//! STATE/lock           flock held by the running daemon; holds its process id
//! STATE/cluster        cluster id, CA, incarnation counter (sealed record, written atomically)
//! STATE/ca.key         private key of the certificate authority, PEM, 0600
//! STATE/identity/      this server's key and certificate
//! STATE/peers          last known members, for the time before the replica is readable
//! STATE/rtt          how far the other servers are, for the timings of the next life
//! STATE/meta/          log, snapshots, store
//! STATE/chunks/        chunk store
//! STATE/admin.sock     admin socket
//! ```

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use ctfs_meta::{ClusterIdentity, Member};
use ctfs_types::{Incarnation, NodeId, codec};
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// Version of the `cluster` record; a newer one is refused before anything is touched.
const FORMAT: u8 = 1;
const CLUSTER: &str = "cluster";
const RECORD_BYTES_MAX: usize = 4 << 20;

/// An opened, locked state directory.
pub struct StateDir {
    path: PathBuf,
    /// Held for the life of the daemon; the kernel drops the lock when the process ends.
    _lock: File,
}

/// What a server remembers of its cluster between lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    pub identity: ClusterIdentity,
    /// Lives of this server's daemon so far.
    pub lives: u64,
    /// Whether this server made the cluster. Only then may it found one again after a crash in
    /// the middle: a joiner that did would fork.
    pub founder: bool,
    /// Whether this server has taken part. From then on an empty log is a lost one, and a server
    /// that forgot its votes must not vote again.
    pub took_part: bool,
    /// Name and zone under which it joined.
    pub name: String,
    pub zone: String,
}

/// Whether a state directory is a member's, without opening it.
pub fn is_member(state: &Path) -> bool {
    state.join(CLUSTER).exists()
}

impl StateDir {
    /// Creates the directory if need be and takes its lock.
    ///
    /// # Errors
    /// E0105 when another daemon holds it, E0112 when a newer program wrote it, E0100 for the rest.
    pub fn open(path: &Path) -> Result<Self, Problem> {
        let fail = |what: &str, error: io::Error| Problem::io(&format!("{what} {}", path.display()), &error);
        if !path.exists() {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| fail("create state directory", e))?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(|e| fail("set the mode of", e))?;
        let mut lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(|e| fail("open the lock in", e))?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Problem::state_locked(path)),
            Err(error) => return Err(fail("lock", error.into())),
        }
        // For people and scripts: the lock alone decides, the number says whom to ask.
        lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(|e| fail("write the lock in", e))?;
        let state = Self { path: path.to_owned(), _lock: lock };
        for dir in ["identity", "meta", "chunks"] {
            let dir = state.path.join(dir);
            if !dir.exists() {
                DirBuilder::new().mode(0o700).create(&dir).map_err(|e| Problem::io(&format!("create {}", dir.display()), &e))?;
            }
        }
        Ok(state)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The cluster this state belongs to; `None` before the first `up` completed.
    pub fn cluster(&self) -> Result<Option<ClusterRecord>, Problem> {
        let path = self.join(CLUSTER);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Problem::io(&format!("read {}", path.display()), &error)),
        };
        match codec::unseal(FORMAT, &bytes, RECORD_BYTES_MAX) {
            Ok(record) => Ok(Some(record)),
            Err(codec::CodecError::Version { found, expected }) if found > expected => {
                Err(Problem::state_newer(&self.path, found, expected))
            }
            Err(error) => Err(Problem::damaged(&path, &error.to_string())),
        }
    }

    pub fn set_cluster(&self, record: &ClusterRecord) -> Result<(), Problem> {
        self.write(CLUSTER, &codec::seal(FORMAT, record))
    }

    /// Starts a new life of this server and returns its number, durable before it is used.
    ///
    /// Numbers grow with each life, and two servers never share one: the count of lives stands
    /// above 40 bits of the server's own number.
    pub fn begin_life(&self, node: NodeId) -> Result<(ClusterRecord, Incarnation), Problem> {
        let mut record = self.cluster()?.ok_or_else(|| Problem::damaged(&self.join(CLUSTER), "it is missing"))?;
        record.lives += 1;
        self.set_cluster(&record)?;
        let incarnation = Incarnation(record.lives << 40 | node.0 & ((1 << 40) - 1));
        Ok((record, incarnation))
    }

    /// The members as last written by [`Self::set_peers`]; damage counts as none, because the
    /// replica says the same and better.
    pub fn peers(&self) -> Vec<Member> {
        fs::read(self.join("peers"))
            .ok()
            .and_then(|bytes| codec::unseal(FORMAT, &bytes, RECORD_BYTES_MAX).ok())
            .unwrap_or_default()
    }

    pub fn set_peers(&self, members: &[Member]) -> Result<(), Problem> {
        self.write("peers", &codec::seal(FORMAT, &members))
    }

    /// Replaces a file so that a crash leaves the old one or the new one, mode 0600.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Problem> {
        let path = self.join(name);
        let temporary = self.join(&format!("{name}.new"));
        let result = (|| {
            let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.path)?.sync_all()
        })();
        result.map_err(|error| Problem::io(&format!("write {}", path.display()), &error))
    }

    pub fn read(&self, name: &str) -> Result<Vec<u8>, Problem> {
        let path = self.join(name);
        fs::read(&path).map_err(|error| Problem::io(&format!("read {}", path.display()), &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ClusterRecord {
        ClusterRecord {
            identity: ClusterIdentity { id: [7; 16], name: "brave-otter".into(), ca_certificate: vec![1, 2] },
            lives: 0,
            founder: true,
            took_part: false,
            name: "a".into(),
            zone: "z".into(),
        }
    }

    #[test]
    fn a_second_daemon_cannot_take_a_state_directory_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateDir::open(dir.path()).unwrap();
        assert_eq!(StateDir::open(dir.path()).err().unwrap().code, "E0105");
        drop(held);
        StateDir::open(dir.path()).unwrap();
    }

    #[test]
    fn lives_grow_and_differ_between_servers() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        state.set_cluster(&record()).unwrap();
        let first = state.begin_life(NodeId(5)).unwrap().1;
        let second = state.begin_life(NodeId(5)).unwrap().1;
        assert!(second > first);
        assert_ne!(first.0 & 0xff_ffff_ffff, NodeId(6).0);
    }

    #[test]
    fn state_of_a_newer_format_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        state.write("cluster", &codec::seal(FORMAT + 1, &record())).unwrap();
        assert_eq!(state.cluster().err().unwrap().code, "E0112");
    }

    #[test]
    fn a_flipped_bit_in_the_cluster_record_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let mut bytes = codec::seal(FORMAT, &record());
        bytes[5] ^= 4;
        state.write("cluster", &bytes).unwrap();
        assert!(state.cluster().is_err());
    }
}
