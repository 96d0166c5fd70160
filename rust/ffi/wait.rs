// SPDX-License-Identifier: GPL-2.0

//! A gate that threads wait at until it opens, for good; and a place to sleep until there is something.
//!
//! C headers: `include/linux/completion.h`, `include/linux/wait.h`. The `kernel` crate's `Completion` waits
//! uninterruptibly only, and its `CondVar` wants all who change the condition to take one lock.

use super::c;
use core::ptr::from_ref;
use kernel::{
    bindings,
    error::to_result,
    ffi::c_void,
    fs::File,
    new_poll_condvar,
    prelude::*,
    sync::{
        poll::{
            PollCondVar,
            PollTable, //
        },
        Completion, //
    },
    time::msecs_to_jiffies, //
};

/// Nanoseconds since some time in the past.
pub(crate) fn now_ns() -> u64 {
    // SAFETY: Always safe to call.
    unsafe { c::kdp_now_ns() }
}

/// Looks out for `done` to hold, awake, for at most so many nanoseconds, and less if another thread could use the
/// CPU or a signal is pending; says whether it came to hold.
pub(crate) fn look_out(ns: u64, done: impl Fn() -> bool) -> bool {
    if ns == 0 {
        return false;
    }
    let end = now_ns().saturating_add(ns);
    loop {
        if done() {
            return true;
        }
        // SAFETY: Always safe to call.
        if !unsafe { c::kdp_may_look_out(end) } {
            return false;
        }
    }
}

/// What may end a wait early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// Any signal.
    Signal,
    /// A fatal one.
    Kill,
    /// A second has passed.
    Second,
}

/// The gate.
#[pin_data]
pub(crate) struct Gate {
    #[pin]
    done: Completion,
}

impl Gate {
    /// A closed gate.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            done <- Completion::new(),
        })
    }

    /// Lets all who wait, and all who will, go on.
    pub(crate) fn open(&self) {
        self.done.complete_all();
    }

    fn as_ptr(&self) -> *mut bindings::completion {
        let done: *const Completion = &self.done;
        // `Completion` has one field and is a `struct completion`.
        const { assert!(size_of::<Completion>() == size_of::<bindings::completion>()) };
        done.cast_mut().cast()
    }

    /// Looks out for the gate to open; see [`look_out`].
    pub(crate) fn look_out(&self, ns: u64) -> bool {
        // SAFETY: The completion is initialised and kept alive by `&self`. Whoever opens the gate holds it,
        // too, so it may be left as soon as it is seen to be open.
        look_out(ns, || unsafe { c::kdp_completion_done(self.as_ptr()) })
    }

    /// Sleeps until the gate opens, or the wait is ended; says whether it opened.
    pub(crate) fn wait(&self, until: Until) -> bool {
        let done = self.as_ptr();
        let result = match until {
            // SAFETY: `done` is an initialised completion, kept alive by `&self`.
            Until::Signal => unsafe { bindings::wait_for_completion_interruptible(done) },
            // SAFETY: As above.
            Until::Kill => unsafe { bindings::wait_for_completion_killable(done) },
            Until::Second => {
                let second = msecs_to_jiffies(1000);
                // SAFETY: As above.
                let left = unsafe { bindings::wait_for_completion_timeout(done, second) };
                return left > 0;
            }
        };
        result == 0
    }
}

/// Threads that sleep until something holds that others make true, without a lock in common.
///
/// Who makes it true does so first and calls [`tell_one`](Self::tell_one) then, which looks for sleepers
/// after a full barrier. Who sleeps is among the sleepers first and looks then, with a full barrier between,
/// too (`prepare_to_wait_event()`, `poll_wait()`). One of the two sees the other. Nobody writes here when
/// nobody sleeps.
#[pin_data]
#[repr(align(64))]
pub(crate) struct Sleepers {
    #[pin]
    queue: PollCondVar,
}

impl Sleepers {
    /// None.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            queue <- new_poll_condvar!("kdp_sleepers"),
        })
    }

    fn as_ptr(&self) -> *mut bindings::wait_queue_head {
        // `PollCondVar` has one field with a size and is a `struct wait_queue_head`.
        const {
            assert!(size_of::<PollCondVar>() == size_of::<bindings::wait_queue_head>());
        };
        from_ref(&self.queue).cast_mut().cast()
    }

    /// Sleeps until `done` holds, which must not sleep itself. ERESTARTSYS if a signal comes first. Who is
    /// woken and leaves for a signal has looked once more: no call to one sleeper is lost.
    pub(crate) fn wait<F: Fn() -> bool>(&self, done: F) -> Result {
        /// # Safety
        ///
        /// `done` points to an `F`.
        unsafe extern "C" fn call<F: Fn() -> bool>(done: *mut c_void) -> bool {
            // SAFETY: By the caller's promise.
            unsafe { (*done.cast::<F>())() }
        }
        let data = from_ref(&done).cast_mut().cast();
        // SAFETY: The wait queue is initialised and kept alive by `&self`. `call` is given `data`, which points to
        // the closure, and that outlives the wait.
        to_result(unsafe { c::kdp_wait_exclusive(self.as_ptr(), Some(call::<F>), data) })
    }

    /// Has poll(2) told when somebody is called.
    pub(crate) fn register(&self, file: &File, table: &PollTable<'_>) {
        table.register_wait(file, &self.queue);
    }

    /// Wakes one who sleeps, and all who poll.
    pub(crate) fn tell_one(&self) {
        // SAFETY: The wait queue is initialised and kept alive by `&self`.
        if unsafe { c::kdp_has_sleeper(self.as_ptr()) } {
            self.queue.notify_one();
        }
    }

    /// Wakes all.
    pub(crate) fn tell_all(&self) {
        self.queue.notify_all();
    }
}
