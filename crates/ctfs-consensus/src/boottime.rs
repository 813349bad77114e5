//! The clock leases are counted on.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

/// A point on CLOCK_BOOTTIME: like the monotonic clock, but it goes on while the machine is
/// suspended, so that a laptop that wakes up does not believe in a lease of yesterday.
///
/// Only comparable on one machine during one boot; it never travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootTime(Duration);

impl BootTime {
    pub fn now() -> Self {
        Self(ctfs_host::boot_time())
    }

    /// How long after `earlier` this is; zero when it is not after.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    #[cfg(test)]
    pub fn at(time: Duration) -> Self {
        Self(time)
    }
}

impl Add<Duration> for BootTime {
    type Output = Self;

    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by))
    }
}

impl Sub<Duration> for BootTime {
    type Output = Self;

    fn sub(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(by))
    }
}
