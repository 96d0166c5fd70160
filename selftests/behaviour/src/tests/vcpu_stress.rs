// SPDX-License-Identifier: GPL-2.0

//! Guests that run while the states of their pages change under them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kdp_vmm::{Order, Touch};
use kvm_demand_paging::{Backing, PageRange, Paging, State};

use super::fault::number_page;
use crate::check::Result;
use crate::content;
use crate::guest::{self, WATCH_STOP};
use crate::handler::Handler;
use crate::harness::rounds;
use crate::shared::Shared;
use crate::slot::{Slot, BLOCK, GPA, ID, PAGE};
use crate::task::{until, Task, PATIENCE};

tests! {
    "vcpu-absent-again-exits-shmem" => || absent_again(Backing::Shmem, true),
    "vcpu-absent-again-exits-hugetlb" => || absent_again(Backing::Huge2M, true),
    "vcpu-absent-again-waits-shmem" => || absent_again(Backing::Shmem, false),
    "vcpu-absent-again-waits-hugetlb" => || absent_again(Backing::Huge2M, false),
    "vcpu-paging-off-and-on-shmem" => || paging_off_and_on(Backing::Shmem),
    "vcpu-paging-off-and-on-hugetlb" => || paging_off_and_on(Backing::Huge2M),
    "vcpu-run-never-fails-shmem" => || run_never_fails(Backing::Shmem, Served::Waits),
    "vcpu-run-never-fails-hugetlb" => || run_never_fails(Backing::Huge2M, Served::Waits),
    "vcpu-run-never-fails-with-exits" => || run_never_fails(Backing::Shmem, Served::Exits),
    "vcpu-run-never-fails-with-pre-faults" => || run_never_fails(Backing::Shmem, Served::PreFaults),
}

/// Where the guest has the floors of a watch.
const FLOORS_GPA: u64 = GPA + (1 << 30);

/// Pages that are watched. The last one's version is the newest.
const WATCHED: u64 = 4;

/// The newest version of each watched page. Who holds the lock may rely on no page being placed.
#[derive(Default)]
struct Versions(Mutex<[u64; WATCHED as usize]>);

impl Versions {
    fn lock(&self) -> MutexGuard<'_, [u64; WATCHED as usize]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills a page with its newest version and makes it present: what whoever gets the fault does.
    fn place(&self, slot: &Slot, page: u64) -> Result {
        let versions = self.lock();
        slot.alias
            .write(page, &number_page(versions[page as usize]))?;
        slot.mark(State::Present, page)?;
        Ok(())
    }
}

/// Pages are made absent again and again under a running guest. Once the call has returned, the guest never
/// reads a byte of the version before: it faults, and gets the next one.
fn absent_again(backing: Backing, exits: bool) -> Result {
    let slot = Slot::new(backing, WATCHED.next_multiple_of(BLOCK))?;
    let machine = slot.machine()?;
    let floors = Shared::new(WATCHED as usize + 1)?;
    machine.map(FLOORS_GPA, floors.memory())?;
    // Whole blocks first, so that there are huge pages to take apart.
    slot.mark_range(State::Present, PageRange::new(0, slot.guest.pages()))?;
    let versions = Arc::new(Versions::default());
    let (serving, served) = (slot.clone(), versions.clone());
    let handler = Handler::start(&slot, move |event| served.place(&serving, event.page))?;
    let mut vcpu = machine.vcpu(0, &guest::watch(FLOORS_GPA, WATCHED))?;
    let exited = Arc::new(AtomicU64::new(0));
    let (exiting, placing, counted) = (slot.clone(), versions.clone(), exited.clone());
    let mut task = Task::work(move || -> Result<_> {
        exiting.vm.set_vcpu_exits(exits)?;
        guest::run(&mut vcpu, |fault| {
            ensure!(exits, "an exit of a thread that has exits off: {fault:x?}");
            counted.fetch_add(1, Ordering::AcqRel);
            placing.place(&exiting, (fault.gpa - GPA) / PAGE)
        })
    })?;
    let faults = || handler.events() + exited.load(Ordering::Acquire);
    let rounds = rounds(400);
    for version in 1..=rounds {
        let page = version % WATCHED;
        let before = faults();
        {
            let mut newest = versions.lock();
            newest[page as usize] = version;
            slot.mark(State::Absent, page)?;
            // From here on everything older is of the past.
            floors.at(page as usize).store(version, Ordering::Release);
        }
        if version % 3 == 0 {
            // The guest comes by sooner or later, and finds a page absent.
            until("the guest faults", || {
                Ok(faults() > before || task.ends_within(Duration::ZERO)?)
            })?;
        }
        if task.ends_within(Duration::ZERO)? {
            break;
        }
    }
    floors
        .at(WATCHED as usize)
        .store(WATCH_STOP, Ordering::Release);
    let looks = guest::watched(&task.join("the vCPU")?)?;
    // It must have run; how fast is the machine's affair.
    ensure!(
        looks >= rounds / 20,
        "the guest has looked at {looks} pages"
    );
    ensure_eq!(
        exits,
        exited.load(Ordering::Acquire) > 0,
        "whether the guest exited"
    );
    handler.stop()
}

