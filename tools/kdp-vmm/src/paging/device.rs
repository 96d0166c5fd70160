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

use super::claims::Claims;
use super::{read_events, Counters, EndFlag, Handler, Memory, Pager};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::source::Source;
use crate::vcpu::MemoryFault;

/// Pages that are fetched at once ahead of a guest.
const RUN: u64 = 64;

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

    /// Fill pages one after the other, up or down, and stop where somebody else is at it. Returns how many are
    /// present.
    fn fill_run(&self, pages: impl Iterator<Item = u64>) -> Result<u64> {
        let (mut run, mut present) = (PageRange::new(0, 0), 0);
        for page in pages {
            let mine = self.claims.claim(page) == Some(true);
            if !mine && !self.bitmap.is_present(page) {
                break;
            }
            // Who needs one of them in the meantime waits for a run at most.
            if !mine || run.count == RUN {
                self.fill_claimed(&mut run)?;
            }
            if mine {
                run = match run.count {
                    0 => PageRange::page(page),
                    count => PageRange::new(run.first.min(page), count + 1),
                };
            }
            present += 1;
        }
        self.fill_claimed(&mut run)?;
        Ok(present)
    }

    /// Fill what was claimed.
    fn fill_claimed(&self, run: &mut PageRange) -> Result<()> {
        if !run.is_empty() {
            self.source.fetch(*run, &self.alias.slice(*run)?)?;
            self.counters.add_fetches(run.count);
            self.bitmap.set_range(*run);
            *run = PageRange::new(0, 0);
        }
        Ok(())
    }

    /// Fill what is around a page that is there; returns what of it is present.
    fn fill_around(&self, page: u64, window: PageRange) -> Result<PageRange> {
        let end = window.end().min(self.alias.pages());
        let after = self.fill_run(page + 1..end)?;
        let before = self.fill_run((window.first..page).rev())?;
        Ok(PageRange::from(page - before..page + 1 + after))
    }

    fn handle(&self, end: &EndFlag) -> Result<()> {
        let mut events = Vec::new();
        while !end.is_set() {
            read_events(&self.vm, &mut events)?;
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
    fn resolve(&self, fault: &MemoryFault, window: PageRange) -> Result<PageRange> {
        let exit = FaultExit::decode(fault.flags, fault.gpa, fault.size);
        match exit.map(|exit| exit.reason) {
            Some(Reason::Absent) => {
                let page = fault.gpa.wrapping_sub(self.gpa) / PAGE_SIZE;
                if self.fill(page)? {
                    self.bitmap.set(page);
                }
                if window.count <= 1 {
                    return Ok(window);
                }
                let base = self.gpa / PAGE_SIZE;
                let inside = window.first.max(base) - base..window.end() - base;
                let present = self.fill_around(page, inside.into())?;
                Ok(PageRange::new(base + present.first, present.count))
            }
            Some(Reason::NoMemory) => Err(Error::invalid(format!(
                "there is no memory for the page at {:#x}: on hugetlb, no free huge page",
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
            Box::new(move |end| pager.handle(end))
        };
        (0..self.readers).map(work).collect()
    }
}
