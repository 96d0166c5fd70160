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

/// A page of a memfd, by its number.
#[derive(Clone, Copy)]
pub(crate) struct Spot<'a> {
    pub(crate) memfd: &'a Memfd,
    pub(crate) index: u64,
}

/// A huge page, and how often it is pinned by those who are going to have the other one.
#[derive(Clone, Copy)]
pub(crate) struct Huge<'a> {
    pub(crate) pinned: &'a Pinned,
    pub(crate) pins: usize,
}

/// The fresh huge page is where the bad one was, and the bad one where the fresh one was. Who wants the fresh one as a
/// page of its file waits until this is dropped.
///
/// # Invariants
///
/// The folio of `fresh` is locked, by this.
pub(crate) struct Exchanged<'a> {
    fresh: &'a Pinned,
}

impl<'a> Exchanged<'a> {
    /// Exchanges them. ENXIO if the bad one has no memory error, EBUSY if somebody else uses or pins one of them.
    pub(crate) fn new(
        bad: Huge<'_>,
        at: Spot<'_>,
        fresh: Huge<'a>,
        fresh_at: Spot<'_>,
    ) -> Result<Self> {
        let count = |huge: Huge<'_>| i32::try_from(huge.pins).map_err(|_| EBUSY);
        // SAFETY: The files are valid, and memfds of hugetlb, as their order says; the frames are pinned.
        to_result(unsafe {
            c::kdp_exchange(
                at.memfd.file().as_ptr(),
                at.index as usize,
                bad.pinned.frame().number,
                count(bad)?,
                fresh_at.memfd.file().as_ptr(),
                fresh_at.index as usize,
                fresh.pinned.frame().number,
                count(fresh)?,
            )
        })?;
        // INVARIANT: It was just locked.
        Ok(Self {
            fresh: fresh.pinned,
        })
    }
}

impl Drop for Exchanged<'_> {
    fn drop(&mut self) {
        // SAFETY: The folio is pinned, and locked by this (type invariant).
        unsafe { c::kdp_unlock_pfn(self.fresh.frame().number) };
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

impl Memfd {
    /// Takes a huge page out of the file.
    pub(crate) fn punch_huge(&self, index: u64) {
        // SAFETY: The file is valid, open for writing and cannot be sealed against it (type invariant).
        unsafe { c::kdp_punch_huge(self.file().as_ptr(), index as usize) };
    }
}
