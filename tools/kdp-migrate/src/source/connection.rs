//! A source's connection: made by it, and read by a thread of its own, so that a request is seen while pages are sent.

use crate::{
    link::{self, End, Received, Receiver, Sender, TICK},
    lock,
    wire::{Figures, Had, Message, MigrationId, Stage, MAX_RANGES},
    PageSet,
};
use kvm_demand_paging::PageRange;
use std::{
    io,
    net::{TcpStream, ToSocketAddrs},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Ranges that may wait to be answered: many more than a right peer asks for.
const MAX_WAITING: usize = 16 * MAX_RANGES;

/// What must be dealt with in the order in which it came: a request that comes behind the ack of its page means it.
pub(super) enum Event {
    Acked(u64),
    Wanted(Vec<PageRange>),
}

/// What the destination has said since it was looked at last.
#[derive(Default)]
pub(super) struct Said {
    pub(super) events: Vec<Event>,
    // Ranges in those.
    wanted: usize,
    pub(super) ready: bool,
    pub(super) started: bool,
    pub(super) done: Option<Figures>,
    pub(super) end: Option<End>,
    pub(super) heard: bool,
}

#[derive(Default)]
struct Inbox {
    said: Mutex<Said>,
    changed: Condvar,
}

/// A connection whose greeting is over.
pub(super) struct Connection {
    pub(super) sender: Sender,
    /// How far the destination was when it was made.
    pub(super) stage: Stage,
    /// What it had of what was sent before; and the pages that were there, if it told those.
    pub(super) had: Had,
    pub(super) here: PageSet,
    inbox: Arc<Inbox>,
    reader: Option<JoinHandle<()>>,
}

impl Connection {
    /// Connect and greet, for a guest of `pages` pages.
    pub(super) fn dial(
        address: &str,
        hello: &Message<'_>,
        id: MigrationId,
        pages: u64,
        stall: Duration,
    ) -> Result<Self, End> {
        let (sender, mut receiver) = link::split(connect(address, stall)?, stall)?;
        sender.send(hello)?;
        let mut here = PageSet::new(pages);
        let mut heard = Instant::now();
        let (stage, had) = loop {
            match receiver.receive()? {
                Received::Message(Message::Here { first, words }) => {
                    heard = Instant::now();
                    let words = (first / u64::from(u64::BITS)..).zip(words);
                    words.for_each(|(index, bits)| here.merge_word(index, bits));
                }
                Received::Message(Message::Welcome {
                    id: theirs,
                    stage,
                    had,
                }) if theirs == id => break (stage, had),
                Received::Message(message) => {
                    return Err(End::Broken(format!(
                        "the destination greets with {message:?}"
                    )))
                }
                Received::Nothing if heard.elapsed() > stall => {
                    return Err(End::Broken("the destination does not greet".into()))
                }
                Received::Nothing => {}
            }
        };
        // A page that is taken to be there and is not would never be sent.
        let told = match had {
            Had::Frames(_) => 0,
            Had::Pages(count) => count,
        };
        if told != here.count() {
            return Err(End::Broken(format!(
                "the destination greets with {had:?}, and told of {} pages",
                here.count()
            )));
        }
        let inbox = Arc::new(Inbox::default());
        let reader = {
            let inbox = Arc::clone(&inbox);
            thread::Builder::new()
                .name("migrate-acks".into())
                .spawn(move || inbox.read(&mut receiver))?
        };
        Ok(Self {
            sender,
            stage,
            had,
            here,
            inbox,
            reader: Some(reader),
        })
    }

    /// What was said since the last call.
    pub(super) fn said(&self) -> Said {
        std::mem::take(&mut *lock(&self.inbox.said))
    }

    /// Wait until something is said, at most for so long.
    pub(super) fn wait(&self, patience: Duration) {
        let said = lock(&self.inbox.said);
        if !said.heard && said.end.is_none() {
            // Woken or not, poisoned or not: the caller looks.
            drop(self.inbox.changed.wait_timeout(said, patience));
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.sender.close();
        if let Some(reader) = self.reader.take() {
            // It ends within a tick. That it panicked was seen by whoever waits for what it reads.
            let _ = reader.join();
        }
    }
}

impl Inbox {
    fn read(&self, receiver: &mut Receiver) {
        loop {
            let result = receiver.receive();
            let mut said = lock(&self.said);
            match result {
                Ok(Received::Nothing) => continue,
                Ok(Received::Message(message)) => said.take(message),
                Err(end) => said.end = Some(end),
            }
            said.heard = true;
            let over = said.end.is_some();
            self.changed.notify_all();
            if over {
                return;
            }
        }
    }
}

impl Said {
    fn take(&mut self, message: Message<'_>) {
        match message {
            Message::Ack(had) => match self.events.last_mut() {
                Some(Event::Acked(before)) => *before = had,
                _ => self.events.push(Event::Acked(had)),
            },
            Message::Request(ranges) if self.wanted + ranges.len() <= MAX_WAITING => {
                self.wanted += ranges.len();
                self.events.push(Event::Wanted(ranges));
            }
            Message::Request(_) => {
                self.end = Some(End::Broken(
                    "the destination floods us with requests".into(),
                ));
            }
            Message::Ready => self.ready = true,
            Message::Started => self.started = true,
            Message::Done(figures) => self.done = Some(figures),
            message => {
                self.end = Some(End::Broken(format!("the destination sent {message:?}")));
            }
        }
    }
}

fn connect(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(
        io::ErrorKind::AddrNotAvailable,
        format!("'{address}' names no address"),
    );
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout.max(TICK)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}
