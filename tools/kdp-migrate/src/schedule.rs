//! The sent map: which page is sent next, what is on its way, and what a cut connection, or an engine of the
//! destination that died, has lost.
//!
//! Every page is in one of these states, and moves on only so:
//!
//! - *to send*: what the destination has of it, if anything, is stale;
//! - *sent*: its newest bytes are on their way, or there. It is to be sent again if it is written (the dirty log says
//!   so), or if the connection breaks before the destination has told that it came;
//! - *free*: the guest hinted so, and has not written it since. It never travels.
//!
//! After the switch nothing is written any more, so a page is sent once: in the background, or earlier if it is asked
//! for. It is sent again only for a request that the destination made when it had already had it from this connection:
//! then it means it (what it got was lost there). Requests and acks come in order, so that is what is seen here. A
//! destination whose engine was replaced says with each connection what it has: that stands for the acks until then.

use crate::PageSet;
use kvm_demand_paging::PageRange;
use std::collections::VecDeque;

/// A frame of pages that the destination has not told of yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flight {
    pages: PageRange,
    bytes: u64,
}

/// Ack of a frame that was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeverSent {
    /// Frames that the destination says it had.
    pub acked: u64,
    /// Frames that were sent.
    pub sent: u64,
}

/// The sent map.
#[derive(Clone, Debug)]
pub struct SendMap {
    to_send: PageSet,
    free: PageSet,
    // Pages of which the destination may have something.
    ever: PageSet,
    urgent: PageSet,
    queue: VecDeque<PageRange>,
    flights: VecDeque<Flight>,
    in_flight: u64,
    // Frames whose coming was told.
    acked: u64,
    // Where the background goes on.
    cursor: u64,
}

impl SendMap {
    /// All of `pages` pages are to be sent.
    pub fn new(pages: u64) -> Self {
        Self {
            to_send: PageSet::full(pages),
            free: PageSet::new(pages),
            ever: PageSet::new(pages),
            urgent: PageSet::new(pages),
            queue: VecDeque::new(),
            flights: VecDeque::new(),
            in_flight: 0,
            acked: 0,
            cursor: 0,
        }
    }

    /// Pages that are to be sent.
    pub fn remaining(&self) -> u64 {
        self.to_send.count()
    }

    /// Pages that never travel, as it is now.
    pub fn free(&self) -> &PageSet {
        &self.free
    }

    /// Pages of which the destination has what is worth nothing.
    pub fn stale(&self) -> PageSet {
        let mut stale = self.ever.clone();
        stale.intersect(&self.to_send);
        stale
    }

    /// Bytes that were sent, and not told of.
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Frames of pages that the destination told of.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// A hint that counts ([`crate::hints`]): these are free.
    pub fn hinted(&mut self, pages: PageRange) {
        self.to_send.remove_range(pages);
        self.free.insert_range(pages);
    }

    /// What a harvest of the dirty log has brought.
    pub fn written(&mut self, pages: &PageSet) {
        self.free.subtract(pages);
        self.to_send.union(pages);
    }

    /// The destination wants these.
    pub fn request(&mut self, pages: PageRange) {
        for page in pages.first..pages.end().min(self.to_send.limit()) {
            let on_its_way = !self.to_send.contains(page)
                && self
                    .flights
                    .iter()
                    .any(|flight| flight.pages.contains(page));
            if on_its_way || !self.urgent.insert(page) {
                continue;
            }
            match self.queue.back_mut() {
                Some(last) if last.end() == page => last.count += 1,
                _ => self.queue.push_back(PageRange::page(page)),
            }
        }
    }

    /// Whether a page is asked for and not sent yet.
    pub fn has_urgent(&self) -> bool {
        !self.urgent.is_empty()
    }

