// SPDX-License-Identifier: GPL-2.0

//! A file that pages are read from.
//!
//! C source: page_cache.c, on `mm/filemap.c` and `mm/shmem.c`.

use super::{
    c,
    file::RawFile,
    memfd::Pfn, //
};
use kernel::{
    error::to_result,
    page::Page,
    prelude::*, //
};

/// A file on a filesystem, or a block device, open for reading.
///
/// # Invariants
///
/// `kind` is what `kdp_source_kind()` said of the file.
pub(crate) struct SourceFile {
    file: RawFile,
    kind: i32,
}

/// What came of reading a page.
pub(crate) enum Fetched {
    /// The page cache has it, for now.
    Cached,
    /// There is nothing: zeros.
    Hole,
    /// Here it is.
    Bytes(Page),
}

impl SourceFile {
    /// Takes the file behind `fd`; the errors are those of KDP_SOURCE.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        let file = RawFile::get(fd)?;
        // SAFETY: The file is valid.
        let kind = unsafe { c::kdp_source_kind(file.as_ptr()) };
        to_result(kind)?;
        // INVARIANT: It said so just now.
        Ok(Self { file, kind })
    }

    /// Whether its pages are in the page cache once they were read.
    fn is_cached(&self) -> bool {
        self.kind != c::KDP_SOURCE_READ as i32
    }

    /// Copies page `index` of the file to a frame that nobody else may touch, if the page cache has it; says
    /// whether it did. Does not wait for the device.
    #[inline]
    pub(crate) fn copy(&self, index: u64, to: Pfn<'_>) -> Result<bool> {
        if !self.is_cached() {
            return Ok(false);
        }
        // SAFETY: The file is valid and has a page cache (type invariant); the frame is pinned memory, to
        // which no Rust reference exists.
        let copied = unsafe { c::kdp_source_copy(self.file.as_ptr(), index as usize, to.number) };
        to_result(copied)?;
        Ok(copied > 0)
    }

    /// Reads page `index` of the file. May sleep for long; EINTR after a fatal signal.
    pub(crate) fn fetch(&self, index: u64) -> Result<Fetched> {
        if self.is_cached() {
            // SAFETY: The file is valid and of this kind (type invariant).
            let fetched =
                unsafe { c::kdp_source_fetch(self.file.as_ptr(), self.kind, index as usize) };
            to_result(fetched)?;
            return Ok(match fetched as u32 {
                c::KDP_FETCHED_HOLE => Fetched::Hole,
                _ => Fetched::Cached,
            });
        }
        let page = Page::alloc_page(GFP_KERNEL)?;
        // SAFETY: The file can be read (type invariant); the page is ours, and has a kernel address because it
        // was allocated without __GFP_HIGHMEM.
        to_result(unsafe {
            c::kdp_source_read(self.file.as_ptr(), index as usize, page.as_ptr())
        })?;
        Ok(Fetched::Bytes(page))
    }

    /// Has the device begin to read pages that are going to be asked for.
    pub(crate) fn ahead(&self, index: u64, count: u64) {
        if self.kind == c::KDP_SOURCE_CACHE as i32 {
            // SAFETY: The file is valid and has a page cache (type invariant).
            unsafe { c::kdp_source_ahead(self.file.as_ptr(), index as usize, count as usize) };
        }
    }
}

impl Pfn<'_> {
    /// Fills the frame with what a page of ours holds.
    pub(crate) fn fill(self, from: &Page) {
        // SAFETY: The frame is pinned memory, to which no Rust reference exists; both are whole pages.
        unsafe { c::kdp_copy_to_pfn(self.number, from.as_ptr()) };
    }
}
