// SPDX-License-Identifier: GPL-2.0

//! Several who place the same pages with different bytes, beside those who write them, poison them, make them absent, claim
//! them, and touch them: each page has the bytes of one, whole, and what the guest writes stays.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use kdp_vmm::{Order, Touch};
use kvm_demand_paging::{Backing, Cause, Claimed, PageRange, Placed, State};

use crate::check::Result;
use crate::content::WORDS;
use crate::guest;
use crate::harness::rounds;
use crate::slot::{Slot, BLOCK, GPA, ID};
use crate::sys::{self, Touched};
use crate::task::Task;

tests! {
    "place-race-beside-writers-shmem" => || beside_writers(Backing::Shmem, 200),
    "place-race-beside-writers-hugetlb" => || beside_writers(Backing::Huge2M, 2 * BLOCK),
    "place-race-beside-absent-shmem" => || beside_absent(Backing::Shmem, 200),
    "place-race-beside-absent-hugetlb" => || beside_absent(Backing::Huge2M, BLOCK),
    "place-race-beside-poison-shmem" => || beside_poison(Backing::Shmem, 200),
    "place-race-beside-poison-hugetlb" => || beside_poison(Backing::Huge2M, BLOCK),
    "place-race-beside-zero-pages-shmem" => || beside_zero_pages(Backing::Shmem, 200),
    "place-race-beside-zero-pages-hugetlb" => || beside_zero_pages(Backing::Huge2M, 2 * BLOCK),
    "place-race-beside-removal-shmem" => || beside_removal(Backing::Shmem, 200),
    "place-race-beside-removal-hugetlb" => || beside_removal(Backing::Huge2M, BLOCK),
    "place-race-beside-claims-shmem" => || beside_claims(Backing::Shmem, 200),
    "place-race-beside-claims-hugetlb" => || beside_claims(Backing::Huge2M, 2 * BLOCK),
    "place-claim-given-up-beside-touches-shmem" => || claims_given_up(Backing::Shmem, 200),
    "place-claim-given-up-beside-touches-hugetlb" => || claims_given_up(Backing::Huge2M, BLOCK),
}

/// Every word of a version of a page.
pub(super) fn tag(page: u64, version: u64) -> u64 {
    (0xa5 << 56) | (page << 24) | version
}

/// All bytes of such pages.
pub(super) fn tagged(range: PageRange, version: u64) -> Vec<u8> {
    let word = |page| tag(page, version).to_le_bytes();
    range
        .iter()
        .flat_map(|page| word(page).repeat(WORDS))
        .collect()
}

/// The next of some numbers that look random.
pub(super) fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 11
}

/// Pages in batches, from the first to the last, or back.
pub(super) fn batches(pages: u64, length: u64, back: bool) -> Vec<PageRange> {
    let mut all: Vec<PageRange> = (0..pages)
        .step_by(length as usize)
        .map(|first| PageRange::new(first, length.min(pages - first)))
        .collect();
    if back {
        all.reverse();
    }
    all
}

/// Writes a word that is there from the first touch on, and reads it back.
pub(super) fn write(slot: &Slot, page: u64, at: usize, value: u64) -> Result {
    let address = slot.address(page).wrapping_add(at);
    // SAFETY: guest memory, which there are no references to.
    let stored = unsafe { sys::store(address, value) };
    ensure_eq!(stored, Touched::Value(0), "a write to page {page}");
    let read = sys::load(address);
    ensure_eq!(
        read,
        Touched::Value(value),
        "what was just written to page {page}"
    );
    Ok(())
}

/// A memslot, and who has given each of its pages their bytes: a version, or 0 for nobody.
pub(super) struct Race {
    pub(super) slot: Arc<Slot>,
    pub(super) pages: u64,
    won: Vec<AtomicU64>,
    stop: AtomicBool,
}

