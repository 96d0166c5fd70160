// SPDX-License-Identifier: GPL-2.0

//! The memory behind a memslot: a range of a memfd.
//!
//! A page of shmem, which is native memory, is looked up in the page cache each time. The folios of
//! hugetlb are pinned one by one as they are first mapped.
//!
//! The pins themselves are in [`Pages`], under its lock. A folio that is mapped is pinned: it is
//! unpinned only under the lock for writing, after it was unmapped.

use crate::{
    compat::ehwpoison,
    ffi::{
        memfd::{
            Frames,
            Memfd,
            Pfn,
            Pinned,
            Pins,
            PINS, //
        },
        memory_failure::BadFrame,
        native::{
            CachedPage,
            Memcg, //
        },
        percpu::PerCpu,
        vma::PMD_ORDER, //
    },
    pages::Pages,
    rules::{
        bits::ones,
        collapse::BLOCK_PAGES,
        range::PageRange, //
    }, //
};
use kernel::{
    page::PAGE_SHIFT,
    prelude::*, //
};

/// The memory.
pub(crate) struct Backing {
    memfd: Memfd,
    /// Where the memslot begins in the memfd, in pages.
    offset: u64,
    /// Folios that are pinned, or just about to be.
    pinned: PerCpu<1>,
    /// Pays for native memory that a kernel thread brings in.
    owner: Memcg,
}

/// The frame of a page, which stays the page's as long as this is there.
pub(crate) enum Frame<'a> {
    /// It is pinned.
    Pinned(Pfn<'a>),
    /// It is locked.
    Cached(CachedPage),
}

impl<'a> Frame<'a> {
    /// Its frame.
    #[inline]
    pub(crate) fn pfn(&self) -> Pfn<'_> {
        match self {
            Self::Pinned(frame) => *frame,
            Self::Cached(cached) => cached.frame(),
        }
    }

    /// Its bytes were written by us.
    #[inline]
    pub(crate) fn written(&self) {
        if let Self::Cached(cached) = self {
            cached.written();
        }
    }

    /// The pinned frame.
    #[inline]
    pub(crate) fn into_pinned(self) -> Option<Pfn<'a>> {
        match self {
            Self::Pinned(frame) => Some(frame),
            Self::Cached(_) => None,
        }
    }

    /// The locked page.
    #[inline]
    pub(crate) fn into_cached(self) -> Option<CachedPage> {
        match self {
            Self::Pinned(_) => None,
            Self::Cached(cached) => Some(cached),
        }
    }
}

impl Backing {
    /// Checks a range of a memfd; the errors are those of KDP_MEMSLOT_CREATE.
    pub(crate) fn new(memfd: Memfd, offset_bytes: u64, nr_pages: u64) -> Result<Self> {
        let granule = 1u64 << (memfd.order() + PAGE_SHIFT as u32);
        let bytes = nr_pages << PAGE_SHIFT;
        let end = offset_bytes.checked_add(bytes).ok_or(EINVAL)?;
        if offset_bytes % granule != 0 || bytes % granule != 0 || end > memfd.size() {
            return Err(EINVAL);
        }
        Ok(Self {
            memfd,
            offset: offset_bytes >> PAGE_SHIFT,
            pinned: PerCpu::new()?,
            owner: Memcg::current(),
        })
    }

    pub(crate) fn memfd(&self) -> &Memfd {
        &self.memfd
    }

    /// Whether it is ordinary memory: refcounted, in the rmap, not pinned. That is shmem.
    #[inline]
    pub(crate) fn is_native(&self) -> bool {
        self.order() == 0
    }

    /// A page of native memory, as [`CachedPage::find`] says.
    #[inline]
    pub(crate) fn find(&self, page: u64, wait: bool) -> Result<CachedPage> {
        CachedPage::find(&self.memfd, self.offset + page, wait)
    }

    /// Returns a page of a memfd of shmem as [`CachedPage::get`] does.
    pub(crate) fn get(&self, page: u64) -> Result<CachedPage> {
        CachedPage::get(&self.memfd, self.offset + page, &self.owner)
    }

