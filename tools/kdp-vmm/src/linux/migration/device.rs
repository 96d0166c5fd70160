//! Pages that come into memory of the device.
//!
//! A fault's latency is measured by [`Misses`]: from the touch, which is the vCPU's exit (for those who cannot exit it is
//! when the event was read), until the page is placed.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kdp_migrate::{MachineError, Misses, PageSet, Placed};
use kvm_demand_paging::PageRange;

use super::Placer;
use crate::error::{Error, Result};
use crate::linux::machine::Ending;
use crate::linux::ram::Paged;
use crate::linux::{PageRequester, Ram};

pub(super) struct ByDevice {
    ram: Arc<Ram>,
    misses: Misses,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Pages that are not absent any more.
    settled: PageSet,
    /// Pages that somebody waits for, and how many do. Most frames bring none of them, and waking is not cheap.
    awaited: HashMap<u64, usize>,
    /// Why no more will come.
    failed: Option<String>,
    /// There is a machine, whose vCPUs ask for pages.
    made: bool,
}

impl ByDevice {
    pub(super) fn new(ram: Arc<Ram>, misses: Misses) -> Self {
        Self {
            misses,
            state: Mutex::new(State {
                settled: PageSet::new(ram.pages()),
                awaited: HashMap::new(),
                failed: None,
                made: false,
            }),
            changed: Condvar::new(),
            ram,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn paged(&self) -> Result<&Paged> {
        let paged = self.ram.paged();
        paged.ok_or_else(|| Error::invalid("the device does not page this memory"))
    }

    fn settle(&self, pages: PageRange) {
        let mut state = self.lock();
        state.settled.insert_range(pages);
        if state.awaited.keys().any(|page| pages.contains(*page)) {
            self.changed.notify_all();
        }
    }

    fn wait_for(&self, page: u64) -> Result<(), MachineError> {
        let mut state = self.lock();
        *state.awaited.entry(page).or_default() += 1;
        let outcome = loop {
            if state.settled.contains(page) {
                break Ok(());
            }
            if let Some(why) = &state.failed {
                break Err(why.clone().into());
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        if let Some(count) = state.awaited.get_mut(&page) {
            *count -= 1;
            if *count == 0 {
                state.awaited.remove(&page);
            }
        }
        outcome
    }
}

impl PageRequester for ByDevice {
    fn ask(&self, page: u64) {
        self.misses.miss(page);
    }

    fn fetch(&self, page: u64) -> Result<(), MachineError> {
        self.misses.miss(page);
        self.wait_for(page)
    }
}

impl Placer for ByDevice {
    fn place(&self, first: u64, bytes: &[u8], results: &mut [Placed]) -> Result<(), MachineError> {
        let paged = self.paged()?;
        paged.undisturbed(|| paged.states().place(first, bytes, results))?;
        self.settle(PageRange::new(first, results.len() as u64));
        Ok(())
    }

    fn mark_zero(&self, pages: PageRange) -> Result<(), MachineError> {
        self.paged()?.states().mark_zero(pages)?;
        self.settle(pages);
        Ok(())
    }

    fn mark_lost(&self, pages: PageRange) -> Result<(), MachineError> {
        self.paged()?.states().mark_lost(pages)?;
        self.settle(pages);
        Ok(())
    }

    fn discard(&self, pages: PageRange) -> Result<(), MachineError> {
        self.lock().settled.remove_range(pages);
        Ok(self.paged()?.states().empty(pages)?)
    }

    fn requester(self: Arc<Self>) -> Option<Arc<dyn PageRequester>> {
        Some(self)
    }

    fn made(&self, machine: Ending) {
        drop(machine);
        self.lock().made = true;
    }

    /// vCPUs stop at the next page that they need, which is an error of theirs. Who loads the state waits in the kernel, and
    /// asks nobody: without the memslot its access fails.
    fn fail(&self, why: &str) {
        let made = {
            let mut state = self.lock();
            state.failed.get_or_insert_with(|| why.to_owned());
            state.made
        };
        self.changed.notify_all();
        if let (false, Some(paged)) = (made, self.ram.paged()) {
            if let Err(e) = paged.vm().remove_memslot(paged.slot_id()) {
                tracing::warn!("who loads the state may wait for ever: {e}");
            }
        }
    }
}
