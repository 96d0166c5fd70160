//! Which pages were written: by vCPUs and KVM, as KVM's log has it, and by everybody else, as it was noted.

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;

use super::machine::{set_memory, Machine, KVM_SLOT};
use crate::error::{kvm, Error, Result};

impl Machine {
    /// Begin, or end, to log which pages are written. The log is empty when it begins.
    pub fn log_dirty_pages(&mut self, on: bool) -> Result<()> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        set_memory(&self.vm, &self.ram, flags)?;
        self.ram.take_noted(&mut []);
        self.logs_dirty_pages = on;
        Ok(())
    }

    /// Add the pages that were written since the last call to `pages`, a bit for each page of memory, and forget them.
    ///
    /// The guest may run. A page that is written meanwhile is in this harvest or in the next one; only one that was
    /// harvested while the guest was stopped has all that comes before.
    pub fn harvest_dirty_pages(&self, pages: &mut [u64]) -> Result<()> {
        let words = self.ram.pages().div_ceil(u64::BITS.into());
        if !self.logs_dirty_pages {
            return Err(Error::invalid("dirty pages are not logged: begin to"));
        }
        if pages.len() as u64 != words {
            return Err(Error::invalid(format!(
                "room for {} words of dirty bits: {} pages need {words}",
                pages.len(),
                self.ram.pages()
            )));
        }
        let log = self
            .vm
            .get_dirty_log(KVM_SLOT, self.ram.bytes() as usize)
            .map_err(kvm("KVM_GET_DIRTY_LOG"))?;
        for (word, logged) in pages.iter_mut().zip(log) {
            *word |= logged;
        }
        self.ram.take_noted(pages);
        Ok(())
    }
}
