// SPDX-License-Identifier: GPL-2.0

//! Present neighbours that a fault maps together with its page, so that they need no fault of their own.
//!
//! Only what costs nothing but a page table entry: pages that are present and whose folios are pinned. On
//! hugetlb the page's own folio is, so that is all present pages of the window. On shmem those are pages
//! that were mapped before, here or by others, or that were pinned with their block: to pin a page nobody
//! has touched would charge it to RLIMIT_MEMLOCK, and allocate it if it is a hole.
//!
//! # Locks
//!
//! The fault has `pages` for reading: what is present stays so, and what is pinned, pinned, until it is
//! mapped; nobody maps a block meanwhile.

use crate::{
    fault_around_pages,
    ffi::vma::Fault,
    memslot::Memslot,
    pages::Pages,
    rules::around::{
        buddy,
        is_set,
        window, //
    }, //
};

/// A fault has mapped its page as a single one: maps its neighbours, too, if that looks worth it. `word` holds
/// the present bits around the page.
///
/// A guest that goes about its memory at random pays for the look at one bit, and at one page table entry if
/// that is set.
#[inline]
pub(crate) fn map(slot: &Memslot, pages: &Pages, fault: &Fault<'_>, word: u64) {
    let buddy = buddy(fault.pgoff());
    if is_set(word, buddy) && fault_around_pages() > 1 && !fault.is_mapped_near(buddy) {
        map_window(slot, pages, fault, buddy);
    }
}

#[inline(never)]
fn map_window(slot: &Memslot, pages: &Pages, fault: &Fault<'_>, buddy: u64) {
    if !slot.backing.is_pinned(pages, buddy) {
        return;
    }
    let (first, end) = fault.area();
    for (start, mask) in window(fault.pgoff(), fault_around_pages(), first, end) {
        let bits = pages.look(start).1 & mask;
        fault.insert_frames(start, &slot.backing.pinned_frames(pages, start, bits));
    }
}
