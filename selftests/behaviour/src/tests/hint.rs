// SPDX-License-Identifier: GPL-2.0

//! Free-page hints: pages that are known to hold nothing, where a guest arrives and while it runs.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use kdp_vmm::{MemoryFault, Order, Touch};
use kvm_demand_paging::{Backing, FaultExit, PageRange, Paging, Placed, Reason, State};

use super::place_race::{batches, random, tag, tagged, write, Race};
use crate::check::Result;
use crate::content::WORDS;
use crate::guest;
use crate::harness::rounds;
use crate::slot::{Slot, BLOCK, GPA, ID, PAGE};
use crate::sys::{self, Touched};
use crate::task::{Task, PATIENCE};

tests! {
    "hint-touched-is-zeros-at-once-shmem" => || zeros_at_once(Backing::Shmem, 128),
    "hint-touched-is-zeros-at-once-hugetlb" => || zeros_at_once(Backing::Huge2M, BLOCK),
    "hint-place-beside-touches-shmem" => || place_beside_touches(Backing::Shmem, 256),
    "hint-place-beside-touches-hugetlb" => || place_beside_touches(Backing::Huge2M, 2 * BLOCK),
    "hint-reported-memory-goes-back-shmem" => || memory_goes_back(Backing::Shmem, 64, 1),
    "hint-reported-memory-goes-back-hugetlb" => || memory_goes_back(Backing::Huge2M, 2 * BLOCK, BLOCK),
    "hint-reported-part-of-a-huge-page" => part_of_a_huge_page,
    "hint-reported-beside-touches-shmem" => || reported_beside_touches(Backing::Shmem, 64, 1),
    "hint-reported-beside-touches-hugetlb" => || reported_beside_touches(Backing::Huge2M, 2 * BLOCK, BLOCK),
}

/// A vCPU with exits on may be sent back for a page that was unmapped at that moment, as when its block becomes whole: no
/// page is asked for then.
fn asks_for_nothing(fault: &MemoryFault) -> Result {
    let exit = FaultExit::decode(fault.flags, fault.gpa, fault.size);
    ensure_eq!(
        exit.map(|exit| exit.reason),
        Some(Reason::Retry),
        "why KVM_RUN returned for {fault:x?}"
    );
    Ok(())
}

/// A hinted page that is touched, by a vCPU with exits on or by a thread, is zeros at once: nobody is asked, and what the
/// memory held does not show. The page itself comes too late then.
fn zeros_at_once(backing: Backing, pages: u64) -> Result {
    let race = Race::new(backing, pages)?;
    race.begin(State::Zero)?;
    let touch = Touch::new(GPA, Order::sequential(pages / 2))
        .stride(2)
        .hash();
    let machine = race.slot.machine()?;
    let mut vcpu = machine.vcpu(0, &touch.program())?;
    let exiting = race.slot.clone();
    let vcpu = Task::work(move || -> Result<_> {
        exiting.vm.set_vcpu_exits(true)?;
        guest::run(&mut vcpu, asks_for_nothing)
    })?;
    for page in (1..pages).step_by(2) {
        ensure_eq!(race.slot.words(page)?, [0; WORDS], "page {page}");
    }
    let ran = vcpu.join("the vCPU")?;
    ensure_eq!(
        ran.reports,
        [sum(&touch, |_| Ok([0; WORDS]))?],
        "what the guest read"
    );
    ensure_eq!(
        race.place(race.all(), 1)?,
        0,
        "pages that came too late and were placed"
    );
    race.check(|_, _| None)?;
    ensure_eq!(race.zero_filled()?, pages, "pages filled");
    ensure_eq!(race.slot.counter("waits")?, 0, "waits");
    race.slot.no_event()
}

/// What a guest reports that has gone over pages with these words.
fn sum(touch: &Touch, words: impl Fn(u64) -> Result<[u64; WORDS]>) -> Result<u64> {
    touch.pages().try_fold(0_u64, |sum, page| {
        let value = touch.value(words(page)?);
        Ok(sum.wrapping_add(value.wrapping_mul(2 * page + 1)))
    })
}

