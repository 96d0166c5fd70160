// SPDX-License-Identifier: GPL-2.0

//! Which range of a memslot is to be mapped anew when a block of it has become whole.
//!
//! A range that is mapped anew is an area (a VMA) of its own, and the kernel never joins areas of
//! ours again. So the widest whole range is taken: as memory fills, eight ranges become one of the
//! next size, and in the end the memslot is one area again, as it was.

use super::range::PageRange;

/// Pages of a block: the maximum that one page table entry maps (`PMD_ORDER` in ffi/vma.rs).
pub const BLOCK_PAGES: u64 = 512;

/// How many ranges of a size make one of the next.
const STEP: u64 = 8;

/// The parts of a range, block by block, in order, and whether each is a block in full.
pub fn blocks(range: PageRange) -> impl Iterator<Item = (PageRange, bool)> {
    let end = range.last() + 1;
    let mut next = range.first();
    core::iter::from_fn(move || {
        let part = end.min((next / BLOCK_PAGES + 1).saturating_mul(BLOCK_PAGES));
        let part = PageRange::new(next, part.checked_sub(next)?, end)?;
        next += part.count();
        Some((part, part.count() == BLOCK_PAGES))
    })
}

/// The widest range around `page`, in a memslot of `limit` pages, for which `is_whole` holds, as it does
/// for every smaller one around the page. Ranges are aligned to their size, and the last one is cut
/// at the memslot's end.
pub fn widest(
    page: u64,
    limit: u64,
    mut is_whole: impl FnMut(PageRange) -> bool,
) -> Option<PageRange> {
    let mut found = None;
    let mut size = BLOCK_PAGES;
    loop {
        let first = page & !(size - 1);
        let count = size.min(limit.checked_sub(first)?);
        let range = PageRange::new(first, count, limit)?;
        if found != Some(range) && !is_whole(range) {
            return found;
        }
        found = Some(range);
        if count == limit {
            return found;
        }
        let Some(next) = size.checked_mul(STEP) else {
            return found;
        };
        size = next;
    }
}
