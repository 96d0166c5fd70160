// SPDX-License-Identifier: GPL-2.0

//! The memfd behind a memslot, and its pinned pages.
//!
//! C sources: `mm/gup.c` (`memfd_pin_folios()`), `mm/memfd.c` (the seals).

use super::{
    c,
    file::{
        unmap,
        RawFile, //
    },
    memory_failure::BadFrame,
    vma::NewMapping, //
};
use core::{
    marker::PhantomData,
    mem::MaybeUninit, //
};
use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
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

    /// Checks a new shared mapping of the memfd's pages against F_SEAL_FUTURE_WRITE. EPERM if the
    /// memfd has the seal and the mapping is writable. If it is not, it never becomes writable.
    ///
    /// The kernel checks mappings of shmem and hugetlb in the same way (check_write_seal() in
    /// mm/memfd.c).
    pub(crate) fn check_seals<F: Send + Sync>(&self, mapping: &NewMapping<'_, F>) -> Result {
        let mut is_memfd = false;
        // SAFETY: The file is valid, and `is_memfd` is a place for the answer.
        let seals = unsafe { c::kdp_memfd_seals(self.file.as_ptr(), &mut is_memfd) };
        if seals & c::F_SEAL_FUTURE_WRITE != 0 {
            mapping.forbid_writing()?;
        }
        Ok(())
    }

    /// log2 of the pages of one allocation of the memfd: that of the huge page for hugetlb; 0 for shmem,
    /// which may hold larger folios, too.
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

    /// Unmaps `count` pages from `first` on from every process that maps the memfd, or a memslot
    /// of it as native memory. Private copies stay. May sleep.
    pub(crate) fn unmap(&self, first: u64, count: u64) {
        // SAFETY: The file is valid.
        unsafe { unmap((*self.file.as_ptr()).f_mapping, first, count, false) };
    }

    /// Waits until pages that were just unmapped are not copied to private ones any more. May sleep.
    pub(crate) fn settle(&self, first: u64, count: u64) {
        // SAFETY: The file is valid.
        unsafe { c::kdp_native_settle(self.file.as_ptr(), first as usize, count as usize) };
    }

    /// Tells it from other files, as long as it is open.
    pub(crate) fn identity(&self) -> usize {
        // SAFETY: The file is valid.
        unsafe { c::kdp_file_identity(self.file.as_ptr()) }
    }

    /// Whether a frame is that of the page at `index`, just now.
    pub(crate) fn has_frame(&self, index: u64, frame: &BadFrame) -> bool {
        frame.place() == Some((self.identity(), index))
    }

    /// Whether the page at `index` can be read: it has no memory error, as far as the kernel knows.
    pub(crate) fn can_read(&self, index: u64) -> bool {
        // SAFETY: The file is valid.
        unsafe { c::kdp_memfd_can_read(self.file.as_ptr(), index as usize) }
    }

    /// Pins the huge page whose first page is at `index`, of a memfd of hugetlb; allocates it if it is a
    /// hole. Says whether any page of it had a memory error before.
    #[inline]
    pub(crate) fn pin(&self, index: u64) -> Result<(Pinned, bool)> {
        let mut pfn = 0;
        // SAFETY: The file is a memfd (type invariant), of hugetlb, as the caller says; `pfn` is a
        // place for the answer.
        let pinned = unsafe { c::kdp_pin_huge_page(self.file.as_ptr(), index as usize, &mut pfn) };
        if pinned < 0 {
            return Err(Error::from_errno(pinned as i32));
        }
        // INVARIANT: The page was just pinned.
        Ok((Pinned { pfn }, pinned > 0))
    }
}

impl Memfd {
    /// The first frame of the block of `1 << order` pages around `frame`, if that is where it was at
    /// `index` when it was pinned and all of the block is in its folio.
    #[inline]
    pub(crate) fn block_around<'a>(
        &self,
        frame: Pfn<'a>,
        index: u64,
        order: u32,
    ) -> Option<Pfn<'a>> {
        // SAFETY: The file is valid; the frame's folio is pinned, so it is not split and does not go.
        let is_in_block = unsafe {
            c::kdp_pfn_is_in_block(self.file.as_ptr(), frame.number, index as usize, order)
        };
        let into = index as usize & ((1 << order) - 1);
        is_in_block.then_some(Pfn {
            number: frame.number.wrapping_sub(into),
            _pinned: PhantomData,
        })
    }

    /// Whether the page at `index` is in a folio of `1 << order` pages or more, just now.
    pub(crate) fn has_block(&self, index: u64, order: u32) -> bool {
        // SAFETY: The file is valid.
        unsafe { c::kdp_memfd_has_block(self.file.as_ptr(), index as usize, order) }
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

impl Pinned {
    /// The frame.
    pub(crate) fn frame(&self) -> Pfn<'_> {
        Pfn {
            number: self.pfn,
            _pinned: PhantomData,
        }
    }

    /// Whether another pin is on the same folio, by the same page of it.
    pub(crate) fn is_of(&self, other: &Self) -> bool {
        self.pfn == other.pfn
    }

    /// Pins it once more.
    pub(crate) fn again(&self) -> Result<Self> {
        // SAFETY: The folio is pinned (type invariant).
        to_result(unsafe { c::kdp_pin_again(self.pfn) })?;
        // INVARIANT: Just pinned.
        Ok(Self { pfn: self.pfn })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: The pin is ours (type invariant) and not used again.
        unsafe { c::kdp_unpin_pfn(self.pfn) };
    }
}

