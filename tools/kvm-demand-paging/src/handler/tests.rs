//! The engine with a VM that only takes notes, on memslots without a module.

use super::{
    background::Background,
    engine::{Batch, Engine, Marks},
    receive_once,
    slot::tests::slot,
    slots::Slots,
    Error,
};
use crate::{
    source::{Client, Content, Counters, FileSource, Options, PageFile, PageSource, Server},
    Access, AliasMap, Event, EventKind, Marked, PageRange, Result, State, Who, PAGE_SIZE,
};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{Seek, SeekFrom, Write},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

const LONG: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Notes {
    marks: Mutex<Vec<(State, PageRange)>>,
    errno: Option<i32>,
}

impl Marks for Notes {
    fn mark(&self, _: u32, state: State, ranges: &[PageRange]) -> Result<Marked> {
        if let Some(errno) = self.errno {
            let source = std::io::Error::from_raw_os_error(errno);
            return Err(crate::Error::sys("KDP_MARK", "a test", source));
        }
        let mut marks = self.marks.lock().unwrap();
        marks.extend(ranges.iter().map(|range| (state, *range)));
        Ok(Marked {
            done: 0,
            changed: 0,
        })
    }
}

impl Engine<Notes> {
    fn marks(&self) -> Vec<(State, PageRange)> {
        std::mem::take(
            &mut self
                .vm()
                .marks
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}

fn event(page: u64) -> Event {
    Event {
        kind: EventKind::Absent,
        slot_id: 0,
        page,
        gfn: page,
        access: Access {
            who: Who::Guest,
            write: false,
            exec: false,
        },
        tid: None,
        waiters: 1,
        deliveries: 1,
    }
}

/// Page n is full of the byte n, so page 0 is zeros.
fn file(pages: u8) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for page in 0..pages {
        file.write_all(&[page; PAGE_SIZE]).unwrap();
    }
    file
}

fn source(file: &tempfile::NamedTempFile) -> Box<dyn PageSource> {
    Box::new(FileSource::new(PageFile::open(file.path(), 0).unwrap()))
}

fn engine(pages: u8, backing: u64) -> (Engine<Notes>, AliasMap, tempfile::NamedTempFile) {
    let file = file(pages);
    let engine = Engine::new(Notes::default(), source(&file)).unwrap();
    let (slot, view) = slot(pages.into(), 0, backing);
    engine.slots.insert(slot).unwrap();
    (engine, view, file)
}

fn receive(engine: &Engine<Notes>) -> u64 {
    receive_once(engine, engine.faults(), LONG).unwrap()
}

fn byte(view: &AliasMap, page: u64) -> u8 {
    let mut data = [0; PAGE_SIZE];
    view.read(page, &mut data).unwrap();
    data[PAGE_SIZE - 1]
}

#[test]
fn a_touched_page_is_fetched_placed_and_its_waiters_are_woken() {
    let (engine, view, _file) = engine(8, 4096);
    engine.on_events(&[event(3), event(4), event(6)]).unwrap();
    assert_eq!(engine.marks(), []);
    while receive(&engine) < 1 || engine.report().pages_present < 3 {}
    // Who places a page lets its waiters go.
    assert_eq!(engine.marks(), []);
    assert_eq!([3, 4, 6].map(|page| byte(&view, page)), [3, 4, 6]);
    let report = engine.report();
    assert_eq!(
        (
            report.pages_on_demand,
            report.pages_in_background,
            report.touched.guest
        ),
        (3, 0, 3)
    );
    assert!(report.fetch_p99_us > 0);
}

#[test]
fn a_waiter_for_a_present_page_is_woken_at_once() {
    let (engine, view, _file) = engine(8, 4096);
    engine.slots.get(0).unwrap().present().set(5);
    let redelivered = Event {
        deliveries: 2,
        ..event(5)
    };
    engine.on_events(&[redelivered]).unwrap();
    assert_eq!(engine.marks(), [(State::Present, PageRange::page(5))]);
    assert_eq!(byte(&view, 5), 0);
    let report = engine.report();
    assert_eq!(
        (
            report.events_redelivered,
            report.events_already_present,
            report.pages_fetched
        ),
        (1, 1, 0)
    );
}

#[test]
fn the_same_event_twice_is_one_request_and_one_place() {
    let (engine, view, _file) = engine(8, 4096);
    engine.on_events(&[event(3)]).unwrap();
    engine.on_events(&[event(3)]).unwrap();
    assert_eq!(receive(&engine), 1);
    assert_eq!(engine.marks(), []);
    // The guest writes; a copy that comes late must not.
    view.write(3, &[0xee; PAGE_SIZE]).unwrap();
    let mut batch = Batch::default();
    engine
        .on_pages(
            PageRange::page(3),
            Content::Data(&[3; PAGE_SIZE]),
            &mut batch,
        )
        .unwrap();
    engine.resolve(batch).unwrap();
    assert_eq!(byte(&view, 3), 0xee);
    assert_eq!(engine.report().pages_too_late, 1);
}

#[test]
fn zero_pages_are_marked_zero_on_shmem_and_written_on_hugetlb() {
    let (on_shmem, _view, _file) = engine(8, 4096);
    for _ in 0..2 {
        on_shmem.on_events(&[event(0)]).unwrap();
        receive_once(&on_shmem, on_shmem.faults(), Duration::from_millis(50)).unwrap();
        // The second event read the page's state before the first was resolved: it is woken again.
        assert_eq!(on_shmem.marks(), [(State::Zero, PageRange::page(0))]);
    }
    assert_eq!(on_shmem.report().pages_zero, 1);

    let (on_hugetlb, view, _file) = engine(8, 2 << 20);
    view.write(0, &[9; PAGE_SIZE]).unwrap();
    on_hugetlb.on_events(&[event(0)]).unwrap();
    receive(&on_hugetlb);
    assert_eq!(on_hugetlb.marks(), []);
    assert_eq!(on_hugetlb.report().pages_present, 1);
    assert_eq!(byte(&view, 0), 0);
}

#[test]
fn threads_that_fetch_one_page_all_get_it() {
    let (engine, view, _file) = engine(64, 4096);
    thread::scope(|scope| {
        let fetchers: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| (1..64).for_each(|page| engine.fetch(0, page).unwrap())))
            .collect();
        while fetchers.iter().any(|thread| !thread.is_finished()) {
            receive_once(&engine, engine.faults(), Duration::from_millis(5)).unwrap();
        }
    });
    assert!((1..64).all(|page| byte(&view, page) == page as u8));
    let report = engine.report();
    assert_eq!((report.pages_fetched, report.touched.exit), (63, 63));
    // Nobody waited in the kernel.
    assert_eq!(engine.marks(), []);
}

