//! Asks a server for pages, and goes on asking when the connection breaks.

use super::{
    attempt::{ask, greet, is_timeout, refusal, unreachable, Attempt},
    net::Stream,
    proto::{self, Bad, Kind},
    Address, Content, Counters, Error, PageSource, RangeSet,
};
use crate::PageRange;
use std::{
    io,
    io::Read,
    sync::{
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
        Mutex, MutexGuard, PoisonError,
    },
    thread,
    time::{Duration, Instant},
};

/// The first pause between two attempts to connect; it doubles until [`Options::max_backoff`].
const FIRST_BACKOFF: Duration = Duration::from_millis(20);

/// How often a client that waits looks whether it is to stop.
const TICK: Duration = Duration::from_millis(20);

/// How a client deals with a bad network.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long one attempt to connect may take, and how long the first connection is tried at all.
    pub connect_timeout: Duration,
    /// A connection that brings nothing for this long while pages are wanted is taken for broken.
    pub stall_timeout: Duration,
    /// The longest pause between two attempts to connect.
    pub max_backoff: Duration,
    /// After this long without a connection it is an error; `None`: never.
    pub give_up: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
            max_backoff: Duration::from_secs(2),
            give_up: None,
        }
    }
}

struct Wanted {
    pages: RangeSet,
    // When something was last received, or began to be wanted.
    since: Instant,
}

struct Receiver {
    stream: Stream,
    input: Vec<u8>,
    // Where in `input` the bytes begin that are not used up.
    used: usize,
}

/// How often in a row a peer that once was right may refuse before it is taken for wrong: bytes that were
/// damaged on their way look like nonsense to the other side.
const MAX_REFUSALS: u32 = 8;

/// A connection to a [`Server`](super::Server).
///
/// When the connection breaks, [`recv`](PageSource::recv) makes a new one and asks again for what has not
/// come: it costs time, not data. It never gives a page that nobody waits for, nor one of them twice.
pub struct Client {
    address: Address,
    options: Options,
    pages: u64,
    // Locked in this order: receiver, sender, wanted.
    receiver: Mutex<Option<Receiver>>,
    sender: Mutex<Option<Stream>>,
    wanted: Mutex<Wanted>,
    stopped: AtomicBool,
    // Refusals since the last page.
    refusals: AtomicU32,
    bytes: AtomicU64,
    reconnects: AtomicU64,
    unwanted: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these mutexes hold is whole between any two calls that change it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    /// Connect to a server. It is tried for [`Options::connect_timeout`].
    pub fn connect(address: Address, options: Options) -> Result<Self, Error> {
        let start = Instant::now();
        let mut backoff = FIRST_BACKOFF;
        let (stream, pages) = loop {
            match greet(&address, &options) {
                Ok(greeted) => break greeted,
                Err(Attempt::Fatal(error)) => return Err(error),
                Err(Attempt::Again(error)) => {
                    if start.elapsed() + backoff >= options.connect_timeout {
                        return Err(unreachable(&address, start, error));
                    }
                    thread::sleep(backoff);
                    backoff *= 2;
                }
            }
        };
        let client = Self {
            address,
            options,
            pages,
            receiver: Mutex::new(None),
            sender: Mutex::new(None),
            wanted: Mutex::new(Wanted {
                pages: RangeSet::new(),
                since: Instant::now(),
            }),
            stopped: AtomicBool::new(false),
            refusals: AtomicU32::new(0),
            bytes: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
            unwanted: AtomicU64::new(0),
        };
        let receiver = client.install(stream)?;
        *lock(&client.receiver) = Some(receiver);
        Ok(client)
    }

    /// The server.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Pages that were asked for and have not come yet.
    pub fn outstanding(&self) -> u64 {
        lock(&self.wanted).pages.count()
    }

    /// Make a greeted connection the one that is used, and ask on it for all that is wanted.
    fn install(&self, stream: Stream) -> Result<Receiver, Error> {
        let io = |error| Error::io(format!("the connection to {}", self.address), error);
        let half = stream.try_clone().map_err(io)?;
        let mut sender = lock(&self.sender);
        let again: Vec<PageRange> = {
            let mut wanted = lock(&self.wanted);
            wanted.since = Instant::now();
            wanted.pages.iter().collect()
        };
        *sender = Some(half);
        ask(&mut sender, &again);
        // stop() must find either this stream or the flag read below.
        if self.stopped.load(Ordering::SeqCst) {
            stream.shutdown();
            return Err(Error::Stopped);
        }
        Ok(Receiver {
            stream,
            input: Vec::new(),
            used: 0,
        })
    }

