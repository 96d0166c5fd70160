// SPDX-License-Identifier: GPL-2.0

//! Memory mappings of a file of ours, and the faults in them.
//!
//! C headers: `include/linux/mm.h`, `include/linux/huge_mm.h`.

use super::{
    c,
    file::RawFile,
    memfd::{
        Frames,
        Memfd,
        Pfn, //
    }, //
};
use core::marker::PhantomData;
use kernel::{
    bindings,
    ffi::c_uint,
    mm::{
        virt::{
            flags,
            VmaNew,
            VmaRef, //
        },
        Mm, //
    },
    page::{
        Page,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::ArcBorrow,
};

/// What a fault comes to, as the kernel is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Outcome {
    /// A page table entry is there.
    Mapped = bindings::vm_fault_reason_VM_FAULT_NOPAGE,
    /// Try again; the fault's lock was dropped, or the fault must not sleep (FAULT_FLAG_RETRY_NOWAIT).
    Retry = bindings::vm_fault_reason_VM_FAULT_RETRY,
    /// A page table entry may be there, the caller looks; the fault's lock was dropped.
    MappedUnlocked =
        bindings::vm_fault_reason_VM_FAULT_NOPAGE | bindings::vm_fault_reason_VM_FAULT_COMPLETED,
    /// A locked page with a reference is in the fault, to be copied.
    Page = bindings::vm_fault_reason_VM_FAULT_LOCKED,
    /// A smaller page, please.
    Fallback = bindings::vm_fault_reason_VM_FAULT_FALLBACK,
    /// SIGBUS, or EFAULT in the kernel.
    Fail = bindings::vm_fault_reason_VM_FAULT_SIGBUS,
    /// SIGBUS as for a memory error of the page, or EFAULT in the kernel.
    Poisoned = bindings::vm_fault_reason_VM_FAULT_HWPOISON,
    /// No memory for page tables.
    OutOfMemory = bindings::vm_fault_reason_VM_FAULT_OOM,
}

impl Outcome {
    #[inline(always)]
    fn into_raw(self) -> bindings::vm_fault_t {
        self as bindings::vm_fault_t
    }

    pub(super) fn from_insert(raw: bindings::vm_fault_t) -> Self {
        use bindings::*;
        if raw & vm_fault_reason_VM_FAULT_NOPAGE != 0 {
            Outcome::Mapped
        } else if raw & vm_fault_reason_VM_FAULT_OOM != 0 {
            Outcome::OutOfMemory
        } else if raw & vm_fault_reason_VM_FAULT_FALLBACK != 0 {
            Outcome::Fallback
        } else {
            Outcome::Fail
        }
    }
}

/// A fault that is being handled.
///
/// # Invariants
///
/// `raw` is the argument of a running fault handler, whose lock is held.
pub(crate) struct Fault<'a> {
    raw: *mut bindings::vm_fault,
    /// Where the memslot begins in the file of the area, in pages.
    base: u64,
    /// In native memory.
    native: bool,
    _fault: PhantomData<&'a bindings::vm_fault>,
}