/// Demand paging is switched off and on while two vCPUs run, one with exits and one without: every
/// checksum that they compute is right, and no KVM_RUN fails.
fn paging_off_and_on(backing: Backing) -> Result {
    const GARBAGE: u64 = 666;
    const GOOD: u64 = 1;
    let pages = BLOCK;
    let slot = Slot::new(backing, pages)?;
    let machine = slot.machine()?;
    // Who holds it may rely on no page becoming present under it.
    let placing = Arc::new(Mutex::new(()));
    let place = {
        let (slot, placing) = (slot.clone(), placing.clone());
        move |page| -> Result {
            let _placing = placing.lock().unwrap_or_else(PoisonError::into_inner);
            slot.place(page, GOOD)
        }
    };
    let serve = place.clone();
    let handler = Handler::start(&slot, move |event| serve(event.page))?;
    let touch = |vcpu| Touch::new(GPA, Order::random(pages, vcpu)).hash();
    let mut expected = 0_u64;
    for page in 0..pages {
        let words = (0..content::WORDS).map(|at| content::word(page, GOOD, at));
        expected = expected.wrapping_add(touch(0).value(words).wrapping_mul(2 * page + 1));
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for number in 0..2 {
        let (slot, place, machine) = (slot.clone(), place.clone(), machine.clone());
        let program = touch(number).rounds(u64::MAX).program();
        let stop = stop.clone();
        tasks.push(Task::work(move || -> Result<(u64, u64)> {
            let mut vcpu = machine.vcpu(number, &program)?;
            slot.vm.set_vcpu_exits(number == 0)?;
            let (mut sums, mut exits) = (0, 0);
            // The program has no end: it reports after every round.
            while !(stop.load(Ordering::Acquire) && sums > 0) {
                match vcpu.run()? {
                    kdp_vmm::Stop::Fault(fault) => {
                        ensure!(
                            number == 0,
                            "an exit of a thread that has exits off: {fault:x?}"
                        );
                        exits += 1;
                        place((fault.gpa - GPA) / PAGE)?;
                    }
                    kdp_vmm::Stop::Report(sum) => {
                        ensure_eq!(sum, expected, "checksum {sums} of vCPU {number}");
                        sums += 1;
                    }
                    _ => {}
                }
            }
            Ok((sums, exits))
        })?);
    }
    for round in 0..rounds(12) {
        {
            let _placing = placing.lock().unwrap_or_else(PoisonError::into_inner);
            slot.vm.set_paging(ID, Paging::On)?;
            // Nobody has any page now, so nobody may see this.
            for page in 0..pages {
                slot.fill(page, GARBAGE)?;
            }
        }
        std::thread::sleep(Duration::from_millis(15 + 10 * (round % 5)));
        {
            let _placing = placing.lock().unwrap_or_else(PoisonError::into_inner);
            let present = slot.memslot.bitmap()?;
            for page in (0..pages).filter(|&page| !present.is_present(page)) {
                slot.fill(page, GOOD)?;
            }
            drop(present);
            let mode = if round % 3 == 0 {
                Paging::OnPresent
            } else {
                Paging::Off
            };
            slot.vm.set_paging(ID, mode)?;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    stop.store(true, Ordering::Release);
    for (number, task) in tasks.into_iter().enumerate() {
        let (_, exits) = task.join("a vCPU")?;
        ensure!(number != 0 || exits > 0, "the vCPU with exits never exited");
    }
    ensure!(handler.events() > 0, "the vCPU without exits never waited");
    handler.stop()
}

/// How a vCPU is served.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    /// It waits.
    Waits,
    /// It exits.
    Exits,
    /// It exits, and the page is mapped by KVM_PRE_FAULT_MEMORY before it goes on: that may fail, or wait.
    PreFaults,
}

/// A third party makes pages present and absent again, after a time of every length, and switches demand
/// paging off and on, under a running vCPU: KVM_RUN never fails, but for the exits that were asked for. An
/// unmodified QEMU would stop its guest at the first EFAULT.
fn run_never_fails(backing: Backing, served: Served) -> Result {
    let exits = served != Served::Waits;
    const PAGES: u64 = 4;
    let whole = PageRange::new(0, BLOCK);
    let slot = Slot::new(backing, BLOCK)?;
    let machine = slot.machine()?;
    for page in 0..PAGES {
        slot.alias.write(page, &number_page(1))?;
    }
    let floors = Shared::new(PAGES as usize + 1)?;
    machine.map(FLOORS_GPA, floors.memory())?;
    for page in 0..PAGES {
        floors.at(page as usize).store(1, Ordering::Release);
    }
    let mut vcpu = machine.vcpu(0, &guest::watch(FLOORS_GPA, PAGES))?;
    let vm = slot.vm.try_clone()?;
    let mut task = Task::work(move || -> Result<_> {
        vm.set_vcpu_exits(exits)?;
        guest::run_with(&mut vcpu, |vcpu, fault| {
            ensure!(exits, "an exit of a thread that has exits off: {fault:x?}");
            if served == Served::PreFaults {
                vcpu.pre_fault(fault.gpa, fault.size);
            }
            Ok(())
        })
    })?;
    let mut delay = 0_u64;
    let faults = || -> Result<u64> { Ok(slot.counter("waits")? + slot.counter("exits")?) };
    let deadline = Instant::now() + PATIENCE;
    for round in 0.. {
        // However slow the guest is, it must come by often enough.
        if round >= rounds(3000) && (faults()? > 100 || Instant::now() > deadline) {
            break;
        }
        slot.mark_range(State::Present, whole)?;
        // From no time at all to as long as the guest needs to come round.
        delay = (delay + 211) % 60_000;
        for step in 0..delay {
            std::hint::black_box(step);
        }
        if round % 300 == 299 {
            slot.vm.set_paging(ID, Paging::Off)?;
            slot.vm.set_paging(ID, Paging::OnPresent)?;
        }
        // One page, or all of them.
        let absent = match round % (PAGES + 1) {
            PAGES => whole,
            page => PageRange::page(page),
        };
        slot.mark_range(State::Absent, absent)?;
        if task.ends_within(Duration::ZERO)? {
            break;
        }
    }
    floors
        .at(PAGES as usize)
        .store(WATCH_STOP, Ordering::Release);
    slot.mark_range(State::Present, whole)?;
    let looks = guest::watched(&task.join("the vCPU")?)?;
    ensure!(looks > 0, "the guest has looked at nothing");
    let faults = faults()?;
    ensure!(
        faults > 100,
        "the guest has found a page absent {faults} times only"
    );
    Ok(())
}
