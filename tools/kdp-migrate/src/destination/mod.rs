//! The engine of the destination.
//!
//! Three threads: the one that runs [`Destination::run`] accepts connections, reads them and places pages; one asks
//! for pages that are missed; one loads the state and starts the guest, since both may touch pages that the first one
//! must place.

mod serve;

use self::serve::{Over, Served};
use crate::{
    link::{self, Sender, TICK},
    lock,
    wire::{Message, MigrationId, MAX_RANGES},
    DestinationMachine, DestinationOptions, DestinationReport, Error, Misses, PageSet, Progress,
};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use std::{
    net::TcpListener,
    sync::{mpsc, Arc, Mutex},
    thread,
    time::Duration,
};

/// Takes a guest.
pub struct Destination<M> {
    machine: M,
    misses: Misses,
    options: DestinationOptions,
    // What another one left of the guest: whether it was started.
    replaces: Option<bool>,
}

/// What an engine must know to take the place of one that is gone.
#[derive(Clone, Debug)]
pub struct Known {
    /// Which migration.
    pub id: MigrationId,
    /// The pages that are not absent, whatever else they are, read when the former engine could place none any more. One
    /// that is here and not in this set is sent again, and left alone; one that is in it and not here never comes. A
    /// page that is absent for a moment only, since the guest gives it back, is to be in it.
    pub here: PageSet,
    /// Whether the guest runs. If not, its state is loaded, and the source may have ordered already that it is to run.
    pub started: bool,
}

/// What the threads share.
struct Shared {
    // Taken before `link`, and by two: around asking for pages that are not here, and around placing pages and
    // telling of them. So a request never comes behind the ack of what it asks for, and the source knows by that
    // whether a page that it has sent is asked for again.
    order: Mutex<()>,
    link: Mutex<Link>,
}

#[derive(Default)]
struct Link {
    sender: Option<Arc<Sender>>,
    // Whether requests are answered: the guest has stopped at the source.
    answered: bool,
    loaded: bool,
    started: bool,
    failed: Option<Error>,
}

impl Shared {
    /// `loaded`: its state is loaded already. `started`: the guest runs here already.
    fn new(loaded: bool, started: bool) -> Self {
        Self {
            order: Mutex::default(),
            link: Mutex::new(Link {
                answered: loaded,
                loaded,
                started,
                ..Link::default()
            }),
        }
    }
}

/// What the third thread is to do.
enum Job {
    Load(Vec<u8>),
    Start,
}

impl<M: DestinationMachine> Destination<M> {
    /// A VMM that waits for a guest. `misses` is where it tells of absent pages that somebody touches.
    pub fn new(machine: M, misses: Misses, options: DestinationOptions) -> Self {
        Self {
            machine,
            misses,
            options,
            replaces: None,
        }
    }

    /// An engine in the place of one that died alone (its process was killed, say), while the guest and its pages are
    /// what they were. Only if the guest's state was loaded, and [`DestinationMachine::fail`] was not called.
    /// `misses` is a new one: who waits for a page must tell it, also if the former one was told.
    ///
    /// [`Self::run`] then listens where the former one did, does not call [`DestinationMachine::load`], and calls
    /// [`DestinationMachine::start`] only if the guest was not started ([`Known::started`]); it may have been meanwhile, by
    /// the former one's last call. If a page is absent the source must come within [`DestinationOptions::give_up`];
    /// without an engine it gives up after [`SourceOptions::give_up`](crate::SourceOptions::give_up). The report tells
    /// of this engine alone.
    pub fn replace(machine: M, misses: Misses, options: DestinationOptions, known: Known) -> Self {
        misses.begin_with(&known.here);
        let id = Some(known.id);
        let replaces = Some(known.started);
        Self {
            machine,
            misses,
            options: DestinationOptions { id, ..options },
            replaces,
        }
    }