/// Hinted pages are touched while their bytes arrive after all: each is all zeros or all those bytes, to everybody and from
/// the first touch on; who placed it is told which; what was written stays; nobody is asked for anything.
fn place_beside_touches(backing: Backing, pages: u64) -> Result {
    let race = Race::new(backing, pages)?;
    let (mut placed, mut filled) = (0, 0);
    let mut round = 0;
    // On a busy machine it may take many until they meet.
    while round < rounds(6) || ((placed == 0 || filled == 0) && round < 100) {
        round += 1;
        race.begin(State::Zero)?;
        let before = race.zero_filled()?;
        // The vCPU reads pages that nobody writes, all of each.
        let touch = Touch::new(GPA, Order::sequential(pages / 2))
            .stride(2)
            .hash();
        let machine = race.slot.machine()?;
        let mut vcpu = machine.vcpu(0, &touch.program())?;
        // All four begin at once.
        let ready = Arc::new(Barrier::new(4));
        let at_once = ready.clone();
        // From the middle on: the others come from both ends.
        let placing = race.clone();
        let placer = Task::work(move || -> Result<u64> {
            let mut order = batches(placing.pages, 2, round % 2 == 0);
            let middle = order.len() / 2;
            order.rotate_left(middle);
            at_once.wait();
            let mut sum = 0;
            for range in order {
                sum += placing.place(range, round)?;
            }
            Ok(sum)
        })?;
        let exiting = race.slot.clone();
        let at_once = ready.clone();
        let vcpu = Task::work(move || -> Result<_> {
            let on = exiting.vm.set_vcpu_exits(true);
            at_once.wait();
            on?;
            guest::run(&mut vcpu, asks_for_nothing)
        })?;
        let writing = race.clone();
        let at_once = ready.clone();
        let writer = Task::work(move || -> Result {
            at_once.wait();
            for page in (1..writing.pages).step_by(2) {
                write(&writing.slot, page, 5, round)?;
            }
            Ok(())
        })?;
        let reading = race.clone();
        let reader = Task::work(move || -> Result {
            ready.wait();
            for range in batches(reading.pages, 1, true) {
                let page = range.first;
                let at = |at| sys::load(reading.slot.address(page).wrapping_add(at));
                let first = at(511);
                let is_whole =
                    first == Touched::Value(0) || first == Touched::Value(tag(page, round));
                ensure!(is_whole, "page {page} reads {first:x?}");
                for other in [0, 256] {
                    ensure_eq!(
                        at(other),
                        first,
                        "word {other} of page {page}, after its last one"
                    );
                }
            }
            Ok(())
        })?;
        let now = placer.join("the placer")?;
        writer.join("the writer")?;
        reader.join("the reader")?;
        let ran = vcpu.join("the vCPU")?;
        ensure_eq!(
            race.zero_filled()? - before + now,
            pages,
            "pages placed, {now}, and filled"
        );
        race.check(|page, at| (page % 2 == 1 && at == 5).then_some(round))?;
        let expected = sum(&touch, |page| race.slot.words(page))?;
        ensure_eq!(
            ran.reports,
            [expected],
            "what the guest read, against what is there"
        );
        placed += now;
        filled += pages - now;
    }
    ensure!(
        placed > 0 && filled > 0,
        "{placed} placed and {filled} filled: they never met"
    );
    ensure_eq!(race.slot.counter("waits")?, 0, "waits");
    race.slot.no_event()
}

/// A running guest's memory, all there, each page of version 1.
fn running(backing: Backing, pages: u64) -> Result<Arc<Slot>> {
    let slot = Slot::new(backing, pages)?;
    for page in 0..pages {
        slot.alias.write(page, &tagged(PageRange::page(page), 1))?;
    }
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    Ok(slot)
}

/// A guest has reported pages free: their memory goes back to the host. Absent before they are punched out: who touches one
/// meanwhile waits, and does not bring a frame in that the memfd is about to lose.
fn report(slot: &Slot, range: PageRange) -> Result {
    slot.mark_range(State::Absent, range)?;
    slot.memfd.punch_hole(range)?;
    ensure_eq!(
        slot.mark_range(State::Zero, range)?.changed,
        range.count,
        "pages that are zero"
    );
    Ok(())
}

/// The memory that the memfd has, in pages.
fn held(slot: &Slot) -> Result<u64> {
    let path = format!("/proc/self/fd/{}", slot.memfd.as_fd().as_raw_fd());
    Ok(fs::metadata(path)?.blocks() * 512 / PAGE)
}

