// SPDX-License-Identifier: GPL-2.0

//! KVM's vCPUs, and the threads that run them.
//!
//! KVM tells of a vCPU by two tracepoints: `kvm_page_fault`, in the thread that runs it, at every
//! stage-2 fault; and `kvm_userspace_exit`, when KVM_RUN returns. Between the two the thread is
//! inside KVM_RUN, which keeps the vCPU alive.
//!
//! A thread's record is found by its number in a global xarray, under RCU: the probes run with
//! preemption off, and a fault must not wait for somebody who registers.

pub(crate) use super::task::current_number;
use super::{
    c,
    task, //
};
use crate::rules::stage2::LastFault;
use core::{
    marker::PhantomData,
    ptr::{
        null_mut,
        NonNull, //
    }, //
};
use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        rcu, //
    }, //
};

/// A vCPU whose KVM_RUN the current thread is in.
///
/// # Invariants
///
/// The pointer is valid for `'a`, and the current thread runs the vCPU.
#[derive(Clone, Copy)]
pub(crate) struct Vcpu<'a> {
    vcpu: NonNull<c::kvm_vcpu>,
    _running: PhantomData<&'a c::kvm_vcpu>,
}

impl Vcpu<'_> {
    /// How often it has left its guest.
    pub(crate) fn guest_exits(self) -> u64 {
        // SAFETY: The vCPU is valid (type invariant); only the current thread changes the count.
        unsafe { c::kdp_vcpu_guest_exits(self.vcpu.as_ptr()) }
    }

    /// It runs the guest of its guest.
    pub(crate) fn in_nested_guest(self) -> bool {
        // SAFETY: The vCPU is valid (type invariant).
        unsafe { c::kdp_vcpu_in_nested_guest(self.vcpu.as_ptr()) }
    }

    /// KVM is refreshing its view of a page that it shares with the guest.
    pub(crate) fn in_pfn_cache(self) -> bool {
        // SAFETY: The vCPU is valid (type invariant).
        unsafe { c::kdp_vcpu_in_pfn_cache(self.vcpu.as_ptr()) }
    }

    /// Leaves in `kvm_run` what KVM_RUN is to report if the fault fails.
    pub(crate) fn set_exit(self, gpa: u64, size: u64, flags: u64) {
        // SAFETY: The vCPU is valid (type invariant), and its `kvm_run` is written by the thread that
        // runs it.
        unsafe { c::kdp_vcpu_set_exit(self.vcpu.as_ptr(), gpa, size, flags) };
    }
}

/// A thread that asked for fault exits.
///
/// # Invariants
///
/// `vcpu` is null, or a vCPU whose KVM_RUN the thread is in. Apart from `vm` and `pid`, the thread
/// alone reads and writes the fields: relaxed ordering is enough.
pub(crate) struct Thread {
    vm: u64,
    pid: task::Pid,
    vcpu: Atomic<*mut c::kvm_vcpu>,
    gfn: Atomic<u64>,
    guest_exits: Atomic<u64>,
}

impl Thread {
    /// The VM that it asked.
    pub(crate) fn vm(&self) -> u64 {
        self.vm
    }

    /// Whether it still runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.pid.is_alive()
    }

    /// Its vCPU and the stage-2 fault that KVM told of last, if it has not left KVM_RUN since.
    #[inline]
    pub(crate) fn last_fault(&self) -> Option<(Vcpu<'_>, LastFault)> {
        // INVARIANT: By the invariant of `Thread`; `with_current()` lends it to its thread only, and
        // not beyond a return from KVM_RUN.
        let vcpu = Vcpu {
            vcpu: NonNull::new(self.vcpu.load(Relaxed))?,
            _running: PhantomData,
        };
        let last = LastFault {
            gfn: self.gfn.load(Relaxed),
            guest_exits: self.guest_exits.load(Relaxed),
        };
        Some((vcpu, last))
    }

    /// The fault is over, or not ours to answer.
    pub(crate) fn forget_fault(&self) {
        self.vcpu.store(null_mut(), Relaxed);
    }
}

/// The table of all threads that asked.
fn table() -> *mut bindings::xarray {
    // The address of a static of `helpers.c`.
    &raw mut c::kdp_vcpu_threads
}

/// Lends the current thread its record, if it asked for exits. `f` runs under RCU: it must not sleep.
#[inline]
pub(crate) fn with_current<R>(f: impl FnOnce(&Thread) -> R) -> Option<R> {
    let _rcu = rcu::read_lock();
    // SAFETY: The table is initialised statically.
    let raw = unsafe { bindings::xa_load(table(), task::current_number()) };
    let thread = NonNull::new(raw.cast::<Thread>())?;
    // SAFETY: Entries of the table are boxed threads, freed a grace period after they leave it.
    let thread = unsafe { thread.as_ref() };
    // The number of a dead thread is used again; its record may still be there.
    thread.pid.is_current().then(|| f(thread))
}

