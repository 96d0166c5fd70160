// SPDX-License-Identifier: GPL-2.0

//! Huge entries on shmem, where the memfd holds large folios.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::sync::Arc;

use kdp_vmm::{Order, Touch};
use kvm_demand_paging::{Backing, Memfd, PageRange, Paging, State, Vm};

use super::collapse::random_guests_on;
use crate::check::{skip, Result};
use crate::guest;
use crate::numa::Setting;
use crate::slot::{Slot, BLOCK, GPA, ID, PAGE};
use crate::sys::{self, Touched};
use crate::tables::{kvm_pages, page_tables};
use crate::task::until;
use crate::vmm::KDP;

tests! {
    "huge-shmem-off-maps-blocks" => off_maps_blocks,
    "huge-shmem-off-maps-blocks-for-guests" => off_maps_blocks_for_guests,
    "huge-shmem-absent-page-splits-its-block" => absent_page_splits_its_block,
    "huge-shmem-small-folios-stay-small" => small_folios_stay_small,
    "huge-shmem-large-and-small-folios" => large_and_small_folios,
    "huge-shmem-folios-out-of-step-stay-small" => folios_out_of_step,
    "huge-shmem-hole-in-a-mapped-folio" => hole_in_a_mapped_folio,
    "huge-shmem-folio-that-was-replaced" => folio_that_was_replaced,
    "huge-shmem-file-is-huge-whatever-the-setting" => file_is_huge,
    "collapse-shmem-random-guests-exits" => || random_guests(true),
    "collapse-shmem-random-guests-waits" => || random_guests(false),
    "collapse-shmem-process" => process,
    "collapse-shmem-when-called" => when_called,
    "collapse-shmem-small-folios-are-left-alone" => small_folios_are_left_alone,
}

const BLOCKS: u64 = 4;

/// Sets which folios shmem allocates for files without a name, as long as the result lives.
pub(super) fn folios(value: &str) -> Result<Setting> {
    Setting::set("/sys/kernel/mm/transparent_hugepage/shmem_enabled", value)
}

/// Huge pages of shmem in the machine.
fn huge_pages() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("ShmemHugePages:"));
    match line.and_then(|line| line.trim().strip_suffix(" kB")) {
        Some(kib) => Ok(kib.trim().parse::<u64>()? >> 11),
        None => fail!("/proc/meminfo says nothing of ShmemHugePages"),
    }
}

/// Has the memfd allocate pages, in large folios or in small ones.
fn allocate(memfd: &Memfd, range: PageRange, large: bool) -> Result {
    let _folios = folios(if large { "always" } else { "never" })?;
    let before = huge_pages()?;
    // SAFETY: it allocates pages of a file.
    sys::check(unsafe {
        libc::fallocate(
            memfd.as_fd().as_raw_fd(),
            libc::FALLOC_FL_KEEP_SIZE,
            (range.first * PAGE) as libc::off_t,
            (range.count * PAGE) as libc::off_t,
        )
    })?;
    let expected = if large { range.count / BLOCK } else { 0 };
    ensure_eq!(huge_pages()? - before, expected, "huge pages of shmem");
    Ok(())
}

/// A memslot whose memory is all in large folios, or in small ones.
fn slot(pages: u64, large: bool, paging: bool) -> Result<Arc<Slot>> {
    let slot = Slot::with(Backing::Shmem, pages, |builder| builder.paging(paging))?;
    allocate(&slot.memfd, PageRange::new(0, pages), large)?;
    Ok(slot)
}

fn touch(slot: &Slot, page: u64) -> Result {
    match sys::load(slot.address(page)) {
        Touched::Value(_) => Ok(()),
        other => fail!("page {page}: {other:x?}"),
    }
}

/// Faults that mapped a page, and faults that mapped a block.
fn faults(slot: &Slot) -> Result<(u64, u64)> {
    Ok((slot.counter("faults")?, slot.counter("faults-huge")?))
}

/// One fault for a block and no page table below it.
fn off_maps_blocks() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = slot(pages, true, false)?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    slot.check(77, 1)?;
    let before = page_tables()?;
    for page in 0..pages {
        slot.check(page, 1)?;
    }
    ensure_eq!(faults(&slot)?, (0, BLOCKS), "faults of pages and of blocks");
    let grown = page_tables()?.saturating_sub(before);
    ensure!(
        grown < (BLOCKS - 1) * PAGE,
        "page tables have grown by {grown} bytes"
    );
    Ok(())
}

