// SPDX-License-Identifier: GPL-2.0

//! Pages whose bytes are lost: invariant 5, a poisoned page is never mapped, at any size, by anyone, until it is
//! healed.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use kdp_vmm::{Machine, Stop, Vcpu};
use kvm_demand_paging::{
    abi, Backing, Cause, FaultExit, PageRange, Paging, Poisoned, Reason, State,
};

use super::collapse::reserve;
use super::source::{file, tmp};
use crate::check::{skip, Result};
use crate::content;
use crate::guest;
use crate::harness::{on_debug_kernel, rounds};
use crate::slot::{Slot, BACKINGS, BLOCK, GPA, ID, PAGE, WINDOW};
use crate::sys::{self, Child, Touched};
use crate::tables::kvm_pages;
use crate::task::{until, Task, PATIENCE};

tests! {
    "poison-touch-is-a-machine-check" => touch_is_a_machine_check,
    "poison-system-call-fails" => system_call_fails,
    "poison-vcpu-exits" => vcpu_exits,
    "poison-vcpu-without-exits-fails" => vcpu_without_exits_fails,
    "poison-vcpu-machine-check" => vcpu_machine_check,
    "poison-handed-on" => handed_on,
    "poison-vcpu-signal" => vcpu_signal,
    "poison-vcpu-signal-with-exits-on" => vcpu_signal_with_exits_on,
    "poison-vcpu-signal-under-stress" => vcpu_signal_under_stress,
    "poison-vcpu-signal-leaves-the-rest" => vcpu_signal_leaves_the_rest,
    "poison-vcpu-signal-not-without-areas" => vcpu_signal_not_without_areas,
    "poison-vcpu-signal-mapped-afterwards" => vcpu_signal_mapped_afterwards,
    "poison-in-every-process" => in_every_process,
    "poison-wakes-who-waits" => wakes_who_waits,
    "poison-never-mapped-shmem" => || never_mapped(Backing::Shmem),
    "poison-never-mapped-hugetlb" => || never_mapped(Backing::Huge2M),
    "poison-splits-only-its-block" => splits_only_its_block,
    "poison-splits-only-its-block-for-guests" => splits_only_its_block_for_guests,
    "poison-healed-block-is-huge-again" => healed_block_is_huge_again,
    "poison-is-beside-the-other-state" => beside_the_other_state,
    "poison-healed-zero-page-is-zeros" => healed_zero_page_is_zeros,
    "poison-of-a-sourced-page" => of_a_sourced_page,
}

pub(super) fn poison(slot: &Slot, page: u64) -> Result {
    let marked = slot
        .vm
        .poison(ID, &[PageRange::page(page)], Cause::Emulated)?;
    ensure_eq!(marked.changed, 1, "pages poisoned");
    Ok(())
}

pub(super) fn heal(slot: &Slot, page: u64) -> Result {
    let marked = slot.vm.heal(ID, &[PageRange::page(page)])?;
    ensure_eq!(marked.changed, 1, "pages healed");
    Ok(())
}

/// What an access to a lost page is: a memory error of 4 KiB.
pub(super) fn lost(at: *const u64) -> Touched {
    /// Hardware memory error consumed on a machine check: action required.
    const BUS_MCEERR_AR: i32 = 4;
    Touched::sigbus(BUS_MCEERR_AR, at, 12)
}

/// A memslot whose pages are all there, in this version.
pub(super) fn present(backing: Backing, pages: u64, paging: Paging) -> Result<Arc<Slot>> {
    let slot = Slot::new(backing, pages)?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    slot.vm.set_paging(ID, paging)?;
    Ok(slot)
}

