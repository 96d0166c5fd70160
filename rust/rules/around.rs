// SPDX-License-Identifier: GPL-2.0

//! Which neighbours of a page a fault maps together with it.

use super::range::WORD_PAGES;

/// The largest window.
pub const MAX_PAGES: u32 = 512;

/// Whether a window may have so many pages: a power of two; 0 and 1 are none.
pub fn is_size(pages: u32) -> bool {
    pages == 0 || pages.is_power_of_two() && pages <= MAX_PAGES
}

/// The neighbour that tells whether to look further. It is in every window around the page. If it is absent
/// the neighbourhood is being filled page by page, and if it is mapped, so most likely are the others that
/// are present.
pub fn buddy(page: u64) -> u64 {
    page ^ 1
}

/// A page's bit, in the word that holds it.
pub fn is_set(word: u64, page: u64) -> bool {
    word & (1 << (page % WORD_PAGES)) != 0
}

/// The window of `size` pages around a page, aligned to its size, within pages `first` to before `end`: for
/// each word of bits its first page, and which of its bits are in the window.
pub fn window(page: u64, size: u64, first: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let start = page & !(size - 1);
    let stop = (start + size).min(end);
    let mut next = start.max(first);
    core::iter::from_fn(move || {
        let at = next;
        if at >= stop {
            return None;
        }
        let word = at & !(WORD_PAGES - 1);
        next = stop.min(word + WORD_PAGES);
        let ones = u64::MAX >> (WORD_PAGES - (next - at));
        Some((word, ones << (at - word)))
    })
}

/// Runs of adjacent present pages in the page's [`window`]: the first and the last page of each.
///
/// `word` holds the present bits of 64 pages, among them the page. Only these pages are considered.
pub fn runs(
    word: u64,
    page: u64,
    size: u64,
    first: u64,
    end: u64,
) -> impl Iterator<Item = (u64, u64)> {
    let size = size.min(WORD_PAGES);
    let (base, mask) = window(page, size, first, end).next().unwrap_or((0, 0));
    let mut left = word & mask;
    core::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let low = left.trailing_zeros();
        let count = (left >> low).trailing_ones();
        left &= !((u64::MAX >> (u64::BITS - count)) << low);
        let at = base + u64::from(low);
        Some((at, at + u64::from(count) - 1))
    })
}