/// Reported pages, of hugetlb whole huge pages, cost no memory until they are touched, and are zeros then; all others are as
/// they were.
fn memory_goes_back(backing: Backing, pages: u64, unit: u64) -> Result {
    let slot = running(backing, pages)?;
    for page in 0..pages {
        ensure_eq!(
            sys::load(slot.address(page)),
            Touched::Value(tag(page, 1)),
            "page {page}"
        );
    }
    ensure_eq!(held(&slot)?, pages, "pages of memory");
    let free = PageRange::new(pages / unit / 2 * unit, unit);
    report(&slot, free)?;
    ensure_eq!(
        held(&slot)?,
        pages - unit,
        "pages of memory after the report"
    );
    let pinned = match backing {
        Backing::Shmem => 0,
        _ => pages - unit,
    };
    ensure_eq!(
        slot.counter("pinned-pages")?,
        pinned,
        "pinned pages after the report"
    );
    for page in 0..pages {
        let word = if free.iter().any(|free| free == page) {
            0
        } else {
            tag(page, 1)
        };
        ensure_eq!(
            slot.words(page)?,
            [word; WORDS],
            "page {page} after the report"
        );
    }
    ensure_eq!(held(&slot)?, pages, "pages of memory after touches");
    // What a migration would send, or a copy that came late: it does not count any more.
    let late = slot.vm.place(ID, free.first, &tagged(free, 2))?;
    ensure!(
        late.iter().all(|&placed| placed == Placed::Present),
        "{late:?}"
    );
    ensure_eq!(slot.counter("waits")?, 0, "waits");
    slot.no_event()
}

/// A part of a huge page that is reported gives no memory back; it reads zeros all the same, and the rest is as it was.
fn part_of_a_huge_page() -> Result {
    let slot = running(Backing::Huge2M, BLOCK)?;
    let free = PageRange::new(100, 9);
    report(&slot, free)?;
    ensure_eq!(held(&slot)?, BLOCK, "pages of memory");
    for page in 0..BLOCK {
        let word = if (100..109).contains(&page) {
            0
        } else {
            tag(page, 1)
        };
        ensure_eq!(
            slot.words(page)?,
            [word; WORDS],
            "page {page} after the report"
        );
    }
    slot.no_event()
}

/// Pages are reported again and again while threads write and read them: a write is there or, after a report, zeros are;
/// what was reported never comes back, and the memfd and the guest have the same bytes in the end.
fn reported_beside_touches(backing: Backing, pages: u64, unit: u64) -> Result {
    let race = Race::new(backing, pages)?;
    race.begin(State::Zero)?;
    // Half of the memory is not reported.
    let reported = pages / 2;
    let met = Arc::new(AtomicU64::new(0));
    let toucher = |number: u64| {
        let (race, met) = (race.clone(), met.clone());
        Task::work(move || -> Result {
            let mut last = vec![0; race.pages as usize];
            let (mut state, mut value) = (number + 1, 0);
            while !race.stopped() {
                let page = random(&mut state) % race.pages;
                let at = race.slot.address(page).wrapping_add(1 + number as usize);
                let last = &mut last[page as usize];
                let look = |last: &mut u64| -> Result {
                    let read = sys::load(at);
                    if read == Touched::Value(0) && page < reported {
                        met.fetch_add(u64::from(*last != 0), Ordering::Relaxed);
                        *last = 0;
                    }
                    ensure_eq!(read, Touched::Value(*last), "page {page}, thread {number}");
                    Ok(())
                };
                look(last)?;
                value += 1;
                // SAFETY: guest memory, which there are no references to.
                let stored = unsafe { sys::store(at, value) };
                ensure_eq!(stored, Touched::Value(0), "a write to page {page}");
                *last = value;
                look(last)?;
            }
            Ok(())
        })
    };
    let touchers = [toucher(0)?, toucher(1)?];
    let mut state = 7;
    let deadline = Instant::now() + PATIENCE;
    for round in 0.. {
        // However late the threads begin, they must meet reports.
        let enough = met.load(Ordering::Relaxed) >= 20 || Instant::now() > deadline;
        if round >= rounds(300) && enough {
            break;
        }
        let first = random(&mut state) % (reported / unit) * unit;
        report(&race.slot, PageRange::new(first, unit))?;
        std::thread::yield_now();
    }
    race.stop();
    for toucher in touchers {
        toucher.join("a toucher")?;
    }
    ensure!(
        met.load(Ordering::Relaxed) > 0,
        "no thread has met a report"
    );
    for page in 0..pages {
        let guest = race.slot.words(page)?;
        let mut bytes = [0; PAGE as usize];
        race.slot.memfd.read(page, &mut bytes)?;
        for (at, (word, eight)) in guest.iter().zip(bytes.chunks_exact(8)).enumerate() {
            ensure_eq!(
                word.to_le_bytes()[..],
                *eight,
                "word {at} of page {page} in the memfd"
            );
        }
    }
    Ok(())
}
