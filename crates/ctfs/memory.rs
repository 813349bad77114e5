//! The allocator: a server allocates and frees some hundred small pieces for each change, on many threads.
//!
//! With glibc's that was a quarter of its processor time. jemalloc takes half of that and stays as small; mimalloc is
//! faster by a tenth, but kept three times as much memory at rest.

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Two arenas: more only spread what is free. What was freed goes back to the system after two seconds, by a thread of
/// the allocator: after a burst of small files a server would sit on it.
#[unsafe(export_name = "_rjem_malloc_conf")]
static SETTINGS: &[u8; 70] = b"background_thread:true,narenas:2,dirty_decay_ms:2000,muzzy_decay_ms:0\0";
