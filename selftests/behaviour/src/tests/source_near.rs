// SPDX-License-Identifier: GPL-2.0

//! Neighbours that a fault fills from a file together with its page: on hugetlb, where memory is there already.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use kvm_demand_paging::{Backing, Cause, Memfd, PageRange, State};

use super::poison::lost;
use super::source::sourced;
use crate::check::Result;
use crate::content;
use crate::harness::rounds;
use crate::slot::{self, Slot, BLOCK, ID, PAGE, WINDOW};
use crate::sys;
use crate::task::Task;

tests! {
    "source-neighbours-of-dense-touches" => of_dense_touches,
    "source-neighbours-not-of-sparse-touches" => not_of_sparse_touches,
    "source-neighbours-left-alone" => left_alone,
    "source-neighbours-outside-the-mapping" => outside_the_mapping,
    "source-neighbours-placed-once" => placed_once,
    "source-neighbours-beside-changes" => beside_changes,
}

/// Pages whose bits are in one word of the bitmap.
const WORD: u64 = 64;

/// Touches all over a block: each brings a few more, the more of them are there, and the bytes are right.
fn of_dense_touches() -> Result {
    let pages = 2 * BLOCK;
    let (slot, _file) = sourced(Backing::Huge2M, pages)?;
    let bitmap = slot.memslot.bitmap()?;
    for i in 0..pages {
        let page = (i * 389) % pages;
        let word = page / WORD * WORD;
        let before = (word..word + WORD)
            .filter(|&page| bitmap.is_present(page))
            .count() as u64;
        let ahead = slot.counter("source-ahead")?;
        let was_present = bitmap.is_present(page);
        slot.check(page, 1)?;
        let unasked = slot.counter("source-ahead")? - ahead;
        let most = if was_present {
            0
        } else {
            WINDOW.min((before + 1) / 2).max(1) - 1
        };
        ensure!(
            unasked <= most,
            "{unasked} neighbours of page {page} filled where {before} were present"
        );
    }
    let (reads, ahead) = (slot.counter("source-reads")?, slot.counter("source-ahead")?);
    ensure_eq!(reads + ahead, pages, "pages read");
    ensure!(
        ahead > pages / 2 && ahead <= 5 * reads,
        "{ahead} neighbours filled by {reads} touches"
    );
    // They are mapped by the fault that fills them. Some of the others are for blocks, which became whole.
    let faults = slot.counter("faults")?;
    ensure!(faults <= reads + WINDOW, "{faults} faults, {reads} reads");
    for page in 0..pages {
        slot.check(page, 1)?;
    }
    slot.no_event()
}

/// Up to three touches of 256 KiB fill nothing unasked.
fn not_of_sparse_touches() -> Result {
    let pages = 4 * BLOCK;
    let (slot, _file) = sourced(Backing::Huge2M, pages)?;
    let words = pages / WORD;
    let mut touched = 0;
    for at in [5, 60, 31] {
        for i in 0..words {
            slot.check((i * 13) % words * WORD + at, 1)?;
            touched += 1;
        }
        ensure_eq!(slot.counter("source-ahead")?, 0, "neighbours filled");
    }
    ensure_eq!(slot.counter("source-reads")?, touched, "pages read");
    ensure_eq!(slot.memslot.bitmap()?.count(), touched, "pages present");
    Ok(())
}

