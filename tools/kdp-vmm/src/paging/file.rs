//! The device, with a file that the kernel reads absent pages from by itself.
//!
//! The file is in memory, as one that was read before is. Fault exits are on, but no page needs one: KVM asks the
//! device once less for a thread that has them.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;

use kvm_demand_paging::{AliasMap, Backing, GuestMap, Memfd, Memslot, PageRange, Vm};

use super::{Counters, Memory, Pager};
use crate::error::Result;
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::source::Source;

/// How many pages are copied at a time.
const CHUNK: u64 = 256;

/// The only memslot.
const SLOT: u32 = 0;

pub(super) struct FilePager {
    vm: Vm,
    memslot: Memslot,
    guest: Arc<GuestMap>,
    alias: AliasMap,
    counters: Counters,
}

impl FilePager {
    pub(super) fn new(memory: &Memory, source: &dyn Source) -> Result<Self> {
        let vm = Vm::open()?;
        let memfd = Memfd::create("kdp-vmm-guest", memory.backing, memory.bytes)?;
        let memslot = vm
            .create_memslot(SLOT, &memfd)
            .base_gfn(memory.gpa / PAGE_SIZE)
            .paging(true)
            .create()?;
        let alias = memfd.map_all()?;
        memory.populate(&alias)?;
        let file = Memfd::create("kdp-vmm-source", Backing::Shmem, memory.bytes)?;
        let contents = file.map_all()?;
        for used in &memory.used {
            for first in (used.first..used.end()).step_by(CHUNK as usize) {
                let range = PageRange::new(first, CHUNK.min(used.end() - first));
                source.fetch(range, &contents.slice(range)?)?;
            }
        }
        vm.set_source(SLOT, &file, 0, None)?;
        Ok(Self {
            vm,
            guest: Arc::new(memslot.map()?),
            memslot,
            alias,
            counters: Counters::default(),
        })
    }

    /// Pages that the kernel has read until now, as far as it tells.
    fn pages_read(&self) -> Option<u64> {
        let fd = self.memslot.as_fd().as_raw_fd();
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
        let number = |key: &str| -> Option<u64> {
            let value = text.lines().find_map(|line| line.strip_prefix(key))?;
            value.trim().parse().ok()
        };
        Some(number("kdp-source-reads:")? + number("kdp-source-ahead:")?)
    }
}

impl Pager for FilePager {
    fn guest(&self) -> GuestMemory {
        GuestMemory::Paged(self.guest.clone())
    }

    fn alias(&self) -> &AliasMap {
        &self.alias
    }

    fn counters(&self) -> &Counters {
        if let Some(pages) = self.pages_read() {
            self.counters.fetched.store(pages, Ordering::Relaxed);
        }
        &self.counters
    }

    fn enter_vcpu_thread(&self) -> Result<()> {
        Ok(self.vm.set_vcpu_exits(true)?)
    }
}
