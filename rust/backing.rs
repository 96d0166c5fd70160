// SPDX-License-Identifier: GPL-2.0

//! The memory behind a memslot: a range of a memfd, whose folios are pinned one by one as they are
//! first mapped, and charged to the user who opened the VM.
//!
//! The pins themselves are in [`Pages`], under its lock. A folio that is mapped is pinned: it is
//! unpinned only under the lock for writing, after it was unmapped.

use crate::{
    account::Account,
    ffi::{
        memfd::{
            Memfd,
            Pfn,
            Pins,
            PINS, //
        },
        task::User, //
    },
    pages::Pages,
    rules::range::PageRange, //
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
    account: Account,
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
        // hugetlb pages are not charged: they are reserved and limited by other means.
        let payer = (memfd.order() == 0).then_some(user);
        Ok(Self {
            memfd,
            offset: offset_bytes >> PAGE_SHIFT,
            account: Account::new(payer)?,
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
        self.account.pinned() << self.order()
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

    /// The frame of a page; pins its folio if that has not happened yet. ENOMEM if there is no memory
    /// for it, or the limit is reached.
    #[inline]
    pub(crate) fn frame<'a>(&self, pages: &'a Pages, page: u64) -> Result<Pfn<'a>> {
        let (leaf, at, into) = self.locate(page);
        if let Some(first) = pages.pins.get(leaf).and_then(|pins| pins.get(at)) {
            return Ok(first.add(into));
        }
        self.pin(pages, leaf, at).map(|first| first.add(into))
    }

    #[cold]
    fn pin<'a>(&self, pages: &'a Pages, leaf: usize, at: usize) -> Result<Pfn<'a>> {
        self.account.pin(|| {
            if pages.pins.get(leaf).is_none() {
                pages.pins.insert(leaf, Pins::new()?)?;
            }
            let pins = pages.pins.get(leaf).ok_or(ENOMEM)?;
            let pin = self.memfd.pin((leaf * PINS + at) as u64)?;
            Ok(pins.insert(at, pin))
        })
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
                if pins.next(0).is_none() {
                    drop(pages.pins.remove(leaf));
                }
            }
            first = start + PINS;
        }
        self.account.unpinned(count);
    }
}