/// Neighbours that are not the source's to fill, or not without waiting.
fn left_alone() -> Result {
    const NO_SOURCE: u64 = 17;
    const POISONED: u64 = 18;
    const PRESENT: u64 = 19;
    const ZERO: u64 = 20;
    const ABSENT: u64 = 21;
    const NOT_CACHED: u64 = 22;
    const ALONE: [u64; 6] = [NO_SOURCE, POISONED, PRESENT, ZERO, ABSENT, NOT_CACHED];
    let pages = BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    let file = Memfd::create("source", Backing::Shmem, pages * PAGE)?;
    let alias = file.map_all()?;
    for page in (0..pages).filter(|&page| page != NOT_CACHED) {
        alias.write(page, &content::bytes(page, 1))?;
    }
    drop(alias);
    let ranges = [
        PageRange::new(0, NO_SOURCE),
        PageRange::new(NO_SOURCE + 1, pages - NO_SOURCE - 1),
    ];
    slot.vm.set_source(ID, &file, 0, Some(&ranges))?;
    for page in ALONE {
        slot.fill(page, 2)?;
    }
    slot.vm
        .poison(ID, &[PageRange::page(POISONED)], Cause::Emulated)?;
    slot.mark(State::Present, PRESENT)?;
    slot.mark(State::Zero, ZERO)?;
    slot.mark(State::Absent, ABSENT)?;
    for page in 32..64 {
        slot.place(page, 1)?;
    }
    slot.check(24, 1)?;
    ensure_eq!(
        slot.counter("source-ahead")?,
        WINDOW - 1 - ALONE.len() as u64,
        "neighbours filled"
    );
    let bitmap = slot.memslot.bitmap()?;
    for page in 0..32 {
        let is_near = (16..32).contains(&page) && (page == PRESENT || !ALONE.contains(&page));
        ensure_eq!(bitmap.is_present(page), is_near, "page {page}: present");
    }
    for page in ALONE {
        let bytes = slot::words_at(
            slot.alias
                .as_ptr()
                .wrapping_add((page * PAGE) as usize)
                .cast(),
        )?;
        if let Err(wrong) = content::check(&bytes, page, 2) {
            fail!("its memory was written to: {wrong}");
        }
    }
    let faults = slot.counter("faults")?;
    for page in (16..32).filter(|page| !ALONE.contains(page)) {
        slot.check(page, 1)?;
    }
    slot.check(PRESENT, 2)?;
    ensure_eq!(slot.counter("faults")?, faults, "faults of neighbours");
    for page in [ZERO, NOT_CACHED] {
        ensure!(
            slot.words(page)?.iter().all(|&word| word == 0),
            "page {page} is not zeros"
        );
    }
    let at = slot.address(POISONED);
    ensure_eq!(sys::load(at), lost(at), "a touch of the poisoned page");
    for page in [NO_SOURCE, ABSENT] {
        let waiting = slot.checker(page, 3)?;
        ensure_eq!(slot.event()?.page, page, "the event's page");
        slot.place(page, 3)?;
        waiting.join("who waits")?;
    }
    Ok(())
}

/// Somebody has mapped a few pages: what lies around them is filled, and mapped by nobody.
fn outside_the_mapping() -> Result {
    let (slot, _file) = sourced(Backing::Huge2M, BLOCK)?;
    for page in 32..64 {
        slot.place(page, 1)?;
    }
    let part = slot.memslot.map_range(PageRange::new(20, 3))?;
    let words = slot::words_at(part.as_ptr().wrapping_add(PAGE as usize).cast())?;
    ensure!(content::check(&words, 21, 1).is_ok(), "page 21 is wrong");
    ensure_eq!(
        slot.counter("source-ahead")?,
        WINDOW - 1,
        "neighbours filled"
    );
    drop(part);
    for page in 0..BLOCK {
        slot.check(page, 1)?;
    }
    Ok(())
}

