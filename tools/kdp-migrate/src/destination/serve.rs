//! What a destination does with each message, and what it knows over all connections.

use super::{millis, Destination, Job, Shared};
use crate::{
    link::{Received, Receiver, Sender},
    lock,
    misses::Misses,
    wire::{Code, Data, Figures, Had, Message, MigrationId, Reason, Stage, MAX_WORDS},
    DestinationFigures, DestinationMachine, DestinationReport, Error, Layout, MachineError,
    PageSet, Paths, Phase, Placed, Progress,
};
use kvm_demand_paging::{PageRange, PAGE_SIZE};
use std::{
    sync::{mpsc, Arc},
    time::{Duration, Instant},
};

/// How long a source that was not told that all is here is waited for at least: it tries again every second.
const LINGER: Duration = Duration::from_secs(2);

/// Pages that are asked for at a time when the source has sent all and they are not here: 1 MiB, which comes within
/// [`DestinationOptions::answer`](crate::DestinationOptions::answer) over a link of 2 Mbit/s.
const REST: u64 = 256;

/// How a connection ended.
pub(super) enum Over {
    /// All is here, and the source knows.
    Done,
    Broken(String),
    Failed(Error),
}

/// Why a message was not dealt with.
enum Fault {
    /// It makes no sense.
    Bad(Code, String),
    /// The network failed.
    Broken(String),
    Failed(Error),
}

