// SPDX-License-Identifier: GPL-2.0

//! Memory errors that the kernel finds: 4 KiB are lost, in every memslot that has them, and nothing else. They are injected
//! (`hwpoison-inject`) into the very frames; what follows is the kernel's own handling.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Instant;

use kdp_vmm::{frame_of, Machine, MemoryErrors};
use kvm_demand_paging::handler::{Config, Handler};
use kvm_demand_paging::source::{FileSource, PageFile};
use kvm_demand_paging::{
    AliasMap, Backing, Cause, Event, EventKind, Memfd, PageRange, Paging, Poisoned, State, Vm,
};

use super::poison::{lost, run_into_loss};
use crate::check::{skip, Result};
use crate::content;
use crate::guest;
use crate::harness::rounds;
use crate::slot::{next_event, Slot, BACKINGS, BLOCK, GIGANTIC, GPA, ID, PAGE};
use crate::sys::{self, Touched};
use crate::tables::kvm_pages;
use crate::task::{until, Task};

tests! {
    "poison-error-costs-one-page" => costs_one_page,
    "poison-error-costs-one-page-of-1g" => costs_one_page_of_1g,
    "poison-error-beside-plain-hugetlb" => || beside_plain(Backing::Huge2M, BLOCK),
    "poison-error-beside-plain-hugetlb-of-1g" => || beside_plain(Backing::Huge1G, GIGANTIC),
    "poison-error-in-every-memslot" => in_every_memslot,
    "poison-error-in-an-absent-page" => in_an_absent_page,
    "poison-error-before-the-memslot" => before_the_memslot,
    "poison-error-after-the-vm-was-closed" => after_the_vm_was_closed,
    "poison-error-more-than-once" => more_than_once,
    "poison-error-for-guests" => for_guests,
    "poison-error-in-a-frame-that-is-not-ours" => in_a_frame_that_is_not_ours,
    "poison-error-under-a-handler" => under_a_handler,
    "poison-error-while-blocks-come-and-go" => while_blocks_come_and_go,
    // The kernel makes no frame good any more after it.
    "poison-error-by-a-machine-check" => by_a_machine_check,
}

/// The errors of a test. To be made before the memory.
pub(super) struct Errors(MemoryErrors);

impl Errors {
    pub(super) fn new() -> Result<Self> {
        if !MemoryErrors::are_possible() {
            return skip("this kernel cannot inject memory errors");
        }
        Ok(Self(MemoryErrors::new()))
    }

    /// An error in this frame of memory of this kind.
    pub(super) fn inject(&self, backing: Backing, frame: u64) -> Result {
        Ok(self.0.inject(backing, frame)?)
    }

    /// An error in a page that is mapped here.
    fn inject_at(&self, backing: Backing, at: *const u8) -> Result {
        self.inject(backing, frame_of(at)?)
    }

    /// An error in a page of a memslot.
    pub(super) fn inject_into(&self, backing: Backing, slot: &Slot, page: u64) -> Result {
        self.inject_at(backing, alias_of(&slot.alias, page))
    }
}

/// A page in the alias mapping, where it is mapped from now on.
pub(super) fn alias_of(alias: &AliasMap, page: u64) -> *const u8 {
    let at = alias.as_ptr().wrapping_add((page * PAGE) as usize);
    sys::load(at.cast());
    at
}

fn check_event(event: &Event, page: u64) -> Result {
    ensure_eq!(
        (
            event.kind,
            event.slot_id,
            event.page,
            event.gfn,
            event.waiters,
            event.tid
        ),
        (EventKind::Poisoned, ID, page, GPA / PAGE + page, 0, None),
        "the event"
    );
    Ok(())
}

fn bad(page: u64) -> Poisoned {
    Poisoned {
        range: PageRange::page(page),
        cause: Cause::Hardware,
    }
}

