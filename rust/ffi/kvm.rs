// SPDX-License-Identifier: GPL-2.0

//! KVM's vCPUs, and the threads that run them.
//!
//! KVM tells of a vCPU by two tracepoints: `kvm_page_fault`, in the thread that runs it, at every
//! stage-2 fault; and `kvm_userspace_exit`, when KVM_RUN returns. Between the two the thread is
//! inside KVM_RUN, which keeps the vCPU alive.
//!
//! A thread's record is found by its pid in a global hash table, under RCU: the probes run with
//! preemption off, and a fault must not wait for somebody who registers.

use super::{
    c,
    task, //
};
use crate::rules::stage2::LastFault;
use core::{
    cell::Cell,
    marker::PhantomData,
    ptr::{
        null_mut,
        NonNull, //
    }, //
};
use kernel::{
    bindings,
    prelude::*,
    sync::rcu,
    types::{
        NotThreadSafe,
        Opaque, //
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

    /// Has KVM wait for pages in this thread, and not by asynchronous page faults.
    fn forbid_async_faults(self) {
        // SAFETY: The vCPU is valid, and the current thread runs it (type invariant).
        unsafe { c::kdp_vcpu_no_async_pf(self.vcpu.as_ptr()) };
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
/// It looks at `own` at every fault, in cache lines that no other thread's record shares.
///
/// # Invariants
///
/// `link.pid` is `pid`'s. Only the thread itself gets at `own`, through [`Current`].
#[repr(C, align(64))]
pub(crate) struct Thread {
    link: Opaque<c::kdp_vcpu_thread>,
    vm: u64,
    pid: task::Pid,
    own: Own,
}

/// What a thread was told of its vCPU.
///
/// # Invariants
///
/// `vcpu` is null, or a vCPU whose KVM_RUN the thread is in.
struct Own {
    vcpu: Cell<*mut c::kvm_vcpu>,
    gfn: Cell<u64>,
    guest_exits: Cell<u64>,
    /// KVM has asked for the page without waiting for it.
    asked: Cell<bool>,
}

// SAFETY: A thread's record may be freed by any other.
unsafe impl Send for Thread {}
// SAFETY: The fields that others see never change; `own` is its thread's alone (type invariant).
unsafe impl Sync for Thread {}

impl Thread {
    /// Whether it still runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.pid.is_alive()
    }

    /// Whether it is the current thread.
    pub(crate) fn is_current(&self) -> bool {
        self.pid.is_current()
    }
}

/// The current thread's record.
///
/// # Invariants
///
/// `thread` is the current thread's.
#[derive(Clone, Copy)]
pub(crate) struct Current<'a> {
    thread: &'a Thread,
    _not_send: NotThreadSafe,
}

impl Current<'_> {
    /// The VM that it asked.
    #[inline]
    pub(crate) fn vm(&self) -> u64 {
        self.thread.vm
    }

    /// Its vCPU and the stage-2 fault that KVM told of last, if it has not left KVM_RUN since.
    #[inline]
    pub(crate) fn last_fault(&self) -> Option<(Vcpu<'_>, LastFault)> {
        let own = &self.thread.own;
        // INVARIANT: By the invariant of `Own`; `with_current()` lends it to its thread only, and not beyond a
        // return from KVM_RUN.
        let vcpu = Vcpu {
            vcpu: NonNull::new(own.vcpu.get())?,
            _running: PhantomData,
        };
        let last = LastFault {
            gfn: own.gfn.get(),
            guest_exits: own.guest_exits.get(),
        };
        Some((vcpu, last))
    }

    /// KVM asks for the page: `waits` says whether it waits for it. Says whether it does so for the
    /// fault: it asks without waiting first.
    pub(crate) fn asks(&self, waits: bool) -> bool {
        let asked = &self.thread.own.asked;
        if !waits {
            asked.set(true);
        }
        asked.get()
    }

    /// The fault is over, or not ours to answer.
    #[inline]
    pub(crate) fn forget_fault(&self) {
        self.thread.own.vcpu.set(null_mut());
    }
}

