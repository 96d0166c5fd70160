// SPDX-License-Identifier: GPL-2.0

//! Counters, of a memslot and, summed up, of a VM.

use crate::ffi::percpu::PerCpu;
use kernel::prelude::*;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident => $key:literal,)*) => {
        #[expect(non_camel_case_types)]
        enum Index {
            $($name,)*
        }

        /// What the counters are called.
        const KEYS: [&str; [$(Index::$name),*].len()] = [$($key),*];

        impl Stats {
            $($(#[$doc])* #[inline] pub(crate) fn $name(&self) -> Counter<'_> {
                Counter { stats: self, index: Index::$name as usize }
            })*
        }
    };
}

counters! {
    /// Pages that a fault has mapped.
    faults => "faults",
    /// Blocks that a fault has mapped by one entry.
    faults_huge => "faults-huge",
    /// Times that a range was mapped anew, to be mapped by blocks.
    collapses => "collapses",
    /// Stage-2 faults that ended in an exit.
    exits => "exits",
    /// Times that a thread has waited.
    waits => "waits",
    /// Events that were read, redeliveries included.
    events_read => "events-read",
    /// Pages that a call made present.
    resolved => "resolved",
    /// Pages that a call gave their bytes.
    placed => "placed",
    /// Pages that were filled with zeros.
    zero_filled => "zero-filled",
    /// Pages that were read from a source when they were touched.
    source_reads => "source-reads",
    /// Pages that were read before they were touched.
    source_ahead => "source-ahead",
    /// Touches that a source failed.
    source_errors => "source-errors",
    /// Huge pages that were replaced by a call for this memslot.
    replaced => "replaced",
    /// Touches of poisoned pages that ended in SIGBUS or EFAULT.
    poisoned_touches => "poisoned-touches",
    /// Touches that failed.
    sigbus => "sigbus",
}

/// The counters. Every CPU has its own: all vCPUs count at every fault.
pub(crate) struct Stats(PerCpu<{ KEYS.len() }>);

impl Stats {
    pub(crate) fn new() -> Result<Self> {
        PerCpu::new().map(Self)
    }

    /// Adds what others have counted.
    pub(crate) fn add(&self, totals: &Totals) {
        for (i, n) in totals.0.iter().enumerate() {
            self.0.add(i, *n);
        }
    }

    /// What was counted.
    pub(crate) fn totals(&self) -> Totals {
        Totals(core::array::from_fn(|i| self.0.sum(i)))
    }
}

/// One counter.
pub(crate) struct Counter<'a> {
    stats: &'a Stats,
    index: usize,
}

impl Counter<'_> {
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.stats.0.add(self.index, n);
    }
}

/// What was counted, by one or by several.
pub(crate) struct Totals([u64; KEYS.len()]);

impl Totals {
    /// Adds what others have counted.
    pub(crate) fn add(&mut self, other: &Totals) {
        for (sum, n) in self.0.iter_mut().zip(other.0) {
            *sum = sum.wrapping_add(n);
        }
    }

    /// Calls `f` with the name and the value of every counter.
    pub(crate) fn for_each(&self, mut f: impl FnMut(&'static str, u64)) {
        for (key, n) in KEYS.iter().zip(self.0) {
            f(key, n);
        }
    }
}
