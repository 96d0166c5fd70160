//! The side that a machine leaves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kdp_migrate::{Content, Epoch, Hint, Layout, MachineError, PageSet, SourceMachine};
use kvm_demand_paging::PageRange;
use rustix::io::Errno;

use super::layout;
use crate::linux::{Balloon, HintSink, Machine, Ram};

/// A machine that is to leave. It is locked for moments only, and may be used beside it.
pub struct Outgoing {
    machine: Arc<Mutex<Machine>>,
    ram: Arc<Ram>,
    balloon: Balloon,
    hints: Option<Arc<Hints>>,
    /// Pages that were lost by a memory error when that was looked at last.
    lost: Mutex<PageSet>,
}

/// Hints that nobody has looked at.
#[derive(Default)]
struct Hints(Mutex<Vec<Hint>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HintSink for Hints {
    fn started(&self, _command: u32) {}

    fn hinted(&self, command: u32, pages: PageRange) {
        lock(&self.0).push(Hint {
            epoch: Epoch(command),
            pages,
        });
    }

    fn finished(&self, _command: u32) {}
}

impl Outgoing {
    /// The machine must have all of its memory. `hints`: ask its guest which pages are free, if it can tell.
    pub fn new(machine: Arc<Mutex<Machine>>, hints: bool) -> Self {
        let (ram, balloon) = {
            let machine = lock(&machine);
            (machine.ram().clone(), machine.balloon())
        };
        Self {
            machine,
            balloon,
            hints: hints.then(Arc::default),
            lost: Mutex::new(PageSet::new(ram.pages())),
            ram,
        }
    }
}

impl SourceMachine for Outgoing {
    fn layout(&self) -> Layout {
        layout(&self.ram)
    }

    /// The memfd is read, not guest memory: that brings no page in, and a page that is lost is an error, not a signal.
    fn read_page(&self, page: u64, bytes: &mut [u8; 4096]) -> Result<Content, MachineError> {
        if lock(&self.lost).contains(page) {
            return Ok(Content::Lost);
        }
        // Its memory may hold what was in it before it was given back.
        if let Some(paged) = self.ram.paged() {
            if !paged.present().is_present(page) {
                return Ok(Content::Zero);
            }
        }
        match self.ram.memfd().read(page, bytes) {
            Ok(()) => Ok(Content::Bytes),
            Err(e) if e.errno() == Some(Errno::IO.raw_os_error()) => Ok(Content::Lost),
            Err(e) => Err(e.into()),
        }
    }

    fn start_log(&self) -> Result<(), MachineError> {
        Ok(lock(&self.machine).log_dirty_pages(true)?)
    }

    fn stop_log(&self) {
        if let Err(e) = lock(&self.machine).log_dirty_pages(false) {
            // The guest pays for it at each first write of a page, and no more.
            tracing::warn!("dirty pages are still logged: {e}");
        }
    }

    fn harvest(&self, written: &mut PageSet) -> Result<(), MachineError> {
        let mut words = vec![0; self.ram.pages().div_ceil(64) as usize];
        lock(&self.machine).harvest_dirty_pages(&mut words)?;
        (0..)
            .zip(words)
            .for_each(|(index, word)| written.merge_word(index, word));
        // A loss is news, too, and in no log.
        let mut lost = lock(&self.lost);
        for range in self.ram.lost()? {
            for page in range.iter() {
                if lost.insert(page) {
                    written.insert(page);
                }
            }
        }
        Ok(())
    }

    fn begin_hints(&self) -> Option<Epoch> {
        let hints = self.hints.clone()?;
        if !self.balloon.can_hint() {
            return None;
        }
        match self.balloon.begin_hints(hints) {
            Ok(command) => Some(Epoch(command)),
            Err(e) => {
                tracing::warn!("the guest cannot be asked which pages are free: {e}");
                None
            }
        }
    }

    fn end_hints(&self) {
        if self.hints.is_none() || !self.balloon.can_hint() {
            return;
        }
        if let Err(e) = self.balloon.end_hints() {
            tracing::warn!("the guest cannot be told that its hints are done with: {e}");
        }
    }

    fn drain_hints(&self, take: &mut dyn FnMut(Hint)) {
        if let Some(hints) = &self.hints {
            let hints = std::mem::take(&mut *lock(&hints.0));
            hints.into_iter().for_each(take);
        }
    }

    fn stop(&self) -> Result<Vec<u8>, MachineError> {
        let mut machine = lock(&self.machine);
        machine.stop()?;
        if let Some(how) = machine.how_it_ended() {
            return Err(format!("the guest has ended: {how}").into());
        }
        Ok(machine.save()?)
    }

    fn resume(&self) -> Result<(), MachineError> {
        Ok(lock(&self.machine).start()?)
    }
}
