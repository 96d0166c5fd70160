//! Engines of a destination that are killed while the guest runs there, and others that take their place.

use super::*;
use crate::{
    script::{Script, Told},
    vm::DEVICE,
};
use kdp_migrate::{Known, Layout, MachineError, PageSet, Placed};
use std::sync::atomic::{AtomicBool, AtomicI64};

/// When an engine is killed.
#[derive(Clone, Copy, Debug)]
enum Death {
    /// In the middle of a call, after so many of them since the guest runs here.
    Call(i64),
    /// When all is here, before it tells anybody.
    Complete,
    /// When it is to start the guest: before it does, or when it has.
    Start { started: bool },
    /// At some time, after its connection was cut at half of it.
    After(Duration),
    /// Never; its connection is cut at that time.
    Never(Duration),
}

/// A process: its machine, and how long it lives.
struct Process {
    machine: Arriving,
    calls: AtomicI64,
    dies_complete: bool,
    dies_at_start: Option<bool>,
    dead: AtomicBool,
    proxy: Arc<Proxy>,
}

/// A reference to it, for an engine. Of a dead one nothing is seen any more: neither what it sends nor what it calls.
struct Mortal(Arc<Process>);

impl Process {
    fn die(&self) {
        self.dead.store(true, SeqCst);
        self.proxy.kill();
    }

    /// Whether it gets to the end of a call that has begun.
    fn survives(&self) -> Result<bool, MachineError> {
        if self.dead.load(SeqCst) {
            return Err("it is dead".into());
        }
        Ok(self.machine.0.starts.load(SeqCst) == 0 || self.calls.fetch_sub(1, SeqCst) > 0)
    }

    fn call(
        &self,
        pages: PageRange,
        mut call: impl FnMut(PageRange) -> Result<(), MachineError>,
    ) -> Result<(), MachineError> {
        if self.survives()? {
            call(pages)?;
            if self.dies_complete && self.machine.0.here().count() == PAGES {
                self.die();
            }
            return Ok(());
        }
        call(PageRange::new(pages.first, pages.count / 2))?;
        self.die();
        Err("it was killed".into())
    }
}

impl DestinationMachine for Mortal {
    fn layout(&self) -> Layout {
        self.0.machine.layout()
    }

    fn place(&self, first: u64, bytes: &[u8], results: &mut [Placed]) -> Result<(), MachineError> {
        self.0
            .call(PageRange::new(first, results.len() as u64), |part| {
                let count = part.count as usize;
                let results = &mut results[..count];
                self.0.machine.place(first, &bytes[..count * PAGE], results)
            })
    }

    fn mark_zero(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.call(pages, |pages| self.0.machine.mark_zero(pages))
    }

    fn mark_lost(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.call(pages, |pages| self.0.machine.mark_lost(pages))
    }

    fn discard(&self, pages: PageRange) -> Result<(), MachineError> {
        self.0.machine.discard(pages)
    }

    fn load(&self, state: &[u8]) -> Result<(), MachineError> {
        self.0.machine.load(state)
    }

    fn start(&self) -> Result<(), MachineError> {
        let Some(starts) = self.0.dies_at_start else {
            return self.0.machine.start();
        };
        if starts {
            self.0.machine.start()?;
        }
        self.0.die();
        Err("it was killed".into())
    }

    fn fail(&self, error: &Error) {
        if !self.0.dead.load(SeqCst) {
            self.0.machine.fail(error);
        }
    }
}

/// The engines of a destination, one after the other, behind one address.
struct Engines {
    vm: Arc<DestinationVm>,
    proxy: Arc<Proxy>,
    id: MigrationId,
    deaths: u32,
    // Of those, how many died while somebody waited for a page.
    missed: u32,
}

impl Engines {
    fn new() -> Self {
        let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
        Self {
            vm: DestinationVm::new(),
            proxy: Proxy::new(nobody, Vec::new()),
            id: MigrationId::random(),
            deaths: 0,
            missed: 0,
        }
    }