impl Race {
    pub(super) fn new(backing: Backing, pages: u64) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            slot: Slot::new(backing, pages)?,
            pages,
            won: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            stop: AtomicBool::new(false),
        }))
    }

    pub(super) fn all(&self) -> PageRange {
        PageRange::new(0, self.pages)
    }

    /// All pages are in this state, over memory that holds something else. Nobody is at them.
    pub(super) fn begin(&self, state: State) -> Result {
        self.stop.store(false, Ordering::Release);
        self.slot.mark_range(State::Absent, self.all())?;
        for page in 0..self.pages {
            self.slot.alias.write(page, &[0xee; 4096])?;
            self.won[page as usize].store(0, Ordering::Relaxed);
        }
        if state != State::Absent {
            self.slot.mark_range(state, self.all())?;
        }
        Ok(())
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Somebody was told that a page has this version. Nobody else may have been.
    fn win(&self, page: u64, version: u64) -> Result {
        let before = self.won[page as usize].swap(version, Ordering::Relaxed);
        ensure_eq!(before, 0, "who has placed page {page} before {version}");
        Ok(())
    }

    pub(super) fn won(&self, page: u64) -> u64 {
        self.won[page as usize].load(Ordering::Relaxed)
    }

    /// Places pages; how many it was.
    pub(super) fn place(&self, range: PageRange, version: u64) -> Result<u64> {
        let placed = self
            .slot
            .vm
            .place(ID, range.first, &tagged(range, version))?;
        let mut now = 0;
        for (page, placed) in range.iter().zip(placed) {
            if placed == Placed::Now {
                self.win(page, version)?;
                now += 1;
            }
        }
        Ok(now)
    }

    /// A thread that places all pages, in batches.
    pub(super) fn placer(
        self: &Arc<Self>,
        version: u64,
        length: u64,
        back: bool,
    ) -> Result<Task<u64>> {
        let race = self.clone();
        Task::work(move || {
            let mut sum = 0;
            for range in batches(race.pages, length, back) {
                sum += race.place(range, version)?;
            }
            Ok(sum)
        })
    }

    /// A thread that writes a word of every page.
    pub(super) fn writer(self: &Arc<Self>, at: usize, value: u64, back: bool) -> Result<Task<()>> {
        let race = self.clone();
        Task::work(move || {
            for range in batches(race.pages, 1, back) {
                write(&race.slot, range.first, at, value)?;
            }
            Ok(())
        })
    }

    /// Every page holds what whoever won it has placed, or zeros, and these words.
    pub(super) fn check(&self, written: impl Fn(u64, usize) -> Option<u64>) -> Result {
        for page in 0..self.pages {
            let version = self.won(page);
            let bytes = if version == 0 { 0 } else { tag(page, version) };
            for (at, word) in self.slot.words(page)?.into_iter().enumerate() {
                let expected = written(page, at).unwrap_or(bytes);
                ensure_eq!(word, expected, "word {at} of page {page}, won by {version}");
            }
        }
        Ok(())
    }

    pub(super) fn zero_filled(&self) -> Result<u64> {
        self.slot.counter("zero-filled")
    }
}

/// Placers of the same pages beside two threads and a vCPU that write them: each page is placed once, and no write is lost.
fn beside_writers(backing: Backing, pages: u64) -> Result {
    let race = Race::new(backing, pages)?;
    for round in 1..=rounds(6) {
        race.begin(State::Absent)?;
        let touch = Touch::new(GPA, Order::sequential(pages)).write(round);
        let machine = race.slot.machine()?;
        let mut vcpu = machine.vcpu(0, &touch.program())?;
        let vcpu = Task::work(move || guest::run(&mut vcpu, guest::no_fault))?;
        let writers = [race.writer(1, round, false)?, race.writer(2, round, true)?];
        let placers = [
            race.placer(10 * round, 1, true)?,
            race.placer(10 * round + 1, 7, false)?,
            race.placer(10 * round + 2, 64, true)?,
        ];
        let mut placed = 0;
        for placer in placers {
            placed += placer.join("a placer")?;
        }
        ensure_eq!(placed, pages, "pages placed in round {round}");
        for writer in writers {
            writer.join("a writer")?;
        }
        vcpu.join("the vCPU")?;
        race.check(|page, at| match at {
            0 => touch.written(page),
            1 | 2 => Some(round),
            _ => None,
        })?;
    }
    Ok(())
}

