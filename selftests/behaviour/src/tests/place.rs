// SPDX-License-Identifier: GPL-2.0

//! A page is placed once, however many try.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use kvm_demand_paging::{Backing, PageRange, Paging, State};

use crate::check::Result;
use crate::harness::rounds;
use crate::slot::{Slot, BACKINGS, BLOCK, ID};
use crate::sys::{self, Touched};
use crate::task::{Task, PATIENCE};

tests! {
    "place-two-calls-race" => || race(State::Present, State::Present),
    "place-call-and-bit-race" => call_and_bit_race,
    "place-two-zero-calls-race" => || race(State::Zero, State::Zero),
    "place-two-absent-calls-race" => || race(State::Absent, State::Absent),
    "place-zero-filled-once-shmem" => || zero_filled_once(Backing::Shmem),
    "place-zero-filled-once-hugetlb" => || zero_filled_once(Backing::Huge2M),
    "place-zero-is-not-the-memfds-garbage" => zero_is_not_the_memfds_garbage,
    "place-zero-pages-when-paging-goes-off" => zero_pages_when_paging_goes_off,
    "place-never-over-what-was-written" => never_over_what_was_written,
}

/// Invariant 2, a page is placed at most once: two threads change the same pages at the same time, in
/// ranges that overlap. Each page is counted as changed by one of them.
fn race(one: State, other: State) -> Result {
    const PAGES: u64 = 300;
    let slot = Slot::new(Backing::Shmem, PAGES)?;
    let barrier = Arc::new(Barrier::new(2));
    let rounds = rounds(400);
    let worker = |to: State, down: bool| {
        let (slot, barrier) = (slot.clone(), barrier.clone());
        Task::work(move || -> Result<Vec<u64>> {
            let mut changed = Vec::new();
            for round in 0..rounds {
                if !down {
                    // One prepares: all pages are in a state that both can change.
                    let from = if to == State::Absent {
                        State::Present
                    } else {
                        State::Absent
                    };
                    slot.mark_range(from, PageRange::new(0, PAGES))?;
                }
                barrier.wait();
                // Ranges of odd lengths, from both ends.
                let len = 1 + (round * 7 + u64::from(down) * 3) % 70;
                let mut sum = 0;
                let starts: Vec<u64> = (0..PAGES.div_ceil(len)).map(|i| i * len).collect();
                let ordered: Box<dyn Iterator<Item = &u64>> = if down {
                    Box::new(starts.iter().rev())
                } else {
                    Box::new(starts.iter())
                };
                for &start in ordered {
                    let count = len.min(PAGES - start);
                    sum += slot.mark_range(to, PageRange::new(start, count))?.changed;
                }
                changed.push(sum);
                barrier.wait();
            }
            Ok(changed)
        })
    };
    let (a, b) = (worker(one, false)?, worker(other, true)?);
    let (a, b) = (a.join("a worker")?, b.join("a worker")?);
    for (round, (a, b)) in a.iter().zip(&b).enumerate() {
        ensure_eq!(
            a + b,
            PAGES,
            "pages that both changed, {a} and {b}, in round {round}"
        );
    }
    let shared = a.iter().zip(&b).filter(|(a, b)| **a > 0 && **b > 0).count();
    ensure!(shared > 0, "the two never met");
    Ok(())
}