    /// Run one until it is dead (nothing), or done.
    fn run(&mut self, death: Death) -> Option<DestinationReport> {
        let process = Arc::new(Process {
            machine: Arriving(self.vm.clone()),
            calls: AtomicI64::new(match death {
                Death::Call(calls) => calls,
                _ => i64::MAX,
            }),
            dies_complete: matches!(death, Death::Complete),
            dies_at_start: match death {
                Death::Start { started } => Some(started),
                _ => None,
            },
            dead: AtomicBool::new(false),
            proxy: self.proxy.clone(),
        });
        let machine = Mortal(process.clone());
        let destination = if self.vm.vcpus.lock().unwrap().is_none() {
            let options = DestinationOptions {
                id: Some(self.id),
                ..destination_options()
            };
            Destination::new(machine, self.vm.misses(), options)
        } else {
            let known = Known {
                id: self.id,
                here: self.vm.here(),
                started: self.vm.starts.load(SeqCst) > 0,
            };
            let misses = self.vm.renew_misses();
            Destination::replace(machine, misses, destination_options(), known)
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = listener.try_clone().unwrap();
        self.proxy.lead_to(listener.local_addr().unwrap());
        let run = thread::spawn(move || destination.run(&listener, &mut |_| {}));
        if let Death::After(time) | Death::Never(time) = death {
            wait_for("the switch", || self.vm.starts.load(SeqCst) == 1);
            thread::sleep(time / 2);
            self.proxy.cut();
            thread::sleep(time / 2);
        }
        if let Death::After(_) = death {
            process.die();
        }
        wait_for("the engine's end", || {
            if process.dead.load(SeqCst) {
                // Who would wait for a connection, if it were alive.
                let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
            }
            run.is_finished()
        });
        let result = run.join().unwrap();
        if process.dead.load(SeqCst) {
            self.deaths += 1;
            self.missed += u32::from(self.vm.waiting.load(SeqCst) > 0);
            return None;
        }
        Some(result.unwrap())
    }
}

/// Post-copy of a second or so, all of it.
fn slow_postcopy() -> SourceOptions {
    SourceOptions {
        rounds: Rule {
            max_rounds: 0,
            ..Rule::default()
        },
        bandwidth: Some(2 << 20),
        ..source_options()
    }
}

/// A guest that loses engines as `deaths` says, and is moved all the same.
fn moved(seed: u64, hints: bool, options: SourceOptions, deaths: &[Death]) -> Engines {
    let from = SourceVm::boot(seed, hints);
    let mut engines = Engines::new();
    let options = SourceOptions {
        id: Some(engines.id),
        ..options
    };
    let run = leave(&from, options, engines.proxy.address.clone());
    for death in deaths {
        assert!(
            engines.run(*death).is_none(),
            "{seed}: it lived through {death:?}"
        );
    }
    let cut = Duration::from_millis(100);
    let came = engines.run(Death::Never(cut)).unwrap();
    let sent = run.join().unwrap().unwrap();
    check_moved(&from, &engines.vm);
    assert_eq!(engines.vm.here().count(), PAGES);
    let placed = engines.vm.placed.lock().unwrap();
    assert!(placed.iter().all(|times| *times <= 1), "{placed:?}");
    drop(placed);
    // What was here when it came would have been sent in vain.
    assert_eq!(came.pages_too_late, 0, "{came:?}");
    assert!(sent.reconnects > 0);
    assert_eq!(sent.destination, figures(&came));
    engines
}

#[test]
fn an_engine_that_is_killed_is_replaced_while_the_guest_runs() {
    let mut missed = 0;
    for seed in 0..6 * soak() {
        let mut random = seed;
        let deaths = [(); 3].map(|()| {
            random = guest::next(random);
            match random % 3 {
                0 => Death::After(Duration::from_millis(random / 3 % 80)),
                _ => Death::Call((random / 3 % 16) as i64),
            }
        });
        let hints = seed % 2 == 1;
        let engines = moved(seed, hints, slow_postcopy(), &deaths);
        assert_eq!(engines.deaths, 3);
        missed += engines.missed;
        println!("{seed}: {deaths:?}, {} with waiters", engines.missed);
    }
    assert!(missed > 0, "nobody waited when an engine died");
}

#[test]
fn an_engine_that_was_killed_when_all_was_here_is_replaced_by_one_that_says_so() {
    for seed in 0..2 * soak() {
        let options = SourceOptions {
            bandwidth: None,
            ..slow_postcopy()
        };
        moved(seed, false, options, &[Death::Complete]);
    }
}

/// The source cannot take its guest back any more then.
#[test]
fn an_engine_that_is_killed_when_it_is_to_start_the_guest_is_replaced() {
    for seed in 0..4 * soak() {
        let start = Death::Start {
            started: seed % 4 > 1,
        };
        moved(seed, seed % 2 == 1, slow_postcopy(), &[start]);
    }
}

/// A destination that comes to run the guest and takes pages, by hand; the pages that came.
fn to_postcopy(listener: &TcpListener, id: MigrationId, frames: usize) -> (Script, PageSet) {
    let (mut engine, theirs, resume) = Script::accept(listener);
    assert_eq!((theirs, resume), (id, false));
    engine.welcome(id);
    assert_eq!(engine.hear(), Told::Prepare);
    engine.send(&Message::Ready);
    assert_eq!(engine.hear(), Told::Go);
    engine.send(&Message::Started);
    let mut here = PageSet::new(PAGES);
    engine.pages(frames, &mut here);
    (engine, here)
}

/// A source whose destination is a script. Nobody asks there: what comes is what the source has to send.
fn scripted(seed: u64) -> (Arc<SourceVm>, TcpListener, MigrationId, Leave) {
    let from = SourceVm::boot(seed, false);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let id = MigrationId::random();
    let options = SourceOptions {
        id: Some(id),
        ..slow_postcopy()
    };
    let run = leave(&from, options, address);
    (from, listener, id, run)
}

#[test]
fn a_new_engine_is_sent_what_it_has_not_and_nothing_else() {
    for seed in 0..2 * soak() {
        let (from, listener, id, run) = scripted(seed);
        let (first, mut here) = to_postcopy(&listener, id, 9);
        // Of what it had told of, a few pages are not here: it had them in its own memory.
        for page in here.runs().map(|run| run.first).collect::<Vec<_>>() {
            assert!(here.remove(page));
        }
        drop(first);
        // Before the right one listens, another one does, and one whose map is not whole.
        let (mut wrong, ..) = Script::accept(&listener);
        let text = "another migration comes here".into();
        wrong.send(&Message::Error { code: 4, text });
        let (mut torn, ..) = Script::accept(&listener);
        torn.take_over(id, &here, here.count() + 1);
        assert_eq!(torn.hear(), Told::Closed);
        let (mut second, theirs, resume) = Script::accept(&listener);
        assert_eq!((theirs, resume), (id, true));
        second.take_over(id, &here, here.count());
        second.pages(9, &mut here);
        // Its connection breaks, and it counts frames from 0 again.
        drop(second);
        let (mut second, ..) = Script::accept(&listener);
        second.take_over(id, &here, here.count());
        second.send(&Message::Started);
        second.pages(usize::MAX, &mut here);
        assert_eq!(here.count(), PAGES, "{:?}", here.runs().collect::<Vec<_>>());
        let figures = wire::Figures {
            faults: seed,
            ..wire::Figures::default()
        };
        second.send(&Message::Done(figures));
        assert_eq!(second.hear(), Told::Bye);
        let sent = run.join().unwrap().unwrap();
        assert_eq!(sent.destination, figures.into());
        assert!(from.off().is_empty());
    }
}

/// The threads of the destination may send Started and Done in either order.
#[test]
fn the_downtime_ends_with_done_if_started_comes_late() {
    let (from, listener, id, run) = scripted(5);
    let (mut engine, ..) = Script::accept(&listener);
    engine.welcome(id);
    assert_eq!(engine.hear(), Told::Prepare);
    engine.send(&Message::Ready);
    assert_eq!(engine.hear(), Told::Go);
    let mut here = PageSet::new(PAGES);
    engine.pages(usize::MAX, &mut here);
    engine.send(&Message::Done(wire::Figures::default()));
    assert_eq!(engine.hear(), Told::Bye);
    let sent = run.join().unwrap().unwrap();
    assert!(sent.downtime_ms > 0.0, "{}", sent.downtime_ms);
    assert!(from.off().is_empty());
}

/// A page that was sent to the engine that died is asked for like any other.
#[test]
fn a_new_engine_asks_for_what_was_on_its_way_and_gets_it_first() {
    let (from, listener, id, run) = scripted(3);
    let (first, mut here) = to_postcopy(&listener, id, 9);
    drop(first);
    let lost = here.runs().next().unwrap().first;
    here.remove(lost);
    let (mut second, ..) = Script::accept(&listener);
    second.take_over(id, &here, here.count());
    second.send(&Message::Request(vec![PageRange::page(lost)]));
    // In the background it would come last. That has a lead of what is sent at once.
    let before = here.count();
    while !here.contains(lost) {
        second.pages(1, &mut here);
    }
    let lead = here.count() - before;
    assert!(lead < PAGES / 2, "{lead} pages came before it");
    second.pages(usize::MAX, &mut here);
    assert_eq!(here.count(), PAGES);
    second.send(&Message::Done(wire::Figures::default()));
    assert_eq!(second.hear(), Told::Bye);
    run.join().unwrap().unwrap();
    from.off();
}

#[test]
fn nobody_takes_over_a_guest_that_was_not_handed_over() {
    for stopped in [false, true] {
        let (from, listener, id, run) = scripted(1);
        let (mut engine, ..) = Script::accept(&listener);
        if stopped {
            engine.welcome(id);
            assert_eq!(engine.hear(), Told::Prepare);
            drop(engine);
            (engine, ..) = Script::accept(&listener);
        }
        engine.take_over(id, &PageSet::full(PAGES), PAGES);
        assert_eq!(engine.hear(), Told::Error(2));
        let failure = run.join().unwrap().unwrap_err();
        assert_eq!(failure.guest, Guest::RunsHere, "{failure}");
        let text = failure.to_string();
        assert!(text.contains("was not handed over"), "{text}");
        assert!(matches!(failure.error, Error::Malformed { .. }), "{text}");
        assert_eq!(from.resumes.load(SeqCst), u32::from(stopped));
        assert!(from.is_running());
        assert!(from.off().is_empty());
    }
}

/// A state that no source has sent is that of another guest.
#[test]
fn nobody_has_the_state_of_a_guest_that_runs() {
    for (stage, had) in [
        (Stage::Loading, Had::Frames(0)),
        (Stage::Ready, Had::Frames(0)),
        (Stage::Ready, Had::Pages(0)),
    ] {
        let (from, listener, id, run) = scripted(2);
        let (mut engine, ..) = Script::accept(&listener);
        engine.send(&Message::Welcome { id, stage, had });
        assert_eq!(engine.hear(), Told::Error(2));
        let failure = run.join().unwrap().unwrap_err();
        assert_eq!(failure.guest, Guest::RunsHere, "{failure}");
        let text = failure.to_string();
        assert!(text.contains("has not stopped"), "{text}");
        assert_eq!(from.resumes.load(SeqCst), 0);
        assert!(from.off().is_empty());
    }
}

/// An engine that takes over with these pages here; the vCPUs are elsewhere.
fn taken_over(here: &PageSet, options: DestinationOptions) -> (There, MigrationId) {
    let vm = DestinationVm::new();
    for run in here.runs() {
        Arriving(vm.clone()).mark_zero(run).unwrap();
    }
    let id = MigrationId::random();
    let here = here.clone();
    let started = true;
    let known = Known { id, here, started };
    let destination = Destination::replace(Arriving(vm.clone()), vm.misses(), options, known);
    (listen(vm, destination), id)
}

/// What an engine says of the pages that it has.
fn hear_here(peer: &mut Peer) -> PageSet {
    let mut here = PageSet::new(PAGES);
    loop {
        match peer.hear() {
            Heard::Here(first, words) => {
                for (index, word) in (first / 64..).zip(words) {
                    here.merge_word(index, word);
                }
            }
            heard => {
                assert_eq!(
                    heard,
                    Heard::Welcome(Stage::Running, Had::Pages(here.count()))
                );
                assert_eq!(peer.hear(), Heard::Started);
                return here;
            }
        }
    }
}

#[test]
fn a_new_engine_says_what_is_here_with_every_connection() {
    let mut here = PageSet::new(PAGES);
    // The first page is what a peer sends by itself.
    here.insert(0);
    here.insert_range(PageRange::new(60, 8));
    let (to, id) = taken_over(&here, destination_options());
    let (_, heard) = Peer::greet(to.address, MigrationId::random(), true);
    assert_eq!(heard, Heard::Error(4));
    // Who waited before it was there is heard, too.
    let reader = toucher(&to.vm, 33);
    let mut peer = Peer::connect(to.address);
    peer.hello(id, true);
    assert_eq!(hear_here(&mut peer), here);
    hear_request(&mut peer, 33);
    peer.page(33, &[7; PAGE]);
    assert_eq!(reader.join().unwrap(), Ok(7));
    // One that is here is left alone.
    peer.page(60, &[7; PAGE]);
    peer.page(34, &[8; PAGE]);
    assert_eq!(to.vm.touch(34, |bytes| bytes[100]), Ok(8));
    assert_eq!(to.vm.touch(60, |bytes| bytes[100]), Ok(0));
    here.insert_range(PageRange::new(33, 2));
    let mut peer = Peer::connect(to.address);
    peer.hello(id, true);
    assert_eq!(hear_here(&mut peer), here);
    peer.send(&Message::AllSent);
    let mut absent = 0;
    loop {
        match peer.hear() {
            Heard::Request(ranges) => {
                for page in ranges.iter().flat_map(PageRange::iter) {
                    peer.page(page, &[0; PAGE]);
                    absent += 1;
                }
            }
            heard => {
                assert_eq!(heard, Heard::Done);
                break;
            }
        }
    }
    assert_eq!(absent, PAGES - here.count());
    assert_eq!(peer.acked, absent, "frames of an earlier connection count");
    peer.send(&Message::Bye);
    let report = to.run.join().unwrap().unwrap();
    assert_eq!(report.pages_too_late, 1);
    assert_eq!(report.received.requested, absent + 3);
    assert_eq!(to.vm.starts.load(SeqCst), 0, "the guest runs already");
}

#[test]
fn a_new_engine_that_has_all_waits_for_the_source_and_not_for_long() {
    let all = PageSet::full(PAGES);
    let options = DestinationOptions {
        give_up: Duration::from_millis(300),
        stall: Duration::from_millis(500),
        ..destination_options()
    };
    let (to, id) = taken_over(&all, options.clone());
    // A source that was pausing between two tries.
    thread::sleep(Duration::from_millis(1200));
    let mut peer = Peer::connect(to.address);
    thread::sleep(Duration::from_millis(50));
    peer.hello(id, true);
    assert_eq!(hear_here(&mut peer), all);
    assert_eq!(peer.hear(), Heard::Done);
    peer.send(&Message::Bye);
    to.run.join().unwrap().unwrap();
    // None comes: it was told by the engine before.
    let (to, _) = taken_over(&all, options);
    to.run.join().unwrap().unwrap();
    assert_eq!(*to.vm.failed.lock().unwrap(), None);
}

#[test]
fn a_new_engine_that_no_source_comes_to_fails_closed() {
    let mut here = PageSet::full(PAGES);
    here.remove(DEVICE);
    let options = DestinationOptions {
        give_up: Duration::from_millis(300),
        ..destination_options()
    };
    let (to, _) = taken_over(&here, options);
    let error = to.vm.touch(DEVICE, |_| ()).unwrap_err();
    assert!(error.contains("will never come"), "{error}");
    let result = to.run.join().unwrap();
    assert!(matches!(
        result,
        Err(Error::Lost { .. } | Error::NeverCame { .. })
    ));
}
