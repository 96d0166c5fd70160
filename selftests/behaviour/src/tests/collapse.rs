// SPDX-License-Identifier: GPL-2.0

//! Blocks that are mapped by one entry again when all their pages are present.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kdp_vmm::{Order, Touch};
use kvm_demand_paging::{Backing, Memslot, PageRange, State};

use crate::check::Result;
use crate::guest;
use crate::harness::rounds;
use crate::slot::{Slot, BLOCK, GIGANTIC, GPA, ID, PAGE, WINDOW};
use crate::sys::{self, Touched};
use crate::tables::{kvm_pages, page_tables};
use crate::task::{Task, PATIENCE};

tests! {
    "collapse-random-guests-exits" => || random_guests(Backing::Huge2M, BLOCKS * BLOCK, 1, true),
    "collapse-random-guests-waits" => || random_guests(Backing::Huge2M, BLOCKS * BLOCK, 1, false),
    "collapse-random-512m-on-2m-pages" => || random_guests(Backing::Huge2M, 256 * BLOCK, 8, true),
    "collapse-random-2g-on-1g-pages" => || random_guests(Backing::Huge1G, 2 * GIGANTIC, 64, true),
    "collapse-when-a-mark-completes" => mark_completes,
    "collapse-when-called" => when_called,
    "collapse-process" => process,
    "collapse-once-for-each-time-it-is-whole" => once_for_each_time,
    "collapse-only-whole-blocks" => only_whole_blocks,
    "collapse-part-of-a-memslot" => part_of_a_memslot,
    "collapse-not-where-addresses-are-out-of-step" => out_of_step,
    "collapse-keeps-dontfork-and-protection" => keeps_what_the_caller_set,
    "collapse-two-processes" => two_processes,
    "collapse-never-replaces-what-is-not-ours" => never_replaces_others,
    "collapse-a-system-call-goes-on" => system_call_goes_on,
}

const BLOCKS: u64 = 16;

/// Areas of this process that lie in an address range.
fn areas(address: usize, bytes: usize) -> Result<Vec<String>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut found = Vec::new();
    for line in maps.lines() {
        let Some((start, end)) = line.split(' ').next().and_then(|r| r.split_once('-')) else {
            fail!("/proc/self/maps has a line '{line}'");
        };
        let start = usize::from_str_radix(start, 16)?;
        let end = usize::from_str_radix(end, 16)?;
        if start < address + bytes && address < end {
            found.push(line.to_owned());
        }
    }
    Ok(found)
}

fn touch(at: *mut u64) -> Result<u64> {
    match sys::load(at) {
        Touched::Value(value) => Ok(value),
        other => fail!("{at:p}: {other:x?}"),
    }
}

/// Pages in an order that mixes the blocks.
fn mixed(pages: u64) -> impl Iterator<Item = u64> {
    Order::random(pages, 7).iter()
}

/// Four vCPUs page a guest in, in random order, until it is whole: not one entry of 4 KiB is left in
/// stage-2, and this process's page tables are as small as before.
///
/// They visit every `step`th page; the others are present before, so that large memory does not take the
/// emulator more world switches than it survives (see emulator.rs).
fn random_guests(backing: Backing, pages: u64, step: u64, exits: bool) -> Result {
    random_guests_on(&Slot::new(backing, pages)?, step, exits)
}

