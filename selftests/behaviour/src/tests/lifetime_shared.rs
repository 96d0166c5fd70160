// SPDX-License-Identifier: GPL-2.0

//! One memslot in several processes, and what keeps the module loaded.

use std::os::fd::AsFd;

use kvm_demand_paging::{Backing, Memslot, PageRange, State};

use crate::check::Result;
use crate::content;
use crate::harness::rounds;
use crate::shared::Shared;
use crate::slot::{words_at, Slot, BACKINGS, ID, PAGE};
use crate::sys::{self, Child, Touched};
use crate::task::{until, PATIENCE};

use std::sync::atomic::Ordering;

tests! {
    "lifetime-two-processes-one-memslot" => two_processes_one_memslot,
    "lifetime-absent-in-every-process" => absent_in_every_process,
    "lifetime-rmmod-refused-for-a-mapping" => rmmod_refused_for_a_mapping,
    "lifetime-handler-gone-vm-kept" => handler_gone_vm_kept,
}

/// Two processes map one memslot, one by the fd, one through its path: both wait for the same page, by one
/// event, and both get the same bytes; what one writes the other one reads.
fn two_processes_one_memslot() -> Result {
    for (backing, pages) in BACKINGS {
        let name = format!("behaviour-{}", std::process::id());
        let slot = Slot::with(backing, pages, |b| b.paging(true).name(&name))?;
        let shared = Shared::new(1)?;
        let (by_path, told) = (name.clone(), shared.clone());
        let mut child = Child::fork(move || {
            let memslot = Memslot::open(&by_path)?;
            ensure_eq!(memslot.pages(), pages, "pages by the path");
            let guest = memslot.map()?;
            let at = |page: u64| {
                guest
                    .as_ptr()
                    .wrapping_add((page * PAGE) as usize)
                    .cast::<u64>()
            };
            if let Err(wrong) = content::check(&words_at(at(9))?, 9, 1) {
                fail!("{wrong}");
            }
            // SAFETY: guest memory, which there are no references to.
            let stored = unsafe { sys::store(at(9).wrapping_add(5), 0x77) };
            ensure_eq!(stored, Touched::Value(0), "a write");
            told.at(0).store(1, Ordering::Release);
            // Absent by now, in this process as well.
            until("the page is made absent", || {
                Ok(told.at(0).load(Ordering::Acquire) == 2)
            })?;
            if let Err(wrong) = content::check(&words_at(at(9))?, 9, 2) {
                fail!("{wrong}");
            }
            Ok(())
        })?;
        let waiting = slot.toucher(9)?;
        until("both wait", || Ok(slot.counter("waits")? == 2))?;
        let event = slot.event()?;
        ensure_eq!((event.page, event.waiters), (9, 2), "the event");
        slot.no_event()?;
        slot.place(9, 1)?;
        let word = Touched::Value(content::word(9, 1, 0));
        ensure_eq!(waiting.join("the thread")?, word, "what the thread read");
        until("the child has written", || {
            Ok(shared.at(0).load(Ordering::Acquire) == 1)
        })?;
        ensure_eq!(slot.words(9)?[5], 0x77, "what the other process wrote");
        ensure_eq!(slot.mark(State::Absent, 9)?, 1, "pages changed");
        shared.at(0).store(2, Ordering::Release);
        let waiting = slot.checker(9, 2)?;
        until("both wait", || Ok(slot.counter("waits")? == 4))?;
        slot.place(9, 2)?;
        waiting.join("the thread")?;
        child.join(PATIENCE)?;
    }
    Ok(())
}

