// SPDX-License-Identifier: GPL-2.0

//! The pages of a memslot whose bytes are lost, and why. There are hardly ever any, so each is an entry in a tree, and
//! who asks while there is none reads one word.
//!
//! All of it is under the memslot's `pages` lock (see memslot.rs): a page becomes poisoned, and is unmapped, under the
//! lock for writing, and a fault looks and maps under the lock for reading. So a poisoned page is never mapped.
//!
//! Poison is beside a page's other state, which goes on to change, and counts again when the page is healed.

use crate::{
    compat::ehwpoison,
    ffi::tree::Tree,
    rules::{
        poison::{
            both,
            may_heal,
            runs,
            Cause,
            Run, //
        },
        range::{
            PageRange,
            WORD_PAGES, //
        },
        replace::in_good_frame, //
    }, //
};
use kernel::{
    prelude::*, //
};

/// A page that is lost.
struct Lost {
    cause: Cause,
}

/// The pages that are.
pub(crate) struct Poison {
    lost: Tree<Lost>,
}

impl Poison {
    /// None.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { lost: Tree::new()? })
    }

    /// Whether there is none.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.lost.is_empty()
    }

    /// Whether a page is.
    pub(crate) fn has(&self, page: u64) -> bool {
        self.lost.get(page as usize).is_some()
    }

    /// Whether a page's frame is bad.
    pub(crate) fn is_bad(&self, page: u64) -> bool {
        self.lost
            .get(page as usize)
            .is_some_and(|lost| !may_heal(lost.cause))
    }

    /// Whether the frame of one of these pages is.
    pub(crate) fn any_bad(&self, first: u64, count: u64) -> bool {
        self.pages(first)
            .take_while(|&(page, _)| page < first + count)
            .any(|(_, cause)| !may_heal(cause))
    }

    /// The first page of a range that is.
    pub(crate) fn first(&self, range: PageRange) -> Option<u64> {
        if self.is_empty() {
            return None;
        }
        self.lost
            .next(range.first() as usize, range.last() as usize)
            .map(|page| page as u64)
    }

    /// Those of the pages whose bits are in one word with a page's, as such bits.
    pub(crate) fn word(&self, page: u64) -> u64 {
        let start = page - page % WORD_PAGES;
        self.pages(start)
            .take_while(|(page, _)| page - start < WORD_PAGES)
            .fold(0, |bits, (page, _)| bits | (1 << (page - start)))
    }

    /// All from a page on.
    fn pages(&self, from: u64) -> impl Iterator<Item = (u64, Cause)> + '_ {
        let mut from = Some(from as usize);
        core::iter::from_fn(move || {
            let page = self.lost.next(from?, usize::MAX)?;
            from = page.checked_add(1);
            Some((page as u64, self.lost.get(page)?.cause))
        })
    }

    /// All from a page on, joined.
    pub(crate) fn runs(&self, from: u64) -> impl Iterator<Item = Run> + '_ {
        runs(self.pages(from))
    }

    /// Adds a page; says whether it was healthy before.
    pub(crate) fn add(&mut self, page: u64, cause: Cause) -> Result<bool> {
        if let Some(lost) = self.lost.get_mut(page as usize) {
            lost.cause = both(lost.cause, cause);
            return Ok(false);
        }
        let lost = KBox::new(Lost { cause }, GFP_KERNEL_ACCOUNT)?;
        self.lost.insert(page as usize, lost)?;
        Ok(true)
    }

    /// Whether all pages of a range may be healed: EHWPOISON if the frame of one is bad.
    pub(crate) fn check_heal(&self, range: PageRange) -> Result {
        if self.any_bad(range.first(), range.count()) {
            Err(ehwpoison())
        } else {
            Ok(())
        }
    }

    /// The frame of a page is good now. Says whether its bytes are lost all the same, if the frame was bad.
    pub(crate) fn settle(&mut self, page: u64, was_present: bool) -> Option<bool> {
        let lost = self.lost.get_mut(page as usize)?;
        if may_heal(lost.cause) {
            return None;
        }
        let cause = in_good_frame(lost.cause, was_present);
        match cause {
            Some(cause) => lost.cause = cause,
            None => drop(self.lost.remove(page as usize)),
        }
        Some(cause.is_some())
    }

    /// Takes the first page of a range out; none if there is none.
    pub(crate) fn take(&mut self, range: PageRange) -> Option<u64> {
        let page = self.first(range)?;
        self.lost.remove(page as usize)?;
        Some(page)
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.lost.clear();
    }
}