/// The same in a memslot that is there.
pub(super) fn random_guests_on(slot: &Arc<Slot>, step: u64, exits: bool) -> Result {
    const VCPUS: u64 = 4;
    let pages = slot.guest.pages();
    let some = |page: u64| page % step == 0;
    for page in (0..pages).filter(|&page| some(page)) {
        slot.fill(page, 1)?;
    }
    let machine = slot.machine()?;
    // A table for the first pages that are touched here, and for the machine's own memory.
    let warm = Touch::new(GPA, Order::sequential(1));
    slot.mark(State::Present, 0)?;
    guest::run(&mut machine.vcpu(VCPUS, &warm.program())?, guest::no_fault)?;
    let (tables, entries) = (page_tables()?, kvm_pages()?);
    if step > 1 {
        for page in (0..pages).filter(|&page| some(page)) {
            slot.mark_range(State::Present, PageRange::new(page + 1, step - 1))?;
        }
    }
    let handler = (!exits).then(|| {
        let serving = slot.clone();
        crate::handler::Handler::start(slot, move |event| {
            serving.mark(State::Present, event.page).map(drop)
        })
    });
    let handler = handler.transpose()?;
    let mut tasks = Vec::new();
    for number in 0..VCPUS {
        let touch = Touch::new(GPA, Order::random(pages / step / VCPUS, number))
            .first(number * step)
            .stride(VCPUS * step)
            .rounds(2);
        let mut vcpu = machine.vcpu(number, &touch.program())?;
        let slot = slot.clone();
        tasks.push(Task::work(move || {
            sys::stay_on_cpu(number)?;
            slot.vm.set_vcpu_exits(exits)?;
            let present = slot.memslot.bitmap()?;
            guest::run(&mut vcpu, |fault| {
                present.set((fault.gpa - GPA) / PAGE);
                Ok(())
            })
        })?);
    }
    for task in tasks {
        let ran = task.join_long("a vCPU")?;
        ensure!(
            exits != ran.faults.is_empty(),
            "a vCPU with exits {exits} had {} exits",
            ran.faults.len()
        );
    }
    let now = kvm_pages()?;
    ensure_eq!(
        (now.1 - entries.1, now.2 - entries.2),
        (pages / BLOCK, 0),
        "entries of 2 MiB and of 1 GiB"
    );
    // The first page had one, and each vCPU's program needs a few of its own.
    ensure!(
        now.0 < entries.0 + 8 * VCPUS,
        "entries of 4 KiB: {} before, {} now",
        entries.0,
        now.0
    );
    let grown = page_tables()?.saturating_sub(tables);
    // Those of the threads' stacks and heaps are among them.
    ensure!(
        grown < BLOCKS * PAGE * 3 / 4,
        "page tables have grown by {grown} bytes"
    );
    let areas = areas(slot.guest.as_ptr() as usize, slot.guest.len())?;
    ensure_eq!(areas.len(), 1, "areas of the memslot in the end");
    for page in (0..pages).filter(|&page| some(page)) {
        slot.check(page, 1)?;
    }
    match handler {
        Some(handler) => handler.stop(),
        None => Ok(()),
    }
}

/// A call that makes a block whole unmaps its single pages: the next touch is enough, also of a page that
/// was mapped before.
fn mark_completes() -> Result {
    let slot = Slot::new(Backing::Huge2M, 2 * BLOCK)?;
    for page in 0..BLOCK - 1 {
        slot.place(page, 1)?;
        slot.check(page, 1)?;
    }
    ensure_eq!(slot.counter("faults-huge")?, 0, "faults of blocks before");
    slot.place(BLOCK - 1, 1)?;
    slot.check(3, 1)?;
    slot.check(4, 1)?;
    ensure_eq!(slot.counter("collapses")?, 1, "ranges mapped anew");
    ensure_eq!(slot.counter("faults-huge")?, 1, "faults of blocks");
    for page in 0..BLOCK {
        slot.check(page, 1)?;
    }
    // A mark that changes nothing takes nothing away.
    let faults = (slot.counter("faults")?, slot.counter("faults-huge")?);
    slot.mark_range(State::Present, PageRange::new(0, BLOCK))?;
    for page in 0..BLOCK {
        slot.check(page, 1)?;
    }
    ensure_eq!(
        (slot.counter("faults")?, slot.counter("faults-huge")?),
        faults,
        "faults after a mark that changed nothing"
    );
    Ok(())
}