/// Whoever reads or writes a lost page from user mode; the pages beside it are as before. Demand paging may be off.
fn touch_is_a_machine_check() -> Result {
    for (backing, pages) in BACKINGS {
        for paging in [Paging::Off, Paging::OnPresent] {
            let slot = present(backing, pages, paging)?;
            let page = pages / 2 + 5;
            slot.check(page, 1)?;
            poison(&slot, page)?;
            let at = slot.address(page);
            ensure_eq!(sys::load(at), lost(at), "a read");
            // SAFETY: it is guest memory.
            ensure_eq!(unsafe { sys::store(at, 1) }, lost(at), "a write");
            let last = at.wrapping_add(PAGE as usize / 8 - 1);
            ensure_eq!(sys::load(last), lost(last), "a read of the last word");
            for page in (0..pages).filter(|&other| other != page) {
                slot.check(page, 1)?;
            }
            ensure_eq!(slot.counter("poisoned-touches")?, 3, "touches counted");
            slot.no_event()?;
            heal(&slot, page)?;
            slot.check(page, 1)?;
        }
    }
    Ok(())
}

/// A copy in the kernel fails, and is no end of anybody.
fn system_call_fails() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = present(backing, pages, Paging::OnPresent)?;
        let (reader, writer) = sys::pipe()?;
        poison(&slot, 7)?;
        let write = sys::write_from(writer.as_fd(), slot.address(7).cast(), 8);
        ensure_eq!(
            write.map_err(|e| e.raw_os_error()),
            Err(Some(libc::EFAULT)),
            "write(2) from a lost page"
        );
        sys::write_from(writer.as_fd(), slot.address(6).cast(), 8)?;
        // SAFETY: it is guest memory.
        let read = unsafe { sys::read_to(reader.as_fd(), slot.address(7).cast(), 8) };
        ensure_eq!(
            read.map_err(|e| e.raw_os_error()),
            Err(Some(libc::EFAULT)),
            "read(2) to a lost page"
        );
        heal(&slot, 7)?;
        slot.check(7, 1)?;
    }
    Ok(())
}

/// A vCPU with exits on is told, each time it tries; once the page is healed it goes on.
fn vcpu_exits() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = present(backing, pages, Paging::OnPresent)?;
        let machine = slot.machine()?;
        poison(&slot, 9)?;
        let mut vcpu = machine.vcpu(0, &guest::peek(&[8, 9, 10]))?;
        let exiting = slot.clone();
        let task = Task::work(move || -> Result<_> {
            exiting.vm.set_vcpu_exits(true)?;
            let mut exits = 0;
            guest::run(&mut vcpu, |fault| {
                ensure_eq!(
                    (fault.gpa, fault.flags),
                    (guest::gpa(9), abi::KDP_EXIT_POISONED),
                    "the exit"
                );
                let exit = FaultExit::decode(fault.flags, fault.gpa, fault.size);
                ensure_eq!(
                    exit.map(|exit| exit.reason),
                    Some(Reason::Poisoned),
                    "the exit, decoded"
                );
                exits += 1;
                if exits == 3 {
                    heal(&exiting, 9)?;
                }
                Ok(())
            })
        })?;
        let ran = task.join("the vCPU")?;
        ensure_eq!(ran.faults.len(), 3, "exits");
        let words = [8, 9, 10].map(|page| content::word(page, 1, 0));
        ensure_eq!(ran.reports, words, "what the guest read");
        ensure_eq!(slot.counter("exits")?, 3, "exits counted");
    }
    Ok(())
}

/// What a VMM makes of the exit: its guest takes a machine check, and learns from its CPU which page is lost.
fn vcpu_machine_check() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = present(backing, pages, Paging::OnPresent)?;
        let machine = slot.machine()?;
        let lost_pages = [9, 11];
        slot.vm
            .poison(ID, &lost_pages.map(PageRange::page), Cause::Emulated)?;
        let mut vcpu = machine.vcpu(0, &guest::peek_or_lose(&[8, 9, 10, 11, 12]))?;
        vcpu.handle_machine_checks(guest::PEEK_HANDLER)?;
        let exiting = slot.clone();
        let task = Task::work(move || {
            exiting.vm.set_vcpu_exits(true)?;
            guest::run_with(&mut vcpu, |vcpu, fault| {
                ensure_eq!(fault.flags, abi::KDP_EXIT_POISONED, "the exit's reason");
                Ok(vcpu.inject_memory_error(fault.gpa)?)
            })
        })?;
        let ran = task.join("the vCPU")?;
        let word = |page| content::word(page, 1, 0);
        let (first, second) = (guest::gpa(9), guest::gpa(11));
        ensure_eq!(
            ran.reports,
            [
                word(8),
                first,
                u64::MAX,
                word(10),
                second,
                u64::MAX,
                word(12)
            ],
            "what the guest read, and was told"
        );
        ensure_eq!(ran.faults.len(), 2, "exits");
    }
    Ok(())
}

