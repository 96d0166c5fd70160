//! Serves the faults of a VM from a page source.
//!
//! A [`Handler`] reads the VM's events, asks the source for the pages, places what comes through its own
//! mapping of the memfds (data, then the page's bit), and marks the pages that somebody waits for, so that
//! they are woken. With a second connection to the source it also fetches, in the background, what nobody
//! has touched yet: touched pages come through the first one and overtake it.
//!
//! A page is placed at most once between two times that it is absent, however many copies of it come. What
//! a dead handler had begun is known from the present bitmap, and from the events, which are delivered again.
//!
//! One handler serves a VM at a time, and nobody else writes to absent pages of its memslots or marks them
//! zero while it does. It maps the present bitmaps: stop it before a memslot is removed or its demand paging
//! is switched off.

mod background;
mod engine;
mod report;
mod slot;
mod slots;

#[cfg(test)]
mod tests;

pub use report::{Report, Touched};

use crate::{
    source::{self, PageSource},
    MemslotInfo, Ready, Vm, Waiter,
};
use background::Background;
use engine::{Batch, Engine};
use rustix::{
    event::{eventfd, EventfdFlags},
    fd::OwnedFd,
    io::{write, Errno},
};
use slot::Slot;
use std::{collections::BTreeMap, io, thread, time::Duration};

/// How long a thread waits before it looks at what is not told by an event.
const TICK: Duration = Duration::from_millis(200);

/// Events that are read at once.
const EVENTS: usize = 64;

/// Why a handler cannot go on, or a page could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The module, or a mapping.
    #[error(transparent)]
    Module(#[from] crate::Error),
    /// The page source.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The source's pages and the memslots' do not fit together.
    #[error("{0}")]
    Layout(String),
    /// The source cannot read a page.
    #[error(
        "the source cannot read page {page} of memslot {slot_id}: errno {errno}; it stays absent"
    )]
    Unreadable {
        /// The memslot.
        slot_id: u32,
        /// The page.
        page: u64,
        /// What reading it failed with.
        errno: i32,
    },
    /// A system call of the handler's own.
    #[error("{what}: {source}")]
    Io {
        /// The call.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// How a handler works.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Which page of the source is a memslot's page 0, by the memslot's id. Memslots that are not named here
    /// have their pages at their guest frame numbers.
    pub layout: BTreeMap<u32, u64>,
    /// The most bytes of pages a second that are asked for in the background.
    pub bandwidth: Option<u64>,
}

/// Serves the faults of a VM.
///
/// ```no_run
/// use kvm_demand_paging::{handler::{Config, Handler}, source::{Location, Options}, Vm};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let vm = Vm::open()?;
/// let source: Location = "tcp:192.0.2.1:7000".parse()?;
/// let options = Options::default();
/// let handler = Handler::new(
///     vm,
///     source.open(&options)?,
///     Some(source.open(&options)?), // the rest, in the background
///     Config::default(),
/// )?;
/// std::thread::scope(|scope| {
///     let served = scope.spawn(|| handler.run());
///     // ... until the guest has ended:
///     handler.stop();
///     served.join()
/// }).expect("a panic in the handler")?;
/// println!("{:?}", handler.report());
/// # Ok(())
/// # }
/// ```
pub struct Handler {
    engine: Engine<Vm>,
    background: Option<Background>,
    layout: BTreeMap<u32, u64>,
    wake: OwnedFd,
}