    /// Connect again until it works, or `deadline` (then `None`).
    fn reconnect(&self, since: Instant, deadline: Instant) -> Result<Option<Receiver>, Error> {
        let mut backoff = FIRST_BACKOFF;
        loop {
            self.check_stopped()?;
            let error = match greet(&self.address, &self.options) {
                Ok((stream, pages)) if pages == self.pages => {
                    self.reconnects.fetch_add(1, Ordering::Relaxed);
                    tracing::info!("connected to {} again", self.address);
                    return self.install(stream).map(Some);
                }
                Ok((_, pages)) => {
                    let what = format!("its source has {pages} pages, it had {}", self.pages);
                    return Err(self.protocol(what));
                }
                Err(Attempt::Fatal(error)) => return Err(error),
                Err(Attempt::Again(error)) => error,
            };
            if self
                .options
                .give_up
                .is_some_and(|give_up| since.elapsed() >= give_up)
            {
                return Err(unreachable(&self.address, since, error));
            }
            tracing::warn!(
                "no connection to {}: {error}; it is tried again",
                self.address
            );
            let until = Instant::now() + backoff;
            while Instant::now() < until {
                self.check_stopped()?;
                if Instant::now() >= deadline {
                    return Ok(None);
                }
                thread::sleep(TICK.min(backoff));
            }
            backoff = (backoff * 2).min(self.options.max_backoff);
        }
    }

    /// Why it is tried again, unless the peer was forgiven too often.
    fn forgive(&self, attempt: Attempt) -> Result<io::Error, Error> {
        match attempt {
            Attempt::Again(error) => Ok(error),
            Attempt::Fatal(error)
                if self.refusals.fetch_add(1, Ordering::Relaxed) >= MAX_REFUSALS =>
            {
                Err(error)
            }
            Attempt::Fatal(error) => Ok(io::Error::other(error)),
        }
    }

    fn check_stopped(&self) -> Result<(), Error> {
        match self.stopped.load(Ordering::SeqCst) {
            true => Err(Error::Stopped),
            false => Ok(()),
        }
    }

    fn protocol(&self, what: String) -> Error {
        Error::Protocol {
            address: self.address.to_string(),
            what,
        }
    }

    /// Whether the connection is to be taken for broken.
    fn is_stalled(&self) -> bool {
        let wanted = lock(&self.wanted);
        !wanted.pages.is_empty() && wanted.since.elapsed() >= self.options.stall_timeout
    }