/// A guest that goes to another VMM takes its losses with it: there they are inherited, whatever they were.
fn handed_on() -> Result {
    for (backing, pages) in BACKINGS {
        let from = present(backing, pages, Paging::Off)?;
        let lost_pages = [PageRange::new(3, 2), PageRange::page(40)];
        from.vm.poison(ID, &lost_pages, Cause::Emulated)?;
        let list = from.vm.poisoned(ID)?;
        drop(from);

        let to = present(backing, pages, Paging::OnPresent)?;
        ensure_eq!(
            to.vm.inherit_poison(ID, &list)?.changed,
            3,
            "pages poisoned"
        );
        ensure_eq!(
            to.vm.poisoned(ID)?,
            lost_pages.map(|range| Poisoned {
                range,
                cause: Cause::Inherited,
            }),
            "the list"
        );
        for page in 0..pages {
            let at = to.address(page);
            if [3, 4, 40].contains(&page) {
                ensure_eq!(sys::load(at), lost(at), "a read of page {page}");
            } else {
                to.check(page, 1)?;
            }
        }
        ensure_eq!(
            to.vm.inherit_poison(ID, &[])?.changed,
            0,
            "pages of an empty list"
        );
    }
    Ok(())
}

/// KVM_RUN fails with EFAULT, and says no more.
fn run_fails(vcpu: &mut Vcpu) -> Result {
    let failed = vcpu.run().map_err(|e| e.to_string());
    ensure!(
        matches!(&failed, Err(e) if e.contains("Bad address")),
        "KVM_RUN came to {failed:x?}"
    );
    Ok(())
}

/// A vCPU whose thread did not ask never gets at the page. On hugetlb KVM_RUN fails; on shmem KVM
/// knows of the memory error.
fn vcpu_without_exits_fails() -> Result {
    sys::note_bus_errors();
    for (backing, pages) in BACKINGS {
        let slot = present(backing, pages, Paging::Off)?;
        let machine = slot.machine()?;
        poison(&slot, 9)?;
        let mut vcpu = machine.vcpu(0, &guest::peek(&[9]))?;
        for _ in 0..3 {
            match backing {
                Backing::Shmem => run_into_loss(&mut vcpu, &slot, 9)?,
                _ => run_fails(&mut vcpu)?,
            }
        }
        heal(&slot, 9)?;
        let ran = guest::run(&mut vcpu, guest::no_fault)?;
        ensure_eq!(ran.reports, [content::word(9, 1, 0)], "what the guest read");
    }
    Ok(())
}

/// The same, where the memslot is for VMMs that do not know us.
pub(super) fn signalling(backing: Backing, pages: u64, paging: Paging) -> Result<Arc<Slot>> {
    let slot = Slot::with(backing, pages, |builder| {
        builder.paging(true).poison_signals(true)
    })?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    slot.vm.set_paging(ID, paging)?;
    sys::note_bus_errors();
    Ok(slot)
}

/// Enters a guest that is going to touch a lost page.
pub(super) fn run_into_loss(vcpu: &mut Vcpu, slot: &Slot, page: u64) -> Result {
    let stop = vcpu.run()?;
    ensure!(
        matches!(stop, Stop::Interrupted),
        "KVM_RUN came to {stop:x?}"
    );
    ensure_eq!(
        sys::bus_error(),
        Some(lost(slot.address(page))),
        "what the thread was told"
    );
    Ok(())
}

