// SPDX-License-Identifier: GPL-2.0

//! A page of our own that a caller's bytes go through: they are read without a lock, and put where they belong under one.

use kernel::{
    page::{
        Page,
        PAGE_SIZE, //
    },
    prelude::*,
    uaccess::UserSliceReader, //
};

/// The page. Nobody else has it.
pub(crate) struct Bounce(Page);

impl Bounce {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Page::alloc_page(GFP_KERNEL_ACCOUNT)?))
    }

    /// Takes the next page of the caller's bytes.
    pub(crate) fn read(&mut self, reader: &mut UserSliceReader) -> Result {
        // SAFETY: The page is ours, by an exclusive reference: nobody accesses it meanwhile.
        unsafe { self.0.copy_from_user_slice_raw(reader, 0, PAGE_SIZE) }
    }

    pub(crate) fn page(&self) -> &Page {
        &self.0
    }
}
