// SPDX-License-Identifier: GPL-2.0

//! How a vCPU learns, from KVM itself, that a page's bytes are lost: for VMMs that know nothing of us.
//!
//! On VM_PFNMAP, which guest memory is, KVM makes -EFAULT of whatever a fault handler says (`fixup_user_fault()` in
//! mm/gup.c), and a VMM that does not know us gives up. On other areas it asks get_user_pages(), hears -EHWPOISON, and
//! sends its thread the SIGBUS of a memory error, with the page's address and size (`kvm_handle_error_pfn()` in
//! arch/x86/kvm/mmu/mmu.c); KVM_RUN then ends as for any signal.
//!
//! So a poisoned page of a memslot that asked for this becomes an area of another kind in each process, in which nothing is
//! ever mapped (ffi/remap.rs). It becomes guest memory again at the first touch after it was healed.
//!
//! That is done before the page is poisoned, by work that goes through the address spaces ([`Users`]); in between, the page
//! is "closing": lost in the new areas, and memory still in the old ones. So no vCPU finds a poisoned page in memory: that
//! could be helped (KVM looks up the area again after a fault whose lock was dropped, [`show_to_kvm`]), but then KVM takes
//! the page for one that needs I/O, has its guest wait for it if the guest can (asynchronous page faults), and sends the
//! signal when that is over, when the guest is doing something else. It is left for where a process is not known, or had
//! no room.
//!
//! It takes two more areas for pages side by side that are lost. Where there may be no more of them, KVM_RUN fails with
//! EFAULT, as in memslots that did not ask.
//!
//! # Locks
//!
//! `closing` (memslot/poison.rs) is held by whoever waits for that work. The work takes the turn, then the mmap lock
//! (ffi/remap.rs), with nothing else held.

use crate::{
    collapse,
    ffi::{
        mm::Using,
        remap::{
            self,
            Kind,
            Spot, //
        },
        vma::{
            Fault,
            Mapping,
            Outcome, //
        },
        work,
    },
    memslot::Memslot,
    rules::range::PageRange,
};
use kernel::{
    bindings::vm_flags_t,
    mm::{
        virt::flags,
        Mm, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        ArcBorrow, //
    },
    workqueue::WorkItem, //
};

/// The number of the work that [`show_more`] starts.
pub(crate) const SHOW: u64 = 1;

/// An address space has an area of a memslot: a new one, or a part or a copy of one. A part has what the whole had; a
/// copy in a new process may have been made in between.
pub(crate) fn opened(slot: ArcBorrow<'_, Memslot>, mm: &Mm) {
    if slot.poison_signals && slot.users.add(mm) {
        show_all(slot);
    }
}

/// The user of a memslot maps it as memory.
pub(crate) fn mapped(slot: ArcBorrow<'_, Memslot>) {
    if slot.poison_signals {
        show_all(slot);
    }
}

/// Has all that is lost made areas of their own in all address spaces.
fn show_all(slot: ArcBorrow<'_, Memslot>) {
    let pages = slot.pages.read();
    if !pages.poison.is_empty() || pages.closing().is_some() {
        drop(pages);
        slot.unshown.store(true, Relaxed);
        show_more(slot.into());
    }
}

/// Has the pages that are closing made areas of their own in all address spaces, and all that are lost, if somebody does
/// not know of them.
pub(crate) fn show_more(slot: Arc<Memslot>) {
    work::enqueue::<_, SHOW>(slot);
}

impl WorkItem<SHOW> for Memslot {
    type Pointer = Arc<Memslot>;

    fn run(slot: Arc<Memslot>) {
        if let Err(e) = show(&slot) {
            pr_warn!(
                "memslot {}: lost pages cannot be shown to KVM: {e:?}\n",
                slot.place.id
            );
        }
    }
}

fn show(slot: &Memslot) -> Result {
    let mut lost: KVec<PageRange> = KVec::new();
    {
        let pages = slot.pages.read();
        if slot.unshown.xchg(false, Relaxed) {
            for run in pages.poison.runs(0) {
                let range = slot.range(run.first, run.count).ok_or(EINVAL)?;
                lost.push(range, GFP_KERNEL_ACCOUNT)?;
            }
        }
        if let Some(closing) = pages.closing() {
            lost.push(closing, GFP_KERNEL_ACCOUNT)?;
        }
    }
    for mm in &slot.users.living()? {
        let Some(using) = Using::new(mm) else {
            return Err(EINVAL);
        };
        for &range in &lost {
            remap::turn_all(&using, &slot.remapper, slot.inode(), range, Kind::Lost);
            work::yield_now();
        }
    }
    Ok(())
}

/// That a page could not be made an area of the other kind: for the next fault of the page, which can still fail, where
/// the one that tried had dropped its lock. If two threads fail at once each tries once more: relaxed.
pub(crate) struct Failure(Atomic<u64>);

impl Failure {
    const NONE: u64 = u64::MAX;

    pub(crate) fn none() -> Self {
        Self(Atomic::new(Self::NONE))
    }

    fn leave(&self, page: u64) {
        self.0.store(page, Relaxed);
    }

    fn take(&self, page: u64) -> bool {
        self.0.cmpxchg(page, Self::NONE, Relaxed).is_ok()
    }
}

/// Has KVM see that a poisoned page is lost, which it has touched.
#[cold]
pub(crate) fn show_to_kvm(slot: ArcBorrow<'_, Memslot>, fault: Fault<'_>) -> Outcome {
    match turn_into(slot, fault, Kind::Lost) {
        Some(_) => Outcome::MappedUnlocked,
        None => Outcome::Poisoned,
    }
}

/// Drops the fault's lock and makes its page an area of that kind. Returns none, and has not dropped the lock, if that
/// cannot be, or has just failed.
fn turn_into(
    slot: ArcBorrow<'_, Memslot>,
    fault: Fault<'_>,
    kind: Kind,
) -> Option<(Arc<Memslot>, Spot)> {
    let page = fault.pgoff();
    if slot.lost_failure.take(page) {
        return None;
    }
    let spot = Spot::of(&fault)?;
    // The mapping, and with it the memslot's file, may go meanwhile.
    let slot: Arc<Memslot> = slot.into();
    fault.release_lock();
    if spot.turn_into(&slot.remapper, kind).is_err() {
        slot.lost_failure.leave(page);
    }
    Some((slot, spot))
}

/// A page that is lost.
pub(crate) struct LostMapping;

impl Mapping for LostMapping {
    type Owner = Memslot;

    // VM_MIXEDMAP: no page of this area is one that others may have, and no bad page is mapped here.
    const FLAGS: vm_flags_t = flags::MIXEDMAP | flags::DONTEXPAND | flags::DONTDUMP;
    const HUGE: bool = false;

    fn fault(slot: ArcBorrow<'_, Memslot>, fault: Fault<'_>) -> Outcome {
        if slot.pages.read().is_lost(fault.pgoff()) {
            slot.stats.poisoned_touches().add(1);
            return Outcome::Poisoned;
        }
        // It was healed.
        if !fault.may_retry() {
            return Outcome::Fail;
        }
        if fault.no_wait() {
            return Outcome::Retry;
        }
        let Some((slot, spot)) = turn_into(slot, fault, Kind::Memory) else {
            return Outcome::Fail;
        };
        // If the page's block is whole it shall be mapped by one entry, and is in several areas now.
        collapse::renew(&slot, &spot);
        Outcome::Retry
    }
}
