// SPDX-License-Identifier: GPL-2.0

//! A memslot: guest memory that is paged, and everything that changes its pages.
//!
//! # Locks
//!
//! In this order, all of them may be slept under:
//!
//! 0. `closing`: one party at a time poisons pages (memslot/poison.rs, lost.rs);
//! 1. the turn to map a range anew, then the mmap or VMA lock (ffi/remap.rs); or the latter alone, if a
//!    fault holds it;
//! 2. `changes`: at most one party changes the states of the memslot's pages, so that a page is
//!    zero-filled once and a count of changes is exact;
//! 3. `pages`: for reading, states do not become "not present" and nothing is unmapped or unpinned;
//!    for writing, no fault maps a page;
//! 4. the kernel's i_mmap lock, page table locks and MMU notifiers (KVM's mmu_lock), when unmapping;
//!    the event queue's mutex (events.rs), when a fault enters it.
//!
//! Userspace memory is not touched under 2 and 3: that could be a fault of our own. Under `listed` nothing is taken.
//!
//! # Lifetimes
//!
//! Every file of the memslot holds an `Arc` of it, every mapping holds its file. The memslot holds the
//! inode whose mapping they all hang on, and the VM. The VM's table holds the memslot through its
//! first file until the memslot is removed or the VM's last descriptor is closed. The index of memory errors
//! (memory_error.rs) holds it until then, and further on while it has files: who maps it must be told of errors.

use crate::{
    ahead,
    backing::Backing,
    fault::{
        BitmapMapping,
        MemoryMapping, //
    },
    ffi::{
        file::{
            FileOps,
            Inode, //
        },
        mm::Users,
        remap::{
            Kind,
            Remapper, //
        },
        task::is_being_killed,
        trace,
        uapi::KDP_BITMAP_OFFSET,
        vma::NewMapping, //
    },
    lost::{
        self,
        Failure,
        LostMapping, //
    },
    memory_error::Listed,
    moving::on_its_way,
    native::{
        self,
        Asked, //
    },
    pages::{
        Mode,
        Pages,
        Supply, //
    },
    path::Name,
    rules::{
        collapse::{
            blocks,
            BLOCK_PAGES, //
        },
        queue::{
            Key,
            Owner, //
        },
        range::{
            ChunkPart,
            PageRange,
            CHUNK_PAGES,
            WORD_PAGES, //
        },
        touch::State, //
    },
    source::Source,
    stats::Stats,
    vm::Vm, //
};
use kernel::{
    bindings::POLLERR,
    fs::File,
    new_mutex,
    page::PAGE_SHIFT,
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        lock::{
            mutex::MutexBackend,
            Guard, //
        },
        poll::PollTable,
        Arc,
        ArcBorrow,
        Mutex, //
    },
    uaccess::{
        UserPtr,
        UserSliceWriter, //
    },
    workqueue::{
        impl_has_work,
        new_work,
        Work, //
    }, //
};

use crate::ffi::rwsem::RwSem;

pub(crate) mod claim;
pub(crate) mod place;
mod poison;
mod replace;

/// Where the present bitmap begins in the file, in pages.
const BITMAP_PGOFF: u64 = KDP_BITMAP_OFFSET >> PAGE_SHIFT;

/// What a memslot is called and where it is.
pub(crate) struct Place {
    /// The caller's name of it.
    pub(crate) id: u32,
    /// Unique among all memslots that the VM ever had.
    pub(crate) serial: u32,
    /// The guest frame number of its first page.
    pub(crate) base_gfn: u64,
    /// Its length.
    pub(crate) nr_pages: u64,
    /// Its name under /dev/kdp, if it has one.
    pub(crate) name: Name,
}

/// How far a call got.
#[derive(Default)]
pub(crate) struct Progress {
    /// Ranges that were done wholly.
    pub(crate) done: u32,
    /// Pages whose state changed.
    pub(crate) changed: u64,
}

/// What came of a call for blocks, in pages.
#[derive(Default)]
pub(crate) struct Collapsed {
    /// In blocks that are whole.
    pub(crate) whole: u64,
    /// In blocks that lack a page.
    pub(crate) incomplete: u64,
    /// That no huge entry can map.
    pub(crate) small: u64,
    /// The first page that a block lacks.
    pub(crate) missing: Option<u64>,
}

