// SPDX-License-Identifier: GPL-2.0

//! A gate that threads wait at until it opens, for good.
//!
//! C header: `include/linux/completion.h`. The `kernel` crate's `Completion` waits uninterruptibly
//! only.

use kernel::{
    bindings,
    prelude::*,
    sync::{
        Arc,
        Completion, //
    }, //
};

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
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                done <- Completion::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Lets all who wait, and all who will, go on.
    pub(crate) fn open(&self) {
        self.done.complete_all();
    }

    /// Sleeps until the gate opens, or until a signal; says whether it opened.
    pub(crate) fn wait(&self, until: Until) -> bool {
        let done: *const Completion = &self.done;
        // `Completion` has one field and is a `struct completion`.
        const { assert!(size_of::<Completion>() == size_of::<bindings::completion>()) };
        let done = done.cast_mut().cast::<bindings::completion>();
        let result = match until {
            // SAFETY: `done` is an initialised completion, kept alive by `&self`.
            Until::Signal => unsafe { bindings::wait_for_completion_interruptible(done) },
            // SAFETY: As above.
            Until::Kill => unsafe { bindings::wait_for_completion_killable(done) },
        };
        result == 0
    }
}
