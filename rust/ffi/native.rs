// SPDX-License-Identifier: GPL-2.0

//! Pages of a shmem memfd as ordinary memory: refcounted, in the rmap, not pinned.
//!
//! C source: native.c, on `mm/shmem.c` and `mm/memory.c`.

use super::{
    c,
    memfd::{
        Memfd,
        Pfn, //
    },
    vma::{
        Fault,
        Outcome, //
    }, //
};
use core::{
    mem::forget,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    error::from_err_ptr,
    prelude::*, //
};

/// A memory cgroup.
///
/// # Invariants
///
/// Holds a reference, or is null where the kernel has none.
pub(crate) struct Memcg(*mut bindings::mem_cgroup);

// SAFETY: A memory cgroup may be used and put by any thread.
unsafe impl Send for Memcg {}
// SAFETY: As above.
unsafe impl Sync for Memcg {}

impl Memcg {
    /// That of the current process.
    pub(crate) fn current() -> Self {
        // SAFETY: Always safe to call in a process's context.
        // INVARIANT: It returns with a reference taken.
        Self(unsafe { c::kdp_current_memcg_get() })
    }
}

impl Drop for Memcg {
    fn drop(&mut self) {
        // SAFETY: The reference is ours (type invariant) and not used again.
        unsafe { c::kdp_memcg_put(self.0) };
    }
}

/// A page of a memfd that is in the page cache and stays there.
///
/// # Invariants
///
/// Holds the lock of the page's folio, and a reference on it. The folio is of a memfd of shmem, and
/// up to date.
pub(crate) struct CachedPage(NonNull<bindings::page>);

impl CachedPage {
    /// # Safety
    ///
    /// `page` is what `kdp_native_find()` or `kdp_native_get()` returned for a memfd of shmem.
    unsafe fn from_raw(page: *mut bindings::page) -> Result<Self> {
        // INVARIANT: By the caller's promise, unless it is an error.
        NonNull::new(from_err_ptr(page)?).map(Self).ok_or(ENOENT)
    }

    /// The page at `index` of a memfd of shmem, if the page cache has it. ENOENT if it is a hole, or
    /// nobody has written to it; EBUSY if it was swapped out; EAGAIN if another thread has its lock
    /// and `wait` is false; EHWPOISON if it has a memory error.
    #[inline]
    pub(crate) fn find(memfd: &Memfd, index: u64, wait: bool) -> Result<Self> {
        // SAFETY: The file is a valid memfd, of shmem, as the caller says.
        unsafe {
            Self::from_raw(c::kdp_native_find(
                memfd.file().as_ptr(),
                index as usize,
                wait,
            ))
        }
    }

    /// Returns the page at `index` of a memfd of shmem. Allocates a hole, and reads what was swapped
    /// out. May sleep.
    /// The current process pays, or `owner` for a kernel thread.
    pub(crate) fn get(memfd: &Memfd, index: u64, owner: &Memcg) -> Result<Self> {
        // SAFETY: As in `find()`; the memory cgroup is valid, or null.
        unsafe {
            Self::from_raw(c::kdp_native_get(
                memfd.file().as_ptr(),
                index as usize,
                owner.0,
            ))
        }
    }

    /// The page's frame, as long as this is borrowed.
    #[inline]
    pub(crate) fn frame(&self) -> Pfn<'_> {
        // SAFETY: The folio is locked and in the page cache (type invariant), so it is not freed.
        unsafe { Pfn::of_page(self.0.as_ptr()) }
    }

    /// The page's bytes were written by us.
    pub(crate) fn written(&self) {
        // SAFETY: The folio is locked (type invariant).
        unsafe { c::kdp_native_dirty(self.0.as_ptr()) };
    }
}

impl Drop for CachedPage {
    fn drop(&mut self) {
        // SAFETY: The lock and the reference are ours (type invariant) and not used again.
        unsafe { c::kdp_native_put(self.0.as_ptr()) };
    }
}

impl Fault<'_> {
    /// A kernel thread asks for the page on behalf of a process, which may be waiting for its answer
    /// when it is killed.
    pub(crate) fn is_in_kthread(&self) -> bool {
        // SAFETY: The fault is being handled.
        unsafe { c::kdp_fault_is_in_kthread(self.raw()) }
    }

    /// Whether a kworker makes this fault for another process, by get_user_pages(), and the kernel
    /// would copy the page to a private one.
    ///
    /// KVM's asynchronous page faults ask for write access to every page (async_pf_execute() in
    /// virt/kvm/async_pf.c).
    pub(crate) fn copies_in_kworker(&self) -> bool {
        // SAFETY: The fault is being handled.
        self.makes_private() && unsafe { c::kdp_fault_is_in_kworker(self.raw()) }
    }

    /// Maps the page where the fault is, and then calls `around` to map its neighbours. If the
    /// access makes a private copy, hands the page to the kernel instead, which copies it.
    #[inline]
    pub(crate) fn insert_cached(
        &self,
        page: CachedPage,
        around: impl FnOnce(&CachedPage),
    ) -> Outcome {
        if self.makes_private() {
            let raw = page.0.as_ptr();
            // The lock and the reference are the kernel's from here on.
            forget(page);
            // SAFETY: The fault is being handled; the page is locked, with a reference.
            unsafe { c::kdp_native_copy_from(self.raw(), raw) };
            return Outcome::Page;
        }
        // SAFETY: The fault is being handled; the page is locked, with a reference, which the entry
        // does not take over.
        let result = unsafe { c::kdp_native_insert(self.raw(), page.0.as_ptr()) };
        let outcome = Outcome::from_insert(result);
        if outcome == Outcome::Mapped {
            around(&page);
        }
        outcome
    }

    /// Maps those of pages `first` to `last` of the memslot that the page cache has, where nothing
    /// is mapped. Skips pages outside the fault's page table. `page` is the fault's own page.
    ///
    /// The caller's lock must keep all these pages present.
    pub(crate) fn insert_around(&self, page: &CachedPage, first: u64, last: u64) {
        let [first, last] = [first, last].map(|page| (self.base() + page) as usize);
        // SAFETY: The fault is being handled; the page is locked, with a reference.
        unsafe { c::kdp_native_insert_around(self.raw(), page.0.as_ptr(), first, last) };
    }

    /// Maps the block around the fault, if the page's folio is one. Nobody may map a single page
    /// there meanwhile: the caller's lock ensures that.
    pub(crate) fn insert_cached_block(&self, page: &CachedPage) -> Outcome {
        // SAFETY: As in `insert_cached()`. `raw` names a PMD, as in `insert_block()`.
        Outcome::from_insert(unsafe { c::kdp_native_insert_block(self.raw(), page.0.as_ptr()) })
    }
}
