// SPDX-License-Identifier: GPL-2.0

//! Neighbours that a fault maps together with its page, so that they need no fault of their own.
//!
//! A fault maps only neighbours that cost no more than a page table entry:
//!
//! - On hugetlb: present pages whose folios are pinned. The folio of the fault's own page is
//!   pinned.
//! - On shmem: present pages that the page cache has.
//!
//! On hugetlb, a fault that fills its page from a source may also fill absent neighbours. It does
//! so if the accesses around suggest that they will be accessed soon (rules/fill.rs). It fills only
//! pages of its own huge page, and only from the page cache.
//!
//! # Locks
//!
//! The fault has `pages` for reading: what is present stays so, and what is pinned, pinned, until it is
//! mapped; nobody maps a block meanwhile.

use crate::{
    fault_around_pages,
    ffi::{
        memfd::Pfn,
        native::CachedPage,
        vma::Fault, //
    },
    memslot::Memslot,
    pages::Pages,
    rules::{
        around::{
            buddy,
            is_set,
            runs,
            window, //
        },
        fill::group, //
    },
    source::Source, //
};

/// A fault has mapped its page as a single one: maps its neighbours, too, if that looks worth it. `word` holds
/// the present bits around the page.
///
/// A guest that goes about its memory at random pays for the look at one bit, and at one page table entry if
/// that is set.
#[inline]
pub(crate) fn map(slot: &Memslot, pages: &Pages, fault: &Fault<'_>, word: u64) {
    let buddy = buddy(fault.pgoff());
    if is_set(word, buddy) && !fault.is_mapped_near(buddy) && fault_around_pages() > 1 {
        map_window(slot, pages, fault, buddy);
    }
}

/// Maps present neighbours in native memory, after a fault has mapped its page as a single one.
/// `cached` is the fault's own page, and `word` holds the present bits around it.
#[inline]
pub(crate) fn map_cached(fault: &Fault<'_>, cached: &CachedPage, word: u64) {
    let page = fault.pgoff();
    let buddy = buddy(page);
    let size = fault_around_pages();
    if is_set(word, buddy) && size > 1 && !fault.is_mapped_near(buddy) {
        let (first, end) = fault.area();
        for (first, last) in runs(word, page, size, first, end) {
            fault.insert_around(cached, first, last);
        }
    }
}

/// A fault has filled its page from the source, and mapped it as a single one: fills its neighbours, too, if that
/// looks worth it, and maps them. Returns the present bits around the page, which were `word`.
#[inline(always)]
pub(crate) fn fill(
    slot: &Memslot,
    pages: &Pages,
    fault: &Fault<'_>,
    source: &Source,
    frame: Pfn<'_>,
    mut word: u64,
) -> u64 {
    if !fill_group(slot, pages, fault, source, frame, &mut word) {
        map(slot, pages, fault, word);
    }
    word
}

/// Says whether it filled any; they are mapped then.
#[inline(never)]
fn fill_group(
    slot: &Memslot,
    pages: &Pages,
    fault: &Fault<'_>,
    source: &Source,
    frame: Pfn<'_>,
    word: &mut u64,
) -> bool {
    let page = fault.pgoff();
    // While the huge page is being moved its pages are in two.
    if pages.moving(page).is_some() {
        return false;
    }
    let limit = fault_around_pages().min(1 << slot.backing.order());
    let group = group(*word, page, limit);
    if group == 0 {
        return false;
    }
    let filled = source.fill_near(pages, page, frame, group, word);
    if filled == 0 {
        return false;
    }
    slot.stats.source_ahead().add(filled);
    map_window(slot, pages, fault, buddy(page));
    true
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