/// Invariant 2, a page is placed at most once: one thread sets the bits of a word one by one, while another
/// one places the same pages by a call. Each page is placed by one of them, and both are told by whom.
fn call_and_bit_race() -> Result {
    const FIRST: u64 = 128;
    const PAGES: u64 = 64;
    const DONE: u64 = u64::MAX;
    let range = PageRange::new(FIRST, PAGES);
    let slot = Slot::new(Backing::Shmem, 300)?;
    // The round that may begin; the one that has ended, and what was placed in it.
    let (begin, ended, placed) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicU64::new(0)),
    );
    // How long the setter waits before it sets: the call has a way to go, of a length that no one knows.
    let delay = Arc::new(AtomicU64::new(1000));
    let (setting, may_begin, has_ended, has_placed, delayed) = (
        slot.clone(),
        begin.clone(),
        ended.clone(),
        placed.clone(),
        delay.clone(),
    );
    let setter = Task::work(move || -> Result {
        let present = setting.memslot.bitmap()?;
        for round in 1.. {
            if spin_until(&may_begin, round) == DONE {
                break;
            }
            for step in 0..delayed.load(Ordering::Relaxed) {
                black_box(step);
            }
            let mine = range.iter().filter(|&page| present.set(page)).count();
            has_placed.store(mine as u64, Ordering::Relaxed);
            has_ended.store(round, Ordering::Release);
        }
        Ok(())
    })?;
    let mut both = 0;
    let deadline = Instant::now() + PATIENCE;
    for round in 1.. {
        // However slow the call is, the two must meet.
        if round > rounds(2000) && (both > 0 || Instant::now() > deadline) {
            break;
        }
        begin.store(round, Ordering::Release);
        let called = slot.mark_range(State::Present, range)?.changed;
        spin_until(&ended, round);
        let set = placed.load(Ordering::Relaxed);
        ensure_eq!(
            set + called,
            PAGES,
            "pages placed by bits, {set}, and by calls, {called}, in round {round}"
        );
        both += u64::from(set > 0 && called > 0);
        let late = delay.load(Ordering::Relaxed);
        let step = late / 16 + 1;
        // Who has placed all of them came too early.
        match (set, called) {
            (0, _) => delay.store(late.saturating_sub(step), Ordering::Relaxed),
            (_, 0) => delay.store(late + step, Ordering::Relaxed),
            _ => {}
        }
        ensure_eq!(
            slot.mark_range(State::Absent, range)?.changed,
            PAGES,
            "pages changed"
        );
    }
    begin.store(DONE, Ordering::Release);
    setter.join("the thread that sets bits")?;
    ensure!(both > 0, "the two never met");
    Ok(())
}

/// Waits for the number, or a higher one, awake as long as that is likely to be short.
fn spin_until(number: &AtomicU64, least: u64) -> u64 {
    let mut looks = 0_u32;
    loop {
        let now = number.load(Ordering::Acquire);
        if now >= least {
            return now;
        }
        looks += 1;
        if looks > 20_000 {
            std::thread::yield_now();
        }
    }
}

/// Invariants 1 and 2: N threads touch a page in the state zero at the same time, while another one keeps
/// marking it zero. It is filled once: what a thread writes after its first touch stays, and the rest of
/// the page is zeros, not the garbage that the memfd holds.
fn zero_filled_once(backing: Backing) -> Result {
    const THREADS: usize = 3;
    const PAGE_NR: u64 = 7;
    let slot = Slot::new(backing, 64_u64.next_multiple_of(BLOCK))?;
    let barrier = Arc::new(Barrier::new(THREADS + 1));
    let rounds = rounds(250);
    let stop = Arc::new(AtomicBool::new(false));
    let marking = Arc::new(AtomicU64::new(0));
    let mut threads = Vec::new();
    for thread in 0..THREADS {
        let (slot, barrier) = (slot.clone(), barrier.clone());
        threads.push(Task::work(move || -> Result {
            let mine = slot.address(PAGE_NR).wrapping_add(100 * thread);
            for round in 1..=rounds {
                barrier.wait();
                let first = sys::load(mine);
                ensure_eq!(
                    first,
                    Touched::Value(0),
                    "a zero page's first read, round {round}"
                );
                // SAFETY: guest memory, which there are no references to.
                let stored = unsafe { sys::store(mine, round) };
                ensure_eq!(stored, Touched::Value(0), "a write, round {round}");
                barrier.wait();
                ensure_eq!(
                    sys::load(mine),
                    Touched::Value(round),
                    "what thread {thread} has written, round {round}"
                );
                barrier.wait();
            }
            Ok(())
        })?);
    }
    let (hammering, stopped, marks) = (slot.clone(), stop.clone(), marking.clone());
    let hammer = Task::work(move || -> Result {
        while !stopped.load(Ordering::Acquire) {
            hammering.mark(State::Zero, PAGE_NR)?;
            marks.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    })?;
    for round in 1..=rounds {
        // The hammer may make it zero, and a thread that is early may fill it: none is early.
        slot.mark(State::Absent, PAGE_NR)?;
        slot.fill(PAGE_NR, round)?;
        slot.mark(State::Zero, PAGE_NR)?;
        barrier.wait();
        barrier.wait();
        let words = slot.words(PAGE_NR)?;
        for (at, word) in words.iter().enumerate() {
            let expected = if at % 100 == 0 && at / 100 < THREADS {
                round
            } else {
                0
            };
            ensure_eq!(*word, expected, "word {at} in round {round}");
        }
        barrier.wait();
    }
    stop.store(true, Ordering::Release);
    hammer.join("the thread that marks")?;
    for thread in threads {
        thread.join("a thread")?;
    }
    ensure_eq!(
        slot.counter("zero-filled")?,
        rounds,
        "times that the page was filled"
    );
    ensure_eq!(slot.counter("waits")?, 0, "waits");
    ensure!(
        marking.load(Ordering::Relaxed) > rounds,
        "the page was hardly marked zero"
    );
    Ok(())
}

/// Invariant 1, for the zero state: a page that holds garbage in the memfd and is marked zero shows not one
/// byte of it, to threads that touch it at the same moment, however they come.
fn zero_is_not_the_memfds_garbage() -> Result {
    const THREADS: usize = 2;
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let barrier = Arc::new(Barrier::new(THREADS));
        for round in 0..rounds(6) {
            let range = PageRange::new(0, pages);
            slot.mark_range(State::Absent, range)?;
            for page in 0..pages {
                slot.fill(page, round)?;
            }
            slot.mark_range(State::Zero, range)?;
            let mut threads = Vec::new();
            for thread in 0..THREADS {
                let (slot, barrier) = (slot.clone(), barrier.clone());
                threads.push(Task::work(move || -> Result {
                    for page in 0..pages {
                        barrier.wait();
                        // The last words first, so that one thread is ahead of a slow filler.
                        for at in [511, 256 + thread, 3] {
                            let got = sys::load(slot.address(page).wrapping_add(at));
                            ensure_eq!(got, Touched::Value(0), "word {at} of page {page}");
                        }
                    }
                    Ok(())
                })?);
            }
            for thread in threads {
                thread.join("a thread")?;
            }
        }
    }
    Ok(())
}

