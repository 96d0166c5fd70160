//! Runs of pages.

use crate::abi;
use std::{mem, ops::Range};

/// A run of pages: `count` of them from `first`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRange {
    /// The index of the first page.
    pub first: u64,
    /// How many pages.
    pub count: u64,
}

// KDP_MARK reads an array of these as an array of struct kdp_range.
const _: () = {
    assert!(mem::size_of::<PageRange>() == mem::size_of::<abi::kdp_range>());
    assert!(mem::align_of::<PageRange>() == mem::align_of::<abi::kdp_range>());
    assert!(mem::offset_of!(PageRange, first) == mem::offset_of!(abi::kdp_range, first));
    assert!(mem::offset_of!(PageRange, count) == mem::offset_of!(abi::kdp_range, count));
};

impl PageRange {
    /// `count` pages from `first`.
    pub const fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// One page.
    pub const fn page(page: u64) -> Self {
        Self::new(page, 1)
    }

    /// The page after the last one; `u64::MAX` if there is no such number.
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Whether it names no page.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether it names this page.
    pub const fn contains(&self, page: u64) -> bool {
        page >= self.first && page - self.first < self.count
    }

    /// Its pages, in order.
    pub fn iter(&self) -> Range<u64> {
        self.first..self.end()
    }
}

impl From<Range<u64>> for PageRange {
    fn from(range: Range<u64>) -> Self {
        Self::new(range.start, range.end.saturating_sub(range.start))
    }
}

/// The fewest ranges that name exactly these pages; sorts `pages`.
pub fn coalesce(pages: &mut [u64]) -> Vec<PageRange> {
    pages.sort_unstable();
    let mut ranges: Vec<PageRange> = Vec::new();
    for &page in pages.iter() {
        match ranges.last_mut() {
            Some(last) if last.contains(page) => {}
            Some(last) if last.end() == page => last.count += 1,
            _ => ranges.push(PageRange::page(page)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn coalesce_names_the_same_pages_in_separate_runs(mut pages in prop::collection::vec(0u64..200, 0..100)) {
            let expected: BTreeSet<u64> = pages.iter().copied().collect();
            let ranges = coalesce(&mut pages);
            let named: Vec<u64> = ranges.iter().flat_map(PageRange::iter).collect();
            prop_assert_eq!(named, expected.into_iter().collect::<Vec<_>>());
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end() < pair[1].first);
            }
        }
    }

    #[test]
    fn ends_do_not_overflow() {
        assert_eq!(PageRange::new(u64::MAX, 2).end(), u64::MAX);
        assert!(!PageRange::new(5, 0).contains(5));
        assert_eq!(PageRange::from(9..9), PageRange::new(9, 0));
    }
}
