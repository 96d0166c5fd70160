// SPDX-License-Identifier: GPL-2.0

//! Mapping a range of a file anew, so that its page tables are freed.
//!
//! Unmapping pages empties a page table but does not free it (`zap_pte_range()` in mm/memory.c frees
//! for MADV_DONTNEED alone, which VM_PFNMAP refuses), and where there is a page table, `huge_fault` is
//! not called (`__handle_mm_fault()`). Of what drivers may call, mmap(MAP_FIXED) of the range over
//! itself frees it.
//!
//! It is done by the thread that faulted, on its way back to user mode: in its own address space, under
//! its own limits, without any lock of ours. Its request holds the mapped file, and with it the module.
//!
//! In the same way one page comes to be an area of another [`Kind`] (a [`Spot`]), in the fault itself, after its lock
//! was dropped.
//!
//! MAP_FIXED takes away whatever is there. So the file's get_unmapped_area(), which the kernel calls
//! under the mmap lock before it changes anything, looks again, and refuses unless the range is still
//! what it was.
//!
//! C headers: `include/linux/mm.h`, `include/linux/task_work.h`.

use super::{
    c,
    file::{
        borrow,
        FileOps,
        Inode,
        RawFile, //
    },
    mm::Using,
    task::current_number,
    vma::{
        Fault,
        PMD_ORDER, //
    }, //
};
use crate::rules::range::PageRange;
use kernel::{
    bindings,
    bindings::vm_flags_t,
    mm::virt::{
        flags,
        VmaRef, //
    },
    new_mutex,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        lock::{
            mutex::MutexBackend,
            Guard, //
        },
        ArcBorrow,
        Mutex, //
    }, //
};

/// Flags that an area comes to by being mapped as it is, and those that can be put back.
const KNOWN: vm_flags_t = flags::READ
    | flags::WRITE
    | flags::EXEC
    | flags::SHARED
    | flags::MAYREAD
    | flags::MAYWRITE
    | flags::MAYEXEC
    | c::KDP_VM_MAYSHARE
    | flags::PFNMAP
    | flags::MIXEDMAP
    | flags::DONTEXPAND
    | flags::DONTDUMP
    | flags::NORESERVE
    | PUT_BACK;

/// What madvise() gives and mmap() does not: MADV_DONTFORK and MADV_HUGEPAGE are QEMU's.
const PUT_BACK: vm_flags_t =
    flags::DONTCOPY | flags::HUGEPAGE | flags::NOHUGEPAGE | flags::MERGEABLE;

/// A process may have 65,530 areas (/proc/sys/vm/max_map_count). This many are left for others.
const CROWDED: i32 = 32_768;

/// A value that is not the address of a page.
const NO_TABLE: usize = usize::MAX;

/// A file whose ranges can be mapped anew.
pub(crate) trait Remap: FileOps {
    /// Decides what to map anew around a page that a fault has mapped small, and does it.
    fn remap(this: ArcBorrow<'_, Self>, spot: &Spot);
}

/// What a range of a file's memory is mapped as.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// As memory: frames that nobody may take references on (VM_PFNMAP).
    Memory,
    /// As a page that is lost: nothing is ever mapped there, and get_user_pages() asks the fault handler (VM_MIXEDMAP).
    Lost,
}

/// What one file's remappings share, in cache lines of its own.
#[pin_data]
#[repr(align(64))]
pub(crate) struct Remapper {
    /// One at a time. Taken before the mmap lock.
    #[pin]
    turn: Mutex<()>,
    /// The thread whose turn it is, while it is in vm_mmap(). That thread alone finds its own number here,
    /// and it alone reads and writes the other fields: relaxed.
    thread: Atomic<usize>,
    flags: Atomic<vm_flags_t>,
    /// The address where a page table must be, or [`NO_TABLE`] if none is required.
    table_at: Atomic<usize>,
    makes_lost: Atomic<bool>,
    /// The last request that is pending: a thread that faults many times before it goes back to user mode
    /// asks once for a block. A guess that only saves work: relaxed.
    pending: Atomic<u64>,
}

