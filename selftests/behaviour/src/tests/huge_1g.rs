// SPDX-License-Identifier: GPL-2.0

//! Memslots on 1 GiB pages: entries of 2 MiB map them, none is larger.

use kdp_vmm::{Order, Touch};
use kvm_demand_paging::{Backing, Cause, Memslot, PageRange, Paging, State};

use super::collapse::{map, reserve};
use super::huge::{faults, plain_mmap_is_aligned, touch};
use super::lifetime::sigbus;
use super::poison::lost;
use crate::check::Result;
use crate::content;
use crate::guest;
use crate::kernel_log::KernelLog;
use crate::slot::{Slot, BLOCK, GIGANTIC, GPA, ID, PAGE};
use crate::sys::{self, Touched};
use crate::tables::{kvm_pages, page_tables};
use crate::task::Task;

tests! {
    "huge-1g-mmap-is-aligned" => || plain_mmap_is_aligned(Backing::Huge1G, GIGANTIC),
    "huge-1g-off-maps-blocks" => off_maps_blocks,
    "huge-1g-absent-page-splits-its-block" => absent_page_splits_its_block,
    "huge-1g-moved-mapping-is-gone" => moved_mapping_is_gone,
    "huge-1g-splits-inside-a-block-end" => splits_inside_a_block_end,
}

/// The first page of each block.
fn blocks() -> impl Iterator<Item = u64> {
    (0..GIGANTIC).step_by(BLOCK as usize)
}

/// A memslot on 1 GiB pages is one fault for each 2 MiB, and for a guest one entry of stage-2.
fn off_maps_blocks() -> Result {
    let slot = Slot::with(Backing::Huge1G, GIGANTIC, |b| b.paging(false))?;
    let before = page_tables()?;
    for page in blocks().flat_map(|first| [first + 7, first + 8]) {
        touch(&slot, page)?;
    }
    ensure_eq!(faults(&slot)?, (0, BLOCK), "faults of pages and of blocks");
    // Two tables hold all entries, if the mapping is not aligned to 1 GiB, and another may hold those.
    let grown = page_tables()?.saturating_sub(before);
    ensure!(grown < 4 * PAGE, "page tables have grown by {grown} bytes");
    let machine = slot.machine()?;
    let entries = kvm_pages()?;
    let visit = Touch::new(GPA, Order::sequential(BLOCK)).stride(BLOCK);
    guest::run(&mut machine.vcpu(0, &visit.program())?, guest::no_fault)?;
    let now = kvm_pages()?;
    ensure_eq!(
        (now.1 - entries.1, now.2 - entries.2),
        (BLOCK, 0),
        "entries of 2 MiB and of 1 GiB"
    );
    Ok(())
}

/// One absent page: 511 pages around it are small, 511 blocks around those are 2 MiB; and all are 2 MiB again when it
/// is back.
fn absent_page_splits_its_block() -> Result {
    const ABSENT: u64 = 77 * BLOCK + 3;
    let slot = Slot::with(Backing::Huge1G, GIGANTIC, |b| b.paging(false))?;
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    let machine = slot.machine()?;
    let visit = |number: u64, first: u64, count: u64, stride: u64| -> Result {
        let touch = Touch::new(GPA, Order::sequential(count))
            .first(first)
            .stride(stride);
        let mut vcpu = machine.vcpu(number, &touch.program())?;
        guest::run(&mut vcpu, guest::no_fault).map(drop)
    };
    let before = kvm_pages()?;
    visit(0, 0, BLOCK, BLOCK)?;
    let whole = kvm_pages()?;
    ensure_eq!(
        (whole.1 - before.1, whole.2 - before.2),
        (BLOCK, 0),
        "entries of 2 MiB and of 1 GiB when all is present"
    );
    ensure_eq!(faults(&slot)?, (0, BLOCK), "faults when all is present");
    ensure_eq!(slot.mark(State::Absent, ABSENT)?, 1, "pages changed");
    visit(1, 0, BLOCK, BLOCK)?;
    visit(2, ABSENT + 1, 100, 1)?;
    let split = kvm_pages()?;
    ensure_eq!(
        (split.1, split.2),
        (whole.1 - 1, whole.2),
        "entries of 2 MiB and of 1 GiB with a page absent"
    );
    let small = split.0 - whole.0;
    ensure!((101..130).contains(&small), "{small} entries of 4 KiB");
    slot.mark(State::Present, ABSENT)?;
    visit(3, 0, BLOCK, BLOCK)?;
    visit(4, 0, BLOCK, BLOCK)?;
    let again = kvm_pages()?;
    ensure_eq!(
        (again.1, again.2),
        (whole.1, whole.2),
        "entries of 2 MiB and of 1 GiB when it is back"
    );
    Ok(())
}