/// KVM_RUN ends as for any signal, and the signal says which 4 KiB are lost: each time, until it is healed.
fn vcpu_signal() -> Result {
    for (backing, pages) in BACKINGS {
        for paging in [Paging::Off, Paging::OnPresent] {
            let slot = signalling(backing, pages, paging)?;
            let machine = slot.machine()?;
            poison(&slot, 9)?;
            let mut vcpu = machine.vcpu(0, &guest::peek(&[9, 10]))?;
            for _ in 0..3 {
                run_into_loss(&mut vcpu, &slot, 9)?;
            }
            // As before for a process, which is where the VMM does its own accesses.
            let at = slot.address(9);
            ensure_eq!(sys::load(at), lost(at), "a read of the process");
            heal(&slot, 9)?;
            let ran = guest::run(&mut vcpu, guest::no_fault)?;
            let words = [9, 10].map(|page| content::word(page, 1, 0));
            ensure_eq!(ran.reports, words, "what the guest read");
            slot.check(9, 1)?;
            // Poisoned once more.
            poison(&slot, 9)?;
            let mut vcpu = machine.vcpu(1, &guest::peek(&[9]))?;
            run_into_loss(&mut vcpu, &slot, 9)?;
        }
    }
    Ok(())
}

/// It is the memslot's choice: exits for absent pages, the signal for lost ones.
fn vcpu_signal_with_exits_on() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = signalling(backing, pages, Paging::On)?;
        let machine = slot.machine()?;
        poison(&slot, 9)?;
        let mut vcpu = machine.vcpu(0, &guest::peek(&[8, 9]))?;
        let exiting = slot.clone();
        let task = Task::work(move || -> Result {
            exiting.vm.set_vcpu_exits(true)?;
            let stop = vcpu.run()?;
            let absent = matches!(&stop, Stop::Fault(fault) if fault.flags == abi::KDP_EXIT_ABSENT);
            ensure!(absent, "KVM_RUN came to {stop:x?}");
            exiting.place(8, 1)?;
            ensure!(
                matches!(vcpu.run()?, Stop::Report(_)),
                "no report of page 8"
            );
            run_into_loss(&mut vcpu, &exiting, 9)?;
            heal(&exiting, 9)?;
            let stop = vcpu.run()?;
            let absent = matches!(&stop, Stop::Fault(fault) if fault.flags == abi::KDP_EXIT_ABSENT);
            ensure!(absent, "KVM_RUN came to {stop:x?} once page 9 was healed");
            exiting.place(9, 1)?;
            guest::run(&mut vcpu, guest::no_fault).map(drop)
        })?;
        task.join("the vCPU")?;
    }
    Ok(())
}

/// Several vCPUs at one lost page after the other, each healed while they try: KVM_RUN never fails, no guest reads anything
/// but the pages' bytes.
fn vcpu_signal_under_stress() -> Result {
    const VCPUS: u64 = 4;
    for (backing, pages) in BACKINGS {
        let slot = signalling(backing, pages, Paging::OnPresent)?;
        let machine = slot.machine()?;
        let touched: Arc<Vec<u64>> =
            Arc::new((0..60).map(|i| 2 * i % pages + 2 * i / pages).collect());
        for &page in touched.iter() {
            poison(&slot, page)?;
        }
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks = Vec::new();
        for number in 0..VCPUS {
            let mut vcpu = machine.vcpu(number, &guest::peek(&touched))?;
            let (slot, next, touched) = (slot.clone(), next.clone(), touched.clone());
            tasks.push(Task::work(move || -> Result<u64> {
                sys::stay_on_cpu(number)?;
                reads_and_losses(&mut vcpu, &slot, &touched, &next)
            })?);
        }
        // Each page is healed once all, or some, have been told of it.
        for (i, &page) in touched.iter().enumerate() {
            let told = slot.counter("poisoned-touches")? + 2 * (i as u64 % VCPUS) + 1;
            until("the vCPUs are told", || {
                Ok(slot.counter("poisoned-touches")? >= told)
            })?;
            next.store(i as u64 + 1, Ordering::Release);
            heal(&slot, page)?;
        }
        let mut losses = 0;
        for task in tasks {
            losses += task.join_long("a vCPU")?;
        }
        ensure!(losses > touched.len() as u64, "{losses} signals");
    }
    Ok(())
}

