//! No paging at all: what a guest costs that finds everything in place.

use std::sync::Arc;

use kvm_demand_paging::{AliasMap, Backing, Memfd, PageRange};

use super::{Counters, Pager};
use crate::error::Result;
use crate::memory::{populate, GuestMemory};
use crate::source::Source;

pub(super) struct Floor {
    memory: Arc<AliasMap>,
    counters: Counters,
}

/// How many pages are copied at a time.
const CHUNK: u64 = 256;

impl Floor {
    pub(super) fn new(backing: Backing, bytes: u64, source: &dyn Source) -> Result<Self> {
        let memory = Memfd::create("kdp-vmm-guest", backing, bytes)?.map_all()?;
        populate(&memory)?;
        for first in (0..memory.pages()).step_by(CHUNK as usize) {
            let range = PageRange::new(first, CHUNK.min(memory.pages() - first));
            source.fetch(range, &memory.slice(range)?)?;
        }
        Ok(Self {
            memory: Arc::new(memory),
            counters: Counters::default(),
        })
    }
}

impl Pager for Floor {
    fn guest(&self) -> GuestMemory {
        GuestMemory::Plain(self.memory.clone())
    }

    fn alias(&self) -> &AliasMap {
        &self.memory
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
}