    /// Take the guest that comes over `listener`, and return when all of it is here.
    ///
    /// # Errors
    ///
    /// If the guest runs here already, or its state was being loaded, [`DestinationMachine::fail`] was called.
    pub fn run(
        &self,
        listener: &TcpListener,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<DestinationReport, Error> {
        let layout = self.machine.layout();
        let pages = layout.pages().ok_or_else(|| {
            Error::Argument("the VMM has no memslot, or more pages than can be".into())
        })?;
        listener.set_nonblocking(true).map_err(Error::Listen)?;
        let shared = Shared::new(self.replaces.is_some(), self.replaces == Some(true));
        let (jobs, todo) = mpsc::channel();
        thread::scope(|scope| {
            let shared = &shared;
            scope.spawn(|| self.ask(shared));
            scope.spawn(move || self.work(shared, todo));
            let mut served = Served::new(self, shared, jobs, layout, pages, progress);
            let result = self.serve(listener, &mut served);
            if let (Err(error), true) = (&result, served.is_handed_over()) {
                self.machine.fail(error);
            }
            // Both threads end: nobody asks, and nobody has anything to do.
            self.misses.close();
            result.map(|()| served.report())
        })
    }

    /// Connection after connection.
    fn serve(&self, listener: &TcpListener, served: &mut Served<'_, M>) -> Result<(), Error> {
        loop {
            let stream = loop {
                if let Some(stream) = accept(listener)? {
                    break stream;
                }
                if served.is_complete_without_peer() {
                    return Ok(());
                }
                served.check_without_peer()?;
            };
            let Ok((sender, mut receiver)) = link::split(stream, self.options.stall) else {
                continue;
            };
            let sender = Arc::new(sender);
            let over = served.connection(&sender, &mut receiver);
            lock(&served.shared.link).sender = None;
            served.broke(receiver.bytes());
            match over {
                Over::Done => {
                    sender.close();
                    return Ok(());
                }
                Over::Broken(why) => {
                    tracing::info!("the connection from the source is over: {why}");
                    served.why = why;
                }
                Over::Failed(error) => {
                    sender.close();
                    return Err(error);
                }
            }
            sender.close();
        }
    }

    /// Ask for what is missed.
    fn ask(&self, shared: &Shared) {
        while !self.misses.is_closed() {
            let sender = {
                let link = lock(&shared.link);
                link.sender.clone().filter(|_| link.answered)
            };
            let Some(sender) = sender else {
                thread::sleep(TICK / 4);
                continue;
            };
            if !self.misses.wait(TICK) {
                continue;
            }
            let _order = lock(&shared.order);
            let ranges = self.misses.take(MAX_RANGES);
            if !ranges.is_empty() && sender.send(&Message::Request(ranges)).is_err() {
                self.misses.again();
            }
        }
    }

    /// Load the state, start the guest.
    fn work(&self, shared: &Shared, todo: mpsc::Receiver<Job>) {
        for job in todo {
            let (result, doing, message) = match job {
                Job::Load(state) => (
                    self.machine.load(&state),
                    "load the guest's state",
                    Message::Ready,
                ),
                Job::Start => (self.machine.start(), "start the guest", Message::Started),
            };
            let mut link = lock(&shared.link);
            if let Err(error) = result {
                link.failed = Some(Error::machine(doing)(error));
                return;
            }
            match message {
                Message::Ready => link.loaded = true,
                _ => link.started = true,
            }
            let sender = link.sender.clone();
            drop(link);
            if let Some(sender) = sender {
                // If it does not arrive, the next greeting tells it.
                let _ = sender.send(&message);
            }
        }
    }
}

/// A connection, if one comes within a tick.
fn accept(listener: &TcpListener) -> Result<Option<std::net::TcpStream>, Error> {
    let tick = Timespec {
        tv_sec: 0,
        tv_nsec: TICK.subsec_nanos().into(),
    };
    // An error of poll() itself shows again at accept().
    let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&tick));
    match listener.accept() {
        Ok((stream, _)) => match stream.set_nonblocking(false) {
            Ok(()) => Ok(Some(stream)),
            Err(_) => Ok(None),
        },
        Err(error) => match error.kind() {
            std::io::ErrorKind::WouldBlock
            | std::io::ErrorKind::Interrupted
            | std::io::ErrorKind::ConnectionAborted => Ok(None),
            _ => Err(Error::Listen(error)),
        },
    }
}

fn millis(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}
