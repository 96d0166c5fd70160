// SPDX-License-Identifier: GPL-2.0

//! Threads, processes and users, as identities.

use super::c;
use crate::rules::queue::Owner;
use core::ptr::NonNull;
use kernel::bindings;

/// The identity of a thread, which outlives it and is not reused.
///
/// # Invariants
///
/// Holds a reference on a `struct pid`.
pub(crate) struct Pid(NonNull<bindings::pid>);

// SAFETY: A `struct pid` may be used and put by any thread.
unsafe impl Send for Pid {}
// SAFETY: As above; its fields are not accessed here.
unsafe impl Sync for Pid {}

impl Pid {
    /// The current thread.
    pub(crate) fn current() -> Option<Self> {
        // SAFETY: The current thread has a pid as long as it runs, so a reference can be taken.
        let pid = unsafe { c::kdp_get_pid(c::kdp_current_pid()) };
        // INVARIANT: The reference was just taken.
        NonNull::new(pid).map(Self)
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::pid {
        self.0.as_ptr()
    }

    /// Whether it is the current thread.
    #[inline]
    pub(crate) fn is_current(&self) -> bool {
        // SAFETY: Always safe to call in a thread's context; the pointer is only compared.
        self.0.as_ptr() == unsafe { c::kdp_current_pid() }
    }

    /// Whether the thread still runs.
    pub(crate) fn is_alive(&self) -> bool {
        // SAFETY: The reference keeps the pid valid (type invariant).
        unsafe { c::kdp_pid_alive(self.0.as_ptr()) }
    }

    /// Its number in the current thread's pid namespace, 0 if it is not visible there.
    pub(crate) fn number_here(&self) -> i32 {
        // SAFETY: The reference keeps the pid valid (type invariant).
        unsafe { bindings::pid_vnr(self.0.as_ptr()) }
    }
}

impl Clone for Pid {
    fn clone(&self) -> Self {
        // SAFETY: The reference keeps the pid valid (type invariant).
        // INVARIANT: The reference was just taken.
        unsafe { c::kdp_get_pid(self.0.as_ptr()) };
        Self(self.0)
    }
}

impl Drop for Pid {
    fn drop(&mut self) {
        // SAFETY: The reference is ours (type invariant) and not used again.
        unsafe { bindings::put_pid(self.0.as_ptr()) };
    }
}

/// The number of the current thread, unique among the threads that live.
#[inline]
pub(crate) fn current_number() -> usize {
    // SAFETY: Always safe to call in a thread's context.
    unsafe { c::kdp_current_pid_nr() as usize }
}

/// The current process as a reader of events: its table of file descriptors.
pub(crate) fn current_reader() -> Owner {
    let mut id = 0;
    // SAFETY: `id` is a place for the answer; the value is only compared.
    unsafe { c::kdp_files_id(&mut id) };
    Owner(id)
}

/// Whether the current thread is ending or dumping core. Such a thread must not wait for a page.
pub(crate) fn is_ending() -> bool {
    // SAFETY: Always safe to call in a thread's context.
    unsafe { c::kdp_current_is_ending() }
}

/// Whether a fatal signal is pending for the current thread.
pub(crate) fn is_being_killed() -> bool {
    // SAFETY: Always safe to call in a thread's context.
    unsafe { c::kdp_fatal_signal_pending() }
}