#[test]
fn an_unreadable_page_stays_absent_and_is_tried_again() {
    let (engine, view, file) = engine(8, 4096);
    let whole = file.as_file().metadata().unwrap().len();
    file.as_file().set_len(whole - PAGE_SIZE as u64).unwrap();
    thread::scope(|scope| {
        let fetch = scope.spawn(|| engine.fetch(0, 7));
        while !fetch.is_finished() {
            receive_once(&engine, engine.faults(), Duration::from_millis(5)).unwrap();
        }
        assert!(matches!(
            fetch.join().unwrap(),
            Err(Error::Unreadable { page: 7, .. })
        ));
    });
    engine.on_events(&[event(7)]).unwrap();
    receive(&engine);
    assert_eq!(
        (engine.report().pages_present, engine.report().pages_failed),
        (0, 2)
    );
    assert_eq!(engine.marks(), []);

    let mut writer: &File = file.as_file();
    writer
        .seek(SeekFrom::Start(whole - PAGE_SIZE as u64))
        .unwrap();
    writer.write_all(&[7; PAGE_SIZE]).unwrap();
    let start = Instant::now();
    while engine.report().pages_present == 0 {
        assert!(start.elapsed() < LONG, "it was not asked for again");
        engine.retry().unwrap();
        receive_once(&engine, engine.faults(), Duration::from_millis(20)).unwrap();
    }
    assert_eq!(byte(&view, 7), 7);
}

#[test]
fn the_background_fetches_all_and_leaves_present_pages_alone() {
    let (engine, view, file) = engine(200, 2 << 20);
    let slot = engine.slots.get(0).unwrap();
    view.write(77, &[0xee; PAGE_SIZE]).unwrap();
    slot.present().set(77);
    let background = Background::new(source(&file), None);
    background.fetch_all(&engine).unwrap();
    let expected = |page| if page == 77 { 0xee } else { page as u8 };
    assert!((0..200).all(|page| byte(&view, page) == expected(page)));
    let report = engine.report();
    assert_eq!(
        (
            report.pages_in_background,
            report.pages_on_demand,
            report.pages_present
        ),
        (199, 0, 200)
    );
    // Nobody waited: there was no need for a system call.
    assert_eq!(engine.marks(), []);
}

