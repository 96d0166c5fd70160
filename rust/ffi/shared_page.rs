// SPDX-License-Identifier: GPL-2.0

//! A page of bits that the kernel and userspace change at the same time.

use super::c;
use crate::rules::{
    bits::Word,
    range::CHUNK_WORDS, //
};
use kernel::{
    page::Page,
    prelude::*,
    sync::atomic::{
        Acquire,
        Atomic,
        Relaxed,
        Release, //
    }, //
};

/// A word of a [`SharedPage`].
#[repr(transparent)]
pub(crate) struct SharedWord(Atomic<u64>);

impl SharedWord {
    /// The word, for the kernel's own atomic bit operations.
    pub(super) fn as_ptr(&self) -> *mut usize {
        self.0.as_ptr().cast()
    }

    fn update(&self, new: impl Fn(u64) -> u64) -> u64 {
        let mut old = self.0.load(Relaxed);
        // Release: pairs with the acquire of `load_acquire()` in a fault, and with userspace's own.
        while let Err(now) = self.0.cmpxchg(old, new(old), Release) {
            old = now;
        }
        old
    }
}

impl Word for SharedWord {
    #[inline]
    fn load_acquire(&self) -> u64 {
        // Acquire: whoever sees a bit sees the bytes that were written before it was set.
        self.0.load(Acquire)
    }

    fn set_release(&self, mask: u64) -> u64 {
        self.update(|old| old | mask)
    }

    fn clear(&self, mask: u64) -> u64 {
        self.update(|old| old & !mask)
    }
}

/// One page of words.
///
/// # Invariants
///
/// `words` is the page's address in the kernel, valid as long as the page is.
pub(crate) struct SharedPage {
    page: Page,
    words: core::ptr::NonNull<[SharedWord; CHUNK_WORDS]>,
}

// SAFETY: The page is owned, and its words are only accessed by atomic operations.
unsafe impl Send for SharedPage {}
// SAFETY: As above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// A page whose bits are all `value`.
    pub(crate) fn new(value: bool) -> Result<Self> {
        let page = Page::alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO)?;
        // SAFETY: The page was just allocated without __GFP_HIGHMEM, so it has a kernel address.
        let words = unsafe { c::kdp_page_words(page.as_ptr()) };
        let words = core::ptr::NonNull::new(words.cast()).ok_or(ENOMEM)?;
        // INVARIANT: `words` is the address of the page that moves in here.
        let this = Self { page, words };
        if value {
            for word in this.words() {
                word.set_release(u64::MAX);
            }
        }
        Ok(this)
    }

    /// The words.
    #[inline]
    pub(crate) fn words(&self) -> &[SharedWord; CHUNK_WORDS] {
        // SAFETY: `words` is valid as long as `self` (type invariant); userspace changes the memory
        // at any time, which atomics allow.
        unsafe { self.words.as_ref() }
    }

    /// The page, to map it.
    pub(crate) fn page(&self) -> &Page {
        &self.page
    }
}