impl Fault<'_> {
    /// What C declares as constant: the area and the address.
    #[inline]
    fn info(&self) -> &bindings::vm_fault__bindgen_ty_1 {
        // SAFETY: The fault is being handled (type invariant), and nobody writes to these fields meanwhile.
        unsafe { &(*self.raw).__bindgen_anon_1 }
    }

    pub(super) fn raw(&self) -> *mut bindings::vm_fault {
        self.raw
    }

    /// The page of the memslot, or of its bitmap.
    #[inline]
    pub(crate) fn pgoff(&self) -> u64 {
        (self.info().pgoff as u64).wrapping_sub(self.base)
    }

    /// Where the memslot begins in the file of the area, in pages.
    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// It is in native memory: get_user_pages() comes here for KVM, too.
    #[inline]
    pub(crate) fn is_native(&self) -> bool {
        self.native
    }

    /// The area is MAP_SHARED.
    pub(super) fn is_shared(&self) -> bool {
        // SAFETY: The area is valid.
        unsafe { c::kdp_vma_is_shared(self.info().vma) }
    }

    /// The page is to be copied to a private one.
    #[inline]
    pub(super) fn makes_private(&self) -> bool {
        // SAFETY: The fault is being handled (type invariant).
        unsafe { !(*self.raw).cow_page.is_null() }
    }

    /// A block that is written is to be private.
    pub(crate) fn writes_private(&self) -> bool {
        self.is_write() && !self.is_shared()
    }

    #[inline]
    fn flags(&self) -> bindings::fault_flag {
        // SAFETY: The fault is being handled (type invariant); its flags stay as they are meanwhile.
        unsafe { (*self.raw).flags }
    }

    #[inline]
    fn has(&self, flag: bindings::fault_flag) -> bool {
        self.flags() & flag != 0
    }

    /// It is retried: its lock was dropped before.
    #[inline]
    pub(crate) fn is_retried(&self) -> bool {
        self.has(bindings::fault_flag_FAULT_FLAG_TRIED)
    }

    /// It is a write.
    pub(crate) fn is_write(&self) -> bool {
        self.has(bindings::fault_flag_FAULT_FLAG_WRITE)
    }

    /// It is an instruction fetch.
    pub(crate) fn is_exec(&self) -> bool {
        self.has(bindings::fault_flag_FAULT_FLAG_INSTRUCTION)
    }

    /// It comes from user mode.
    pub(crate) fn is_user(&self) -> bool {
        self.has(bindings::fault_flag_FAULT_FLAG_USER)
    }

    /// Any signal may end a wait.
    pub(crate) fn is_interruptible(&self) -> bool {
        self.has(bindings::fault_flag_FAULT_FLAG_INTERRUPTIBLE)
    }

    /// A fatal signal may end a wait.
    pub(crate) fn is_killable(&self) -> bool {
        self.has(bindings::fault_flag_FAULT_FLAG_KILLABLE)
    }

    /// The lock may be dropped, and the fault retried.
    pub(crate) fn may_retry(&self) -> bool {
        self.has(bindings::fault_flag_FAULT_FLAG_ALLOW_RETRY)
    }

    /// It must not sleep.
    pub(crate) fn no_wait(&self) -> bool {
        self.has(bindings::fault_flag_FAULT_FLAG_RETRY_NOWAIT)
    }

    /// The address, rounded down to a page.
    #[inline]
    pub(super) fn address(&self) -> usize {
        self.info().address & !(PAGE_SIZE - 1)
    }

    /// The mapped file, if the fault is in the current thread's own address space.
    pub(super) fn file_if_own(&self) -> Option<RawFile> {
        // SAFETY: The fault's lock keeps the area valid (type invariant), and the area its file.
        unsafe {
            let vma = self.info().vma;
            ((*vma).vm_mm == c::kdp_current_mm()).then(|| RawFile::another((*vma).vm_file))?
        }
    }

    /// Whether the area may hold huge entries, and the current thread is going back to user mode.
    pub(super) fn may_be_huge_on_return(&self) -> bool {
        // SAFETY: The fault's lock keeps the area valid (type invariant).
        unsafe { c::kdp_current_returns_to_user() && c::kdp_vma_may_be_huge(self.info().vma) }
    }

    fn vma(&self) -> &VmaRef {
        // SAFETY: The fault's lock keeps the area valid (type invariant).
        unsafe { VmaRef::from_raw(self.info().vma) }
    }

    /// Whether a block has been mapped where this fault of one page is. Then no page may be inserted:
    /// the caller's lock keeps blocks from being mapped meanwhile.
    #[inline]
    pub(crate) fn is_in_block(&self) -> bool {
        // SAFETY: The fault is being handled (type invariant).
        unsafe { c::kdp_fault_is_in_block(self.raw) }
    }

    /// Maps the page frame where the fault is.
    #[inline]
    pub(crate) fn insert_pfn(&self, pfn: Pfn<'_>) -> Outcome {
        // SAFETY: The area is valid. The frame is pinned now; the tree that it was borrowed from is
        // exclusively borrowed to unpin it, and `backing.rs` unmaps it before it does so.
        Outcome::from_insert(unsafe {
            bindings::vmf_insert_pfn(self.info().vma, self.info().address, pfn.number)
        })
    }

    /// The area's pages, first and one past the last, as pages of the memslot.
    pub(crate) fn area(&self) -> (u64, u64) {
        let into = (self.address() - self.vma().start()) / PAGE_SIZE;
        let pages = (self.vma().end() - self.vma().start()) / PAGE_SIZE;
        let first = self.pgoff() - into as u64;
        (first, first + pages as u64)
    }

    /// Where a page of the area is; none if it is outside.
    fn address_of(&self, page: u64) -> Option<usize> {
        let (first, end) = self.area();
        let inside = first <= page && page < end;
        inside.then(|| self.vma().start() + (page - first) as usize * PAGE_SIZE)
    }

    /// Whether a page near the fault's is mapped, or cannot be by the same page table.
    #[inline]
    pub(crate) fn is_mapped_near(&self, page: u64) -> bool {
        let distance = (page.wrapping_sub(self.pgoff()) as usize).wrapping_mul(PAGE_SIZE);
        // SAFETY: The fault is being handled (type invariant); any address will do.
        unsafe { c::kdp_fault_is_mapped(self.raw, self.address().wrapping_add(distance)) }
    }

    /// Maps page frames where nothing is mapped: those of pages side by side, of which `first` is the first.
    /// What lies outside the area is left out. No block is mapped there, which the caller's lock ensures.
    pub(crate) fn insert_frames(&self, first: u64, frames: &Frames<'_>) {
        let Some(last) = frames.there.checked_ilog2() else {
            return;
        };
        let from = frames.there.trailing_zeros();
        let Some(address) = self.address_of(first + u64::from(from)) else {
            return;
        };
        if self.address_of(first + u64::from(last)).is_some() {
            // SAFETY: The area is valid and holds all these addresses. Only the numbers that are there are read (type
            // invariant), and their frames are pinned, as in `insert_pfn()`.
            unsafe {
                c::kdp_insert_pfns(
                    self.info().vma,
                    address,
                    frames.numbers[from as usize..].as_ptr().cast(),
                    frames.there >> from,
                )
            };
        }
    }

    /// The first page of the block around the fault, as a page of the memslot. `None` if the block
    /// does not lie in the area, or if its address and its offset are not aligned alike.
    pub(crate) fn block(&self) -> Option<u64> {
        let size = PAGE_SIZE << PMD_ORDER;
        let start = self.info().address & !(size - 1);
        let into = (self.info().address - start) / PAGE_SIZE;
        let first = self.pgoff().checked_sub(into as u64)?;
        let aligned = first & ((1 << PMD_ORDER) - 1) == 0;
        let inside = start >= self.vma().start() && start + size <= self.vma().end();
        (aligned && inside).then_some(first)
    }

    /// Maps the block of page frames that starts at `pfn`, in a [`Mapping::huge_fault`]. Returns
    /// [`Outcome::Fallback`] if a page table or a read-only block is already mapped there.
    pub(crate) fn insert_block(&self, pfn: Pfn<'_>) -> Outcome {
        // SAFETY: The fault is being handled (type invariant).
        if !unsafe { c::kdp_fault_is_empty(self.raw) } {
            return Outcome::Fallback;
        }
        // Not for writing: insert_pmd() would warn if another thread has put a page table there
        // meanwhile. The area's own protection makes the entry writable all the same.
        // SAFETY: As in `insert_pfn()`. `raw` names a PMD: `huge_fault` makes no `Fault` of other
        // huge faults.
        Outcome::from_insert(unsafe { bindings::vmf_insert_pfn_pmd(self.raw, pfn.number, false) })
    }

    /// Maps a page of ours, refcounted, where the fault is.
    pub(crate) fn insert_page(&self, page: &Page) -> Outcome {
        let Some(vma) = self.vma().as_mixedmap_vma() else {
            return Outcome::Fail;
        };
        match vma.vm_insert_page(self.info().address, page) {
            Ok(()) => Outcome::Mapped,
            // Another thread mapped it first.
            Err(e) if e == EBUSY => Outcome::Mapped,
            Err(e) if e == ENOMEM => Outcome::OutOfMemory,
            Err(_) => Outcome::Fail,
        }
    }

    /// Drops the fault's lock: what the fault named may be gone from now on.
    pub(crate) fn release_lock(self) {
        // SAFETY: The lock is held (type invariant), and `self` ends here.
        unsafe { c::kdp_release_fault_lock(self.raw) };
    }
}

