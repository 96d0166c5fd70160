//! How guest memory comes to be filled: one implementation of [`Pager`] for each mode.

mod claims;
mod device;
mod floor;
mod stopper;
mod uffd;
mod uffd_sys;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use kvm_demand_paging::{AliasMap, Backing, PageRange};

pub use self::stopper::Stopper;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::source::Source;
use crate::vcpu::MemoryFault;

/// Who fills guest memory, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Everything is there before the guest starts: a plain memfd, filled.
    Floor,
    /// The device, with fault exits: the vCPU's own thread copies the page and sets its bit.
    Exit,
    /// As [`Exit`](Self::Exit), and a guest that goes through its memory in order gets pages ahead of it.
    Prefetch,
    /// The device, without exits: a handler thread reads events and marks pages present.
    Wait,
    /// userfaultfd, missing faults: a handler thread calls UFFDIO_COPY.
    UffdMissing,
    /// userfaultfd, minor faults: a handler thread copies through a second mapping and calls
    /// UFFDIO_CONTINUE.
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
            Self::UffdMissing => "uffd-missing",
            Self::UffdMinor => "uffd-minor",
        }
    }

    /// The bytes that one fault brings.
    pub fn fault_bytes(self, backing: Backing) -> u64 {
        match self {
            Self::UffdMissing | Self::UffdMinor => backing.page_size(),
            Self::Floor | Self::Exit | Self::Prefetch | Self::Wait => PAGE_SIZE,
        }
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

    /// The handler thread's work, if this mode has one.
    fn handler(self: Arc<Self>) -> Option<Handler> {
        None
    }
}

/// A handler thread's work, until it is stopped.
pub type Handler = Box<dyn FnOnce(&Stopper) -> Result<()> + Send>;

/// Memory of `bytes` bytes that is filled from `source` in this mode. `gpa` is where the guest has it.
pub fn pager(
    mode: Mode,
    backing: Backing,
    bytes: u64,
    gpa: u64,
    source: Arc<dyn Source>,
) -> Result<Arc<dyn Pager>> {
    Ok(match mode {
        Mode::Floor => Arc::new(floor::Floor::new(backing, bytes, source.as_ref())?),
        Mode::Exit | Mode::Prefetch | Mode::Wait => Arc::new(device::DevicePager::new(
            mode != Mode::Wait,
            backing,
            bytes,
            gpa,
            source,
        )?),
        Mode::UffdMissing | Mode::UffdMinor => Arc::new(uffd::UffdPager::new(
            mode == Mode::UffdMinor,
            backing,
            bytes,
            source,
        )?),
    })
}