    /// The next pages that were asked for, at most `max`, and none at or behind `end_of` their first.
    pub fn next_urgent(&mut self, max: u64, end_of: impl Fn(u64) -> u64) -> Option<PageRange> {
        loop {
            let range = self.queue.front_mut()?;
            // What was sent meanwhile in the background is urgent no longer.
            let Some(run) = self.urgent.next_run(range.first, max) else {
                self.queue.clear();
                return None;
            };
            if run.first >= range.end() {
                self.queue.pop_front();
                continue;
            }
            let end = run.end().min(range.end()).min(end_of(run.first));
            range.count = range.end() - end;
            range.first = end;
            if range.is_empty() {
                self.queue.pop_front();
            }
            // The background goes on behind what was touched: neighbours are likely to be next.
            self.cursor = end;
            return Some(PageRange::from(run.first..end));
        }
    }

    /// The next pages that nobody asked for, likewise.
    pub fn next_background(&mut self, max: u64, end_of: impl Fn(u64) -> u64) -> Option<PageRange> {
        let run = self
            .to_send
            .next_run(self.cursor, max)
            .or_else(|| self.to_send.next_run(0, max))?;
        let end = run.end().min(end_of(run.first));
        self.cursor = end;
        Some(PageRange::from(run.first..end))
    }

    /// From the first page again.
    pub fn rewind(&mut self) {
        self.cursor = 0;
    }

    /// These are about to be read and sent: what is written from now on is in the next harvest.
    pub fn taken(&mut self, pages: PageRange) {
        self.to_send.remove_range(pages);
        self.urgent.remove_range(pages);
        self.ever.insert_range(pages);
    }

    /// What was taken is on its way, or lost with the connection; frames are told of in this order.
    pub fn sent(&mut self, pages: PageRange, bytes: u64) {
        self.flights.push_back(Flight { pages, bytes });
        self.in_flight += bytes;
    }

    /// The destination has had so many frames of pages since the beginning.
    ///
    /// # Errors
    ///
    /// More than were sent.
    pub fn ack(&mut self, acked: u64) -> Result<(), NeverSent> {
        let sent = self.acked + self.flights.len() as u64;
        if acked > sent {
            return Err(NeverSent { acked, sent });
        }
        while self.acked < acked {
            let Some(flight) = self.flights.pop_front() else {
                break;
            };
            self.in_flight -= flight.bytes;
            self.acked += 1;
        }
        Ok(())
    }

    /// There is a new connection, and the destination has had so many frames of the former ones. What else was on its
    /// way is lost and to be sent again; what is wanted will be asked for again.
    ///
    /// # Errors
    ///
    /// Fewer than it told of, or more than were sent.
    pub fn resume(&mut self, acked: u64) -> Result<(), NeverSent> {
        if acked < self.acked {
            return Err(NeverSent {
                acked,
                sent: self.acked,
            });
        }
        self.ack(acked)?;
        for flight in std::mem::take(&mut self.flights) {
            self.again(flight.pages);
        }
        self.cut();
        Ok(())
    }

    /// There is a new connection, and behind it a destination that knows nothing of any frame, but has these pages: all
    /// others are to be sent, whatever was told of them before, and free ones, too. Frames are counted from 0 again; what
    /// is wanted will be asked for again. After the switch only: a page that is there is taken for its newest bytes.
    pub fn replaced(&mut self, here: &PageSet) {
        let pages = self.to_send.limit();
        self.to_send = PageSet::full(pages);
        self.to_send.subtract(here);
        self.ever.clear();
        self.ever.union(here);
        self.flights.clear();
        self.acked = 0;
        self.cut();
    }

    /// Nothing is on its way, and nobody waits.
    fn cut(&mut self) {
        self.in_flight = 0;
        self.urgent.clear();
        self.queue.clear();
    }

