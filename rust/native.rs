// SPDX-License-Identifier: GPL-2.0

//! What a touch of native memory does: memory of a shmem memfd, which the kernel knows as its own.
//!
//! The areas belong to the memfd's mapping. Their pages are refcounted and in the rmap, so
//! get_user_pages(), swap, memory errors, migration and private copies work by the kernel's rules.
//! The state of each page decides as on hugetlb (fault.rs).
//!
//! A page is never returned to the kernel to be mapped, except to be copied: finish_fault() in
//! mm/memory.c would map the whole folio, absent pages too. VM_DONTEXPAND keeps khugepaged away,
//! which would map absent pages in the same way (VM_NO_KHUGEPAGED in include/linux/mm.h).
//!
//! # Locks
//!
//! As in fault.rs. A page's lock is taken inside `pages`, for as long as the page is mapped or
//! filled. What has to be allocated or read from swap is brought in without `pages`; if reclaim is
//! faster twice in a row, under it.

use crate::{
    ahead,
    around,
    collapse,
    fault::{
        block_of,
        fail,
        incomplete,
        mapped,
        not_cached,
        serve,
        unfilled,
        unpinned, //
    },
    ffi::{
        file::RawFile,
        native::CachedPage,
        rwsem::ReadGuard,
        task::current_number,
        vma::{
            Fault,
            Mapping,
            NewMapping,
            Outcome,
            PMD_ORDER, //
        }, //
    },
    memslot::Memslot,
    pages::Pages,
    rules::touch::State,
    source::Filled,
    vcpu, //
};
use kernel::{
    bindings::vm_flags_t,
    mm::virt::flags,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        ArcBorrow, //
    }, //
};

/// Guest memory that is ordinary memory.
pub(crate) struct NativeMapping;

/// Threads whose last fault must not wait, as KVM's first request for a page, and its page. The
/// thread's next fault on that page is KVM's second request. Threads with exits on are not listed.
///
/// A guess, for the events' readers and for faults in kworkers. Threads that share an entry
/// overwrite each other's: relaxed.
pub(crate) struct Asked([Atomic<u64>; 16]);

impl Asked {
    pub(crate) fn new() -> Self {
        Self([const { Atomic::new(u64::MAX) }; 16])
    }

    fn of_current(&self, page: u64) -> (&Atomic<u64>, u64) {
        let thread = current_number();
        let slot = &self.0[thread % self.0.len()];
        (slot, (thread as u64) << 40 | page)
    }

    pub(crate) fn by_current(&self, page: u64) {
        let (slot, value) = self.of_current(page);
        slot.store(value, Relaxed);
    }

    pub(crate) fn is_by_current(&self, page: u64) -> bool {
        let (slot, value) = self.of_current(page);
        slot.load(Relaxed) == value
    }

    /// Whether any thread has, as far as it is known.
    fn is_by_any(&self, page: u64) -> bool {
        self.0
            .iter()
            .any(|slot| slot.load(Relaxed) << 24 == page << 24)
    }
}

impl Mapping for NativeMapping {
    type Owner = Memslot;

    // VM_HUGEPAGE: the memfd decides how large its folios are.
    const FLAGS: vm_flags_t = flags::DONTEXPAND | flags::DONTDUMP | flags::HUGEPAGE;
    const HUGE: bool = true;
    const NATIVE: bool = true;

    fn base(slot: &Memslot) -> u64 {
        slot.backing.offset()
    }

    fn fault(slot: ArcBorrow<'_, Memslot>, mut fault: Fault<'_>) -> Outcome {
        if fault.pgoff() >= slot.place.nr_pages {
            return fail(&slot);
        }
        if fault.no_wait() {
            let gfn = slot.place.base_gfn + fault.pgoff();
            if !vcpu::is_stage2_asking(slot.vm.serial(), gfn, false) {
                slot.asked.by_current(fault.pgoff());
            }
        }
        let mut brought = false;
        loop {
            match page_fault(slot, fault, &mut brought) {
                Ok(outcome) => return outcome,
                Err(again) => fault = again,
            }
        }
    }

    fn huge_fault(slot: ArcBorrow<'_, Memslot>, fault: Fault<'_>) -> Outcome {
        slot.vain_collapses.store(0, Relaxed);
        if !slot.backing.may_have_blocks() || fault.writes_private() {
            return Outcome::Fallback;
        }
        let Some(block) = block_of(&slot, &fault) else {
            return Outcome::Fallback;
        };
        let page = fault.pgoff();
        let pages = slot.pages.read();
        if !pages.all_mappable(block) {
            return incomplete(slot, pages, fault, block);
        }
        drop(pages);
        // Nobody has written to a folio that is not up to date yet. The page's own fault tells of
        // errors.
        if let Err(e) = slot.backing.find(page, !fault.no_wait()) {
            if fault.no_wait() && e != ENOENT {
                return Outcome::Retry;
            }
            drop(slot.backing.get(page));
        }
        // For writing: a page must not be inserted into the block at the same time (fault.rs).
        let pages = slot.pages.write();
        if !pages.all_mappable(block) {
            return Outcome::Fallback;
        }
        let Ok(cached) = slot.backing.find(page, !fault.no_wait()) else {
            return Outcome::Fallback;
        };
        let outcome = fault.insert_cached_block(&cached);
        drop(cached);
        if outcome == Outcome::Fallback {
            return outcome;
        }
        ahead::consider(slot, &pages, page);
        drop(pages);
        mapped(&slot, fault, page, PMD_ORDER, outcome)
    }
}