/// log2 of the pages of a block. A PMD maps a block. The module makes no larger entry, even if the
/// folio is larger.
///
/// An entry in a PUD (`vmf_insert_pfn_pud()`) is not safe in Linux 7.3:
/// - mremap() treats it as a bad page table and clears it without a TLB flush (`get_old_pud()` in
///   mm/mremap.c). The old address then still reaches the memory, even after it was unpinned.
/// - A split of the area at an address that is not aligned to a PMD treats the mapped memory as a
///   page table (`split_huge_pmd_address()` in mm/huge_memory.c), and may loop for ever.
pub(crate) const PMD_ORDER: u32 = 9;

/// Handles the faults of a kind of mapping.
pub(crate) trait Mapping: 'static {
    /// What is mapped.
    type Owner: Send + Sync + 'static;

    /// Flags of the area.
    const FLAGS: bindings::vm_flags_t;

    /// Whether blocks can be mapped by one entry.
    const HUGE: bool;

    /// Whether it is native memory.
    const NATIVE: bool = false;

    /// Where the owner begins in the area's file, in pages.
    fn base(_owner: &Self::Owner) -> u64 {
        0
    }

    /// An address space has one more area of this kind. Its mmap lock is held for writing.
    fn opened(_owner: ArcBorrow<'_, Self::Owner>, _mm: &Mm) {}

    /// A fault of one page.
    fn fault(owner: ArcBorrow<'_, Self::Owner>, fault: Fault<'_>) -> Outcome;

    /// A fault where a block of `1 << PMD_ORDER` pages could be mapped.
    fn huge_fault(_owner: ArcBorrow<'_, Self::Owner>, _fault: Fault<'_>) -> Outcome {
        Outcome::Fallback
    }
}