/// Runs a guest that reads these pages, of which `next` and all behind it may be lost; how often it was told so.
fn reads_and_losses(
    vcpu: &mut Vcpu,
    slot: &Slot,
    touched: &[u64],
    next: &AtomicU64,
) -> Result<u64> {
    let mut losses = 0;
    for (i, &page) in touched.iter().enumerate() {
        let word = loop {
            match vcpu.run()? {
                Stop::Report(word) => break word,
                Stop::Interrupted => {
                    let told = sys::bus_error();
                    ensure_eq!(
                        told,
                        Some(lost(slot.address(page))),
                        "what the thread was told"
                    );
                    losses += 1;
                }
                other => fail!("KVM_RUN came to {other:x?}"),
            }
        };
        ensure!(
            next.load(Ordering::Acquire) > i as u64,
            "page {page} was read, and is lost"
        );
        ensure_eq!(word, content::word(page, 1, 0), "what the guest read");
    }
    Ok(losses)
}

/// The area of its own that a lost page is goes when it is healed and touched: blocks are mapped by one entry as before.
fn vcpu_signal_leaves_the_rest() -> Result {
    let pages = 2 * BLOCK;
    let slot = signalling(Backing::Huge2M, pages, Paging::OnPresent)?;
    let machine = slot.machine()?;
    let areas =
        || -> Result<usize> { Ok(std::fs::read_to_string("/proc/self/maps")?.lines().count()) };
    for page in 0..pages {
        slot.check(page, 1)?;
    }
    let before = areas()?;
    let mut vcpu = machine.vcpu(0, &guest::peek(&[9]))?;
    let running = areas()?;
    poison(&slot, 9)?;
    ensure_eq!(
        areas()?,
        running + 2,
        "areas of the process, with a lost page"
    );
    run_into_loss(&mut vcpu, &slot, 9)?;
    ensure_eq!(areas()?, running + 2, "areas of the process, told of it");
    heal(&slot, 9)?;
    for page in (0..pages).chain(0..pages) {
        slot.check(page, 1)?;
    }
    drop(vcpu);
    ensure!(
        areas()? <= before + 1,
        "areas of the process: {}, {before} before",
        areas()?
    );
    let huge = slot.counter("faults-huge")?;
    // Both at first, and once the first was whole again: that one, or both.
    ensure!(huge >= 3, "{huge} faults of blocks");
    Ok(())
}

/// A VMM that maps the memslot when pages are lost already, as one does that was handed a list of them; and its child.
fn vcpu_signal_mapped_afterwards() -> Result {
    let pages = 2 * BLOCK;
    let slot = signalling(Backing::Huge2M, pages, Paging::OnPresent)?;
    let lost_pages = [3, 4, BLOCK + 9];
    for page in lost_pages {
        poison(&slot, page)?;
    }
    let other = Arc::new(slot.memslot.map()?);
    let own_areas = || -> Result<usize> {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        Ok(maps
            .lines()
            .filter(|line| line.contains("kvm-demand-paging-memslot"))
            .count())
    };
    // In the first mapping pages 3 and 4 became areas one after the other, in the second at once.
    until("the lost pages are areas of their own", || {
        Ok(own_areas()? == 6 + 5)
    })?;
    let machine = Machine::new(0)?;
    machine.map(GPA, kdp_vmm::GuestMemory::Paged(other.clone()))?;
    let at = |page: u64| {
        other
            .as_ptr()
            .wrapping_add((page * PAGE) as usize)
            .cast::<u64>()
    };
    for (number, page) in (0..).zip(lost_pages) {
        let mut vcpu = machine.vcpu(number, &guest::peek(&[page]))?;
        let stop = vcpu.run()?;
        ensure!(
            matches!(stop, Stop::Interrupted),
            "KVM_RUN came to {stop:x?}"
        );
        ensure_eq!(
            sys::bus_error(),
            Some(lost(at(page))),
            "what the thread was told"
        );
    }
    drop(machine);
    let inherited = slot.clone();
    let mut child = Child::fork(move || {
        for page in lost_pages {
            let at = inherited.address(page);
            ensure_eq!(sys::load(at), lost(at), "a read of the child");
        }
        inherited.check(5, 1)
    })?;
    child.join(PATIENCE)?;
    slot.vm.heal(ID, &[PageRange::new(0, pages)])?;
    for page in 0..pages {
        slot.check(page, 1)?;
    }
    Ok(())
}