/// Sets a new mapping of native memory up: gives it a file of the memfd's inode, and the fault
/// handlers of this module.
pub(crate) fn map(slot: ArcBorrow<'_, Memslot>, mut mapping: NewMapping<'_, Memslot>) -> Result {
    let base = slot.backing.offset();
    // When the module maps a range again, the VMA has the right file already.
    if slot.remapper.kind().is_none() {
        let end = mapping.pgoff().checked_add(mapping.pages());
        if end.is_none_or(|end| end > slot.place.nr_pages) {
            return Err(EINVAL);
        }
        if !mapping.is_shared() {
            slot.has_private.store(true, Relaxed);
        }
        let make = || {
            slot.opened();
            slot.into()
        };
        // When the module maps the range again, its VMA may be written if its file may.
        let writable = mapping.may_write();
        let file = RawFile::of_memfd(slot.backing.memfd().file(), writable, make)?;
        mapping.redirect(&file, base);
    }
    mapping.install::<NativeMapping>();
    Ok(())
}

/// A fault of one page. Gives the fault back if the page must be looked at again.
fn page_fault<'a>(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'a>,
    brought: &mut bool,
) -> Result<Outcome, Fault<'a>> {
    let page = fault.pgoff();
    let pages = slot.pages.read();
    let (state, word) = pages.look(page);
    match state {
        State::Present => {
            let found = match slot.backing.find(page, !fault.no_wait()) {
                Err(e) if is_elsewhere(e) && *brought => slot.backing.get(page),
                other => other,
            };
            match found {
                Ok(cached) => Ok(insert(slot, pages, fault, cached, word)),
                Err(e) => {
                    drop(pages);
                    *brought = true;
                    missing(slot, fault, page, e)
                }
            }
        }
        State::Sourced => fill(slot, pages, fault, page),
        // Whoever must not wait asks again, and waits or fails then.
        State::Absent if fault.no_wait() => Ok(Outcome::Retry),
        _ => {
            drop(pages);
            serve(slot, fault, page, state)
        }
    }
}

/// Maps a page that is present. `word` holds the present bits around it.
fn insert(
    slot: ArcBorrow<'_, Memslot>,
    pages: ReadGuard<'_, Pages>,
    fault: Fault<'_>,
    cached: CachedPage,
    word: u64,
) -> Outcome {
    let page = fault.pgoff();
    // Do not copy a page that the guest may only read. It is in the page cache now. KVM next lets
    // the vCPU's thread make the guest's own access, which finds the page there. KVM has asked for
    // the page without waiting before; no other user of a kworker has.
    if fault.copies_in_kworker() && slot.asked.is_by_any(page) {
        return Outcome::Fail;
    }
    // Another thread may have mapped the whole block since this fault fell back to a page.
    let outcome = if fault.is_in_block() {
        Outcome::Mapped
    } else {
        collapse::consider(&slot, &pages, &fault, cached.frame(), word);
        fault.insert_cached(cached, |cached| around::map_cached(&fault, cached, word))
    };
    ahead::consider(slot, &pages, page);
    drop(pages);
    mapped(&slot, fault, page, 0, outcome)
}

/// Whether the page cache does not have the page.
fn is_elsewhere(error: Error) -> bool {
    error == ENOENT || error == EBUSY
}

/// A page that is present could not be had from the page cache.
#[cold]
fn missing<'a>(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'a>,
    page: u64,
    error: Error,
) -> Result<Outcome, Fault<'a>> {
    if !is_elsewhere(error) {
        return Ok(match error {
            e if e == EAGAIN => Outcome::Retry,
            e => unpinned(slot, fault, page, e),
        });
    }
    // A hole is filled at once, as shmem's own fault handler does: then this process pays for it.
    if fault.no_wait() && error == EBUSY {
        return Ok(Outcome::Retry);
    }
    match slot.backing.get(page) {
        Ok(cached) => {
            drop(cached);
            Err(fault)
        }
        Err(e) => Ok(unpinned(slot, fault, page, e)),
    }
}

/// Fills a page from the source, if its bytes are in memory, and maps it. Gives the fault back if
/// the page must be looked at again.
fn fill<'a>(
    slot: ArcBorrow<'_, Memslot>,
    pages: ReadGuard<'_, Pages>,
    fault: Fault<'a>,
    page: u64,
) -> Result<Outcome, Fault<'a>> {
    let Some(source) = pages.source() else {
        return Err(fault);
    };
    match source.fill(&slot, &pages, page) {
        Ok(Filled::Now(frame, present)) => {
            slot.stats.source_reads().add(1);
            match frame.into_cached() {
                Some(cached) => {
                    let word = pages.healthy(page, present);
                    Ok(insert(slot, pages, fault, cached, word))
                }
                None => Err(fault),
            }
        }
        Ok(Filled::Already) => Err(fault),
        Ok(Filled::NotCached) => {
            let source = source.clone();
            drop(pages);
            Ok(not_cached(slot, fault, &source, page))
        }
        Err(why) => {
            drop(pages);
            Ok(unfilled(slot, fault, page, why))
        }
    }
}
