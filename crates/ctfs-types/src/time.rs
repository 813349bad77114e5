//! A point in real time, as a file's times hold it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Seconds and nanoseconds since 1970-01-01T00:00:00Z; seconds may be negative.
///
/// `nanos` counts forward from `secs` and stays below 1,000,000,000, as in POSIX `timespec`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timestamp {
    pub secs: i64,
    pub nanos: u32,
}

impl Timestamp {
    pub const EPOCH: Self = Self { secs: 0, nanos: 0 };

    pub fn new(secs: i64, nanos: u32) -> Self {
        Self { secs, nanos: nanos.min(999_999_999) }
    }

    /// How long after `earlier` this is; zero when it is not after.
    pub fn since(self, earlier: Self) -> Duration {
        let nanos = |t: Self| i128::from(t.secs) * 1_000_000_000 + i128::from(t.nanos);
        let gap = nanos(self) - nanos(earlier);
        u64::try_from(gap.max(0)).map_or(Duration::MAX, Duration::from_nanos)
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self { secs: after.as_secs() as i64, nanos: after.subsec_nanos() },
            Err(before) => {
                let before = before.duration();
                match before.subsec_nanos() {
                    0 => Self { secs: -(before.as_secs() as i64), nanos: 0 },
                    nanos => Self { secs: -(before.as_secs() as i64) - 1, nanos: 1_000_000_000 - nanos },
                }
            }
        }
    }
}

impl From<Timestamp> for SystemTime {
    fn from(t: Timestamp) -> Self {
        let nanos = Duration::from_nanos(u64::from(t.nanos));
        if t.secs >= 0 {
            UNIX_EPOCH + Duration::from_secs(t.secs as u64) + nanos
        } else {
            UNIX_EPOCH - Duration::from_secs(t.secs.unsigned_abs()) + nanos
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_and_after_2038_survive_the_round_trip() {
        for (secs, nanos) in [(-1, 1), (-2_208_988_800, 999_999_999), (4_102_444_800, 5), (0, 0), (-5, 0)] {
            let t = Timestamp::new(secs, nanos);
            assert_eq!(Timestamp::from(SystemTime::from(t)), t);
        }
    }

    #[test]
    fn since_is_zero_when_the_clock_went_back() {
        assert_eq!(Timestamp::new(5, 0).since(Timestamp::new(9, 0)), Duration::ZERO);
        assert_eq!(Timestamp::new(9, 1).since(Timestamp::new(5, 0)), Duration::new(4, 1));
    }
}
