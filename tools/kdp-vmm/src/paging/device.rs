//! The device, with fault exits and without.
//!
//! With exits, a vCPU's thread fills the page that its guest needs and sets the page's bit; no system call
//! but KVM_RUN itself. A handler thread reads events all the same: KVM's own accesses to guest memory, and
//! those of other threads, never exit.

use std::sync::Arc;
use std::thread;

use kvm_demand_paging::{
    AliasMap, FaultExit, GuestMap, Memfd, PageRange, PresentBitmap, Reason, Vm,
};
use rustix::io::Errno;

use super::claims::Claims;
use super::{Counters, Handler, Memory, Pager, Stopper};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::source::Source;
use crate::vcpu::MemoryFault;

/// The only memslot.
const SLOT: u32 = 0;

pub(super) struct DevicePager {
    exits: bool,
    vm: Vm,
    guest: Arc<GuestMap>,
    alias: AliasMap,
    bitmap: PresentBitmap,
    claims: Claims,
    gpa: u64,
    readers: u64,
    source: Arc<dyn Source>,
    counters: Counters,
}

impl DevicePager {
    pub(super) fn new(exits: bool, memory: &Memory, source: Arc<dyn Source>) -> Result<Self> {
        let vm = Vm::open()?;
        vm.set_nonblocking(true)?;
        let memfd = Memfd::create("kdp-vmm-guest", memory.backing, memory.bytes)?;
        let memslot = vm
            .create_memslot(SLOT, &memfd)
            .base_gfn(memory.gpa / PAGE_SIZE)
            .paging(true)
            .create()?;
        let alias = memfd.map_all()?;
        memory.populate(&alias)?;
        Ok(Self {
            exits,
            guest: Arc::new(memslot.map()?),
            bitmap: memslot.bitmap()?,
            claims: Claims::new(alias.pages()),
            vm,
            alias,
            gpa: memory.gpa,
            readers: memory.readers,
            source,
            counters: Counters::default(),
        })
    }

    /// Fill the page, unless somebody else does: then wait until it is present and return false.
    fn fill(&self, page: u64) -> Result<bool> {
        let claimed = self.claims.claim(page).ok_or_else(|| {
            Error::invalid(format!(
                "page {page} of a memslot that has {}",
                self.alias.pages()
            ))
        })?;
        if claimed {
            let range = PageRange::page(page);
            self.source.fetch(range, &self.alias.slice(range)?)?;
            self.counters.add_fetch();
        } else {
            while !self.bitmap.is_present(page) {
                thread::yield_now();
            }
        }
        Ok(claimed)
    }

    /// Fill what follows a page that is there, up to `pages` in all, and stop where somebody else is at it.
    fn fill_ahead(&self, first: u64, pages: u64) -> Result<u64> {
        for page in (first + 1)..first.saturating_add(pages).min(self.alias.pages()) {
            match self.claims.claim(page) {
                Some(true) => {
                    let range = PageRange::page(page);
                    self.source.fetch(range, &self.alias.slice(range)?)?;
                    self.counters.add_fetch();
                    self.bitmap.set(page);
                }
                _ if self.bitmap.is_present(page) => {}
                _ => return Ok(page - first),
            }
        }
        Ok(pages.min(self.alias.pages() - first))
    }

    fn handle(&self, stop: &Stopper) -> Result<()> {
        let mut events = Vec::new();
        while stop.wait_for(&self.vm)? {
            events.clear();
            match self.vm.read_events(&mut events, usize::MAX) {
                Err(e) if e.errno() == Some(Errno::AGAIN.raw_os_error()) => {}
                other => {
                    other?;
                }
            }
            for event in &events {
                self.counters.add_event();
                self.fill(event.page)?;
                self.vm
                    .mark_present(event.slot_id, &[PageRange::page(event.page)])?;
            }
        }
        Ok(())
    }
}

impl Pager for DevicePager {
    fn guest(&self) -> GuestMemory {
        GuestMemory::Paged(self.guest.clone())
    }

    fn alias(&self) -> &AliasMap {
        &self.alias
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn enter_vcpu_thread(&self) -> Result<()> {
        if self.exits {
            self.vm.set_vcpu_exits(true)?;
        }
        Ok(())
    }

    #[inline]
    fn resolve(&self, fault: &MemoryFault, pages: u64) -> Result<u64> {
        let exit = FaultExit::decode(fault.flags, fault.gpa, fault.size);
        match exit.map(|exit| exit.reason) {
            Some(Reason::Absent) => {
                let page = fault.gpa.wrapping_sub(self.gpa) / PAGE_SIZE;
                if self.fill(page)? {
                    self.bitmap.set(page);
                }
                match pages {
                    0 | 1 => Ok(1),
                    _ => self.fill_ahead(page, pages),
                }
            }
            Some(Reason::NoMemory) => Err(Error::invalid(format!(
                "the page at {:#x} cannot be pinned: memory is short, or RLIMIT_MEMLOCK is reached (ulimit -l)",
                fault.gpa
            ))),
            _ => Err(Error::invalid(format!(
                "KVM_RUN returned for a reason that this VMM does not know: {fault:x?}"
            ))),
        }
    }

    fn handlers(self: Arc<Self>) -> Vec<Handler> {
        let work = |_| -> Handler {
            let pager = self.clone();
            Box::new(move |stop| pager.handle(stop))
        };
        (0..self.readers).map(work).collect()
    }
}
