// SPDX-License-Identifier: GPL-2.0

//! Present neighbours that a fault maps together with its page.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use kdp_vmm::{Order, Touch};
use kvm_demand_paging::{Backing, Cause, GuestMap, PageRange, State};

use super::native::mapped;
use super::shmem::folios;
use super::source::sourced;
use crate::check::Result;
use crate::guest;
use crate::harness::rounds;
use crate::numa::{self, Setting};
use crate::slot::{self, Slot, BLOCK, GPA, ID, PAGE, WINDOW};
use crate::sys::{self, Touched};
use crate::task::Task;

tests! {
    "fault-around-present-neighbours-hugetlb" => || present_neighbours(Backing::Huge2M),
    "fault-around-present-neighbours-shmem" => || present_neighbours(Backing::Shmem),
    "fault-around-for-guests-hugetlb" => || for_guests(Backing::Huge2M),
    "fault-around-for-guests-shmem" => || for_guests(Backing::Shmem),
    "fault-around-leaves-absent-neighbours-hugetlb" => || leaves_absent_neighbours(Backing::Huge2M),
    "fault-around-leaves-absent-neighbours-shmem" => || leaves_absent_neighbours(Backing::Shmem),
    "fault-around-leaves-absent-pages-of-folios" => leaves_absent_pages_of_folios,
    "fault-around-leaves-poisoned-neighbours-of-a-filled-page" => leaves_poisoned_neighbours,
    "fault-around-made-absent-traps-again-hugetlb" => || made_absent_traps_again(Backing::Huge2M),
    "fault-around-made-absent-traps-again-shmem" => || made_absent_traps_again(Backing::Shmem),
    "fault-around-stays-in-the-mapping-hugetlb" => || stays_in_the_mapping(Backing::Huge2M),
    "fault-around-stays-in-the-mapping-shmem" => || stays_in_the_mapping(Backing::Shmem),
    "fault-around-while-pages-become-absent-hugetlb" => || while_pages_become_absent(Backing::Huge2M),
    "fault-around-while-pages-become-absent-shmem" => || while_pages_become_absent(Backing::Shmem),
}

/// An absent page, so that its block is not mapped by one entry.
const ABSENT: u64 = 509;

/// A memslot of two blocks, with one absent page in each. On shmem the memfd has small folios.
fn nearly_whole(backing: Backing) -> Result<Arc<Slot>> {
    let _folios = match backing {
        Backing::Shmem => Some(folios("never")?),
        Backing::Huge2M | Backing::Huge1G => None,
    };
    let slot = Slot::new(backing, 2 * BLOCK)?;
    for page in 0..2 * BLOCK {
        slot.fill(page, 1)?;
    }
    slot.mark_range(State::Present, PageRange::new(0, 2 * BLOCK))?;
    for block in 0..2 {
        slot.mark(State::Absent, block * BLOCK + ABSENT)?;
    }
    Ok(slot)
}

fn visited() -> impl Iterator<Item = u64> {
    (0..2 * BLOCK).filter(|page| page % BLOCK != ABSENT)
}

/// Whether an address is mapped, by /proc/self/pagemap. It shows nothing of hugetlb (VM_PFNMAP).
fn is_mapped(at: *const u8) -> Result<bool> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut entry = [0; 8];
    pagemap.read_exact_at(&mut entry, at as u64 / PAGE * 8)?;
    Ok(u64::from_ne_bytes(entry) >> 63 != 0)
}

fn address(map: &GuestMap, page: u64) -> *mut u8 {
    map.as_ptr().wrapping_add((page * PAGE) as usize)
}

/// A process that reads on in order faults once for a window, and sees the right bytes.
fn present_neighbours(backing: Backing) -> Result {
    let slot = nearly_whole(backing)?;
    for page in visited() {
        slot.check(page, 1)?;
    }
    ensure_eq!(
        slot.counter("faults")?,
        2 * BLOCK / WINDOW,
        "faults of pages"
    );
    ensure_eq!(slot.counter("faults-huge")?, 0, "faults of blocks");
    // Backwards, through another mapping.
    let other = slot.memslot.map()?;
    for page in (0..BLOCK).rev().filter(|&page| page != ABSENT) {
        slot::words_at(address(&other, page).cast())?;
    }
    ensure_eq!(
        slot.counter("faults")?,
        3 * BLOCK / WINDOW,
        "faults of pages, with those of a mapping that is read backwards"
    );
    Ok(())
}

