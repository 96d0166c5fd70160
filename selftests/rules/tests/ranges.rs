// SPDX-License-Identifier: GPL-2.0

//! Pages, ranges and parts of chunks, close to the edges more often than not.

use kdp_rules::rules::range::{ChunkPart, PageRange, CHUNK_PAGES, WORD_PAGES};
use proptest::prelude::*;

/// Pages of the longest memslot: KDP_MAX_PAGES.
pub const MAX_PAGES: u64 = 1 << 36;

/// Any number, often one close to 0, to the largest memslot's length or to the largest number.
pub fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..4u64,
        (u64::MAX - 3)..=u64::MAX,
        (MAX_PAGES - 2)..(MAX_PAGES + 2),
    ]
}

/// A page of a memslot as long as they get.
pub fn page() -> impl Strategy<Value = u64> {
    let near = |unit: u64| {
        (0..MAX_PAGES / unit, 0..4u64)
            .prop_map(move |(n, off)| (n * unit + off).saturating_sub(2).min(MAX_PAGES - 1))
    };
    prop_oneof![
        0..MAX_PAGES,
        near(WORD_PAGES),
        near(CHUNK_PAGES),
        0..3 * CHUNK_PAGES,
        (MAX_PAGES - CHUNK_PAGES)..MAX_PAGES,
    ]
}

/// How many pages to take.
fn count(most: u64) -> impl Strategy<Value = u64> {
    prop_oneof![
        1..4u64,
        (WORD_PAGES - 1)..(WORD_PAGES + 2),
        (CHUNK_PAGES - 1)..(CHUNK_PAGES + 2),
        1..=most,
    ]
}

/// A range of a memslot as long as they get, up to some chunks long.
pub fn range() -> impl Strategy<Value = PageRange> {
    (page(), count(4 * CHUNK_PAGES)).prop_map(|(first, count)| {
        let count = count.min(MAX_PAGES - first);
        PageRange::new(first, count, MAX_PAGES).expect("it is inside")
    })
}

/// A part of chunk 0.
pub fn part() -> impl Strategy<Value = ChunkPart> {
    let words = (0..CHUNK_PAGES / WORD_PAGES, 0..4u64)
        .prop_map(|(n, off)| (n * WORD_PAGES + off).saturating_sub(2));
    let first = prop_oneof![0..CHUNK_PAGES, words];
    (first, count(CHUNK_PAGES)).prop_map(|(first, count)| ChunkPart {
        chunk: 0,
        first,
        count: count.min(CHUNK_PAGES - first),
    })
}
