//! A guest that comes from elsewhere.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kdp_migrate::{Destination, DestinationOptions};
use kdp_vmm::linux::Incoming;
use kdp_vmm::Error;

use super::supervisor::Supervisor;
use super::vmm::{Event, Vmm};
use crate::args::LinuxArgs;

/// Where a guest is waited for.
pub enum Arrival {
    /// By this process.
    Own(Own),
    /// By another.
    Supervised(Arc<Supervisor>),
}

/// A guest that this process takes.
pub struct Own {
    incoming: Incoming,
    listener: TcpListener,
    options: DestinationOptions,
    vmm: Arc<Vmm>,
}

/// What `--give-up` and `--answer` say.
pub fn options(give_up: Option<f64>, answer: Option<f64>) -> DestinationOptions {
    let mut options = DestinationOptions::default();
    if let Some(seconds) = give_up {
        options.give_up = Duration::from_secs_f64(seconds);
    }
    if let Some(seconds) = answer {
        options.answer = Duration::from_secs_f64(seconds);
    }
    options
}

impl Arrival {
    pub fn listen(address: &str, args: &LinuxArgs, vmm: &Arc<Vmm>) -> Result<Self, Error> {
        let listener = TcpListener::bind(address)
            .and_then(|listener| Ok((listener.local_addr()?, listener)))
            .map_err(|source| Error::Os {
                what: format!("listen at {address}"),
                source,
            });
        let (at, listener) = listener?;
        let arrival = if args.handler_process {
            Self::Supervised(Arc::new(Supervisor::new(listener, args, vmm)?))
        } else {
            Self::Own(Own {
                incoming: Incoming::new(
                    args.pager,
                    args.backing.into(),
                    args.memory,
                    Box::new(io::stdout()),
                )?,
                listener,
                options: options(args.give_up, args.answer),
                vmm: vmm.clone(),
            })
        };
        eprintln!("waiting for a guest at {at}");
        vmm.listens(at.to_string());
        Ok(arrival)
    }

    /// Take it, on threads of its own.
    pub fn begin(self) -> Result<(), Error> {
        match self {
            Self::Own(own) => own.begin(),
            Self::Supervised(supervisor) => spawn("supervisor", Box::new(move || supervisor.run())),
        }
    }
}

fn spawn(name: &str, work: Box<dyn FnOnce() + Send>) -> Result<(), Error> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(drop)
        .map_err(|source| Error::Os {
            what: "start a thread".to_owned(),
            source,
        })
}

impl Own {
    fn begin(self) -> Result<(), Error> {
        let Self {
            incoming,
            listener,
            options,
            vmm,
        } = self;
        let (starting, runs) = (incoming.clone(), vmm.clone());
        spawn(
            "arrival",
            Box::new(move || {
                if let Some(machine) = starting.wait_started() {
                    runs.here(machine);
                }
            }),
        )?;
        spawn(
            "pages",
            Box::new(move || {
                let destination = Destination::new(incoming.clone(), incoming.misses(), options);
                match destination.run(&listener, &mut |progress| vmm.progress(progress)) {
                    Ok(report) => vmm.arrived(report),
                    Err(e) => {
                        let why = e.to_string();
                        vmm.failed(&why);
                        // A guest that runs here in memory of the device goes on for as long as it needs none of the pages
                        // that are missing; one on userfaultfd has ended.
                        if !incoming.is_started() {
                            vmm.tell(Event::NeverCame(Error::Invalid(format!(
                                "no guest came: {why}"
                            ))));
                        }
                    }
                }
            }),
        )
    }
}
