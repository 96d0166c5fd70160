//! The control socket: see [`kdp_migrate::control`].

use std::fs;
use std::io::{self, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kdp_migrate::control::{receive, send, Command, Order, Reply};
use kdp_migrate::{Guest, Source, SourceOptions};
use kdp_vmm::linux::Outgoing;
use kdp_vmm::Error;

use super::vmm::{Event, Vmm};

/// How long a guest is given to say which pages are free if no round follows in which it could go on.
const ONLY_LEAD: Duration = Duration::from_secs(2);

/// The socket. Its name goes when this is dropped.
pub struct Control(PathBuf);

impl Drop for Control {
    fn drop(&mut self) {
        // Somebody may have been faster.
        let _ = fs::remove_file(&self.0);
    }
}

impl Control {
    /// Serve whoever connects, on threads of their own.
    pub fn listen(path: &Path, vmm: &Arc<Vmm>) -> Result<Self, Error> {
        let failed = |source| Error::Os {
            what: format!("listen at {}", path.display()),
            source,
        };
        let listener = bind(path).map_err(failed)?;
        let vmm = vmm.clone();
        thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    let vmm = vmm.clone();
                    thread::spawn(move || {
                        if let Err(e) = serve(&stream, &vmm) {
                            tracing::info!("the control socket: {e}");
                        }
                    });
                }
            })
            .map_err(failed)?;
        Ok(Self(path.to_owned()))
    }
}

/// A socket that a VMM has left behind is taken over; one that is in use is not.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
            fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
}

fn serve(stream: &UnixStream, vmm: &Vmm) -> io::Result<()> {
    let mut commands = BufReader::new(stream);
    loop {
        match receive(&mut commands) {
            Ok(None) => return Ok(()),
            Ok(Some(Command::Status)) => send(stream, &Reply::Status(vmm.status()))?,
            Ok(Some(Command::Migrate(order))) => migrate(&order, stream, vmm)?,
            Ok(Some(Command::Quit)) => {
                send(stream, &Reply::Done)?;
                vmm.tell(Event::Quit);
            }
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                let why = format!("this is no command: {e}");
                send(stream, &Reply::Refused { why })?;
            }
            Err(e) => return Err(e),
        }
    }
}

fn migrate(order: &Order, stream: &UnixStream, vmm: &Vmm) -> io::Result<()> {
    let machine = match vmm.depart() {
        Ok(machine) => machine,
        Err(why) => return send(stream, &Reply::Refused { why }),
    };
    let source = Source::new(Outgoing::new(machine, !order.no_hints), options(order));
    let result = source.run(&order.to, &mut |progress| {
        vmm.progress(progress);
        // Who does not listen any more has not asked for it to stop.
        let _ = send(stream, &Reply::Progress(*progress));
    });
    vmm.moved(result.as_ref().err());
    let event = match &result {
        Ok(_) => Some(Event::Gone),
        Err(failure) if failure.guest == Guest::RunsHere => {
            tracing::warn!("the guest was not moved: {failure}");
            None
        }
        Err(failure) => Some(Event::Lost(failure.to_string())),
    };
    // First, since the event ends the program.
    let sent = send(stream, &Reply::from(result));
    if let Some(event) = event {
        vmm.tell(event);
    }
    sent
}

fn options(order: &Order) -> SourceOptions {
    let mut options = SourceOptions {
        bandwidth: order.bandwidth,
        ..SourceOptions::default()
    };
    if let Some(ms) = order.downtime_ms {
        options.rounds.downtime = Duration::from_millis(ms);
    }
    if let Some(rounds) = order.rounds {
        options.rounds.max_rounds = rounds;
        if rounds == 0 {
            options.hint_lead = ONLY_LEAD;
        }
    }
    if let Some(seconds) = order.give_up_s {
        options.give_up = Duration::from_secs_f64(seconds.clamp(0.0, 1e6));
    }
    options
}
