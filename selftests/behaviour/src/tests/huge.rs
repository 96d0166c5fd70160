// SPDX-License-Identifier: GPL-2.0

//! How large the entries are that map guest memory.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use kdp_vmm::{Order, Stop, Touch};
use kvm_demand_paging::{Backing, PageRange, Paging, State};

use crate::check::Result;
use crate::content;
use crate::guest;
use crate::harness::rounds;
use crate::slot::{Slot, BLOCK, GPA, ID, PAGE, WINDOW};
use crate::sys::{self, Touched};
use crate::tables::{kvm_pages, page_tables};
use crate::task::{until, Task};

tests! {
    "huge-off-maps-blocks" => off_maps_blocks,
    "huge-off-maps-blocks-for-guests" => off_maps_blocks_for_guests,
    "huge-absent-page-splits-its-block" => absent_page_splits_its_block,
    "huge-absent-page-splits-its-block-for-guests" => absent_page_splits_for_guests,
    "huge-whole-block-under-paging" => whole_block_under_paging,
    "huge-plain-mmap-is-aligned" => || plain_mmap_is_aligned(Backing::Huge2M, BLOCKS * BLOCK),
    "huge-off-after-small-pages" => off_after_small_pages,
    "huge-first-touches-keep-reservations" => first_touches_keep_reservations,
}

const BLOCKS: u64 = 4;

pub(super) fn touch(slot: &Slot, page: u64) -> Result {
    match sys::load(slot.address(page)) {
        Touched::Value(_) => Ok(()),
        other => fail!("page {page}: {other:x?}"),
    }
}

/// Threads that touch a huge page at once whose memory is not allocated yet, one of them past the module: the kernel's
/// count of reserved huge pages is as before when all is given back. Were it off by one below, it would wrap around, and
/// nobody could reserve a huge page any more.
fn first_touches_keep_reservations() -> Result {
    let reserved = || -> Result<u64> {
        let text =
            std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages")?;
        Ok(text.trim().parse()?)
    };
    let before = reserved()?;
    for _ in 0..rounds(100) {
        // The other blocks stay reserved: it is their reservations that would be taken.
        let slot = Slot::new(Backing::Huge2M, 8 * BLOCK)?;
        slot.mark_range(State::Present, PageRange::new(0, BLOCK))?;
        let start = Arc::new(Barrier::new(5));
        let mut threads = vec![];
        for n in 0..4 {
            let (slot, start) = (slot.clone(), start.clone());
            threads.push(Task::work(move || {
                start.wait();
                touch(&slot, n)
            })?);
        }
        start.wait();
        slot.fill(9, 1)?;
        for thread in threads {
            thread.join("a thread")?;
        }
    }
    until("all is given back", || Ok(reserved()? == before))
}

/// Faults that mapped a page, and faults that mapped a block.
pub(super) fn faults(slot: &Slot) -> Result<(u64, u64)> {
    Ok((slot.counter("faults")?, slot.counter("faults-huge")?))
}

/// With demand paging off a memslot on 2 MiB pages is mapped by entries of 2 MiB: one fault for a block,
/// and no page table below it.
fn off_maps_blocks() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = Slot::with(Backing::Huge2M, pages, |builder| builder.paging(false))?;
    touch(&slot, 0)?;
    let before = page_tables()?;
    for page in 0..pages {
        touch(&slot, page)?;
    }
    ensure_eq!(faults(&slot)?, (0, BLOCKS), "faults of pages and of blocks");
    // Three more tables of entries for 4 KiB would be 12 KiB.
    let grown = page_tables()?.saturating_sub(before);
    ensure!(
        grown < (BLOCKS - 1) * PAGE,
        "page tables have grown by {grown} bytes"
    );
    Ok(())
}

/// The same for a guest: KVM maps it by 2 MiB.
fn off_maps_blocks_for_guests() -> Result {
    let slot = Slot::with(Backing::Huge2M, BLOCKS * BLOCK, |b| b.paging(false))?;
    let machine = slot.machine()?;
    let before = kvm_pages()?;
    let order = Order::sequential(slot.guest.pages());
    let mut vcpu = machine.vcpu(0, &Touch::new(GPA, order).program())?;
    guest::run(&mut vcpu, guest::no_fault)?;
    let after = kvm_pages()?;
    ensure_eq!(after.1 - before.1, BLOCKS, "entries of 2 MiB");
    // The machine's own memory is mapped by 4 KiB.
    let small = after.0 - before.0;
    ensure!(small < 16, "{small} entries of 4 KiB");
    ensure_eq!(faults(&slot)?, (0, BLOCKS), "faults of pages and of blocks");
    Ok(())
}

/// One absent page in a block: its neighbours are mapped by 4 KiB; the blocks beside it stay whole.
fn absent_page_splits_its_block() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = Slot::with(Backing::Huge2M, pages, |builder| builder.paging(false))?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    for page in 0..pages {
        touch(&slot, page)?;
    }
    ensure_eq!(faults(&slot)?, (0, BLOCKS), "faults when all is present");
    let absent = BLOCK + 200;
    ensure_eq!(slot.mark(State::Absent, absent)?, 1, "pages changed");
    slot.fill(absent, 2)?;
    for page in (0..pages).filter(|&page| page != absent) {
        slot.check(page, 1)?;
    }
    ensure_eq!(
        faults(&slot)?,
        // A fault maps a page's neighbours, too.
        (BLOCK / WINDOW, BLOCKS),
        "faults when one page is absent"
    );
    let waiting = slot.checker(absent, 2)?;
    ensure_eq!(slot.event()?.page, absent, "the event's page");
    slot.mark(State::Present, absent)?;
    waiting.join("the thread")
}