/// The page is lost to whoever touches it, and every other one is there.
fn costs_one_page() -> Result {
    let errors = Errors::new()?;
    for (backing, pages) in BACKINGS {
        for paging in [Paging::Off, Paging::OnPresent] {
            let slot = super::poison::present(backing, pages, paging)?;
            let page = pages / 2 + 7;
            for page in 0..pages {
                slot.check(page, 1)?;
            }
            let start = Instant::now();
            errors.inject_into(backing, &slot, page)?;
            check_event(&slot.event()?, page)?;
            println!("{backing:?}: {:?} from injection to event", start.elapsed());
            let at = slot.address(page);
            ensure_eq!(sys::load(at), lost(at), "a read");
            for page in (0..pages).filter(|&other| other != page) {
                slot.check(page, 1)?;
            }
            ensure_eq!(slot.vm.poisoned(ID)?, [bad(page)], "the list");
            slot.no_event()?;
            // The frame is bad: no call makes it good.
            let healed = slot.vm.heal(ID, &[PageRange::new(page - 1, 3)]);
            ensure!(
                healed
                    .as_ref()
                    .is_err_and(|e| e.errno() == Some(libc::EHWPOISON)),
                "KDP_POISON_HEAL came to {healed:?}"
            );
            ensure_eq!(sys::load(at), lost(at), "a read");
        }
    }
    Ok(())
}

/// Nor does it take more of a page of 1 GiB.
fn costs_one_page_of_1g() -> Result {
    let errors = Errors::new()?;
    let slot = Slot::new(Backing::Huge1G, GIGANTIC)?;
    let page = 77 * BLOCK + 5;
    let some = [0, page - 1, page + 1, page + BLOCK, GIGANTIC - 1];
    for other in some.into_iter().chain([page]) {
        slot.place(other, 1)?;
        slot.check(other, 1)?;
    }
    errors.inject_into(Backing::Huge1G, &slot, page)?;
    check_event(&slot.event()?, page)?;
    let at = slot.address(page);
    ensure_eq!(sys::load(at), lost(at), "a read");
    for other in some {
        slot.check(other, 1)?;
    }
    slot.vm.set_paging(ID, Paging::Off)?;
    ensure_eq!(sys::load(at), lost(at), "a read, with demand paging off");
    for other in some {
        slot.check(other, 1)?;
    }
    Ok(())
}

/// How many bytes of a mapping can no longer be read, by pages. A system call is told, no signal comes.
fn unreadable(memory: *const u8, pages: u64) -> Result<u64> {
    let sink = Memfd::create("sink", Backing::Shmem, PAGE)?;
    let mut bytes = 0;
    for page in 0..pages {
        let at = memory.wrapping_add((page * PAGE) as usize);
        match sys::write_from(sink.as_fd(), at, 8) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => bytes += PAGE,
            Err(e) => fail!("page {page}: {e}"),
        }
    }
    Ok(bytes)
}

/// The same error in memory of the same kind, without us and with us.
fn beside_plain(backing: Backing, pages: u64) -> Result {
    let errors = Errors::new()?;
    let slot = Slot::new(backing, pages)?;
    let page = pages / 3;
    let plain = Memfd::create("plain", backing, pages * PAGE)?;
    let plain = plain.map_all()?;
    slot.fill(page, 1)?;
    slot.vm.set_paging(ID, Paging::Off)?;
    plain.write(page, &content::bytes(page, 1))?;
    ensure_eq!(
        unreadable(plain.as_ptr(), pages)?,
        0,
        "bytes lost before, without us"
    );
    ensure_eq!(
        unreadable(slot.address(0).cast(), pages)?,
        0,
        "bytes lost before, with us"
    );
    errors.inject_at(backing, alias_of(&plain, page))?;
    errors.inject_into(backing, &slot, page)?;
    check_event(&slot.event()?, page)?;
    let without = unreadable(plain.as_ptr(), pages)?;
    let with = unreadable(slot.address(0).cast(), pages)?;
    println!("bytes lost: {without} without us, {with} with us");
    ensure_eq!(
        (without, with),
        (pages * PAGE, PAGE),
        "bytes lost without us, and with us"
    );
    Ok(())
}

