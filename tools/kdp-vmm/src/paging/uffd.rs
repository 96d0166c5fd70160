//! userfaultfd, missing and minor: what the device is compared with.

use std::ops::Range;
use std::sync::Arc;

use kvm_demand_paging::{AliasMap, Memfd, PageRange};

use super::uffd_sys::{Arrivals, Faults, Userfaultfd};
use super::{Counters, EndFlag, Handler, Memory, Pager};
use crate::error::Result;
use crate::memory::{buffer, GuestMemory, PAGE_SIZE};
use crate::source::Source;

pub(super) struct UffdPager {
    // First, so that it is closed before the memory that it watches is unmapped.
    uffds: Vec<Userfaultfd>,
    faults: Faults,
    guest: Arc<AliasMap>,
    alias: AliasMap,
    page_size: u64,
    source: Arc<dyn Source>,
    counters: Counters,
}

impl UffdPager {
    pub(super) fn new(minor: bool, memory: &Memory, source: Arc<dyn Source>) -> Result<Self> {
        let memfd = Memfd::create("kdp-vmm-guest", memory.backing, memory.bytes)?;
        let guest = Arc::new(memfd.map_all()?);
        let alias = memfd.map_all()?;
        let faults = if minor {
            // A minor fault needs a page that exists. The device's modes populate their alias likewise.
            memory.populate(&alias)?;
            Faults::Minor
        } else {
            Faults::Missing
        };
        let page_size = memory.backing.page_size();
        let uffds: Result<Vec<Userfaultfd>> = parts(memory.bytes / page_size, memory.readers)
            .map(|part| {
                let uffd = Userfaultfd::new(faults)?;
                uffd.register(
                    faults,
                    &guest,
                    part.start * page_size,
                    (part.end - part.start) * page_size,
                )?;
                Ok(uffd)
            })
            .collect();
        Ok(Self {
            uffds: uffds?,
            faults,
            guest,
            alias,
            page_size,
            source,
            counters: Counters::default(),
        })
    }

    fn handle(&self, uffd: &Userfaultfd, end: &EndFlag) -> Result<()> {
        // Two vCPUs that fault on one page make two events. A second copy could undo what the guest wrote
        // after the first.
        let mut placed = vec![false; (self.guest.len() as u64 / self.page_size) as usize];
        let staging = buffer(self.page_size)?;
        let mut offsets = Vec::new();
        let arrivals = Arrivals::new(uffd)?;
        while !end.is_set() {
            arrivals.wait()?;
            uffd.read_faults(&self.guest, &mut offsets)?;
            for &offset in &offsets {
                self.counters.add_event();
                let block = offset / self.page_size;
                let start = block * self.page_size;
                if std::mem::replace(&mut placed[block as usize], true) {
                    uffd.wake(&self.guest, start, self.page_size)?;
                } else {
                    self.place(uffd, start, &staging)?;
                    self.counters.add_fetch();
                }
            }
        }
        Ok(())
    }

    fn place(&self, uffd: &Userfaultfd, offset: u64, staging: &AliasMap) -> Result<()> {
        let pages = PageRange::new(offset / PAGE_SIZE, self.page_size / PAGE_SIZE);
        if self.faults == Faults::Minor {
            self.source.fetch(pages, &self.alias.slice(pages)?)?;
            return uffd.resume(&self.guest, offset, self.page_size);
        }
        if let Some(from) = self.source.direct(pages) {
            return uffd.copy(&self.guest, offset, &from);
        }
        self.source.fetch(pages, &staging.volatile())?;
        uffd.copy(&self.guest, offset, &staging.volatile())
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

    fn handlers(self: Arc<Self>) -> Vec<Handler> {
        let work = |n: usize| -> Handler {
            let pager = self.clone();
            Box::new(move |end| pager.handle(&pager.uffds[n], end))
        };
        (0..self.uffds.len()).map(work).collect()
    }
}

/// Which blocks each of several readers has: as many for each as the vCPUs have, the last with the remainder.
fn parts(blocks: u64, readers: u64) -> impl Iterator<Item = Range<u64>> {
    let readers = readers.clamp(1, blocks.max(1));
    let share = blocks / readers;
    (0..readers).map(move |n| {
        let end = if n + 1 == readers {
            blocks
        } else {
            (n + 1) * share
        };
        n * share..end
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_all_blocks() {
        let ends = |blocks, readers| {
            let parts = parts(blocks, readers);
            parts.map(|part| (part.start, part.end)).collect::<Vec<_>>()
        };
        assert_eq!(ends(8, 1), [(0, 8)]);
        assert_eq!(ends(8, 3), [(0, 2), (2, 4), (4, 8)]);
        assert_eq!(ends(1, 8), [(0, 1)]);
    }
}
