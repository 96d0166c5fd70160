// SPDX-License-Identifier: GPL-2.0

//! Invariant 8: pinned memory is charged to RLIMIT_MEMLOCK, and cannot be taken away under us.

use std::sync::Arc;

use kvm_demand_paging::{Backing, FaultExit, PageRange, Paging, Reason, State};

use crate::check::Result;
use crate::content;
use crate::guest;
use crate::slot::{Slot, ID, PAGE};
use crate::sys::{self, Child, Ended, Touched};
use crate::task::{until, Task, PATIENCE};

tests! {
    "limit-exit-says-no-memory" => exit_says_no_memory,
    "limit-vcpu-without-exits-fails" => vcpu_without_exits_fails,
    "limit-pins-return-to-zero" => pins_return_to_zero,
    "limit-memfd-cannot-shrink" => memfd_cannot_shrink,
    "limit-hole-under-a-present-page" => hole_under_a_present_page,
}

/// Makes this process one of a user whom nobody else is, who may lock so many pages. It keeps root's other
/// powers.
pub(super) fn become_limited(pages: u64) -> Result {
    const CAP_IPC_LOCK: u32 = 14;
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    // Effective, permitted and inheritable, of the lower and the higher 32 capabilities.
    let mut sets = [0_u32; 6];
    let limit = libc::rlimit {
        rlim_cur: pages * PAGE,
        rlim_max: pages * PAGE,
    };
    // SAFETY: the structs are those of the calls; only this process is changed.
    unsafe {
        sys::check(libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit))?;
        sys::check(libc::setresuid(54_321, 0, 0))?;
        sys::check(libc::syscall(libc::SYS_capget, &header, sets.as_mut_ptr()) as i32)?;
        for set in &mut sets[..2] {
            *set &= !(1 << CAP_IPC_LOCK);
        }
        sys::check(libc::syscall(libc::SYS_capset, &header, sets.as_ptr()) as i32)?;
    }
    Ok(())
}

/// A memslot of so many pages, all filled and present.
fn all_present(pages: u64) -> Result<Arc<Slot>> {
    let slot = Slot::new(Backing::Shmem, pages)?;
    for page in 0..pages {
        slot.place(page, 1)?;
    }
    Ok(slot)
}

/// Invariant 8: a guest with exits on touches more pages than may be pinned: its vCPU exits, with the
/// reason "no memory", as long as that is so, and goes on as soon as a page was given back.
fn exit_says_no_memory() -> Result {
    const LIMIT: u64 = 8;
    become_limited(LIMIT)?;
    let slot = all_present(12)?;
    let machine = slot.machine()?;
    let pages: Vec<u64> = (0..12).collect();
    let mut vcpu = machine.vcpu(0, &guest::peek(&pages))?;
    let exiting = slot.clone();
    let task = Task::work(move || -> Result<_> {
        exiting.vm.set_vcpu_exits(true)?;
        let mut times = 0;
        guest::run(&mut vcpu, |fault| {
            let exit = FaultExit::decode(fault.flags, fault.gpa, fault.size);
            let page = LIMIT + times / 3;
            ensure_eq!(
                exit.map(|exit| (exit.gpa, exit.reason)),
                Some((guest::gpa(page), Reason::NoMemory)),
                "the exit"
            );
            times += 1;
            // Twice it tries in vain.
            if times % 3 == 0 {
                exiting.mark(State::Absent, page - LIMIT)?;
            }
            Ok(())
        })
    })?;
    let ran = task.join("the vCPU")?;
    ensure_eq!(ran.faults.len(), 12, "exits");
    let expected: Vec<u64> = pages.iter().map(|&p| content::word(p, 1, 0)).collect();
    ensure_eq!(ran.reports, expected, "what the guest read");
    ensure_eq!(slot.counter("pinned-pages")?, LIMIT, "pages pinned");
    Ok(())
}

/// Without exits KVM_RUN fails there, and does not hang, read zeros or pin the page all the same.
fn vcpu_without_exits_fails() -> Result {
    const LIMIT: u64 = 8;
    become_limited(LIMIT)?;
    let slot = all_present(LIMIT + 1)?;
    let machine = slot.machine()?;
    let pages: Vec<u64> = (0..=LIMIT).collect();
    let mut vcpu = machine.vcpu(0, &guest::peek(&pages))?;
    let task = Task::spawn(move || match guest::run(&mut vcpu, guest::no_fault) {
        Ok(ran) => format!("{ran:x?}"),
        Err(e) => e.to_string(),
    })?;
    let result = task.join("the vCPU")?;
    ensure!(result.contains("Bad address"), "KVM_RUN: {result}");
    ensure_eq!(slot.counter("pinned-pages")?, LIMIT, "pages pinned");
    Ok(())
}

/// How many of the slot's pages can be touched, from page 0 on.
fn touchable(slot: &Slot) -> u64 {
    (0..slot.guest.pages())
        .take_while(|&page| matches!(sys::load(slot.address(page)), Touched::Value(_)))
        .count() as u64
}

