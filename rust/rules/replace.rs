// SPDX-License-Identifier: GPL-2.0

//! A huge page that is being moved, part by part, and what becomes of the pages of it that were lost.

use super::poison::{
    may_heal,
    Cause, //
};

/// Where the bytes of a page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// Where they were.
    Old,
    /// In the fresh huge page.
    Fresh,
    /// On the way: nobody may have the page.
    Neither,
}

/// How far a huge page has been moved. Its pages go in their order.
///
/// # Invariants
///
/// `moved + held <= count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    count: u64,
    moved: u64,
    held: u64,
}

impl Cursor {
    /// None of `count` pages has been moved.
    pub fn new(count: u64) -> Self {
        // INVARIANT: Both are 0.
        Self {
            count,
            moved: 0,
            held: 0,
        }
    }

    /// The pages that are on the way from now on: the first, and how many, at most `most`. None if all have arrived.
    pub fn hold(&mut self, most: u64) -> Option<(u64, u64)> {
        // INVARIANT: Not more than are left.
        self.held = most.min(self.count - self.moved);
        (self.held > 0).then_some((self.moved, self.held))
    }

    /// They have arrived: which.
    pub fn release(&mut self) -> core::ops::Range<u64> {
        let first = self.moved;
        // INVARIANT: The sum stays the same.
        self.moved += self.held;
        self.held = 0;
        first..self.moved
    }

    /// If some are on the way: how many will have arrived once these have.
    pub fn awaited(&self) -> Option<u64> {
        (self.held > 0).then_some(self.moved + self.held)
    }

    /// Whether all have arrived.
    pub fn is_done(&self) -> bool {
        self.moved == self.count
    }

    /// Where a page is.
    pub fn home(&self, page: u64) -> Home {
        if page < self.moved {
            Home::Fresh
        } else if page < self.moved + self.held {
            Home::Neither
        } else {
            Home::Old
        }
    }
}

/// Why a poisoned page is still lost now that its frame is good; none if it is not: its content was still to come.
pub fn in_good_frame(cause: Cause, was_present: bool) -> Option<Cause> {
    match (may_heal(cause), was_present) {
        (true, _) => Some(cause),
        (false, true) => Some(Cause::Emulated),
        (false, false) => None,
    }
}
