// SPDX-License-Identifier: GPL-2.0

//! Why a page is poisoned, and what may become of it.

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Cause {
    /// Its frame has a memory error: nobody may read it again.
    Hardware = 1,
    /// Somebody said so.
    Emulated = 2,
    /// It was lost where the guest came from.
    Inherited = 3,
}

/// The cause of a page that is poisoned once more: what the frame has counts for most.
pub fn both(old: Cause, new: Cause) -> Cause {
    if new == Cause::Hardware {
        new
    } else {
        old
    }
}

/// Whether a call may heal a page: only where its frame is good.
pub fn may_heal(cause: Cause) -> bool {
    cause != Cause::Hardware
}

/// Pages side by side that are poisoned by one cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first one.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Why.
    pub cause: Cause,
}

/// Joins poisoned pages, which come in rising order, to runs.
pub fn runs(pages: impl Iterator<Item = (u64, Cause)>) -> impl Iterator<Item = Run> {
    let mut pages = pages.peekable();
    core::iter::from_fn(move || {
        let (first, cause) = pages.next()?;
        let mut run = Run {
            first,
            count: 1,
            cause,
        };
        while pages
            .next_if(|&(page, cause)| page == run.first + run.count && cause == run.cause)
            .is_some()
        {
            run.count += 1;
        }
        Some(run)
    })
}
