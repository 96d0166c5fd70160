//! The engine of the source: one thread that reads, harvests, processes hints and sends, so that the rule of
//! [`hints`](crate::hints) needs no lock; and a thread that reads what the destination says.

mod connection;

use self::connection::{Connection, Event};
use crate::{
    bucket::Bucket,
    hints::Gate,
    ledbat::Ledbat,
    link::{End, TICK},
    rounds::Rounds,
    schedule::SendMap,
    wire::{
        Code, Data, Had, Message, MigrationId, Reason, Stage, HEADER, MAX_CHUNK, MAX_PAGES,
        MAX_WORDS,
    },
    Content, Error, Failure, Guest, Layout, PageSet, Phase, Progress, SourceMachine, SourceOptions,
    SourceReport,
};
use kvm_demand_paging::{PageRange, PAGE_SIZE};
use std::{
    thread,
    time::{Duration, Instant},
};

/// Pages of one frame that nobody waits for, after the switch, at least and at most: a requested page waits behind one of
/// them. Larger ones cost less, and are sent where much is on its way.
const BACKGROUND_PAGES: [u64; 2] = [4, 16];

/// Of what may be on its way after the switch, a frame is such a part.
const BACKGROUND_FRAMES: u64 = 16;

/// The first pause between two attempts to connect; it doubles up to a second.
const FIRST_BACKOFF: Duration = Duration::from_millis(10);

/// How often the callback is told.
const PROGRESS: Duration = Duration::from_millis(50);

/// Gives a guest away.
pub struct Source<M> {
    machine: M,
    options: SourceOptions,
}

/// Why a phase was left before its end.
enum Stop {
    Connection(End),
    Fatal(Error),
}