impl Handler {
    /// Prepare to serve all memslots of `vm` that have demand paging on: touched pages from `faults`, and,
    /// if there is such a source, the rest from `background`.
    ///
    /// Sets O_NONBLOCK on the VM's fd.
    pub fn new(
        vm: Vm,
        faults: Box<dyn PageSource>,
        background: Option<Box<dyn PageSource>>,
        config: Config,
    ) -> Result<Self, Error> {
        vm.set_nonblocking(true)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| {
            Error::Io {
                what: "eventfd",
                source: errno.into(),
            }
        })?;
        let handler = Self {
            engine: Engine::new(vm, faults)?,
            background: background.map(|source| Background::new(source, config.bandwidth)),
            layout: config.layout,
            wake,
        };
        handler.attach_new()?;
        Ok(handler)
    }

    /// Serve the memslots that have come into being since the last time.
    fn attach_new(&self) -> Result<(), Error> {
        for info in self.engine.vm().memslots() {
            let info = info?;
            if info.paging && self.engine.slots.get(info.slot_id).is_none() {
                self.attach(info)?;
            }
        }
        Ok(())
    }

    fn attach(&self, info: MemslotInfo) -> Result<(), Error> {
        let first = self
            .layout
            .get(&info.slot_id)
            .copied()
            .unwrap_or(info.base_gfn);
        let has = self.engine.faults().pages();
        if first > has || info.pages > has - first {
            return Err(Error::Layout(format!(
                "memslot {} has {} pages, from page {first} of the source, but the source has {has} pages: \
                 check that it is the right one, and where in it the memslot is",
                info.slot_id, info.pages
            )));
        }
        tracing::info!(
            "memslot {}: {} pages from GFN {:#x}, page {first} of the source",
            info.slot_id,
            info.pages,
            info.base_gfn
        );
        let slot = Slot::attach(self.engine.vm(), info, first)?;
        self.engine.slots.insert(slot)
    }

    /// Serve until [`stop`](Self::stop) is called or it cannot go on.
    pub fn run(&self) -> Result<(), Error> {
        let (engine, background) = (&self.engine, &self.background);
        // Whichever thread ends first takes the others with it.
        let stopping = |result: Result<(), Error>| {
            self.stop();
            match result {
                Err(Error::Source(source::Error::Stopped)) => Ok(()),
                other => other,
            }
        };
        thread::scope(|scope| {
            let pages = scope.spawn(|| {
                let _guard = StopOnPanic(self);
                stopping(receive_pages(engine))
            });
            let rest = background.as_ref().map(|background| {
                scope.spawn(|| {
                    let _guard = StopOnPanic(self);
                    background.run(engine).or_else(|error| stopping(Err(error)))
                })
            });
            let _guard = StopOnPanic(self);
            let mut results = vec![stopping(self.read_events())];
            for thread in [Some(pages), rest].into_iter().flatten() {
                // A panic of one thread is one of all.
                results.push(
                    thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                );
            }
            results.into_iter().collect()
        })
    }

    fn read_events(&self) -> Result<(), Error> {
        let waiter = Waiter::new(self.engine.vm(), &self.wake)?;
        let mut events = Vec::with_capacity(EVENTS);
        while !self.engine.is_stopped() {
            if waiter.wait(Some(TICK))? == Ready::Events {
                self.serve_events(&mut events)?;
            }
            self.engine.retry()?;
        }
        Ok(())
    }

    fn serve_events(&self, events: &mut Vec<crate::Event>) -> Result<(), Error> {
        events.clear();
        match self.engine.vm().read_events(events, EVENTS) {
            Ok(_) => {}
            Err(error) if is_nothing_there(&error) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        if events
            .iter()
            .any(|event| self.engine.slots.get(event.slot_id).is_none())
        {
            self.attach_new()?;
        }
        self.engine.on_events(events)
    }

    /// Fetch a page for a vCPU thread that got a [`FaultExit`](crate::FaultExit): wait until it is present
    /// (or zero), and KVM_RUN can be entered again. [`run`](Self::run) must be running.
    pub fn fetch(&self, slot_id: u32, page: u64) -> Result<(), Error> {
        self.engine.fetch(slot_id, page)
    }

    /// Make [`run`](Self::run) return, and [`fetch`](Self::fetch) fail.
    pub fn stop(&self) {
        self.engine.stop();
        if let Some(background) = &self.background {
            background.stop();
        }
        // It only fails when it would wait, and then the thread is being woken already.
        let _ = write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Whether the background has nothing left to fetch.
    pub fn is_complete(&self) -> bool {
        self.background
            .as_ref()
            .is_some_and(Background::is_complete)
    }

    /// What has been done until now.
    pub fn report(&self) -> Report {
        let mut report = self.engine.report();
        if let Some(background) = &self.background {
            let counters = background.counters();
            report.bytes_received += counters.bytes;
            report.reconnects += counters.reconnects;
            report.complete = background.is_complete();
        }
        report
    }
}

/// Ends the other threads when one panics: none of them can do the work of another.
struct StopOnPanic<'a>(&'a Handler);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop();
        }
    }
}

/// Place what was asked for because somebody touched it.
fn receive_pages(engine: &Engine<Vm>) -> Result<(), Error> {
    loop {
        receive_once(engine, engine.faults(), TICK)?;
    }
}

/// Place what is there, or comes within `timeout`, and wake those who wait for it. How many pages came.
fn receive_once<M: engine::Marks>(
    engine: &Engine<M>,
    source: &dyn PageSource,
    timeout: Duration,
) -> Result<u64, Error> {
    let mut batch = Batch::default();
    let mut placed = Ok(());
    let mut pages = 0;
    let received = source.recv(timeout, &mut |range, content| {
        pages += range.count;
        if placed.is_ok() {
            placed = engine.on_pages(range, content, &mut batch);
        }
    });
    // What was placed is marked, whatever happened then.
    engine.resolve(batch)?;
    placed?;
    received?;
    Ok(pages)
}

fn is_nothing_there(error: &crate::Error) -> bool {
    [Errno::AGAIN, Errno::INTR]
        .iter()
        .any(|errno| error.errno() == Some(errno.raw_os_error()))
}
