//! A set of byte ranges: which bytes of a file are unflushed.

use std::{collections::BTreeMap, ops::Range};

/// Disjoint, non-empty, non-touching ranges of byte offsets, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// Start to end (exclusive).
    ranges: BTreeMap<u64, u64>,
    /// Sum of the lengths.
    len: u64,
}

impl RangeSet {
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// One past the last byte.
    pub fn end(&self) -> Option<u64> {
        self.ranges.last_key_value().map(|(_, &end)| end)
    }

    /// Adds a range and answers how many of its bytes are new.
    pub fn insert(&mut self, range: Range<u64>) -> u64 {
        if range.start >= range.end {
            return 0;
        }
        let before = self.len;
        let (mut start, mut end) = (range.start, range.end);
        // Whatever overlaps or touches is swallowed, from the right.
        while let Some((&s, &e)) = self.ranges.range(..=end).next_back() {
            if e < start {
                break;
            }
            self.ranges.remove(&s);
            self.len -= e - s;
            start = start.min(s);
            end = end.max(e);
        }
        self.ranges.insert(start, end);
        self.len += end - start;
        self.len - before
    }

    /// Removes a range and answers how many of its bytes were there.
    pub fn remove(&mut self, range: Range<u64>) -> u64 {
        if range.start >= range.end {
            return 0;
        }
        let before = self.len;
        while let Some((&s, &e)) = self.ranges.range(..range.end).next_back() {
            if e <= range.start {
                break;
            }
            self.ranges.remove(&s);
            self.len -= e - s;
            if e > range.end {
                self.ranges.insert(range.end, e);
                self.len += e - range.end;
            }
            if s < range.start {
                self.ranges.insert(s, range.start);
                self.len += range.start - s;
            }
        }
        before - self.len
    }

    /// The ranges, whole, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&s, &e)| s..e)
    }

    /// The parts of the set inside `within`, in order.
    pub fn inside(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.ranges.range(..=within.start).next_back().map_or(within.start, |(&s, _)| s);
        let last = within.end.max(first);
        self.ranges
            .range(first..last)
            .map(move |(&s, &e)| s.max(within.start)..e.min(within.end))
            .filter(|r| r.start < r.end)
    }

    /// The parts of `within` that are not in the set, in order.
    pub fn gaps(&self, within: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = within.start;
        for part in self.inside(within.clone()) {
            if at < part.start {
                gaps.push(at..part.start);
            }
            at = part.end;
        }
        if at < within.end {
            gaps.push(at..within.end);
        }
        gaps
    }

    pub fn overlaps(&self, range: Range<u64>) -> bool {
        self.inside(range).next().is_some()
    }

    /// Whether every byte of `range` is in the set; true of an empty range.
    pub fn covers(&self, range: Range<u64>) -> bool {
        range.start >= range.end
            || self.ranges.range(..=range.start).next_back().is_some_and(|(_, &end)| end >= range.end)
    }

    /// The first part of the set that reaches past `from`, clipped to start at `from`.
    pub fn next(&self, from: u64) -> Option<Range<u64>> {
        self.inside(from..u64::MAX).next()
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::new();
        ranges.into_iter().for_each(|range| {
            set.insert(range);
        });
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The reference: one flag per byte.
    fn flags_of(set: &RangeSet, size: usize) -> Vec<bool> {
        let mut flags = vec![false; size];
        for r in set.iter() {
            flags[r.start as usize..r.end as usize].fill(true);
        }
        flags
    }

    proptest! {
        #[test]
        fn a_range_set_agrees_with_one_flag_per_byte(
            steps in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..20), 1..60),
            probe in (0u64..70, 0u64..30),
        ) {
            let mut set = RangeSet::new();
            let mut model = vec![false; 100];
            for (add, start, len) in steps {
                let range = start..start + len;
                let slice = &mut model[start as usize..(start + len) as usize];
                let set_before = slice.iter().filter(|&&b| b).count() as u64;
                if add {
                    prop_assert_eq!(set.insert(range), len - set_before);
                } else {
                    prop_assert_eq!(set.remove(range), set_before);
                }
                slice.fill(add);
                prop_assert_eq!(&flags_of(&set, 100), &model);
                prop_assert_eq!(set.len(), model.iter().filter(|&&b| b).count() as u64);
                prop_assert_eq!(set.end(), model.iter().rposition(|&b| b).map(|i| i as u64 + 1));
                let ranges: Vec<_> = set.iter().collect();
                prop_assert!(ranges.windows(2).all(|w| w[0].end < w[1].start), "touching: {:?}", ranges);
            }
            let within = probe.0..probe.0 + probe.1;
            let part = &model[within.start as usize..within.end as usize];
            prop_assert_eq!(set.overlaps(within.clone()), part.contains(&true));
            prop_assert_eq!(set.covers(within.clone()), !part.contains(&false));
            let mut both = RangeSet::new();
            let inside: u64 = set.inside(within.clone()).map(|r| both.insert(r)).sum();
            let outside: u64 = set.gaps(within.clone()).into_iter().map(|r| both.insert(r)).sum();
            prop_assert_eq!(inside, part.iter().filter(|&&b| b).count() as u64);
            prop_assert_eq!(inside + outside, probe.1);
            let next = model[within.start as usize..].iter().position(|&b| b).map(|i| within.start + i as u64);
            prop_assert_eq!(set.next(within.start).map(|r| r.start), next);
        }
    }
}
