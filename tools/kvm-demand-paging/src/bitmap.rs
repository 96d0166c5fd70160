//! The present bitmap that a memslot shares with userspace.

use crate::{abi, bits::Bits, map::Mapping, Error, PageRange, Result, PAGE_SIZE};
use rustix::fd::BorrowedFd;
use std::fmt;

/// The present bitmap of a memslot: one bit per page, shared with the module and all who map it.
///
/// Reading and setting bits takes no system call. A page that somebody *waits* for (an [`Event`] was read)
/// is resolved by [`Vm::mark`], which wakes; setting its bit before is allowed. Bits are never cleared by
/// hand: only [`Vm::mark`] unmaps a page from those who have it.
///
/// Touching the bitmap after demand paging was switched off, or after the memslot was removed, raises
/// SIGBUS: drop it before.
///
/// Methods that take a page panic, as the index of a slice does, if it is past the end.
///
/// [`Event`]: crate::Event
/// [`Vm::mark`]: crate::Vm::mark
pub struct PresentBitmap {
    map: Mapping,
    pages: u64,
}

impl PresentBitmap {
    pub(crate) fn map(memslot: BorrowedFd<'_>, pages: u64) -> Result<Self> {
        let len = pages.div_ceil(8).next_multiple_of(PAGE_SIZE as u64) as usize;
        let map =
            Mapping::file(memslot, abi::KDP_BITMAP_OFFSET, len, PAGE_SIZE).map_err(|errno| {
                Error::sys(
                    "mmap",
                    format!("the present bitmap of {pages} pages, {len} bytes"),
                    errno,
                )
            })?;
        Ok(Self { map, pages })
    }

    fn bits(&self) -> Bits<'_> {
        Bits::new(self.map.words(), self.pages)
    }

    /// How many pages the memslot has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether the page is present; if it is, all its bytes are visible to the caller.
    pub fn is_present(&self, page: u64) -> bool {
        self.bits().get(page)
    }

    /// Make the page present; whether this call did it. What the caller wrote to the page before is seen by
    /// whoever finds it present.
    pub fn set(&self, page: u64) -> bool {
        self.bits().set(page)
    }

    /// Make a run of pages present; how many of them this call did. As [`set`](Self::set), but cheaper than
    /// one by one.
    pub fn set_range(&self, range: PageRange) -> u64 {
        self.bits().set_range(range)
    }

    /// How many pages are present.
    pub fn count(&self) -> u64 {
        self.bits().count()
    }

    /// The first absent page from `from`.
    pub fn next_absent(&self, from: u64) -> Option<u64> {
        self.bits().find(from, false)
    }

    /// The first present page from `from`.
    pub fn next_present(&self, from: u64) -> Option<u64> {
        self.bits().find(from, true)
    }

    /// The first run of absent pages in `within`, of at most `max`.
    pub fn next_absent_run(&self, within: PageRange, max: u64) -> Option<PageRange> {
        self.bits().find_run(within, false, max)
    }
}

impl fmt::Debug for PresentBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PresentBitmap({} pages)", self.pages)
    }
}

#[cfg(test)]
impl PresentBitmap {
    /// A bitmap that no module shares.
    pub(crate) fn for_tests(pages: u64) -> Self {
        let len = pages.div_ceil(8).next_multiple_of(PAGE_SIZE as u64) as usize;
        Self {
            map: Mapping::anonymous(len).unwrap(),
            pages,
        }
    }

    pub(crate) fn clear_for_tests(&self, page: u64) {
        self.bits().clear(page);
    }
}
