//! The pages of a guest that is on its way here, for whoever brings them: a process that has the VM, and need not have
//! the guest.

use kdp_migrate::{Layout, PageSet, Placed};
use kvm_demand_paging::{Cause, Claimed, Memfd, Memslot, PageRange, Placed as Put, Vm};

use super::layout_of;
use crate::error::Result;
use crate::linux::ram::punch;

/// The pages of one memslot.
pub struct Pages {
    vm: Vm,
    slot_id: u32,
    memslot: Memslot,
    memfd: Memfd,
}

impl Pages {
    /// Of a memslot of this VM.
    pub fn of(vm: Vm, slot_id: u32) -> Result<Self> {
        Ok(Self {
            memslot: vm.memslot(slot_id)?,
            memfd: vm.memslot_memfd(slot_id)?,
            vm,
            slot_id,
        })
    }

    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The memslot's id.
    pub fn slot_id(&self) -> u32 {
        self.slot_id
    }

    /// The memslot.
    pub fn memslot(&self) -> &Memslot {
        &self.memslot
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.memslot.pages()
    }

    /// For the engines: the memslot begins at guest frame number 0.
    pub fn layout(&self) -> Layout {
        layout_of(self.slot_id, self.count(), self.memfd.page_size())
    }

    /// Pages that are present or lost. One that is zero is not told from one that is absent: to say again that it is zero
    /// changes nothing.
    pub fn here(&self) -> Result<PageSet> {
        let bitmap = self.memslot.bitmap()?;
        let mut here = PageSet::new(self.count());
        let mut at = 0;
        while let Some(first) = bitmap.next_present(at) {
            at = bitmap.next_absent(first).unwrap_or(self.count());
            here.insert_range(PageRange::from(first..at));
        }
        for poisoned in self.vm.poisoned(self.slot_id)? {
            here.insert_range(poisoned.range);
        }
        Ok(here)
    }

    /// Give absent pages from `first` on their bytes, and leave others alone.
    pub fn place(&self, first: u64, bytes: &[u8], results: &mut [Placed]) -> Result<()> {
        let put = self.vm.place(self.slot_id, first, bytes)?;
        for (result, put) in results.iter_mut().zip(put) {
            *result = match put {
                Put::Now => Placed::Now,
                Put::Lost => Placed::Lost,
                _ => Placed::Present,
            };
        }
        Ok(())
    }

    /// Absent pages of these are zero.
    pub fn mark_zero(&self, pages: PageRange) -> Result<()> {
        self.vm.mark_zero(self.slot_id, &[pages])?;
        Ok(())
    }

    /// Absent pages of these are lost: it is for whoever touches one to find out.
    pub fn mark_lost(&self, pages: PageRange) -> Result<()> {
        let claimant = self.vm.claimant(self.slot_id)?;
        for (page, claimed) in pages.iter().zip(claimant.claim(pages)?) {
            // Nobody has it, so nobody can have written what the loss would take.
            if claimed == Claimed::Done {
                self.vm
                    .poison(self.slot_id, &[PageRange::page(page)], Cause::Inherited)?;
            }
        }
        Ok(())
    }

    /// These are absent, and what was in them is forgotten.
    pub fn empty(&self, pages: PageRange) -> Result<()> {
        self.vm.mark_absent(self.slot_id, &[pages])?;
        punch(&self.memfd, pages)
    }
}
