// SPDX-License-Identifier: GPL-2.0

//! Invariant 7: what things cost does not depend on the size of a memslot or on how many there are.
//!
//! Times of one machine in one run are compared, by medians, with a generous bound; a cost that grows with
//! the size would be off by a factor of hundreds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_demand_paging::{Backing, PageRange, State};

use crate::check::Result;
use crate::handler::Handler;
use crate::slot::{Slot, GPA, ID, PAGE};
use crate::sys::{self, Touched};

tests! {
    "scale-create-and-size" => create_and_size,
    "scale-fault-and-size" => || compare_faults(&small, &large),
    "scale-create-and-count" => create_and_count,
    "scale-fault-and-count" => || compare_faults(&small, &one_of_many),
}

/// How much dearer the large case may be.
const BOUND: u32 = 3;

const SMALL: u64 = (64 << 20) / PAGE;
const LARGE: u64 = (64 << 30) / PAGE;
const MANY: u32 = 2000;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Fails if `large` is dearer than `small` again and again: the machine may have been busy.
fn compare(
    what: &str,
    mut small: impl FnMut() -> Result<Duration>,
    mut large: impl FnMut() -> Result<Duration>,
) -> Result {
    let mut last = (Duration::ZERO, Duration::ZERO);
    for _ in 0..6 {
        last = (small()?, large()?);
        if last.1 <= last.0 * BOUND {
            println!("{what}: {:?} and {:?}", last.0, last.1);
            return Ok(());
        }
    }
    fail!(
        "{what}: {:?} in the small case, {:?} in the large one",
        last.0,
        last.1
    )
}

/// The time to create a memslot of so many pages with paging on, and to remove it.
fn create_and_remove(pages: u64) -> Result<Duration> {
    let slot = Slot::new(Backing::Shmem, pages)?;
    let mut times = Vec::new();
    for id in 100..160 {
        let builder = slot.vm.create_memslot(id, &slot.memfd);
        let start = Instant::now();
        let memslot = builder.base_gfn(GPA / PAGE + LARGE).paging(true).create()?;
        slot.vm.remove_memslot(id)?;
        times.push(start.elapsed());
        drop(memslot);
    }
    Ok(median(times))
}

/// Invariant 7: a memslot of 64 GiB is created and removed in the time of one of 64 MiB.
fn create_and_size() -> Result {
    compare(
        "create and remove",
        || create_and_remove(SMALL),
        || create_and_remove(LARGE),
    )
}

fn small() -> Result<Arc<Slot>> {
    Slot::new(Backing::Shmem, SMALL)
}

fn large() -> Result<Arc<Slot>> {
    Slot::new(Backing::Shmem, LARGE)
}

/// A memslot in the middle of many.
fn one_of_many() -> Result<Arc<Slot>> {
    let slot = small()?;
    for other in 0..MANY {
        add_slot(&slot, other)?;
    }
    Ok(slot)
}

/// Adds a memslot to the VM. Half of them are below the first one, by id and by GFN, half above. Every one has
/// a page that is present and one that is zero.
fn add_slot(slot: &Slot, number: u32) -> Result<Duration> {
    let (id, gfn) = if number % 2 == 0 {
        (ID - 1 - number, u64::from(number) * 16)
    } else {
        (ID + 1 + number, GPA / PAGE + LARGE + u64::from(number) * 16)
    };
    let start = Instant::now();
    let memslot = slot
        .vm
        .create_memslot(id, &slot.memfd)
        .part(u64::from(number) * PAGE, 16)
        .base_gfn(gfn)
        .paging(true)
        .create()?;
    let time = start.elapsed();
    drop(memslot);
    slot.vm.mark(id, State::Present, &[PageRange::page(1)])?;
    slot.vm.mark(id, State::Zero, &[PageRange::page(2)])?;
    Ok(time)
}

/// The median times of a fault on a present page, of making a page absent and of making it present.
fn fault_times(slot: &Slot) -> Result<[Duration; 3]> {
    const PAGES: u64 = 200;
    let first = slot.guest.pages() - PAGES;
    let mut times = [const { Vec::new() }; 3];
    // The first round allocates what is allocated once.
    for round in 0..3 {
        for page in first..first + PAGES {
            let t0 = Instant::now();
            slot.mark(State::Present, page)?;
            let t1 = Instant::now();
            let touched = sys::load(slot.address(page));
            let t2 = Instant::now();
            slot.mark(State::Absent, page)?;
            let t3 = Instant::now();
            ensure!(
                matches!(touched, Touched::Value(_)),
                "page {page}: {touched:x?}"
            );
            if round > 0 {
                times[0].push(t2 - t1);
                times[1].push(t3 - t2);
                times[2].push(t1 - t0);
            }
        }
    }
    Ok(times.map(median))
}

/// The median time of a fault that waits for a handler in another thread.
fn event_time(slot: &Arc<Slot>) -> Result<Duration> {
    const PAGES: u64 = 150;
    let first = slot.guest.pages() - PAGES;
    let serving = slot.clone();
    let handler = Handler::start(slot, move |event| {
        serving
            .vm
            .mark(ID, State::Present, &[PageRange::page(event.page)])?;
        Ok(())
    })?;
    let mut times = Vec::new();
    for page in first..first + PAGES {
        let start = Instant::now();
        let touched = sys::load(slot.address(page));
        times.push(start.elapsed());
        ensure!(
            matches!(touched, Touched::Value(_)),
            "page {page}: {touched:x?}"
        );
    }
    slot.mark_range(State::Absent, PageRange::new(first, PAGES))?;
    handler.stop()?;
    Ok(median(times))
}

/// Invariant 7: a fault, on a page that is there or not, and the calls that change a page's state, take as
/// long in the large case as in the small one.
fn compare_faults(
    small: &dyn Fn() -> Result<Arc<Slot>>,
    large: &dyn Fn() -> Result<Arc<Slot>>,
) -> Result {
    let (small, large) = (small()?, large()?);
    for (i, what) in ["a fault", "making absent", "making present"]
        .into_iter()
        .enumerate()
    {
        compare(
            what,
            || Ok(fault_times(&small)?[i]),
            || Ok(fault_times(&large)?[i]),
        )?;
    }
    compare(
        "a fault that waits",
        || event_time(&small),
        || event_time(&large),
    )
}

/// Invariant 7: the last of 2000 memslots is created in the time of the first.
fn create_and_count() -> Result {
    let mut last = (Duration::ZERO, Duration::ZERO);
    for _ in 0..4 {
        let slot = small()?;
        let mut times = Vec::new();
        for number in 0..MANY {
            times.push(add_slot(&slot, number)?);
        }
        let some = 50;
        last = (
            median(times[..some].to_vec()),
            median(times[times.len() - some..].to_vec()),
        );
        if last.1 <= last.0 * BOUND {
            println!("create: {:?} and {:?}", last.0, last.1);
            return Ok(());
        }
    }
    fail!(
        "the first memslots took {:?} each, the last ones {:?}",
        last.0,
        last.1
    )
}
