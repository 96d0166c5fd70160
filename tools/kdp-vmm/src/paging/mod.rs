//! How guest memory comes to be filled: one implementation of [`Pager`] for each mode.

mod claims;
mod device;
mod file;
mod floor;
mod reader;
mod uffd;
pub(crate) mod uffd_sys;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use clap::ValueEnum;
use kvm_demand_paging::{AliasMap, Backing, PageRange};

pub use self::reader::{read_events, EndFlag, ReaderThread};
use crate::error::{Error, Result};
use crate::memory::{populate_range, GuestMemory, PAGE_SIZE};
use crate::source::Source;
use crate::vcpu::MemoryFault;

/// Who fills guest memory, and when.
///
/// All that a new mode needs: a variant, its name, what a fault of it brings, and a [`Pager`] in [`pager`]. The
/// command lines and the benchmark take it from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Mode {
    /// Everything is in place before the guest starts
    Floor,
    /// The device, with fault exits: KVM_RUN returns, the vCPU's thread gets the page
    Exit,
    /// The same, and a guest that goes through its memory in order gets pages ahead of it
    #[value(name = "exit-prefetch")]
    Prefetch,
    /// The device, without exits: a handler thread reads events
    Wait,
    /// The device, which reads pages from a file by itself
    Source,
    /// userfaultfd, UFFDIO_COPY
    UffdMissing,
    /// userfaultfd, UFFDIO_CONTINUE
    UffdMinor,
}

impl Mode {
    /// The name used on command lines and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Exit => "exit",
            Self::Prefetch => "exit-prefetch",
            Self::Wait => "wait",
            Self::Source => "source",
            Self::UffdMissing => "uffd-missing",
            Self::UffdMinor => "uffd-minor",
        }
    }

    /// The bytes that one fault brings.
    pub fn fault_bytes(self, backing: Backing) -> u64 {
        match self {
            Self::UffdMissing | Self::UffdMinor => backing.page_size(),
            Self::Floor | Self::Exit | Self::Prefetch | Self::Wait | Self::Source => PAGE_SIZE,
        }
    }

    /// Do its faults go to handler threads, of which there may be several?
    pub fn has_readers(self) -> bool {
        matches!(self, Self::Wait | Self::UffdMissing | Self::UffdMinor)
    }

    /// The most pages that are fetched for one exit: a block that one huge entry maps.
    pub fn prefetch(self) -> u64 {
        match self {
            Self::Prefetch => 512,
            _ => 1,
        }
    }
}

/// What a pager did.
#[derive(Debug, Default)]
pub struct Counters {
    fetched: AtomicU64,
    events: AtomicU64,
}

impl Counters {
    /// Fetches from the source, of [`Mode::fault_bytes`] each.
    pub fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Events that a handler thread read.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    fn add_fetch(&self) {
        self.add_fetches(1);
    }

    fn add_fetches(&self, count: u64) {
        self.fetched.fetch_add(count, Ordering::Relaxed);
    }

    fn add_event(&self) {
        self.events.fetch_add(1, Ordering::Relaxed);
    }
}

/// Guest memory whose contents are elsewhere.
pub trait Pager: Send + Sync {
    /// What KVM gets.
    fn guest(&self) -> GuestMemory;

    /// The same memory as the VMM sees it: touching it pages nothing in.
    fn alias(&self) -> &AliasMap;

    /// What was done so far.
    fn counters(&self) -> &Counters;

    /// Runs on the thread of every vCPU before its first KVM_RUN.
    fn enter_vcpu_thread(&self) -> Result<()> {
        Ok(())
    }

    /// Get the page that a vCPU's KVM_RUN returned for, and then those around it that are in `window`, by guest
    /// frame numbers. Returns which of them, the page among them, are there now.
    fn resolve(&self, fault: &MemoryFault, window: PageRange) -> Result<PageRange> {
        let _ = window;
        Err(Error::invalid(format!(
            "KVM_RUN returned in a mode without fault exits: {fault:x?}"
        )))
    }

    /// The handler threads' work, if this mode has any.
    fn handlers(self: Arc<Self>) -> Vec<Handler> {
        Vec::new()
    }
}

/// A handler thread's work, until it is ended.
pub type Handler = Box<dyn FnOnce(&EndFlag) -> Result<()> + Send>;

/// The memory that a pager fills.
#[derive(Clone, Debug)]
pub struct Memory {
    /// What it is made of.
    pub backing: Backing,
    /// Its size.
    pub bytes: u64,
    /// Where the guest has it.
    pub gpa: u64,
    /// What the guest will visit at most. What a mode does before the guest runs, it does for these pages.
    pub used: Vec<PageRange>,
    /// Handler threads, in modes that have them. With several userfaultfds each has its part of the memory.
    pub readers: u64,
}

impl Memory {
    /// Memory of which the guest may visit everything, with one handler thread.
    pub fn new(backing: Backing, bytes: u64, gpa: u64) -> Self {
        Self {
            backing,
            bytes,
            gpa,
            used: vec![PageRange::new(0, bytes / PAGE_SIZE)],
            readers: 1,
        }
    }

    /// Fault in what will be used, through this mapping.
    fn populate(&self, map: &AliasMap) -> Result<()> {
        self.used
            .iter()
            .try_for_each(|&range| populate_range(map, range))
    }
}

/// Memory that is filled from `source` in this mode.
pub fn pager(mode: Mode, memory: &Memory, source: Arc<dyn Source>) -> Result<Arc<dyn Pager>> {
    Ok(match mode {
        Mode::Floor => Arc::new(floor::Floor::new(memory, source.as_ref())?),
        Mode::Exit | Mode::Prefetch | Mode::Wait => Arc::new(device::DevicePager::new(
            mode != Mode::Wait,
            memory,
            source,
        )?),
        Mode::Source => Arc::new(file::FilePager::new(memory, source.as_ref())?),
        Mode::UffdMissing | Mode::UffdMinor => Arc::new(uffd::UffdPager::new(
            mode == Mode::UffdMinor,
            memory,
            source,
        )?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_have_one_name() {
        for mode in Mode::value_variants() {
            let value = mode.to_possible_value().unwrap();
            assert_eq!(value.get_name(), mode.name());
        }
    }
}
