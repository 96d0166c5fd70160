//! A set of pages, kept as runs.

use crate::PageRange;
use std::collections::BTreeMap;

/// A set of pages, kept as runs that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    // From the first page of a run to the page after its last.
    runs: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is no page in it.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many pages are in it.
    pub fn count(&self) -> u64 {
        self.runs.iter().map(|(first, end)| end - first).sum()
    }

    /// Its runs, in order.
    pub fn iter(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.runs
            .iter()
            .map(|(first, end)| PageRange::from(*first..*end))
    }

    /// The parts of `range` that are in it.
    pub fn intersection(&self, range: PageRange) -> Vec<PageRange> {
        let before = self.runs.range(..=range.first).next_back();
        let inside = self.runs.range(range.first.saturating_add(1)..);
        before
            .into_iter()
            .chain(inside)
            .take_while(|(first, _)| **first < range.end())
            .map(|(first, end)| PageRange::from(range.first.max(*first)..range.end().min(*end)))
            .filter(|part| !part.is_empty())
            .collect()
    }

    /// Add pages; the parts that were not in it.
    pub fn insert(&mut self, range: PageRange) -> Vec<PageRange> {
        if range.is_empty() {
            return Vec::new();
        }
        let mut added = Vec::new();
        let mut next = range.first;
        for present in self.intersection(range) {
            if next < present.first {
                added.push(PageRange::from(next..present.first));
            }
            next = present.end();
        }
        if next < range.end() {
            added.push(PageRange::from(next..range.end()));
        }
        let (mut first, mut end) = (range.first, range.end());
        // Every run that overlaps or touches becomes part of the new one.
        while let Some((run, run_end)) = self
            .runs
            .range(..=end)
            .next_back()
            .map(|(run, end)| (*run, *end))
        {
            if run_end < first {
                break;
            }
            self.runs.remove(&run);
            (first, end) = (first.min(run), end.max(run_end));
        }
        self.runs.insert(first, end);
        added
    }

    /// Take pages out; the parts that were in it.
    pub fn remove(&mut self, range: PageRange) -> Vec<PageRange> {
        let removed = self.intersection(range);
        for part in &removed {
            let Some((run, end)) = self
                .runs
                .range(..=part.first)
                .next_back()
                .map(|(run, end)| (*run, *end))
            else {
                continue;
            };
            self.runs.remove(&run);
            if run < part.first {
                self.runs.insert(run, part.first);
            }
            if part.end() < end {
                self.runs.insert(part.end(), end);
            }
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn pages(ranges: &[PageRange]) -> BTreeSet<u64> {
        ranges.iter().flat_map(PageRange::iter).collect()
    }

    proptest! {
        #[test]
        fn agrees_with_a_set_of_pages(ops in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..20), 0..60)) {
            let mut set = RangeSet::new();
            let mut model = BTreeSet::new();
            for (insert, first, count) in ops {
                let range = PageRange::new(first, count);
                let wanted: BTreeSet<u64> = range.iter().collect();
                let changed = if insert {
                    let new: BTreeSet<u64> = wanted.difference(&model).copied().collect();
                    model.extend(&wanted);
                    prop_assert_eq!(pages(&set.insert(range)), new.clone());
                    new
                } else {
                    let old: BTreeSet<u64> = wanted.intersection(&model).copied().collect();
                    model.retain(|page| !wanted.contains(page));
                    prop_assert_eq!(pages(&set.remove(range)), old.clone());
                    old
                };
                prop_assert!(changed.is_subset(&wanted));
                let runs: Vec<PageRange> = set.iter().collect();
                prop_assert_eq!(pages(&runs), model.clone());
                prop_assert_eq!(set.count(), model.len() as u64);
                prop_assert_eq!(set.is_empty(), model.is_empty());
                for pair in runs.windows(2) {
                    prop_assert!(pair[0].end() < pair[1].first);
                }
            }
        }
    }

    #[test]
    fn the_last_numbers() {
        let mut set = RangeSet::new();
        set.insert(PageRange::new(u64::MAX - 1, 1));
        assert_eq!(
            set.intersection(PageRange::new(u64::MAX - 2, 9)),
            [PageRange::new(u64::MAX - 1, 1)]
        );
    }
}