/// Pages that are in the state zero read as zeros when paging is switched off, or every page made present,
/// whatever the memfd holds there; the others show the memfd.
fn zero_pages_when_paging_goes_off() -> Result {
    for (backing, pages) in BACKINGS {
        for mode in [Paging::Off, Paging::OnPresent] {
            let slot = Slot::new(backing, pages)?;
            for page in 0..pages {
                slot.fill(page, 4)?;
            }
            for page in [0, 9, pages - 1] {
                slot.mark(State::Zero, page)?;
            }
            // One has been filled already, and written to.
            // SAFETY: guest memory, which there are no references to.
            let stored = unsafe { sys::store(slot.address(9), 44) };
            ensure_eq!(stored, Touched::Value(0), "a write");
            slot.vm.set_paging(ID, mode)?;
            for page in [0, pages - 1] {
                ensure_eq!(slot.words(page)?, [0; 512], "page {page} after {mode:?}");
            }
            ensure_eq!(slot.words(9)?[..2], [44, 0], "page 9 after {mode:?}");
            slot.check(1, 4)?;
        }
    }
    Ok(())
}

/// Invariant 2: what the guest has written to a page is not touched by anybody who places it once more, in
/// whatever way, until it is made absent.
fn never_over_what_was_written() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let present = slot.memslot.bitmap()?;
        let page = pages - 1;
        let write = |value: u64| -> Result {
            // SAFETY: guest memory, which there are no references to.
            let stored = unsafe { sys::store(slot.address(page).wrapping_add(9), value) };
            ensure_eq!(stored, Touched::Value(0), "a write");
            Ok(())
        };
        slot.mark(State::Zero, page)?;
        write(1)?;
        for (to, value) in [(State::Zero, 2), (State::Present, 3), (State::Zero, 4)] {
            ensure_eq!(slot.mark(to, page)?, 0, "pages changed by {to:?}");
            ensure!(
                !present.set(page),
                "the bit of a page that is present was not set"
            );
            ensure_eq!(slot.words(page)?[9], value - 1, "the word after {to:?}");
            write(value)?;
        }
        ensure_eq!(
            slot.counter("zero-filled")?,
            1,
            "times that the page was filled"
        );
    }
    Ok(())
}
