//! Newtypes for numbers that must not be mixed up.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number! {
    /// An inode number: 64 bits, handed out once in the life of a volume and never again.
    Ino
}
number! {
    /// The position of an entry in the replicated log; 0 is "before the first entry".
    LogIndex
}
number! {
    /// When the bytes of an inode changed, counted by that inode alone: its `data_version` after the
    /// command that did it. 0 is "never written", a hole. Stamps of different inodes say nothing of
    /// each other, and nothing of the log.
    Stamp
}
number! {
    /// One life of a server's daemon. A later life has a larger number.
    Incarnation
}

impl Ino {
    /// The root directory, as the kernel numbers it (`FUSE_ROOT_ID` in fuse.h).
    pub const ROOT: Self = Self(1);
}

impl LogIndex {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A server, numbered by the first eight bytes of the BLAKE3 hash of its public key.
///
/// The number is for logs, maps and the consensus library; who a peer *is* gets decided by the
/// whole key, never by this number alone.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}

/// The name of a chunk: the BLAKE3 hash of its uncompressed bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkId(pub [u8; 32]);

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkId({})", data_encoding::HEXLOWER.encode(&self.0[..6]))
    }
}

/// Why a text is not a chunk id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a chunk id is 64 hexadecimal digits")]
pub struct InvalidChunkId;

impl FromStr for ChunkId {
    type Err = InvalidChunkId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = data_encoding::HEXLOWER_PERMISSIVE.decode(text.as_bytes()).map_err(|_| InvalidChunkId)?;
        Ok(Self(bytes.try_into().map_err(|_| InvalidChunkId)?))
    }
}

/// Names one request of one client, so that a retried command happens once.
///
/// `client` is one incarnation of one server's daemon (unique in the cluster's life); `seq`
/// counts its requests from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId {
    pub client: u64,
    pub seq: u64,
}