struct Ops<M>(PhantomData<M>);

impl<M: Mapping> Ops<M> {
    const TABLE: bindings::vm_operations_struct = bindings::vm_operations_struct {
        open: Some(Self::open),
        fault: Some(Self::fault),
        huge_fault: if M::HUGE {
            Some(Self::huge_fault)
        } else {
            None
        },
        #[cfg(CONFIG_NUMA)]
        set_policy: if M::NATIVE {
            Some(c::kdp_shmem_set_policy)
        } else {
            None
        },
        #[cfg(CONFIG_NUMA)]
        get_policy: if M::NATIVE {
            Some(c::kdp_shmem_get_policy)
        } else {
            None
        },
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// `raw` is the argument of a running fault handler of an area that [`NewMapping::install`] set up for
    /// `M`.
    #[inline]
    unsafe fn enter<'a>(raw: *mut bindings::vm_fault) -> (ArcBorrow<'a, M::Owner>, Fault<'a>) {
        // INVARIANT: By the caller's promise.
        let mut fault = Fault {
            raw,
            base: 0,
            native: M::NATIVE,
            _fault: PhantomData,
        };
        // SAFETY: The fault's lock keeps the area valid. `install()` put the owner there, from an `Arc` that the
        // area's file holds.
        let owner = unsafe {
            let owner = (*fault.info().vma).vm_private_data;
            ArcBorrow::from_raw(owner.cast::<M::Owner>())
        };
        fault.base = M::base(&owner);
        (owner, fault)
    }

    /// # Safety
    ///
    /// `vma` is an area that [`NewMapping::install`] set up for `M`, or a copy of one; its mmap lock is held.
    unsafe extern "C" fn open(vma: *mut bindings::vm_area_struct) {
        // SAFETY: By the caller's promise; `install()` put the owner there, from an `Arc` that the area's file holds.
        let (owner, mm) = unsafe {
            (
                ArcBorrow::from_raw((*vma).vm_private_data.cast::<M::Owner>()),
                Mm::from_raw((*vma).vm_mm),
            )
        };
        M::opened(owner, mm);
    }