/// The number of a page frame that is pinned as long as its [`Pins`] are borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Pfn<'a> {
    pub(super) number: usize,
    _pinned: PhantomData<&'a Pinned>,
}

impl Pfn<'_> {
    /// Whether it is this one.
    pub(crate) fn is(self, frame: &BadFrame) -> bool {
        self.number == frame.number
    }

    /// The frame `pages` further on in the same folio.
    #[inline]
    pub(crate) fn add(self, pages: u64) -> Self {
        Self {
            number: self.number + pages as usize,
            _pinned: PhantomData,
        }
    }

    /// The frame `pages` before in the same folio.
    #[inline]
    pub(crate) fn sub(self, pages: u64) -> Self {
        Self {
            number: self.number - pages as usize,
            _pinned: PhantomData,
        }
    }

    /// The frame of a page.
    ///
    /// # Safety
    ///
    /// The page is not freed for `'a`.
    #[inline]
    pub(super) unsafe fn of_page(page: *mut bindings::page) -> Self {
        Self {
            // SAFETY: By the caller's promise.
            number: unsafe { c::kdp_page_pfn(page) },
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

/// Frames of up to this many pages side by side.
pub(crate) const FRAMES: usize = 64;

/// Frames of pages side by side, some of which may be left out.
///
/// # Invariants
///
/// Where the bit of `there` is set, the number is that of a [`Pfn<'a>`].
pub(crate) struct Frames<'a> {
    pub(super) numbers: [MaybeUninit<usize>; FRAMES],
    pub(super) there: u64,
    _pinned: PhantomData<Pfn<'a>>,
}

impl<'a> Frames<'a> {
    /// None.
    #[inline]
    pub(crate) fn new() -> Self {
        // INVARIANT: No bit is set.
        Self {
            numbers: [const { MaybeUninit::uninit() }; FRAMES],
            there: 0,
            _pinned: PhantomData,
        }
    }

    /// Puts a frame in its place.
    #[inline]
    pub(crate) fn set(&mut self, at: usize, frame: Pfn<'a>) {
        // INVARIANT: It is that of a `Pfn<'a>`.
        self.numbers[at].write(frame.number);
        self.there |= 1 << at;
    }
}

/// Pinned folios of this many allocations of a memfd, side by side.
pub(crate) const PINS: usize = 512;

/// The pinned folios of [`PINS`] allocations.
///
/// # Invariants
///
/// A frame that is not 0 is `number << 1 | 1` of a page whose folio it holds a pin on. It becomes 0 only
/// through an exclusive reference, so a frame that is borrowed stays.
pub(crate) struct Pins {
    /// Relaxed: a number is all there is to see, and its pin was taken before (folio_ref_add() is a full
    /// barrier).
    frames: [Atomic<usize>; PINS],
}

impl Pins {
    /// None is pinned.
    pub(crate) fn new() -> Result<KBox<Self>> {
        let pins = KBox::<Self>::new_uninit(GFP_KERNEL_ACCOUNT | __GFP_ZERO)?;
        // SAFETY: Zero bytes are an array of zeros.
        // INVARIANT: All are 0.
        Ok(unsafe { pins.assume_init() })
    }

    fn decode<'a>(raw: usize) -> Option<Pfn<'a>> {
        (raw != 0).then_some(Pfn {
            number: raw >> 1,
            _pinned: PhantomData,
        })
    }

    /// The first frame of an allocation, if it is pinned.
    #[inline]
    pub(crate) fn get(&self, at: usize) -> Option<Pfn<'_>> {
        Self::decode(self.frames[at].load(Relaxed))
    }

    /// Adds a pin, unless there is one already: then `pin` is dropped. Returns the frame that is there, and
    /// whether it was added.
    #[inline]
    pub(crate) fn insert(&self, at: usize, pin: Pinned) -> (Pfn<'_>, bool) {
        let raw = pin.pfn << 1 | 1;
        let (now, added) = match self.frames[at].cmpxchg(0, raw, Relaxed) {
            Ok(_) => {
                // INVARIANT: The pin is the array's now.
                core::mem::forget(pin);
                (raw, true)
            }
            Err(other) => (other, false),
        };
        let frame = Pfn {
            number: now >> 1,
            _pinned: PhantomData,
        };
        (frame, added)
    }

    /// The first allocation from `from` on that is pinned.
    pub(crate) fn next(&self, from: usize) -> Option<usize> {
        (from..PINS).find(|&at| self.frames[at].load(Relaxed) != 0)
    }

    /// Takes the pin of an allocation out, if it is pinned.
    pub(crate) fn take(&mut self, at: usize) -> Option<Pinned> {
        let raw = core::mem::replace(self.frames[at].get_mut(), 0);
        // INVARIANT: The pin was the array's (type invariant).
        (raw != 0).then_some(Pinned { pfn: raw >> 1 })
    }

    /// Unpins allocations `first` to before `end`; returns how many were pinned.
    pub(crate) fn unpin(&mut self, first: usize, end: usize) -> usize {
        let mut count = 0;
        for at in first..end {
            count += usize::from(self.take(at).is_some());
        }
        count
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.unpin(0, PINS);
    }
}