/// The turn to change states, in a cache line of its own: each call takes it, and faults read what is beside
/// it.
#[pin_data]
#[repr(align(64))]
struct Changes {
    #[pin]
    turn: Mutex<()>,
}

impl Changes {
    fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            turn <- new_mutex!((), "kdp_changes"),
        })
    }

    fn lock(&self) -> Guard<'_, (), MutexBackend> {
        self.turn.lock()
    }
}

/// A memslot. Aligned so that its reference count, which calls change, is not beside what faults read.
#[pin_data]
#[repr(align(64))]
pub(crate) struct Memslot {
    pub(crate) vm: Arc<Vm>,
    pub(crate) place: Place,
    pub(crate) backing: Backing,
    pub(crate) stats: Stats,
    pub(crate) asked: Asked,
    /// How often ranges of native memory were mapped anew since a fault could last map a block: the
    /// host may have switched huge entries off (/sys/kernel/mm/transparent_hugepage/enabled).
    /// Relaxed: a guess that saves work.
    pub(crate) vain_collapses: Atomic<u32>,
    /// It was mapped MAP_PRIVATE. Relaxed: a mapping that comes later has no page yet.
    pub(crate) has_private: Atomic<bool>,
    inode: Inode,
    /// How many files it has. Relaxed: it is only counted, and the last one is not opened again.
    files: Atomic<u32>,
    /// Its entry in the index of memory errors, while it has files and is not removed.
    #[pin]
    listed: Mutex<Option<Listed>>,
    #[pin]
    pub(crate) remapper: Remapper,
    /// A vCPU that touches a poisoned page gets the signal that it gets elsewhere; else an exit, or EFAULT.
    pub(crate) poison_signals: bool,
    pub(crate) lost_failure: Failure,
    /// Who has areas of the memslot, if `poison_signals`.
    #[pin]
    pub(crate) users: Users,
    /// Somebody has mapped the memslot, and does not know what is lost. Relaxed: work is enqueued after it is set, which is
    /// a full barrier (test_and_set_bit() in queue_work_on()).
    pub(crate) unshown: Atomic<bool>,
    /// Shows what is lost.
    #[pin]
    showing: Work<Memslot, { lost::SHOW }>,
    /// One party at a time poisons pages.
    #[pin]
    closing: Mutex<()>,
    /// Reads ahead.
    #[pin]
    ahead: Work<Memslot, { ahead::READ }>,
    #[pin]
    changes: Changes,
    pub(crate) pages: RwSem<Pages>,
}

impl_has_work! {
    impl HasWork<Self, { ahead::READ }> for Memslot { self.ahead }
    impl HasWork<Self, { lost::SHOW }> for Memslot { self.showing }
}

