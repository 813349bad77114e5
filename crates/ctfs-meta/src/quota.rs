//! Quotas: how much there may be below a directory.

use ctfs_types::Ino;
use serde::{Deserialize, Serialize};

use crate::Totals;

/// Limits on what is below a directory, itself not included; `None` limits nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    /// Most allocated bytes, as `st_blocks` counts them: holes are free, and each byte counts once,
    /// however many copies are kept of it.
    pub bytes: Option<u64>,
    /// Most files and directories; a file of several names counts once.
    pub files: Option<u64>,
}

impl Quota {
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether going from `before` to `after` is refused. What grows must stay within its limit; what
    /// is over the limit already, because that was set lower, may shrink and stay.
    pub fn refuses(&self, before: Totals, after: Totals) -> bool {
        let over = |limit: Option<u64>, before: u64, after: u64| after > before && limit.is_some_and(|limit| after > limit);
        over(self.bytes, before.allocated, after.allocated) || over(self.files, before.inodes(), after.inodes())
    }
}

/// A quota and what counts against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaUse {
    pub dir: Ino,
    pub quota: Quota,
    pub totals: Totals,
}

impl QuotaUse {
    pub fn bytes_left(&self) -> Option<u64> {
        self.quota.bytes.map(|limit| limit.saturating_sub(self.totals.allocated))
    }

    pub fn files_left(&self) -> Option<u64> {
        self.quota.files.map(|limit| limit.saturating_sub(self.totals.inodes()))
    }
}

/// Of quotas that all hold, the one with the fewest bytes left and the one with the fewest files.
pub fn tightest(quotas: &[QuotaUse]) -> (Option<QuotaUse>, Option<QuotaUse>) {
    let by = |left: fn(&QuotaUse) -> Option<u64>| {
        quotas.iter().filter(|quota| left(quota).is_some()).min_by_key(|quota| left(quota)).copied()
    };
    (by(QuotaUse::bytes_left), by(QuotaUse::files_left))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(files: u64, allocated: u64) -> Totals {
        Totals { files, allocated, ..Totals::default() }
    }

    #[test]
    fn what_grows_must_stay_within_its_limit_and_what_shrinks_may_be_over_it() {
        let quota = Quota { bytes: Some(100), files: Some(2) };
        assert!(!quota.refuses(totals(1, 50), totals(2, 100)));
        assert!(quota.refuses(totals(1, 50), totals(1, 101)));
        assert!(quota.refuses(totals(2, 50), totals(3, 50)));
        assert!(!quota.refuses(totals(9, 500), totals(9, 499)));
        assert!(!quota.refuses(totals(9, 500), totals(8, 500)));
        assert!(quota.refuses(totals(9, 500), totals(8, 501)));
        assert!(!Quota::default().refuses(totals(0, 0), totals(u64::MAX, u64::MAX)));
    }

    #[test]
    fn the_tightest_quota_is_the_one_with_the_least_left() {
        let wide = QuotaUse { dir: Ino(2), quota: Quota { bytes: Some(1000), files: Some(10) }, totals: totals(9, 900) };
        let narrow = QuotaUse { dir: Ino(3), quota: Quota { bytes: Some(300), files: None }, totals: totals(1, 100) };
        assert_eq!(tightest(&[narrow, wide]), (Some(wide), Some(wide)));
        assert_eq!(tightest(&[narrow]), (Some(narrow), None));
        assert_eq!(tightest(&[]), (None, None));
    }
}