/// A mapping at an address of the test's own, which is aligned to 1 GiB. The addresses above it, for two more, are the
/// test's, too.
struct Mapped(usize);

impl Mapped {
    fn new(memslot: &Memslot) -> Result<Self> {
        let space = reserve(4 * GIGANTIC)? as usize;
        let start = space.next_multiple_of(1 << 30);
        // SAFETY: inside what was reserved.
        unsafe { map(memslot, Some(start as *mut u8), 0, GIGANTIC)? };
        Ok(Self(start))
    }

    fn address(&self, page: u64) -> *mut u64 {
        (self.0 + (page * PAGE) as usize) as *mut u64
    }

    fn read(&self, pages: impl Iterator<Item = u64>) -> Result {
        for page in pages {
            self.expect(page, Touched::Value(content::word(page, 1, 0)))?;
        }
        Ok(())
    }

    fn expect(&self, page: u64, what: Touched) -> Result {
        ensure_eq!(sys::load(self.address(page)), what, "a read of page {page}");
        Ok(())
    }

    /// Nothing is mapped there.
    fn expect_none(&self, page: u64) -> Result {
        let at = self.address(page);
        ensure_eq!(
            sys::load(at),
            segv(SEGV_MAPERR, at),
            "a read of page {page} at {at:p}, where nothing is mapped"
        );
        // SAFETY: it is guest memory, or in no mapping.
        let write = unsafe { sys::store(at, 0) };
        ensure_eq!(
            write,
            segv(SEGV_MAPERR, at),
            "a write to page {page} at {at:p}, where nothing is mapped"
        );
        Ok(())
    }
}

/// Nothing is mapped there.
const SEGV_MAPERR: i32 = 1;
/// What is mapped there does not allow that access.
const SEGV_ACCERR: i32 = 2;

fn segv(code: i32, at: *const u64) -> Touched {
    Touched::Signal {
        signal: libc::SIGSEGV,
        code,
        address: at as u64,
        lsb: 0,
    }
}

/// mremap() of a mapping that has an entry for each block leaves none of them at the old address, wherever it goes: in
/// step with 1 GiB, with 2 MiB only, or with neither. So nobody reaches the memory after the memslot was removed, when
/// it is unpinned.
fn moved_mapping_is_gone() -> Result {
    const BYTES: usize = (GIGANTIC * PAGE) as usize;
    // What the CPU has in its TLB shall stay there.
    sys::stay_on_cpu(0)?;
    let mut log = KernelLog::from_now()?;
    let slot = Slot::with(Backing::Huge1G, GIGANTIC, |b| b.paging(false))?;
    for page in blocks() {
        slot.fill(page, 1)?;
    }
    for shift in [0, 2 << 20, PAGE as usize] {
        // The memslot is removed at once, while the old address may be in a TLB, or after the new one was read.
        for is_read in [false, true] {
            let other = slot.vm.create_memslot(ID + 1, &slot.memfd);
            let other = other.paging(false).create()?;
            let from = Mapped::new(&other)?;
            from.read(blocks().chain([0]))?;
            let to = Mapped(from.0 + BYTES + shift);
            // SAFETY: both are addresses that this test has reserved.
            let at = unsafe {
                libc::mremap(
                    from.0 as *mut libc::c_void,
                    BYTES,
                    BYTES,
                    libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                    to.0 as *mut libc::c_void,
                )
            };
            ensure!(
                at as usize == to.0,
                "mremap: {}",
                std::io::Error::last_os_error()
            );
            if is_read {
                to.read(blocks())?;
            }
            slot.vm.remove_memslot(ID + 1)?;
            for page in blocks() {
                from.expect_none(page)?;
            }
            for page in blocks() {
                to.expect(page, sigbus(to.address(page)))?;
            }
        }
    }
    ensure_eq!(log.errors()?, [""; 0], "errors in the kernel's log");
    Ok(())
}