/// A guest has a fault of its own for each page, but the module has one for a window.
fn for_guests(backing: Backing) -> Result {
    let slot = nearly_whole(backing)?;
    let machine = slot.machine()?;
    let visit = Touch::new(GPA, Order::sequential(ABSENT)).hash();
    let mut expected = 0_u64;
    for page in 0..ABSENT {
        let words = (0..crate::content::WORDS).map(|at| crate::content::word(page, 1, at));
        expected = expected.wrapping_add(visit.value(words).wrapping_mul(2 * page + 1));
    }
    let ran = guest::run(&mut machine.vcpu(0, &visit.program())?, guest::no_fault)?;
    ensure_eq!(ran.reports, [expected], "the guest's checksum");
    ensure_eq!(slot.counter("faults")?, BLOCK / WINDOW, "faults of pages");
    Ok(())
}

/// What is absent in the window is left out: it traps.
fn leaves_absent_neighbours(backing: Backing) -> Result {
    let slot = nearly_whole(backing)?;
    let absent = [18, 21, 22, 31];
    for page in absent {
        slot.mark(State::Absent, page)?;
    }
    slot.check(16, 1)?;
    for page in (16..32).filter(|page| !absent.contains(page)) {
        slot.check(page, 1)?;
    }
    ensure_eq!(slot.counter("faults")?, 1, "faults of pages of one window");
    for page in absent {
        slot.fill(page, 2)?;
        let mut waiting = slot.checker(page, 2)?;
        ensure_eq!(slot.event()?.page, page, "the event's page");
        ensure!(
            !waiting.ends_within(Duration::ZERO)?,
            "page {page} was read"
        );
        slot.mark(State::Present, page)?;
        waiting.join("the thread")?;
    }
    Ok(())
}

/// On shmem the kernel has folios of all sizes. If one holds present and absent pages, a fault maps
/// the present ones.
fn leaves_absent_pages_of_folios() -> Result {
    const PRESENT: [u64; 5] = [1, 16, 17, 20, 27];
    let sizes = "/sys/kernel/mm/transparent_hugepage/hugepages-";
    let _none = folios("never")?;
    for kib in [16, 64, 2048] {
        let _folios = Setting::set(format!("{sizes}{kib}kB/shmem_enabled"), "always")?;
        let slot = Slot::new(Backing::Shmem, BLOCK)?;
        for page in 0..BLOCK {
            slot.fill(page, 1)?;
        }
        for page in PRESENT {
            slot.mark(State::Present, page)?;
        }
        slot.check(17, 1)?;
        let mapped = mapped(&slot)?;
        ensure_eq!(
            mapped,
            [16, 17, 20, 27],
            "mapped pages, folios of {kib} KiB"
        );
        for page in PRESENT {
            slot.check(page, 1)?;
        }
        let mut waiting = slot.checker(21, 1)?;
        ensure_eq!(slot.event()?.page, 21, "the event's page");
        waiting.still_waits("a read of the absent page")?;
        slot.mark(State::Present, 21)?;
        waiting.join("the reader")?;
    }
    Ok(())
}

/// A fault that fills its page from a source maps present neighbours, but none that is poisoned.
fn leaves_poisoned_neighbours() -> Result {
    let (slot, _file) = sourced(Backing::Shmem, BLOCK)?;
    for page in [33, 35] {
        slot.check(page, 1)?;
    }
    let poisoned = PageRange::page(33);
    slot.vm.poison(ID, &[poisoned], Cause::Emulated)?;
    // Nothing is mapped in this one.
    let other = slot.memslot.map()?;
    let at = |page| address(&other, page).cast::<u64>();
    let words = slot::words_at(at(34))?;
    if let Err(wrong) = crate::content::check(&words, 34, 1) {
        fail!("{wrong}");
    }
    let frames = numa::mapped_frames(other.as_ptr(), BLOCK)?;
    let mapped: Vec<u64> = (0..BLOCK)
        .filter(|&page| frames[page as usize] != 0)
        .collect();
    ensure_eq!(mapped, [34, 35], "mapped pages");
    ensure_eq!(
        sys::load(at(33)),
        Touched::sigbus(libc::BUS_MCEERR_AR, at(33), 12),
        "a read of the poisoned page"
    );
    Ok(())
}

/// What was mapped as a neighbour is unmapped like everything else.
fn made_absent_traps_again(backing: Backing) -> Result {
    let slot = nearly_whole(backing)?;
    slot.check(40, 1)?;
    for page in [32, 41, 47] {
        let faults = slot.counter("faults")?;
        slot.check(page, 1)?;
        ensure_eq!(
            slot.counter("faults")?,
            faults,
            "faults, with one of page {page}, which is mapped as a neighbour"
        );
        slot.mark(State::Absent, page)?;
        slot.fill(page, 2)?;
        let waiting = slot.checker(page, 2)?;
        ensure_eq!(slot.event()?.page, page, "the event's page");
        slot.mark(State::Present, page)?;
        waiting.join("the thread")?;
    }
    Ok(())
}