impl Remapper {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            turn <- new_mutex!((), "kdp_remap"),
            thread: Atomic::new(0),
            flags: Atomic::new(0),
            table_at: Atomic::new(NO_TABLE),
            makes_lost: Atomic::new(false),
            pending: Atomic::new(0),
        })
    }

    /// How a request of the current thread for a block is noted.
    fn note(first: u64) -> u64 {
        (current_number() as u64) << 40 ^ first
    }

    /// Whether the current thread maps a range anew.
    pub(super) fn is_ours(&self) -> bool {
        self.thread.load(Relaxed) == current_number()
    }

    /// What the area is to be that the current thread is mapping anew; none if it is its user who maps.
    pub(crate) fn kind(&self) -> Option<Kind> {
        let kind = if self.makes_lost.load(Relaxed) {
            Kind::Lost
        } else {
            Kind::Memory
        };
        self.is_ours().then_some(kind)
    }

    /// Whether the range that is about to be replaced is still what it was.
    ///
    /// # Safety
    ///
    /// The current thread [`is_ours`](Self::is_ours) and holds its mmap lock; `file` is valid.
    pub(super) unsafe fn verify(
        &self,
        file: *mut bindings::file,
        address: usize,
        bytes: usize,
        pgoff: u64,
    ) -> Result<usize> {
        let at = self.table_at.load(Relaxed);
        // SAFETY: By the caller's promise.
        let (mm, still) = unsafe {
            let mm = c::kdp_current_mm();
            (mm, areas(mm, file, address, bytes, pgoff))
        };
        let table = at == NO_TABLE
            || (address..address + bytes).contains(&at)
                // SAFETY: By the caller's promise; there is an area at that address.
                && unsafe { c::kdp_has_page_table(mm, at) };
        match still {
            Some((flags, _)) if flags == self.flags.load(Relaxed) && table => Ok(address),
            _ => Err(EAGAIN),
        }
    }

    /// Maps a range of the current thread's own address space, whose areas have these flags, anew
    /// as another kind or the same; with a `table`, an address, only if a page table stands in the
    /// way of a block there. EAGAIN if it is no longer what it was. The caller has the turn.
    fn map(
        &self,
        _turn: &Guard<'_, (), MutexBackend>,
        file: &RawFile,
        place: &Mapped,
        table: Option<usize>,
        kind: Kind,
    ) -> Result {
        self.flags.store(place.flags, Relaxed);
        self.table_at.store(table.unwrap_or(NO_TABLE), Relaxed);
        self.makes_lost.store(kind == Kind::Lost, Relaxed);
        self.thread.store(current_number(), Relaxed);
        // SAFETY: The file is valid. What is replaced is a mapping of the same pages of the same file: `verify()` sees
        // to that under the mmap lock.
        let at = unsafe {
            c::kdp_map_anew(
                file.as_ptr(),
                place.address,
                place.bytes,
                place.flags,
                place.pgoff as usize,
            )
        };
        self.thread.store(0, Relaxed);
        if at == place.address {
            Ok(())
        } else {
            Err(EAGAIN)
        }
    }

    /// Gives a new area what mmap() does not.
    ///
    /// # Safety
    ///
    /// The current thread [`is_ours`](Self::is_ours), and `vma` is a new area.
    pub(super) unsafe fn put_back(&self, vma: *mut bindings::vm_area_struct) {
        let before = self.flags.load(Relaxed);
        // The file of a native area is on another mount than the memslot's file, which may be
        // noexec. A seal may have forbidden that the old area is ever written.
        let never = !before & (flags::MAYEXEC | flags::MAYWRITE);
        // SAFETY: The area is new, so nobody else has it. It is not writable where the old one
        // never was.
        unsafe { c::kdp_vma_change_flags(vma, before & PUT_BACK, never) };
    }
}

