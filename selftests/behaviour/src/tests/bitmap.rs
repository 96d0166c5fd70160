// SPDX-License-Identifier: GPL-2.0

//! The present bitmap.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use kdp_vmm::{Order, Touch};
use kvm_demand_paging::{Backing, PageRange, Paging, State};

use crate::check::Result;
use crate::content;
use crate::guest;
use crate::harness::rounds;
use crate::slot::{Slot, BLOCK, GPA, ID, PAGE};
use crate::sys::{self, Touched};
use crate::task::Task;

tests! {
    "bitmap-resolves-an-exit-without-a-call" => resolves_an_exit_without_a_call,
    "bitmap-data-then-bit-threads" => data_then_bit_threads,
    "bitmap-data-then-bit-guest" => data_then_bit_guest,
    "bitmap-data-then-mark-waiters" => data_then_mark_waiters,
    "bitmap-memory-goes-back" => memory_goes_back,
    "bitmap-fresh-after-on" => fresh_after_on,
}

/// A vCPU's exit is resolved by a copy and one atomic OR: the module sees no call at all, but the guest
/// has its pages, and all of them right.
fn resolves_an_exit_without_a_call() -> Result {
    for backing in [Backing::Shmem, Backing::Huge2M] {
        let pages = BLOCK;
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let touch = Touch::new(GPA, Order::random(pages, 5)).hash();
        let mut expected = 0_u64;
        for page in 0..pages {
            let words = (0..content::WORDS).map(|at| content::word(page, 1, at));
            expected = expected.wrapping_add(touch.value(words).wrapping_mul(2 * page + 1));
        }
        let mut vcpu = machine.vcpu(0, &touch.program())?;
        let exiting = slot.clone();
        let task = Task::work(move || -> Result<_> {
            let present = exiting.memslot.bitmap()?;
            exiting.vm.set_vcpu_exits(true)?;
            guest::run(&mut vcpu, |fault| {
                let page = (fault.gpa - GPA) / PAGE;
                exiting.fill(page, 1)?;
                ensure!(present.set(page), "page {page} was present");
                Ok(())
            })
        })?;
        let ran = task.join("the vCPU")?;
        ensure_eq!(ran.reports, [expected], "the guest's checksum");
        ensure_eq!(ran.faults.len() as u64, pages, "exits");
        for counter in ["resolved", "events-read", "waits"] {
            ensure_eq!(slot.vm_counter(counter)?, 0, "{counter}");
        }
    }
    Ok(())
}

/// All pages, in an order in which those below a page and above it come before it and after it.
fn scattered(pages: u64) -> impl Iterator<Item = u64> {
    // 37 divides no number of pages that is used here.
    (0..pages).map(move |i| i * 37 % pages)
}

/// Places all pages: each is filled, then its bit is set.
fn place_all(slot: &Slot, version: u64, pages: u64) -> Result {
    let present = slot.memslot.bitmap()?;
    for page in scattered(pages) {
        slot.fill(page, version)?;
        present.set(page);
    }
    Ok(())
}

/// Invariant 1, data then bit: whoever sees a page's bit, through whatever mapping, sees all its bytes.
fn data_then_bit_threads() -> Result {
    const THREADS: u64 = 3;
    for (backing, pages) in [(Backing::Shmem, 256), (Backing::Huge2M, BLOCK)] {
        let slot = Slot::new(backing, pages)?;
        for version in 1..=rounds(4) {
            slot.mark_range(State::Absent, PageRange::new(0, pages))?;
            let placed = Arc::new(AtomicU64::new(0));
            let mut threads = Vec::new();
            for _ in 0..THREADS {
                let (slot, placed) = (slot.clone(), placed.clone());
                threads.push(Task::work(move || -> Result {
                    let present = slot.memslot.bitmap()?;
                    placed.fetch_add(1, Ordering::AcqRel);
                    for page in scattered(pages) {
                        while !present.is_present(page) {
                            std::thread::yield_now();
                        }
                        slot.check(page, version)?;
                    }
                    Ok(())
                })?);
            }
            while placed.load(Ordering::Acquire) < THREADS {
                std::thread::yield_now();
            }
            place_all(&slot, version, pages)?;
            for thread in threads {
                thread.join("a thread")?;
            }
        }
        ensure_eq!(slot.counter("waits")?, 0, "waits");
    }
    Ok(())
}

/// Invariant 1, data then bit: a guest that exits wherever no bit is set, and runs on wherever somebody has
/// set one, computes the right checksum.
fn data_then_bit_guest() -> Result {
    for backing in [Backing::Shmem, Backing::Huge2M] {
        let pages = BLOCK;
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        for version in 1..=rounds(3) {
            slot.mark_range(State::Absent, PageRange::new(0, pages))?;
            for page in 0..pages {
                slot.fill(page, 666)?;
            }
            let touch = Touch::new(GPA, Order::sequential(pages)).hash();
            let mut expected = 0_u64;
            for page in 0..pages {
                let words = (0..content::WORDS).map(|at| content::word(page, version, at));
                expected = expected.wrapping_add(touch.value(words).wrapping_mul(2 * page + 1));
            }
            let mut vcpu = machine.vcpu(version, &touch.program())?;
            let exiting = slot.clone();
            let task = Task::work(move || -> Result<_> {
                exiting.vm.set_vcpu_exits(true)?;
                // It tries again and again, until the other thread has come to the page.
                guest::run(&mut vcpu, |_| Ok(()))
            })?;
            place_all(&slot, version, pages)?;
            ensure_eq!(task.join("the vCPU")?.reports, [expected], "the checksum");
        }
    }
    Ok(())
}

