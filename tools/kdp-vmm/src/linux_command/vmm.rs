//! What the threads of `kdp-vmm linux` share: where the guest is, and how a migration goes.

use std::sync::{mpsc, Arc, Mutex, MutexGuard, PoisonError};

use kdp_migrate::control::{Status, Whereabouts};
use kdp_migrate::{DestinationReport, Failure, Guest, Phase, Progress};
use kdp_vmm::linux::{End, Machine};
use kdp_vmm::{Error, PAGE_SIZE};

/// What ends the program.
pub enum Event {
    /// The guest has ended.
    Ended(Result<End, Error>),
    /// It has moved away.
    Gone,
    /// It is here no more, and may not have come to where it was to go.
    Lost(String),
    /// It will not come.
    NeverCame(Error),
    /// Somebody wants it to.
    Quit,
}

/// A VMM, with its guest or without.
pub struct Vmm {
    state: Mutex<State>,
    events: mpsc::Sender<Event>,
    pages: u64,
}

struct State {
    status: Status,
    machine: Option<Arc<Mutex<Machine>>>,
    /// It has all of its memory here.
    whole: bool,
    moving: bool,
}

impl Vmm {
    pub fn new(memory: u64, events: mpsc::Sender<Event>) -> Self {
        Self {
            state: Mutex::new(State {
                status: Status {
                    guest: Whereabouts::Awaited,
                    listening: None,
                    handler: None,
                    progress: None,
                    arrival: None,
                    failure: None,
                },
                machine: None,
                whole: true,
                moving: false,
            }),
            events,
            pages: memory / PAGE_SIZE,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// End the program.
    pub fn tell(&self, event: Event) {
        // It ends already if nobody listens.
        let _ = self.events.send(event);
    }

    pub fn status(&self) -> Status {
        self.lock().status.clone()
    }

    /// It waits for a guest there.
    pub fn listens(&self, address: String) {
        let mut state = self.lock();
        state.whole = false;
        state.status.listening = Some(address);
        state.status.progress = Some(Progress::at(Phase::Connecting, self.pages));
    }

    pub fn progress(&self, progress: &Progress) {
        self.lock().status.progress = Some(*progress);
    }

    /// The guest runs here.
    pub fn here(&self, machine: Arc<Mutex<Machine>>) {
        let ending = machine
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .ending();
        let mut state = self.lock();
        state.status.guest = Whereabouts::Here;
        state.machine = Some(machine);
        super::watch(ending, self.events.clone());
    }

    /// The process that brings its pages.
    pub fn handler(&self, pid: Option<u32>) {
        self.lock().status.handler = pid;
    }

    /// All of it is here.
    pub fn arrived(&self, report: DestinationReport) {
        let mut state = self.lock();
        state.whole = true;
        state.status.listening = None;
        state.status.arrival = Some(report);
    }

    /// It did not come, or not whole.
    pub fn failed(&self, why: &str) {
        let mut state = self.lock();
        state.status.listening = None;
        state.status.failure = Some(why.to_owned());
    }

    /// The guest is about to move: its machine, or why it cannot. [`Self::moved`] follows.
    pub fn depart(&self) -> Result<Arc<Mutex<Machine>>, String> {
        let mut state = self.lock();
        if state.moving {
            return Err("it is being moved already".to_owned());
        }
        let machine = match (state.status.guest, &state.machine) {
            (Whereabouts::Here, Some(machine)) => machine.clone(),
            (Whereabouts::Awaited, _) => return Err("there is no guest here yet".to_owned()),
            _ => return Err("there is no guest here any more".to_owned()),
        };
        if !state.whole {
            return Err(match &state.status.failure {
                None => "it lacks pages that are still on their way here".to_owned(),
                Some(why) => format!("it lacks pages, and always will: {why}"),
            });
        }
        state.moving = true;
        state.status.failure = None;
        state.status.progress = Some(Progress::at(Phase::Connecting, self.pages));
        Ok(machine)
    }

    /// What came of it.
    pub fn moved(&self, failure: Option<&Failure>) {
        let mut state = self.lock();
        state.moving = false;
        state.status.guest = match failure.map(|failure| failure.guest) {
            Some(Guest::RunsHere) => Whereabouts::Here,
            Some(Guest::StoppedHere) => Whereabouts::Stopped,
            Some(Guest::HandedOver) | None => Whereabouts::Gone,
        };
        state.status.failure = failure.map(ToString::to_string);
    }
}