/// Whether more areas would take them from others.
fn is_crowded(mm: *mut bindings::mm_struct) -> bool {
    // SAFETY: The address space is the current thread's.
    unsafe { c::kdp_map_count(mm) > CROWDED }
}

/// A range of the file that is mapped in the current thread's address space, in one piece, with the same flags.
struct Mapped {
    address: usize,
    bytes: usize,
    pgoff: u64,
    flags: vm_flags_t,
    /// How many areas it consists of.
    areas: usize,
}

impl Mapped {
    /// If it is.
    fn find(
        mm: *mut bindings::mm_struct,
        file: &RawFile,
        address: usize,
        bytes: usize,
        pgoff: u64,
    ) -> Option<Self> {
        // SAFETY: The address space is the current thread's, the file is valid.
        let (flags, areas) = unsafe {
            c::kdp_mmap_read_lock(mm);
            let found = areas(mm, file.as_ptr(), address, bytes, pgoff);
            c::kdp_mmap_read_unlock(mm);
            found?
        };
        Some(Self {
            address,
            bytes,
            pgoff,
            flags,
            areas,
        })
    }
}

/// Makes pages of a memslot areas of this kind wherever the current thread's address space has them as memory.
pub(crate) fn turn_all(
    _using: &Using<'_>,
    remapper: &Remapper,
    inode: &Inode,
    range: PageRange,
    kind: Kind,
) {
    // SAFETY: Always safe to call.
    let mm = unsafe { c::kdp_current_mm() };
    let mut from = 0;
    // SAFETY: The thread uses this address space.
    while let Some((file, place)) = unsafe { next_memory(mm, inode, range, from) } {
        from = place.address + place.bytes;
        if is_crowded(mm) {
            return;
        }
        let turn = remapper.turn.lock();
        // What has changed meanwhile is left to the page's own fault.
        let _ = remapper.map(&turn, &file, &place, None, kind);
    }
}

/// The first area from an address on that has some of these pages of a memslot as memory: what it has of them.
///
/// # Safety
///
/// The address space stays.
unsafe fn next_memory(
    mm: *mut bindings::mm_struct,
    inode: &Inode,
    range: PageRange,
    from: usize,
) -> Option<(RawFile, Mapped)> {
    // SAFETY: By the caller's promise; the lock keeps the areas, and they their files.
    unsafe {
        c::kdp_mmap_read_lock(mm);
        let mut at = from;
        let found = loop {
            let raw = bindings::find_vma(mm, at);
            if raw.is_null() {
                break None;
            }
            let vma = VmaRef::from_raw(raw);
            if let Some((address, pages)) = overlap(vma, inode, range, from) {
                let file = RawFile::another((*raw).vm_file);
                let pgoff = c::kdp_vma_pgoff(raw) + (address - vma.start()) / PAGE_SIZE;
                let place = Mapped {
                    address,
                    bytes: pages * PAGE_SIZE,
                    pgoff: pgoff as u64,
                    flags: vma.flags() & !flags::SOFTDIRTY,
                    areas: 1,
                };
                break file.map(|file| (file, place));
            }
            at = vma.end();
        };
        c::kdp_mmap_read_unlock(mm);
        found
    }
}

/// Where an area has some of these pages of a memslot as memory, not below an address: the address, and how many.
fn overlap(vma: &VmaRef, inode: &Inode, range: PageRange, from: usize) -> Option<(usize, usize)> {
    // SAFETY: The area is valid as long as the reference is; its file is compared only.
    let (is_ours, pgoff) = unsafe {
        (
            inode.is_of((*vma.as_ptr()).vm_file),
            c::kdp_vma_pgoff(vma.as_ptr()) as u64,
        )
    };
    let known = vma.flags() & !(KNOWN | flags::SOFTDIRTY) == 0;
    if !is_ours || !known || vma.flags() & flags::PFNMAP == 0 {
        return None;
    }
    let above = from.saturating_sub(vma.start()) / PAGE_SIZE;
    let pages = (vma.end() - vma.start()) / PAGE_SIZE;
    let first = range.first().max(pgoff + above as u64);
    let end = (range.last() + 1).min(pgoff + pages as u64);
    let count = end.checked_sub(first).filter(|&count| count > 0)?;
    Some((
        vma.start() + (first - pgoff) as usize * PAGE_SIZE,
        count as usize,
    ))
}