/// Where the process has too many areas, KVM_RUN fails as it does without the flag, and goes on when it has fewer.
fn vcpu_signal_not_without_areas() -> Result {
    const AREAS: u64 = 34_000;
    if on_debug_kernel() {
        return skip("so many areas take minutes to make there");
    }
    let slot = signalling(Backing::Huge2M, BLOCK, Paging::OnPresent)?;
    let machine = slot.machine()?;
    let mut vcpu = machine.vcpu(0, &guest::peek(&[9]))?;
    let many = reserve(AREAS)?;
    for page in (0..AREAS).step_by(2) {
        // SAFETY: reserved by this test, and not used.
        let ret = unsafe {
            libc::mprotect(
                many.wrapping_add((page * PAGE) as usize).cast(),
                PAGE as usize,
                libc::PROT_READ,
            )
        };
        sys::check(ret)?;
    }
    poison(&slot, 9)?;
    for _ in 0..3 {
        run_fails(&mut vcpu)?;
    }
    // SAFETY: reserved by this test, and not used.
    sys::check(unsafe { libc::munmap(many.cast(), (AREAS * PAGE) as usize) })?;
    run_into_loss(&mut vcpu, &slot, 9)
}

/// Two processes that map the memslot lose the same page, whoever said so.
fn in_every_process() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = present(backing, pages, Paging::Off)?;
        let page = pages - 3;
        slot.check(page, 1)?;
        let other = slot.clone();
        let (told, tell) = sys::pipe()?;
        let (answered, answer) = sys::pipe()?;
        let mut child = Child::fork(move || {
            let mut byte = 0_u8;
            other.check(page, 1)?;
            sys::write_from(answer.as_fd(), [1_u8].as_ptr(), 1)?;
            // SAFETY: the byte is this process's own.
            unsafe { sys::read_to(told.as_fd(), &mut byte, 1)? };
            let at = other.address(page);
            ensure_eq!(sys::load(at), lost(at), "a read of the other process");
            other.check(page - 1, 1)
        })?;
        let mut byte = 0_u8;
        // SAFETY: the byte is this process's own.
        unsafe { sys::read_to(answered.as_fd(), &mut byte, 1)? };
        poison(&slot, page)?;
        sys::write_from(tell.as_fd(), [1_u8].as_ptr(), 1)?;
        child.join(PATIENCE)?;
        let at = slot.address(page);
        ensure_eq!(sys::load(at), lost(at), "a read");
    }
    Ok(())
}

/// Who waits for an absent page learns that its bytes will not come.
fn wakes_who_waits() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let page = pages - 1;
        let mut waiting = slot.toucher(page)?;
        ensure_eq!(slot.event()?.page, page, "the event's page");
        waiting.still_waits("a thread")?;
        poison(&slot, page)?;
        let at = slot.address(page);
        ensure_eq!(waiting.join("who waits")?, lost(at), "what it got");
        // Nor does anybody wait for it any more.
        ensure_eq!(sys::load(at), lost(at), "a read");
        slot.no_event()?;
        heal(&slot, page)?;
        let waiting = slot.checker(page, 2)?;
        ensure_eq!(slot.event()?.page, page, "the event's page");
        slot.place(page, 2)?;
        waiting.join("who waits for the healed page")?;
    }
    Ok(())
}

