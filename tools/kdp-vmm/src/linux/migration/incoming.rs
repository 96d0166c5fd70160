//! The side that a machine comes to.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kdp_migrate::{DestinationMachine, Error, Layout, MachineError, Misses, Placed};
use kvm_demand_paging::{Backing, PageRange};

use super::device::ByDevice;
use super::userfaultfd::ByUserfaultfd;
use super::{layout, IncomingPager, Placer};
use crate::error::Result;
use crate::linux::{Console, Machine, Ram, Setup};

/// A machine that is about to come, or has come and lacks pages. Clones are the same one.
#[derive(Clone)]
pub struct Incoming(Arc<Inner>);

struct Inner {
    ram: Arc<Ram>,
    misses: Misses,
    placer: Arc<dyn Placer>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// No more pages will come.
    failed: bool,
    console: Option<Console>,
    machine: Option<Arc<Mutex<Machine>>>,
    started: bool,
}

impl Incoming {
    /// Memory for a machine of so many bytes, and what pages it in. What its console says will go to `console`.
    pub fn new(
        pager: IncomingPager,
        backing: Backing,
        bytes: u64,
        console: Console,
    ) -> Result<Self> {
        let (ram, misses, placer): (_, _, Arc<dyn Placer>) = match pager {
            IncomingPager::Device => {
                let ram = Arc::new(Ram::absent(backing, bytes)?);
                let misses = Misses::new(ram.pages());
                let placer = ByDevice::new(ram.clone(), misses.clone());
                (ram, misses, Arc::new(placer))
            }
            IncomingPager::Userfaultfd => {
                let (ram, misses, placer) = ByUserfaultfd::new(backing, bytes)?;
                (ram, misses, Arc::new(placer))
            }
        };
        Ok(Self(Arc::new(Inner {
            ram,
            misses,
            placer,
            state: Mutex::new(State {
                failed: false,
                console: Some(console),
                machine: None,
                started: false,
            }),
            changed: Condvar::new(),
        })))
    }

    /// For the engine: where this tells of pages that are touched.
    pub fn misses(&self) -> Misses {
        self.0.misses.clone()
    }

    /// Its memory.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.0.ram
    }

    /// Wait until the machine runs here, and return it, once; nothing if it never will.
    pub fn wait_started(&self) -> Option<Arc<Mutex<Machine>>> {
        let mut state = self.0.lock();
        while !state.started && !state.failed {
            state = self.0.wait(state);
        }
        // It has a hold of this, so this must let go of it.
        state.machine.take().filter(|_| state.started)
    }

    /// Whether it runs here.
    pub fn is_started(&self) -> bool {
        self.0.lock().started
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl DestinationMachine for Incoming {
    fn layout(&self) -> Layout {
        layout(&self.0.ram)
    }

    fn place(&self, first: u64, bytes: &[u8], results: &mut [Placed]) -> Result<(), MachineError> {
        self.0.placer.place(first, bytes, results)
    }

    fn mark_zero(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.placer.mark_zero(pages)
    }

    fn mark_lost(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.placer.mark_lost(pages)
    }

    fn discard(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.placer.discard(pages)
    }

    fn load(&self, state: &[u8]) -> Result<(), MachineError> {
        let console = self.0.lock().console.take();
        let console = console.ok_or("a state was loaded before")?;
        let setup = Setup {
            console,
            requester: self.0.placer.clone().requester(),
        };
        self.0.placer.begin()?;
        let machine = Machine::restore(self.0.ram.clone(), state, setup)?;
        self.0.placer.made(machine.ending());
        self.0.lock().machine = Some(Arc::new(Mutex::new(machine)));
        Ok(())
    }

    fn start(&self) -> Result<(), MachineError> {
        let machine = self.0.lock().machine.clone();
        let machine = machine.ok_or("there is no state to start from")?;
        machine
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .start()?;
        self.0.lock().started = true;
        self.0.changed.notify_all();
        Ok(())
    }

    fn fail(&self, error: &Error) {
        self.0.placer.fail(&error.to_string());
        self.0.lock().failed = true;
        self.0.changed.notify_all();
    }
}
