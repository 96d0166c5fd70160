// SPDX-License-Identifier: GPL-2.0

//! rust/rules/stream.rs

use kdp_rules::rules::stream::Streams;
use proptest::prelude::*;

const LIMIT: u64 = 1 << 20;
const BLOCK: u64 = 512;

/// Touches pages one after the other; returns the ranges that were asked for.
fn touch(streams: &mut Streams, pages: impl IntoIterator<Item = u64>) -> Vec<(u64, u64)> {
    let asked = |page| streams.touched(page, LIMIT);
    pages.into_iter().filter_map(asked).collect()
}

/// From the second page on, every page is asked for once, in order, before it is touched, and windows grow to whole
/// blocks.
#[test]
fn a_stream_is_read_ahead() {
    for start in [0, 1, 77, BLOCK - 1, 5 * BLOCK] {
        let mut streams = Streams::default();
        let end = start + 40 * BLOCK;
        let mut next = start + 2;
        let mut windows = vec![];
        for page in start..end {
            if page >= start + 2 {
                assert!(page < next, "page {page} was not asked for");
            }
            if let Some((first, stop)) = streams.touched(page, LIMIT) {
                assert_eq!(first, next, "the window behind page {page}");
                assert!(stop > first);
                windows.push(stop - first);
                next = stop;
            }
        }
        assert!(windows.len() < 60, "{} windows", windows.len());
        assert_eq!(windows[0], 4);
        assert!(windows.iter().skip(10).all(|window| window % BLOCK == 0));
        // When one window is entered, the next is asked for: no more than two ahead.
        assert!(next <= end + 5 * BLOCK);
    }
}

/// A stream whose blocks are mapped by one entry shows one touch a block.
#[test]
fn one_touch_a_block_keeps_it_going() {
    let mut streams = Streams::default();
    let mut next = touch(&mut streams, 0..2 * BLOCK).pop().expect("a window").1;
    assert_eq!(next % BLOCK, 0);
    for block in 2..64 {
        let page = block * BLOCK;
        assert!(page < next, "block {block} was not asked for");
        if let Some((first, stop)) = streams.touched(page, LIMIT) {
            assert_eq!((first, stop % BLOCK), (next, 0));
            next = stop;
        }
    }
}

/// Blocks that lie wholly in what was asked for, each once; none of a thread that does not go on in order.
#[test]
fn a_stream_is_told_of_its_blocks() {
    let mut streams = Streams::default();
    let mut told = vec![];
    for page in 7..20 * BLOCK {
        let first = page / BLOCK * BLOCK;
        if streams.comes_to(first, first + BLOCK) {
            assert_eq!(page, first, "in the middle of a block");
            told.push(page / BLOCK);
        }
        streams.touched(page, LIMIT);
        assert!(
            !streams.comes_to(first, first + BLOCK),
            "block {first} twice"
        );
    }
    assert_eq!(told, (1..20).collect::<Vec<_>>());

    let mut streams = Streams::default();
    for i in 0..4 * BLOCK {
        let page = i * 389 % (4 * BLOCK);
        let first = page / BLOCK * BLOCK;
        assert!(!streams.comes_to(first, first + BLOCK));
        streams.touched(page, LIMIT);
    }
}

/// Four threads' worth of streams, in turns.
#[test]
fn several_streams_at_once() {
    let mut streams = Streams::default();
    let mut asked = [0; 4];
    for page in 0..1000 {
        for (stream, asked) in asked.iter_mut().enumerate() {
            let at = stream as u64 * 100_000 + 50 + page;
            *asked += u64::from(streams.touched(at, LIMIT).is_some());
        }
    }
    assert!(asked.iter().all(|&windows| windows > 5), "{asked:?}");
}

#[test]
fn the_end_of_the_memslot() {
    let mut streams = Streams::default();
    for page in 0..100 {
        if let Some((first, end)) = streams.touched(page, 100) {
            assert!(first < end && end <= 100);
        }
    }
    assert_eq!(streams.touched(99, 100), None);
    // The first page of all is no stream behind a touch that never was.
    assert_eq!(Streams::default().touched(0, 100), None);
}

proptest! {
    /// Whoever touches pages of which none follows another has nothing read.
    #[test]
    fn nothing_is_read_at_random(pages in prop::collection::btree_set(0..LIMIT / 8, 1..300), seed: u64) {
        // Apart from each other by more than one page, in any order.
        let mut pages: Vec<u64> = pages.into_iter().map(|page| page * 8).collect();
        let count = pages.len() as u64;
        for at in 0..count {
            let other = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed) % count;
            pages.swap(at as usize, other as usize);
        }
        prop_assert_eq!(touch(&mut Streams::default(), pages), vec![]);
    }

    /// Whatever is touched: what is asked for is inside the memslot, behind the touch, and bounded.
    #[test]
    fn what_is_asked_for_is_sane(
        pages in prop::collection::vec(prop_oneof![0..40_u64, 0..3000_u64], 1..400),
        limit in 3000..4000_u64,
    ) {
        let mut streams = Streams::default();
        for page in pages {
            if let Some((first, end)) = streams.touched(page, limit) {
                prop_assert!(page < first && first < end && end <= limit);
                prop_assert!(end - first <= 3 * BLOCK);
            }
        }
    }
}
