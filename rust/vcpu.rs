// SPDX-License-Identifier: GPL-2.0

//! The threads that have fault exits on, and the rule for when a fault is theirs.

use crate::{
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
    numbers: KVec<usize>,
    /// Keeps the probes registered as long as there is a thread.
    probes: Option<tracepoint::User>,
}

impl Threads {
    pub(crate) const fn new() -> Self {
        Self {
            numbers: KVec::new(),
            probes: None,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Switches exits of the current thread on or off; the errors are those of KDP_VCPU_EXITS.
    pub(crate) fn set_current(&mut self, vm: u64, on: bool) -> Result {
        if on && !tracepoint::available() {
            return Err(EOPNOTSUPP);
        }
        match (kvm::with_current(kvm::Thread::vm), on) {
            (Some(other), _) if other != vm => Err(EBUSY),
            (Some(_), true) | (None, false) => Ok(()),
            (Some(_), false) => {
                let number = kvm::current_number();
                kvm::remove(vm, &[number], |_| true);
                self.numbers.retain(|n| *n != number);
                self.rest();
                Ok(())
            }
            (None, true) => self.add_current(vm),
        }
    }

    fn add_current(&mut self, vm: u64) -> Result {
        if self.numbers.len() >= KDP_MAX_VCPU_THREADS as usize {
            self.drop_dead(vm);
        }
        if self.numbers.len() >= KDP_MAX_VCPU_THREADS as usize {
            return Err(ENOSPC);
        }
        self.numbers.reserve(1, GFP_KERNEL_ACCOUNT)?;
        if self.probes.is_none() {
            self.probes = Some(tracepoint::User::new()?);
        }
        let number = kvm::add_current(vm);
        if let Ok(number) = number {
            // The number of a thread that died may be there still.
            self.numbers.retain(|n| *n != number);
            self.numbers.push(number, GFP_KERNEL_ACCOUNT)?;
        }
        self.rest();
        number.map(|_| ())
    }

    /// Threads that ended without a word.
    fn drop_dead(&mut self, vm: u64) {
        kvm::remove(vm, &self.numbers, |thread| !thread.is_alive());
        self.numbers.retain(|n| kvm::is_live(vm, *n));
    }

    /// Drops the probes when nobody needs them.
    fn rest(&mut self) {
        if self.numbers.is_empty() {
            self.probes = None;
        }
    }

    /// The VM is closed.
    pub(crate) fn clear(&mut self, vm: u64) {
        kvm::remove(vm, &self.numbers, |_| true);
        self.numbers.clear();
        self.rest();
    }
}

/// If the current thread has exits on for `vm` and is in a stage-2 fault on the page of number `gfn`,
/// leaves in `kvm_run` what KVM_RUN is to report; says whether it did.
#[inline]
pub(crate) fn prepare_exit(vm: u64, gfn: u64, flags: u64) -> bool {
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
        let ours = is_stage2(last, now);
        if ours {
            vcpu.set_exit(gfn << KDP_PAGE_SHIFT, 1 << KDP_PAGE_SHIFT, flags);
        }
        ours
    })
    .unwrap_or(false)
}