/// Two VMs, three memslots, at different places of one memfd: each that has the page loses it, and its readers are told.
fn in_every_memslot() -> Result {
    let errors = Errors::new()?;
    for (backing, pages) in [(Backing::Shmem, 64), (Backing::Huge2M, 3 * BLOCK)] {
        let slot = super::poison::present(backing, pages, Paging::Off)?;
        let part = pages / 3 / BLOCK * BLOCK;
        let part = if part == 0 { 16 } else { part };
        let other = Vm::open()?;
        let second = other
            .create_memslot(1, &slot.memfd)
            .part(part * PAGE, pages - part)
            .create()?
            .map()?;
        let third = other
            .create_memslot(2, &slot.memfd)
            .base_gfn(1 << 20)
            .part(0, part)
            .create()?
            .map()?;
        let page = part + 9;
        for page in 0..pages {
            slot.check(page, 1)?;
        }
        let at_second = |page: u64| -> *const u64 {
            second
                .as_ptr()
                .wrapping_add(((page - part) * PAGE) as usize)
                .cast()
        };
        ensure_eq!(
            sys::load(at_second(page)),
            Touched::Value(content::word(page, 1, 0)),
            "a read"
        );
        errors.inject_into(backing, &slot, page)?;
        check_event(&slot.event()?, page)?;
        let event = next_event(&other)?;
        ensure_eq!(
            (event.kind, event.slot_id, event.page, event.gfn),
            (EventKind::Poisoned, 1, page - part, page - part),
            "the event of the other VM"
        );
        for at in [slot.address(page).cast_const(), at_second(page)] {
            ensure_eq!(sys::load(at), lost(at), "a read");
        }
        ensure_eq!(
            sys::load(at_second(page + 1)),
            Touched::Value(content::word(page + 1, 1, 0)),
            "a read beside it"
        );
        ensure_eq!(
            other.poisoned(1)?,
            [bad(page - part)],
            "the list of the second memslot"
        );
        ensure_eq!(other.poisoned(2)?, [], "the list of the third memslot");
        ensure_eq!(
            sys::load(third.as_ptr().cast()),
            Touched::Value(content::word(0, 1, 0)),
            "a read of the third memslot"
        );
        ensure!(
            !other.wait_event(Some(crate::task::MOMENT))?,
            "one more event"
        );
    }
    Ok(())
}

/// The content of an absent page is still to come, but not into that frame. Nobody had it mapped or pinned.
fn in_an_absent_page() -> Result {
    let errors = Errors::new()?;
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let page = 11;
        // The handler has begun to fill it.
        slot.fill(page, 1)?;
        errors.inject_into(backing, &slot, page)?;
        check_event(&slot.event()?, page)?;
        ensure_eq!(slot.vm.poisoned(ID)?, [bad(page)], "the list");
        let at = slot.address(page);
        ensure_eq!(sys::load(at), lost(at), "a read");
        slot.mark(State::Present, page)?;
        ensure_eq!(
            sys::load(at),
            lost(at),
            "a read of the page, marked present"
        );
        slot.no_event()?;
    }
    Ok(())
}

/// Nobody reads events any more; who has the memory mapped loses the page all the same, and nothing else.
fn after_the_vm_was_closed() -> Result {
    let errors = Errors::new()?;
    for (backing, pages) in BACKINGS {
        let page = pages / 2 + 7;
        let slot = super::poison::present(backing, pages, Paging::Off)?;
        let frame = frame_of(alias_of(&slot.alias, page))?;
        let guest = slot.guest.clone();
        let at = |page: u64| -> *const u64 {
            guest.as_ptr().wrapping_add((page * PAGE) as usize).cast()
        };
        for page in 0..pages {
            slot.check(page, 1)?;
        }
        drop(slot);
        errors.inject(backing, frame)?;
        until("the page is lost", || {
            Ok(sys::load(at(page)) == lost(at(page)))
        })?;
        for page in (0..pages).filter(|&other| other != page) {
            ensure_eq!(
                sys::load(at(page)),
                Touched::Value(content::word(page, 1, 0)),
                "page {page} of {backing:?}"
            );
        }
    }
    Ok(())
}

