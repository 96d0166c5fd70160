//! Serves the pages of a file to several clients.

use super::{
    net::{Listener, Stream},
    proto::{self, Bad, Code, Kind},
    Address, Content, Error, PageFile,
};
use std::{
    collections::HashMap,
    io,
    io::{BufWriter, Read, Write},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        Arc, Mutex, MutexGuard, PoisonError,
    },
    thread,
    time::Duration,
};

/// Clients at a time.
const MAX_CLIENTS: usize = 256;

/// A client must greet in this time.
const GREETING: Duration = Duration::from_secs(10);

/// A client that takes nothing for this long is hung up on.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the server looks whether it is to stop.
const TICK: Duration = Duration::from_millis(50);

/// What a server has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ServerCounters {
    /// Clients that greeted.
    pub clients: u64,
    /// Requests that were answered.
    pub requests: u64,
    /// Pages that were sent, those of zeros among them.
    pub pages: u64,
    /// Pages of zeros, for which no bytes were sent.
    pub zero_pages: u64,
    /// Pages that could not be read.
    pub failed_pages: u64,
    /// Bytes that were sent, with everything that the protocol adds.
    pub bytes: u64,
    /// Clients that were hung up on because they did not keep to the protocol.
    pub refused: u64,
}

#[derive(Default)]
struct Atomics {
    clients: AtomicU64,
    requests: AtomicU64,
    pages: AtomicU64,
    zero_pages: AtomicU64,
    failed_pages: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
}

struct Shared {
    file: PageFile,
    counters: Atomics,
    stopped: AtomicBool,
    connected: Mutex<HashMap<u64, Stream>>,
}

impl Shared {
    fn connected(&self) -> MutexGuard<'_, HashMap<u64, Stream>> {
        // The map is whole between any two of its calls.
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves the pages of a file.
pub struct Server {
    listener: Listener,
    address: Address,
    shared: Arc<Shared>,
}

/// Stops a server, and reads its counters, from another thread.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

impl Control {
    /// Hang up on every client and make [`Server::run`] return.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        for stream in self.0.connected().values() {
            stream.shutdown();
        }
    }

    /// Hang up on every client, as a network does that breaks. They may connect again.
    pub fn cut(&self) {
        for stream in self.0.connected().values() {
            stream.shutdown();
        }
    }

    /// What was counted until now.
    pub fn counters(&self) -> ServerCounters {
        let counters = &self.0.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ServerCounters {
            clients: get(&counters.clients),
            requests: get(&counters.requests),
            pages: get(&counters.pages),
            zero_pages: get(&counters.zero_pages),
            failed_pages: get(&counters.failed_pages),
            bytes: get(&counters.bytes),
            refused: get(&counters.refused),
        }
    }
}

impl Server {
    /// Listen at an address. Port 0 is any free one: see [`Server::address`].
    pub fn bind(address: &Address, file: PageFile) -> Result<Self, Error> {
        let io = |error| Error::io(format!("cannot listen at {address}"), error);
        let listener = Listener::bind(address).map_err(io)?;
        let address = listener.address().map_err(io)?;
        Ok(Self {
            listener,
            address,
            shared: Arc::new(Shared {
                file,
                counters: Atomics::default(),
                stopped: AtomicBool::new(false),
                connected: Mutex::default(),
            }),
        })
    }

    /// The address that it listens at.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What stops it from another thread.
    pub fn control(&self) -> Control {
        Control(Arc::clone(&self.shared))
    }

    /// Serve until [`Control::stop`] is called.
    pub fn run(&self) -> Result<(), Error> {
        let mut next = 0;
        while !self.shared.stopped.load(Ordering::SeqCst) {
            let stream = match self.listener.accept(TICK) {
                Ok(Some(stream)) => stream,
                Ok(None) => continue,
                Err(error) => {
                    // Out of file descriptors, or a client that is gone already: those who are there go on.
                    tracing::warn!(
                        "a client could not be accepted at {}: {error}",
                        self.address
                    );
                    thread::sleep(TICK);
                    continue;
                }
            };
            next += 1;
            self.admit(next, stream)?;
        }
        Ok(())
    }

    fn admit(&self, id: u64, stream: Stream) -> Result<(), Error> {
        let mut connected = self.shared.connected();
        if connected.len() >= MAX_CLIENTS {
            let bad = Bad {
                code: Code::Busy,
                what: format!("there are {MAX_CLIENTS} clients already"),
            };
            drop(connected);
            // It is hung up on whether it hears why or not.
            let _ = proto::write_error(&mut &stream, &bad);
            return Ok(());
        }
        let Ok(clone) = stream.try_clone() else {
            return Ok(());
        };
        connected.insert(id, clone);
        drop(connected);
        let shared = Arc::clone(&self.shared);
        thread::Builder::new()
            .name("serve".to_owned())
            .spawn(move || {
                let peer = stream.peer();
                let result = Connection::new(&shared, &stream).serve();
                shared.connected().remove(&id);
                stream.shutdown();
                match result {
                    Ok(()) => tracing::info!("{peer} has hung up"),
                    Err(error) => tracing::warn!("hung up on {peer}: {error}"),
                }
            })
            .map_err(|error| Error::io("cannot start a thread for a client", error))?;
        Ok(())
    }
}