/// A block that became whole by a bit, of which only mapped pages are touched, stays small until somebody
/// asks.
fn when_called() -> Result {
    let slot = Slot::new(Backing::Huge2M, 2 * BLOCK)?;
    let present = slot.memslot.bitmap()?;
    for page in 0..BLOCK {
        slot.fill(page, 1)?;
    }
    for page in 0..BLOCK - 1 {
        present.set(page);
        slot.check(page, 1)?;
    }
    present.set(BLOCK - 1);
    for page in 0..BLOCK - 1 {
        slot.check(page, 1)?;
    }
    ensure_eq!(slot.counter("collapses")?, 0, "ranges mapped anew, unasked");
    let report = slot.vm.collapse(ID, PageRange::new(0, 2 * BLOCK))?;
    ensure_eq!(
        (report.collapsed, report.incomplete, report.missing),
        (BLOCK, BLOCK, Some(BLOCK)),
        "what the call says"
    );
    slot.check(0, 1)?;
    slot.check(1, 1)?;
    ensure_eq!(slot.counter("collapses")?, 1, "ranges mapped anew");
    ensure_eq!(slot.counter("faults-huge")?, 1, "faults of blocks");
    for page in 0..BLOCK {
        slot.check(page, 1)?;
    }
    Ok(())
}

/// The same without KVM: page tables go as the blocks become whole, and come back for none.
fn process() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    let before = page_tables()?;
    let mut most = 0;
    for page in mixed(pages) {
        slot.place(page, 3)?;
        slot.check(page, 3)?;
        if page % 64 == 0 {
            most = most.max(page_tables()?);
        }
    }
    ensure!(
        most >= before + BLOCKS * PAGE,
        "page tables never took {BLOCKS} pages more: at most {most} bytes, {before} before"
    );
    // A block becomes huge at the touch after the one that found it whole.
    for page in 0..pages {
        slot.check(page, 3)?;
    }
    let grown = page_tables()?.saturating_sub(before);
    ensure!(grown <= PAGE, "page tables have grown by {grown} bytes");
    let areas = areas(slot.guest.as_ptr() as usize, slot.guest.len())?;
    ensure_eq!(areas.len(), 1, "areas in the end: {areas:?}");
    Ok(())
}

/// No thrash: a whole block is mapped anew once, however often it is touched, until a page of it was made
/// absent and present again.
fn once_for_each_time() -> Result {
    let pages = 2 * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    slot.mark(State::Present, 5)?;
    touch(slot.address(5))?;
    ensure_eq!(slot.counter("collapses")?, 0, "ranges mapped anew at first");
    slot.mark_range(State::Present, PageRange::new(0, BLOCK))?;
    for round in 1..=rounds(20) {
        for page in 0..BLOCK {
            touch(slot.address(page))?;
        }
        ensure_eq!(
            slot.counter("collapses")?,
            1,
            "ranges mapped anew after round {round}"
        );
    }
    ensure_eq!(slot.counter("faults-huge")?, 1, "faults of blocks");
    // The page that was there at first, and the one that found the block whole.
    ensure_eq!(slot.counter("faults")?, 2, "faults of pages");
    for times in 2..=rounds(10) {
        slot.mark(State::Absent, times)?;
        touch(slot.address(times + 1))?;
        slot.mark(State::Present, times)?;
        for page in 0..BLOCK {
            touch(slot.address(page))?;
        }
        ensure_eq!(
            slot.counter("collapses")?,
            times,
            "ranges mapped anew when a page has come back"
        );
        ensure_eq!(slot.counter("faults-huge")?, times, "faults of blocks");
    }
    Ok(())
}