#[test]
fn the_background_keeps_to_its_bandwidth() {
    let (engine, _view, file) = engine(200, 2 << 20);
    // 200 pages in requests of 64: the last one leaves after three have been paid for.
    let background = Background::new(source(&file), Some(192 * PAGE_SIZE as u64 * 4));
    let start = Instant::now();
    background.fetch_all(&engine).unwrap();
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(240), "{elapsed:?}");
    assert!(elapsed < LONG, "{elapsed:?}");
}

#[test]
fn the_background_is_complete_again_after_a_memslot_was_added() {
    let file = file(16);
    let engine = Engine::new(Notes::default(), source(&file)).unwrap();
    let background = Background::new(source(&file), None);
    let wait_for = |complete: bool, present: u64| {
        let start = Instant::now();
        while background.is_complete() != complete || engine.report().pages_present != present {
            assert!(start.elapsed() < LONG, "{:?}", engine.report());
            thread::sleep(Duration::from_millis(1));
        }
    };
    thread::scope(|scope| {
        let run = scope.spawn(|| background.run(&engine));
        thread::sleep(Duration::from_millis(20));
        // There is nothing yet: that is not complete.
        wait_for(false, 0);
        for (first, present) in [(0, 8), (8, 16)] {
            engine.slots.insert(slot_at(first)).unwrap();
            wait_for(true, present);
        }
        background.stop();
        assert!(matches!(
            run.join().unwrap(),
            Err(Error::Source(crate::source::Error::Stopped))
        ));
    });
}

fn slot_at(first: u64) -> super::slot::Slot {
    let memfd = crate::Memfd::create("slot", crate::Backing::Shmem, 8 * PAGE_SIZE as u64).unwrap();
    let info = crate::MemslotInfo {
        slot_id: first as u32,
        paging: true,
        base_gfn: first,
        pages: 8,
        memfd_offset: 0,
        backing_page_size: 2 << 20,
        name: None,
    };
    super::slot::tests::plain(info, &memfd, first)
}

#[test]
fn a_memslot_that_is_gone_is_not_served_any_more() {
    let file = file(8);
    let notes = Notes {
        errno: Some(rustix::io::Errno::NOENT.raw_os_error()),
        ..Notes::default()
    };
    let engine = Engine::new(notes, source(&file)).unwrap();
    engine.slots.insert(slot(8, 0, 4096).0).unwrap();
    // Zeros on shmem are marked.
    engine.on_events(&[event(0)]).unwrap();
    receive_once(&engine, engine.faults(), Duration::from_millis(50)).unwrap();
    assert!(engine.slots.get(0).is_none());
    // Its events, if any are left, are of no use.
    engine.on_events(&[event(4), event(1000)]).unwrap();
    assert!(engine.fetch(0, 4).is_err());
}

#[test]
fn other_errors_of_a_mark_end_the_handler() {
    let file = file(8);
    let notes = Notes {
        errno: Some(rustix::io::Errno::NOMEM.raw_os_error()),
        ..Notes::default()
    };
    let engine = Engine::new(notes, source(&file)).unwrap();
    engine.slots.insert(slot(8, 0, 4096).0).unwrap();
    engine.on_events(&[event(0)]).unwrap();
    assert!(matches!(
        receive_once(&engine, engine.faults(), LONG),
        Err(Error::Module(_))
    ));
}

#[test]
fn stopping_frees_those_who_fetch() {
    let (engine, _view, _file) = engine(8, 4096);
    thread::scope(|scope| {
        let fetch = scope.spawn(|| engine.fetch(0, 3));
        thread::sleep(Duration::from_millis(20));
        engine.stop();
        assert!(matches!(
            fetch.join().unwrap(),
            Err(Error::Source(crate::source::Error::Stopped))
        ));
    });
}

