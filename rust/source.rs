// SPDX-License-Identifier: GPL-2.0

//! A source: a file that has the bytes of absent pages, which are read from it in the fault.
//!
//! What the page cache has is copied under the fault's own lock, as the kernel's own file mappings do
//! (filemap_map_pages() in mm/filemap.c). Anything else is read without a lock, into the page cache, and the
//! fault is retried; a file without a page cache is read into a page of ours first. So no lock of ours or of the
//! mapping's is held while a device works.
//!
//! # Locks
//!
//! A page is filled under the memslot's `pages` lock for reading and, inside it, the page's own bit lock: one
//! thread fills it, and nobody makes it present or absent meanwhile. KDP_MARK has the lock for writing for that.
//! The observers' spinlocks are innermost.

use crate::{
    backing::Frame,
    ffi::{
        bit_lock::BitLocks,
        memfd::Pfn,
        source_file::{
            Fetched,
            SourceFile, //
        },
        task::current_number,
        trace, //
    },
    memslot::Memslot,
    moving::on_its_way,
    pages::Pages,
    rules::{
        bits::ones,
        range::{
            PageRange,
            WORD_PAGES, //
        },
        stream::Streams,
        touch::State, //
    }, //
};
use core::ptr;
use kernel::{
    new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        Arc,
        SpinLock, //
    }, //
};

/// Threads share an observer by their number: each should have one of its own.
const OBSERVERS: usize = 32;

/// What is known of the threads that share it, in cache lines of its own.
#[repr(align(64))]
struct Observer {
    streams: Streams,
    /// Pages to be read ahead, first and one past the last.
    ahead: Option<(u64, u64)>,
    /// The last failure, until its thread comes back for it.
    failed: Option<Failure>,
}

struct Failure {
    thread: usize,
    page: u64,
    error: Error,
}

/// The source of a memslot.
#[pin_data]
pub(crate) struct Source {
    file: SourceFile,
    /// Where the memslot begins in the file, in pages.
    offset: u64,
    filling: BitLocks,
    #[pin]
    observers: [SpinLock<Observer>; OBSERVERS],
}

/// What came of filling a page.
pub(crate) enum Filled<'a> {
    /// It is present now: its frame, and the present bits around it.
    Now(Frame<'a>, u64),
    /// Another thread was faster; or the page is no longer the source's.
    Already,
    /// The page cache does not have it.
    NotCached,
}

/// Why a page was not filled.
pub(crate) enum Unfilled {
    /// It cannot be pinned, as [`Backing::frame`](crate::backing::Backing::frame) says.
    Unpinned(Error),
    /// It cannot be read.
    Unread(Error),
}

/// Part of what is to be read ahead, and who asked for it.
pub(crate) struct Bite {
    observer: usize,
    pub(crate) first: u64,
    pub(crate) end: u64,
}

impl Source {
    /// Checks where the memslot, of `nr_pages` pages, is in the file; the errors are those of KDP_SOURCE.
    pub(crate) fn new(file: SourceFile, offset_bytes: u64, nr_pages: u64) -> Result<Arc<Self>> {
        let end = offset_bytes
            .checked_add(nr_pages << PAGE_SHIFT)
            .ok_or(EINVAL)?;
        if offset_bytes % (1 << PAGE_SHIFT) != 0 || i64::try_from(end).is_err() {
            return Err(EINVAL);
        }
        let observer = |_| {
            new_spinlock!(
                Observer {
                    streams: Streams::default(),
                    ahead: None,
                    failed: None,
                },
                "kdp_observer"
            )
        };
        let filling = BitLocks::new()?;
        Arc::pin_init(
            pin_init!(Self {
                file,
                offset: offset_bytes >> PAGE_SHIFT,
                filling,
                observers <- pin_init::pin_init_array_from_fn(observer),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    fn index(&self, page: u64) -> u64 {
        self.offset + page
    }

    fn observer(&self) -> &SpinLock<Observer> {
        &self.observers[current_number() % OBSERVERS]
    }

    /// Fills a page in the state "sourced", if the page cache has it.
    #[inline]
    pub(crate) fn fill<'a>(
        &self,
        slot: &Memslot,
        pages: &'a Pages,
        page: u64,
    ) -> Result<Filled<'a>, Unfilled> {
        self.fill_with(slot, pages, page, None)
    }

    fn fill_with<'a>(
        &self,
        slot: &Memslot,
        pages: &'a Pages,
        page: u64,
        fetched: Option<&Fetched>,
    ) -> Result<Filled<'a>, Unfilled> {
        let present = pages.present_bit(page).map_err(Unfilled::Unpinned)?;
        let _filling = self.filling.lock(page);
        // As long as the caller has `pages`, that is the only other state that a sourced page comes to.
        if present.is_set() {
            return Ok(Filled::Already);
        }
        let frame = slot.backing.hold(pages, page).map_err(Unfilled::Unpinned)?;
        match fetched {
            Some(Fetched::Hole) => frame.pfn().zero(),
            Some(Fetched::Bytes(bytes)) => frame.pfn().fill(bytes),
            Some(Fetched::Cached) | None => {
                let index = self.index(page);
                if !self
                    .file
                    .copy(index, frame.pfn())
                    .map_err(Unfilled::Unread)?
                {
                    return Ok(Filled::NotCached);
                }
            }
        }
        frame.written();
        Ok(Filled::Now(frame, present.set()))
    }

