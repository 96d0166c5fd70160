// SPDX-License-Identifier: GPL-2.0

//! rust/rules/poison.rs

use kdp_rules::rules::poison::{both, may_heal, runs, Cause, Run};
use proptest::prelude::*;
use std::collections::BTreeMap;

const CAUSES: [Cause; 3] = [Cause::Hardware, Cause::Emulated, Cause::Inherited];

#[test]
fn a_bad_frame_counts_for_most_and_stays() {
    for old in CAUSES {
        for new in CAUSES {
            let cause = both(old, new);
            let is_bad = old == Cause::Hardware || new == Cause::Hardware;
            assert_eq!(cause == Cause::Hardware, is_bad, "{old:?}, {new:?}");
            assert_eq!(may_heal(cause), !is_bad, "{old:?}, {new:?}");
            assert!(is_bad || cause == old, "{old:?}, {new:?}");
        }
    }
}

proptest! {
    /// Runs are what was put in, in order, and no two of them could be one.
    #[test]
    fn runs_are_the_pages(pages in prop::collection::btree_map(0_u64..40, 0_usize..3, 0..40)) {
        let pages: BTreeMap<u64, Cause> =
            pages.into_iter().map(|(page, cause)| (page, CAUSES[cause])).collect();
        let runs: Vec<Run> = runs(pages.iter().map(|(&page, &cause)| (page, cause))).collect();
        let again: Vec<(u64, Cause)> = runs
            .iter()
            .flat_map(|run| (run.first..run.first + run.count).map(|page| (page, run.cause)))
            .collect();
        prop_assert_eq!(again, pages.into_iter().collect::<Vec<_>>());
        for pair in runs.windows(2) {
            let touch = pair[0].first + pair[0].count == pair[1].first;
            prop_assert!(!(touch && pair[0].cause == pair[1].cause));
        }
    }
}