/// If a range consists of areas of the file with the same flags, all known: the flags, and how many
/// areas they are.
///
/// # Safety
///
/// The mmap lock of `mm` is held; `file` is valid.
unsafe fn areas(
    mm: *mut bindings::mm_struct,
    file: *mut bindings::file,
    address: usize,
    bytes: usize,
    pgoff: u64,
) -> Option<(vm_flags_t, usize)> {
    let end = address.checked_add(bytes)?;
    let mut at = address;
    let mut found: Option<(vm_flags_t, usize)> = None;
    while at < end {
        // SAFETY: The lock is held, by the caller's promise.
        let raw = unsafe { bindings::find_vma(mm, at) };
        if raw.is_null() {
            return None;
        }
        // SAFETY: The lock keeps the area valid. Its file is compared only.
        let (vma, is_ours, first) = unsafe {
            (
                VmaRef::from_raw(raw),
                (*raw).vm_file == file,
                c::kdp_vma_pgoff(raw),
            )
        };
        if !is_ours || vma.start() > at {
            return None;
        }
        let here = first as u64 + ((at - vma.start()) >> PAGE_SHIFT) as u64;
        if here != pgoff + ((at - address) >> PAGE_SHIFT) as u64 {
            return None;
        }
        let flags = vma.flags() & !flags::SOFTDIRTY;
        match &mut found {
            None if flags & !KNOWN == 0 => found = Some((flags, 1)),
            Some((same, n)) if *same == flags => *n += 1,
            _ => return None,
        }
        at = vma.end();
    }
    found
}

/// A fault that asked for its surroundings to be mapped anew.
///
/// # Invariants
///
/// `head` is queued with the thread that faulted, or its callback runs.
#[repr(C)]
struct Request {
    head: bindings::callback_head,
    spot: Spot,
}

/// Has [`Remap::remap`] called when the current thread goes back to user mode, if the fault is of its own
/// address space, in a shared mapping, and a page table stands where a block could be mapped.
pub(crate) fn request<F: Remap>(remapper: &Remapper, fault: &Fault<'_>) {
    let note = Remapper::note(fault.pgoff() >> PMD_ORDER);
    if remapper.pending.load(Relaxed) == note {
        return;
    }
    if !fault.is_shared() || !fault.may_be_huge_on_return() {
        return;
    }
    let Some(spot) = Spot::of(fault) else {
        return;
    };
    let request = Request {
        head: bindings::callback_head {
            next: core::ptr::null_mut(),
            func: Some(on_return::<F>),
        },
        spot,
    };
    // Without memory, the next fault asks again.
    let Ok(request) = KBox::new(request, GFP_KERNEL_ACCOUNT) else {
        return;
    };
    let raw = KBox::into_raw(request);
    // SAFETY: `head` is the first field of a box that is the callback's from here on.
    let refused = unsafe {
        bindings::task_work_add(
            c::kdp_current(),
            raw.cast(),
            bindings::task_work_notify_mode_TWA_RESUME,
        )
    };
    if refused != 0 {
        // SAFETY: The thread is exiting: the request was not queued.
        drop(unsafe { KBox::from_raw(raw) });
        return;
    }
    remapper.pending.store(note, Relaxed);
}