#[test]
fn no_page_of_the_source_belongs_to_two_memslots() {
    let slots = Slots::default();
    slots.insert(slot(8, 16, 4096).0).unwrap();
    for (pages, first, fits) in [
        (8, 8, true),
        (8, 24, true),
        (1, 23, false),
        (100, 0, false),
        (2, 15, false),
    ] {
        let fresh = Slots::default();
        fresh.insert(slot(8, 16, 4096).0).unwrap();
        assert_eq!(
            fresh.insert(slot(pages, first, 4096).0).is_ok(),
            fits,
            "{pages} from {first}"
        );
    }
    assert_eq!(slots.of_source(PageRange::new(23, 1)).len(), 1);
    assert_eq!(slots.of_source(PageRange::new(24, 100)).len(), 0);
    assert_eq!(slots.of_source(PageRange::new(0, 17)).len(), 1);
}

#[test]
fn a_connection_that_is_cut_again_and_again_costs_time_not_data() {
    let file = file(250);
    let address = "127.0.0.1:0".parse().unwrap();
    let server = Server::bind(&address, PageFile::open(file.path(), 0).unwrap()).unwrap();
    let (control, address) = (server.control(), server.address().clone());
    let server = thread::spawn(move || server.run().unwrap());
    let connect = || Box::new(Client::connect(address.clone(), Options::default()).unwrap());
    let engine = Engine::new(Notes::default(), connect()).unwrap();
    let (slot, view) = slot(250, 0, 2 << 20);
    engine.slots.insert(slot).unwrap();
    let background = Background::new(connect(), Some(2 << 20));
    thread::scope(|scope| {
        let all = scope.spawn(|| background.fetch_all(&engine).unwrap());
        let faults = scope.spawn(|| {
            (0..250)
                .rev()
                .for_each(|page| engine.fetch(0, page).unwrap())
        });
        let start = Instant::now();
        while !all.is_finished() || !faults.is_finished() {
            if start.elapsed() > 3 * LONG {
                // Those who still wait fail, and with them the test.
                engine.stop();
                background.stop();
                break;
            }
            receive_once(&engine, engine.faults(), Duration::from_millis(2)).unwrap();
            control.cut();
        }
    });
    assert!((0..250).all(|page| byte(&view, page) == page as u8));
    let report = engine.report();
    assert_eq!((report.pages_fetched, report.pages_present), (250, 250));
    assert!(report.reconnects + background.counters().reconnects > 0);
    control.stop();
    server.join().unwrap();
}

/// A source whose copies come in an order that a test chooses, and twice.
#[derive(Default)]
struct Twice(Mutex<Vec<u64>>);

impl PageSource for Twice {
    fn pages(&self) -> u64 {
        64
    }

    fn request(&self, ranges: &[PageRange]) -> Result<(), crate::source::Error> {
        self.0
            .lock()
            .unwrap()
            .extend(ranges.iter().flat_map(PageRange::iter));
        Ok(())
    }

    fn recv(
        &self,
        _: Duration,
        sink: &mut dyn FnMut(PageRange, Content<'_>),
    ) -> Result<usize, crate::source::Error> {
        let pages = self.0.lock().unwrap().split_off(0);
        for page in pages.iter().rev().chain(&pages) {
            sink(
                PageRange::page(*page),
                Content::Data(&[*page as u8; PAGE_SIZE]),
            );
        }
        Ok(pages.len())
    }

    fn stop(&self) {}

    fn counters(&self) -> Counters {
        Counters::default()
    }
}

#[test]
fn a_source_that_sends_twice_and_in_any_order_places_once() {
    let engine = Engine::new(Notes::default(), Box::new(Twice::default())).unwrap();
    let (slot, view) = slot(64, 0, 4096);
    engine.slots.insert(slot).unwrap();
    let mut woken: BTreeMap<u64, u32> = BTreeMap::new();
    for pages in [[9, 1, 5], [5, 63, 1]] {
        engine.on_events(&pages.map(event)).unwrap();
        receive_once(&engine, engine.faults(), LONG).unwrap();
        for (_, range) in engine.marks() {
            range
                .iter()
                .for_each(|page| *woken.entry(page).or_default() += 1);
        }
    }
    let report = engine.report();
    assert_eq!((report.pages_fetched, report.pages_present), (4, 4));
    // By the copies that came late: somebody may wait still. Pages 5 and 1 were waited for twice.
    assert_eq!(woken, BTreeMap::from([(1, 2), (5, 2), (9, 1), (63, 1)]));
    assert!([1, 5, 9, 63]
        .iter()
        .all(|page| byte(&view, *page) == *page as u8));
}
