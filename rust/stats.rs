// SPDX-License-Identifier: GPL-2.0

//! Counters, of a memslot and, summed up, of a VM.

use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident => $key:literal,)*) => {
        /// The counters. They order nothing and are read one by one: relaxed.
        #[derive(Default)]
        pub(crate) struct Stats {
            $($(#[$doc])* $name: Counter,)*
        }

        impl Stats {
            $($(#[$doc])* pub(crate) fn $name(&self) -> &Counter {
                &self.$name
            })*

            /// Adds what `other` has counted.
            pub(crate) fn add(&self, other: &Stats) {
                $(self.$name.add(other.$name.get());)*
            }

            /// Calls `f` with the name and the value of every counter.
            pub(crate) fn for_each(&self, mut f: impl FnMut(&'static str, u64)) {
                $(f($key, self.$name.get());)*
            }
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
    /// Pages that were filled with zeros.
    zero_filled => "zero-filled",
    /// Pages that were read from a source when they were touched.
    source_reads => "source-reads",
    /// Pages that were read ahead.
    source_ahead => "source-ahead",
    /// Touches that a source failed.
    source_errors => "source-errors",
    /// Touches that failed.
    sigbus => "sigbus",
}

/// One counter.
pub(crate) struct Counter(Atomic<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl Counter {
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.add(n, Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}