/// Memory that had errors before there was a memslot: no event told of them, and the first touch finds them, whoever's.
fn before_the_memslot() -> Result {
    for (backing, pages) in BACKINGS {
        let errors = Errors::new()?;
        let bad_pages = [5, pages - 3];
        let memfd = Memfd::create("bad", backing, pages * PAGE)?;
        let alias = memfd.map_all()?;
        for page in 0..pages {
            alias.write(page, &content::bytes(page, 1))?;
        }
        let frames = bad_pages.map(|page| frame_of(alias_of(&alias, page)));
        drop(alias);
        for frame in frames {
            errors.inject(backing, frame?)?;
        }
        let vm = Vm::open()?;
        let memslot = vm
            .create_memslot(ID, &memfd)
            .base_gfn(GPA / PAGE)
            .create()?;
        let guest = Arc::new(memslot.map()?);
        let at = |page: u64| {
            guest
                .as_ptr()
                .wrapping_add((page * PAGE) as usize)
                .cast::<u64>()
        };
        let machine = Machine::new(0)?;
        machine.map(GPA, kdp_vmm::GuestMemory::Paged(guest.clone()))?;
        let ran = guest::run(&mut machine.vcpu(0, &guest::peek(&[6]))?, guest::no_fault)?;
        ensure_eq!(ran.reports, [content::word(6, 1, 0)], "what a guest read");
        for page in 0..pages {
            let expected = if bad_pages.contains(&page) {
                lost(at(page))
            } else {
                Touched::Value(content::word(page, 1, 0))
            };
            ensure_eq!(sys::load(at(page)), expected, "page {page}");
        }
        ensure_eq!(vm.poisoned(ID)?, bad_pages.map(bad), "the list");
        // What the kernel found last may come to this memslot by its own way, and first.
        let mut told = [next_event(&vm)?, next_event(&vm)?];
        told.sort_by_key(|event| event.page);
        for (event, page) in told.iter().zip(bad_pages) {
            check_event(event, page)?;
        }
    }
    Ok(())
}

/// A second error in the same huge page, and one that is told of twice.
fn more_than_once() -> Result {
    let errors = Errors::new()?;
    let slot = super::poison::present(Backing::Huge2M, 2 * BLOCK, Paging::Off)?;
    for page in 0..2 * BLOCK {
        slot.check(page, 1)?;
    }
    // The alias of the huge page is gone with the first error: its frames are looked up before.
    let frames = [5, 300].map(|page| frame_of(alias_of(&slot.alias, page)));
    for (frame, page) in frames.into_iter().zip([5, 300]) {
        errors.inject(Backing::Huge2M, frame?)?;
        check_event(&slot.event()?, page)?;
    }
    ensure_eq!(slot.vm.poisoned(ID)?, [bad(5), bad(300)], "the list");
    for page in (0..2 * BLOCK).filter(|page| ![5, 300].contains(page)) {
        slot.check(page, 1)?;
    }
    for page in [5, 300] {
        let at = slot.address(page);
        ensure_eq!(sys::load(at), lost(at), "a read");
    }
    Ok(())
}

/// A guest is told of the page, and goes on with the others; blocks beside its own stay huge.
fn for_guests() -> Result {
    let errors = Errors::new()?;
    let pages = 3 * BLOCK;
    let slot = super::poison::signalling(Backing::Huge2M, pages, Paging::Off)?;
    let machine = slot.machine()?;
    let before = kvm_pages()?;
    let page = BLOCK + 40;
    let others = [0, page - 1, page + 1, 2 * BLOCK + 1];
    guest::run(
        &mut machine.vcpu(0, &guest::peek(&others))?,
        guest::no_fault,
    )?;
    ensure_eq!(kvm_pages()?.1 - before.1, 3, "entries of 2 MiB");
    errors.inject_into(Backing::Huge2M, &slot, page)?;
    check_event(&slot.event()?, page)?;
    ensure_eq!(
        kvm_pages()?.1 - before.1,
        2,
        "entries of 2 MiB, after the error"
    );
    let mut vcpu = machine.vcpu(1, &guest::peek(&[page]))?;
    run_into_loss(&mut vcpu, &slot, page)?;
    let ran = guest::run(
        &mut machine.vcpu(2, &guest::peek(&others))?,
        guest::no_fault,
    )?;
    ensure_eq!(
        ran.reports,
        others.map(|page| content::word(page, 1, 0)),
        "what the guest read"
    );
    ensure_eq!(kvm_pages()?.1 - before.1, 2, "entries of 2 MiB, at the end");
    Ok(())
}