    /// # Safety
    ///
    /// As for `enter()`.
    unsafe extern "C" fn fault(raw: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: By the caller's promise.
        let (owner, fault) = unsafe { Self::enter(raw) };
        M::fault(owner, fault).into_raw()
    }

    /// # Safety
    ///
    /// As for `enter()`.
    unsafe extern "C" fn huge_fault(
        raw: *mut bindings::vm_fault,
        order: c_uint,
    ) -> bindings::vm_fault_t {
        if order != PMD_ORDER {
            return Outcome::Fallback.into_raw();
        }
        // SAFETY: By the caller's promise.
        let (owner, fault) = unsafe { Self::enter(raw) };
        M::huge_fault(owner, fault).into_raw()
    }
}

/// A mapping of a file of type `F` that is being made.
///
/// # Invariants
///
/// The file of `vma` holds an `Arc` of `owner` until it is released, and outlives the area.
pub(crate) struct NewMapping<'a, F: Send + Sync + 'static> {
    vma: &'a VmaNew,
    owner: ArcBorrow<'a, F>,
}

impl<'a, F: Send + Sync + 'static> NewMapping<'a, F> {
    /// Wraps the arguments of an mmap handler.
    ///
    /// # Safety
    ///
    /// The file of `vma` holds an `Arc` of `owner` until it is released.
    pub(super) unsafe fn new(vma: &'a VmaNew, owner: ArcBorrow<'a, F>) -> Self {
        // INVARIANT: By the caller's promise; an area holds a reference on its file.
        Self { vma, owner }
    }

    /// Makes it a mapping of kind `M`.
    pub(crate) fn install<M: Mapping<Owner = F>>(self) {
        let raw = self.vma.as_ptr();
        let owner: *const F = &*self.owner;
        // SAFETY: The area is new, so nobody else has it. The table is static. The owner outlives the
        // area (type invariant).
        unsafe {
            c::kdp_vma_setup(raw, M::FLAGS, &Ops::<M>::TABLE, owner.cast_mut().cast());
            Ops::<M>::open(raw);
        }
    }

    /// Whether mprotect(2) may make the mapping writable: its file is open for writing, and no seal
    /// forbids it.
    pub(crate) fn may_write(&self) -> bool {
        self.vma.flags() & flags::MAYWRITE != 0
    }

    /// Prevents mprotect(2) from making the mapping writable. EPERM if it is writable already.
    pub(super) fn forbid_writing(&self) -> Result {
        self.vma.try_clear_maywrite().map_err(|_| EPERM)
    }

    /// Whether its file is one that [`Self::redirect`] gave to an area.
    pub(crate) fn is_redirected(&self, memfd: &Memfd) -> bool {
        // SAFETY: The area is valid, and has a file.
        unsafe { c::kdp_file_identity((*self.vma.as_ptr()).vm_file) == memfd.identity() }
    }

    /// Makes it a mapping of `file`, which begins with the page of number `base` of that file.
    pub(crate) fn redirect(&mut self, file: &RawFile, base: u64) {
        // SAFETY: The area is new, so nobody else has it; it takes a reference on the file.
        unsafe { c::kdp_vma_redirect(self.vma.as_ptr(), file.as_ptr(), base as usize) };
    }

    /// Whether it is MAP_SHARED.
    pub(crate) fn is_shared(&self) -> bool {
        // SAFETY: The area is valid.
        unsafe { c::kdp_vma_is_shared(self.vma.as_ptr()) }
    }

    /// Its first page, as an offset in the file.
    pub(crate) fn pgoff(&self) -> u64 {
        // SAFETY: The area is valid.
        unsafe { c::kdp_vma_pgoff(self.vma.as_ptr()) as u64 }
    }

    /// Its length in pages.
    pub(crate) fn pages(&self) -> u64 {
        ((self.vma.end() - self.vma.start()) / PAGE_SIZE) as u64
    }
}