impl From<End> for Stop {
    fn from(end: End) -> Self {
        Self::Connection(end)
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

impl<M: SourceMachine> Source<M> {
    /// A guest that is to leave.
    pub fn new(machine: M, options: SourceOptions) -> Self {
        Self { machine, options }
    }

    /// Give the guest to the destination that listens at `address` (HOST:PORT), and return when it has every page.
    ///
    /// # Errors
    ///
    /// [`Failure::guest`] says where the guest is.
    pub fn run(
        &self,
        address: &str,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<SourceReport, Failure> {
        let mut run =
            Run::new(&self.machine, &self.options, address, progress).map_err(|error| Failure {
                error,
                guest: Guest::RunsHere,
            })?;
        match run.go() {
            Ok(()) => Ok(run.report()),
            Err(error) => Err(run.fail(error)),
        }
    }
}

struct Run<'a, M> {
    machine: &'a M,
    options: &'a SourceOptions,
    address: &'a str,
    progress: &'a mut dyn FnMut(&Progress),
    told: Option<Instant>,
    id: MigrationId,
    layout: Layout,
    pages: u64,
    start: Instant,
    phase: Phase,
    map: SendMap,
    gate: Gate,
    bucket: Bucket,
    ledbat: Ledbat,
    rounds: Rounds,
    // Of the round that is being sent: when it began, and its bytes.
    round: (Instant, u64),
    written: PageSet,
    logging: bool,
    connection: Option<Connection>,
    // The destination, as far as it is known.
    stage: Stage,
    ready: bool,
    all_sent: bool,
    heard: Instant,
    pinged: Instant,
    // Since when there has been no connection over which something got on.
    broken: Option<Instant>,
    // Since when the guest is stopped, or was tried to be.
    stopped: Option<Instant>,
    state: Option<Vec<u8>>,
    // The order to run the guest was sent, or may have been. It is never taken back.
    committed: bool,
    started: Option<Instant>,
    buffer: Vec<u8>,
    report: SourceReport,
}

impl<'a, M: SourceMachine> Run<'a, M> {
    fn new(
        machine: &'a M,
        options: &'a SourceOptions,
        address: &'a str,
        progress: &'a mut dyn FnMut(&Progress),
    ) -> Result<Self, Error> {
        let layout = machine.layout();
        let pages = layout.pages().ok_or_else(|| {
            Error::Argument("the guest has no memslot, or more pages than can be".into())
        })?;
        let id = options.id.unwrap_or_else(MigrationId::random);
        let now = Instant::now();
        Ok(Self {
            machine,
            options,
            address,
            progress,
            told: None,
            id,
            layout,
            pages,
            start: now,
            phase: Phase::PreCopy,
            map: SendMap::new(pages),
            gate: Gate::new(),
            // 50 ms at once.
            bucket: Bucket::new(options.bandwidth, options.bandwidth.unwrap_or(0) / 20),
            ledbat: Ledbat::new(
                options.postcopy_delay,
                BACKGROUND_PAGES[0] * PAGE_SIZE as u64,
                options.window,
            ),
            rounds: Rounds::new(options.rounds.clone()),
            round: (now, 0),
            written: PageSet::new(pages),
            logging: false,
            connection: None,
            stage: Stage::Copying,
            ready: false,
            all_sent: false,
            heard: now,
            pinged: now,
            broken: None,
            stopped: None,
            state: None,
            committed: false,
            started: None,
            buffer: vec![0; MAX_PAGES as usize * PAGE_SIZE],
            report: SourceReport {
                id: id.to_string(),
                pages,
                ..SourceReport::default()
            },
        })
    }

    fn go(&mut self) -> Result<(), Error> {
        self.connect("it was not tried yet".into())?;
        self.logging = true;
        self.machine
            .start_log()
            .map_err(Error::machine("log the guest's writes"))?;
        // The log is on, and all is to be sent: that stands for the first harvest.
        self.ask_for_hints();
        let lead = Instant::now();
        while self.gate.current().is_some() && lead.elapsed() < self.options.hint_lead {
            self.process_hints();
            thread::sleep(TICK.min(self.options.hint_lead));
        }
        self.heard = Instant::now();
        self.round = (Instant::now(), 0);
        while self.phase != Phase::Done {
            let step = match self.phase {
                Phase::PreCopy | Phase::Connecting => self.pre_copy(),
                Phase::Switch => self.switch(),
                Phase::PostCopy | Phase::Done => self.post_copy(),
            };
            match step {
                Ok(()) => {}
                Err(Stop::Fatal(error)) => return Err(error),
                Err(Stop::Connection(end)) => self.connect(why_again(end)?)?,
            }
        }
        Ok(())
    }

    /// Rounds, until they end.
    fn pre_copy(&mut self) -> Result<(), Stop> {
        if self.rounds.none_wanted() {
            self.phase = Phase::Switch;
            return Ok(());
        }
        loop {
            self.pump()?;
            let pause = self.bucket.wait(self.start.elapsed());
            if !pause.is_zero() || self.map.in_flight() >= self.options.window {
                self.wait(pause.max(Duration::from_millis(1)));
                continue;
            }
            let Some(run) = self
                .map
                .next_background(MAX_PAGES, |page| self.layout.end_of(page))
            else {
                break;
            };
            self.send(run, Reason::PreCopy)?;
        }
        // What is on its way counts for the round, and for what the link can do.
        while self.map.in_flight() > 0 {
            self.wait(TICK);
            self.pump()?;
        }
        self.process_hints();
        self.harvest()?;
        let (began, bytes) = self.round;
        let per_second = bytes as f64 / began.elapsed().as_secs_f64().max(1e-6);
        let left = self.map.remaining() * PAGE_SIZE as u64;
        self.report.precopy_ended = self.rounds.ended(left, per_second);
        if self.report.precopy_ended.is_some() {
            self.phase = Phase::Switch;
        } else {
            self.map.rewind();
            self.round = (Instant::now(), 0);
            self.ask_for_hints();
        }
        Ok(())
    }

    /// From the guest's stop to the point of no return.
    fn switch(&mut self) -> Result<(), Stop> {
        if self.state.is_none() {
            self.stop_guest()?;
        }
        if self.stage == Stage::Copying {
            self.send_map()?;
            self.send_state()?;
            self.stage = Stage::Loading;
        }
        loop {
            self.pump()?;
            if self.ready || self.stage == Stage::Ready {
                break;
            }
            // Loading a state may touch pages.
            if !self.send_urgent()? {
                self.wait(TICK);
            }
            self.check_switch_time("the destination did not load the state in time")?;
        }
        // The point of no return: from here on the destination may run the guest, whatever comes of the write.
        self.committed = true;
        self.phase = Phase::PostCopy;
        self.tell(&Message::Go)?;
        self.stage = Stage::Running;
        Ok(())
    }

    /// The guest runs over there: pages that it waits for, and all others.
    fn post_copy(&mut self) -> Result<(), Stop> {
        if self.stage == Stage::Ready {
            // The order was lost with its connection.
            self.tell(&Message::Go)?;
            self.stage = Stage::Running;
        }
        loop {
            if self.pump()? {
                // It has all: whether it hears that we know does not matter.
                let _ = self.tell(&Message::Bye);
                self.phase = Phase::Done;
                return Ok(());
            }
            if self.send_urgent()? {
                continue;
            }
            let pause = self.bucket.wait(self.start.elapsed());
            let window = self.ledbat.window();
            if pause.is_zero() && self.map.in_flight() < window {
                let [least, most] = BACKGROUND_PAGES;
                let pages = window / BACKGROUND_FRAMES / PAGE_SIZE as u64;
                let end_of = |page| self.layout.end_of(page);
                if let Some(run) = self.map.next_background(pages.clamp(least, most), end_of) {
                    self.send(run, Reason::Background)?;
                    continue;
                }
                if !self.all_sent && self.map.in_flight() == 0 {
                    self.all_sent = true;
                    self.tell(&Message::AllSent)?;
                }
            }
            self.wait(match pause {
                Duration::ZERO => TICK,
                pause => pause.min(TICK),
            });
        }
    }

    fn stop_guest(&mut self) -> Result<(), Stop> {
        self.process_hints();
        self.gate.withdraw();
        self.machine.end_hints();
        let now = Instant::now();
        self.stopped = Some(now);
        self.report.precopy_ms = millis(now - self.start);
        let state = self
            .machine
            .stop()
            .map_err(Error::machine("stop the guest and save its state"))?;
        self.harvest()?;
        self.machine.stop_log();
        self.logging = false;
        self.report.bytes_state = state.len() as u64;
        self.report.pages_hinted_free = self.map.free().count();
        self.state = Some(state);
        Ok(())
    }

    /// No hint counts from before the log is looked at until an epoch is published.
    fn harvest(&mut self) -> Result<(), Stop> {
        self.gate.withdraw();
        self.machine.end_hints();
        self.written.clear();
        self.machine
            .harvest(&mut self.written)
            .map_err(Error::machine("harvest its log of the guest's writes"))?;
        self.map.written(&self.written);
        Ok(())
    }

    fn ask_for_hints(&mut self) {
        let Some(epoch) = self.machine.begin_hints() else {
            return;
        };
        if self.gate.publish(epoch).is_err() {
            // Hints of then would count now: better none.
            tracing::warn!("the VMM used {epoch:?} of free-page hints twice: no hint counts");
            self.machine.end_hints();
        }
    }

    fn process_hints(&mut self) {
        let (gate, map, report) = (&self.gate, &mut self.map, &mut self.report);
        self.machine.drain_hints(&mut |hint| {
            if gate.counts(&hint) {
                map.hinted(hint.pages);
                report.hints_counted += hint.pages.count;
            } else {
                report.hints_stale += hint.pages.count;
            }
        });
    }

    fn send_map(&mut self) -> Result<(), Stop> {
        let stale = self.map.stale();
        let chunks = stale
            .words()
            .chunks(MAX_WORDS)
            .zip(self.map.free().words().chunks(MAX_WORDS))
            .enumerate();
        let connection = self.connection.as_ref();
        for (index, (stale, free)) in chunks {
            if stale.iter().chain(free).any(|word| *word != 0) {
                let message = Message::Map {
                    first: (index * MAX_WORDS * 64) as u64,
                    stale: stale.to_vec(),
                    free: free.to_vec(),
                };
                send(connection, &message)?;
            }
        }
        Ok(())
    }

    fn send_state(&mut self) -> Result<(), Stop> {
        let state = self.state.as_deref().unwrap_or_default();
        let connection = self.connection.as_ref();
        for (index, bytes) in state.chunks(MAX_CHUNK).enumerate() {
            let offset = (index * MAX_CHUNK) as u64;
            send(connection, &Message::State { offset, bytes })?;
        }
        let (len, crc) = (state.len() as u64, crc32fast::hash(state));
        send(connection, &Message::Prepare { len, crc })?;
        Ok(())
    }

    fn send_urgent(&mut self) -> Result<bool, Stop> {
        let end_of = |page| self.layout.end_of(page);
        match self.map.next_urgent(MAX_PAGES, end_of) {
            Some(run) => self.send(run, Reason::Requested).map(|()| true),
            None => Ok(false),
        }
    }

    /// Read pages of one memslot and send them, in a frame for each run of one kind.
    fn send(&mut self, run: PageRange, reason: Reason) -> Result<(), Stop> {
        // First taken, then read: what is written from now on is in the next harvest.
        self.map.taken(run);
        let mut kinds = Vec::with_capacity(run.count as usize);
        for (page, bytes) in run.iter().zip(self.buffer.chunks_exact_mut(PAGE_SIZE)) {
            let Some(bytes) = bytes.first_chunk_mut::<PAGE_SIZE>() else {
                continue;
            };
            kinds.push(if self.map.free().contains(page) {
                Content::Zero
            } else {
                match self
                    .machine
                    .read_page(page, bytes)
                    .map_err(Error::machine("read a page of the guest"))?
                {
                    Content::Bytes if bytes.iter().all(|byte| *byte == 0) => Content::Zero,
                    content => content,
                }
            });
        }
        // All of it is on its way from here on, sent or not: what a broken connection did not bring is sent again.
        let mut result = Ok(0);
        let mut at = 0;
        for group in kinds.chunk_by(|a, b| a == b) {
            let pages = PageRange::new(run.first + at as u64, group.len() as u64);
            let bytes = &self.buffer[at * PAGE_SIZE..(at + group.len()) * PAGE_SIZE];
            at += group.len();
            let kind = group.first().copied().unwrap_or(Content::Bytes);
            let data = match kind {
                Content::Zero => Data::Zero,
                Content::Lost => Data::Lost,
                Content::Bytes => Data::Bytes(bytes),
            };
            let len = match data {
                Data::Bytes(bytes) => HEADER + 16 + bytes.len(),
                Data::Zero | Data::Lost => HEADER + 16,
            } as u64;
            self.map.sent(pages, len);
            self.ledbat.sent(len, self.start.elapsed());
            if result.is_ok() {
                let message = Message::Pages {
                    pages,
                    reason,
                    data,
                };
                result = send(self.connection.as_ref(), &message);
                self.bucket.spend(len);
                self.count(reason, kind, pages.count, len);
            }
        }
        result.map(drop)
    }

    fn count(&mut self, reason: Reason, kind: Content, pages: u64, bytes: u64) {
        self.round.1 += bytes;
        let report = &mut self.report;
        *match reason {
            Reason::PreCopy => &mut report.sent.precopy,
            Reason::Requested => &mut report.sent.requested,
            Reason::Background => &mut report.sent.background,
        } += pages;
        *match reason {
            Reason::PreCopy => &mut report.bytes_precopy,
            Reason::Requested | Reason::Background => &mut report.bytes_postcopy,
        } += bytes;
        match kind {
            Content::Bytes => {}
            Content::Zero => report.sent.zero += pages,
            Content::Lost => report.sent.lost += pages,
        }
    }

    /// Take in what has come: from the destination, and from the guest. Whether the destination has all.
    fn pump(&mut self) -> Result<bool, Stop> {
        let Some(connection) = &self.connection else {
            return Err(End::Broken("there is no connection".into()).into());
        };
        let said = connection.said();
        if said.heard {
            self.heard = Instant::now();
        }
        for event in said.events {
            match event {
                Event::Acked(had) => {
                    let before = self.map.acked();
                    self.map.ack(had).map_err(never_sent)?;
                    let frames = had.saturating_sub(before);
                    self.ledbat.acked(frames, self.start.elapsed());
                    if had > before {
                        self.broken = None;
                    }
                }
                // Before the guest has stopped a page is not what it will be.
                Event::Wanted(ranges) if self.stopped.is_some() => {
                    ranges.into_iter().for_each(|range| self.map.request(range));
                }
                Event::Wanted(_) => {}
            }
        }
        self.ready |= said.ready;
        // Two threads of the destination send Started and Done, so Done may come first.
        let runs_there = said.started || said.done.is_some();
        if runs_there && self.started.is_none() && self.committed {
            self.started = Some(Instant::now());
        }
        if let (Some(figures), true) = (said.done, self.committed) {
            self.report.destination = figures.into();
            return Ok(true);
        }
        if let Some(end) = said.end {
            return Err(end.into());
        }
        if self.heard.elapsed() > self.options.stall {
            let seconds = self.options.stall.as_secs_f64();
            return Err(End::Broken(format!("it said nothing for {seconds:.1} s")).into());
        }
        if self.pinged.elapsed() > self.options.stall / 4 {
            self.pinged = Instant::now();
            self.tell(&Message::Ping)?;
        }
        if self.gate.current().is_some() {
            self.process_hints();
        }
        self.show();
        Ok(false)
    }

    fn tell(&self, message: &Message<'_>) -> Result<(), Stop> {
        send(self.connection.as_ref(), message).map(drop)
    }

    fn wait(&self, patience: Duration) {
        if let Some(connection) = &self.connection {
            connection.wait(patience);
        }
    }

    /// Make a connection in the place of one that broke because of `why`.
    fn connect(&mut self, mut why: String) -> Result<(), Error> {
        let again = self.drop_connection();
        let since = *self.broken.get_or_insert_with(Instant::now);
        let mut backoff = FIRST_BACKOFF;
        let connection = loop {
            if again {
                tracing::info!("the connection to the destination is made again: {why}");
            }
            let hello = Message::Hello {
                id: self.id,
                resume: again,
                layout: self.layout.clone(),
            };
            let stall = self.options.stall;
            match Connection::dial(self.address, &hello, self.id, self.pages, stall) {
                Ok(connection) => break connection,
                Err(end) => match why_again(end) {
                    Ok(new) => why = new,
                    // The guest is over there, and who listens may still give way to the engine that it needs.
                    Err(error) if self.committed => why = error.to_string(),
                    Err(error) => return Err(error),
                },
            }
            if since.elapsed() + backoff > self.options.give_up {
                return Err(lost(since, why));
            }
            self.check_switch_time(&why)?;
            self.show();
            thread::sleep(backoff);
            backoff = (backoff * 2).min(Duration::from_secs(1));
        };
        // None gets further than it was told to.
        let ahead = match connection.stage {
            Stage::Running if !self.committed => {
                Some("it runs a guest that was not handed over to it")
            }
            Stage::Loading | Stage::Ready if self.state.is_none() => {
                Some("it has the state of a guest that has not stopped")
            }
            _ => None,
        };
        if let Some(what) = ahead {
            connection.sender.refuse(Code::Malformed, what);
            return Err(malformed(what.into()));
        }
        match connection.had {
            Had::Frames(had) => self.map.resume(had).map_err(|bad| {
                malformed(format!(
                    "it had {} frames of pages, of {}",
                    bad.acked, bad.sent
                ))
            })?,
            Had::Pages(_) => self.map.replaced(&connection.here),
        }
        self.ledbat.reconnected();
        self.report.reconnects += u64::from(again);
        self.stage = connection.stage;
        self.ready = false;
        self.all_sent = false;
        self.heard = Instant::now();
        self.connection = Some(connection);
        Ok(())
    }

    /// Whether there was one.
    fn drop_connection(&mut self) -> bool {
        let Some(connection) = self.connection.take() else {
            return false;
        };
        self.report.bytes_sent += connection.sender.bytes();
        true
    }

    /// The guest must not be stopped for ever while the destination may still be done without.
    fn check_switch_time(&self, why: &str) -> Result<(), Error> {
        match self.stopped {
            Some(stopped) if !self.committed && stopped.elapsed() > self.options.switch_timeout => {
                Err(lost(stopped, why.to_owned()))
            }
            _ => Ok(()),
        }
    }

    fn show(&mut self) {
        if self.told.is_some_and(|told| told.elapsed() < PROGRESS) {
            return;
        }
        self.told = Some(Instant::now());
        let bytes = self.connection.as_ref().map_or(0, |to| to.sender.bytes());
        (self.progress)(&Progress {
            phase: self.phase,
            round: self.rounds.done() + 1,
            pages: self.pages,
            remaining: self.map.remaining(),
            bytes: self.report.bytes_sent + bytes,
        });
    }

    fn report(&mut self) -> SourceReport {
        self.drop_connection();
        self.told = None;
        self.show();
        let mut report = self.report.clone();
        report.rounds = self.rounds.done();
        report.total_ms = millis(self.start.elapsed());
        report.downtime_ms = match (self.stopped, self.started) {
            (Some(stopped), Some(started)) => millis(started - stopped),
            _ => 0.0,
        };
        report
    }

    /// Leave the guest where it is right to be.
    fn fail(&mut self, error: Error) -> Failure {
        if let Some(connection) = &self.connection {
            if !self.committed {
                connection
                    .sender
                    .refuse(Code::Cancelled, &error.to_string());
            }
        }
        self.gate.withdraw();
        self.machine.end_hints();
        if self.logging {
            self.machine.stop_log();
        }
        self.drop_connection();
        let guest = if self.committed {
            Guest::HandedOver
        } else if self.stopped.is_none() {
            Guest::RunsHere
        } else {
            match self.machine.resume() {
                Ok(()) => Guest::RunsHere,
                Err(error) => {
                    tracing::error!("the guest cannot be made to run again: {error}");
                    Guest::StoppedHere
                }
            }
        };
        Failure { error, guest }
    }
}

fn send(connection: Option<&Connection>, message: &Message<'_>) -> Result<u64, Stop> {
    let connection = connection.ok_or_else(|| End::Broken("there is no connection".into()))?;
    Ok(connection.sender.send(message)?)
}

fn never_sent(bad: crate::schedule::NeverSent) -> Stop {
    End::Broken(format!(
        "the destination says that it had {} frames, {} were sent",
        bad.acked, bad.sent
    ))
    .into()
}

/// Why a connection is made again; an error if that would not help.
fn why_again(end: End) -> Result<String, Error> {
    let peer = "destination";
    match end {
        End::Broken(why) => Ok(why),
        End::Version(what) => Err(Error::Version { peer, what }),
        End::Refused { code, text } => Err(Error::Refused { peer, code, text }),
    }
}

fn malformed(what: String) -> Error {
    Error::Malformed {
        peer: "destination",
        what,
    }
}

fn lost(since: Instant, why: String) -> Error {
    Error::Lost {
        peer: "destination",
        seconds: since.elapsed().as_secs_f64(),
        why,
    }
}

fn millis(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}
