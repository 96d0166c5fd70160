// SPDX-License-Identifier: GPL-2.0

//! Handlers that are killed.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use kvm_demand_paging::{Backing, State};

use crate::check::Result;
use crate::harness::rounds;
use crate::shared::Shared;
use crate::slot::{Slot, BLOCK};
use crate::sys::{Child, Ended};
use crate::task::{Task, PATIENCE};

tests! {
    "notify-handler-killed-100-times-shmem" => || handler_killed(Backing::Shmem),
    "notify-handler-killed-100-times-hugetlb" => || handler_killed(Backing::Huge2M),
}

const PAGES: u64 = 64;
const THREADS: u64 = 4;

/// What the processes share: words after the pages' versions.
const STOP: usize = PAGES as usize;
const TOUCHED: usize = STOP + 1;
const READ: usize = STOP + 2;
const REDELIVERED: usize = STOP + 3;
const FAULTS: usize = STOP + 4;

/// Invariant 4, an event is not lost with its reader: the handler is killed at a random moment and
/// replaced, 100 times. Four threads fault all the while; each of their touches ends, with the right
/// bytes, and the next handler is given what the one before had read and not resolved.
fn handler_killed(backing: Backing) -> Result {
    let kills = rounds(100).max(100);
    let slot = Slot::new(backing, PAGES.next_multiple_of(BLOCK))?;
    let shared = Shared::new(FAULTS + 1)?;
    let mut touchers = {
        let (slot, shared) = (slot.clone(), shared.clone());
        Child::fork(move || touch(&slot, &shared))?
    };
    let mut random = 0x9e37_79b9_u64;
    for _ in 0..kills {
        let mut handler = {
            let (slot, shared) = (slot.clone(), shared.clone());
            Child::fork(move || handle(&slot, &shared))?
        };
        // Not before it has begun on something; then at once, or in the midst of it, or later.
        let before = shared.at(READ).load(Ordering::Acquire);
        crate::task::until("the handler reads an event", || {
            Ok(shared.at(READ).load(Ordering::Acquire) > before)
        })?;
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        std::thread::sleep(Duration::from_micros((random >> 33) % 6000));
        handler.kill(libc::SIGKILL)?;
        ensure_eq!(
            handler.wait(PATIENCE)?,
            Ended::Signal(libc::SIGKILL),
            "a handler's end"
        );
    }
    shared.at(STOP).store(1, Ordering::Release);
    let (last_slot, last_shared) = (slot.clone(), shared.clone());
    let _last = Child::fork(move || handle(&last_slot, &last_shared))?;
    touchers.join(PATIENCE)?;
    let count = |at: usize| shared.at(at).load(Ordering::Acquire);
    ensure_eq!(count(TOUCHED), count(FAULTS), "faults that have ended");
    ensure!(
        count(REDELIVERED) > kills / 10,
        "{} of {} events were delivered again in {kills} kills: that tests nothing",
        count(REDELIVERED),
        count(READ)
    );
    Ok(())
}

/// The process that faults. Each thread has pages of its own, which it makes absent again when it has
/// read them.
fn touch(slot: &Arc<Slot>, shared: &Shared) -> Result {
    let mut threads = Vec::new();
    for thread in 0..THREADS {
        let (slot, shared) = (slot.clone(), shared.clone());
        threads.push(Task::work(move || -> Result {
            for page in (0..PAGES).cycle().filter(|page| page % THREADS == thread) {
                if shared.at(STOP).load(Ordering::Acquire) == 1 {
                    return Ok(());
                }
                let version = shared.at(page as usize).fetch_add(1, Ordering::AcqRel) + 1;
                shared.at(FAULTS).fetch_add(1, Ordering::AcqRel);
                slot.check(page, version)?;
                shared.at(TOUCHED).fetch_add(1, Ordering::AcqRel);
                slot.mark(State::Absent, page)?;
                // What a handler left half done must not be read.
                slot.fill(page, 666)?;
            }
            Ok(())
        })?);
    }
    for mut thread in threads {
        // As long as handlers are killed and replaced.
        while !thread.ends_within(Duration::from_secs(1))? {}
        thread.join("a toucher")?;
    }
    Ok(())
}

/// A handler. It takes its time between reading an event and answering it.
fn handle(slot: &Slot, shared: &Shared) -> Result {
    loop {
        slot.vm.wait_event(None)?;
        let mut events = Vec::new();
        slot.vm.read_events(&mut events, 3)?;
        shared
            .at(READ)
            .fetch_add(events.len() as u64, Ordering::AcqRel);
        for event in events {
            if event.deliveries > 1 {
                shared.at(REDELIVERED).fetch_add(1, Ordering::AcqRel);
            }
            std::thread::sleep(Duration::from_micros(200));
            slot.place(
                event.page,
                shared.at(event.page as usize).load(Ordering::Acquire),
            )?;
        }
    }
}