/// The memfd has another frame by now than the one that the memslot has pinned: an error there takes nothing from the
/// memslot, until the page is brought in anew.
fn in_a_frame_that_is_not_ours() -> Result {
    let errors = Errors::new()?;
    let slot = Slot::new(Backing::Huge2M, BLOCK)?;
    slot.place(9, 1)?;
    slot.check(9, 1)?;
    slot.memfd.punch_hole(PageRange::new(0, BLOCK))?;
    slot.fill(9, 2)?;
    errors.inject_into(Backing::Huge2M, &slot, 9)?;
    slot.no_event()?;
    ensure_eq!(slot.vm.poisoned(ID)?, [], "the list");
    slot.check(9, 1)
}

/// Errors while threads touch the memory, blocks are mapped by one entry, and pages become absent and present: each takes
/// its page and no other, and nobody ever reads it again.
fn while_blocks_come_and_go() -> Result {
    let errors = Errors::new()?;
    let pages = 4 * BLOCK;
    for _ in 0..rounds(4) {
        let slot = super::poison::present(Backing::Huge2M, pages, Paging::OnPresent)?;
        let stop = Arc::new(AtomicBool::new(false));
        let victims: Vec<u64> = (0..4)
            .map(|block| block * BLOCK + 100 + 37 * block)
            .collect();
        let frames = victims
            .iter()
            .map(|&page| frame_of(alias_of(&slot.alias, page)));
        let frames = frames.collect::<kdp_vmm::Result<Vec<u64>>>()?;
        let mut tasks = Vec::new();
        for number in 0..3_u64 {
            let (slot, stop, victims) = (slot.clone(), stop.clone(), victims.clone());
            tasks.push(Task::work(move || -> Result {
                let mut turn = number;
                while !stop.load(Ordering::Acquire) {
                    let page = turn * 97 % pages;
                    if number == 0 && turn % 5 == 0 && !victims.contains(&page) {
                        slot.mark(State::Absent, page)?;
                        slot.mark(State::Present, page)?;
                    }
                    match sys::load(slot.address(page)) {
                        Touched::Value(word) => {
                            ensure_eq!(word, content::word(page, 1, 0), "page {page}");
                        }
                        told => {
                            ensure!(victims.contains(&page), "page {page} is lost");
                            ensure_eq!(told, lost(slot.address(page)), "page {page}");
                        }
                    }
                    turn += 1;
                }
                Ok(())
            })?);
        }
        for (i, (&page, &frame)) in victims.iter().zip(&frames).enumerate() {
            std::thread::sleep(std::time::Duration::from_millis(i as u64 * 3));
            errors.inject(Backing::Huge2M, frame)?;
            let known = || Ok(slot.vm.poisoned(ID)?.contains(&bad(page)));
            until("the page is known to be lost", known)?;
            let at = slot.address(page);
            ensure_eq!(sys::load(at), lost(at), "a read");
        }
        stop.store(true, Ordering::Release);
        for task in tasks {
            task.join("a thread")?;
        }
        for page in (0..pages).filter(|page| !victims.contains(page)) {
            slot.check(page, 1)?;
        }
        ensure_eq!(slot.vm.poisoned(ID)?.len(), victims.len(), "pages lost");
    }
    Ok(())
}

