// SPDX-License-Identifier: GPL-2.0

//! Fault exits: what KVM_RUN says, and to whom.

use kdp_vmm::{MemoryFault, Stop};
use kvm_demand_paging::{abi, Backing, FaultExit, Reason, State, Who};

use crate::check::Result;
use crate::content;
use crate::guest;
use crate::slot::{Slot, BACKINGS, PAGE};
use crate::task::Task;

tests! {
    "vcpu-exit-says-what-and-why" => exit_says_what_and_why,
    "vcpu-exit-changes-nothing" => exit_changes_nothing,
    "vcpu-exits-for-those-who-asked" => exits_for_those_who_asked,
    "vcpu-exits-can-be-switched-off" => exits_can_be_switched_off,
    "vcpu-waits-without-exits" => waits_without_exits,
}

/// An exit has the page's address, its size, and flags that say "absent", and "write" for a write; for a
/// read, a write and an instruction fetch.
fn exit_says_what_and_why() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let (read, write, execute) = (pages - 1, 3, pages / 2);
        let program = guest::read_write_execute(read, write, 42, execute);
        let mut vcpu = machine.vcpu(0, &program)?;
        let exiting = slot.clone();
        let task = Task::work(move || -> Result<_> {
            exiting.vm.set_vcpu_exits(true)?;
            guest::run(&mut vcpu, |fault| {
                let page = (fault.gpa - guest::gpa(0)) / PAGE;
                if page == execute {
                    let mut code = [0; PAGE as usize];
                    code[..guest::HALT.len()].copy_from_slice(&guest::HALT);
                    exiting.alias.write(page, &code)?;
                    exiting.mark(State::Present, page)?;
                    return Ok(());
                }
                exiting.place(page, 1)
            })
        })?;
        let ran = task.join("the vCPU")?;
        let expected = [
            (read, abi::KDP_EXIT_ABSENT),
            (write, abi::KDP_EXIT_ABSENT | abi::KDP_EXIT_WRITE),
            (execute, abi::KDP_EXIT_ABSENT),
        ]
        .map(|(page, flags)| MemoryFault {
            gpa: guest::gpa(page),
            size: PAGE,
            flags,
        });
        ensure_eq!(ran.faults, expected, "the exits");
        let decoded = FaultExit::decode(ran.faults[1].flags, ran.faults[1].gpa, PAGE);
        ensure_eq!(
            decoded.map(|exit| (exit.reason, exit.write)),
            Some((Reason::Absent, true)),
            "the exit, decoded"
        );
        ensure_eq!(
            ran.reports,
            [content::word(read, 1, 0)],
            "what the guest read"
        );
        let mut bytes = [0; 4096];
        slot.alias.read(write, &mut bytes)?;
        ensure_eq!(bytes[..8], 42_u64.to_le_bytes(), "what the guest wrote");
        ensure!(
            bytes[8..] == content::bytes(write, 1)[8..],
            "the guest's write changed other bytes of its page"
        );
        ensure_eq!(slot.counter("exits")?, 3, "exits counted");
        slot.no_event()?;
    }
    Ok(())
}

/// A vCPU that enters KVM_RUN again without the page having come exits again, the same way, as often as it
/// tries.
fn exit_changes_nothing() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let mut vcpu = machine.vcpu(0, &guest::peek(&[6]))?;
        let exiting = slot.clone();
        let task = Task::work(move || -> Result {
            exiting.vm.set_vcpu_exits(true)?;
            for _ in 0..50 {
                match vcpu.run()? {
                    Stop::Fault(fault) => {
                        ensure_eq!(fault.gpa, guest::gpa(6), "the exit's address")
                    }
                    other => fail!("KVM_RUN returned {other:x?} for an absent page"),
                }
            }
            exiting.place(6, 2)?;
            let ran = guest::run(&mut vcpu, guest::no_fault)?;
            ensure_eq!(ran.reports, [content::word(6, 2, 0)], "what the guest read");
            Ok(())
        })?;
        task.join("the vCPU")?;
        ensure_eq!(slot.counter("exits")?, 50, "exits counted");
        ensure_eq!(slot.counter("waits")?, 0, "waits");
    }
    Ok(())
}

