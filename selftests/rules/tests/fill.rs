// SPDX-License-Identifier: GPL-2.0

//! rust/rules/fill.rs

use kdp_rules::rules::fill::{group, MOST};
use proptest::prelude::*;

fn limit() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0_u64), (0..=9_u32).prop_map(|shift| 1 << shift)]
}

proptest! {
    /// An aligned group with the page in it, of as many pages as are allowed, wanted, and half as many as are present:
    /// there is none of twice its size.
    #[test]
    fn group_is_as_large_as_it_may_be(bits in any::<u64>(), page in any::<u64>(), limit in limit()) {
        let present = bits | (1 << (page % 64));
        let group = group(present, page, limit);
        let most = MOST.min(limit).min(u64::from(present.count_ones()) / 2);
        if group == 0 {
            prop_assert!(most < 2);
            return Ok(());
        }
        let size = u64::from(group.count_ones());
        prop_assert!(size.is_power_of_two() && size <= most && most < 2 * size);
        let first = u64::from(group.trailing_zeros());
        prop_assert_eq!(first % size, 0);
        prop_assert_eq!(group >> first, u64::MAX >> (64 - size));
        prop_assert!(group & (1 << (page % 64)) != 0);
    }

    /// Whoever touches pages of a word, in any order: never more than five unasked for one that is touched, none at
    /// first, and twelve touches at least for all of it.
    #[test]
    fn waste_is_bounded(order in Just((0..64_u64).collect::<Vec<_>>()).prop_shuffle(), limit in limit()) {
        let (mut present, mut touched) = (0_u64, 0);
        for page in order {
            if present & (1 << page) != 0 {
                continue;
            }
            touched += 1;
            present |= 1 << page;
            present |= group(present, page, limit);
            let unasked = present.count_ones() - touched;
            prop_assert!(unasked <= 5 * touched);
            prop_assert!(touched > 3 || unasked == 0);
            prop_assert!(touched >= 12 || present != u64::MAX);
        }
        prop_assert!(limit < MOST || touched < 64);
    }
}