    fn again(&mut self, pages: PageRange) {
        for page in pages.iter().filter(|page| !self.free.contains(*page)) {
            self.to_send.insert(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 40;

    #[derive(Clone, Debug)]
    enum Op {
        Write(u64),
        /// The guest hints that these are free, and the hint counts.
        Hint(u64, u64),
        Send(u64),
        Deliver(usize),
        Harvest,
        Cut(usize),
        Request(u64, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..PAGES).prop_map(Op::Write),
            (0..PAGES, 1u64..5).prop_map(|(first, count)| Op::Hint(first, count)),
            (1u64..8).prop_map(Op::Send),
            (0usize..4).prop_map(Op::Deliver),
            Just(Op::Harvest),
            (0usize..3).prop_map(Op::Cut),
            (0..PAGES, 1u64..9).prop_map(|(first, count)| Op::Request(first, count)),
        ]
    }

    /// What happens after the switch.
    #[derive(Clone, Debug)]
    enum After {
        Send(u64),
        Request(u64, u64),
        Deliver(usize),
        /// So many frames come still, and are not told of.
        Cut(usize),
        /// The same, and the engine dies; these pages were not there yet though it had told of them.
        Replace(usize, Vec<u64>),
    }

    fn after() -> impl Strategy<Value = After> {
        let lost = prop::collection::vec(0..PAGES, 0..9);
        prop_oneof![
            (1u64..8).prop_map(After::Send),
            (0..PAGES, 1u64..9).prop_map(|(first, count)| After::Request(first, count)),
            (0usize..4).prop_map(After::Deliver),
            (0usize..3).prop_map(After::Cut),
            (0usize..3, lost).prop_map(|(more, lost)| After::Replace(more, lost)),
        ]
    }

    /// A source, the connection and a destination, as bare as they can be.
    struct World {
        map: SendMap,
        guest: Vec<u32>,
        is_free: Vec<bool>,
        log: PageSet,
        wire: VecDeque<Vec<(u64, Option<u32>)>>,
        there: Vec<Option<u32>>,
        had: u64,
        times: Vec<u32>,
    }

    impl World {
        fn new() -> Self {
            Self {
                map: SendMap::new(PAGES),
                guest: vec![0; PAGES as usize],
                is_free: vec![false; PAGES as usize],
                log: PageSet::new(PAGES),
                wire: VecDeque::new(),
                there: vec![None; PAGES as usize],
                had: 0,
                times: vec![0; PAGES as usize],
            }
        }

        /// Before the switch.
        fn run(&mut self, op: Op) {
            match op {
                Op::Write(page) => {
                    self.guest[page as usize] += 1;
                    self.is_free[page as usize] = false;
                    self.log.insert(page);
                }
                Op::Hint(first, count) => {
                    let pages = PageRange::from(first..(first + count).min(PAGES));
                    // Free now: writes before were in the log, which must not bring them back as used.
                    pages
                        .iter()
                        .for_each(|page| self.is_free[page as usize] = true);
                    self.map.hinted(pages);
                }
                Op::Send(max) => {
                    if let Some(run) = self.map.next_background(max, end_of) {
                        assert!(run.end() <= end_of(run.first) && (1..=max).contains(&run.count));
                        self.send(run);
                    }
                }
                Op::Deliver(frames) => self.deliver(frames),
                Op::Harvest => self.harvest(),
                Op::Cut(more) => {
                    self.deliver(more.min(self.wire.len()));
                    self.wire.clear();
                    self.map.resume(self.had).unwrap();
                }
                Op::Request(..) => {}
            }
        }

        fn send(&mut self, run: PageRange) {
            self.map.taken(run);
            let free = |page: &u64| self.map.free().contains(*page);
            let frame = run
                .iter()
                .map(|page| (page, (!free(&page)).then(|| self.guest[page as usize])))
                .collect();
            run.iter().for_each(|page| self.times[page as usize] += 1);
            self.wire.push_back(frame);
            self.map.sent(run, run.count);
        }

        fn deliver(&mut self, frames: usize) {
            for _ in 0..frames.min(self.wire.len()) {
                for (page, bytes) in self.wire.pop_front().unwrap() {
                    self.there[page as usize] = bytes;
                }
                self.had += 1;
            }
            self.map.ack(self.had).unwrap();
        }

        fn harvest(&mut self) {
            self.map.written(&self.log);
            self.log.clear();
        }

        /// The guest stops: what is stale is dropped, what is free is there as zeros.
        fn switch(&mut self) {
            self.deliver(usize::MAX);
            self.harvest();
            for page in 0..PAGES {
                let there = &mut self.there[page as usize];
                if self.map.stale().contains(page) {
                    *there = None;
                }
                if self.map.free().contains(page) {
                    *there = Some(0);
                }
            }
            self.times.fill(0);
        }

        /// The same as `deliver` after it: what is there already would be sent in vain.
        fn place(&mut self, frames: usize) {
            for _ in 0..frames.min(self.wire.len()) {
                for (page, bytes) in self.wire.pop_front().unwrap() {
                    let before = self.there[page as usize].replace(bytes.unwrap_or(0));
                    assert_eq!(before, None, "page {page} was sent twice");
                }
                self.had += 1;
            }
        }

        fn here(&self) -> PageSet {
            let mut here = PageSet::new(PAGES);
            for page in (0..PAGES).filter(|page| self.there[*page as usize].is_some()) {
                here.insert(page);
            }
            here
        }
    }

    fn end_of(page: u64) -> u64 {
        // A memslot ends at page 16.
        if page < 16 {
            16
        } else {
            PAGES
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_used_is_lost_whatever_breaks(ops in prop::collection::vec(op(), 0..80)) {
            let mut world = World::new();
            ops.into_iter().for_each(|op| world.run(op));
            world.harvest();
            while let Some(run) = world.map.next_background(7, end_of) {
                world.send(run);
            }
            world.deliver(usize::MAX);
            for page in 0..PAGES as usize {
                if !world.is_free[page] {
                    prop_assert_eq!(world.there[page], Some(world.guest[page]), "page {}", page);
                }
            }
            prop_assert_eq!(world.map.in_flight(), 0);
        }

        #[test]
        fn after_the_switch_every_page_is_sent_once(ops in prop::collection::vec(op(), 0..60)) {
            let mut world = World::new();
            for op in ops {
                match op {
                    Op::Send(max) => if let Some(run) = world.map.next_background(max, end_of) {
                        world.send(run);
                    },
                    Op::Request(first, count) => {
                        // The destination asks for what it has not.
                        for page in (first..(first + count).min(PAGES)).filter(|page| world.there[*page as usize].is_none()) {
                            world.map.request(PageRange::page(page));
                        }
                        // Requested pages come before all others.
                        while let Some(run) = world.map.next_urgent(3, end_of) {
                            prop_assert!(run.end() <= end_of(run.first) && run.count <= 3 && run.count > 0);
                            prop_assert!(run.iter().all(|page| page >= first && page < first + count));
                            world.send(run);
                        }
                        prop_assert!(!world.map.has_urgent());
                    }
                    Op::Deliver(frames) => world.deliver(frames),
                    _ => {}
                }
            }
            while let Some(run) = world.map.next_background(7, end_of) {
                world.send(run);
            }
            world.deliver(usize::MAX);
            prop_assert!(world.times.iter().all(|times| *times == 1), "{:?}", world.times);
        }
    }

    fn before() -> impl Strategy<Value = Op> {
        op().prop_filter("nobody asks yet", |op| !matches!(op, Op::Request(..)))
    }

    proptest! {
        #[test]
        fn a_new_engine_gets_what_it_has_not_and_nothing_else(
            before in prop::collection::vec(before(), 0..30),
            ops in prop::collection::vec(after(), 0..60),
        ) {
            let mut world = World::new();
            before.into_iter().for_each(|op| world.run(op));
            world.switch();
            // How often each page must have been sent in the end, and whether the destination knows of no frame.
            let mut due: Vec<u32> = world.there.iter().map(|page| page.is_none().into()).collect();
            let mut replaced = false;
            for op in ops {
                let (more, lost) = match op {
                    After::Send(max) => {
                        if let Some(run) = world.map.next_background(max, end_of) {
                            world.send(run);
                        }
                        continue;
                    }
                    After::Request(first, count) => {
                        let wanted = first..(first + count).min(PAGES);
                        for page in wanted.filter(|page| world.there[*page as usize].is_none()) {
                            world.map.request(PageRange::page(page));
                        }
                        while let Some(run) = world.map.next_urgent(3, end_of) {
                            world.send(run);
                        }
                        continue;
                    }
                    After::Deliver(frames) => {
                        world.place(frames);
                        world.map.ack(world.had).unwrap();
                        continue;
                    }
                    After::Cut(more) => (more, None),
                    After::Replace(more, lost) => (more, Some(lost)),
                };
                world.place(more);
                world.wire.clear();
                replaced |= lost.is_some();
                for page in lost.into_iter().flatten() {
                    world.there[page as usize] = None;
                }
                for (page, due) in due.iter_mut().enumerate() {
                    *due += u32::from(world.there[page].is_none() && world.times[page] == *due);
                }
                if replaced {
                    world.had = 0;
                    world.map.replaced(&world.here());
                } else {
                    world.map.resume(world.had).unwrap();
                }
                prop_assert_eq!(world.map.in_flight(), 0);
                prop_assert!(!world.map.has_urgent());
            }
            while let Some(run) = world.map.next_background(7, end_of) {
                world.send(run);
            }
            world.place(usize::MAX);
            world.map.ack(world.had).unwrap();
            for page in 0..PAGES as usize {
                let right = if world.is_free[page] { world.there[page] } else { Some(world.guest[page]) };
                prop_assert!(world.there[page].is_some(), "page {} never came", page);
                prop_assert_eq!(world.there[page], right, "page {}", page);
            }
            prop_assert_eq!(&world.times, &due);
            prop_assert_eq!((world.map.in_flight(), world.map.remaining()), (0, 0));
        }
    }

    #[test]
    fn a_page_that_is_there_is_sent_again_if_it_is_asked_for_then() {
        let mut world = World::new();
        let run = PageRange::new(0, 4);
        world.send(run);
        world.map.request(PageRange::page(2));
        assert_eq!(world.map.next_urgent(4, end_of), None, "it is on its way");
        world.deliver(1);
        world.map.request(PageRange::page(2));
        world.map.request(PageRange::page(2));
        assert_eq!(world.map.next_urgent(4, end_of), Some(PageRange::page(2)));
        world.map.taken(PageRange::page(2));
        assert!(!world.map.has_urgent());
    }

    #[test]
    fn what_a_peer_claims_is_checked() {
        let mut map = SendMap::new(PAGES);
        map.taken(PageRange::page(0));
        map.sent(PageRange::page(0), 1);
        assert_eq!(map.ack(2), Err(NeverSent { acked: 2, sent: 1 }));
        assert_eq!(map.ack(1), Ok(()));
        assert_eq!(map.resume(0), Err(NeverSent { acked: 0, sent: 1 }));
        map.request(PageRange::new(PAGES - 1, u64::MAX));
        assert_eq!(map.next_urgent(9, end_of), Some(PageRange::page(PAGES - 1)));
    }

    #[test]
    fn stale_is_what_the_destination_must_drop() {
        let mut map = SendMap::new(PAGES);
        map.taken(PageRange::new(0, 3));
        map.sent(PageRange::new(0, 3), 3);
        let mut written = PageSet::new(PAGES);
        written.insert(1);
        written.insert(9);
        map.written(&written);
        assert_eq!(map.stale().runs().collect::<Vec<_>>(), [PageRange::page(1)]);
    }
}
