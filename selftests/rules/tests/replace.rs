// SPDX-License-Identifier: GPL-2.0

//! rust/rules/replace.rs

use kdp_rules::rules::poison::Cause;
use kdp_rules::rules::replace::{in_good_frame, Cursor, Home};
use proptest::prelude::*;

proptest! {
    /// Every page is on its way once, in order; before it is in the old huge page, after that in the fresh one.
    #[test]
    fn each_page_moves_once(count in 1_u64..2000, parts in prop::collection::vec(1_u64..100, 1..50)) {
        let mut cursor = Cursor::new(count);
        let mut next = 0;
        for most in parts.into_iter().cycle() {
            prop_assert_eq!(cursor.awaited(), None);
            let Some((first, held)) = cursor.hold(most) else { break };
            prop_assert_eq!(first, next);
            prop_assert!((1..=most).contains(&held));
            prop_assert_eq!(cursor.awaited(), Some(first + held));
            for page in 0..count {
                let expected = if page < first {
                    Home::Fresh
                } else if page < first + held {
                    Home::Neither
                } else {
                    Home::Old
                };
                prop_assert_eq!(cursor.home(page), expected);
            }
            prop_assert!(!cursor.is_done());
            prop_assert_eq!(cursor.release(), first..first + held);
            next = first + held;
        }
        prop_assert!(cursor.is_done());
        prop_assert_eq!(next, count);
    }
}

#[test]
fn what_was_lost_for_its_frame_alone_is_not_lost() {
    assert_eq!(in_good_frame(Cause::Hardware, true), Some(Cause::Emulated));
    assert_eq!(in_good_frame(Cause::Hardware, false), None);
    for cause in [Cause::Emulated, Cause::Inherited] {
        for was_present in [false, true] {
            assert_eq!(in_good_frame(cause, was_present), Some(cause));
        }
    }
}