/// Whether a word that was read in a page can be.
fn is_of(word: u64, page: u64, most: u64) -> bool {
    word >> 24 == tag(page, 0) >> 24 && (1..=most).contains(&(word & 0xff_ffff))
}

/// Placers beside a thread that makes pages absent: what was placed and not made absent again is there, each page whole, of
/// one placer; and a reader never sees what the memory held before.
fn beside_absent(backing: Backing, pages: u64) -> Result {
    let race = Race::new(backing, pages)?;
    // A pass is as many calls as there are pages.
    let passes = rounds(60 * 200 / pages);
    race.begin(State::Absent)?;
    let next = Arc::new(AtomicU64::new(1));
    let placer = |length: u64, back: bool| {
        let (race, next) = (race.clone(), next.clone());
        Task::work(move || -> Result<u64> {
            let mut sum = 0;
            for _ in 0..passes {
                let version = next.fetch_add(1, Ordering::Relaxed);
                for range in batches(race.pages, length, back) {
                    let placed = race
                        .slot
                        .vm
                        .place(ID, range.first, &tagged(range, version))?;
                    sum += placed
                        .iter()
                        .filter(|&&placed| placed == Placed::Now)
                        .count() as u64;
                }
            }
            Ok(sum)
        })
    };
    let taking = race.clone();
    let taker = Task::work(move || -> Result<u64> {
        let (mut state, mut sum) = (1, 0);
        while !taking.stopped() {
            let first = random(&mut state) % taking.pages;
            let count = (1 + random(&mut state) % 16).min(taking.pages - first);
            sum += taking
                .slot
                .mark_range(State::Absent, PageRange::new(first, count))?
                .changed;
        }
        Ok(sum)
    })?;
    let reading = race.clone();
    let reader = Task::work(move || -> Result<u64> {
        let (mut state, mut looks) = (2, 0);
        while !reading.stopped() {
            let page = random(&mut state) % reading.pages;
            let at = random(&mut state) as usize % WORDS;
            match sys::load(reading.slot.address(page).wrapping_add(at)) {
                Touched::Value(word) if is_of(word, page, 3 * passes) => looks += 1,
                other => fail!("word {at} of page {page}: {other:x?}"),
            }
        }
        Ok(looks)
    })?;
    let placers = [placer(1, true)?, placer(9, false)?];
    let mut placed = 0;
    for placer in placers {
        placed += placer.join("a placer")?;
    }
    race.stop();
    let taken = taker.join("the thread that makes pages absent")?;
    let left = race.slot.memslot.bitmap()?.count();
    ensure_eq!(
        placed - taken,
        left,
        "pages left of {placed} placed and {taken} taken"
    );
    // The reader may wait for one that is absent.
    race.slot.vm.place(ID, 0, &tagged(race.all(), 3 * passes))?;
    let looks = reader.join("the reader")?;
    ensure!(placed > pages && taken > 0 && looks > 0, "they never met");
    for page in 0..pages {
        let words = race.slot.words(page)?;
        ensure!(
            is_of(words[0], page, 3 * passes) && words == [words[0]; WORDS],
            "page {page} is of several placers"
        );
    }
    Ok(())
}