    /// Give the wanted part of what came to `sink`.
    fn deliver(
        &self,
        range: PageRange,
        content: Content<'_>,
        sink: &mut dyn FnMut(PageRange, Content<'_>),
    ) -> usize {
        let parts = {
            let mut wanted = lock(&self.wanted);
            wanted.since = Instant::now();
            wanted.pages.remove(range)
        };
        let delivered: u64 = parts.iter().map(|part| part.count).sum();
        self.unwanted
            .fetch_add(range.count - delivered, Ordering::Relaxed);
        for part in &parts {
            let part_content = match content {
                Content::Data(data) => {
                    let page = data.len() / range.count as usize;
                    let start = (part.first - range.first) as usize * page;
                    Content::Data(&data[start..start + part.count as usize * page])
                }
                other => other,
            };
            sink(*part, part_content);
        }
        parts.len()
    }

    /// Give all whole frames that were received to `sink`.
    fn drain(
        &self,
        receiver: &mut Receiver,
        sink: &mut dyn FnMut(PageRange, Content<'_>),
    ) -> Result<usize, Attempt> {
        let mut runs = 0;
        loop {
            let frame = proto::parse_frame(&receiver.input[receiver.used..], proto::MAX_TO_CLIENT);
            let Some((kind, payload)) = frame.map_err(|bad| self.bad(bad))? else {
                break;
            };
            let len = proto::HEADER + payload.len();
            match kind {
                Kind::Pages => {
                    let (range, content) =
                        proto::parse_pages(payload, self.pages).map_err(|bad| self.bad(bad))?;
                    runs += self.deliver(range, content, sink);
                }
                Kind::Error => return Err(refusal(&self.address, payload)),
                other => {
                    let what = format!("it sends {other:?} where pages belong");
                    return Err(Attempt::Fatal(self.protocol(what)));
                }
            }
            receiver.used += len;
        }
        receiver.input.drain(..receiver.used);
        receiver.used = 0;
        Ok(runs)
    }

    /// Bytes that were damaged on their way may come whole the next time; a wrong peer stays wrong.
    fn bad(&self, bad: Bad) -> Attempt {
        tracing::warn!("from {}: {bad}", self.address);
        Attempt::Again(io::Error::new(io::ErrorKind::InvalidData, bad.what))
    }

    fn recv_from(
        &self,
        receiver: &mut Receiver,
        deadline: Instant,
        sink: &mut dyn FnMut(PageRange, Content<'_>),
    ) -> Result<usize, Attempt> {
        loop {
            let runs = self.drain(receiver, sink)?;
            if runs > 0 {
                return Ok(runs);
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(0);
            }
            if self.is_stalled() {
                return Err(Attempt::Again(io::ErrorKind::TimedOut.into()));
            }
            // A socket's timeout of 0 would mean none.
            let timeout =
                (deadline - now).clamp(Duration::from_millis(1), self.options.stall_timeout);
            receiver
                .stream
                .set_timeouts(Some(timeout), Some(self.options.stall_timeout))
                .map_err(Attempt::Again)?;
            let mut chunk = [0; 65536];
            match (&receiver.stream).read(&mut chunk) {
                Ok(0) => return Err(Attempt::Again(io::ErrorKind::UnexpectedEof.into())),
                Ok(len) => {
                    self.bytes.fetch_add(len as u64, Ordering::Relaxed);
                    lock(&self.wanted).since = Instant::now();
                    receiver.input.extend_from_slice(&chunk[..len]);
                }
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(Attempt::Again(error)),
            }
        }
    }
}

impl PageSource for Client {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn request(&self, ranges: &[PageRange]) -> Result<(), Error> {
        super::check_ranges(ranges, self.pages)?;
        self.check_stopped()?;
        let mut sender = lock(&self.sender);
        let new: Vec<PageRange> = {
            let mut wanted = lock(&self.wanted);
            if wanted.pages.is_empty() {
                wanted.since = Instant::now();
            }
            ranges
                .iter()
                .flat_map(|range| wanted.pages.insert(*range))
                .collect()
        };
        ask(&mut sender, &new);
        Ok(())
    }

    fn recv(
        &self,
        timeout: Duration,
        sink: &mut dyn FnMut(PageRange, Content<'_>),
    ) -> Result<usize, Error> {
        let deadline = Instant::now() + timeout;
        let mut slot = lock(&self.receiver);
        let mut broken_since = None;
        loop {
            self.check_stopped()?;
            if slot.is_none() {
                // A connection that nobody needs is not made again: the server may be gone for good.
                if lock(&self.wanted).pages.is_empty() {
                    if Instant::now() >= deadline {
                        return Ok(0);
                    }
                    thread::sleep(TICK.min(deadline.saturating_duration_since(Instant::now())));
                    continue;
                }
                let since = *broken_since.get_or_insert_with(|| lock(&self.wanted).since);
                *slot = self.reconnect(since, deadline)?;
            }
            let Some(receiver) = slot.as_mut() else {
                return Ok(0);
            };
            match self.recv_from(receiver, deadline, sink) {
                Ok(runs) => return Ok(runs),
                Err(broken) => {
                    receiver.stream.shutdown();
                    *slot = None;
                    self.check_stopped()?;
                    let error = self.forgive(broken)?;
                    if self.outstanding() == 0 {
                        tracing::info!("the connection to {} has ended: {error}", self.address);
                    } else {
                        tracing::warn!("the connection to {} is broken: {error}", self.address);
                    }
                }
            }
        }
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        if let Some(stream) = lock(&self.sender).as_ref() {
            stream.shutdown();
        }
    }

    fn counters(&self) -> Counters {
        Counters {
            bytes: self.bytes.load(Ordering::Relaxed),
            reconnects: self.reconnects.load(Ordering::Relaxed),
            unwanted: self.unwanted.load(Ordering::Relaxed),
        }
    }
}
