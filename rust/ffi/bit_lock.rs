// SPDX-License-Identifier: GPL-2.0

//! Locks of one bit each, for things too many to have a lock of their own.
//!
//! C header: `include/linux/wait_bit.h`.

use super::{
    c,
    shared_page::SharedPage, //
};
use crate::rules::range::{
    CHUNK_PAGES,
    WORD_PAGES, //
};
use kernel::prelude::*;

/// As many locks as a page has bits. Things share them by number: hold one at a time.
pub(crate) struct BitLocks(SharedPage);

impl BitLocks {
    pub(crate) fn new() -> Result<Self> {
        SharedPage::new(false).map(Self)
    }

    #[inline]
    fn locate(&self, thing: u64) -> (*mut usize, i32) {
        let at = thing % CHUNK_PAGES;
        let word = self.0.words()[(at / WORD_PAGES) as usize].as_ptr();
        (word, (at % WORD_PAGES) as i32)
    }

    /// Waits for the lock of a thing. May sleep.
    #[inline]
    pub(crate) fn lock(&self, thing: u64) -> BitGuard<'_> {
        let (word, bit) = self.locate(thing);
        // SAFETY: `word` is a valid word, which is accessed by atomic operations only.
        unsafe { c::kdp_bit_lock(word, bit) };
        // INVARIANT: The lock was just taken.
        BitGuard {
            word,
            bit,
            _locks: self,
        }
    }

    /// Takes the lock of a thing, if it is free.
    pub(crate) fn try_lock(&self, thing: u64) -> Option<BitGuard<'_>> {
        let (word, bit) = self.locate(thing);
        // SAFETY: As in `lock()`.
        let taken = unsafe { c::kdp_bit_trylock(word, bit) };
        // INVARIANT: The lock was just taken.
        taken.then(|| BitGuard {
            word,
            bit,
            _locks: self,
        })
    }
}

/// A lock that is held.
///
/// # Invariants
///
/// The bit is set, and this guard alone clears it.
pub(crate) struct BitGuard<'a> {
    word: *mut usize,
    bit: i32,
    _locks: &'a BitLocks,
}

impl Drop for BitGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: The word is valid as long as the locks are borrowed; the lock is held (type invariant).
        unsafe { c::kdp_bit_unlock(self.word, self.bit) };
    }
}