/// A block that lacks a page is left alone, and so are its neighbours that are huge.
fn only_whole_blocks() -> Result {
    let pages = 4 * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    let absent = BLOCK + 77;
    for page in mixed(pages).filter(|&page| page != absent) {
        slot.mark(State::Present, page)?;
        slot.check(page, 1)?;
    }
    for page in (0..pages).filter(|&page| page != absent) {
        slot.check(page, 1)?;
    }
    ensure_eq!(slot.counter("collapses")?, 3, "ranges mapped anew");
    let (small, huge) = (slot.counter("faults")?, slot.counter("faults-huge")?);
    for page in (0..pages).filter(|&page| page != absent) {
        slot.check(page, 1)?;
    }
    ensure_eq!(
        (slot.counter("faults")?, slot.counter("faults-huge")?),
        (small, huge),
        "faults when everything is mapped"
    );
    let waiting = slot.checker(absent, 1)?;
    ensure_eq!(slot.event()?.page, absent, "the event's page");
    slot.mark(State::Present, absent)?;
    waiting.join("the thread")?;
    for page in 0..pages {
        slot.check(page, 1)?;
    }
    // The last block makes all of it one range.
    ensure_eq!(
        slot.counter("collapses")?,
        4,
        "ranges mapped anew in the end"
    );
    Ok(())
}

/// Maps pages of a memslot at an address, or anywhere.
///
/// # Safety
///
/// Nothing else is there that anybody uses.
pub(super) unsafe fn map(
    memslot: &Memslot,
    at: Option<*mut u8>,
    first: u64,
    pages: u64,
) -> Result<*mut u8> {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    // SAFETY: by the caller's promise, or the kernel chooses.
    let address = unsafe {
        libc::mmap(
            at.unwrap_or(std::ptr::null_mut()).cast(),
            (pages * PAGE) as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | fixed,
            memslot.as_fd().as_raw_fd(),
            (first * PAGE) as libc::off_t,
        )
    };
    ensure!(
        address != libc::MAP_FAILED,
        "mmap: {}",
        std::io::Error::last_os_error()
    );
    Ok(address.cast())
}

/// Addresses that are aligned to 2 MiB, of which nothing is mapped.
pub(super) fn reserve(pages: u64) -> Result<*mut u8> {
    let bytes = (pages * PAGE) as usize + (4 << 20);
    // SAFETY: the kernel chooses addresses that nobody uses.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    ensure!(address != libc::MAP_FAILED, "mmap of {bytes} bytes failed");
    let address = (address as usize).next_multiple_of(2 << 20);
    Ok(address as *mut u8)
}

/// The address of a page in a mapping whose first page is this.
fn at(base: *mut u8, page: u64) -> *mut u64 {
    base.wrapping_add((page * PAGE) as usize).cast()
}

/// A process that maps three blocks from the middle: nothing beside them is touched, and they are huge.
fn part_of_a_memslot() -> Result {
    let slot = Slot::new(Backing::Huge2M, BLOCKS * BLOCK)?;
    let (first, pages) = (3 * BLOCK, 3 * BLOCK);
    let space = reserve(pages + 2 * BLOCK)?;
    let base = space.wrapping_add(2 << 20);
    // SAFETY: in the middle of what was reserved.
    unsafe { map(&slot.memslot, Some(base), first, pages)? };
    slot.mark(State::Present, first)?;
    touch(at(base, 0))?;
    slot.mark_range(State::Present, PageRange::new(0, BLOCKS * BLOCK))?;
    for page in 0..pages {
        touch(at(base, page))?;
    }
    ensure_eq!(slot.counter("collapses")?, 1, "ranges mapped anew");
    ensure_eq!(slot.counter("faults-huge")?, 3, "faults of blocks");
    let all = areas(space as usize, ((pages + 2 * BLOCK) * PAGE) as usize)?;
    let outside = all.iter().filter(|line| line.contains("---p")).count();
    ensure_eq!(outside, 2, "areas beside it, of {all:?}");
    Ok(())
}

/// Where an address cannot hold a huge entry nothing is ever mapped anew.
fn out_of_step() -> Result {
    let pages = 2 * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    let base = reserve(pages + BLOCK)?.wrapping_add(PAGE as usize);
    // SAFETY: inside what was reserved.
    unsafe { map(&slot.memslot, Some(base), 0, pages)? };
    slot.mark(State::Present, 0)?;
    touch(at(base, 0))?;
    slot.mark_range(State::Present, PageRange::new(0, pages))?;
    for page in 0..pages {
        touch(at(base, page))?;
    }
    ensure_eq!(slot.counter("collapses")?, 0, "ranges mapped anew");
    // The first page was mapped before the mark that made its block whole. A fault maps its window.
    ensure_eq!(
        slot.counter("faults")?,
        pages / WINDOW + 1,
        "faults of pages"
    );
    Ok(())
}

