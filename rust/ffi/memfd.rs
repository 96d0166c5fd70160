// SPDX-License-Identifier: GPL-2.0

//! The memfd behind a memslot, and its pinned pages.
//!
//! C sources: `mm/gup.c` (`memfd_pin_folios()`), `mm/memfd.c` (the seals).

use super::{
    c,
    file::RawFile,
    tree, //
};
use core::marker::PhantomData;
use kernel::{
    error::to_result,
    ffi::c_void,
    prelude::*, //
};

/// A memfd that cannot shrink, open for writing.
///
/// # Invariants
///
/// The file is a memfd of shmem or hugetlb with F_SEAL_SHRINK. Its mapping is held writable, so that
/// F_SEAL_WRITE cannot be added.
pub(crate) struct Memfd {
    file: RawFile,
    order: u32,
}

impl Memfd {
    /// Takes the file behind `fd`; the errors are those of KDP_MEMSLOT_CREATE.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        let file = RawFile::get(fd)?;
        let raw = file.as_ptr();
        // SAFETY: `raw` is a valid file, as it is in all calls below.
        if !unsafe { c::kdp_file_writable(raw) } {
            return Err(EACCES);
        }
        let mut is_memfd = false;
        // SAFETY: As above, and `is_memfd` is a place for the answer.
        let seals = unsafe { c::kdp_memfd_seals(raw, &mut is_memfd) };
        if !is_memfd {
            return Err(EINVAL);
        }
        if seals & c::F_SEAL_SHRINK == 0 || seals & (c::F_SEAL_WRITE | c::F_SEAL_FUTURE_WRITE) != 0
        {
            return Err(EPERM);
        }
        // SAFETY: As above. It fails when F_SEAL_WRITE came in between.
        to_result(unsafe { c::kdp_mapping_hold_writable(raw) })?;
        // SAFETY: As above, and it is shmem or hugetlb.
        let order = unsafe { c::kdp_memfd_order(raw) };
        // INVARIANT: All was just checked; a seal is never taken off.
        Ok(Self { file, order })
    }

    /// log2 of the pages of one allocation of the memfd: 0 for shmem, that of the huge page for
    /// hugetlb.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// Its size in bytes.
    pub(crate) fn size(&self) -> u64 {
        // SAFETY: The file is valid.
        unsafe { c::kdp_file_size(self.file.as_ptr()) as u64 }
    }

    /// The file, to hand out.
    pub(crate) fn file(&self) -> &RawFile {
        &self.file
    }

    /// Pins the allocation of number `granule`, allocating it if it is a hole.
    pub(crate) fn pin(&self, granule: u64) -> Result<Pinned> {
        let mut pfn = 0;
        let index = (granule << self.order) as usize;
        // SAFETY: The file is a memfd (type invariant), `pfn` a place for the answer.
        to_result(unsafe { c::kdp_pin_page(self.file.as_ptr(), index, &mut pfn) as i32 })?;
        // INVARIANT: The page was just pinned.
        Ok(Pinned { pfn })
    }
}

impl Drop for Memfd {
    fn drop(&mut self) {
        // SAFETY: The file is valid and its mapping held writable (type invariant).
        unsafe { c::kdp_mapping_release_writable(self.file.as_ptr()) };
    }
}

/// A pinned folio, by the number of a page of it.
///
/// # Invariants
///
/// Holds a pin on the folio of `pfn`.
pub(crate) struct Pinned {
    pfn: usize,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: The pin is ours (type invariant) and not used again.
        unsafe { c::kdp_unpin_pfn(self.pfn) };
    }
}

/// The number of a page frame that is pinned as long as its [`tree::Tree`] is borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Pfn<'a> {
    pub(super) number: usize,
    _pinned: PhantomData<&'a Pinned>,
}

impl Pfn<'_> {
    /// The frame `pages` further on in the same folio.
    #[inline]
    pub(crate) fn add(self, pages: u64) -> Self {
        Self {
            number: self.number + pages as usize,
            _pinned: PhantomData,
        }
    }

    /// Fills the page with zeros.
    pub(crate) fn zero(self) {
        // SAFETY: The page is pinned. It is memory that processes may read and write at any time, to
        // which no Rust reference exists.
        unsafe { c::kdp_zero_pfn(self.number) };
    }
}

// SAFETY: The entry is stored as xa_mk_value() would: odd, so not null and not a pointer. A page
// frame number has fewer than 63 bits.
unsafe impl tree::Entry for Pinned {
    type Ref<'a> = Pfn<'a>;

    fn into_raw(self) -> *mut c_void {
        let raw = (self.pfn << 1 | 1) as *mut c_void;
        core::mem::forget(self);
        raw
    }

    unsafe fn from_raw(raw: *mut c_void) -> Self {
        // INVARIANT: By the caller's promise this is the pin that `into_raw` gave away.
        Self {
            pfn: raw as usize >> 1,
        }
    }

    unsafe fn borrow<'a>(raw: *mut c_void) -> Pfn<'a> {
        Pfn {
            number: raw as usize >> 1,
            _pinned: PhantomData,
        }
    }
}