/// Threads touch the same few pages at once, each begins with another one, and adds one to a word of every page:
/// invariant 2. Were a neighbour filled after somebody else has filled it, what was added by then would be lost.
fn placed_once() -> Result {
    const THREADS: u64 = 4;
    for _ in 0..rounds(8) {
        let (slot, _file) = sourced(Backing::Huge2M, BLOCK)?;
        let dense = (0..BLOCK).filter(|page| page % WORD < WORD / 2);
        for page in dense.clone() {
            slot.place(page, 1)?;
        }
        let start = Arc::new(Barrier::new(THREADS as usize));
        let mut threads = vec![];
        for thread in 0..THREADS {
            let (slot, start) = (slot.clone(), start.clone());
            threads.push(Task::work(move || -> Result {
                for group in (0..BLOCK / WINDOW).filter(|group| group * WINDOW % WORD >= WORD / 2) {
                    start.wait();
                    for i in 0..WINDOW {
                        let at = (i * 5 + thread * WINDOW / THREADS) % WINDOW;
                        // SAFETY: the mapping lives as long as the slot, and all accesses to it are atomic.
                        let word =
                            unsafe { AtomicU64::from_ptr(slot.address(group * WINDOW + at)) };
                        word.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(())
            })?);
        }
        for thread in threads {
            thread.join("a thread that adds")?;
        }
        for page in (0..BLOCK).filter(|page| page % WORD >= WORD / 2) {
            ensure_eq!(
                slot.words(page)?[0],
                content::word(page, 1, 0).wrapping_add(THREADS),
                "page {page}: the word that all added to"
            );
        }
        let read = slot.counter("source-reads")? + slot.counter("source-ahead")?;
        ensure_eq!(read, BLOCK - dense.count() as u64, "pages read");
    }
    Ok(())
}

/// Threads touch pages all over while others make pages absent, place them anew or give them back to the source: what
/// was placed is never written over by what the file has.
fn beside_changes() -> Result {
    let pages = BLOCK;
    let (slot, _file) = sourced(Backing::Huge2M, pages)?;
    let done = Arc::new(AtomicBool::new(false));
    let mut tasks = vec![];
    for thread in 0..2_u64 {
        let (slot, done) = (slot.clone(), done.clone());
        tasks.push(Task::work(move || -> Result {
            let mut i = 0;
            while !done.load(Ordering::Relaxed) {
                let page = (i * 389 + thread * 201) % pages;
                let words = slot.words(page)?;
                for (at, &word) in words.iter().enumerate().skip(1) {
                    ensure!(
                        word == content::word(page, 1, at) || word == content::word(page, 2, at),
                        "page {page}: word {at} is of neither version: {word:#x}"
                    );
                }
                i += 1;
            }
            Ok(())
        })?);
    }
    // Each has every other page, so that each one's are the other one's neighbours.
    let changers = [0, 1].map(|parity| {
        let slot = slot.clone();
        Task::work(move || {
            let mut owned = Owned {
                slot,
                pages: vec![(1, 0); pages as usize],
            };
            (0..rounds(800)).try_for_each(|i| owned.change((i * 77 % (pages / 2)) * 2 + parity, i))
        })
    });
    for changer in changers {
        changer?.join_long("a thread that changes states")?;
    }
    done.store(true, Ordering::Relaxed);
    for task in tasks {
        task.join("a reader")?;
    }
    ensure!(slot.counter("source-ahead")? > 0, "no neighbour was filled");
    Ok(())
}

/// Pages that one thread alone changes.
struct Owned {
    slot: Arc<Slot>,
    /// The version of each, and what was added to its first word.
    pages: Vec<(u64, u64)>,
}

impl Owned {
    /// Changes a page, after a look at what came of the last change.
    fn change(&mut self, page: u64, round: u64) -> Result {
        let Self { slot, pages } = self;
        let (version, added) = &mut pages[page as usize];
        // SAFETY: the mapping lives as long as the slot, and all accesses to it are atomic.
        let word = unsafe { AtomicU64::from_ptr(slot.address(page)) };
        ensure_eq!(
            word.fetch_add(1, Ordering::Relaxed),
            content::word(page, *version, 0).wrapping_add(*added),
            "page {page}, version {version}: the word that {added} was added to"
        );
        *added += 1;
        if round % 3 == 0 {
            return Ok(());
        }
        *added = 0;
        slot.mark(State::Absent, page)?;
        slot.fill(page, 2)?;
        if round % 3 == 1 {
            *version = 2;
            slot.mark(State::Present, page)?;
        } else {
            *version = 1;
            slot.vm.add_source_ranges(ID, &[PageRange::page(page)])?;
        }
        Ok(())
    }
}