/// What madvise() and mprotect() have done to a part of the mapping is as it was after a collapse.
fn keeps_what_the_caller_set() -> Result {
    let pages = 4 * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    let block = |n: u64| slot.address(n * BLOCK).cast::<libc::c_void>();
    let bytes = (BLOCK * PAGE) as usize;
    // SAFETY: a part of the test's own mapping; what is not to be written is not written but to see that.
    unsafe {
        // What QEMU does to all of a guest's memory.
        sys::check(libc::madvise(block(0), 4 * bytes, libc::MADV_HUGEPAGE))?;
        sys::check(libc::madvise(block(1), bytes, libc::MADV_DONTFORK))?;
        sys::check(libc::mprotect(block(2), bytes, libc::PROT_READ))?;
    }
    for n in 0..4 {
        slot.mark(State::Present, n * BLOCK)?;
        touch(slot.address(n * BLOCK))?;
    }
    slot.mark_range(State::Present, PageRange::new(0, pages))?;
    for page in 0..pages {
        touch(slot.address(page))?;
    }
    ensure_eq!(
        slot.counter("collapses")?,
        4,
        "ranges mapped anew, each with flags of its own"
    );
    ensure_eq!(slot.counter("faults-huge")?, 4, "faults of blocks");
    let areas = areas(slot.guest.as_ptr() as usize, slot.guest.len())?;
    ensure!(
        areas.iter().filter(|line| line.contains(" r--s ")).count() == 1,
        "the block that is read-only: {areas:?}"
    );
    let inherited = slot.clone();
    let mut child = sys::Child::fork(move || {
        for n in [0, 2, 3] {
            touch(inherited.address(n * BLOCK))?;
        }
        match sys::load(inherited.address(BLOCK)) {
            Touched::Signal { signal, .. } if signal == libc::SIGSEGV => Ok(()),
            other => fail!("the child has what it should not inherit: {other:x?}"),
        }
    })?;
    child.join(PATIENCE)
}

/// Each process's page tables are its own: both become huge, each by its own touches.
fn two_processes() -> Result {
    let pages = 2 * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    let fill = |slot: &Slot| -> Result {
        for page in mixed(pages) {
            slot.mark(State::Present, page)?;
            slot.check(page, 1)?;
        }
        for page in 0..pages {
            slot.check(page, 1)?;
        }
        Ok(())
    };
    let other = slot.clone();
    let mut child = sys::Child::fork(move || fill(&other))?;
    for page in mixed(pages) {
        slot.mark(State::Present, page)?;
        slot.check(page, 1)?;
    }
    child.join(PATIENCE)?;
    let child_did = slot.counter("collapses")?;
    ensure!(child_did >= 1, "the child mapped {child_did} ranges anew");
    for page in 0..pages {
        slot.check(page, 1)?;
    }
    // Two blocks for each; one of them twice, if it was whole before the other.
    let huge = slot.counter("faults-huge")?;
    ensure!(
        (4..=6).contains(&huge),
        "{huge} faults of blocks, of both processes"
    );
    Ok(())
}

