// SPDX-License-Identifier: GPL-2.0

//! rust/rules/stage2.rs

use kdp_rules::rules::stage2::{is_stage2, LastFault, Now};
use proptest::prelude::*;

fn touch(gfn: u64, guest_exits: u64, in_pfn_cache: bool) -> Now {
    Now {
        gfn,
        guest_exits,
        in_pfn_cache,
    }
}

proptest! {
    #[test]
    fn the_very_fault_is(gfn: u64, guest_exits: u64) {
        let last = LastFault { gfn, guest_exits };
        prop_assert!(is_stage2(last, touch(gfn, guest_exits, false)));
    }

    /// In doubt, wait.
    #[test]
    fn whatever_differs_is_not(
        gfn: u64,
        guest_exits: u64,
        other_gfn: u64,
        other_exits: u64,
        // Also numbers that differ in one bit: all of them count.
        bit in 0..64u32,
    ) {
        let last = LastFault { gfn, guest_exits };
        prop_assert!(!is_stage2(last, touch(gfn, guest_exits, true)));
        for gfn_now in [other_gfn, gfn ^ (1 << bit), gfn] {
            for exits_now in [other_exits, guest_exits ^ (1 << bit), guest_exits] {
                let same = gfn_now == gfn && exits_now == guest_exits;
                prop_assert_eq!(is_stage2(last, touch(gfn_now, exits_now, false)), same);
                prop_assert!(!is_stage2(last, touch(gfn_now, exits_now, true)));
            }
        }
    }
}
