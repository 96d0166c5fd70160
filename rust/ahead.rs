// SPDX-License-Identifier: GPL-2.0

//! Reading ahead: while somebody goes through a memslot in order, the pages in front are filled in the
//! background, so that whole blocks are there before they are touched, and are mapped by one entry.
//!
//! No touch waits for a device but for its own page. Only a thread that has come, in order, to a block that is being
//! read ahead for it fills what is in memory already of it, before it goes on: 511 copies at most, which spare it
//! as many faults. So do the kernel's own huge pages, which a fault clears as a whole.
//!
//! # Locks
//!
//! As a fault takes them, without the mapping's: `pages` for reading around each page, none while a device
//! works; `changes` for a moment, when a block may have become whole.

use crate::{
    ffi::{
        task::is_being_killed,
        trace,
        work, //
    },
    memslot::Memslot,
    pages::Pages,
    rules::{
        collapse::BLOCK_PAGES,
        range::PageRange,
        touch::State, //
    },
    source::{
        Bite,
        Filled,
        Source,
        Unfilled, //
    }, //
};
use kernel::{
    sync::{
        Arc,
        ArcBorrow, //
    },
    workqueue::WorkItem, //
};

/// The number of the work that reads.
pub(crate) const READ: u64 = 0;

/// Pages that are filled in a row before others have their turn.
const BITE: u64 = 64;

/// A fault was served in a memslot that may have a source: has more read, if its thread goes on in order.
#[inline(always)]
pub(crate) fn consider(slot: ArcBorrow<'_, Memslot>, pages: &Pages, page: u64) {
    if let Some(source) = pages.source() {
        consider_next(slot, source, page);
    }
}

#[inline(never)]
fn consider_next(slot: ArcBorrow<'_, Memslot>, source: &Source, page: u64) {
    if source.touched(page, slot.place.nr_pages) {
        work::enqueue::<_, READ>(Arc::from(slot));
    }
}

impl WorkItem<READ> for Memslot {
    type Pointer = Arc<Memslot>;

    fn run(slot: Arc<Memslot>) {
        let mut turn = 0;
        loop {
            let source = slot.pages.read().source().cloned();
            let Some(source) = source else { return };
            let Some(bite) = source.bite(turn, BITE) else {
                return;
            };
            turn = bite.next_turn();
            if !read(&slot, &source, &bite) {
                source.give_up(&bite);
            }
            work::yield_now();
        }
    }
}

/// Fills what is absent in a bite; says whether it makes sense to go on behind it.
fn read(slot: &Memslot, source: &Arc<Source>, bite: &Bite) -> bool {
    let mut page = bite.first;
    let mut announced = false;
    let mut filled = 0;
    let done = loop {
        let pages = slot.pages.read();
        if !pages.source().is_some_and(|now| Arc::ptr_eq(now, source)) {
            break false;
        }
        while page < bite.end {
            if pages.state(page) == State::Sourced {
                match source.fill(slot, &pages, page) {
                    Ok(Filled::Now(..)) => filled += 1,
                    Ok(Filled::Already) => (),
                    Ok(Filled::NotCached) => break,
                    // Whoever touches the page is told.
                    Err(Unfilled::Unpinned(_) | Unfilled::Unread(_)) => return false,
                }
            }
            page += 1;
        }
        drop(pages);
        if page >= bite.end {
            break true;
        }
        if !announced {
            source.announce(page, bite.end - page);
            announced = true;
        }
        if source.fetch(slot, page).is_err() {
            break false;
        }
    };
    slot.stats.source_ahead().add(filled);
    trace::source(slot.place.id, bite.first, page - bite.first, 0);
    // With the last bite of a block it is whole, if it is going to be.
    if bite.end % BLOCK_PAGES == 0 {
        if let Some(range) = slot.range(bite.first, bite.end - bite.first) {
            slot.collapse_read(range);
        }
    }
    done
}

/// Fills what is absent in a block, if all of it is in memory. From the end: the work comes from the front.
pub(crate) fn help(slot: &Memslot, source: &Arc<Source>, block: PageRange) {
    let mut end = block.last() + 1;
    let mut filled = 0;
    while end > block.first() && !is_being_killed() {
        let first = end - (end - block.first()).min(BITE);
        let pages = slot.pages.read();
        if !pages.source().is_some_and(|now| Arc::ptr_eq(now, source)) {
            break;
        }
        let is_there = |page: u64| match pages.state(page) {
            State::Present => true,
            State::Sourced => match source.fill(slot, &pages, page) {
                Ok(Filled::Now(..)) => {
                    filled += 1;
                    true
                }
                Ok(Filled::Already) => true,
                // Whoever touches the page waits for it, or is told.
                Ok(Filled::NotCached) | Err(_) => false,
            },
            _ => false,
        };
        if !(first..end).rev().all(is_there) {
            break;
        }
        end = first;
        drop(pages);
        work::yield_now();
    }
    slot.stats.source_ahead().add(filled);
    trace::source(slot.place.id, end, block.last() + 1 - end, 0);
    if end == block.first() {
        source.has_filled(block);
        if filled > 0 {
            slot.collapse_read(block);
        }
    }
}
