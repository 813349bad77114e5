//! Chunks of CTFS: named by BLAKE3, packed on disk, placed over servers, cached.
//!
//! A chunk is up to 8 MiB of a file's bytes, named by their BLAKE3 hash and never changed. This
//! crate keeps chunks on this server's disk ([`store`]), says which servers should hold each
//! ([`placement`]), and reads and writes them across the cluster ([`replicated`]) over whatever
//! network implements [`ChunkPeers`]. [`tier`] caches bytes of files by inode. Nothing here knows
//! metadata.

mod compress;
pub mod placement;
pub mod replicated;
pub mod store;
pub mod tier;
pub mod wire;

pub use placement::{Placement, Server, Standing};
pub use replicated::{
    ChunkCounts, ChunkError, ChunkPeers, ChunkSettings, Chunks, Ensured, Located, PeerError, PutError, Reasons,
    Released, Stored,
};
pub use store::{
    ChunkStore, Clock, Compacted, Deleted, MonotonicClock, Scrubbed, StoreCounts, StoreError, StoreSettings, Usage,
};
pub use tier::{CacheTier, TierError, TierSettings, TierUsage};
