//! `kdp-vmm linux`: run Linux, take it from elsewhere, let it go.

mod arrival;
mod control;
mod handler;
mod pipe;
mod supervisor;
mod vmm;

use std::io;
use std::process::ExitCode;
use std::sync::{mpsc, Arc, Mutex};
use std::thread;
use std::time::Duration;

use kdp_vmm::linux::{End, Ending, Kernel, Machine, Ram, Setup};
use kdp_vmm::Error;

use self::arrival::Arrival;
use self::control::Control;
pub use self::handler::run as run_handler;
use self::vmm::{Event, Vmm};
use crate::args::LinuxArgs;

pub fn run(args: LinuxArgs) -> Result<ExitCode, Error> {
    let (events, happens) = mpsc::channel();
    let vmm = Arc::new(Vmm::new(args.memory, events));
    let arrival = args
        .incoming
        .as_deref()
        .map(|address| Arrival::listen(address, &args, &vmm))
        .transpose()?;
    // Before the guest runs: who cannot be told to move it need not start it.
    let _control = args
        .control
        .as_deref()
        .map(|path| Control::listen(path, &vmm))
        .transpose()?;
    match arrival {
        Some(arrival) => arrival.begin()?,
        None => {
            let mut machine = boot(&args)?;
            machine.start()?;
            vmm.here(Arc::new(Mutex::new(machine)));
        }
    }
    let patience = args.timeout.map_or(Duration::MAX, Duration::from_secs);
    match happens.recv_timeout(patience) {
        Ok(Event::Ended(end)) => match end? {
            End::Reset => Ok(ExitCode::SUCCESS),
            end => {
                eprintln!("{end}");
                Ok(ExitCode::FAILURE)
            }
        },
        Ok(Event::Gone | Event::Quit) => Ok(ExitCode::SUCCESS),
        Ok(Event::Lost(why)) => {
            eprintln!("{why}");
            Ok(ExitCode::FAILURE)
        }
        Ok(Event::NeverCame(e)) => Err(e),
        Err(_) => Err(Error::TimedOut {
            seconds: patience.as_secs(),
            waiting: "it still runs".to_owned(),
        }),
    }
}

fn boot(args: &LinuxArgs) -> Result<Machine, Error> {
    let ram = Arc::new(Ram::create(args.backing.into(), args.memory)?);
    let kernel = Kernel {
        image: args.kernel.clone().unwrap_or_default(),
        initrd: args.initrd.clone(),
        append: args.append.clone(),
    };
    let setup = Setup {
        console: Box::new(io::stdout()),
        requester: None,
    };
    Machine::boot(ram, args.vcpus, &kernel, setup)
}

/// Tell when the guest has ended.
fn watch(ending: Ending, events: mpsc::Sender<Event>) {
    thread::spawn(move || {
        if let Some(end) = ending.wait(None).transpose() {
            // Nobody listens any more when something else has ended the program.
            let _ = events.send(Event::Ended(end));
        }
    });
}
