//! The system's clock and randomness, for what asks the system and not us.
//!
//! Hash maps, tokio's `select!`, openraft's elections and a hundred calls of `now()` take what they
//! need from libc. This module defines two of its functions, which the linker prefers over those of the
//! library: on a thread that simulates they answer from the seed and from simulated time, on any other
//! they ask the system. (`madsim` does the same.)

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use crate::chance::Chance;

thread_local! {
    static CHANCE: RefCell<Option<Chance>> = const { RefCell::new(None) };
    static CLOCKS: Cell<Option<Clocks>> = const { Cell::new(None) };
}

/// What the clocks of the server that runs show.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    pub monotonic: Duration,
    /// Since 1970.
    pub wall: Duration,
}

/// From here on this thread's randomness comes from `seed`.
pub fn simulate_chance(seed: u64) {
    CHANCE.with(|chance| *chance.borrow_mut() = Some(Chance::new(seed)));
}

/// From here on this thread's clocks show this.
pub fn set_clocks(clocks: Clocks) {
    CLOCKS.set(Some(clocks));
}

/// getrandom(2).
///
/// # Safety
/// `buffer` has room for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut libc::c_void, len: libc::size_t, flags: libc::c_uint) -> libc::ssize_t {
    let simulated = CHANCE.try_with(|chance| {
        let mut chance = chance.borrow_mut();
        let chance = chance.as_mut()?;
        for at in 0..len {
            // SAFETY: the caller vouches for `len` bytes.
            unsafe { *buffer.cast::<u8>().add(at) = chance.next() as u8 };
        }
        Some(len as libc::ssize_t)
    });
    match simulated {
        Ok(Some(filled)) => filled,
        // SAFETY: the same call with the same arguments.
        _ => unsafe { libc::syscall(libc::SYS_getrandom, buffer, len, flags) as libc::ssize_t },
    }
}

/// clock_gettime(2).
///
/// # Safety
/// `time` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    match CLOCKS.try_with(Cell::get) {
        Ok(Some(clocks)) => {
            let now = if clock == libc::CLOCK_REALTIME { clocks.wall } else { clocks.monotonic };
            let now = libc::timespec { tv_sec: now.as_secs() as i64, tv_nsec: i64::from(now.subsec_nanos()) };
            // SAFETY: the caller vouches for it.
            unsafe { *time = now };
            0
        }
        // SAFETY: the same call with the same arguments.
        _ => unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as libc::c_int },
    }
}