/// KVM maps it by 2 MiB.
fn off_maps_blocks_for_guests() -> Result {
    let slot = slot(BLOCKS * BLOCK, true, false)?;
    let machine = slot.machine()?;
    let before = kvm_pages()?;
    let visit = Touch::new(GPA, Order::sequential(slot.guest.pages()));
    guest::run(&mut machine.vcpu(0, &visit.program())?, guest::no_fault)?;
    let after = kvm_pages()?;
    ensure_eq!(after.1 - before.1, BLOCKS, "entries of 2 MiB");
    let small = after.0 - before.0;
    ensure!(small < 16, "{small} entries of 4 KiB");
    Ok(())
}

/// A page that becomes absent splits its block alone, and traps; the block is huge again
/// when it is back.
fn absent_page_splits_its_block() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = slot(pages, true, false)?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    let machine = slot.machine()?;
    let visit = |number: u64, count: u64, stride: u64| -> Result {
        let touch = Touch::new(GPA, Order::sequential(count)).stride(stride);
        guest::run(
            &mut machine.vcpu(number, &touch.program())?,
            guest::no_fault,
        )
        .map(drop)
    };
    let entries = kvm_pages()?;
    visit(0, BLOCKS, BLOCK)?;
    ensure_eq!(faults(&slot)?, (0, BLOCKS), "faults when all is present");
    ensure_eq!(kvm_pages()?.1 - entries.1, BLOCKS, "entries of 2 MiB");
    let absent = BLOCK + 201;
    ensure_eq!(slot.mark(State::Absent, absent)?, 1, "pages changed");
    ensure_eq!(
        kvm_pages()?.1 - entries.1,
        BLOCKS - 1,
        "entries of 2 MiB with a page absent"
    );
    slot.fill(absent, 2)?;
    for page in (0..pages).filter(|&page| page != absent) {
        slot.check(page, 1)?;
    }
    let (small, huge) = faults(&slot)?;
    ensure!(
        small > 0 && huge == BLOCKS,
        "faults of pages {small}, and of blocks {huge}, with a page absent"
    );
    let waiting = slot.checker(absent, 2)?;
    ensure_eq!(slot.event()?.page, absent, "the event's page");
    slot.mark(State::Present, absent)?;
    waiting.join("the thread")?;
    visit(1, BLOCKS, BLOCK)?;
    visit(2, BLOCKS, BLOCK)?;
    ensure_eq!(
        kvm_pages()?.1 - entries.1,
        BLOCKS,
        "entries of 2 MiB when it is back"
    );
    slot.check(absent, 2)
}

/// Small folios are mapped one by one.
fn small_folios_stay_small() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = slot(pages, false, false)?;
    for page in (0..pages).step_by(2) {
        touch(&slot, page)?;
    }
    ensure_eq!(
        faults(&slot)?,
        (pages / 2, 0),
        "faults of pages and of blocks"
    );
    let machine = slot.machine()?;
    let before = kvm_pages()?.1;
    let visit = Touch::new(GPA, Order::sequential(pages));
    guest::run(&mut machine.vcpu(0, &visit.program())?, guest::no_fault)?;
    ensure_eq!(kvm_pages()?.1, before, "entries of 2 MiB");
    Ok(())
}

/// Each block of one memfd is as its own folios are.
fn large_and_small_folios() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = Slot::with(Backing::Shmem, pages, |builder| builder.paging(false))?;
    for block in 0..BLOCKS {
        let range = PageRange::new(block * BLOCK, BLOCK);
        allocate(&slot.memfd, range, block % 2 == 1)?;
    }
    for page in 0..pages {
        slot.fill(page, 5)?;
    }
    let machine = slot.machine()?;
    let before = kvm_pages()?;
    let visit = Touch::new(GPA, Order::random(pages, 3));
    guest::run(&mut machine.vcpu(0, &visit.program())?, guest::no_fault)?;
    let after = kvm_pages()?;
    ensure_eq!(after.1 - before.1, BLOCKS / 2, "entries of 2 MiB");
    let small = after.0 - before.0;
    ensure!(
        (BLOCKS / 2 * BLOCK..BLOCKS / 2 * BLOCK + 16).contains(&small),
        "{small} entries of 4 KiB"
    );
    ensure_eq!(faults(&slot)?.1, BLOCKS / 2, "faults of blocks");
    for page in 0..pages {
        slot.check(page, 5)?;
    }
    ensure_eq!(slot.counter("collapses")?, 0, "ranges mapped anew");
    Ok(())
}