/// What splits a mapping inside a block ends, and every other page reads as before. The mapping has an entry for each
/// block.
fn splits_inside_a_block_end() -> Result {
    type Split = fn(&Slot, *mut libc::c_void, usize) -> Result;
    const MUNMAP: Split = |_, at, len| {
        // SAFETY: a part of the test's own mapping.
        sys::check(unsafe { libc::munmap(at, len) })?;
        Ok(())
    };
    const MPROTECT: Split = |_, at, len| {
        // SAFETY: a part of the test's own mapping.
        sys::check(unsafe { libc::mprotect(at, len, libc::PROT_READ) })?;
        Ok(())
    };
    const DONTFORK: Split = |_, at, len| Ok(sys::advise(at.cast(), len, libc::MADV_DONTFORK)?);
    const DONTDUMP: Split = |_, at, len| Ok(sys::advise(at.cast(), len, libc::MADV_DONTDUMP)?);
    const RANDOM: Split = |_, at, len| Ok(sys::advise(at.cast(), len, libc::MADV_RANDOM)?);
    const POISON: Split = |slot, _, _| {
        let page = PageRange::page(first(5));
        let marked = slot.vm.poison(ID, &[page], Cause::Emulated)?;
        ensure_eq!(marked.changed, 1, "pages poisoned");
        Ok(())
    };
    /// In the middle of a block, and to the middle of the next but one; of poison the first page alone.
    const fn first(nth: u64) -> u64 {
        (20 * nth + 10) * BLOCK + 3
    }
    const COUNT: u64 = 2 * BLOCK;
    let splits = [
        ("munmap", MUNMAP),
        ("mprotect", MPROTECT),
        ("MADV_DONTFORK", DONTFORK),
        ("MADV_DONTDUMP", DONTDUMP),
        ("MADV_RANDOM", RANDOM),
        ("KDP_POISON_SET", POISON),
    ];
    let mut log = KernelLog::from_now()?;
    // Who sends signals makes lost pages areas of their own.
    let slot = Slot::with(Backing::Huge1G, GIGANTIC, |b| {
        b.paging(false).poison_signals(true)
    })?;
    let mut pages: Vec<u64> = blocks()
        .chain(blocks().map(|page| page + BLOCK - 1))
        .collect();
    for nth in 0..splits.len() as u64 {
        let end = first(nth) + COUNT;
        pages.extend([first(nth) - 1, first(nth), first(nth) + 1, end - 1, end]);
    }
    for &page in &pages {
        slot.fill(page, 1)?;
    }
    let mapped = Mapped::new(&slot.memslot)?;
    mapped.read(pages.iter().copied())?;
    let (_, huge) = faults(&slot)?;

    for (nth, (what, split)) in splits.into_iter().enumerate() {
        let (at, slot) = (mapped.address(first(nth as u64)) as usize, slot.clone());
        let done =
            Task::spawn(move || split(&slot, at as *mut libc::c_void, (COUNT * PAGE) as usize))?;
        done.join(what)??;
    }
    // A touch of a lost page is an error that the kernel logs.
    ensure_eq!(log.errors()?, [""; 0], "errors in the kernel's log");
    let in_part = |nth: u64, page: u64| (first(nth)..first(nth) + COUNT).contains(&page);
    let poisoned = first(5);
    for &page in &pages {
        let at = mapped.address(page);
        if in_part(0, page) {
            mapped.expect_none(page)?;
        } else if page == poisoned {
            mapped.expect(page, lost(at))?;
        } else {
            let word = content::word(page, 1, 0);
            mapped.expect(page, Touched::Value(word))?;
            // SAFETY: it is guest memory, and the same word.
            let write = unsafe { sys::store(at, word) };
            let expected = match in_part(1, page) {
                true => segv(SEGV_ACCERR, at),
                false => Touched::Value(0),
            };
            ensure_eq!(write, expected, "a write to page {page}");
        }
    }
    ensure_eq!(
        faults(&slot)?.1,
        huge,
        "faults of blocks: the others keep their entries"
    );
    slot.vm.heal(ID, &[PageRange::page(poisoned)])?;
    mapped.read([poisoned, poisoned - 1, poisoned + 1].into_iter())
}