/// Threads read without a pause while a page is poisoned and healed again and again, its block mapped by one entry in
/// between: nobody gets at it between the end of the one call and the beginning of the other.
fn never_mapped(backing: Backing) -> Result {
    const HEALTHY: u64 = 0;
    const POISONED: u64 = 1;
    const STOP: u64 = 2;
    let slot = present(backing, BLOCK, Paging::OnPresent)?;
    let page = 300;
    // Odd while the page is poisoned, and the low bits of what is going on above it.
    let phase = Arc::new(AtomicU64::new(HEALTHY));
    let mut tasks = Vec::new();
    for number in 0..3_u64 {
        let (slot, phase) = (slot.clone(), phase.clone());
        tasks.push(Task::work(move || -> Result<(u64, u64)> {
            let at = slot.address(page);
            let (mut reads, mut losses) = (0, 0);
            loop {
                let before = phase.load(Ordering::Acquire);
                if before == STOP {
                    return Ok((reads, losses));
                }
                let touched = sys::load(at);
                let after = phase.load(Ordering::Acquire);
                match touched {
                    Touched::Value(word) => {
                        ensure_eq!(word, content::word(page, 1, 0), "what was read");
                        let throughout = before == after && before & 1 == POISONED;
                        ensure!(!throughout, "thread {number} has read a poisoned page");
                        reads += 1;
                    }
                    other => {
                        ensure_eq!(other, lost(at), "what thread {number} got");
                        losses += 1;
                    }
                }
                // A neighbour, so that the block is mapped in every way.
                slot.check((page + 1 + number) % BLOCK, 1)?;
            }
        })?);
    }
    for round in 1..=rounds(400) {
        poison(&slot, page)?;
        phase.store((round << 2) | POISONED, Ordering::Release);
        let at = slot.address(page);
        ensure_eq!(sys::load(at), lost(at), "a read");
        phase.store(round << 2, Ordering::Release);
        heal(&slot, page)?;
        slot.check(page, 1)?;
    }
    phase.store(STOP, Ordering::Release);
    let (mut reads, mut losses) = (0, 0);
    for task in tasks {
        let (read, lost) = task.join("a reader")?;
        reads += read;
        losses += lost;
    }
    ensure!(
        reads > 0 && losses > 0,
        "{reads} reads, {losses} losses: the readers have not seen both"
    );
    Ok(())
}

fn faults(slot: &Slot) -> Result<(u64, u64)> {
    Ok((slot.counter("faults")?, slot.counter("faults-huge")?))
}

/// The block of a lost page is mapped page by page, the blocks beside it by one entry as before.
fn splits_only_its_block() -> Result {
    const BLOCKS: u64 = 4;
    let pages = BLOCKS * BLOCK;
    for paging in [Paging::Off, Paging::OnPresent] {
        let slot = present(Backing::Huge2M, pages, paging)?;
        for page in 0..pages {
            slot.check(page, 1)?;
        }
        ensure_eq!(faults(&slot)?, (0, BLOCKS), "faults when all is healthy");
        let page = BLOCK + 200;
        poison(&slot, page)?;
        for page in (0..pages).filter(|&other| other != page) {
            slot.check(page, 1)?;
        }
        ensure_eq!(
            faults(&slot)?,
            // A fault maps a page's neighbours, too.
            (BLOCK / WINDOW, BLOCKS),
            "faults when one page is lost"
        );
        let at = slot.address(page);
        ensure_eq!(sys::load(at), lost(at), "a read");
        let report = slot.vm.collapse(ID, PageRange::new(0, pages))?;
        ensure_eq!(
            (report.incomplete, report.missing),
            (BLOCK, Some(page)),
            "what KDP_COLLAPSE says of the block"
        );
    }
    Ok(())
}

/// The same in KVM's stage-2.
fn splits_only_its_block_for_guests() -> Result {
    const BLOCKS: u64 = 4;
    let pages = BLOCKS * BLOCK;
    let slot = present(Backing::Huge2M, pages, Paging::Off)?;
    let machine = slot.machine()?;
    let before = kvm_pages()?;
    let guest_reads = |number, from, count| guest::read_pages(&machine, number, from, count);
    guest_reads(0, 0, pages)?;
    ensure_eq!(kvm_pages()?.1 - before.1, BLOCKS, "entries of 2 MiB");
    let page = 2 * BLOCK + 100;
    poison(&slot, page)?;
    ensure_eq!(
        kvm_pages()?.1 - before.1,
        BLOCKS - 1,
        "entries of 2 MiB, once the page is lost"
    );
    guest_reads(1, 0, page)?;
    guest_reads(2, page + 1, pages - page - 1)?;
    ensure_eq!(
        kvm_pages()?.1 - before.1,
        BLOCKS - 1,
        "entries of 2 MiB, all healthy pages read"
    );
    heal(&slot, page)?;
    // The first time finds that all is whole, and has all of it mapped anew.
    guest_reads(3, 0, pages)?;
    guest_reads(4, 0, pages)?;
    ensure_eq!(
        kvm_pages()?.1 - before.1,
        BLOCKS,
        "entries of 2 MiB, once the page is healed"
    );
    Ok(())
}