/// Lends the current thread its record, if it asked for exits. `f` runs under RCU: it must not sleep.
#[inline]
pub(crate) fn with_current<R>(f: impl FnOnce(Current<'_>) -> R) -> Option<R> {
    let _rcu = rcu::read_lock();
    // SAFETY: This is an RCU section.
    let link = unsafe { c::kdp_vcpu_thread_current() };
    let thread = NonNull::new(link.cast::<Thread>())?;
    // INVARIANT: It was found by the current thread's pid.
    Some(f(Current {
        // SAFETY: The table holds the first fields of boxed threads, freed a grace period after they leave it.
        thread: unsafe { thread.as_ref() },
        _not_send: NotThreadSafe,
    }))
}

/// Whether the current thread is in KVM_PRE_FAULT_MEMORY.
#[inline]
pub(crate) fn current_pre_faults() -> bool {
    // SAFETY: Always safe to call.
    unsafe { c::kdp_current_pre_faults() }
}

/// A thread in the table.
///
/// # Invariants
///
/// Owns a boxed `Thread`, which is in the table if `linked`; else an RCU grace period has passed since it
/// left, or is waited for before this is dropped.
pub(crate) struct Registered {
    thread: NonNull<Thread>,
    linked: bool,
}

// SAFETY: A `Thread` may be looked at and freed by any thread.
unsafe impl Send for Registered {}

impl Registered {
    /// Enters the current thread, which must not be in the table.
    pub(crate) fn current(vm: u64) -> Result<Self> {
        let pid = task::Pid::current().ok_or(ESRCH)?;
        let link = c::kdp_vcpu_thread {
            pid: pid.as_ptr(),
            ..Default::default()
        };
        let thread = KBox::new(
            Thread {
                link: Opaque::new(link),
                vm,
                pid,
                // INVARIANT: There is no vCPU yet.
                own: Own {
                    vcpu: Cell::new(null_mut()),
                    gfn: Cell::new(0),
                    guest_exits: Cell::new(0),
                    asked: Cell::new(false),
                },
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let thread = NonNull::from(KBox::leak(thread));
        // SAFETY: The box stays until it has left the table; the link is its first field.
        unsafe { c::kdp_vcpu_thread_add(thread.as_ptr().cast()) };
        // INVARIANT: Just entered.
        Ok(Self {
            thread,
            linked: true,
        })
    }

    /// The thread.
    pub(crate) fn thread(&self) -> &Thread {
        // SAFETY: The box is owned (type invariant).
        unsafe { self.thread.as_ref() }
    }

    /// Takes it out of the table. The caller waits for a grace period then.
    fn unlink(&mut self) {
        if self.linked {
            // SAFETY: It is in the table (type invariant).
            unsafe { c::kdp_vcpu_thread_del(self.thread.as_ptr().cast()) };
            self.linked = false;
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.linked {
            self.unlink();
            synchronize_rcu();
        }
        // SAFETY: The box is owned, and nobody who found it in the table uses it any more (type
        // invariant).
        drop(unsafe { KBox::from_raw(self.thread.as_ptr()) });
    }
}

/// Waits for one grace period of RCU.
fn synchronize_rcu() {
    // SAFETY: Always safe to call where sleeping is allowed.
    unsafe { bindings::synchronize_rcu() };
}

/// Drops those threads for which `which` holds, after one grace period for all.
pub(crate) fn remove(threads: &mut KVec<Registered>, which: impl Fn(&Thread) -> bool) {
    let mut any = false;
    for registered in threads.iter_mut() {
        if which(registered.thread()) {
            registered.unlink();
            any = true;
        }
    }
    if any {
        synchronize_rcu();
        threads.retain(|registered| registered.linked);
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
        let own = &thread.thread.own;
        own.gfn.set(address >> kernel::page::PAGE_SHIFT);
        own.guest_exits.set(running.guest_exits());
        own.asked.set(false);
        running.forbid_async_faults();
        // INVARIANT: The thread is inside KVM_RUN, until `on_userspace_exit()`.
        own.vcpu.set(vcpu.as_ptr());
    });
}

/// The probe of `kvm_userspace_exit`.
pub(super) extern "C" fn on_userspace_exit(
    _data: *mut kernel::ffi::c_void,
    _reason: u32,
    _errno: i32,
) {
    with_current(|thread| thread.forget_fault());
}