/// An error in a huge page that a handler is still filling: no mapping of it is left, and the handler goes on.
fn under_a_handler() -> Result {
    let errors = Errors::new()?;
    let pages = 2 * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    let file = super::source::file(super::source::tmp(), 0, pages, 1)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let layout = [(ID, 0)].into();
    let source = Box::new(FileSource::new(PageFile::open(path.as_ref(), 0)?));
    let config = Config {
        layout,
        ..Config::default()
    };
    let handler = Arc::new(Handler::new(slot.vm.try_clone()?, source, None, config)?);
    let serving = handler.clone();
    let serve = Task::work(move || -> Result { Ok(serving.run()?) })?;
    let page = 40;
    // Its frame is asked for by this process's mapping.
    slot.fill(page, 9)?;
    for page in (0..BLOCK).step_by(3) {
        slot.check(page, 1)?;
    }
    errors.inject_into(Backing::Huge2M, &slot, page)?;
    let known = || Ok(slot.vm.poisoned(ID)? == [bad(page)]);
    until("the page is known to be lost", known)?;
    // Those that were absent are filled still, but for the one without a frame.
    for page in (0..pages).filter(|&other| other != page) {
        slot.check(page, 1)?;
    }
    ensure_eq!(
        sys::load(slot.address(page)),
        lost(slot.address(page)),
        "a read"
    );
    // By pread(2) what is healthy can be read past the module, too.
    let mut bytes = [0; PAGE as usize];
    slot.memfd.read(page + 1, &mut bytes)?;
    ensure_eq!(bytes, content::bytes(page + 1, 1), "a page beside it");
    let read = slot.memfd.read(page, &mut bytes);
    ensure!(
        read.as_ref().is_err_and(|e| e.errno() == Some(libc::EIO)),
        "a read of the bad page came to {read:?}"
    );
    // It was absent, too: in a good frame it can be had.
    ensure_eq!(slot.vm.replace(ID, 0)?.healed, 1, "pages healed");
    for page in 0..pages {
        slot.check(page, 1)?;
    }
    handler.stop();
    serve.join("the handler")
}

/// The way that an error really comes: a bank of the CPU has it, the kernel's machine check code finds it there, and
/// hands it to memory_failure().
fn by_a_machine_check() -> Result {
    /// The emulator's monitor.
    const MONITOR: &str = "/dev/virtio-ports/kdp.monitor";
    /// How often the kernel looks into the banks, in seconds.
    const INTERVAL: &str = "/sys/devices/system/machinecheck/machinecheck0/check_interval";
    /// Valid, enabled, with an address; deferred: bad data that nobody has used yet. A DRAM error by its extended code
    /// (AMD64 Architecture Programmer's Manual, volume 2, "Machine Check Architecture").
    const STATUS: u64 = 0x9c00_1000_0008_0000;
    /// The northbridge's bank (amd_mce_usable_address() in arch/x86/kernel/cpu/mce/amd.c).
    const BANK: u32 = 4;
    let is_amd = fs::read_to_string("/proc/cpuinfo")?.contains("AuthenticAMD");
    if !fs::exists(MONITOR)? || !is_amd {
        return skip("it needs a VM whose monitor is at hand, and an AMD CPU");
    }
    for backing in [Backing::Huge2M, Backing::Shmem] {
        let slot = super::poison::present(backing, BLOCK, Paging::OnPresent)?;
        let page = 123;
        for page in 0..BLOCK {
            slot.check(page, 1)?;
        }
        let address = frame_of(alias_of(&slot.alias, page))? * PAGE;
        let usual = fs::read_to_string(INTERVAL)?;
        fs::write(INTERVAL, "1")?;
        let start = Instant::now();
        let command = format!("mce 0 {BANK} {STATUS:#x} 0 {address:#x} 0\n");
        fs::OpenOptions::new()
            .write(true)
            .open(MONITOR)?
            .write_all(command.as_bytes())?;
        let event = slot.event();
        fs::write(INTERVAL, usual.trim())?;
        check_event(&event?, page)?;
        println!("{:?} from the error to the event", start.elapsed());
        let at = slot.address(page);
        ensure_eq!(sys::load(at), lost(at), "a read");
        for page in (0..BLOCK).filter(|&other| other != page) {
            slot.check(page, 1)?;
        }
        ensure_eq!(slot.vm.poisoned(ID)?, [bad(page)], "the list");
    }
    Ok(())
}