/// The VMM unmaps a block, and maps something else there, while others touch it: a range that is no longer
/// ours is never mapped over.
fn never_replaces_others() -> Result {
    const MARK: u8 = 0xa5;
    let pages = 2 * BLOCK;
    let bytes = (pages * PAGE) as usize;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    let base = reserve(pages)? as usize;
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for n in 0..3_u64 {
        let (slot, stop) = (slot.clone(), stop.clone());
        tasks.push(Task::work(move || {
            let mut turns = n;
            while !stop.load(Ordering::Acquire) {
                // A page that is absent for a moment leaves a page table behind.
                let page = turns * 37 % pages;
                if n == 0 {
                    slot.mark(State::Absent, page)?;
                    slot.mark(State::Present, page)?;
                }
                // Whatever is there: the memslot, other memory, or nothing.
                sys::load(at(base as *mut u8, turns * 91 % pages));
                turns += 1;
            }
            Ok(())
        })?);
    }
    slot.mark_range(State::Present, PageRange::new(0, pages))?;
    let result = (|| {
        let enough = rounds(80);
        let deadline = Instant::now() + PATIENCE;
        for round in 0.. {
            if round >= enough && (slot.counter("collapses")? > 0 || Instant::now() > deadline) {
                break;
            }
            // SAFETY: reserved by this test; its threads know that anything may be there.
            unsafe {
                map(&slot.memslot, Some(base as *mut u8), 0, pages)?;
                for _ in 0..round % 7 {
                    std::thread::yield_now();
                }
                // On a slow machine nothing is mapped anew so soon: longer and longer, until it was.
                std::thread::sleep(Duration::from_millis(round.saturating_sub(enough)));
                let other = libc::mmap(
                    base as *mut libc::c_void,
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                    -1,
                    0,
                );
                ensure!(other != libc::MAP_FAILED, "mmap of other memory failed");
                let memory = std::slice::from_raw_parts_mut(other.cast::<u8>(), bytes);
                for page in memory.chunks_mut(16 * PAGE as usize) {
                    page[round as usize % PAGE as usize] = MARK;
                }
                for _ in 0..3 {
                    std::thread::yield_now();
                    let lost = memory
                        .chunks(16 * PAGE as usize)
                        .position(|page| page[round as usize % PAGE as usize] != MARK);
                    ensure!(
                        lost.is_none(),
                        "other memory is gone at 64 KiB times {lost:?}, in round {round}"
                    );
                }
            }
        }
        Ok(())
    })();
    stop.store(true, Ordering::Release);
    for task in tasks {
        task.join("a thread")?;
    }
    result?;
    let collapses = slot.counter("collapses")?;
    ensure!(collapses > 0, "nothing was ever mapped anew");
    Ok(())
}

/// The fault that finds the block whole may be one of a system call, which must not notice.
fn system_call_goes_on() -> Result {
    let pages = 2 * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    for block in 0..2 {
        slot.mark(State::Present, block * BLOCK)?;
        touch(slot.address(block * BLOCK))?;
    }
    slot.mark_range(State::Present, PageRange::new(0, pages))?;
    let len = (pages * PAGE) as usize;
    let (reader, writer) = sys::pipe()?;
    let (from, expected) = (slot.clone(), len);
    let sender = Task::work(move || {
        let mut sent = 0;
        while sent < expected {
            sent += sys::write_from(
                writer.as_fd(),
                from.address(0).cast::<u8>().wrapping_add(sent),
                expected - sent,
            )?;
        }
        Ok(())
    })?;
    let mut read = Vec::new();
    std::io::Read::read_to_end(&mut fs::File::from(reader), &mut read)?;
    sender.join("the sender")?;
    ensure_eq!(read.len(), len, "bytes that went through the pipe");
    for page in 0..pages {
        let got = &read[(page * PAGE) as usize..((page + 1) * PAGE) as usize];
        ensure!(
            got == crate::content::bytes(page, 1).as_slice(),
            "page {page} has wrong bytes"
        );
    }
    // Window by window, as the memory was not mapped anew in the middle of the call; two had been touched before.
    ensure_eq!(
        slot.counter("faults")?,
        pages / WINDOW + 2,
        "faults of pages"
    );
    for page in 0..pages {
        slot.check(page, 1)?;
    }
    ensure_eq!(slot.counter("collapses")?, 1, "ranges mapped anew");
    ensure_eq!(slot.counter("faults-huge")?, 2, "faults of blocks");
    Ok(())
}
