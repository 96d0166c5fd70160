// SPDX-License-Identifier: GPL-2.0

//! Counters of which every CPU has its own: counting writes no memory that another CPU writes.
//!
//! C header: `include/linux/percpu.h`. The `kernel` crate has no wrapper of it yet.

use super::c;
use core::num::NonZero;
use kernel::prelude::*;

/// `N` counters for each CPU.
///
/// # Invariants
///
/// `at` is what `kdp_percpu_alloc(N)` returned and is not freed.
pub(crate) struct PerCpu<const N: usize> {
    at: NonZero<usize>,
}

impl<const N: usize> PerCpu<N> {
    /// All zero.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: Always safe to call where one may sleep.
        let at = unsafe { c::kdp_percpu_alloc(N as u32) };
        // INVARIANT: Just allocated.
        let at = NonZero::new(at).ok_or(ENOMEM)?;
        Ok(Self { at })
    }

    /// Adds to counter `i`; what is subtracted is added as its two's complement. Nothing is ordered by it.
    #[inline]
    pub(crate) fn add(&self, i: usize, n: u64) {
        if i < N {
            // SAFETY: There are `N` counters (type invariant).
            unsafe { c::kdp_percpu_add(self.at.get(), i as u32, n) };
        }
    }

    /// The sum of counter `i` over all CPUs. Exact if nobody adds meanwhile.
    pub(crate) fn sum(&self, i: usize) -> u64 {
        if i >= N {
            return 0;
        }
        // SAFETY: There are `N` counters (type invariant).
        unsafe { c::kdp_percpu_sum(self.at.get(), i as u32) }
    }
}

impl<const N: usize> Drop for PerCpu<N> {
    fn drop(&mut self) {
        // SAFETY: They are allocated (type invariant) and not used again.
        unsafe { c::kdp_percpu_free(self.at.get()) };
    }
}
