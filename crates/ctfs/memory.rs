//! The C library's allocator, told that a server shares its machine.
//!
//! glibc keeps what was freed, in an arena for each thread that ever allocated: after a burst of
//! small files a server would sit on a few hundred MiB that nothing uses.

use std::time::Duration;

/// How often freed pages go back to the system; a pass takes a few milliseconds.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(10);

/// Limits the arenas to the cores: more only spread what is free. Called before there are threads.
pub fn one_arena_per_core() {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    // SAFETY: mallopt changes a setting of the allocator and takes no pointers.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, cores.max(2) as i32) };
}

/// Gives free pages back to the system for as long as the server runs.
pub async fn give_back() {
    loop {
        tokio::time::sleep(GIVE_BACK_EVERY).await;
        // SAFETY: malloc_trim only returns free pages; it takes the arenas' own locks.
        let trim = || unsafe { libc::malloc_trim(0) };
        if tokio::task::spawn_blocking(trim).await.is_err() {
            return;
        }
    }
}
