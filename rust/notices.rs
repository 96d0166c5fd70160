// SPDX-License-Identifier: GPL-2.0

//! What a VM's readers are told that nobody waits for: a bounded list, oldest first.

use crate::events::Access;
use crate::ffi::task::Pid;
use kernel::{
    new_spinlock,
    prelude::*,
    sync::SpinLock, //
};

/// How many are kept; the ABI says so.
const MAX: usize = 64;

/// A touch failed because the page's source could not be read.
pub(crate) struct Notice {
    pub(crate) access: Access,
    pub(crate) page: u64,
    pub(crate) thread: Pid,
    pub(crate) error: Error,
}

/// The list. Its lock is innermost.
#[pin_data]
pub(crate) struct Notices {
    #[pin]
    list: SpinLock<[Option<Notice>; MAX]>,
}

impl Notices {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            list <- new_spinlock!([const { None }; MAX], "kdp_notices"),
        })
    }

    /// Adds one; says whether there was room.
    pub(crate) fn push(&self, notice: Notice) -> bool {
        let mut list = self.list.lock();
        let Some(free) = list.iter_mut().find(|place| place.is_none()) else {
            drop(list);
            return false;
        };
        *free = Some(notice);
        true
    }

    /// Takes the oldest.
    pub(crate) fn pop(&self) -> Option<Notice> {
        let mut list = self.list.lock();
        let first = list[0].take();
        list.rotate_left(1);
        first
    }

    /// Puts back what was taken last, unless others have filled the list since.
    pub(crate) fn put_back(&self, notice: Notice) {
        let mut list = self.list.lock();
        if list[MAX - 1].is_none() {
            list.rotate_right(1);
            list[0] = Some(notice);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.lock()[0].is_none()
    }
}
