// SPDX-License-Identifier: GPL-2.0

//! How a vCPU learns, from KVM itself, that a page's bytes are lost: for VMMs that know nothing of us.
//!
//! On VM_PFNMAP, which guest memory is, KVM makes -EFAULT of whatever a fault handler says (`fixup_user_fault()` in
//! mm/gup.c), and a VMM that does not know us gives up. On other areas it asks get_user_pages(), hears -EHWPOISON, and
//! sends its thread the SIGBUS of a memory error, with the page's address and size (`kvm_handle_error_pfn()` in
//! arch/x86/kvm/mmu/mmu.c); KVM_RUN then ends as for any signal.
//!
//! So when a vCPU touches a poisoned page of a memslot that asked for this, the page becomes an area of another kind in
//! that process, in which nothing is ever mapped (ffi/remap.rs). KVM looks up the area again after a fault whose lock was
//! dropped, and finds it (`hva_to_pfn()` in virt/kvm/kvm_main.c). The page becomes guest memory again at the first touch
//! after it was healed.
//!
//! It takes two more areas for each lost page that a vCPU touches. Where there may be no more of them, KVM_RUN fails with
//! EFAULT, as in memslots that did not ask.

use crate::{
    collapse,
    ffi::{
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
    },
    memslot::Memslot,
    rules::touch::State,
};
use kernel::{
    bindings::vm_flags_t,
    mm::virt::flags,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        ArcBorrow, //
    }, //
};

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
    let spot = Spot::of(&fault, remap::next_order(0))?;
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
        if slot.pages.read().state(fault.pgoff()) == State::Poisoned {
            slot.stats.poisoned_touches().add(1);
            return Outcome::Poisoned;
        }
        // It was healed.
        if !fault.may_retry() {
            return Outcome::Fail;
        }
        if fault.no_wait() {
            return Outcome::RetryLocked;
        }
        let Some((slot, spot)) = turn_into(slot, fault, Kind::Memory) else {
            return Outcome::Fail;
        };
        // If the page's block is whole it shall be mapped by one entry, and is in several areas now.
        collapse::renew(&slot, &spot);
        Outcome::Retry
    }
}
