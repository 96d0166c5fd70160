// SPDX-License-Identifier: GPL-2.0

//! Counters that processes share, and that guests can be given.

use std::sync::atomic::AtomicU64;
use std::sync::Arc;

use kdp_vmm::GuestMemory;
use kvm_demand_paging::{AliasMap, Backing, Memfd};

use crate::check::Result;

/// Zeroed words that are never paged. Children that are forked later share them.
#[derive(Clone)]
pub struct Shared(Arc<AliasMap>);

impl Shared {
    /// At least so many words.
    pub fn new(words: usize) -> Result<Self> {
        let bytes = (words as u64 * 8).next_multiple_of(4096);
        let memfd = Memfd::create("kdp-shared", Backing::Shmem, bytes)?;
        let map = memfd.map_all()?;
        kdp_vmm::populate(&map)?;
        Ok(Self(Arc::new(map)))
    }

    /// One of them.
    pub fn at(&self, index: usize) -> &AtomicU64 {
        assert!(index * 8 < self.0.len());
        // SAFETY: the word is inside the mapping, which lives as long as the borrow, and is only
        // accessed as an atomic.
        unsafe { AtomicU64::from_ptr(self.0.as_ptr().cast::<u64>().add(index)) }
    }

    /// The same words as guest memory.
    pub fn memory(&self) -> GuestMemory {
        GuestMemory::Plain(self.0.clone())
    }
}