impl From<crate::link::End> for Fault {
    fn from(end: crate::link::End) -> Self {
        match end {
            crate::link::End::Broken(why) => Self::Broken(why),
            crate::link::End::Version(what) => Self::Bad(Code::Version, what),
            crate::link::End::Refused { code, text } => Self::Failed(Error::Refused {
                peer: "source",
                code,
                text,
            }),
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

fn malformed(what: impl Into<String>) -> Fault {
    Fault::Bad(Code::Malformed, what.into())
}

/// All is here: since when, and what was measured until then. A source of a later connection is told the same.
#[derive(Clone, Copy)]
struct Complete {
    at: Instant,
    figures: Figures,
}

/// The migration, over all connections.
pub(super) struct Served<'a, M> {
    destination: &'a Destination<M>,
    pub(super) shared: &'a Shared,
    jobs: mpsc::Sender<Job>,
    layout: Layout,
    pages: u64,
    progress: &'a mut dyn FnMut(&Progress),
    told: Option<Instant>,
    begun: Instant,
    id: Option<MigrationId>,
    stage: Stage,
    had: u64,
    state: Vec<u8>,
    received: Paths,
    hinted: u64,
    too_late: u64,
    bytes: u64,
    connections: u64,
    first: Option<Instant>,
    go: Option<Instant>,
    complete: Option<Complete>,
    // The source of the present connection says that it has sent all.
    all_sent: bool,
    // When the source of the present connection was told that all is here.
    done_sent: Option<Instant>,
    // Since when there has been none.
    broken: Option<Instant>,
    pub(super) why: String,
}

impl<'a, M: DestinationMachine> Served<'a, M> {
    pub(super) fn new(
        destination: &'a Destination<M>,
        shared: &'a Shared,
        jobs: mpsc::Sender<Job>,
        layout: Layout,
        pages: u64,
        progress: &'a mut dyn FnMut(&Progress),
    ) -> Self {
        let begun = Instant::now();
        // For who takes another's place the source is lost, until it comes.
        let lost = destination.replaces.map(|_| begun);
        let (stage, go) = match destination.replaces {
            None => (Stage::Copying, None),
            Some(false) => (Stage::Ready, None),
            Some(true) => (Stage::Running, Some(begun)),
        };
        let mut served = Self {
            id: destination.options.id,
            destination,
            shared,
            jobs,
            layout,
            pages,
            progress,
            told: None,
            begun,
            stage,
            had: 0,
            state: Vec::new(),
            received: Paths::default(),
            hinted: 0,
            too_late: 0,
            bytes: 0,
            connections: 0,
            first: None,
            go,
            complete: None,
            all_sent: false,
            done_sent: None,
            broken: lost,
            why: "there was no connection".into(),
        };
        served.look_whether_complete();
        served
    }

    fn misses(&self) -> &'a Misses {
        &self.destination.misses
    }

    /// Whether somebody may wait for a page here.
    pub(super) fn is_handed_over(&self) -> bool {
        self.stage >= Stage::Loading
    }

    /// All is here, and nobody came for long enough to be told.
    pub(super) fn is_complete_without_peer(&self) -> bool {
        let linger = self.destination.options.stall.max(LINGER);
        self.complete.is_some() && self.broken.is_none_or(|broken| broken.elapsed() > linger)
    }

    /// Whether it makes sense to wait for a connection any longer.
    pub(super) fn check_without_peer(&mut self) -> Result<(), Error> {
        let options = &self.destination.options;
        let over = match (self.broken, options.first) {
            _ if self.complete.is_some() => None,
            (Some(broken), _) => (broken.elapsed() > options.give_up).then_some(broken),
            (None, Some(first)) => (self.begun.elapsed() > first).then_some(self.begun),
            (None, None) => None,
        };
        if let Some(since) = over {
            return Err(Error::Lost {
                peer: "source",
                seconds: since.elapsed().as_secs_f64(),
                why: self.why.clone(),
            });
        }
        self.check()
    }

    /// A connection is over, and brought so many bytes.
    pub(super) fn broke(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.broken.get_or_insert_with(Instant::now);
    }

    /// What may go wrong at any time.
    fn check(&mut self) -> Result<(), Error> {
        if let Some(error) = lock(&self.shared.link).failed.take() {
            return Err(error);
        }
        if self.complete.is_none() && self.is_handed_over() {
            if let (_, Some((page, waited))) = self.misses().unanswered() {
                if waited > self.destination.options.give_up {
                    return Err(Error::NeverCame {
                        page,
                        seconds: waited.as_secs_f64(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Serve a connection to its end.
    pub(super) fn connection(&mut self, sender: &Arc<Sender>, receiver: &mut Receiver) -> Over {
        let fault = match self.messages(sender, receiver) {
            Ok(()) => return Over::Done,
            Err(fault) => fault,
        };
        match fault {
            Fault::Broken(why) => Over::Broken(why),
            Fault::Bad(code, what) => {
                sender.refuse(code, &what);
                Over::Broken(what)
            }
            Fault::Failed(error) => {
                sender.refuse(Code::Machine, &error.to_string());
                Over::Failed(error)
            }
        }
    }

    fn messages(&mut self, sender: &Arc<Sender>, receiver: &mut Receiver) -> Result<(), Fault> {
        let options = &self.destination.options;
        let (mut heard, mut looked) = (Instant::now(), Instant::now());
        let mut greeted = false;
        self.done_sent = None;
        self.all_sent = false;
        loop {
            match receiver.receive()? {
                Received::Nothing if heard.elapsed() > options.stall => {
                    let seconds = options.stall.as_secs_f64();
                    return Err(Fault::Broken(format!(
                        "the source said nothing for {seconds:.1} s"
                    )));
                }
                Received::Nothing => {}
                Received::Message(message) => {
                    heard = Instant::now();
                    if greeted {
                        if self.message(message, sender)? {
                            return Ok(());
                        }
                    } else {
                        self.greet(message, sender)?;
                        greeted = true;
                    }
                }
            }
            if looked.elapsed() >= crate::link::TICK {
                looked = Instant::now();
                self.check()?;
                if self.all_sent && self.complete.is_none() {
                    self.misses().want_rest(REST);
                }
                if let (Some(waited), _) = self.misses().unanswered() {
                    if waited > options.answer {
                        return Err(Fault::Broken(format!(
                            "the source did not bring a page for {:.1} s",
                            waited.as_secs_f64()
                        )));
                    }
                }
                if self
                    .done_sent
                    .is_some_and(|told| told.elapsed() > options.stall)
                {
                    // It was told; that it says no goodbye changes nothing.
                    return Ok(());
                }
                self.show(receiver.bytes());
            }
            if greeted {
                self.finish(sender)?;
            }
        }
    }

    fn greet(&mut self, message: Message<'_>, sender: &Arc<Sender>) -> Result<(), Fault> {
        let Message::Hello { id, resume, layout } = message else {
            return Err(malformed("the first message is no greeting"));
        };
        match self.id {
            Some(known) if known != id => {
                return Err(Fault::Bad(
                    Code::Identity,
                    format!("migration {known} comes here, not {id}"),
                ));
            }
            _ if resume && self.first.is_none() && self.stage == Stage::Copying => {
                return Err(Fault::Bad(
                    Code::Identity,
                    format!("nothing is known here of migration {id}"),
                ));
            }
            _ => {}
        }
        if let Some(text) = layout.mismatch(&self.layout) {
            return Err(Fault::Bad(Code::Layout, text));
        }
        if self.stage == Stage::Copying {
            // A switch that was begun is begun anew.
            self.state = Vec::new();
            self.hinted = 0;
        }
        let had = if self.destination.replaces.is_some() {
            self.had = 0;
            self.tell_what_is_here(sender)?
        } else {
            Had::Frames(self.had)
        };
        let mut link = lock(&self.shared.link);
        if self.stage == Stage::Loading && link.loaded {
            self.stage = Stage::Ready;
        }
        sender.send(&Message::Welcome {
            id,
            stage: self.stage,
            had,
        })?;
        if link.started {
            sender.send(&Message::Started)?;
        }
        // From here on what the other threads send comes behind the greeting.
        link.sender = Some(Arc::clone(sender));
        drop(link);
        if self.first.is_none() {
            self.destination.machine.begins(id);
        }
        self.id = Some(id);
        self.first.get_or_insert_with(Instant::now);
        self.connections += 1;
        self.broken = None;
        self.misses().again();
        Ok(())
    }

    /// This thread alone places pages: until the first one of this connection comes, that is all.
    fn tell_what_is_here(&self, sender: &Sender) -> Result<Had, Fault> {
        let here = self.misses().have();
        for (index, words) in here.words().chunks(MAX_WORDS).enumerate() {
            if words.iter().any(|word| *word != 0) {
                sender.send(&Message::Here {
                    first: (index * MAX_WORDS * 64) as u64,
                    words: words.to_vec(),
                })?;
            }
        }
        Ok(Had::Pages(here.count()))
    }

    /// Whether it was the last one.
    fn message(&mut self, message: Message<'_>, sender: &Arc<Sender>) -> Result<bool, Fault> {
        match message {
            Message::Pages {
                pages,
                reason,
                data,
            } => {
                let came = self.place(pages, reason, data)?;
                // Placing takes longer than to tell of it, and a request need not wait for that.
                let _order = lock(&self.shared.order);
                came.into_iter().for_each(|run| self.misses().came(run));
                self.had += 1;
                sender.send(&Message::Ack(self.had))?;
            }
            Message::Ping => {
                sender.send(&Message::Ack(self.had))?;
            }
            Message::Map { first, stale, free } if self.stage == Stage::Copying => {
                self.map(first, &stale, &free)?;
            }
            Message::State { offset, bytes } if self.stage == Stage::Copying => {
                let max = self.destination.options.max_state;
                if offset != self.state.len() as u64 || self.state.len() + bytes.len() > max {
                    return Err(malformed(format!(
                        "a piece of the state at byte {offset}, after {} bytes of at most {max}",
                        self.state.len()
                    )));
                }
                self.state.extend_from_slice(bytes);
            }
            Message::Prepare { len, crc } if self.stage == Stage::Copying => {
                if len != self.state.len() as u64 || crc != crc32fast::hash(&self.state) {
                    return Err(Fault::Bad(
                        Code::Checksum,
                        "the state is not what was sent".into(),
                    ));
                }
                self.stage = Stage::Loading;
                lock(&self.shared.link).answered = true;
                let state = std::mem::take(&mut self.state);
                self.give(Job::Load(state));
            }
            Message::Go if self.stage == Stage::Running => {}
            Message::Go => {
                if !lock(&self.shared.link).loaded {
                    return Err(malformed("an order to run a guest that is not here"));
                }
                self.stage = Stage::Running;
                self.go = Some(Instant::now());
                self.give(Job::Start);
            }
            Message::AllSent if self.stage == Stage::Running => {
                self.all_sent = true;
                self.misses().want_rest(REST);
            }
            Message::Bye if self.done_sent.is_some() => return Ok(true),
            message => {
                return Err(malformed(format!(
                    "{} does not belong here",
                    name(&message)
                )))
            }
        }
        Ok(false)
    }

    fn give(&self, job: Job) {
        // The thread that takes them ends by itself only after a failure, which is seen by check().
        let _ = self.jobs.send(job);
    }

    /// Tell the source when all is here.
    fn finish(&mut self, sender: &Arc<Sender>) -> Result<(), Fault> {
        self.look_whether_complete();
        if let (Some(all), None) = (self.complete, self.done_sent) {
            self.done_sent = Some(Instant::now());
            sender.send(&Message::Done(all.figures))?;
        }
        Ok(())
    }

    fn look_whether_complete(&mut self) {
        let all = self.complete.is_none()
            && self.stage == Stage::Running
            && self.misses().count() == self.pages
            && lock(&self.shared.link).started;
        if all {
            self.complete = Some(self.measured());
        }
    }

    /// Which of them were not here before.
    fn place(
        &mut self,
        pages: PageRange,
        reason: Reason,
        data: Data<'_>,
    ) -> Result<Vec<PageRange>, Fault> {
        let end = pages.end();
        if end > self.pages || end > self.layout.end_of(pages.first) {
            return Err(malformed(format!(
                "{} pages from page {}, of {} pages",
                pages.count, pages.first, self.pages
            )));
        }
        let machine = &self.destination.machine;
        if self.stage == Stage::Copying {
            // The newer one counts: nobody has seen the older one.
            self.discard(pages)?;
        }
        let absent = self.misses().arriving(pages);
        self.too_late += pages.count - absent.iter().map(|run| run.count).sum::<u64>();
        for &run in &absent {
            match data {
                Data::Bytes(bytes) => {
                    let at = (run.first - pages.first) as usize * PAGE_SIZE;
                    let bytes = &bytes[at..at + run.count as usize * PAGE_SIZE];
                    let mut results = vec![Placed::Present; run.count as usize];
                    machine
                        .place(run.first, bytes, &mut results)
                        .map_err(cannot("place a page"))?;
                    let late = results.iter().filter(|placed| **placed != Placed::Now);
                    self.too_late += late.count() as u64;
                }
                Data::Zero => machine.mark_zero(run).map_err(cannot("make a page zero"))?,
                Data::Lost => machine
                    .mark_lost(run)
                    .map_err(cannot("mark a page as lost"))?,
            }
        }
        *match reason {
            Reason::PreCopy => &mut self.received.precopy,
            Reason::Requested => &mut self.received.requested,
            Reason::Background => &mut self.received.background,
        } += pages.count;
        match data {
            Data::Bytes(_) => {}
            Data::Zero => self.received.zero += pages.count,
            Data::Lost => self.received.lost += pages.count,
        }
        Ok(absent)
    }

    /// What is here of these pages is dropped.
    fn discard(&mut self, pages: PageRange) -> Result<(), Error> {
        for run in self.misses().has(pages) {
            self.misses().gone(run);
            let machine = &self.destination.machine;
            machine.discard(run).map_err(cannot("drop a page"))?;
        }
        Ok(())
    }

    fn map(&mut self, first: u64, stale: &[u64], free: &[u64]) -> Result<(), Fault> {
        let limit = self
            .pages
            .saturating_sub(first)
            .min(64 * stale.len() as u64);
        let set = |words: &[u64]| {
            let mut set = PageSet::new(limit);
            (0..)
                .zip(words)
                .for_each(|(index, word)| set.merge_word(index, *word));
            set
        };
        for run in set(stale).runs() {
            self.discard(PageRange::new(first + run.first, run.count))?;
        }
        let free = set(free);
        self.hinted += free.count();
        for run in free.runs() {
            let (mut at, end) = (first + run.first, first + run.end());
            while at < end {
                let part = PageRange::from(at..end.min(self.layout.end_of(at)));
                self.discard(part)?;
                let machine = &self.destination.machine;
                machine
                    .mark_zero(part)
                    .map_err(cannot("make a page zero"))?;
                self.misses().came(part);
                at = part.end();
            }
        }
        Ok(())
    }

    fn show(&mut self, bytes: u64) {
        if self
            .told
            .is_some_and(|told| told.elapsed() < Duration::from_millis(50))
        {
            return;
        }
        self.told = Some(Instant::now());
        let phase = match self.stage {
            Stage::Copying => Phase::PreCopy,
            Stage::Loading | Stage::Ready => Phase::Switch,
            Stage::Running if self.complete.is_some() => Phase::Done,
            Stage::Running => Phase::PostCopy,
        };
        let now = Progress {
            phase,
            round: 0,
            pages: self.pages,
            remaining: self.pages - self.misses().count(),
            bytes: self.bytes + bytes,
        };
        (self.progress)(&now);
    }

    fn measured(&self) -> Complete {
        let (faults, [p50, p99, max]) = self.misses().latency();
        Complete {
            at: Instant::now(),
            figures: Figures {
                faults,
                fault_p50_us: p50,
                fault_p99_us: p99,
                fault_max_us: max,
                pages_too_late: self.too_late,
                postcopy_us: self.go.map_or(0, |go| go.elapsed().as_micros() as u64),
            },
        }
    }

    pub(super) fn report(&mut self) -> DestinationReport {
        self.told = None;
        self.show(0);
        let all = self.complete.unwrap_or_else(|| self.measured());
        let figures = DestinationFigures::from(all.figures);
        let total = self.first.map(|first| all.at - first);
        DestinationReport {
            id: self.id.map(|id| id.to_string()).unwrap_or_default(),
            pages: self.pages,
            received: self.received,
            pages_hinted_free: self.hinted,
            pages_too_late: figures.pages_too_late,
            bytes_received: self.bytes,
            faults: figures.faults,
            fault_p50_us: figures.fault_p50_us,
            fault_p99_us: figures.fault_p99_us,
            fault_max_us: figures.fault_max_us,
            reconnects: self.connections.saturating_sub(1),
            postcopy_ms: figures.postcopy_ms,
            total_ms: total.map_or(0.0, millis),
        }
    }
}

fn cannot(doing: &'static str) -> impl FnOnce(MachineError) -> Error {
    Error::machine(doing)
}

/// What a message is, without its bytes.
fn name(message: &Message<'_>) -> &'static str {
    match message {
        Message::Hello { .. } => "a greeting",
        Message::Welcome { .. } => "a welcome",
        Message::Here { .. } => "a map of what is here",
        Message::Pages { .. } => "a page",
        Message::Map { .. } => "a map",
        Message::State { .. } => "a piece of the state",
        Message::Prepare { .. } => "the end of the state",
        Message::Ready => "'ready'",
        Message::Go => "'go'",
        Message::Started => "'started'",
        Message::Request(_) => "a request",
        Message::Ack(_) => "an ack",
        Message::AllSent => "'all sent'",
        Message::Done(_) => "'done'",
        Message::Bye => "'bye'",
        Message::Ping => "a ping",
        Message::Error { .. } => "an error",
    }
}
