// SPDX-License-Identifier: GPL-2.0

//! rust/rules/collapse.rs

use kdp_rules::rules::collapse::{blocks, widest, BLOCK_PAGES};
use kdp_rules::rules::range::PageRange;
use proptest::prelude::*;

/// Blocks of the memslot, and which of them are whole.
fn memslot() -> impl Strategy<Value = (u64, Vec<bool>, usize)> {
    (1..700usize).prop_flat_map(|blocks| {
        let whole = prop_oneof![
            1 => Just(vec![true; blocks]),
            3 => prop::collection::vec(prop::bool::weighted(0.98), blocks),
            2 => prop::collection::vec(any::<bool>(), blocks),
        ];
        // The last block need not be a full one.
        let limit = (0..BLOCK_PAGES).prop_map(move |cut| blocks as u64 * BLOCK_PAGES - cut);
        (limit, whole, 0..blocks)
    })
}

proptest! {
    /// Against a search from the widest range down, with nothing in common with the code.
    #[test]
    fn is_the_widest_aligned_range_that_is_whole(
        (limit, whole, block) in memslot(),
        at in 0..BLOCK_PAGES,
    ) {
        let page = (block as u64 * BLOCK_PAGES + at).min(limit - 1);
        let block = (page / BLOCK_PAGES) as usize;
        let is_whole = |range: PageRange| {
            let blocks = range.first() / BLOCK_PAGES..=range.last() / BLOCK_PAGES;
            blocks.into_iter().all(|b| whole[b as usize])
        };
        let expected = [512, 64, 8, 1, 4096].map(|blocks: usize| {
            let first = block / blocks * blocks;
            let end = (first + blocks).min(whole.len());
            whole[first..end].iter().all(|w| *w).then_some((first, end))
        });
        let expected = expected.into_iter().flatten().max_by_key(|(first, end)| end - first);
        let found = widest(page, limit, is_whole);
        prop_assert_eq!(
            found.map(|r| (r.first(), r.last() + 1)),
            expected.map(|(first, end)| {
                (first as u64 * BLOCK_PAGES, (end as u64 * BLOCK_PAGES).min(limit))
            })
        );
    }

    /// What was asked before is not asked again: the question may walk a bitmap.
    #[test]
    fn asks_for_each_size_once((limit, _, block) in memslot()) {
        let mut asked = vec![];
        let page = (block as u64 * BLOCK_PAGES).min(limit - 1);
        let found = widest(page, limit, |range| {
            asked.push(range.count());
            true
        });
        prop_assert_eq!(found.map(|r| (r.first(), r.count())), Some((0, limit)));
        prop_assert!(asked.windows(2).all(|w| w[0] < w[1]), "{:?}", asked);
    }
}

proptest! {
    #[test]
    fn blocks_cover_the_range_once_and_in_order(first in 0..5000u64, count in 1..5000u64) {
        let limit = first + count;
        let range = PageRange::new(first, count, limit).expect("it fits");
        let mut next = first;
        for (part, is_full) in blocks(range) {
            prop_assert_eq!(part.first(), next);
            prop_assert_eq!(part.first() / BLOCK_PAGES, part.last() / BLOCK_PAGES);
            let aligned = part.first() % BLOCK_PAGES == 0;
            prop_assert_eq!(is_full, aligned && part.count() == BLOCK_PAGES);
            next = part.last() + 1;
            // No part could be longer.
            prop_assert!(next == limit || next % BLOCK_PAGES == 0);
        }
        prop_assert_eq!(next, limit);
    }
}

#[test]
fn a_page_outside_has_none() {
    assert_eq!(widest(BLOCK_PAGES, BLOCK_PAGES, |_| true), None);
    assert_eq!(widest(u64::MAX, BLOCK_PAGES, |_| true), None);
}

/// A memslot that is longer than any size: the widest size that there is.
#[test]
fn the_longest_memslot_ends() {
    let whole = widest(5, u64::MAX, |_| true);
    assert_eq!(whole.map(|r| (r.first(), r.count())), Some((0, 1 << 63)));
}