/// Makes a record for the current thread; returns its number.
pub(crate) fn add_current(vm: u64) -> Result<usize> {
    let thread = KBox::new(
        Thread {
            vm,
            pid: task::Pid::current().ok_or(ESRCH)?,
            // INVARIANT: None yet.
            vcpu: Atomic::new(null_mut()),
            gfn: Atomic::new(0),
            guest_exits: Atomic::new(0),
        },
        GFP_KERNEL_ACCOUNT,
    )?;
    let number = task::current_number();
    let raw = KBox::into_raw(thread);
    // SAFETY: The table is initialised; a box is what it stores.
    let old = unsafe { c::kdp_xa_store(table(), number, raw.cast()) };
    // SAFETY: `old` is what xa_store() returned.
    if let Err(e) = to_result(unsafe { bindings::xa_err(old) }) {
        // SAFETY: It was not stored.
        drop(unsafe { KBox::from_raw(raw) });
        return Err(e);
    }
    free_all(NonNull::new(old.cast()).into_iter());
    Ok(number)
}

/// Removes those records of `vm` that are among `numbers` and for which `which` holds.
pub(crate) fn remove(vm: u64, numbers: &[usize], which: impl Fn(&Thread) -> bool) {
    let gone = numbers.iter().filter_map(|&number| {
        // SAFETY: The table is initialised. Its lock is held from here to the unlock, so what is found
        // in it stays, and is not freed; erasing needs no memory.
        unsafe {
            bindings::xa_lock(table());
            let found = NonNull::new(bindings::xa_load(table(), number).cast::<Thread>())
                .filter(|t| t.as_ref().vm == vm && which(t.as_ref()));
            if found.is_some() {
                bindings::__xa_erase(table(), number);
            }
            bindings::xa_unlock(table());
            found
        }
    });
    free_all(gone);
}

/// Whether the thread of that number has a record of `vm`, and runs.
pub(crate) fn is_live(vm: u64, number: usize) -> bool {
    let _rcu = rcu::read_lock();
    // SAFETY: The table is initialised.
    let raw = unsafe { bindings::xa_load(table(), number) };
    // SAFETY: As in `with_current()`.
    NonNull::new(raw.cast::<Thread>()).is_some_and(|t| unsafe {
        let t = t.as_ref();
        t.vm == vm && t.pid.is_alive()
    })
}

/// Frees records that have left the table, a batch at a time.
fn free_all(mut gone: impl Iterator<Item = NonNull<Thread>>) {
    loop {
        let mut batch = [None; 64];
        for (place, thread) in batch.iter_mut().zip(&mut gone) {
            *place = Some(thread);
        }
        if batch[0].is_none() {
            return;
        }
        // Nobody who found them in the table uses them after this.
        rcu::synchronize_rcu();
        for thread in batch.into_iter().flatten() {
            // SAFETY: It came from `KBox::into_raw()`, has left the table, and a grace period passed.
            drop(unsafe { KBox::from_raw(thread.as_ptr()) });
        }
    }
}

/// The probe of `kvm_page_fault`.
pub(super) extern "C" fn on_page_fault(
    _data: *mut kernel::ffi::c_void,
    vcpu: *mut c::kvm_vcpu,
    address: u64,
    _error_code: u64,
) {
    with_current(|thread| {
        let Some(vcpu) = NonNull::new(vcpu) else {
            return;
        };
        // INVARIANT: KVM calls this in the thread that runs the vCPU.
        let running = Vcpu {
            vcpu,
            _running: PhantomData,
        };
        if running.in_nested_guest() {
            // The address is one of the inner guest's: whatever comes now waits.
            thread.forget_fault();
            return;
        }
        thread
            .gfn
            .store(address >> kernel::page::PAGE_SHIFT, Relaxed);
        thread.guest_exits.store(running.guest_exits(), Relaxed);
        // INVARIANT: The thread is inside KVM_RUN, until `on_userspace_exit()`.
        thread.vcpu.store(vcpu.as_ptr(), Relaxed);
    });
}

/// The probe of `kvm_userspace_exit`.
pub(super) extern "C" fn on_userspace_exit(
    _data: *mut kernel::ffi::c_void,
    _reason: u32,
    _errno: i32,
) {
    with_current(Thread::forget_fault);
}