/// Invariant 1, data then bit, for those who wait: everything that was written before a page was marked
/// present is seen by whom that lets go, and by who comes at that very moment.
fn data_then_mark_waiters() -> Result {
    const THREADS: u64 = 3;
    for (backing, pages) in [(Backing::Shmem, 128), (Backing::Huge2M, BLOCK)] {
        let slot = Slot::new(backing, pages)?;
        for version in 1..=rounds(4) {
            for page in 0..pages {
                slot.fill(page, 666)?;
            }
            let mut threads = Vec::new();
            for thread in 0..THREADS {
                let slot = slot.clone();
                threads.push(Task::work(move || -> Result {
                    for i in 0..pages {
                        // From one end, from the other, and from the middle.
                        let page = match thread {
                            0 => i,
                            1 => pages - 1 - i,
                            _ => (i + pages / 2) % pages,
                        };
                        slot.check(page, version)?;
                    }
                    Ok(())
                })?);
            }
            for page in scattered(pages) {
                slot.place(page, version)?;
            }
            for thread in threads {
                thread.join("a thread")?;
            }
            slot.mark_range(State::Absent, PageRange::new(0, pages))?;
        }
    }
    Ok(())
}

/// Free memory of the machine in bytes: that of the zones, and what the CPUs keep at hand of it.
fn free_memory() -> Result<i64> {
    // What others could be made to give back is free for this purpose.
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    let text = std::fs::read_to_string("/proc/zoneinfo")?;
    let mut pages = 0;
    for line in text.lines().map(str::trim_start) {
        let count = line
            .strip_prefix("pages free")
            .or_else(|| line.strip_prefix("count:"));
        if let Some(count) = count {
            pages += count.trim().parse::<i64>()?;
        }
    }
    ensure!(pages > 0, "/proc/zoneinfo says nothing of free pages");
    Ok(pages * PAGE as i64)
}

/// Switching demand paging off gives the bitmap's memory back, mapped or not: a mapping of it gets SIGBUS.
/// Switching it on costs nothing until bits are set.
fn memory_goes_back() -> Result {
    // A chunk of the bitmap, a page of memory, is for 32,768 pages.
    const CHUNKS: u64 = 8192;
    const BYTES: i64 = (CHUNKS * PAGE) as i64;
    let slot = Slot::new(Backing::Shmem, CHUNKS * 32_768)?;
    let present = slot.memslot.bitmap()?;
    let before = free_memory()?;
    for chunk in 0..CHUNKS {
        present.set(chunk * 32_768 + 77);
    }
    let used = before - free_memory()?;
    ensure!(
        (BYTES / 4 * 3..BYTES / 4 * 6).contains(&used),
        "{CHUNKS} chunks of the bitmap took {used} bytes"
    );
    slot.vm.set_paging(ID, Paging::Off)?;
    let left = before - free_memory()?;
    ensure!(
        left < BYTES / 4,
        "paging is off, and of {used} bytes of bitmap {left} are still in use"
    );
    // The crate's type must not be used any more: look at the mapping itself.
    std::mem::forget(present);
    let text = std::fs::read_to_string("/proc/self/maps")?;
    let offset = format!("{:x}", kvm_demand_paging::abi::KDP_BITMAP_OFFSET);
    let line = text
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(&offset));
    let Some(start) = line.and_then(|line| u64::from_str_radix(line.split('-').next()?, 16).ok())
    else {
        fail!("no mapping of the bitmap in\n{text}");
    };
    match sys::load(start as *const u64) {
        Touched::Signal {
            signal: libc::SIGBUS,
            ..
        } => {}
        other => fail!("the bitmap, with paging off: {other:x?}"),
    }
    slot.vm.set_paging(ID, Paging::On)?;
    ensure_eq!(
        sys::load(start as *const u64),
        Touched::Value(0),
        "the fresh bitmap's word"
    );
    let left = before - free_memory()?;
    ensure!(
        left < BYTES / 4,
        "paging is on, and {left} bytes are in use for no bit"
    );
    Ok(())
}

/// Paging on again starts with a fresh bitmap, in all mappings of it, old and new: what was present is
/// absent, or the other way round.
fn fresh_after_on() -> Result {
    let slot = Slot::new(Backing::Shmem, 100)?;
    let old = slot.memslot.bitmap()?;
    slot.place(10, 1)?;
    old.set(11);
    ensure_eq!(old.count(), 2, "bits");
    slot.vm.set_paging(ID, Paging::Off)?;
    slot.check(10, 1)?;
    slot.vm.set_paging(ID, Paging::On)?;
    let new = slot.memslot.bitmap()?;
    ensure_eq!(
        (old.count(), new.count()),
        (0, 0),
        "bits of the fresh bitmap"
    );
    let mut waiting = slot.checker(10, 2)?;
    waiting.still_waits("the thread")?;
    slot.place(10, 2)?;
    waiting.join("the thread")?;
    ensure!(
        old.is_present(10) && new.is_present(10),
        "its bit is not set"
    );
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    ensure_eq!(
        (old.count(), new.count()),
        (100, 100),
        "bits when all is present"
    );
    slot.check(10, 2)?;
    ensure_eq!(slot.mark(State::Absent, 10)?, 1, "pages changed");
    ensure_eq!(
        (old.count(), new.count()),
        (99, 99),
        "bits after one was made absent"
    );
    Ok(())
}
