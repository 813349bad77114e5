//! The system's clock and randomness, for what asks the system and not us.
//!
//! Hash maps, tokio's `select!`, openraft's elections and a hundred calls of `now()` take what they
//! need from libc. This module defines three of its functions, which the linker prefers over those of the
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

/// Fills `len` bytes at `buffer` from the seed; `false` on a thread that does not simulate.
///
/// # Safety
/// `buffer` has room for `len` bytes.
unsafe fn fill(buffer: *mut u8, len: usize) -> bool {
    let filled = CHANCE.try_with(|chance| {
        let mut chance = chance.borrow_mut();
        let Some(chance) = chance.as_mut() else { return false };
        for at in 0..len {
            // SAFETY: the caller vouches for `len` bytes.
            unsafe { *buffer.add(at) = chance.next() as u8 };
        }
        true
    });
    filled.unwrap_or(false)
}

/// getrandom(2).
///
/// # Safety
/// `buffer` has room for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut libc::c_void, len: libc::size_t, flags: libc::c_uint) -> libc::ssize_t {
    // SAFETY: the caller vouches for it.
    if unsafe { fill(buffer.cast(), len) } {
        return len as libc::ssize_t;
    }
    // SAFETY: the same call with the same arguments.
    unsafe { libc::syscall(libc::SYS_getrandom, buffer, len, flags) as libc::ssize_t }
}

/// syscall(2): `getrandom` 0.2, which openraft's elections use, asks the system by number.
///
/// Variadic in C; six words are what every call of Linux takes at most, and the registers are the same.
///
/// # Safety
/// That of the call.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(
    number: libc::c_long,
    a: libc::c_long,
    b: libc::c_long,
    c: libc::c_long,
    d: libc::c_long,
    e: libc::c_long,
    f: libc::c_long,
) -> libc::c_long {
    // SAFETY: the caller vouches for `b` bytes at `a`.
    if number == libc::SYS_getrandom && unsafe { fill(a as *mut u8, b as usize) } {
        return b;
    }
    let answer: libc::c_long;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the convention of Linux on this processor; what the call does the caller vouches for.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => answer,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the convention of Linux on this processor; what the call does the caller vouches for.
    unsafe {
        std::arch::asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") a => answer,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e, in("x5") f,
            options(nostack),
        );
    }
    if (-4095..0).contains(&answer) {
        // SAFETY: this thread's own.
        unsafe { *libc::__errno_location() = -answer as libc::c_int };
        return -1;
    }
    answer
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