/// The same for a guest: KVM has no entry of 2 MiB for that block, even if it had one before.
fn absent_page_splits_for_guests() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = Slot::with(Backing::Huge2M, pages, |builder| builder.paging(false))?;
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    let machine = slot.machine()?;
    let before = kvm_pages()?;
    let guest_reads = |number, from, count| guest::read_pages(&machine, number, from, count);
    guest_reads(0, 0, pages)?;
    ensure_eq!(kvm_pages()?.1 - before.1, BLOCKS, "entries of 2 MiB");
    let small = kvm_pages()?.0;
    // The first page of the second block.
    ensure_eq!(slot.mark(State::Absent, BLOCK)?, 1, "pages changed");
    ensure_eq!(
        kvm_pages()?.1 - before.1,
        BLOCKS - 1,
        "entries of 2 MiB, after the call"
    );
    guest_reads(1, 0, BLOCK)?;
    guest_reads(2, BLOCK + 1, pages - BLOCK - 1)?;
    ensure_eq!(
        kvm_pages()?.1 - before.1,
        BLOCKS - 1,
        "entries of 2 MiB, in the end"
    );
    let grown = kvm_pages()?.0 - small;
    ensure!(
        (BLOCK - 1..BLOCK + 15).contains(&grown),
        "{grown} entries of 4 KiB for the rest of a block"
    );
    Ok(())
}

/// A block that became whole page by page, before anybody touched it, is mapped by one entry.
fn whole_block_under_paging() -> Result {
    let slot = Slot::new(Backing::Huge2M, BLOCKS * BLOCK)?;
    let present = slot.memslot.bitmap()?;
    for page in 0..BLOCK {
        slot.fill(page, 1)?;
        present.set(page);
    }
    slot.mark_range(State::Present, PageRange::new(BLOCK, BLOCK - 1))?;
    for page in 0..BLOCK {
        slot.check(page, 1)?;
    }
    ensure_eq!(faults(&slot)?, (0, 1), "faults of the whole block");
    touch(&slot, BLOCK)?;
    ensure_eq!(
        faults(&slot)?,
        (1, 1),
        "faults after one in a block that lacks a page"
    );
    Ok(())
}

/// mmap() of a memslot without a wish for an address gives one that huge entries fit to.
pub(super) fn plain_mmap_is_aligned(backing: Backing, pages: u64) -> Result {
    let slot = Slot::with(backing, pages, |b| b.paging(false))?;
    let bytes = slot.guest.len();
    for _ in 0..4 {
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses. The mapping stays until
        // the process ends.
        let address = unsafe {
            // Something small in between, so that no address is aligned by chance.
            libc::mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                slot.memslot.as_fd().as_raw_fd(),
                0,
            )
        };
        ensure!(
            address != libc::MAP_FAILED,
            "mmap: {}",
            std::io::Error::last_os_error()
        );
        ensure_eq!(
            address as usize % (2 << 20),
            0,
            "the address's place in 2 MiB"
        );
        let (small, huge) = faults(&slot)?;
        ensure!(
            matches!(sys::load(address.cast()), Touched::Value(_)),
            "the mapping cannot be read"
        );
        ensure_eq!(
            faults(&slot)?,
            (small, huge + 1),
            "faults of the new mapping"
        );
    }
    Ok(())
}

/// What was mapped by 4 KiB while it was paged is mapped by blocks when paging is switched off, for a guest
/// that runs all the while, too, and the bytes are right.
fn off_after_small_pages() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    const STRIDE: u64 = 64;
    let small = pages / STRIDE;
    for page in (0..pages).step_by(STRIDE as usize) {
        slot.mark(State::Present, page)?;
        slot.check(page, 1)?;
    }
    let machine = slot.machine()?;
    let before = kvm_pages()?;
    let touch = Touch::new(GPA, Order::sequential(small))
        .stride(STRIDE)
        .rounds(u64::MAX);
    let mut expected = 0_u64;
    for page in touch.pages() {
        let word = content::word(page, 1, 0).wrapping_mul(2 * page + 1);
        expected = expected.wrapping_add(word);
    }
    let mut vcpu = machine.vcpu(0, &touch.program())?;
    let (sums, stop) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let (counted, stopped) = (sums.clone(), stop.clone());
    let guest = Task::work(move || -> Result {
        while !stopped.load(Ordering::Acquire) {
            match vcpu.run()? {
                Stop::Report(sum) => {
                    ensure_eq!(sum, expected, "the guest's checksum");
                    counted.fetch_add(1, Ordering::AcqRel);
                }
                Stop::Start => {}
                other => fail!("KVM_RUN returned {other:x?}"),
            }
        }
        Ok(())
    })?;
    let another_sum = || {
        let seen = sums.load(Ordering::Acquire);
        // The one after the next one was begun after this.
        until("the guest goes over its memory", || {
            Ok(sums.load(Ordering::Acquire) > seen + 1)
        })
    };
    another_sum()?;
    ensure_eq!(kvm_pages()?.1, before.1, "entries of 2 MiB while paging");
    ensure_eq!(faults(&slot)?, (small, 0), "faults while paging");

    slot.vm.set_paging(ID, Paging::Off)?;
    another_sum()?;
    ensure_eq!(
        kvm_pages()?.1 - before.1,
        BLOCKS,
        "entries of 2 MiB when it is off"
    );
    ensure_eq!(faults(&slot)?.1, BLOCKS, "faults of blocks when it is off");
    ensure_eq!(slot.counter("collapses")?, 1, "ranges mapped anew");
    stop.store(true, Ordering::Release);
    guest.join("the guest")?;
    for page in (0..pages).step_by(100) {
        slot.check(page, 1)?;
    }
    Ok(())
}