/// A memslot that begins in the middle of a folio has no block that is one: it stays small, and right.
fn folios_out_of_step() -> Result {
    const INTO: u64 = 100;
    let vm = Vm::open()?;
    let memfd = Memfd::create("kdp-behaviour", Backing::Shmem, 3 * BLOCK * PAGE)?;
    allocate(&memfd, PageRange::new(0, 3 * BLOCK), true)?;
    let memslot = vm
        .create_memslot(ID, &memfd)
        .base_gfn(GPA / PAGE)
        .part(INTO * PAGE, 2 * BLOCK)
        .create()?;
    let (guest, alias) = (memslot.map()?, memfd.map_all()?);
    for page in 0..2 * BLOCK {
        alias.write(INTO + page, &crate::content::bytes(page, 1))?;
    }
    for page in 0..2 * BLOCK {
        let at = guest.as_ptr().wrapping_add((page * PAGE) as usize);
        let words = crate::slot::words_at(at.cast())?;
        if let Err(wrong) = crate::content::check(&words, page, 1) {
            fail!("{wrong}");
        }
    }
    let huge = crate::slot::counter(memslot.as_fd(), "faults-huge")?;
    ensure_eq!(huge, 0, "faults of blocks");
    let report = vm.collapse(ID, PageRange::new(0, 2 * BLOCK))?;
    ensure_eq!(
        (report.collapsed, report.small),
        (0, 2 * BLOCK),
        "what a call for blocks says"
    );
    Ok(())
}

/// A hole is punched into a folio that is mapped by one entry. The hole reads as zeros, the rest stays.
fn hole_in_a_mapped_folio() -> Result {
    let slot = slot(BLOCK, true, false)?;
    for page in 0..BLOCK {
        slot.fill(page, 1)?;
    }
    slot.check(9, 1)?;
    slot.memfd.punch_hole(PageRange::new(100, 8))?;
    for page in 0..BLOCK {
        match page {
            100..108 => ensure_eq!(slot.words(page)?, [0; 512], "page {page}, in the hole"),
            _ => slot.check(page, 1)?,
        }
    }
    // Both views are of one memory.
    slot.fill(103, 2)?;
    slot.check(103, 2)
}

/// A folio was punched out, and another one is in its place: all pages are the new folio's.
fn folio_that_was_replaced() -> Result {
    let slot = slot(BLOCK, true, true)?;
    for page in 0..BLOCK {
        slot.fill(page, 1)?;
    }
    slot.mark(State::Present, 9)?;
    slot.check(9, 1)?;
    slot.memfd.punch_hole(PageRange::new(0, BLOCK))?;
    allocate(&slot.memfd, PageRange::new(0, BLOCK), true)?;
    for page in 0..BLOCK {
        slot.fill(page, 2)?;
    }
    slot.mark_range(State::Present, PageRange::new(0, BLOCK))?;
    until("the block is mapped by one entry", || {
        for page in 0..BLOCK {
            slot.check(page, 2)?;
        }
        Ok(slot.counter("faults-huge")? == 1)
    })
}

fn random_guests(exits: bool) -> Result {
    const BLOCKS: u64 = 16;
    random_guests_on(&slot(BLOCKS * BLOCK, true, true)?, 1, exits)
}

/// Without KVM: page tables go as the blocks become whole.
fn process() -> Result {
    let pages = BLOCKS * BLOCK;
    let slot = slot(pages, true, true)?;
    let before = page_tables()?;
    for page in Order::random(pages, 7).iter() {
        slot.place(page, 3)?;
        slot.check(page, 3)?;
    }
    for page in 0..pages {
        slot.check(page, 3)?;
    }
    let grown = page_tables()?.saturating_sub(before);
    ensure!(grown <= PAGE, "page tables have grown by {grown} bytes");
    let huge = slot.counter("faults-huge")?;
    ensure!(huge >= BLOCKS, "{huge} faults of {BLOCKS} blocks");
    Ok(())
}

