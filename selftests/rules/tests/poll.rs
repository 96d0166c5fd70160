// SPDX-License-Identifier: GPL-2.0

//! rust/rules/poll.rs

use kdp_rules::rules::poll::{next, START_NS};
use proptest::prelude::*;

proptest! {
    #[test]
    fn never_more_than_the_limit(now: u64, took: u64, max: u64) {
        prop_assert!(next(now, took, max) <= max);
    }

    /// Pages that come within the limit are soon waited for awake, and it stays so.
    #[test]
    fn grows_until_it_suffices(took in 0..=200_000u64, max in 200_000..1_000_000u64) {
        let mut now = 0;
        let mut steps = 0;
        while now < took.max(1) {
            now = next(now, took.max(1), max);
            steps += 1;
            prop_assert!(steps <= 6, "{} after {} steps", now, steps);
        }
        prop_assert_eq!(next(now, took, max), now);
    }

    /// Some that take longer end it: nobody burns a CPU for a slow network. One does not, among many that come early.
    #[test]
    fn slow_pages_end_it(now in 0..1_000_000u64, max in 0..1_000_000u64, more in 1..u64::MAX / 2) {
        let mut now = now;
        for _ in 0..7 {
            let then = next(now, max + more, max);
            prop_assert!(then <= now / 2);
            now = then;
        }
        prop_assert_eq!(now, 0);
    }

    /// An early page makes up for a late one.
    #[test]
    fn one_slow_page_is_forgotten(took in START_NS..=200_000u64) {
        let now = next(200_000, 200_001, 200_000);
        let once = next(now, took, 200_000);
        prop_assert!(once >= took || next(once, took, 200_000) >= took);
    }
}

#[test]
fn zero_switches_it_off() {
    for took in [0, 1, START_NS, u64::MAX] {
        assert_eq!(next(0, took, 0), 0);
        assert_eq!(next(START_NS, took, 0), 0);
    }
}
