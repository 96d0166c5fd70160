// SPDX-License-Identifier: GPL-2.0

//! Blocks that become huge mappings again when all their pages are present.
//!
//! A fault that maps a single page in a whole block asks for this. On the thread's way back to user mode
//! the widest whole range around the page is mapped anew (ffi/remap.rs): its page tables go, KVM's
//! stage-2 entries with them, and the next touch of each block maps it by one entry.
//!
//! It happens once for each time that a block becomes whole: afterwards faults there are huge, and do not
//! ask. A block is single pages again only after a page of it was made absent, by a call. On shmem it is only
//! asked for where one folio holds the block, in shared mappings.
//!
//! # Locks
//!
//! `changes` and `pages` are not held while a range is mapped anew: the mmap lock comes before them.

use crate::{
    ffi::{
        memfd::Pfn,
        remap::{
            self,
            Remap,
            Spot, //
        },
        trace,
        vma::Fault, //
    },
    memslot::Memslot,
    pages::Pages,
    rules::{
        collapse::{
            widest,
            BLOCK_PAGES, //
        },
        range::PageRange, //
    },
};
use kernel::sync::{
    atomic::Relaxed,
    ArcBorrow, //
};

/// As many ranges of native memory are mapped anew without a fault that could map a block.
const MOST_IN_VAIN: u32 = 4;

/// After a fault mapped a page: requests that one entry maps the block around it, if all pages of
/// the block are present. `frame` is the frame of the page. `word` holds the present bits around
/// the page: they nearly always rule this out.
#[inline(always)]
pub(crate) fn consider(
    slot: &Memslot,
    pages: &Pages,
    fault: &Fault<'_>,
    frame: Pfn<'_>,
    word: u64,
) {
    if word == u64::MAX {
        consider_block(slot, pages, fault, frame);
    }
}

#[inline(never)]
fn consider_block(slot: &Memslot, pages: &Pages, fault: &Fault<'_>, frame: Pfn<'_>) {
    let in_vain = slot.backing.is_native() && slot.vain_collapses.load(Relaxed) >= MOST_IN_VAIN;
    if in_vain || !slot.backing.may_have_blocks() {
        return;
    }
    let page = fault.pgoff();
    if slot.backing.block_around(frame, page).is_none() {
        return;
    }
    let block = fault
        .block()
        .and_then(|first| slot.range(first, BLOCK_PAGES));
    let is_whole = block.is_some_and(|block| pages.all_mappable(block));
    if is_whole && pages.moving(page).is_none() {
        remap::request::<Memslot>(&slot.remapper, fault);
    }
}

impl Remap for Memslot {
    fn remap(this: ArcBorrow<'_, Self>, spot: &Spot) {
        renew(&this, spot);
    }
}

/// Maps the widest whole range around a page anew, where the current thread has it mapped in one piece.
pub(crate) fn renew(slot: &Memslot, spot: &Spot) {
    let is_whole = |range: PageRange| {
        let pages = slot.pages.read();
        let whole = pages.all_mappable(range);
        drop(pages);
        whole && spot.covers(range)
    };
    let Some(range) = widest(spot.page(), slot.place.nr_pages, is_whole) else {
        return;
    };
    if range.count() < BLOCK_PAGES {
        return;
    }
    // A seal of the memfd forbids it where the area is writable (memfd_check_seals_mmap() in mm/memfd.c).
    slot.vain_collapses.fetch_add(1, Relaxed);
    if spot.renew(&slot.remapper, range).is_ok() {
        slot.stats.collapses().add(1);
        trace::collapse(slot.place.id, range.first(), range.count());
    }
}
