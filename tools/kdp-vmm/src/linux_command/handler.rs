//! The page handler: a process of its own that takes the pages of a guest which runs in another one.
//!
//! The page states are the kernel's, the vCPUs are the VMM's. So a handler that dies takes nothing with it but its
//! connection: the next one asks the kernel what is there, and goes on.
//!
//! Its standard input is the socket that it listens at, as inetd has it; its standard output the one to its VMM.

use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{exit, ExitCode};
use std::sync::{mpsc, Arc, Mutex, PoisonError};
use std::thread;

use kdp_migrate::{
    Destination, DestinationMachine, Known, Layout, MachineError, MigrationId, Misses, Placed,
};
use kdp_vmm::linux::Pages;
use kdp_vmm::Error;
use kvm_demand_paging::{receive_vm, EventKind, PageRange};

use super::arrival::options;
use super::pipe::{receive, GoesOn, Sender, Task, ToHandler, ToVmm};

pub fn run() -> Result<ExitCode, Error> {
    let own = |what: &str, source: io::Error| Error::Os {
        what: format!("a page handler's {what} (kdp-vmm starts it by itself)"),
        source,
    };
    let listener = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(TcpListener::from)
        .map_err(|e| own("standard input", e))?;
    let stream = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from)
        .map_err(|e| own("standard output", e))?;
    let (vm, _) = receive_vm(&stream)?;
    let Ok(ToHandler::Take(task)) = receive(&stream) else {
        return Err(Error::Invalid("a page handler has no task".to_owned()));
    };
    let (answers, answer) = mpsc::channel();
    let hears = stream.try_clone().map_err(|e| own("standard output", e))?;
    thread::spawn(move || {
        while let Ok(ToHandler::Answer(answer)) = receive(&hears) {
            // Who asked has failed meanwhile.
            let _ = answers.send(answer);
        }
        // The VMM has ended, and its guest with it.
        exit(0)
    });
    let remote = Remote {
        pages: Arc::new(Pages::of(vm, task.slot)?),
        vmm: Arc::new(Sender::to(&stream).map_err(|e| own("standard output", e))?),
        answer: Mutex::new(answer),
    };
    remote.serve(&listener, &task)?;
    Ok(ExitCode::SUCCESS)
}

/// Pages here, a machine there.
struct Remote {
    pages: Arc<Pages>,
    vmm: Arc<Sender>,
    answer: Mutex<mpsc::Receiver<Result<(), String>>>,
}

impl Remote {
    fn serve(self, listener: &TcpListener, task: &Task) -> Result<(), Error> {
        let misses = Misses::new(self.pages.count());
        let (pages, tells) = (self.pages.clone(), misses.clone());
        thread::spawn(move || {
            for event in pages.vm().events() {
                match event {
                    Ok(event) if event.kind == EventKind::Absent => tells.miss(event.page),
                    Ok(_) => {}
                    Err(e) => {
                        eprintln!("page handler: {e}");
                        // Another one may do better.
                        exit(1)
                    }
                }
            }
        });
        let vmm = self.vmm.clone();
        let tell = |message: &ToVmm| {
            // It fails if the VMM has ended: so does this process, by another thread.
            let _ = vmm.send(message);
        };
        let options = options(task.give_up, task.answer);
        let destination = match &task.goes_on {
            None => Destination::new(self, misses, options),
            Some(GoesOn { migration, started }) => {
                let id = migration.parse::<MigrationId>().map_err(|_| {
                    Error::Invalid(format!("'{migration}' is no id of a migration"))
                })?;
                let known = Known {
                    id,
                    here: self.pages.here()?,
                    started: *started,
                };
                Destination::replace(self, misses, options, known)
            }
        };
        let end = destination.run(listener, &mut |progress| tell(&ToVmm::Progress(*progress)));
        tell(&match end {
            Ok(report) => ToVmm::Arrived(report),
            Err(e) => ToVmm::Failed(e.to_string()),
        });
        Ok(())
    }

    /// Have the VMM do something, and wait until it has.
    fn ask(&self, message: &ToVmm) -> Result<(), MachineError> {
        let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        self.vmm.send(message)?;
        Ok(answer.recv()??)
    }
}

impl DestinationMachine for Remote {
    fn layout(&self) -> Layout {
        self.pages.layout()
    }

    fn begins(&self, id: MigrationId) {
        // If it does not arrive, the VMM has ended.
        let _ = self.vmm.send(&ToVmm::Comes(id.to_string()));
    }

    fn place(&self, first: u64, bytes: &[u8], results: &mut [Placed]) -> Result<(), MachineError> {
        Ok(self.pages.place(first, bytes, results)?)
    }

    fn mark_zero(&self, pages: PageRange) -> Result<(), MachineError> {
        Ok(self.pages.mark_zero(pages)?)
    }

    fn mark_lost(&self, pages: PageRange) -> Result<(), MachineError> {
        Ok(self.pages.mark_lost(pages)?)
    }

    fn discard(&self, pages: PageRange) -> Result<(), MachineError> {
        Ok(self.pages.empty(pages)?)
    }

    fn load(&self, state: &[u8]) -> Result<(), MachineError> {
        self.ask(&ToVmm::Load(state.to_vec()))
    }

    fn start(&self) -> Result<(), MachineError> {
        self.ask(&ToVmm::Start)
    }

    fn fail(&self, error: &kdp_migrate::Error) {
        // If it does not arrive, the VMM has ended.
        let _ = self.vmm.send(&ToVmm::Fail(error.to_string()));
    }
}
