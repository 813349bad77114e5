//! What replicated access did, for status.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counted since the program started.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct ChunkCounts {
            $($(#[$doc])* pub $name: u64,)*
        }

        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub $name: AtomicU64,)*
        }

        impl Counters {
            pub fn read(&self) -> ChunkCounts {
                ChunkCounts { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Gets answered by this server's own store.
    own_hits,
    own_bytes,
    /// Gets for which the own disk was late, so that peers were asked.
    disk_late,
    /// Gets answered by a peer.
    peer_fetches,
    peer_bytes,
    /// Peers asked because another was late.
    hedges,
    /// Answers that did not match the chunk's name: a damaged copy or a lying peer.
    bad_answers,
    /// Gets that ended without the chunk.
    get_failures,
    puts,
    put_bytes,
    /// Puts that reached too few servers.
    put_failures,
    /// Copies put on a server further down in rank because a better one did not take it.
    put_detours,
    /// Copies fetched because placement gives them to this server.
    repaired,
    /// Surplus copies dropped.
    released,
    served_gets,
    served_get_bytes,
    served_puts,
    served_put_bytes,
    /// Puts by peers whose bytes did not match the chunk's name.
    refused_puts,
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
