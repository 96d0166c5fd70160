// SPDX-License-Identifier: GPL-2.0

//! A gate that threads wait at until it opens, for good.
//!
//! C header: `include/linux/completion.h`. The `kernel` crate's `Completion` waits uninterruptibly
//! only.

use super::c;
use kernel::{
    bindings,
    prelude::*,
    sync::Completion, //
};

/// Nanoseconds since some time in the past.
pub(crate) fn now_ns() -> u64 {
    // SAFETY: Always safe to call.
    unsafe { c::kdp_now_ns() }
}

/// What may end a wait early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// Any signal.
    Signal,
    /// A fatal one.
    Kill,
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

    /// Looks out for the gate to open, awake, for at most so many nanoseconds, and less if another thread
    /// could use the CPU or a signal is pending; says whether it opened.
    pub(crate) fn poll(&self, ns: u64) -> bool {
        // SAFETY: The completion is initialised and kept alive by `&self`. Whoever opens the gate holds it,
        // too, so it may be left as soon as it is seen to be open.
        ns > 0 && unsafe { c::kdp_poll_completion(self.as_ptr(), ns) }
    }

    /// Sleeps until the gate opens, or until a signal; says whether it opened.
    pub(crate) fn wait(&self, until: Until) -> bool {
        let done = self.as_ptr();
        let result = match until {
            // SAFETY: `done` is an initialised completion, kept alive by `&self`.
            Until::Signal => unsafe { bindings::wait_for_completion_interruptible(done) },
            // SAFETY: As above.
            Until::Kill => unsafe { bindings::wait_for_completion_killable(done) },
        };
        result == 0
    }
}