/// Pages are made absent while another process reads them through a mapping of its own: once the call has
/// returned it reads no byte of the past.
fn absent_in_every_process() -> Result {
    const PAGES: u64 = 3;
    for (backing, pages) in BACKINGS {
        let name = format!("behaviour-{}", std::process::id());
        let slot = Slot::with(backing, pages, |b| b.paging(true).name(&name))?;
        let shared = Shared::new(PAGES as usize + 2)?;
        let (stop, looks) = (PAGES as usize, PAGES as usize + 1);
        let floors = shared.clone();
        let mut child = Child::fork(move || {
            let guest = Memslot::open(&name)?.map()?;
            let at = guest.as_ptr().cast::<u64>();
            while floors.at(stop).load(Ordering::Acquire) == 0 {
                for page in 0..PAGES {
                    let floor = floors.at(page as usize).load(Ordering::Acquire);
                    match sys::load(at.wrapping_add(page as usize * 512)) {
                        Touched::Value(saw) if saw >= floor => {}
                        other => fail!("page {page}, floor {floor}: {other:x?}"),
                    }
                    floors.at(looks).fetch_add(1, Ordering::AcqRel);
                }
            }
            Ok(())
        })?;
        for version in 1..rounds(300) {
            let page = version % PAGES;
            slot.mark(State::Absent, page)?;
            shared.at(page as usize).store(version, Ordering::Release);
            slot.alias
                .write(page, &super::fault::number_page(version))?;
            slot.mark(State::Present, page)?;
        }
        slot.mark_range(State::Present, PageRange::new(0, PAGES))?;
        until("the other process looks", || {
            Ok(shared.at(looks).load(Ordering::Acquire) > 0)
        })?;
        shared.at(stop).store(1, Ordering::Release);
        child.join(PATIENCE)?;
    }
    Ok(())
}

/// A mapping alone, of memory or of the bitmap, keeps the module: rmmod is refused, and the mapping goes on
/// working.
fn rmmod_refused_for_a_mapping() -> Result {
    const MODULE: &std::ffi::CStr = c"kvm_demand_paging";
    let slot = Slot::new(Backing::Shmem, 8)?;
    slot.place(3, 1)?;
    let guest = slot.guest.clone();
    drop(slot);
    let refused = |what: &str| -> Result {
        match sys::delete_module(MODULE) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EWOULDBLOCK | libc::EBUSY)) => Ok(()),
            other => fail!("rmmod while {what}: {other:?}"),
        }
    };
    refused("memory is mapped")?;
    let at = guest.as_ptr().wrapping_add(3 * PAGE as usize).cast();
    if let Err(wrong) = content::check(&words_at(at)?, 3, 1) {
        fail!("{wrong}");
    }
    drop(guest);
    let slot = Slot::new(Backing::Shmem, 8)?;
    let present = slot.memslot.bitmap()?;
    present.set(1);
    drop(slot);
    refused("the bitmap is mapped")
}

/// The handler dies with an event in its hands and nobody takes over for a while: as long as somebody keeps
/// the VM's fd, who waits goes on waiting, for pages that were asked for before and after; the next handler
/// gets both.
fn handler_gone_vm_kept() -> Result {
    let slot = Slot::new(Backing::Shmem, 8)?;
    let (told, tell) = sys::pipe()?;
    let reading = slot.clone();
    let mut handler = Child::fork(move || {
        let event = reading.event()?;
        sys::write_from(tell.as_fd(), [event.page as u8].as_ptr(), 1)?;
        std::thread::sleep(PATIENCE);
        Ok(())
    })?;
    let mut first = slot.checker(1, 1)?;
    let mut page = [0_u8];
    // SAFETY: the buffer is this thread's own.
    unsafe { sys::read_to(told.as_fd(), page.as_mut_ptr(), 1)? };
    ensure_eq!(page, [1], "the page that the handler was told of");
    let mut second = slot.checker(2, 1)?;
    handler.kill(libc::SIGKILL)?;
    handler.wait(PATIENCE)?;
    first.still_waits("the first thread")?;
    second.still_waits("the second thread")?;
    let mut events = [slot.event()?, slot.event()?];
    events.sort_by_key(|event| event.page);
    ensure_eq!(
        events.map(|event| (event.slot_id, event.page, event.deliveries)),
        [(ID, 1, 2), (ID, 2, 1)],
        "the events"
    );
    for page in [1, 2] {
        slot.place(page, 1)?;
    }
    for task in [first, second] {
        task.join("a thread")?;
    }
    Ok(())
}
