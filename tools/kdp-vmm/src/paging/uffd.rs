//! userfaultfd, missing and minor: what the device is compared with.

use std::sync::Arc;

use kvm_demand_paging::{AliasMap, Backing, Memfd, PageRange};

use super::uffd_sys::{Faults, Userfaultfd};
use super::{Counters, Handler, Pager, Stopper};
use crate::error::Result;
use crate::memory::{buffer, populate, GuestMemory, PAGE_SIZE};
use crate::source::Source;

pub(super) struct UffdPager {
    // First, so that it is closed before the memory that it watches is unmapped.
    uffd: Userfaultfd,
    guest: Arc<AliasMap>,
    alias: AliasMap,
    page_size: u64,
    source: Arc<dyn Source>,
    counters: Counters,
}

impl UffdPager {
    pub(super) fn new(
        minor: bool,
        backing: Backing,
        bytes: u64,
        source: Arc<dyn Source>,
    ) -> Result<Self> {
        let memfd = Memfd::create("kdp-vmm-guest", backing, bytes)?;
        let guest = Arc::new(memfd.map_all()?);
        let alias = memfd.map_all()?;
        let faults = if minor {
            // A minor fault needs a page that exists. The device's modes populate their alias likewise.
            populate(&alias)?;
            Faults::Minor
        } else {
            Faults::Missing
        };
        let uffd = Userfaultfd::new(faults)?;
        uffd.register(&guest)?;
        Ok(Self {
            uffd,
            guest,
            alias,
            page_size: backing.page_size(),
            source,
            counters: Counters::default(),
        })
    }

    fn handle(&self, stop: &Stopper) -> Result<()> {
        // Two vCPUs that fault on one page make two events. A second copy could undo what the guest wrote
        // after the first.
        let mut placed = vec![false; (self.guest.len() as u64 / self.page_size) as usize];
        let staging = buffer(self.page_size)?;
        let mut offsets = Vec::new();
        while stop.wait_for(&self.uffd)? {
            self.uffd.read_faults(&self.guest, &mut offsets)?;
            for &offset in &offsets {
                self.counters.add_event();
                let block = offset / self.page_size;
                let start = block * self.page_size;
                if std::mem::replace(&mut placed[block as usize], true) {
                    self.uffd.wake(&self.guest, start, self.page_size)?;
                } else {
                    self.place(start, &staging)?;
                    self.counters.add_fetch();
                }
            }
        }
        Ok(())
    }

    fn place(&self, offset: u64, staging: &AliasMap) -> Result<()> {
        let pages = PageRange::new(offset / PAGE_SIZE, self.page_size / PAGE_SIZE);
        if self.uffd.faults() == Faults::Minor {
            self.source.fetch(pages, &self.alias.slice(pages)?)?;
            return self.uffd.resume(&self.guest, offset, self.page_size);
        }
        if let Some(from) = self.source.direct(pages) {
            return self.uffd.copy(&self.guest, offset, &from);
        }
        self.source.fetch(pages, &staging.volatile())?;
        self.uffd.copy(&self.guest, offset, &staging.volatile())
    }
}

impl Pager for UffdPager {
    fn guest(&self) -> GuestMemory {
        GuestMemory::Plain(self.guest.clone())
    }

    fn alias(&self) -> &AliasMap {
        &self.alias
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn handler(self: Arc<Self>) -> Option<Handler> {
        Some(Box::new(move |stop| self.handle(stop)))
    }
}