/// Placers beside a thread that poisons pages and heals them: a poisoned page is not placed, and each page is placed once.
fn beside_poison(backing: Backing, pages: u64) -> Result {
    let race = Race::new(backing, pages)?;
    for round in 1..=rounds(4) {
        race.begin(State::Absent)?;
        let poisoning = race.clone();
        let poisoner = Task::work(move || -> Result<u64> {
            let (mut state, mut times) = (round, 0);
            while !poisoning.stopped() {
                let first = random(&mut state) % poisoning.pages;
                let count = (1 + random(&mut state) % 16).min(poisoning.pages - first);
                let range = [PageRange::new(first, count)];
                times += poisoning
                    .slot
                    .vm
                    .poison(ID, &range, Cause::Emulated)?
                    .changed;
                std::thread::yield_now();
                poisoning.slot.vm.heal(ID, &range)?;
            }
            Ok(times)
        })?;
        let reading = race.clone();
        let reader = Task::work(move || -> Result {
            let mut state = 3;
            while !reading.stopped() {
                let page = random(&mut state) % reading.pages;
                let at = reading.slot.address(page);
                let touched = sys::load(at);
                let is_lost = touched == Touched::sigbus(libc::BUS_MCEERR_AR, at, 12);
                match touched {
                    _ if is_lost => (),
                    Touched::Value(word) if is_of(word, page, 1 << 20) => (),
                    other => fail!("page {page}: {other:x?}"),
                }
            }
            Ok(())
        })?;
        let placers = [
            race.placer(10 * round, 1, true)?,
            race.placer(10 * round + 1, 5, false)?,
            race.placer(10 * round + 2, 33, true)?,
        ];
        let mut placed = 0;
        for placer in placers {
            placed += placer.join("a placer")?;
        }
        race.stop();
        ensure!(poisoner.join("the poisoner")? > 0, "no page was poisoned");
        placed += race.place(race.all(), 10 * round + 3)?;
        ensure_eq!(placed, pages, "pages placed in round {round}");
        reader.join("the reader")?;
        race.check(|_, _| None)?;
    }
    Ok(())
}

/// Placers beside threads that touch zero pages: a page is placed or filled with zeros, once, and no write is lost.
fn beside_zero_pages(backing: Backing, pages: u64) -> Result {
    let race = Race::new(backing, pages)?;
    for round in 1..=rounds(6) {
        race.begin(State::Zero)?;
        let before = race.zero_filled()?;
        let writers = [
            race.writer(1, round, false)?,
            race.writer(511, round, true)?,
        ];
        let placers = [
            race.placer(10 * round, 1, true)?,
            race.placer(10 * round + 1, 16, false)?,
        ];
        let mut placed = 0;
        for placer in placers {
            placed += placer.join("a placer")?;
        }
        for writer in writers {
            writer.join("a writer")?;
        }
        let filled = race.zero_filled()? - before;
        ensure_eq!(
            placed + filled,
            pages,
            "{placed} pages placed and {filled} filled"
        );
        race.check(|_, at| (at == 1 || at == 511).then_some(round))?;
    }
    ensure_eq!(race.slot.counter("waits")?, 0, "waits");
    race.slot.no_event()
}

/// Placers of a memslot that is removed: each is told so, and none hangs.
fn beside_removal(backing: Backing, pages: u64) -> Result {
    for round in 1..=rounds(8) {
        let race = Race::new(backing, pages)?;
        let placers: Vec<_> = (0..2)
            .map(|number| {
                let race = race.clone();
                Task::work(move || -> Result {
                    loop {
                        for range in batches(race.pages, 1 + number, number == 0) {
                            match race.slot.vm.place(ID, range.first, &tagged(range, 1)) {
                                Ok(_) => (),
                                Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(()),
                                Err(e) => fail!("a place beside the removal: {e}"),
                            }
                        }
                    }
                })
            })
            .collect::<Result<_>>()?;
        let claimant = race.slot.vm.claimant(ID)?;
        std::thread::sleep(std::time::Duration::from_micros(500 * round));
        claimant.claim(PageRange::new(pages / 2, 9))?;
        race.slot.vm.remove_memslot(ID)?;
        for placer in placers {
            placer.join("a placer")?;
        }
        let gone = claimant.commit(PageRange::new(pages / 2, 9))?;
        ensure_eq!(gone, [Claimed::Void; 9], "what became of claimed pages");
    }
    Ok(())
}

