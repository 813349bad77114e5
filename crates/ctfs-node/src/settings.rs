//! What one server is told when it starts: numbers and paths, validated by the program.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ctfs_net::JoinToken;
use ctfs_types::ByteSize;

/// Settings of one server. Defaults are explained in `docs/configuration.md`.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    /// Everything that must survive: identity, log, metadata, chunks. Mode 0700.
    pub state: PathBuf,
    /// The cache tier: may be deleted at any moment while the daemon is down.
    pub cache_dir: PathBuf,
    /// Most bytes the cache tier may take.
    pub cache_size: ByteSize,
    /// Unique in the cluster.
    pub name: String,
    /// Copies are spread over zones first.
    pub zone: String,
    pub listen: SocketAddr,
    /// `host:port` at which peers reach this server; empty means: the addresses of its interfaces.
    pub advertise: Vec<String>,
    /// `None` serves peers without a mount.
    pub mountpoint: Option<PathBuf>,
    /// Most bytes the chunk store may take; the server's weight in placement.
    pub capacity: ByteSize,
    /// Copies of each chunk for a new cluster's root; 0 means automatic.
    pub copies: u8,
    /// How long a server may be silent before its chunks are copied elsewhere.
    pub away_after: Duration,
    /// How long an unreferenced chunk is kept.
    pub gc_grace: Duration,
    /// Slowest round trip between the servers; `None`: as measured in the life before.
    pub rtt: Option<Duration>,
    /// Join a cluster with this token instead of making one.
    pub join: Option<JoinToken>,
    /// Kernel request threads.
    pub threads: usize,
}
