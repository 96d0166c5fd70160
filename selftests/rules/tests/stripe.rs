// SPDX-License-Identifier: GPL-2.0

//! rust/rules/stripe.rs

use kdp_rules::rules::range::WORD_PAGES;
use kdp_rules::rules::stripe::{Stripes, MAX};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn cpus() -> impl Strategy<Value = u32> {
    prop_oneof![1..9u32, 1..2048u32, Just(u32::MAX)]
}

proptest! {
    /// Each CPU has one, neighbours are together, none is without a CPU but by rounding.
    #[test]
    fn cpus_are_divided_evenly(cpus in cpus()) {
        let stripes = Stripes::for_cpus(cpus);
        let count = stripes.count();
        prop_assert!(count.is_power_of_two() && count <= MAX as usize);
        prop_assert!(count >= (cpus.min(MAX) as usize));
        let mut sizes = vec![0u32; count];
        let mut last = 0;
        for cpu in 0..cpus.min(4096) {
            let stripe = stripes.of_cpu(cpu);
            prop_assert!(stripe == last || stripe == last + 1, "{} after {}", stripe, last);
            last = stripe;
            sizes[stripe] += 1;
        }
        let most = cpus.clamp(1, 1 << 31).next_power_of_two() as usize / count;
        prop_assert!(sizes.iter().all(|&size| size as usize <= most));
    }

    /// A number that no CPU should have is no way out of bounds.
    #[test]
    fn any_cpu_has_a_stripe(cpus in cpus(), cpu: u32) {
        let stripes = Stripes::for_cpus(cpus);
        prop_assert!(stripes.of_cpu(cpu) < stripes.count());
    }

    /// What a resolve goes through is where each of its pages' waiters are, in the order of locks.
    #[test]
    fn a_range_has_the_stripes_of_its_pages(
        cpus in cpus(),
        slot: u32,
        first in prop_oneof![0..10_000u64, Just(u64::MAX - 9_999)],
        more in 0..9_999u64,
    ) {
        let stripes = Stripes::for_cpus(cpus);
        let found: Vec<usize> = stripes.of_range(slot, first, first + more).collect();
        prop_assert!(found.is_sorted_by(|a, b| a < b), "{:?}", found);
        let pages: BTreeSet<usize> = (first..=first + more).map(|p| stripes.of_page(slot, p)).collect();
        if more / WORD_PAGES + 1 < stripes.count() as u64 {
            prop_assert_eq!(found, pages.into_iter().collect::<Vec<_>>());
        } else {
            // A long one may go through more: but not outside of what there is.
            prop_assert!(pages.iter().all(|page| found.contains(page)));
            prop_assert!(found.iter().all(|&stripe| stripe < stripes.count()));
        }
    }
}

#[test]
fn each_has_its_turn() {
    for cpus in [1, 5, 64] {
        let stripes = Stripes::for_cpus(cpus);
        for turn in (0..200).chain(u32::MAX - 100..=u32::MAX) {
            let order: Vec<usize> = stripes.by_turns(turn).collect();
            assert_eq!(order[0], turn as usize % stripes.count());
            let all: BTreeSet<usize> = order.iter().copied().collect();
            assert_eq!((order.len(), all.len()), (stripes.count(), stripes.count()));
        }
    }
}

#[test]
fn everything_has_all_stripes() {
    for cpus in [1, 2, 3, 64, 65, 512] {
        let stripes = Stripes::for_cpus(cpus);
        let all: Vec<usize> = (0..stripes.count()).collect();
        assert!(stripes.of_range(7, 0, u64::MAX).eq(all), "{cpus} CPUs");
    }
}

/// Pages of one word are together; a guest that goes through its memory uses all stripes alike, and so do
/// vCPUs that each have a part of it.
#[test]
fn pages_are_spread() {
    let stripes = Stripes::for_cpus(512);
    assert_eq!(stripes.of_page(3, 64), stripes.of_page(3, 127));
    for step in [1, 8, 512, 4096, 1 << 18, 6 << 18] {
        let mut used = vec![0; stripes.count()];
        for i in 0..64_000 {
            used[stripes.of_page(1, i * step * WORD_PAGES)] += 1;
        }
        let (least, most) = (used.iter().min().unwrap(), used.iter().max().unwrap());
        assert!(
            *least > 500 && *most < 2000,
            "step {step}: {least} to {most}"
        );
    }
}

/// The same page of other memslots is elsewhere, mostly.
#[test]
fn memslots_are_spread() {
    let stripes = Stripes::for_cpus(64);
    let used: BTreeSet<usize> = (0..1000).map(|slot| stripes.of_page(slot, 0)).collect();
    assert!(used.len() > 48, "{}", used.len());
}
