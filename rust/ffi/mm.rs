// SPDX-License-Identifier: GPL-2.0

//! Other processes' address spaces, and work in them.
//!
//! C headers: `include/linux/kthread.h`, `include/linux/sched/mm.h`.

use super::c;
use core::marker::PhantomData;
use kernel::{
    bindings,
    mm::{
        Mm,
        MmWithUser, //
    },
    new_mutex,
    prelude::*,
    sync::{
        aref::ARef,
        Mutex, //
    },
    types::NotThreadSafe, //
};

/// The address spaces that have mapped something. One that has gone is forgotten when the next one comes.
#[pin_data]
pub(crate) struct Users {
    /// Taken under mmap locks; no other lock is taken under it.
    #[pin]
    spaces: Mutex<KVec<ARef<Mm>>>,
}

impl Users {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            spaces <- new_mutex!(KVec::new(), "kdp_users"),
        })
    }

    /// Notes one more, if there is memory for it; says whether it was unknown.
    pub(crate) fn add(&self, mm: &Mm) -> bool {
        let mut spaces = self.spaces.lock();
        if spaces.iter().any(|known| known.as_raw() == mm.as_raw()) {
            return false;
        }
        // mmput() takes the mmap lock and may not be called here; mmdrop(), of those that are forgotten, may.
        spaces.retain(|mm| is_used(mm));
        // Without memory it is unknown, which its own faults make up for.
        let _ = spaces.push(mm.into(), GFP_KERNEL_ACCOUNT);
        true
    }

    /// Those that are still there.
    pub(crate) fn living(&self) -> Result<KVec<ARef<MmWithUser>>> {
        let spaces = self.spaces.lock();
        let mut living = KVec::with_capacity(spaces.len(), GFP_KERNEL_ACCOUNT)?;
        for mm in spaces.iter().filter_map(|mm| mm.mmget_not_zero()) {
            living.push(mm, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(living)
    }
}

/// Whether a process has an address space still.
fn is_used(mm: &Mm) -> bool {
    // SAFETY: The structure is valid as long as the reference is.
    unsafe { c::kdp_mm_is_used(mm.as_raw()) }
}

/// The current thread has another process's address space.
///
/// # Invariants
///
/// The thread is a kernel thread that is using `mm`, until this is dropped.
pub(crate) struct Using<'a> {
    mm: &'a MmWithUser,
    _here: PhantomData<NotThreadSafe>,
}

impl<'a> Using<'a> {
    /// None if the current thread is not a kernel thread without an address space.
    pub(crate) fn new(mm: &'a MmWithUser) -> Option<Self> {
        // SAFETY: Always safe to call.
        if !unsafe { c::kdp_current_may_use_mm() } {
            return None;
        }
        // SAFETY: This is a kernel thread that uses no other; the address space has a user for 'a.
        unsafe { bindings::kthread_use_mm(mm.as_raw()) };
        // INVARIANT: Just begun.
        Some(Self {
            mm,
            _here: PhantomData,
        })
    }
}

impl Drop for Using<'_> {
    fn drop(&mut self) {
        // SAFETY: The thread is using it (type invariant).
        unsafe { bindings::kthread_unuse_mm(self.mm.as_raw()) };
    }
}
