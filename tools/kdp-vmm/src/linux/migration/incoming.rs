//! The side that a machine comes to.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kdp_migrate::{DestinationMachine, Error, Layout, MachineError, Misses, PageSet, Placed};
use kvm_demand_paging::{Backing, Memfd, PageRange, Paging, Vm};

use crate::error::Result;
use crate::linux::{Console, Machine, PageRequester, Ram, Setup};

/// The memslot's id.
const SLOT: u32 = 0;

/// A machine that is about to come, or has come and lacks pages. Clones are the same one.
#[derive(Clone)]
pub struct Incoming(Arc<Inner>);

struct Inner {
    ram: Arc<Ram>,
    misses: Misses,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Pages that are not absent any more.
    settled: PageSet,
    /// Why no more will come.
    failed: Option<String>,
    console: Option<Console>,
    machine: Option<Arc<Mutex<Machine>>>,
    started: bool,
}

impl Incoming {
    /// Memory for a machine of so many bytes. What its console says will go to `console`.
    pub fn new(backing: Backing, bytes: u64, console: Console) -> Result<Self> {
        let memfd = Memfd::create("kdp-vmm-linux", backing, bytes)?;
        let ram = Arc::new(Ram::new(Vm::open()?, SLOT, memfd, Paging::On)?);
        Ok(Self(Arc::new(Inner {
            misses: Misses::new(ram.pages()),
            state: Mutex::new(State {
                settled: PageSet::new(ram.pages()),
                failed: None,
                console: Some(console),
                machine: None,
                started: false,
            }),
            changed: Condvar::new(),
            ram,
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
        while !state.started && state.failed.is_none() {
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

    fn settle(&self, pages: PageRange) {
        self.lock().settled.insert_range(pages);
        self.changed.notify_all();
    }

    fn fail(&self, why: &str) {
        self.lock().failed.get_or_insert_with(|| why.to_owned());
        self.changed.notify_all();
    }
}

impl PageRequester for Inner {
    fn ask(&self, page: u64) {
        self.misses.miss(page);
    }

    fn fetch(&self, page: u64) -> Result<(), MachineError> {
        self.misses.miss(page);
        let mut state = self.lock();
        loop {
            if state.settled.contains(page) {
                return Ok(());
            }
            if let Some(why) = &state.failed {
                return Err(why.clone().into());
            }
            state = self.wait(state);
        }
    }
}

impl DestinationMachine for Incoming {
    fn layout(&self) -> Layout {
        self.0.ram.states().layout()
    }

    fn place(&self, first: u64, bytes: &[u8], results: &mut [Placed]) -> Result<(), MachineError> {
        let ram = &self.0.ram;
        ram.undisturbed(|| ram.states().place(first, bytes, results))?;
        self.0.settle(PageRange::new(first, results.len() as u64));
        Ok(())
    }

    fn mark_zero(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.ram.states().mark_zero(pages)?;
        self.0.settle(pages);
        Ok(())
    }

    fn mark_lost(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.ram.states().mark_lost(pages)?;
        self.0.settle(pages);
        Ok(())
    }

    fn discard(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.lock().settled.remove_range(pages);
        Ok(self.0.ram.states().empty(pages)?)
    }

    fn load(&self, state: &[u8]) -> Result<(), MachineError> {
        let console = self.0.lock().console.take();
        let console = console.ok_or("a state was loaded before")?;
        let setup = Setup {
            console,
            requester: Some(self.0.clone()),
        };
        let machine = Machine::restore(self.0.ram.clone(), state, setup)?;
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

    /// vCPUs stop at the next page that they need, which is an error of theirs.
    fn fail(&self, error: &Error) {
        self.0.fail(&error.to_string());
    }
}
