// SPDX-License-Identifier: GPL-2.0

//! The threads that have fault exits on, and the rule for when a fault is theirs.

use crate::{
    compat::eopnotsupp,
    ffi::{
        kvm,
        tracepoint,
        uapi::{
            KDP_MAX_VCPU_THREADS,
            KDP_PAGE_SHIFT, //
        }, //
    },
    rules::stage2::{
        is_stage2,
        Now, //
    }, //
};
use kernel::prelude::*;

/// The threads of one VM.
pub(crate) struct Threads {
    members: KVec<kvm::Registered>,
    /// Keeps the probes registered as long as there is a thread.
    probes: Option<tracepoint::User>,
}

impl Threads {
    pub(crate) const fn new() -> Self {
        Self {
            members: KVec::new(),
            probes: None,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Switches exits of the current thread on or off; the errors are those of KDP_VCPU_EXITS.
    pub(crate) fn set_current(&mut self, vm: u64, on: bool) -> Result {
        if on && !tracepoint::available() {
            return Err(eopnotsupp());
        }
        match (kvm::with_current(|thread| thread.vm()), on) {
            (Some(other), _) if other != vm => Err(EBUSY),
            (Some(_), true) | (None, false) => Ok(()),
            (Some(_), false) => {
                kvm::remove(&mut self.members, kvm::Thread::is_current);
                self.rest();
                Ok(())
            }
            (None, true) => self.add_current(vm),
        }
    }

    fn add_current(&mut self, vm: u64) -> Result {
        if self.members.len() >= KDP_MAX_VCPU_THREADS as usize {
            // Those that ended without a word.
            kvm::remove(&mut self.members, |thread| !thread.is_alive());
        }
        if self.members.len() >= KDP_MAX_VCPU_THREADS as usize {
            return Err(ENOSPC);
        }
        self.members.reserve(1, GFP_KERNEL_ACCOUNT)?;
        if self.probes.is_none() {
            self.probes = Some(tracepoint::User::new()?);
        }
        let added = match kvm::Registered::current(vm) {
            Ok(member) => self
                .members
                .push(member, GFP_KERNEL_ACCOUNT)
                .map_err(Error::from),
            Err(e) => Err(e),
        };
        self.rest();
        added
    }

    /// Drops the probes when nobody needs them.
    fn rest(&mut self) {
        if self.members.is_empty() {
            self.probes = None;
        }
    }

    /// The VM is closed.
    pub(crate) fn clear(&mut self) {
        kvm::remove(&mut self.members, |_| true);
        self.rest();
    }
}

/// If the current thread has exits on for `vm` and is in a stage-2 fault on the page of number `gfn`,
/// leaves in `kvm_run` what KVM_RUN is to report; says whether it did.
#[inline]
pub(crate) fn prepare_exit(vm: u64, gfn: u64, flags: u64) -> bool {
    with_stage2(vm, gfn, |_, vcpu| {
        vcpu.set_exit(gfn << KDP_PAGE_SHIFT, 1 << KDP_PAGE_SHIFT, flags);
        true
    })
}

/// Does what [`prepare_exit`] does, if get_user_pages() asks for the page in the stage-2 fault and
/// waits for it ([`is_stage2_asking`]).
#[inline]
pub(crate) fn prepare_asked_exit(vm: u64, gfn: u64, flags: u64) -> bool {
    with_stage2(vm, gfn, |thread, vcpu| {
        let asks = thread.asks(true);
        if asks {
            vcpu.set_exit(gfn << KDP_PAGE_SHIFT, 1 << KDP_PAGE_SHIFT, flags);
        }
        asks
    })
}

/// Whether the current thread has exits on for `vm`, and get_user_pages() asks for the page in a
/// stage-2 fault on it.
///
/// By its flags, a fault in get_user_pages() that waits is like one of the kernel's own accesses.
/// In a stage-2 fault, KVM asks without waiting first (`__kvm_mmu_faultin_pfn()` in
/// arch/x86/kvm/mmu/mmu.c), which nobody else does in KVM_RUN.
pub(crate) fn is_stage2_asking(vm: u64, gfn: u64, waits: bool) -> bool {
    with_stage2(vm, gfn, |thread, _| thread.asks(waits))
}

/// Calls `f` if the current thread has exits on for `vm` and is in a stage-2 fault on the page of
/// number `gfn`.
#[inline]
fn with_stage2(vm: u64, gfn: u64, f: impl FnOnce(kvm::Current<'_>, kvm::Vcpu<'_>) -> bool) -> bool {
    kvm::with_current(|thread| {
        if thread.vm() != vm {
            return false;
        }
        let Some((vcpu, last)) = thread.last_fault() else {
            return false;
        };
        let now = Now {
            gfn,
            guest_exits: vcpu.guest_exits(),
            in_pfn_cache: vcpu.in_pfn_cache(),
        };
        is_stage2(last, now) && f(thread, vcpu)
    })
    .unwrap_or(false)
}

/// Whether the current thread maps pages ahead for a vCPU: it is in KVM_PRE_FAULT_MEMORY.
#[inline]
pub(crate) fn is_pre_faulting() -> bool {
    kvm::current_pre_faults()
}
