//! A guest that comes from elsewhere by a page handler, a process of its own, that is started anew when it dies.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kdp_vmm::linux::{Machine, Ram, Setup};
use kdp_vmm::Error;
use kvm_demand_paging::{send_vm, Memfd, Paging, Vm};

use super::arrival::options;
use super::pipe::{receive, GoesOn, Sender, Task, ToHandler, ToVmm};
use super::vmm::{Event, Vmm};
use crate::args::LinuxArgs;

/// A handler that lives shorter is not replaced at once: there may be none that lives, and the machine has other work.
const SHORT_LIFE: Duration = Duration::from_millis(200);

/// The memslot's id.
const SLOT: u32 = 0;

/// What a VMM has while its guest is on its way.
pub struct Supervisor {
    ram: Arc<Ram>,
    listener: TcpListener,
    vmm: Arc<Vmm>,
    /// For how long handlers may die without a word before no more are started. Each waits as long for its source.
    give_up: Duration,
    answer: Option<f64>,
    guest: Mutex<Guest>,
}

/// Its lock is the inner one if the machine's is taken, too.
#[derive(Default)]
struct Guest {
    /// Which migration brings it.
    migration: Option<String>,
    /// When its state is loaded. From then on the source may hold it for handed over, so a handler that dies is replaced.
    machine: Option<Arc<Mutex<Machine>>>,
    started: bool,
}

/// How a handler ended.
enum End {
    /// All is here, or never will be: the VMM was told.
    Settled,
    /// It died, or is of no use any more: why that is thought.
    Died(String),
}

impl Guest {
    /// What the next handler finds.
    fn goes_on(&self) -> Option<GoesOn> {
        self.machine.as_ref()?;
        Some(GoesOn {
            migration: self.migration.clone()?,
            started: self.started,
        })
    }
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
            give_up: options(args.give_up, args.answer).give_up,
            answer: args.answer,
            guest: Mutex::default(),
        })
    }

    fn guest(&self) -> std::sync::MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One handler after the other, until all is here.
    pub fn run(self: Arc<Self>) {
        // When the last handler died that had said something.
        let mut heard = Instant::now();
        loop {
            let begun = Instant::now();
            let why = match self.run_handler(&mut heard) {
                Ok(End::Settled) => return,
                Ok(End::Died(how)) if self.guest().machine.is_none() => {
                    format!("the page handler died before the guest was here ({how})")
                }
                Ok(End::Died(how)) if heard.elapsed() < self.give_up => {
                    tracing::warn!("the page handler has died ({how}): another one goes on");
                    thread::sleep(SHORT_LIFE.saturating_sub(begun.elapsed()));
                    continue;
                }
                Ok(End::Died(how)) => format!(
                    "page handlers have died without a word for {} s ({how})",
                    self.give_up.as_secs_f64()
                ),
                Err(e) => format!("there is no page handler: {e}"),
            };
            if self.guest().started {
                self.fail(&why);
            }
            return self.failed(&why);
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
        let machine = self.guest().machine.clone();
        if let Some(machine) = machine {
            machine
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .fail(Error::Invalid(format!(
                    "a page that is missing will never come: {why}"
                )));
        }
    }

    fn run_handler(self: &Arc<Self>, heard: &mut Instant) -> Result<End, Error> {
        let (mut child, stream) = self.spawn()?;
        self.vmm.handler(Some(child.id()));
        let end = match self.begin(&stream) {
            Ok(handler) => self.hear(&stream, &handler, heard),
            Err(e) => End::Died(e.to_string()),
        };
        self.vmm.handler(None);
        // One that has said all is ended, one that talks nonsense is not asked for more.
        let _ = child.kill();
        let _ = child.wait();
        Ok(end)
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

    fn begin(&self, stream: &UnixStream) -> Result<Arc<Sender>, Error> {
        let paged = self
            .ram
            .paged()
            .ok_or_else(|| Error::Invalid("the device does not page this memory".to_owned()))?;
        send_vm(stream, paged.vm(), "guest")?;
        let task = Task {
            slot: SLOT,
            goes_on: self.guest().goes_on(),
            give_up: Some(self.give_up.as_secs_f64()),
            answer: self.answer,
        };
        let tell = || -> io::Result<Sender> {
            let handler = Sender::to(stream)?;
            handler.send(&ToHandler::Take(task))?;
            Ok(handler)
        };
        tell().map(Arc::new).map_err(|source| Error::Os {
            what: "tell a page handler its task".to_owned(),
            source,
        })
    }

    fn hear(
        self: &Arc<Self>,
        stream: &UnixStream,
        handler: &Arc<Sender>,
        heard: &mut Instant,
    ) -> End {
        let mut spoke = false;
        loop {
            let message = match receive(stream) {
                Ok(message) => message,
                Err(e) => {
                    if spoke {
                        *heard = Instant::now();
                    }
                    return End::Died(match e.kind() {
                        io::ErrorKind::UnexpectedEof => "it is gone".to_owned(),
                        _ => format!("what it says makes no sense: {e}"),
                    });
                }
            };
            spoke = true;
            match message {
                ToVmm::Comes(id) => self.guest().migration = Some(id),
                ToVmm::Progress(progress) => self.vmm.progress(&progress),
                ToVmm::Load(state) => self.answer(handler, move |this| this.load(&state)),
                ToVmm::Start => self.answer(handler, |this| this.start()),
                ToVmm::Fail(why) if self.guest().started => self.fail(&why),
                // The handler waits for its state to be loaded, which may wait for a page.
                ToVmm::Fail(why) => {
                    self.failed(&why);
                    return End::Settled;
                }
                ToVmm::Arrived(report) => {
                    self.ram.take_back(true);
                    self.vmm.arrived(report);
                    return End::Settled;
                }
                ToVmm::Failed(why) => {
                    self.failed(&why);
                    return End::Settled;
                }
            }
        }
    }

    /// On a thread of its own: it may wait for a page, and the handler may die.
    fn answer(
        self: &Arc<Self>,
        handler: &Arc<Sender>,
        work: impl FnOnce(&Self) -> Result<(), Error> + Send + 'static,
    ) {
        let (this, handler) = (self.clone(), handler.clone());
        thread::spawn(move || {
            let result = work(&this).map_err(|e| e.to_string());
            // If the handler has died that is found where it is listened to.
            let _ = handler.send(&ToHandler::Answer(result));
        });
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

    /// A handler that has died in it is followed by one that asks again.
    fn start(&self) -> Result<(), Error> {
        let machine = self.guest().machine.clone();
        let machine =
            machine.ok_or_else(|| Error::Invalid("there is no state to start from".to_owned()))?;
        let mut stopped = machine.lock().unwrap_or_else(PoisonError::into_inner);
        if self.guest().started {
            return Ok(());
        }
        stopped.start()?;
        self.guest().started = true;
        drop(stopped);
        self.vmm.here(machine);
        Ok(())
    }
}
