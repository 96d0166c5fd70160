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
    prelude::*,
    types::Opaque, //
};

/// A sparse array of boxes.
///
/// # Invariants
///
/// Every entry of the xarray is a `KBox<T>`'s pointer, and owned by the tree. The xarray's nodes point
/// back at it, so it stays in its box.
pub(crate) struct Tree<T: Send + Sync + 'static> {
    xa: Pin<KBox<Opaque<bindings::xarray>>>,
    _entries: PhantomData<KBox<T>>,
}

// SAFETY: The tree owns its entries, which are `Send`; the xarray has a lock of its own.
unsafe impl<T: Send + Sync + 'static> Send for Tree<T> {}
// SAFETY: Sharing a tree shares entries for reading, which are `Sync`, and lets others add: they are
// `Send`.
unsafe impl<T: Send + Sync + 'static> Sync for Tree<T> {}

impl<T: Send + Sync + 'static> Tree<T> {
    /// An empty tree.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: `slot` is valid memory for an xarray.
        let init = Opaque::ffi_init(|slot| unsafe { c::kdp_xa_init(slot) });
        Ok(Self {
            xa: KBox::pin_init(init, GFP_KERNEL)?,
            _entries: PhantomData,
        })
    }

    /// Whether there is no entry. One that is added just now may be missed.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // SAFETY: The xarray is valid. Others may write its head meanwhile, as one word: like xa_empty() this reads it
        // once.
        unsafe { (&raw const (*self.xa.get()).xa_head).read_volatile() }.is_null()
    }

    /// The entry at `index`.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        if self.is_empty() {
            return None;
        }
        // SAFETY: The xarray is valid; xa_load() needs no lock.
        let raw = unsafe { bindings::xa_load(self.xa.get(), index) };
        // SAFETY: An entry is a box (type invariant), and removing it takes `&mut self`, which nobody
        // has during the borrow.
        (!raw.is_null()).then(|| unsafe { &*raw.cast::<T>() })
    }

    /// The entry at `index`, to be changed.
    pub(crate) fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        // SAFETY: As in `get()`.
        let raw = unsafe { bindings::xa_load(self.xa.get(), index) };
        // SAFETY: As in `get()`, and the tree is borrowed exclusively.
        (!raw.is_null()).then(|| unsafe { &mut *raw.cast::<T>() })
    }

    /// Adds an entry at `index`, unless there is one: then `entry` is dropped.
    pub(crate) fn insert(&self, index: usize, entry: KBox<T>) -> Result {
        const { assert!(align_of::<T>() >= 4 && size_of::<T>() > 0) };
        let raw = KBox::into_raw(entry);
        // SAFETY: The xarray is valid and takes pointers that are aligned to 4 bytes.
        let old =
            unsafe { c::kdp_xa_cmpxchg(self.xa.get(), index, core::ptr::null_mut(), raw.cast()) };
        if old.is_null() {
            return Ok(());
        }
        // SAFETY: Another entry is there, or none could be stored: `raw` was not taken.
        drop(unsafe { KBox::from_raw(raw) });
        // SAFETY: `old` is what xa_cmpxchg() returned.
        to_result(unsafe { bindings::xa_err(old) })
    }

    /// Takes the entry at `index` out.
    pub(crate) fn remove(&mut self, index: usize) -> Option<KBox<T>> {
        // SAFETY: The xarray is valid.
        let raw = unsafe { bindings::xa_erase(self.xa.get(), index) };
        // SAFETY: The entry is a box (type invariant) and no longer in the tree.
        (!raw.is_null()).then(|| unsafe { KBox::from_raw(raw.cast()) })
    }

    /// The index of the first entry that is not below `from` and not above `last`.
    pub(crate) fn next(&self, from: usize, last: usize) -> Option<usize> {
        let mut index = from;
        // SAFETY: The xarray is valid, `index` a place for the answer.
        let raw =
            unsafe { bindings::xa_find(self.xa.get(), &mut index, last, bindings::XA_PRESENT) };
        (!raw.is_null()).then_some(index)
    }

    /// Drops all entries.
    pub(crate) fn clear(&mut self) {
        while let Some(index) = self.next(0, usize::MAX) {
            drop(self.remove(index));
        }
    }
}

impl<T: Send + Sync + 'static> Drop for Tree<T> {
    fn drop(&mut self) {
        self.clear();
        // SAFETY: The xarray is valid, and nobody uses it any more.
        unsafe { bindings::xa_destroy(self.xa.get()) };
    }
}