/// Claims pages, in batches, fills them through the alias mapping and commits them; every fifth batch it gives up half
/// done. How many it has committed.
fn claim_all(race: &Race, version: u64, length: u64, back: bool) -> Result<u64> {
    let claimant = race.slot.vm.claimant(ID)?;
    let mut sum = 0;
    for (number, range) in batches(race.pages, length, back).into_iter().enumerate() {
        let claimed = claimant.claim(range)?;
        let mine = range
            .iter()
            .zip(&claimed)
            .filter(|(_, claimed)| **claimed == Claimed::Done);
        let mine: Vec<u64> = mine.map(|(page, _)| page).collect();
        let gives_up = number % 5 == 4;
        for &page in &mine {
            let bytes = if gives_up {
                vec![0xdd; 4096]
            } else {
                tagged(PageRange::page(page), version)
            };
            race.slot.alias.write(page, &bytes)?;
        }
        let ended = if gives_up {
            claimant.abandon(range)?
        } else {
            claimant.commit(range)?
        };
        for (page, ended) in range.iter().zip(ended) {
            let expected = if mine.contains(&page) {
                Claimed::Done
            } else {
                Claimed::Void
            };
            ensure_eq!(ended, expected, "the end of the claim on page {page}");
            if expected == Claimed::Done && !gives_up {
                race.win(page, version)?;
                sum += 1;
            }
        }
    }
    Ok(sum)
}

/// Two claimants beside a placer, a thread that marks what is absent zero or present, and threads that write: each page has
/// the bytes of one, or zeros, whole, and no write is lost.
fn beside_claims(backing: Backing, pages: u64) -> Result {
    let race = Race::new(backing, pages)?;
    for round in 1..=rounds(6) {
        race.begin(if round % 2 == 0 {
            State::Zero
        } else {
            State::Absent
        })?;
        let before = race.zero_filled()?;
        let claimant = |version: u64, length: u64, back: bool| {
            let race = race.clone();
            Task::work(move || claim_all(&race, version, length, back))
        };
        let marking = race.clone();
        let marker = Task::work(move || -> Result {
            let mut state = round;
            while !marking.stopped() {
                marking
                    .slot
                    .mark(State::Zero, random(&mut state) % marking.pages)?;
            }
            Ok(())
        })?;
        let tasks = [
            claimant(10 * round, 3, false)?,
            claimant(10 * round + 1, 70, true)?,
            race.placer(10 * round + 2, 2, true)?,
        ];
        let writers = [race.writer(1, round, false)?, race.writer(2, round, true)?];
        let mut placed = 0;
        for task in tasks {
            placed += task.join("a placer or claimant")?;
        }
        // What was given up last.
        placed += race.place(race.all(), 10 * round + 3)?;
        for writer in writers {
            writer.join("a writer")?;
        }
        race.stop();
        marker.join("the thread that marks")?;
        let filled = race.zero_filled()? - before;
        ensure_eq!(
            placed + filled,
            pages,
            "{placed} pages placed and {filled} filled"
        );
        race.check(|_, at| (at == 1 || at == 2).then_some(round))?;
    }
    Ok(())
}

/// Zero pages that are claimed and given up, by a call or by closing the claimant, while threads touch them: each goes on,
/// to zeros, whatever the claimant has written there.
fn claims_given_up(backing: Backing, pages: u64) -> Result {
    let race = Race::new(backing, pages)?;
    for round in 1..=rounds(4) {
        race.begin(State::Zero)?;
        let before = race.zero_filled()?;
        let claiming = race.clone();
        let claimant = Task::work(move || -> Result<u64> {
            let (mut state, mut sum) = (round, 0);
            while !claiming.stopped() {
                let claimant = claiming.slot.vm.claimant(ID)?;
                for close in [false, false, true] {
                    let first = random(&mut state) % claiming.pages;
                    let range = PageRange::new(first, 100.min(claiming.pages - first));
                    for (page, claimed) in range.iter().zip(claimant.claim(range)?) {
                        if claimed == Claimed::Done {
                            claiming.slot.alias.write(page, &[0xdd; 4096])?;
                            sum += 1;
                        }
                    }
                    if !close {
                        claimant.abandon(range)?;
                    }
                }
            }
            Ok(sum)
        })?;
        let writers = [race.writer(1, round, false)?, race.writer(2, round, true)?];
        for writer in writers {
            writer.join("a writer")?;
        }
        race.stop();
        ensure!(claimant.join("the claimant")? > 0, "nothing was claimed");
        ensure_eq!(race.zero_filled()? - before, pages, "pages filled");
        race.check(|_, at| (at == 1 || at == 2).then_some(round))?;
    }
    Ok(())
}