    /// The frame of a page, to fill it; brings it in. Errors are those of [`Self::frame`].
    #[inline]
    pub(crate) fn hold<'a>(&self, pages: &'a Pages, page: u64) -> Result<Frame<'a>> {
        if self.is_native() {
            self.get(page).map(Frame::Cached)
        } else {
            self.frame(pages, page).map(Frame::Pinned)
        }
    }

    /// Where the memslot begins in the memfd, in pages.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// log2 of the pages that are pinned at once.
    pub(crate) fn order(&self) -> u32 {
        self.memfd.order()
    }

    /// Whether one entry may map a block. On shmem this also depends on each folio, and a block of
    /// the memslot must be a block of the memfd.
    #[inline]
    pub(crate) fn may_have_blocks(&self) -> bool {
        self.has_blocks() || self.is_native() && self.offset % BLOCK_PAGES == 0
    }

    /// Whether every folio consists of blocks: a hugetlb page of 2 MiB is one block, a page of 1
    /// GiB has 512.
    #[inline]
    fn has_blocks(&self) -> bool {
        self.order() >= PMD_ORDER
    }

    /// The first frame of the block around a page, if one folio holds the whole block. `frame` is
    /// the frame of the page.
    #[inline]
    pub(crate) fn block_around<'a>(&self, frame: Pfn<'a>, page: u64) -> Option<Pfn<'a>> {
        if self.has_blocks() {
            return Some(frame.sub(page & (BLOCK_PAGES - 1)));
        }
        self.memfd
            .block_around(frame, self.offset + page, PMD_ORDER)
    }

    /// Whether one entry could map a block, just now.
    pub(crate) fn may_be_block(&self, block: PageRange) -> bool {
        if self.has_blocks() {
            return true;
        }
        if !self.may_have_blocks() {
            return false;
        }
        self.memfd.has_block(self.offset + block.first(), PMD_ORDER)
    }

    /// Memory that is pinned, in pages.
    pub(crate) fn pinned_pages(&self) -> u64 {
        self.pinned.sum(0) << self.order()
    }

    /// Where the pin of a page's folio is: which [`Pins`], and where in them; and which page of the folio it
    /// is.
    #[inline]
    fn locate(&self, page: u64) -> (usize, usize, u64) {
        let index = self.offset + page;
        let granule = (index >> self.order()) as usize;
        (
            granule / PINS,
            granule % PINS,
            index & ((1 << self.order()) - 1),
        )
    }

    /// The frame of a page of hugetlb; pins its folio if that has not happened yet. ENOMEM if there is
    /// no memory for it; EHWPOISON if it had a memory error before and is not poisoned: then
    /// [`Memslot::examine`](crate::memslot::Memslot::examine) is to be called first;
    /// [`on_its_way()`](crate::moving::on_its_way) while it is being moved.
    #[inline(always)]
    pub(crate) fn frame<'a>(&self, pages: &'a Pages, page: u64) -> Result<Pfn<'a>> {
        let (leaf, at, into) = self.locate(page);
        let pins = pages.pins.get(leaf);
        if let Some(first) = pins.and_then(|pins| pins.get(at)) {
            return Ok(first.add(into));
        }
        if let Some(moving) = pages.moving(page) {
            return moving.frame(page);
        }
        self.pinned.add(0, 1);
        let pinned = self.pin(pages, pins, (leaf, at), page - into);
        if !matches!(pinned, Ok((_, true))) {
            self.pinned.add(0, 1_u64.wrapping_neg());
        }
        pinned.map(|(first, _)| first.add(into))
    }

    /// Pins the folio that begins with page `first`, unless another thread was faster. Its pin belongs to
    /// `pins`, if they are there.
    #[inline(always)]
    fn pin<'a>(
        &self,
        pages: &'a Pages,
        pins: Option<&'a Pins>,
        (leaf, at): (usize, usize),
        first: u64,
    ) -> Result<(Pfn<'a>, bool)> {
        let pins = match pins {
            Some(pins) => pins,
            None => Self::add_pins(pages, leaf)?,
        };
        let (pin, had_error) = self.memfd.pin(self.offset + first)?;
        if had_error {
            self.check_error(pages, first)?;
        }
        Ok(pins.insert(at, pin))
    }

    #[cold]
    #[inline(never)]
    fn add_pins(pages: &Pages, leaf: usize) -> Result<&Pins> {
        // Another thread may have been faster: then its pins count.
        pages.pins.insert(leaf, Pins::new()?)?;
        pages.pins.get(leaf).ok_or(ENOMEM)
    }

    /// The folio that begins with page `first` had a memory error: whether that has been examined.
    #[cold]
    #[inline(never)]
    fn check_error(&self, pages: &Pages, first: u64) -> Result {
        if pages.poison.any_bad(first, 1 << self.order()) {
            Ok(())
        } else {
            Err(ehwpoison())
        }
    }

    /// Takes out the pin of the folio that begins with a page, if there is one. It can be put back.
    pub(crate) fn take_pin(&self, pages: &mut Pages, page: u64) -> Result<Option<Pinned>> {
        let (leaf, at, _) = self.locate(page);
        if pages.pins.get(leaf).is_none() {
            Self::add_pins(pages, leaf)?;
        }
        Ok(pages.pins.get_mut(leaf).and_then(|pins| pins.take(at)))
    }

    /// Puts a pin where one can be. It may be counted already.
    pub(crate) fn put_pin(&self, pages: &Pages, page: u64, pin: Pinned, is_counted: bool) {
        let (leaf, at, _) = self.locate(page);
        let Some(pins) = pages.pins.get(leaf) else {
            return;
        };
        pins.insert(at, pin);
        if !is_counted {
            self.pinned.add(0, 1);
        }
    }

    /// A pin that was taken out is not put back.
    pub(crate) fn dropped_pin(&self) {
        self.pinned.add(0, 1_u64.wrapping_neg());
    }

    /// Whether a frame is a page's: the one that is pinned for it, or else the one that the memfd has there.
    pub(crate) fn has_frame(&self, pages: &Pages, page: u64, frame: &BadFrame) -> bool {
        let (leaf, at, into) = self.locate(page);
        match pages.pins.get(leaf).and_then(|pins| pins.get(at)) {
            Some(first) => first.add(into).is(frame),
            None => match pages.moving(page) {
                Some(moving) => moving.has_frame(page, frame),
                None => self.memfd.has_frame(self.offset + page, frame),
            },
        }
    }

    /// Whether a page of the memfd can be read.
    pub(crate) fn can_read(&self, page: u64) -> bool {
        self.memfd.can_read(self.offset + page)
    }

    /// The page that is so far into the memfd; none if that is outside of `nr_pages` pages.
    pub(crate) fn page_at(&self, index: u64, nr_pages: u64) -> Option<u64> {
        index
            .checked_sub(self.offset)
            .filter(|&page| page < nr_pages)
    }

    /// Whether a page's folio is pinned already.
    pub(crate) fn is_pinned(&self, pages: &Pages, page: u64) -> bool {
        let (leaf, at, _) = self.locate(page);
        pages
            .pins
            .get(leaf)
            .is_some_and(|pins| pins.get(at).is_some())
    }

    /// The frames of pages side by side, from `first` on, whose bits are set, where they are pinned already.
    pub(crate) fn pinned_frames<'a>(&self, pages: &'a Pages, first: u64, bits: u64) -> Frames<'a> {
        let mut frames = Frames::new();
        let mut known: Option<(usize, &Pins)> = None;
        for i in ones(bits) {
            let (leaf, at, into) = self.locate(first + i);
            if known.is_none_or(|(known, _)| known != leaf) {
                known = pages.pins.get(leaf).map(|pins| (leaf, pins));
            }
            if let Some(frame) = known.and_then(|(_, pins)| pins.get(at)) {
                frames.set(i as usize, frame.add(into));
            }
        }
        frames
    }

    /// The pages of the memslot that share their folio with a page of `range`, first and one past
    /// the last.
    pub(crate) fn round_out(&self, range: PageRange) -> (u64, u64) {
        let mask = (1u64 << self.order()) - 1;
        // The memslot begins and ends with a folio, so this stays inside it.
        (range.first() & !mask, (range.last() | mask) + 1)
    }

    /// The first page, from `at` to before `end`, of a folio that is pinned.
    pub(crate) fn next_pinned(&self, pages: &Pages, at: u64, end: u64) -> Option<u64> {
        if at >= end {
            return None;
        }
        let (mut leaf, mut from, _) = self.locate(at);
        let (last, last_at, _) = self.locate(end - 1);
        loop {
            let found = pages.pins.next(leaf, last)?;
            if found > leaf {
                from = 0;
            }
            let next = pages.pins.get(found).and_then(|pins| pins.next(from));
            if let Some(at) = next {
                let granule = (found * PINS + at) as u64;
                let inside = found < last || at <= last_at;
                return inside.then_some((granule << self.order()) - self.offset);
            }
            (leaf, from) = (found + 1, 0);
        }
    }

    /// Unpins the folios of whole granules. They must not be mapped: the caller has the lock for
    /// writing, and has unmapped them since it took it.
    pub(crate) fn unpin(&self, pages: &mut Pages, range: PageRange) {
        let (first, end) = range.whole_granules(self.offset, self.order());
        let (mut first, end) = (first as usize, end as usize);
        let mut count = 0;
        while first < end {
            let Some(leaf) = pages.pins.next(first / PINS, (end - 1) / PINS) else {
                break;
            };
            let start = leaf * PINS;
            let (from, to) = (first.max(start) - start, end.min(start + PINS) - start);
            if let Some(pins) = pages.pins.get_mut(leaf) {
                count += pins.unpin(from, to);
                // Where a pin was taken out it is put back.
                if pins.next(0).is_none() && pages.any_moving().is_none() {
                    drop(pages.pins.remove(leaf));
                }
            }
            first = start + PINS;
        }
        self.pinned.add(0, (count as u64).wrapping_neg());
    }
}