/// Once the last lost page of a block is healed it is mapped by one entry again.
fn healed_block_is_huge_again() -> Result {
    let slot = present(Backing::Huge2M, 2 * BLOCK, Paging::OnPresent)?;
    let lost = [PageRange::new(10, 3), PageRange::page(400)];
    slot.vm.poison(ID, &lost, Cause::Inherited)?;
    for page in (0..2 * BLOCK).filter(|page| !(10..13).contains(page) && *page != 400) {
        slot.check(page, 1)?;
    }
    ensure_eq!(slot.counter("faults-huge")?, 1, "faults of blocks");
    ensure_eq!(
        slot.vm.poisoned(ID)?,
        lost.map(|range| Poisoned {
            range,
            cause: Cause::Inherited,
        }),
        "the list"
    );
    slot.vm.heal(ID, &lost[..1])?;
    slot.check(11, 1)?;
    ensure_eq!(slot.counter("faults-huge")?, 1, "faults of blocks");
    ensure_eq!(slot.counter("collapses")?, 0, "ranges mapped anew");
    slot.vm.heal(ID, &[PageRange::new(0, 2 * BLOCK)])?;
    for page in (0..2 * BLOCK).chain(0..2 * BLOCK) {
        slot.check(page, 1)?;
    }
    ensure_eq!(slot.counter("collapses")?, 1, "ranges mapped anew");
    // The healed one, and the other one, which was mapped anew with it.
    ensure_eq!(slot.counter("faults-huge")?, 3, "faults of blocks, healed");
    ensure_eq!(slot.vm.poisoned(ID)?, [], "the list");
    Ok(())
}

/// What else becomes of a lost page counts when it is healed, and not before.
fn beside_the_other_state() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = present(backing, pages, Paging::OnPresent)?;
        let at = slot.address(3);
        poison(&slot, 3)?;
        slot.mark(State::Absent, 3)?;
        ensure_eq!(sys::load(at), lost(at), "a read of a lost, absent page");
        slot.place(3, 2)?;
        ensure_eq!(sys::load(at), lost(at), "a read of a lost, placed page");
        slot.vm.set_paging(ID, Paging::Off)?;
        ensure_eq!(sys::load(at), lost(at), "a read, with demand paging off");
        slot.vm.set_paging(ID, Paging::On)?;
        ensure_eq!(sys::load(at), lost(at), "a read, with demand paging on");
        slot.no_event()?;
        slot.place(3, 3)?;
        heal(&slot, 3)?;
        slot.check(3, 3)?;
    }
    Ok(())
}

/// A page that is known to hold nothing is filled with zeros when paging goes off, lost or not: whoever heals it finds
/// no bytes of the past.
fn healed_zero_page_is_zeros() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        slot.fill(5, 1)?;
        slot.mark(State::Zero, 5)?;
        poison(&slot, 5)?;
        let at = slot.address(5);
        ensure_eq!(sys::load(at), lost(at), "a read of a lost, zero page");
        slot.vm.set_paging(ID, Paging::Off)?;
        ensure_eq!(sys::load(at), lost(at), "a read, with demand paging off");
        heal(&slot, 5)?;
        ensure_eq!(slot.words(5)?, [0; content::WORDS], "the healed page");
    }
    Ok(())
}

/// A page that is lost is not read from its source, until it is healed.
fn of_a_sourced_page() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let file = file(tmp(), 0, pages, 4)?;
        slot.vm.set_source(ID, &file, 0, None)?;
        poison(&slot, 6)?;
        let at = slot.address(6);
        ensure_eq!(sys::load(at), lost(at), "a read");
        for page in (0..pages).filter(|&page| page != 6) {
            slot.check(page, 4)?;
        }
        ensure_eq!(sys::load(at), lost(at), "a read");
        heal(&slot, 6)?;
        slot.check(6, 4)?;
    }
    Ok(())
}
