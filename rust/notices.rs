// SPDX-License-Identifier: GPL-2.0

//! What a VM's readers are told that nobody waits for: a bounded list, oldest first.

use crate::{
    events::Access,
    ffi::task::Pid, //
};
use kernel::{
    new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        SpinLock, //
    }, //
};

/// How many are kept; the ABI says so.
const MAX: usize = 64;

/// What happened to a page.
pub(crate) struct Notice {
    pub(crate) access: Access,
    pub(crate) page: u64,
    pub(crate) what: What,
}

/// What.
pub(crate) enum What {
    /// This thread's touch failed because the page's source could not be read.
    SourceError { thread: Pid, error: Error },
    /// Its frame has a memory error.
    MemoryError,
}

/// The list. Its lock is innermost.
#[pin_data]
pub(crate) struct Notices {
    #[pin]
    ring: SpinLock<Ring>,
    /// A copy of the ring's length, for readers: there is hardly ever one. Changed under the lock. Relaxed, as a
    /// shard's "unread" is (events.rs).
    len: Atomic<usize>,
}

struct Ring {
    places: [Option<Notice>; MAX],
    first: usize,
    len: usize,
}

impl Notices {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            ring <- new_spinlock!(
                Ring {
                    places: [const { None }; MAX],
                    first: 0,
                    len: 0,
                },
                "kdp_notices"
            ),
            len: Atomic::new(0),
        })
    }

    fn with<R>(&self, change: impl FnOnce(&mut Ring) -> R) -> R {
        let mut ring = self.ring.lock();
        let result = change(&mut ring);
        self.len.store(ring.len, Relaxed);
        result
    }

    /// Adds one; gives it back if there is no room.
    pub(crate) fn push(&self, notice: Notice) -> Option<Notice> {
        self.with(|ring| {
            if ring.len == MAX {
                return Some(notice);
            }
            ring.places[(ring.first + ring.len) % MAX] = Some(notice);
            ring.len += 1;
            None
        })
    }

    /// Takes the oldest.
    pub(crate) fn pop(&self) -> Option<Notice> {
        if self.is_empty() {
            return None;
        }
        self.with(|ring| {
            let notice = ring.places[ring.first].take()?;
            ring.first = (ring.first + 1) % MAX;
            ring.len -= 1;
            Some(notice)
        })
    }

    /// Puts back what was taken last; gives it back if others have filled the list since.
    pub(crate) fn put_back(&self, notice: Notice) -> Option<Notice> {
        self.with(|ring| {
            if ring.len == MAX {
                return Some(notice);
            }
            ring.first = (ring.first + MAX - 1) % MAX;
            ring.places[ring.first] = Some(notice);
            ring.len += 1;
            None
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len.load(Relaxed) == 0
    }
}