/// A mapping of a part of the memslot: nothing is mapped outside it, wherever the window reaches.
fn stays_in_the_mapping(backing: Backing) -> Result {
    let slot = nearly_whole(backing)?;
    // (first page, pages, where in a block of addresses): in step and out of it; the last crosses a page table.
    for (first, pages, into) in [
        (5, 9, 5),
        (5, 9, 6),
        (64, 16, 63),
        (496, 40, 500),
        (500, 6, 509),
    ] {
        let bytes = ((2 * BLOCK + 64) * PAGE) as usize;
        // SAFETY: the kernel chooses addresses that nobody uses; the second call replaces some of those.
        let base = unsafe {
            let space = libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            ensure!(space != libc::MAP_FAILED, "mmap of {bytes} bytes failed");
            let block = (space as usize).next_multiple_of((BLOCK * PAGE) as usize);
            let base = libc::mmap(
                (block + (into * PAGE) as usize) as *mut libc::c_void,
                (pages * PAGE) as usize,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_FIXED,
                slot.memslot.as_fd().as_raw_fd(),
                (first * PAGE) as libc::off_t,
            );
            ensure!(base != libc::MAP_FAILED, "mmap at {block:#x} failed");
            base.cast::<u8>()
        };
        let at = |page: u64| base.wrapping_add(((page - first) * PAGE) as usize);
        let all = first..first + pages;
        for page in all.clone().filter(|page| page % BLOCK != ABSENT) {
            let words = slot::words_at(at(page).cast())?;
            if let Err(wrong) = crate::content::check(&words, page, 1) {
                fail!("{wrong}");
            }
        }
        for n in 1..=2 * WINDOW {
            for outside in [
                base.wrapping_sub((n * PAGE) as usize),
                base.wrapping_add(((pages + n - 1) * PAGE) as usize),
            ] {
                ensure!(
                    !is_mapped(outside)?,
                    "{n} pages beside {all:?} at {base:p} something is mapped"
                );
            }
        }
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(base.cast(), (pages * PAGE) as usize) };
    }
    Ok(())
}

/// Threads read windows while pages of them become absent, are changed and become present: nobody ever reads
/// a version of the past.
fn while_pages_become_absent(backing: Backing) -> Result {
    const PAGES: u64 = 4 * WINDOW;
    let slot = nearly_whole(backing)?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut readers = Vec::new();
    let mut seen = Vec::new();
    for _ in 0..PAGES {
        seen.push(std::sync::atomic::AtomicU64::new(1));
    }
    let floors = Arc::new(seen);
    for n in 0..3 {
        let (slot, stop, floors) = (slot.clone(), stop.clone(), floors.clone());
        readers.push(Task::work(move || -> Result<u64> {
            let mut looks = 0;
            while !stop.load(Ordering::Acquire) {
                // A mapping of its own, so that it faults all the time.
                let map = slot.memslot.map()?;
                for page in Order::random(PAGES, n + looks).iter() {
                    let floor = floors[page as usize].load(Ordering::Acquire);
                    match sys::load(address(&map, page).cast()) {
                        Touched::Value(value) => {
                            let is = |v| crate::content::word(page, v, 0) == value;
                            // As far as the writer may have come meanwhile.
                            let to = floors[page as usize].load(Ordering::Acquire) + 1;
                            ensure!(
                                (floor..=to).any(is),
                                "page {page} is none of versions {floor} to {to}"
                            );
                        }
                        other => fail!("page {page}: {other:x?}"),
                    }
                    looks += 1;
                }
            }
            Ok(looks)
        })?);
    }
    let handler = {
        let serving = slot.clone();
        // Who waits is let go by the mark below: there is nothing to do.
        crate::handler::Handler::start(&slot, move |_| {
            let _ = &serving;
            Ok(())
        })?
    };
    for version in 2..2 + rounds(40) {
        for page in Order::random(PAGES, version).iter() {
            slot.mark(State::Absent, page)?;
            floors[page as usize].store(version, Ordering::Release);
            slot.fill(page, version)?;
            slot.mark(State::Present, page)?;
        }
    }
    stop.store(true, Ordering::Release);
    for reader in readers {
        let looks = reader.join("a reader")?;
        ensure!(looks > 0, "a reader has read nothing");
    }
    handler.stop()
}
