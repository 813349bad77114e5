//! The clocks leases are counted on.
//!
//! A lease is safe when its holder counts it as over before the leader does. So a holder goes by the clock
//! that is ahead when the two of its machine disagree, and a leader by the one that is behind: where a
//! machine was suspended, where a guest went on elsewhere and found another time there, and wherever else
//! one of the two has jumped.

use std::{
    marker::PhantomData,
    ops::{Add, Sub},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

/// A point on a clock of this machine during one boot; it never travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time<Clock>(Duration, PhantomData<Clock>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Boot;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Patient;

/// A point on CLOCK_BOOTTIME: like the monotonic clock, but it goes on while the machine is
/// suspended, so that a laptop that wakes up does not believe in a lease of yesterday.
pub(crate) type BootTime = Time<Boot>;

/// A point on a [`PatientClock`].
pub(crate) type PatientTime = Time<Patient>;

impl BootTime {
    pub fn now() -> Self {
        Self(ctfs_host::boot_time(), PhantomData)
    }
}

impl<Clock> Time<Clock> {
    /// How long after `earlier` this is; zero when it is not after.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    #[cfg(test)]
    pub fn at(time: Duration) -> Self {
        Self(time, PhantomData)
    }
}

impl<Clock> Add<Duration> for Time<Clock> {
    type Output = Self;

    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by), PhantomData)
    }
}

impl<Clock> Sub<Duration> for Time<Clock> {
    type Output = Self;

    fn sub(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(by), PhantomData)
    }
}

/// Goes by as little as either clock of the machine does: for whoever waits until what others were promised
/// has ended.
#[derive(Debug)]
pub(crate) struct PatientClock(Mutex<Shown>);

#[derive(Debug)]
struct Shown {
    time: Duration,
    boot: Duration,
    monotonic: Instant,
}

impl PatientClock {
    pub fn new() -> Self {
        // Far from zero, so that what was some time ago can be told.
        let boot = ctfs_host::boot_time();
        Self(Mutex::new(Shown { time: boot, boot, monotonic: Instant::now() }))
    }

    pub fn now(&self) -> PatientTime {
        self.look(ctfs_host::boot_time(), Instant::now())
    }

    fn look(&self, boot: Duration, monotonic: Instant) -> PatientTime {
        let mut shown = self.0.lock();
        let (by_boot, by_monotonic) = (boot.saturating_sub(shown.boot), monotonic.saturating_duration_since(shown.monotonic));
        shown.time += by_boot.min(by_monotonic);
        (shown.boot, shown.monotonic) = (boot, monotonic);
        Time(shown.time, PhantomData)
    }

    /// The same moment as it is told here; one that lies back, rather more than less.
    pub fn of(&self, time: BootTime, now: BootTime) -> PatientTime {
        self.now() - now.since(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_jumps_ends_nobodys_lease() {
        let clock = PatientClock::new();
        let (mut boot, mut monotonic) = (ctfs_host::boot_time(), Instant::now());
        let mut both = |boot_by: u64, monotonic_by: u64| {
            boot += Duration::from_millis(boot_by);
            monotonic += Duration::from_millis(monotonic_by);
            clock.look(boot, monotonic)
        };
        let start = both(1000, 1000);
        assert_eq!(both(10, 10).since(start), Duration::from_millis(10));
        assert_eq!(both(3_510, 10).since(start), Duration::from_millis(20), "suspended, or moved to another host");
        assert_eq!(both(10, 3_510).since(start), Duration::from_millis(30));
        assert_eq!(both(10, 10).since(start), Duration::from_millis(40), "and goes on");
    }
}