/// # Safety
///
/// `head` is that of a [`Request`] made by `request::<F>()`, which is given away; the current thread runs
/// its task work.
unsafe extern "C" fn on_return<F: Remap>(head: *mut bindings::callback_head) {
    // SAFETY: By the caller's promise; `head` is the first field.
    let request = unsafe { KBox::from_raw(head.cast::<Request>()) };
    let spot = &request.spot;
    // A thread that exits, or has called execve(), has no such address space any more.
    // SAFETY: Always safe to call; the pointer is compared only.
    if unsafe { c::kdp_current_mm() } == spot.mm {
        // SAFETY: The file is one of `F`, since the fault was in a mapping of it.
        let this = unsafe { borrow::<F>(spot.file.as_ptr()) };
        if let Some(remapper) = this.remapper() {
            remapper.pending.store(0, Relaxed);
        }
        F::remap(this, spot);
    }
}

/// A page that the current thread touched, in its own address space.
///
/// # Invariants
///
/// `mm` is the current thread's as long as it is in the fault; `on_return()` compares it before it does more.
pub(crate) struct Spot {
    file: RawFile,
    mm: *mut bindings::mm_struct,
    address: usize,
    /// The page of the memslot.
    page: u64,
    /// Where the memslot begins in the file, in pages.
    base: u64,
}

impl Spot {
    /// The place of a fault. `None` if the fault is in another address space.
    pub(crate) fn of(fault: &Fault<'_>) -> Option<Self> {
        Some(Self {
            file: fault.file_if_own()?,
            // SAFETY: Always safe to call.
            mm: unsafe { c::kdp_current_mm() },
            address: fault.address(),
            page: fault.pgoff(),
            base: fault.base(),
        })
    }

    /// The page of the memslot.
    pub(crate) fn page(&self) -> u64 {
        self.page
    }

    /// Where a range is: its address and its length in bytes.
    fn locate(&self, range: PageRange) -> Option<(usize, usize)> {
        let bytes = |pages: u64| usize::try_from(pages).ok()?.checked_mul(PAGE_SIZE);
        let before = bytes(self.page.checked_sub(range.first())?)?;
        let address = self.address.checked_sub(before)?;
        Some((address, bytes(range.count())?))
    }

    fn mapped(&self, range: PageRange) -> Option<Mapped> {
        let (address, bytes) = self.locate(range)?;
        let pgoff = self.base + range.first();
        Mapped::find(self.mm, &self.file, address, bytes, pgoff)
    }

    /// Whether all of a range around the page is mapped here in one piece, as one mmap() would.
    pub(crate) fn covers(&self, range: PageRange) -> bool {
        self.mapped(range).is_some()
    }

    /// Maps a range around the page anew. EAGAIN if it is no longer mapped as it was, or there is no
    /// page table to be freed.
    pub(crate) fn renew(&self, remapper: &Remapper, range: PageRange) -> Result {
        let turn = remapper.turn.lock();
        let place = self.mapped(range).ok_or(EAGAIN)?;
        if place.areas == 1 && is_crowded(self.mm) {
            return Err(ENOSPC);
        }
        remapper.map(&turn, &self.file, &place, Some(self.address), Kind::Memory)
    }

    /// Makes the page an area of this kind, if it is not in one yet. EAGAIN if something else is mapped there by now. No
    /// lock is held.
    pub(crate) fn turn_into(&self, remapper: &Remapper, kind: Kind) -> Result {
        let turn = remapper.turn.lock();
        let pgoff = self.base + self.page;
        let place = Mapped::find(self.mm, &self.file, self.address, PAGE_SIZE, pgoff);
        let place = place.ok_or(EAGAIN)?;
        if (place.flags & flags::MIXEDMAP != 0) == (kind == Kind::Lost) {
            return Ok(());
        }
        if kind == Kind::Lost && is_crowded(self.mm) {
            return Err(ENOSPC);
        }
        remapper.map(&turn, &self.file, &place, None, kind)
    }
}