    /// Fills neighbours of a page that was just filled into `frame`: those of a group around it, bits of its word and
    /// pages of its folio, that are in the state "sourced", where that waits for nothing. Returns how many;
    /// `seen`, the present bits of the word, is brought up to date.
    ///
    /// Each is locked and looked at like one that is touched. Whoever touches what cannot be read learns why.
    pub(crate) fn fill_near(
        &self,
        pages: &Pages,
        page: u64,
        frame: Pfn<'_>,
        group: u64,
        seen: &mut u64,
    ) -> u64 {
        let Ok(present) = pages.present_bit(page) else {
            return 0;
        };
        let first = page - page % WORD_PAGES + u64::from(group.trailing_zeros());
        let frames = frame.sub(page - first);
        let mut filled = 0;
        for at in ones((group & pages.sourced(page)) >> group.trailing_zeros()) {
            let neighbour = first + at;
            let Some(_filling) = self.filling.try_lock(neighbour) else {
                continue;
            };
            let present = present.beside(neighbour);
            let copy = || self.file.copy(self.index(neighbour), frames.add(at));
            if !present.is_set() && matches!(copy(), Ok(true)) {
                *seen = present.set();
                filled += 1;
            }
        }
        filled
    }

    /// Reads a page, so that the next look finds it, in the page cache if not present. No lock is held.
    pub(crate) fn fetch(&self, slot: &Memslot, page: u64) -> Result {
        let fetched = match self.file.fetch(self.index(page)) {
            Ok(Fetched::Cached) => return Ok(()),
            Ok(fetched) => fetched,
            Err(e) => return Err(e),
        };
        let pages = slot.pages.read();
        let is_ours = pages.source().is_some_and(|now| ptr::eq(&**now, self));
        if !is_ours || pages.state(page) != State::Sourced {
            return Ok(());
        }
        match self.fill_with(slot, &pages, page, Some(&fetched)) {
            Ok(Filled::Now(..)) => {
                slot.stats.source_reads().add(1);
                Ok(())
            }
            Ok(_) => Ok(()),
            // The retry sees to it.
            Err(Unfilled::Unpinned(e)) if e == on_its_way() => Ok(()),
            Err(Unfilled::Unpinned(_)) => Err(ENOMEM),
            Err(Unfilled::Unread(e)) => Err(e),
        }
    }

    /// As `fetch()`, for a touch that is going to be retried: a failure is kept for it.
    pub(crate) fn fetch_for_touch(&self, slot: &Memslot, page: u64) {
        let fetched = self.fetch(slot, page);
        trace::source(
            slot.place.id,
            page,
            1,
            fetched.map_or_else(Error::to_errno, |()| 0),
        );
        match fetched {
            Err(error) if error != EINTR => {
                self.observer().lock().failed = Some(Failure {
                    thread: current_number(),
                    page,
                    error,
                });
            }
            _ => (),
        }
    }

    /// How the current thread's last attempt to read the page failed, once.
    pub(crate) fn failure(&self, page: u64) -> Option<Error> {
        let mut observer = self.observer().lock();
        let thread = current_number();
        let ours = observer
            .failed
            .take_if(|failed| failed.thread == thread && failed.page == page);
        ours.map(|failed| failed.error)
    }

    /// The current thread has touched a page; says whether there is something to read ahead now.
    #[inline]
    pub(crate) fn touched(&self, page: u64, limit: u64) -> bool {
        let mut observer = self.observer().lock();
        let Some((first, end)) = observer.streams.touched(page, limit) else {
            return false;
        };
        let start = match observer.ahead {
            Some((start, until)) if until == first => start,
            _ => first,
        };
        observer.ahead = Some((start, end));
        true
    }

    /// The current thread touches a block that is not whole: says, once, whether it goes on in order, and the block was to
    /// be read ahead for it.
    pub(crate) fn comes_to(&self, block: PageRange) -> bool {
        let mut observer = self.observer().lock();
        observer.streams.comes_to(block.first(), block.last() + 1)
    }

    /// The current thread has filled a block: nothing is left to be read ahead there.
    pub(crate) fn has_filled(&self, block: PageRange) {
        let end = block.last() + 1;
        let mut observer = self.observer().lock();
        if let Some((first, until)) = observer.ahead {
            if block.first() <= first && first < end {
                observer.ahead = (end < until).then_some((end, until));
            }
        }
    }

    /// The next pages to read ahead, at most `pages` of them, of an observer from `from` on.
    pub(crate) fn bite(&self, from: usize, pages: u64) -> Option<Bite> {
        (0..OBSERVERS).find_map(|i| {
            let observer = (from + i) % OBSERVERS;
            let mut state = self.observers[observer].lock();
            let (first, until) = state.ahead?;
            let end = until.min(first.saturating_add(pages));
            state.ahead = (end < until).then_some((end, until));
            Some(Bite {
                observer,
                first,
                end,
            })
        })
    }

    /// What follows the bite is not read ahead.
    pub(crate) fn give_up(&self, bite: &Bite) {
        self.observers[bite.observer].lock().ahead = None;
    }

    /// Has the device begin to read.
    pub(crate) fn announce(&self, page: u64, count: u64) {
        self.file.ahead(self.index(page), count);
    }
}

impl Bite {
    /// The observer whose turn is after this one's.
    pub(crate) fn next_turn(&self) -> usize {
        (self.observer + 1) % OBSERVERS
    }
}
