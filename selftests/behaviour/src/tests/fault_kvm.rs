// SPDX-License-Identifier: GPL-2.0

//! KVM's own accesses to guest memory, in threads that have exits on: they must wait. An error there is
//! swallowed by KVM and breaks the guest in silence.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use kdp_vmm::{Clock, ClockReport};
use kvm_demand_paging::{Backing, State, Who};

use crate::check::Result;
use crate::content;
use crate::guest;
use crate::handler::Handler;
use crate::harness::rounds;
use crate::slot::{Slot, BACKINGS, PAGE};
use crate::task::Task;

tests! {
    "fault-kvmclock-page-absent" => kvmclock_page_absent,
    "fault-kvmclock-page-absent-again" => kvmclock_page_absent_again,
    "fault-emulator-reads" => emulator_reads,
    "fault-steal-time-page-absent" => steal_time_page_absent,
}

/// The page of kvmclock is absent when the guest turns the clock on, in exit mode: the fault comes as an
/// event, not as an exit, and the clock works.
fn kvmclock_page_absent() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let page = pages - 3;
        let mut vcpu = machine.vcpu(0, &Clock::new(guest::gpa(page), 200).program())?;
        let vm = slot.vm.try_clone()?;
        let mut task = Task::work(move || -> Result<_> {
            vm.set_vcpu_exits(true)?;
            guest::run(&mut vcpu, guest::no_fault)
        })?;
        let event = slot.event()?;
        // By its flags, a fault in get_user_pages() does not say that it is for a guest.
        let who = match backing {
            Backing::Shmem => Who::Kernel,
            _ => Who::Guest,
        };
        ensure_eq!(
            (event.page, event.access.who, event.tid),
            (page, who, Some(task.tid as u32)),
            "the event"
        );
        task.still_waits("the vCPU")?;
        slot.alias.write(page, &[0; PAGE as usize])?;
        slot.mark(State::Present, page)?;
        let ran = task.join("the vCPU")?;
        clock_works(&ran.reports)?;
    }
    Ok(())
}

fn clock_works(reports: &[u64]) -> Result {
    let Some(clock) = ClockReport::from_reports(reports) else {
        fail!("the guest reported {reports:x?}");
    };
    ensure!(clock.works(), "the guest's clock does not work: {clock:?}");
    Ok(())
}

/// The clock's page is made absent again and again while the guest reads the clock: the guest's reads
/// exit, KVM's writes wait, and the clock never goes wrong.
fn kvmclock_page_absent_again() -> Result {
    let slot = Slot::new(Backing::Shmem, 8)?;
    let machine = slot.machine()?;
    let page = 5;
    slot.alias.write(page, &[0; PAGE as usize])?;
    slot.mark(State::Present, page)?;
    let serving = slot.clone();
    let handler = Handler::start(&slot, move |event| {
        serving.mark(State::Present, event.page)?;
        Ok(())
    })?;
    let exits = Arc::new(AtomicU64::new(0));
    let reads = 400_000 * rounds(4);
    let mut vcpu = machine.vcpu(0, &Clock::new(guest::gpa(page), reads).program())?;
    let (exiting, counted) = (slot.clone(), exits.clone());
    let mut task = Task::work(move || -> Result<_> {
        exiting.vm.set_vcpu_exits(true)?;
        guest::run(&mut vcpu, |fault| {
            ensure_eq!(fault.gpa, guest::gpa(page), "the exit's address");
            counted.fetch_add(1, Ordering::Relaxed);
            exiting.mark(State::Present, page)?;
            Ok(())
        })
    })?;
    let mut absents = 0_u64;
    while !task.ends_within(std::time::Duration::from_micros(200))? {
        slot.mark(State::Absent, page)?;
        absents += 1;
    }
    clock_works(&task.join("the vCPU")?.reports)?;
    ensure!(
        exits.load(Ordering::Relaxed) > 0,
        "the guest never exited, though its page was made absent {absents} times"
    );
    handler.stop()
}

/// KVM emulates an instruction that reads an absent page, in exit mode: the read waits, and the
/// instruction gets the bytes.
fn emulator_reads() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let page = pages / 2;
        let mut vcpu = machine.vcpu(0, &guest::string_output(page))?;
        let vm = slot.vm.try_clone()?;
        let mut task = Task::work(move || -> Result<_> {
            vm.set_vcpu_exits(true)?;
            guest::run(&mut vcpu, guest::no_fault)
        })?;
        let event = slot.event()?;
        ensure_eq!(
            (event.page, event.access.who, event.access.write),
            (page, Who::Kernel, false),
            "the event"
        );
        task.still_waits("the vCPU")?;
        slot.place(page, 9)?;
        let ran = task.join("the vCPU")?;
        ensure_eq!(
            ran.ticks,
            [content::word(page, 9, 0) as u32],
            "what the instruction wrote to the port"
        );
    }
    Ok(())
}

/// KVM accounts stolen time in an absent page, in exit mode: it waits, and the page is filled in.
fn steal_time_page_absent() -> Result {
    let slot = Slot::new(Backing::Shmem, 8)?;
    let machine = slot.machine()?;
    let mut vcpu = machine.vcpu(0, &guest::steal_time(4))?;
    let vm = slot.vm.try_clone()?;
    let mut task = Task::work(move || -> Result<_> {
        vm.set_vcpu_exits(true)?;
        guest::run(&mut vcpu, guest::no_fault)
    })?;
    let event = slot.event()?;
    ensure_eq!(
        (event.page, event.access.who),
        (4, Who::Kernel),
        "the event"
    );
    task.still_waits("the vCPU")?;
    slot.alias.write(4, &[0; PAGE as usize])?;
    slot.mark(State::Present, 4)?;
    let ran = task.join("the vCPU")?;
    match ran.reports.as_slice() {
        [version] if *version > 0 && version % 2 == 0 => Ok(()),
        other => fail!("the version of the steal time structure: {other:?}"),
    }
}