/// Of two vCPUs of one machine, the one whose thread asked exits, the other one waits.
fn exits_for_those_who_asked() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let wanted: Vec<u64> = (0..8).map(|i| i * (pages / 8)).collect();
        let mut exiter = machine.vcpu(0, &guest::peek(&wanted))?;
        let mut waiter = machine.vcpu(1, &guest::peek(&wanted))?;
        let exiting = slot.clone();
        let exiter = Task::work(move || -> Result<_> {
            exiting.vm.set_vcpu_exits(true)?;
            guest::run(&mut exiter, |fault| {
                exiting.place((fault.gpa - guest::gpa(0)) / PAGE, 1)
            })
        })?;
        let ran = exiter.join("the vCPU with exits")?;
        ensure_eq!(ran.faults.len(), wanted.len(), "exits");
        slot.no_event()?;
        for &page in &wanted {
            slot.mark(State::Absent, page)?;
        }
        let waiter = Task::work(move || guest::run(&mut waiter, guest::no_fault))?;
        for &page in &wanted {
            let event = slot.event()?;
            ensure_eq!(
                (event.page, event.gfn, event.access.who, event.tid),
                (
                    page,
                    guest::gpa(page) / PAGE,
                    Who::Guest,
                    Some(waiter.tid as u32)
                ),
                "the event"
            );
            slot.place(page, 2)?;
        }
        let ran = waiter.join("the vCPU without exits")?;
        let expected: Vec<u64> = wanted.iter().map(|&p| content::word(p, 2, 0)).collect();
        ensure_eq!(ran.reports, expected, "what the guest read");
    }
    Ok(())
}

/// A thread switches exits off: its vCPU waits; and on again: it exits.
fn exits_can_be_switched_off() -> Result {
    let slot = Slot::new(Backing::Shmem, 16)?;
    let machine = slot.machine()?;
    let mut vcpu = machine.vcpu(0, &guest::peek(&[1, 2, 3]))?;
    let running = slot.clone();
    let mut task = Task::work(move || -> Result {
        let word = |page| Stop::Report(content::word(page, 1, 0));
        for (page, exits) in [(1, true), (2, false), (3, true)] {
            running.vm.set_vcpu_exits(exits)?;
            if exits {
                match vcpu.run()? {
                    Stop::Fault(fault) => ensure_eq!(fault.gpa, guest::gpa(page), "the exit"),
                    other => fail!("KVM_RUN returned {other:x?} for page {page}"),
                }
                running.place(page, 1)?;
            }
            ensure_eq!(vcpu.run()?, word(page), "what KVM_RUN returned next");
        }
        ensure_eq!(vcpu.run()?, Stop::Halted, "what KVM_RUN returned last");
        Ok(())
    })?;
    let event = slot.event()?;
    ensure_eq!((event.page, event.access.who), (2, Who::Guest), "the event");
    task.still_waits("the vCPU")?;
    slot.place(2, 1)?;
    task.join("the vCPU")?;
    slot.no_event()
}

/// A vCPU without exits waits in KVM_RUN until its page is resolved, for a read, a write and a fetch.
fn waits_without_exits() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let program = guest::read_write_execute(0, 1, 7, 2);
        let mut vcpu = machine.vcpu(0, &program)?;
        let mut task = Task::work(move || guest::run(&mut vcpu, guest::no_fault))?;
        for page in 0..3 {
            let event = slot.event()?;
            ensure_eq!(
                (event.page, event.access.who, event.access.write),
                (page, Who::Guest, page == 1),
                "the event"
            );
            task.still_waits("the vCPU")?;
            let mut bytes = content::bytes(page, 1);
            if page == 2 {
                bytes[..guest::HALT.len()].copy_from_slice(&guest::HALT);
            }
            slot.alias.write(page, &bytes)?;
            slot.mark(State::Present, page)?;
        }
        let ran = task.join("the vCPU")?;
        ensure_eq!(ran.reports, [content::word(0, 1, 0)], "what the guest read");
        ensure_eq!(slot.counter("exits")?, 0, "exits counted");
    }
    Ok(())
}