/// What the call says of a whole block, one that lacks a page, and one of small folios; and that it is so.
fn when_called() -> Result {
    let slot = Slot::new(Backing::Shmem, 3 * BLOCK)?;
    allocate(&slot.memfd, PageRange::new(0, 2 * BLOCK), true)?;
    allocate(&slot.memfd, PageRange::new(2 * BLOCK, BLOCK), false)?;
    let present = slot.memslot.bitmap()?;
    for page in 0..3 * BLOCK {
        slot.fill(page, 1)?;
    }
    for page in (0..3 * BLOCK - 1).filter(|&page| page != BLOCK - 1 && page != BLOCK + 300) {
        present.set(page);
        slot.check(page, 1)?;
    }
    // They become whole without a fault or a call that would find it out.
    present.set(BLOCK - 1);
    present.set(3 * BLOCK - 1);
    ensure_eq!(slot.counter("collapses")?, 0, "ranges mapped anew, unasked");
    let report = slot.vm.collapse(ID, PageRange::new(0, 3 * BLOCK))?;
    ensure_eq!(
        (
            report.collapsed,
            report.incomplete,
            report.small,
            report.missing
        ),
        (BLOCK, BLOCK, BLOCK, Some(BLOCK + 300)),
        "what the call says"
    );
    for page in (0..3 * BLOCK).filter(|&page| page != BLOCK + 300) {
        slot.check(page, 1)?;
    }
    ensure_eq!(slot.counter("collapses")?, 1, "ranges mapped anew");
    ensure_eq!(slot.counter("faults-huge")?, 1, "faults of blocks");
    // A memslot that nobody has touched.
    let other = self::slot(2 * BLOCK, true, true)?;
    other.mark_range(State::Present, PageRange::new(0, BLOCK))?;
    let report = other.vm.collapse(ID, PageRange::new(0, 2 * BLOCK))?;
    ensure_eq!(
        (report.collapsed, report.incomplete, report.small),
        (BLOCK, BLOCK, 0),
        "what the call says of pages that nobody has touched"
    );
    Ok(())
}

/// No thrash: nothing is mapped anew where it would not help.
fn small_folios_are_left_alone() -> Result {
    let slot = slot(2 * BLOCK, false, true)?;
    for page in Order::random(2 * BLOCK, 7).iter() {
        slot.place(page, 3)?;
        slot.check(page, 3)?;
    }
    let before = faults(&slot)?;
    for page in 0..2 * BLOCK {
        slot.check(page, 3)?;
    }
    ensure_eq!(faults(&slot)?, before, "faults when everything is mapped");
    ensure_eq!(slot.counter("collapses")?, 0, "ranges mapped anew");
    ensure_eq!(before.1, 0, "faults of blocks");
    Ok(())
}

/// A file of KDP_MEMFD has folios of 2 MiB although the host's settings give none to memfds. The
/// module maps each whole block by one entry, and `kdp stat` shows that.
fn file_is_huge() -> Result {
    let _folios = folios("never")?;
    let vm = Vm::open()?;
    if !vm.info()?.features.huge_shmem() {
        return skip("this kernel has no transparent huge pages");
    }
    let memfd = Memfd::create_huge_shmem(&vm, 2 * BLOCK * PAGE)?;
    let before = huge_pages()?;
    let slot = Slot::of(vm, memfd, |builder| {
        builder.base_gfn(GPA / PAGE).paging(true)
    })?;
    slot.place(BLOCK + 1, 1)?;
    slot.check(BLOCK + 1, 1)?;
    ensure_eq!(huge_pages()? - before, 1, "huge pages after one page");
    ensure_eq!(faults(&slot)?, (1, 0), "faults of pages and of blocks");
    for page in 0..BLOCK {
        slot.place(page, 1)?;
    }
    for page in 0..BLOCK {
        slot.check(page, 1)?;
    }
    ensure_eq!(huge_pages()? - before, 2, "huge pages after a block");
    ensure_eq!(faults(&slot)?, (1, 1), "faults of pages and of blocks");
    let output = Command::new(KDP)
        .args(["stat", "--json", &std::process::id().to_string()])
        .output()?;
    let stat: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let address = format!("{:#x}", slot.address(0) as u64);
    let Some(mappings) = stat["mappings"].as_array() else {
        fail!("kdp stat says nothing of mappings: {stat}");
    };
    let Some(ours) = mappings
        .iter()
        .find(|mapping| mapping["address"] == *address)
    else {
        fail!("kdp stat says nothing of {address}: {stat}");
    };
    let kib = |name: &str| ours["values"][name].as_u64();
    ensure_eq!(kib("size-kib"), Some(4096), "KiB in all");
    ensure_eq!(kib("huge-kib"), Some(2048), "KiB in blocks");
    ensure_eq!(kib("rss-kib"), Some(2052), "KiB mapped");
    // KVM also maps the block by one entry.
    let machine = slot.machine()?;
    let mut vcpu = machine.vcpu(0, &Touch::new(GPA, Order::sequential(BLOCK)).program())?;
    let before = kvm_pages()?;
    guest::run(&mut vcpu, guest::no_fault)?;
    ensure_eq!(kvm_pages()?.1 - before.1, 1, "entries of 2 MiB in KVM");
    Ok(())
}
