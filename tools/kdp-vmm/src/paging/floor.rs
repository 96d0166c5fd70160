//! No paging at all: what a guest costs that finds everything in place.

use std::sync::Arc;

use kvm_demand_paging::{AliasMap, Memfd, PageRange};

use super::{Counters, Memory, Pager};
use crate::error::Result;
use crate::memory::GuestMemory;
use crate::source::Source;

pub(super) struct Floor {
    memory: Arc<AliasMap>,
    counters: Counters,
}

/// How many pages are copied at a time.
const CHUNK: u64 = 256;

impl Floor {
    pub(super) fn new(memory: &Memory, source: &dyn Source) -> Result<Self> {
        let map = Memfd::create("kdp-vmm-guest", memory.backing, memory.bytes)?.map_all()?;
        memory.populate(&map)?;
        for used in &memory.used {
            let end = used.first + used.count;
            for first in (used.first..end).step_by(CHUNK as usize) {
                let range = PageRange::new(first, CHUNK.min(end - first));
                source.fetch(range, &map.slice(range)?)?;
            }
        }
        Ok(Self {
            memory: Arc::new(map),
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
