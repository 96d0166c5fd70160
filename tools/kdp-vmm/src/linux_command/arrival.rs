//! A guest that comes from elsewhere.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kdp_migrate::{Destination, DestinationOptions};
use kdp_vmm::linux::Incoming;
use kdp_vmm::Error;

use super::vmm::{Event, Vmm};
use crate::args::LinuxArgs;

/// Where a guest is waited for.
pub struct Arrival {
    incoming: Incoming,
    listener: TcpListener,
    options: DestinationOptions,
    vmm: Arc<Vmm>,
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
        let incoming = Incoming::new(args.backing.into(), args.memory, Box::new(io::stdout()))?;
        eprintln!("waiting for a guest at {at}");
        vmm.listens(at.to_string());
        let mut options = DestinationOptions::default();
        if let Some(seconds) = args.give_up {
            options.give_up = Duration::from_secs_f64(seconds);
        }
        if let Some(seconds) = args.answer {
            options.answer = Duration::from_secs_f64(seconds);
        }
        Ok(Self {
            incoming,
            listener,
            options,
            vmm: vmm.clone(),
        })
    }

    /// Take it, on threads of its own.
    pub fn begin(self) -> Result<(), Error> {
        let Self {
            incoming,
            listener,
            options,
            vmm,
        } = self;
        let (starting, runs) = (incoming.clone(), vmm.clone());
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            thread::Builder::new()
                .name(name.to_owned())
                .spawn(work)
                .map(drop)
                .map_err(|source| Error::Os {
                    what: "start a thread".to_owned(),
                    source,
                })
        };
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
                        // A guest that runs here goes on for as long as it needs none of the pages that are missing.
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
