// SPDX-License-Identifier: GPL-2.0

//! A huge page of a memfd, and the fresh one that takes its place.
//!
//! The C side is hugetlb.c. C sources: `mm/migrate.c`, `fs/hugetlbfs/inode.c`, `mm/memory-failure.c`.

use super::{
    c,
    memfd::{
        Memfd,
        Pfn,
        Pinned, //
    }, //
};
use kernel::{
    error::to_result,
    prelude::*, //
};

impl Memfd {
    /// Takes a huge page, which is pinned once, out of the file: nobody else can come to it any more. EBUSY if somebody
    /// uses it, or it has a memory error.
    pub(crate) fn take_out(&self, index: u64, pinned: &Pinned) -> Result {
        // SAFETY: The file is valid, open for writing and cannot be sealed against it (type invariant); the frame is pinned.
        to_result(unsafe {
            c::kdp_take_out(self.file().as_ptr(), index as usize, pinned.frame().number)
        })
    }

    /// Whether a huge page is one to replace: ENXIO if it has no memory error, EBUSY if others use it than those who pin it
    /// so often.
    pub(crate) fn check_bad(&self, index: u64, bad: &Pinned, pins: usize) -> Result {
        let pins = i32::try_from(pins).map_err(|_| EBUSY)?;
        // SAFETY: The file is valid, the frame is pinned.
        to_result(unsafe {
            c::kdp_check_bad(
                self.file().as_ptr(),
                index as usize,
                bad.frame().number,
                pins,
            )
        })
    }

    /// Puts a huge page that was taken out of its file where a bad one is; if that is no longer there nothing happens.
    pub(crate) fn put_in_place(&self, index: u64, bad: &Pinned, fresh: &Pinned) {
        // SAFETY: The file is valid; the frames are pinned, and of hugetlb, and `fresh` is in no file.
        unsafe {
            c::kdp_put_in_place(
                self.file().as_ptr(),
                index as usize,
                bad.frame().number,
                fresh.frame().number,
            )
        };
    }
}

impl Pfn<'_> {
    /// Copies the bytes of another frame, which may be bad, into this one; whether that was possible. The two may be
    /// memory of processes, to which no Rust reference exists.
    pub(crate) fn copy_mc(self, from: Pfn<'_>) -> bool {
        // SAFETY: Both frames are pinned.
        unsafe { c::kdp_copy_mc(self.number, from.number) }
    }
}