/// Gives back what is pinned of a memslot, of which this is the whole range.
type GiveBack = fn(Arc<Slot>, PageRange) -> Result;

/// Invariant 8: whatever way a memslot's pins go, the user's account returns to what it was: as many pages
/// as the limit has can be pinned again, and not one more.
fn pins_return_to_zero() -> Result {
    const LIMIT: u64 = 32;
    become_limited(LIMIT)?;
    let whole = PageRange::new(0, LIMIT + 8);
    let ways: [(&str, GiveBack); 5] = [
        ("the memslot is removed", |slot, _| {
            Ok(slot.vm.remove_memslot(ID)?)
        }),
        ("everything is closed", |slot, _| {
            drop(slot);
            Ok(())
        }),
        ("the pages are made absent", |slot, whole| {
            slot.mark_range(State::Absent, whole)?;
            std::mem::forget(slot);
            Ok(())
        }),
        ("paging is switched on anew", |slot, _| {
            slot.vm.set_paging(ID, Paging::On)?;
            std::mem::forget(slot);
            Ok(())
        }),
        ("a page is pinned again and again", |slot, whole| {
            for _ in 0..50 {
                slot.mark_range(State::Absent, whole)?;
                slot.mark_range(State::Present, whole)?;
                ensure_eq!(touchable(&slot), LIMIT, "pages that can be pinned");
            }
            Ok(())
        }),
    ];
    for (how, give_back) in ways {
        let slot = all_present(whole.count)?;
        ensure_eq!(
            touchable(&slot),
            LIMIT,
            "pages that can be pinned before {how}"
        );
        ensure_eq!(
            slot.counter("pinned-pages")?,
            LIMIT,
            "pages pinned before {how}"
        );
        give_back(slot, whole)?;
    }
    for _ in 0..5 {
        let (told, tell) = sys::pipe()?;
        let mut child = Child::fork(move || {
            let slot = all_present(LIMIT)?;
            ensure_eq!(
                touchable(&slot),
                LIMIT,
                "pages that can be pinned by a child"
            );
            sys::write_from(std::os::fd::AsFd::as_fd(&tell), [1_u8].as_ptr(), 1)?;
            std::thread::sleep(PATIENCE);
            Ok(())
        })?;
        ensure!(
            sys::readable(std::os::fd::AsRawFd::as_raw_fd(&told), PATIENCE)?,
            "the child has not pinned its pages"
        );
        let slot = all_present(1)?;
        ensure_eq!(
            touchable(&slot),
            0,
            "pages that can be pinned beside the child's"
        );
        child.kill(libc::SIGKILL)?;
        ensure_eq!(
            child.wait(PATIENCE)?,
            Ended::Signal(libc::SIGKILL),
            "its end"
        );
        until("the dead child's page can be pinned", || {
            Ok(touchable(&slot) == 1)
        })?;
    }
    let slot = all_present(whole.count)?;
    ensure_eq!(
        touchable(&slot),
        LIMIT,
        "pages that can be pinned in the end"
    );
    Ok(())
}

/// Invariant 8: the memfd of a memslot cannot shrink, with pages pinned or none.
fn memfd_cannot_shrink() -> Result {
    use std::os::fd::{AsFd, AsRawFd};
    for (backing, pages) in crate::slot::BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let shrink = || -> Result {
            // SAFETY: it changes a file's size, or does not.
            let ret = unsafe { libc::ftruncate(slot.memfd.as_fd().as_raw_fd(), 0) };
            match sys::check(ret) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(()),
                other => fail!("ftruncate(memfd, 0): {other:?}"),
            }
        };
        shrink()?;
        slot.place(3, 1)?;
        slot.check(3, 1)?;
        shrink()?;
        slot.check(3, 1)?;
        slot.vm.remove_memslot(ID)?;
        shrink()?;
    }
    Ok(())
}

/// A hole is punched under a page that is present and mapped: the page's memory is pinned, so whoever has it
/// mapped goes on reading what it held, not memory that somebody else has by now.
fn hole_under_a_present_page() -> Result {
    let slot = Slot::new(Backing::Shmem, 64)?;
    for page in 0..64 {
        slot.place(page, 1)?;
        slot.check(page, 1)?;
    }
    slot.memfd.punch_hole(PageRange::new(0, 64))?;
    // Somebody else takes memory.
    let other = Slot::new(Backing::Shmem, 2048)?;
    for page in 0..2048 {
        other.fill(page, 666)?;
    }
    let again = slot.memslot.map()?;
    for page in 0..64 {
        slot.check(page, 1)?;
        let words =
            crate::slot::words_at(again.as_ptr().wrapping_add((page * PAGE) as usize).cast())?;
        if let Err(wrong) = content::check(&words, page, 1) {
            fail!("through another mapping: {wrong}");
        }
    }
    // Its pin goes with the page's being absent: then the memfd's hole shows.
    slot.mark_range(State::Absent, PageRange::new(0, 64))?;
    slot.mark_range(State::Present, PageRange::new(0, 64))?;
    ensure_eq!(
        slot.words(9)?,
        [0; 512],
        "the page, after absent and present"
    );
    Ok(())
}