struct Connection<'a> {
    shared: &'a Shared,
    stream: &'a Stream,
    out: BufWriter<&'a Stream>,
    // Bytes that were received and are not used up.
    input: Vec<u8>,
}

impl<'a> Connection<'a> {
    fn new(shared: &'a Shared, stream: &'a Stream) -> Self {
        Self {
            shared,
            stream,
            out: BufWriter::with_capacity(proto::MAX_TO_CLIENT + proto::HEADER, stream),
            input: Vec::new(),
        }
    }

    fn count(&self, counter: fn(&Atomics) -> &AtomicU64, more: u64) {
        counter(&self.shared.counters).fetch_add(more, Ordering::Relaxed);
    }

    /// Serve until the client hangs up, or does not keep to the protocol.
    fn serve(&mut self) -> io::Result<()> {
        self.stream.set_timeouts(Some(GREETING), Some(PATIENCE))?;
        let mut greeted = false;
        let mut scratch = Vec::new();
        loop {
            let bad = match proto::parse_frame(&self.input, proto::MAX_TO_SERVER) {
                Ok(Some((kind, payload))) => {
                    let used = proto::HEADER + payload.len();
                    let handled = match (kind, greeted) {
                        (Kind::Hello, false) => proto::parse_hello(payload).map(|()| None),
                        (Kind::Request, true) => {
                            proto::parse_request(payload, self.shared.file.pages()).map(Some)
                        }
                        (kind, _) => Err(Bad {
                            code: Code::Malformed,
                            what: format!(
                                "{kind:?} is not what a client sends {}",
                                if greeted { "now" } else { "first" }
                            ),
                        }),
                    };
                    match handled {
                        Ok(ranges) => {
                            self.input.drain(..used);
                            match ranges {
                                None => self.welcome()?,
                                Some(ranges) => self.answer(&ranges, &mut scratch)?,
                            }
                            greeted = true;
                            continue;
                        }
                        Err(bad) => bad,
                    }
                }
                Ok(None) => {
                    // All that was asked is answered: nothing may stay in the buffer.
                    self.out.flush()?;
                    if self.receive()? == 0 {
                        return Ok(());
                    }
                    continue;
                }
                Err(bad) => bad,
            };
            return self.refuse(bad);
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 16384];
        let len = self.stream.read(&mut chunk)?;
        self.input.extend_from_slice(&chunk[..len]);
        Ok(len)
    }

    fn welcome(&mut self) -> io::Result<()> {
        let pages = self.shared.file.pages().to_le_bytes();
        let bytes = proto::write_frame(&mut self.out, Kind::Welcome, &[&proto::hello(), &pages])?;
        self.count(|counters| &counters.bytes, bytes);
        self.count(|counters| &counters.clients, 1);
        tracing::info!("{} is a client", self.stream.peer());
        // From now on it may be silent for as long as it likes.
        self.stream.set_timeouts(None, Some(PATIENCE))
    }

    fn answer(&mut self, ranges: &[crate::PageRange], scratch: &mut Vec<u8>) -> io::Result<()> {
        let (out, counters) = (&mut self.out, &self.shared.counters);
        for range in ranges {
            self.shared
                .file
                .read(*range, scratch, &mut |range, content| {
                    let bytes = proto::write_pages(out, range, content)?;
                    let count =
                        |counter: &AtomicU64, more| counter.fetch_add(more, Ordering::Relaxed);
                    count(&counters.bytes, bytes);
                    match content {
                        Content::Data(_) => count(&counters.pages, range.count),
                        Content::Zero => {
                            count(&counters.zero_pages, range.count);
                            count(&counters.pages, range.count)
                        }
                        Content::Failed(_) => count(&counters.failed_pages, range.count),
                    };
                    Ok(())
                })?;
        }
        self.count(|counters| &counters.requests, 1);
        Ok(())
    }

    fn refuse(&mut self, bad: Bad) -> io::Result<()> {
        self.count(|counters| &counters.refused, 1);
        proto::write_error(&mut self.out, &bad)?;
        self.out.flush()?;
        Err(io::Error::new(io::ErrorKind::InvalidData, bad.what))
    }
}