impl Memslot {
    /// For a first file.
    pub(crate) fn new(
        vm: Arc<Vm>,
        place: Place,
        backing: Backing,
        inode: Inode,
        mode: Mode,
        poison_signals: bool,
    ) -> Result<Arc<Self>> {
        let pages = RwSem::new(
            Pages::new(mode)?,
            c"kdp_pages",
            kernel::static_lock_class!(),
        )?;
        let stats = Stats::new()?;
        Arc::pin_init(
            pin_init!(Self {
                vm,
                place,
                backing,
                stats,
                asked: Asked::new(),
                vain_collapses: Atomic::new(0),
                has_private: Atomic::new(false),
                inode,
                files: Atomic::new(1),
                listed <- new_mutex!(None, "kdp_listed"),
                remapper <- Remapper::new(),
                poison_signals,
                lost_failure: Failure::none(),
                users <- Users::new(),
                unshown: Atomic::new(false),
                showing <- new_work!("kdp_show"),
                closing <- new_mutex!((), "kdp_closing"),
                ahead <- new_work!("kdp_ahead"),
                changes <- Changes::new(),
                pages,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    pub(crate) fn inode(&self) -> &Inode {
        &self.inode
    }

    /// Enters it into the index of memory errors.
    pub(crate) fn list(self: &Arc<Self>) -> Result {
        let listed = Listed::new(self)?;
        *self.listed.lock() = Some(listed);
        Ok(())
    }

    fn unlist(&self) {
        let listed = self.listed.lock().take();
        drop(listed);
    }

    /// It has one more file. The caller knows that it has one.
    pub(crate) fn opened(&self) {
        self.files.fetch_add(1, Relaxed);
    }

    /// Checks a range that a caller named.
    pub(crate) fn range(&self, first: u64, count: u64) -> Option<PageRange> {
        PageRange::new(first, count, self.place.nr_pages)
    }

    fn whole(&self) -> Result<PageRange> {
        self.range(0, self.place.nr_pages).ok_or(EINVAL)
    }

    /// The key of a page in the event queue.
    pub(crate) fn key(&self, page: u64) -> Key {
        Key {
            slot: self.place.serial,
            page,
        }
    }

    fn bitmap_pages(&self) -> u64 {
        self.place.nr_pages.div_ceil(CHUNK_PAGES)
    }

    /// The chunk of the bitmap that a page of the file holds.
    pub(crate) fn bitmap_chunk(&self, pgoff: u64) -> Option<u64> {
        let chunk = pgoff.checked_sub(BITMAP_PGOFF)?;
        (chunk < self.bitmap_pages()).then_some(chunk)
    }

    fn wake(&self, first: u64, last: u64) -> u64 {
        self.vm.events.resolve(self.place.serial, first, last)
    }

    fn wake_all(&self) {
        self.wake(0, u64::MAX);
    }

    /// Makes a range present, or zero where it is absent, chunk by chunk, and lets its waiters go on.
    pub(crate) fn resolve(&self, range: PageRange, to: State, progress: &mut Progress) -> Result {
        let _changes = self.changes.lock();
        let mut first = range.first();
        for part in range.chunks() {
            if is_being_killed() {
                return Err(EINTR);
            }
            let last = first + (part.count - 1);
            let (changed, may_be_whole, claims) = self.mark(part, first, to)?;
            // A waiter that enters after this sees the state changed, under the queue's lock.
            let woken = if claims {
                self.wake_unclaimed(part)
            } else {
                self.wake(first, last)
            };
            first += part.count;
            progress.changed += changed;
            self.stats.resolved().add(changed);
            trace::resolve(
                self.place.id,
                first - part.count,
                part.count,
                changed,
                woken,
            );
            if may_be_whole {
                self.unmap_whole_blocks(first - part.count, part.count);
            }
        }
        progress.done += 1;
        Ok(())
    }

    /// Lets go on who waits for pages of a part that nobody has claimed. The caller has `changes`.
    #[cold]
    fn wake_unclaimed(&self, part: ChunkPart) -> u64 {
        let pages = self.pages.read();
        let wake = |free: ChunkPart| {
            let first = free.chunk * CHUNK_PAGES + free.first;
            self.wake(first, first + (free.count - 1))
        };
        pages.claims.free(part).map(wake).sum()
    }

    /// Marks those pages that nobody has claimed of a part that begins with page `first`; returns how many pages that
    /// changed, whether a block may be whole by it, and whether there are claims. The caller has `changes`.
    fn mark(&self, part: ChunkPart, first: u64, to: State) -> Result<(u64, bool, bool)> {
        self.settled(|pages| {
            let claims = !pages.claims.is_empty();
            match (pages.mode(), to) {
                (Mode::Removed, _) => return Err(ENOENT),
                (Mode::Off, State::Zero) => return Err(ENXIO),
                _ => (),
            }
            let change = |part| match to {
                State::Zero => pages.mark_zero(part),
                _ => pages.mark_present(part),
            };
            let changed = if claims {
                let mut sum = 0;
                for free in pages.claims.free(part) {
                    sum += change(free)?;
                }
                sum
            } else {
                change(part)?
            };
            if to == State::Zero {
                return Ok((changed, false, claims));
            }
            // A few pages: their words say "no" nearly always.
            let is_whole = |page| pages.look(page).1 == u64::MAX;
            let last = first + (part.count - 1);
            let many = part.count >= WORD_PAGES;
            let may_be_whole = changed > 0 && (many || is_whole(first) || is_whole(last));
            Ok((changed, may_be_whole, claims))
        })
    }

    /// Calls `f` while no page is being filled from a source: it may change what keeps a source from filling pages.
    fn settled<R>(&self, f: impl FnOnce(&Pages) -> R) -> R {
        let pages = self.pages.read();
        if pages.source().is_none() {
            return f(&pages);
        }
        drop(pages);
        // Who has a source does not lose it meanwhile: the caller has `changes`.
        f(&self.pages.write())
    }

    /// Pages have become present: blocks among them that are whole now are unmapped, so that the next
    /// touch finds that out. The caller has `changes`: none of them becomes absent meanwhile.
    fn unmap_whole_blocks(&self, first: u64, count: u64) {
        let (start, end) = (first & !(BLOCK_PAGES - 1), first + count);
        let end = end.next_multiple_of(BLOCK_PAGES).min(self.place.nr_pages);
        if let Some(range) = self.range(start, end - start) {
            // Not killed: that is for longer ranges than a call may leave half done.
            self.collapse_blocks(range, None);
        }
    }

    /// Unmaps the whole blocks of a range from everybody, so that the next touches map them by one entry.
    pub(crate) fn collapse(&self, range: PageRange, report: &mut Collapsed) -> Result {
        let _changes = self.changes.lock();
        let (mut first, end) = (range.first(), range.last() + 1);
        while first < end {
            if is_being_killed() {
                return Err(EINTR);
            }
            if self.pages.read().mode() == Mode::Removed {
                return Err(ENOENT);
            }
            let stop = end.min((first / CHUNK_PAGES + 1) * CHUNK_PAGES);
            let part = self.range(first, stop - first).ok_or(EINVAL)?;
            self.collapse_blocks(part, Some(report));
            first = stop;
        }
        Ok(())
    }

    /// Unmaps the blocks of a range that are whole, and may be huge; says of each what it is, if that is
    /// asked for. The caller has `changes`.
    fn collapse_blocks(&self, range: PageRange, mut report: Option<&mut Collapsed>) {
        let mut run: Option<(u64, u64)> = None;
        for (block, is_full) in blocks(range) {
            let pages = self.pages.read();
            let is_whole = is_full && pages.all_mappable(block);
            let is_huge =
                is_full && (is_whole || report.is_some()) && self.backing.may_be_block(block);
            if is_whole && is_huge {
                if let Some(report) = &mut report {
                    report.whole += block.count();
                }
                run = Some(
                    run.map_or((block.first(), block.count()), |(first, count)| {
                        (first, count + block.count())
                    }),
                );
                continue;
            }
            match &mut report {
                Some(report) if is_huge => {
                    report.incomplete += block.count();
                    let missing = report.missing.or_else(|| pages.first_missing(block));
                    report.missing = missing;
                }
                Some(report) => report.small += block.count(),
                None => (),
            }
            drop(pages);
            if let Some((first, count)) = run.take() {
                self.unmap(first, count);
            }
        }
        if let Some((first, count)) = run {
            self.unmap(first, count);
        }
    }

    /// Makes a range absent: unmapped from everybody, and its folios unpinned where nothing else
    /// needs them.
    pub(crate) fn mark_absent(&self, range: PageRange, progress: &mut Progress) -> Result {
        let _changes = self.changes.lock();
        let mut first = range.first();
        for part in range.chunks() {
            if is_being_killed() {
                return Err(EINTR);
            }
            let mut pages = self.pages.write();
            match pages.mode() {
                Mode::Removed => return Err(ENOENT),
                Mode::Off => return Err(ENXIO),
                Mode::On { .. } => progress.changed += pages.mark_absent(part)?,
            }
            if let Some(range) = self.range(first, part.count) {
                self.void_claims(&pages, range);
            }
            self.unmap(first, part.count);
            drop(pages);
            first += part.count;
        }
        self.unpin_absent(range);
        progress.done += 1;
        Ok(())
    }

    /// Unpins those folios under a range that hold nothing but absent pages, run by run.
    fn unpin_absent(&self, range: PageRange) {
        if self.backing.is_native() {
            return;
        }
        let (mut at, end) = self.backing.round_out(range);
        loop {
            let mut pages = self.pages.write();
            let Some(run) = self.absent_run(&pages, at, end) else {
                return;
            };
            // Once more: userspace may have set a bit, touched the page and cleared the bit by hand,
            // and so have the page mapped.
            self.inode.unmap(run.first(), run.count());
            self.backing.unpin(&mut pages, run);
            at = run.last() + 1;
        }
    }

    /// The next run of folios, from `at` to before `end`, that begins with a pinned one and holds
    /// nothing but absent pages. A run is at most a chunk long, or a folio.
    fn absent_run(&self, pages: &Pages, mut at: u64, end: u64) -> Option<PageRange> {
        let folio = 1 << self.backing.order();
        let absent = |at: u64| {
            self.range(at, folio)
                .is_some_and(|folio| pages.all_present(folio, false))
        };
        loop {
            at = self.backing.next_pinned(pages, at, end)?;
            if absent(at) {
                break;
            }
            at += folio;
        }
        let mut stop = at + folio;
        while stop < end && stop - at < CHUNK_PAGES && absent(stop) {
            stop += folio;
        }
        self.range(at, stop - at)
    }

    /// Switches demand paging.
    pub(crate) fn set_paging(&self, mode: Mode) -> Result {
        let whole = self.whole()?;
        let fill = mode != (Mode::On { default: false });
        let _changes = loop {
            let changes = self.changes.lock();
            if fill {
                // A page that is claimed and was zero is zero.
                self.void_claims(&self.pages.read(), whole);
            }
            match fill.then(|| self.fill_all_zero()) {
                Some(Err(e)) if e == on_its_way() => (),
                Some(Err(e)) => return Err(e),
                None | Some(Ok(())) => break changes,
            }
            drop(changes);
            self.wait_for_move();
        };
        let mut pages = self.pages.write();
        if pages.mode() == Mode::Removed {
            return Err(ENOENT);
        }
        pages.restart(mode);
        self.unmap_all();
        if mode == (Mode::On { default: false }) {
            self.backing.unpin(&mut pages, whole);
        }
        drop(pages);
        self.wake_all();
        Ok(())
    }

    /// Takes everything away from everybody. To be called once.
    pub(crate) fn remove(&self) {
        let changes = self.changes.lock();
        let mut pages = self.pages.write();
        pages.restart(Mode::Removed);
        self.unmap_all();
        if let Ok(whole) = self.whole() {
            self.backing.unpin(&mut pages, whole);
        }
        drop(pages);
        drop(changes);
        self.wake_all();
        self.unlist();
    }

    /// Names where absent pages may be read from, and which; all of them, if `ranges` names none.
    pub(crate) fn set_source(&self, source: Option<Arc<Source>>, ranges: &[PageRange]) -> Result {
        let _changes = self.changes.lock();
        let mut supply = None;
        if let Some(source) = source {
            let new = Supply::new(source, ranges.is_empty())?;
            for &range in ranges {
                if is_being_killed() {
                    return Err(EINTR);
                }
                new.add(range)?;
            }
            supply = Some(new);
        }
        let mut pages = self.pages.write();
        match pages.mode() {
            Mode::Removed => return Err(ENOENT),
            Mode::Off => return Err(ENXIO),
            Mode::On { .. } => (),
        }
        let old = pages.set_supply(supply);
        drop(pages);
        drop(old);
        self.wake_all();
        Ok(())
    }

    /// The source has these pages, too.
    pub(crate) fn add_source(&self, ranges: &[PageRange]) -> Result {
        let _changes = self.changes.lock();
        let pages = self.pages.read();
        if pages.mode() == Mode::Removed {
            return Err(ENOENT);
        }
        let supply = pages.supply().ok_or(ENXIO)?;
        let added = ranges.iter().try_for_each(|&range| {
            if is_being_killed() {
                return Err(EINTR);
            }
            supply.add(range)
        });
        drop(pages);
        self.wake_all();
        added
    }

    /// Pages have been read ahead.
    pub(crate) fn collapse_read(&self, range: PageRange) {
        let _changes = self.changes.lock();
        self.unmap_whole_blocks(range.first(), range.count());
    }

    /// Unmaps pages from everybody. May sleep.
    pub(crate) fn unmap(&self, first: u64, count: u64) {
        if self.backing.is_native() {
            let memfd = self.backing.memfd();
            let first = self.backing.offset() + first;
            memfd.unmap(first, count);
            if self.has_private.load(Relaxed) {
                memfd.settle(first, count);
            }
        } else {
            self.inode.unmap(first, count);
        }
    }

    fn unmap_all(&self) {
        self.unmap(0, self.place.nr_pages);
        self.inode.unmap(BITMAP_PGOFF, self.bitmap_pages());
    }

    /// Fills a page that is in the state zero, once.
    pub(crate) fn fill_zero(&self, page: u64) -> Result {
        let _changes = self.changes.lock();
        self.fill_zero_locked(page)
    }

    /// Fills all that are: they are going to be present, and the memfd may hold anything there.
    fn fill_all_zero(&self) -> Result {
        let mut from = 0;
        loop {
            if is_being_killed() {
                return Err(EINTR);
            }
            let next = self.pages.read().next_zero(from);
            let Some(page) = next else { return Ok(()) };
            self.fill_zero_locked(page)?;
            from = page + 1;
        }
    }

    /// The caller has `changes`.
    fn fill_zero_locked(&self, page: u64) -> Result {
        let pages = self.pages.read();
        if !pages.is_zero(page) {
            return Ok(());
        }
        // Nobody has the page mapped: it was absent when it became zero.
        let frame = self.backing.hold(&pages, page)?;
        frame.pfn().zero();
        frame.written();
        drop(frame);
        pages.filled(page)?;
        self.stats.zero_filled().add(1);
        Ok(())
    }
}

impl FileOps for Memslot {
    fn ioctl(_this: ArcBorrow<'_, Self>, _cmd: u32, _arg: UserPtr) -> Result<isize> {
        Err(ENOTTY)
    }

    fn read(_this: ArcBorrow<'_, Self>, _out: UserSliceWriter, _nonblock: bool) -> Result<usize> {
        Err(EINVAL)
    }

    fn poll(_this: ArcBorrow<'_, Self>, _file: &File, _table: &PollTable<'_>) -> u32 {
        POLLERR
    }

    fn mmap(this: ArcBorrow<'_, Self>, mapping: NewMapping<'_, Self>) -> Result {
        let is_memory = mapping.pgoff() < BITMAP_PGOFF;
        if is_memory && this.remapper.kind().is_none() && mapping.is_shared() {
            this.backing.memfd().check_seals(&mapping)?;
        }
        if this.backing.is_native() {
            // remap_file_pages(2) passes the file of a VMA. So does the module when it maps a range
            // again.
            let is_area = mapping.is_redirected(this.backing.memfd());
            if is_area && this.remapper.kind().is_none() {
                return Err(EINVAL);
            }
            if is_area || is_memory {
                return native::map(this, mapping);
            }
        }
        if !mapping.is_shared() {
            return Err(EINVAL);
        }
        let (base, length) = if is_memory {
            (0, this.place.nr_pages)
        } else {
            (BITMAP_PGOFF, this.bitmap_pages())
        };
        let end = (mapping.pgoff() - base).checked_add(mapping.pages());
        if end.is_none_or(|end| end > length) {
            return Err(EINVAL);
        }
        if base == BITMAP_PGOFF {
            mapping.install::<BitmapMapping>();
        } else {
            match this.remapper.kind() {
                None => {
                    mapping.install::<MemoryMapping>();
                    lost::mapped(this);
                }
                Some(Kind::Memory) => mapping.install::<MemoryMapping>(),
                Some(Kind::Lost) => mapping.install::<LostMapping>(),
            }
        }
        Ok(())
    }

    fn size(this: ArcBorrow<'_, Self>) -> u64 {
        this.place.nr_pages << PAGE_SHIFT
    }

    fn left_by(_this: ArcBorrow<'_, Self>, _reader: Owner) {}

    fn remapper(&self) -> Option<&Remapper> {
        Some(&self.remapper)
    }

    fn release(this: Arc<Self>) {
        if this.files.fetch_sub(1, Relaxed) == 1 {
            this.unlist();
        }
    }

    fn fdinfo(this: ArcBorrow<'_, Self>, m: &SeqFile) {
        let place = &this.place;
        let paging = match this.pages.read().mode() {
            Mode::Off => "off",
            Mode::On { .. } => "on",
            Mode::Removed => "removed",
        };
        seq_print!(m, "kdp-slot:\t{}\n", place.id);
        seq_print!(m, "kdp-base-gfn:\t{}\n", place.base_gfn);
        seq_print!(m, "kdp-pages:\t{}\n", place.nr_pages);
        seq_print!(m, "kdp-paging:\t{}\n", paging);
        seq_print!(m, "kdp-pinned-pages:\t{}\n", this.backing.pinned_pages());
        seq_print!(m, "kdp-name:\t{}\n", place.name);
        this.stats
            .totals()
            .for_each(|name, value| seq_print!(m, "kdp-{}:\t{}\n", name, value));
    }
}
