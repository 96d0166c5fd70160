//! A guest that comes from elsewhere by a page handler, a process of its own, that is started anew when it dies.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use kdp_vmm::linux::{Machine, Ram, Setup};
use kdp_vmm::Error;
use kvm_demand_paging::{send_vm, Memfd, Paging, Vm};

use super::pipe::{receive, send, Task, ToHandler, ToVmm};
use super::vmm::{Event, Vmm};
use crate::args::LinuxArgs;

/// The memslot's id.
const SLOT: u32 = 0;

/// What a VMM has while its guest is on its way.
pub struct Supervisor {
    ram: Arc<Ram>,
    listener: TcpListener,
    vmm: Arc<Vmm>,
    give_up: Option<f64>,
    answer: Option<f64>,
    guest: Mutex<Guest>,
}

#[derive(Default)]
struct Guest {
    /// Which migration brings it.
    migration: Option<String>,
    machine: Option<Arc<Mutex<Machine>>>,
    started: bool,
}

/// How a handler ended.
enum End {
    /// All is here, or never will be: the VMM was told.
    Settled,
    /// It died.
    Died,
}

impl Supervisor {
    pub fn new(listener: TcpListener, args: &LinuxArgs, vmm: &Arc<Vmm>) -> Result<Self, Error> {
        let memfd = Memfd::create("kdp-vmm-linux", args.backing.into(), args.memory)?;
        let ram = Ram::new(Vm::open()?, SLOT, memfd, Paging::On)?;
        ram.take_back(false);
        Ok(Self {
            ram: Arc::new(ram),
            listener,
            vmm: vmm.clone(),
            give_up: args.give_up,
            answer: args.answer,
            guest: Mutex::default(),
        })
    }

    fn guest(&self) -> std::sync::MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One handler after the other, until all is here.
    pub fn run(self: Arc<Self>) {
        loop {
            let end = self.run_handler();
            let started = self.guest().started;
            match end {
                Ok(End::Settled) => return,
                Ok(End::Died) if started => {
                    tracing::warn!("the page handler has died: another one goes on");
                }
                Ok(End::Died) => {
                    return self.failed("the page handler died before the guest ran here");
                }
                Err(e) if started => {
                    let why = format!("there is no page handler: {e}");
                    self.fail(&why);
                    return self.vmm.failed(&why);
                }
                Err(e) => return self.failed(&e.to_string()),
            }
        }
    }

    /// No guest will run here; or one that does will never be whole.
    fn failed(&self, why: &str) {
        self.vmm.failed(why);
        if !self.guest().started {
            self.vmm.tell(Event::NeverCame(Error::Invalid(format!(
                "no guest came: {why}"
            ))));
        }
    }

    /// The guest must not wait for pages that never come.
    fn fail(&self, why: &str) {
        if let Some(machine) = &self.guest().machine {
            machine
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .fail(Error::Invalid(format!(
                    "a page that is missing will never come: {why}"
                )));
        }
    }

    fn run_handler(self: &Arc<Self>) -> Result<End, Error> {
        let (mut child, stream) = self.spawn()?;
        self.vmm.handler(Some(child.id()));
        let end = self.begin(&stream).and_then(|()| self.hear(&stream));
        self.vmm.handler(None);
        // One that has said all is ended, one that talks nonsense is not asked for more.
        let _ = child.kill();
        let _ = child.wait();
        Ok(end.unwrap_or(End::Died))
    }

    fn spawn(&self) -> Result<(Child, UnixStream), Error> {
        let spawn = || -> io::Result<(Child, UnixStream)> {
            let (ours, theirs) = UnixStream::pair()?;
            let child = Command::new(std::env::current_exe()?)
                .arg("page-handler")
                .stdin(OwnedFd::from(self.listener.try_clone()?))
                .stdout(OwnedFd::from(theirs))
                .spawn()?;
            Ok((child, ours))
        };
        spawn().map_err(|source| Error::Os {
            what: "start a page handler".to_owned(),
            source,
        })
    }

    fn begin(&self, stream: &UnixStream) -> Result<(), Error> {
        let paged = self
            .ram
            .paged()
            .ok_or_else(|| Error::Invalid("the device does not page this memory".to_owned()))?;
        send_vm(stream, paged.vm(), "guest")?;
        let guest = self.guest();
        let task = Task {
            slot: SLOT,
            goes_on: guest.migration.clone().filter(|_| guest.started),
            give_up: self.give_up,
            answer: self.answer,
        };
        send(stream, &ToHandler::Take(task)).map_err(|source| Error::Os {
            what: "tell a page handler its task".to_owned(),
            source,
        })
    }

    fn hear(self: &Arc<Self>, stream: &UnixStream) -> Result<End, Error> {
        loop {
            let Ok(message) = receive(stream) else {
                return Ok(End::Died);
            };
            match message {
                ToVmm::Comes(id) => self.guest().migration = Some(id),
                ToVmm::Progress(progress) => self.vmm.progress(&progress),
                ToVmm::Load(state) => self.answer(stream, move |this| this.load(&state))?,
                ToVmm::Start => self.answer(stream, |this| this.start())?,
                ToVmm::Fail(why) if self.guest().started => self.fail(&why),
                // The handler waits for its state to be loaded, which may wait for a page.
                ToVmm::Fail(why) => {
                    self.failed(&why);
                    return Ok(End::Settled);
                }
                ToVmm::Arrived(report) => {
                    self.ram.take_back(true);
                    self.vmm.arrived(report);
                    return Ok(End::Settled);
                }
                ToVmm::Failed(why) => {
                    self.failed(&why);
                    return Ok(End::Settled);
                }
            }
        }
    }

    /// On a thread of its own: it may wait for a page, and the handler may die.
    fn answer(
        self: &Arc<Self>,
        stream: &UnixStream,
        work: impl FnOnce(&Self) -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        let this = self.clone();
        let stream = stream.try_clone().map_err(|source| Error::Os {
            what: "a page handler's socket".to_owned(),
            source,
        })?;
        thread::spawn(move || {
            let result = work(&this).map_err(|e| e.to_string());
            // If the handler has died that is found where it is listened to.
            let _ = send(&stream, &ToHandler::Answer(result));
        });
        Ok(())
    }

    fn load(&self, state: &[u8]) -> Result<(), Error> {
        let setup = Setup {
            console: Box::new(io::stdout()),
            requester: None,
        };
        let machine = Machine::restore(self.ram.clone(), state, setup)?;
        self.guest().machine = Some(Arc::new(Mutex::new(machine)));
        Ok(())
    }

    fn start(&self) -> Result<(), Error> {
        let machine = self.guest().machine.clone();
        let machine =
            machine.ok_or_else(|| Error::Invalid("there is no state to start from".to_owned()))?;
        machine
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .start()?;
        self.guest().started = true;
        self.vmm.here(machine);
        Ok(())
    }
}
