// SPDX-License-Identifier: GPL-2.0

//! Memory of a memslot that others want to take away.

use kvm_demand_paging::{Backing, PageRange, State};

use crate::check::Result;
use crate::content;
use crate::slot::{Slot, BLOCK, ID, PAGE};
use crate::sys;

tests! {
    "limit-memfd-cannot-shrink" => memfd_cannot_shrink,
    "limit-hole-under-a-present-page" => hole_under_a_present_page,
    "limit-hole-under-a-pinned-page" => hole_under_a_pinned_page,
}

/// The memfd of a memslot cannot shrink, with pages mapped or none.
fn memfd_cannot_shrink() -> Result {
    use std::os::fd::{AsFd, AsRawFd};
    for (backing, pages) in crate::slot::BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let shrink = || -> Result {
            // SAFETY: it changes a file's size, or does not.
            let ret = unsafe { libc::ftruncate(slot.memfd.as_fd().as_raw_fd(), 0) };
            match sys::check(ret) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(()),
                other => fail!("ftruncate(memfd, 0): {other:?}"),
            }
        };
        shrink()?;
        slot.place(3, 1)?;
        slot.check(3, 1)?;
        shrink()?;
        slot.check(3, 1)?;
        slot.vm.remove_memslot(ID)?;
        shrink()?;
    }
    Ok(())
}

/// A hole is punched under a page of shmem that is present and mapped: it reads as zeros, and not as
/// memory that somebody else has by now.
fn hole_under_a_present_page() -> Result {
    let slot = Slot::new(Backing::Shmem, 64)?;
    for page in 0..64 {
        slot.place(page, 1)?;
        slot.check(page, 1)?;
    }
    slot.memfd.punch_hole(PageRange::new(0, 64))?;
    // Somebody else takes memory.
    let other = Slot::new(Backing::Shmem, 2048)?;
    for page in 0..2048 {
        other.fill(page, 666)?;
    }
    for page in 0..64 {
        ensure_eq!(slot.words(page)?, [0; 512], "page {page}, in the hole");
        slot.place(page, 2)?;
        slot.check(page, 2)?;
    }
    Ok(())
}

/// A hole is punched under a huge page of hugetlb that is mapped: it is pinned, so whoever has it
/// mapped goes on reading what it held, not memory that somebody else has by now.
fn hole_under_a_pinned_page() -> Result {
    let slot = Slot::new(Backing::Huge2M, BLOCK)?;
    for page in 0..64 {
        slot.place(page, 1)?;
        slot.check(page, 1)?;
    }
    slot.memfd.punch_hole(PageRange::new(0, BLOCK))?;
    // Somebody else takes memory.
    let other = Slot::new(Backing::Huge2M, 2 * BLOCK)?;
    for page in 0..2 * BLOCK {
        other.fill(page, 666)?;
    }
    let again = slot.memslot.map()?;
    for page in 0..64 {
        slot.check(page, 1)?;
        let words =
            crate::slot::words_at(again.as_ptr().wrapping_add((page * PAGE) as usize).cast())?;
        if let Err(wrong) = content::check(&words, page, 1) {
            fail!("through another mapping: {wrong}");
        }
    }
    // Its pin goes with the page's being absent: then the memfd's hole shows.
    slot.mark_range(State::Absent, PageRange::new(0, BLOCK))?;
    slot.mark_range(State::Present, PageRange::new(0, 64))?;
    ensure_eq!(
        slot.words(9)?,
        [0; 512],
        "the page, after absent and present"
    );
    Ok(())
}
