// SPDX-License-Identifier: GPL-2.0

//! rust/rules/range.rs

use crate::ranges::{number, page, part, range, MAX_PAGES};
use kdp_rules::rules::range::{locate, ChunkPart, PageRange, CHUNK_PAGES, CHUNK_WORDS, WORD_PAGES};
use proptest::prelude::*;

#[test]
fn a_chunk_is_a_page_of_bits() {
    assert_eq!(CHUNK_PAGES, 4096 * 8);
    assert_eq!(WORD_PAGES, u64::from(u64::BITS));
    assert_eq!(CHUNK_WORDS, 4096 / size_of::<u64>());
}

#[test]
fn the_longest_ranges_are_whole() {
    let all = PageRange::new(0, u64::MAX, u64::MAX).expect("it ends where the limit does");
    assert_eq!(
        (all.first(), all.count(), all.last()),
        (0, u64::MAX, u64::MAX - 1)
    );
    let top = PageRange::new(u64::MAX - 1, 1, u64::MAX).expect("it ends where the limit does");
    assert_eq!(top.last(), u64::MAX - 1);
    let end = PageRange::new(MAX_PAGES - 1, 1, MAX_PAGES).expect("it ends where the limit does");
    assert_eq!(end.chunks().count(), 1);
}

proptest! {
    #[test]
    fn is_made_if_and_only_if_it_fits(first in number(), count in number(), limit in number()) {
        let fits = count > 0 && u128::from(first) + u128::from(count) <= u128::from(limit);
        let made = PageRange::new(first, count, limit);
        prop_assert_eq!(made.is_some(), fits);
        if let Some(range) = made {
            prop_assert_eq!(range.first(), first);
            prop_assert_eq!(range.count(), count);
            prop_assert_eq!(range.last(), first + (count - 1));
        }
    }

    #[test]
    fn chunks_cover_it_once_and_in_order(range in range()) {
        let mut next = range.first();
        let mut before = None;
        for part in range.chunks() {
            prop_assert!(part.count > 0);
            prop_assert!(part.first + part.count <= CHUNK_PAGES);
            prop_assert!(before < Some(part.chunk), "one part for each chunk");
            prop_assert_eq!(part.chunk * CHUNK_PAGES + part.first, next);
            next += part.count;
            before = Some(part.chunk);
        }
        prop_assert_eq!(next, range.first() + range.count());
    }

    #[test]
    fn words_are_the_bits_of_its_pages(part in part()) {
        let mut wanted = vec![0u64; CHUNK_WORDS];
        for page in part.first..part.first + part.count {
            wanted[(page / 64) as usize] |= 1 << (page % 64);
        }
        let mut got = vec![0u64; CHUNK_WORDS];
        let mut before = None;
        for (word, mask) in part.words() {
            prop_assert!(mask != 0);
            prop_assert!(before < Some(word), "one mask for each word");
            got[word] = mask;
            before = Some(word);
        }
        prop_assert_eq!(got, wanted);
    }

    #[test]
    fn an_empty_part_has_no_words(first in 0..=CHUNK_PAGES) {
        let part = ChunkPart { chunk: 0, first, count: 0 };
        prop_assert_eq!(part.words().count(), 0);
    }

    #[test]
    fn locate_names_the_page(page in page()) {
        let (chunk, word, bit) = locate(page);
        prop_assert!(word < CHUNK_WORDS);
        prop_assert!(bit.is_power_of_two());
        let bit = u64::from(bit.trailing_zeros());
        prop_assert_eq!(chunk * CHUNK_PAGES + word as u64 * 64 + bit, page);
    }

    #[test]
    fn locate_agrees_with_the_range_of_one_page(page in page()) {
        let range = PageRange::new(page, 1, MAX_PAGES).expect("it is inside");
        let found: Vec<_> = range
            .chunks()
            .flat_map(|part| part.words().map(move |(word, mask)| (part.chunk, word, mask)))
            .collect();
        prop_assert_eq!(found, [locate(page)]);
    }

    #[test]
    fn whole_granules_are_those_inside(
        range in range(),
        offset in 0..MAX_PAGES,
        order in prop_oneof![Just(0u32), Just(9), Just(18), 0..=18u32],
    ) {
        let (start, stop) = (offset + range.first(), offset + range.first() + range.count());
        let inside = |n: u64| n << order >= start && (n + 1) << order <= stop;
        let (first, end) = range.whole_granules(offset, order);
        prop_assert!(first <= end);
        // All granules at either end of the range, and at either end of the answer.
        for at in [start >> order, stop >> order, first, end] {
            for n in at.saturating_sub(2)..=at + 2 {
                prop_assert_eq!(inside(n), first <= n && n < end, "granule {}", n);
            }
        }
    }
}
