// SPDX-License-Identifier: GPL-2.0

//! The memory behind a memslot: a range of a memfd, whose folios are pinned one by one as they are
//! first mapped, and charged to the user who opened the VM.
//!
//! The pins themselves are in [`Pages`], under its lock. A folio that is mapped is pinned: it is
//! unpinned only under the lock for writing, after it was unmapped.

use crate::{
    ffi::{
        memfd::{
            Memfd,
            Pfn, //
        },
        task::{
            MemlockLimit,
            User, //
        }, //
    },
    pages::Pages,
    rules::range::PageRange, //
};
use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// The memory.
pub(crate) struct Backing {
    memfd: Memfd,
    /// Where the memslot begins in the memfd, in pages.
    offset: u64,
    user: User,
    limit: MemlockLimit,
    /// Folios that are pinned. Only added up: relaxed.
    pinned: Atomic<u64>,
}

impl Backing {
    /// Checks a range of a memfd; the errors are those of KDP_MEMSLOT_CREATE.
    pub(crate) fn new(memfd: Memfd, offset_bytes: u64, nr_pages: u64, user: User) -> Result<Self> {
        let granule = 1u64 << (memfd.order() + PAGE_SHIFT as u32);
        let bytes = nr_pages << PAGE_SHIFT;
        let end = offset_bytes.checked_add(bytes).ok_or(EINVAL)?;
        if offset_bytes % granule != 0 || bytes % granule != 0 || end > memfd.size() {
            return Err(EINVAL);
        }
        Ok(Self {
            memfd,
            offset: offset_bytes >> PAGE_SHIFT,
            user,
            limit: MemlockLimit::current(),
            pinned: Atomic::new(0),
        })
    }

    pub(crate) fn memfd(&self) -> &Memfd {
        &self.memfd
    }

    /// Where the memslot begins in the memfd, in pages.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// log2 of the pages of one folio that can be mapped as a block.
    pub(crate) fn order(&self) -> u32 {
        self.memfd.order()
    }

    /// Memory that is pinned, in pages.
    pub(crate) fn pinned_pages(&self) -> u64 {
        self.pinned.load(Relaxed) << self.order()
    }

    /// The frame of a page, if its folio is pinned.
    #[inline]
    fn pinned<'a>(&self, pages: &'a Pages, page: u64) -> Option<Pfn<'a>> {
        let index = self.offset + page;
        let order = self.order();
        let first = pages.pinned.get((index >> order) as usize)?;
        Some(first.add(index & ((1 << order) - 1)))
    }

    /// The frame of a page; pins its folio if that has not happened yet. ENOMEM if there is no memory
    /// for it, or the limit is reached.
    #[inline]
    pub(crate) fn frame<'a>(&self, pages: &'a Pages, page: u64) -> Result<Pfn<'a>> {
        if let Some(pfn) = self.pinned(pages, page) {
            return Ok(pfn);
        }
        self.pin(pages, page)
    }

    #[cold]
    fn pin<'a>(&self, pages: &'a Pages, page: u64) -> Result<Pfn<'a>> {
        let granule = (self.offset + page) >> self.order();
        if self.is_charged() && !self.user.charge(self.limit) {
            return Err(ENOMEM);
        }
        let added = self
            .memfd
            .pin(granule)
            .and_then(|pin| pages.pinned.insert(granule as usize, pin));
        if matches!(added, Ok(true)) {
            self.pinned.add(1, Relaxed);
        } else if self.is_charged() {
            self.user.uncharge(1);
        }
        added?;
        self.pinned(pages, page).ok_or(ENOMEM)
    }

    /// hugetlb pages are not charged: they are reserved and limited by other means.
    fn is_charged(&self) -> bool {
        self.order() == 0
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
        let granule = |page: u64| ((self.offset + page) >> self.order()) as usize;
        if at >= end {
            return None;
        }
        let found = pages.pinned.next(granule(at), granule(end - 1))?;
        Some(((found as u64) << self.order()) - self.offset)
    }

    /// Unpins the folios of whole granules. They must not be mapped: the caller has the lock for
    /// writing, and has unmapped them since it took it.
    pub(crate) fn unpin(&self, pages: &mut Pages, range: PageRange) {
        let (first, end) = range.whole_granules(self.offset, self.order());
        if first == end {
            return;
        }
        let count = pages.pinned.remove_range(first as usize, end as usize - 1);
        self.pinned.fetch_sub(count as u64, Relaxed);
        if self.is_charged() {
            self.user.uncharge(count);
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // The pins go with the `Pages`.
        if self.is_charged() {
            self.user.uncharge(self.pinned.load(Relaxed) as usize);
        }
    }
}
