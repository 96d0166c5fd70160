// SPDX-License-Identifier: GPL-2.0

//! A sparse array, read without a lock: the kernel's xarray under rules that the borrow checker
//! knows.
//!
//! C header: `include/linux/xarray.h`. The `kernel` crate's wrapper takes the xarray's spinlock to
//! read; our readers are page faults of many vCPUs at once. Here an entry may be *added* through a
//! shared reference and *removed* only through an exclusive one, so a borrowed entry stays while it
//! is borrowed.

use super::c;
use core::marker::PhantomData;
use kernel::{
    bindings,
    error::to_result,
    ffi::c_void,
    prelude::*,
    types::Opaque, //
};

/// What can be an entry.
///
/// # Safety
///
/// `into_raw` returns what the xarray can store: not null and either a pointer aligned to 4 bytes or
/// the encoding of `xa_mk_value()`.
pub(crate) unsafe trait Entry: Send {
    /// An entry while it is in the tree.
    type Ref<'a>;

    /// Gives the entry to the tree.
    fn into_raw(self) -> *mut c_void;

    /// Takes the entry back.
    ///
    /// # Safety
    ///
    /// `raw` is from [`Self::into_raw`], and this is the only call for it.
    unsafe fn from_raw(raw: *mut c_void) -> Self;

    /// Looks at the entry.
    ///
    /// # Safety
    ///
    /// `raw` is from [`Self::into_raw`], and [`Self::from_raw`] is not called during `'a`.
    unsafe fn borrow<'a>(raw: *mut c_void) -> Self::Ref<'a>;
}

// SAFETY: A `KBox` of a type with alignment 4 or more is what the xarray stores; `new()` checks it.
unsafe impl<T: Send + Sync + 'static> Entry for KBox<T> {
    type Ref<'a> = &'a T;

    fn into_raw(self) -> *mut c_void {
        const { assert!(align_of::<T>() >= 4 && size_of::<T>() > 0) };
        KBox::into_raw(self).cast()
    }

    unsafe fn from_raw(raw: *mut c_void) -> Self {
        // SAFETY: By the caller's promise it is from `into_raw`, and taken back once.
        unsafe { KBox::from_raw(raw.cast()) }
    }

    unsafe fn borrow<'a>(raw: *mut c_void) -> &'a T {
        // SAFETY: By the caller's promise the box lives during `'a`, and nobody has it exclusively.
        unsafe { &*raw.cast::<T>() }
    }
}

/// A sparse array of `T`.
///
/// # Invariants
///
/// Every entry of the xarray is from [`Entry::into_raw`] and owned by the tree. The xarray's nodes
/// point back at it, so it stays in its box.
pub(crate) struct Tree<T: Entry> {
    xa: Pin<KBox<Opaque<bindings::xarray>>>,
    _entries: PhantomData<T>,
}

// SAFETY: The tree owns its entries, which are `Send`; the xarray has a lock of its own.
unsafe impl<T: Entry> Send for Tree<T> {}
// SAFETY: Sharing a tree shares entries for reading and lets others add: `T` is `Send`, and what
// `T::Ref` allows is up to `T`, whose `Entry` impl asks for `Sync` where it hands out references.
unsafe impl<T: Entry> Sync for Tree<T> {}

impl<T: Entry> Tree<T> {
    /// An empty tree.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: `slot` is valid memory for an xarray.
        let init = Opaque::ffi_init(|slot| unsafe { c::kdp_xa_init(slot) });
        Ok(Self {
            xa: KBox::pin_init(init, GFP_KERNEL)?,
            _entries: PhantomData,
        })
    }

    /// The entry at `index`.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<T::Ref<'_>> {
        // SAFETY: The xarray is valid; xa_load() needs no lock.
        let raw = unsafe { bindings::xa_load(self.xa.get(), index) };
        // SAFETY: An entry is from `into_raw` (type invariant), and removing it takes `&mut self`,
        // which nobody has during the borrow.
        (!raw.is_null()).then(|| unsafe { T::borrow(raw) })
    }

    /// Adds an entry at `index`, unless there is one: then `entry` is dropped. Says whether it was
    /// added.
    pub(crate) fn insert(&self, index: usize, entry: T) -> Result<bool> {
        let raw = entry.into_raw();
        // SAFETY: The xarray is valid and `raw` is what it can store (safety of `Entry`).
        let old = unsafe { c::kdp_xa_cmpxchg(self.xa.get(), index, core::ptr::null_mut(), raw) };
        if old.is_null() {
            return Ok(true);
        }
        // SAFETY: Another entry is there, or none could be stored: `raw` was not taken.
        drop(unsafe { T::from_raw(raw) });
        // SAFETY: `old` is what xa_cmpxchg() returned.
        to_result(unsafe { bindings::xa_err(old) }).map(|()| false)
    }

    /// Takes the entry at `index` out.
    pub(crate) fn remove(&mut self, index: usize) -> Option<T> {
        // SAFETY: The xarray is valid.
        let raw = unsafe { bindings::xa_erase(self.xa.get(), index) };
        // SAFETY: The entry is from `into_raw` (type invariant) and no longer in the tree.
        (!raw.is_null()).then(|| unsafe { T::from_raw(raw) })
    }

    /// The index of the first entry that is not below `from` and not above `last`.
    pub(crate) fn next(&self, from: usize, last: usize) -> Option<usize> {
        let mut index = from;
        // SAFETY: The xarray is valid, `index` a place for the answer.
        let raw =
            unsafe { bindings::xa_find(self.xa.get(), &mut index, last, bindings::XA_PRESENT) };
        (!raw.is_null()).then_some(index)
    }

    /// Drops the entries from `first` to `last`; returns how many there were.
    pub(crate) fn remove_range(&mut self, first: usize, last: usize) -> usize {
        let mut removed = 0;
        let mut from = first;
        while let Some(index) = self.next(from, last) {
            drop(self.remove(index));
            removed += 1;
            let Some(next) = index.checked_add(1) else {
                break;
            };
            from = next;
        }
        removed
    }
}

impl<T: Entry> Drop for Tree<T> {
    fn drop(&mut self) {
        self.remove_range(0, usize::MAX);
        // SAFETY: The xarray is valid, and nobody uses it any more.
        unsafe { bindings::xa_destroy(self.xa.get()) };
    }
}
