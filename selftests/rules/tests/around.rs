// SPDX-License-Identifier: GPL-2.0

//! rust/rules/around.rs

use kdp_rules::rules::around::{buddy, is_set, is_size, runs, window, MAX_PAGES};
use proptest::prelude::*;

fn size() -> impl Strategy<Value = u64> {
    (0..=MAX_PAGES.trailing_zeros()).prop_map(|shift| 1 << shift)
}

#[test]
fn sizes_are_powers_of_two_up_to_a_block() {
    let sizes: Vec<u32> = (0..5000).filter(|&pages| is_size(pages)).collect();
    assert_eq!(sizes, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    assert!(!is_size(u32::MAX));
}

proptest! {
    /// Against each page's own answer: it is in the window if it is in the area and in the same aligned group.
    #[test]
    fn window_is_the_aligned_group_within_the_area(
        size in size(),
        (first, pages) in (0..5000u64, 1..2000u64),
        at in 0..2000u64,
    ) {
        let page = first + at % pages;
        let expected: Vec<u64> = (first..first + pages)
            .filter(|other| other / size == page / size)
            .collect();
        let mut found = vec![];
        for (word, mask) in window(page, size, first, first + pages) {
            prop_assert_eq!(word % 64, 0);
            prop_assert!(mask != 0);
            found.extend((0..64).filter(|bit| (mask >> bit) & 1 != 0).map(|bit| word + bit));
        }
        prop_assert_eq!(found, expected);
    }

    /// The buddy is in every window that is one, is not the page, and is its buddy's buddy; both have their bits in
    /// one word.
    #[test]
    fn buddies_are_in_one_window_and_word(page in any::<u64>(), size in size(), word in any::<u64>()) {
        let other = buddy(page);
        prop_assert!(other != page && buddy(other) == page);
        prop_assert!(size == 1 || other / size == page / size);
        prop_assert_eq!(other / 64, page / 64);
        prop_assert_eq!(is_set(word, page), word & (1 << (page % 64)) != 0);
    }

    /// The runs hold exactly the present pages of the page's window, within its word and the VMA.
    /// Two runs are never adjacent.
    #[test]
    fn runs_are_all_present_pages(
        size in size(),
        (first, pages) in (0..500u64, 1..200u64),
        at in 0..200u64,
        word in any::<u64>(),
        more in any::<u64>(),
    ) {
        let page = first + at % pages;
        // Long runs, too.
        let word = word | more;
        let expected: Vec<u64> = (first..first + pages)
            .filter(|other| other / 64 == page / 64 && other / size == page / size)
            .filter(|&other| is_set(word, other))
            .collect();
        let mut found = vec![];
        for (low, high) in runs(word, page, size, first, first + pages) {
            prop_assert!(low <= high);
            prop_assert!(found.last().is_none_or(|last| last + 1 < low));
            found.extend(low..=high);
        }
        prop_assert_eq!(found, expected);
    }
}
