// SPDX-License-Identifier: GPL-2.0

//! Absent pages, touched by threads, vCPUs and system calls.

use std::hint;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_demand_paging::{Backing, State, Who};

use crate::check::Result;
use crate::content;
use crate::guest;
use crate::handler::Handler;
use crate::harness::rounds;
use crate::slot::{Slot, BACKINGS, BLOCK, PAGE};
use crate::sys;
use crate::task::{until, Task};

tests! {
    "fault-threads-on-one-page" => threads_on_one_page,
    "fault-threads-and-vcpus-on-one-page" => threads_and_vcpus_on_one_page,
    "fault-vcpus-on-the-same-pages" => vcpus_on_the_same_pages,
    "fault-no-wake-up-is-lost" => no_wake_up_is_lost,
    "fault-many-threads-many-pages" => many_threads_many_pages,
    "fault-system-call-reads" => system_call_reads,
    "fault-system-call-writes" => system_call_writes,
    "fault-signal-during-a-system-call" => signal_during_a_system_call,
    "fault-absent-again-while-threads-read" => absent_again_while_threads_read,
}

/// However many threads wait for a page, there is one event, and all of them get the bytes.
fn threads_on_one_page() -> Result {
    const THREADS: u64 = 8;
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        for page in [0, 1, pages / 2, pages - 1] {
            let waits = slot.counter("waits")?;
            let mut threads = Vec::new();
            for _ in 0..THREADS {
                threads.push(slot.checker(page, 1)?);
            }
            until("all threads wait", || {
                Ok(slot.counter("waits")? >= waits + THREADS)
            })?;
            let event = slot.event()?;
            ensure_eq!(
                (
                    event.page,
                    event.access.who,
                    event.access.write,
                    event.deliveries
                ),
                (page, Who::User, false, 1),
                "the event"
            );
            ensure_eq!(u64::from(event.waiters), THREADS, "waiters");
            ensure!(
                threads.iter().any(|t| event.tid == Some(t.tid as u32)),
                "the event names thread {:?}, which did not touch the page",
                event.tid
            );
            slot.no_event()?;
            for thread in &mut threads {
                ensure!(
                    !thread.ends_within(Duration::ZERO)?,
                    "a thread did not wait"
                );
            }
            slot.place(page, 1)?;
            for thread in threads {
                thread.join("a thread whose page is present")?;
            }
            slot.no_event()?;
        }
    }
    Ok(())
}

/// Two threads, a vCPU that waits and a vCPU that exits, on one absent page: one event and one exit; all
/// get the bytes.
fn threads_and_vcpus_on_one_page() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let page = pages / 3;
        let mut waiting = Vec::new();
        for _ in 0..2 {
            waiting.push(slot.checker(page, 7)?);
        }
        let mut waiter = machine.vcpu(0, &guest::peek(&[page]))?;
        let waiter = Task::work(move || guest::run(&mut waiter, guest::no_fault))?;
        until("three threads wait", || Ok(slot.counter("waits")? == 3))?;

        let mut exiter = machine.vcpu(1, &guest::peek(&[page]))?;
        let exiting = slot.clone();
        let exiter = Task::work(move || -> Result<_> {
            exiting.vm.set_vcpu_exits(true)?;
            guest::run(&mut exiter, |fault| {
                ensure_eq!(fault.gpa, guest::gpa(page), "the exit's address");
                // Those who wait have not been let go by the exit.
                let event = exiting.event()?;
                ensure_eq!((event.page, event.waiters), (page, 3), "the event");
                exiting.no_event()?;
                exiting.place(page, 7)
            })
        })?;
        let exited = exiter.join("the vCPU with exits")?;
        ensure_eq!(exited.faults.len(), 1, "exits");
        ensure_eq!(exited.reports, [content::word(page, 7, 0)], "what it read");
        let waited = waiter.join("the vCPU without exits")?;
        ensure_eq!(waited.reports, [content::word(page, 7, 0)], "what it read");
        for thread in waiting {
            thread.join("a thread")?;
        }
        slot.no_event()?;
    }
    Ok(())
}

/// Three vCPUs with exits read the same pages at the same time. Each exits or maps; whoever claims a page
/// fills it; no vCPU ever sees a wrong byte.
fn vcpus_on_the_same_pages() -> Result {
    use kdp_vmm::{Order, Touch};
    const VCPUS: u64 = 3;
    for backing in [Backing::Shmem, Backing::Huge2M] {
        let pages = rounds(256).next_multiple_of(BLOCK);
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let claims: Arc<Vec<AtomicU64>> = Arc::new((0..pages).map(|_| AtomicU64::new(0)).collect());
        // Garbage that nobody may see.
        for page in 0..pages {
            slot.fill(page, 666)?;
        }
        let touch = |vcpu| Touch::new(crate::slot::GPA, Order::random(pages, vcpu / 2)).hash();
        let mut expected = 0_u64;
        for page in 0..pages {
            let words = (0..content::WORDS).map(|at| content::word(page, 1, at));
            let value = touch(0).value(words).wrapping_mul(2 * page + 1);
            expected = expected.wrapping_add(value);
        }
        let mut threads = Vec::new();
        for number in 0..VCPUS {
            let mut vcpu = machine.vcpu(number, &touch(number).program())?;
            let (slot, claims) = (slot.clone(), claims.clone());
            threads.push(Task::work(move || -> Result<_> {
                let present = slot.memslot.bitmap()?;
                slot.vm.set_vcpu_exits(true)?;
                guest::run(&mut vcpu, |fault| {
                    let page = (fault.gpa - guest::gpa(0)) / PAGE;
                    if claims[page as usize].fetch_add(1, Ordering::Relaxed) == 0 {
                        slot.fill(page, 1)?;
                        ensure!(
                            present.set(page),
                            "page {page} was present before it was placed"
                        );
                        return Ok(());
                    }
                    until("the page that another vCPU fills", || {
                        Ok(present.is_present(page))
                    })
                })
            })?);
        }
        let mut exits = 0;
        for thread in threads {
            let ran = thread.join("a vCPU")?;
            ensure_eq!(ran.reports, [expected], "the checksum that a vCPU computed");
            exits += ran.faults.len() as u64;
        }
        ensure!(
            (pages..=VCPUS * pages).contains(&exits),
            "{exits} exits for {pages} pages and {VCPUS} vCPUs"
        );
        ensure_eq!(slot.counter("waits")?, 0, "waits");
    }
    Ok(())
}

/// Invariant 3, no lost wake-up: a thread touches a page at the moment when it is made present, by every
/// order that two threads come in. It goes on, always.
fn no_wake_up_is_lost() -> Result {
    const PAGES: u64 = 64;
    const DONE: u64 = u64::MAX;
    let slot = Slot::new(Backing::Shmem, PAGES)?;
    for page in 0..PAGES {
        slot.fill(page, 1)?;
    }
    // The round that is to be run, and the one that was.
    let start = Arc::new(AtomicU64::new(0));
    let ended = Arc::new(AtomicU64::new(0));
    let (toucher_slot, to_start, has_ended) = (slot.clone(), start.clone(), ended.clone());
    let toucher = Task::work(move || -> Result {
        let mut round = 0;
        loop {
            round += 1;
            let mut next = to_start.load(Ordering::Acquire);
            while next < round {
                std::thread::yield_now();
                next = to_start.load(Ordering::Acquire);
            }
            if next == DONE {
                return Ok(());
            }
            let page = round % PAGES;
            let got = sys::load(toucher_slot.address(page));
            ensure_eq!(
                got,
                sys::Touched::Value(content::word(page, 1, 0)),
                "page {page}"
            );
            has_ended.store(round, Ordering::Release);
        }
    })?;
    let mut delay = 0_u64;
    for round in 1..=rounds(1200) {
        let page = round % PAGES;
        start.store(round, Ordering::Release);
        // From before the touch to after the thread has gone to sleep.
        delay = (delay + 97) % 10_000;
        for step in 0..delay {
            hint::black_box(step);
        }
        slot.mark(State::Present, page)?;
        let present_since = Instant::now();
        while ended.load(Ordering::Acquire) < round {
            ensure!(
                present_since.elapsed() < Duration::from_secs(5),
                "round {round}: page {page} has been present for 5 s and is still waited for"
            );
            std::thread::yield_now();
        }
        slot.mark(State::Absent, page)?;
    }
    start.store(DONE, Ordering::Release);
    let woken = slot.counter("waits")?;
    ensure!(woken > 0, "no thread ever had to wait");
    toucher.join("the toucher")
}

/// Threads touch many pages, each page by several of them, and every event is answered once. Every thread
/// ends, and there is no event but one for each page.
fn many_threads_many_pages() -> Result {
    const THREADS: u64 = 6;
    for backing in [Backing::Shmem, Backing::Huge2M] {
        let pages = rounds(512).next_multiple_of(BLOCK);
        let slot = Slot::new(backing, pages)?;
        let serving = slot.clone();
        let handler = Handler::start(&slot, move |event| {
            ensure_eq!(event.deliveries, 1, "deliveries of page {:#x}", event.page);
            serving.place(event.page, 1)
        })?;
        let mut threads = Vec::new();
        for thread in 0..THREADS {
            let slot = slot.clone();
            threads.push(Task::work(move || -> Result {
                for i in 0..pages {
                    // Half of them from the other end.
                    let page = if thread % 2 == 0 { i } else { pages - 1 - i };
                    slot.check(page, 1)?;
                }
                Ok(())
            })?);
        }
        for thread in threads {
            thread.join("a thread")?;
        }
        ensure_eq!(handler.events(), pages, "events");
        handler.stop()?;
        slot.no_event()?;
    }
    Ok(())
}

/// write(2) from an absent page waits, as an access of the kernel's, and then writes the right bytes.
fn system_call_reads() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let (read, write) = sys::pipe()?;
        for page in [0, pages - 1] {
            let (writing, into) = (slot.clone(), write.try_clone()?);
            let mut task = Task::spawn(move || {
                sys::write_from(into.as_fd(), writing.address(page).cast(), PAGE as usize)
            })?;
            let event = slot.event()?;
            ensure_eq!(
                (event.page, event.access.who, event.access.write, event.tid),
                (page, Who::Kernel, false, Some(task.tid as u32)),
                "the event"
            );
            task.still_waits("write()")?;
            slot.place(page, 5)?;
            ensure_eq!(task.join("write()")??, PAGE as usize, "bytes written");
            let mut bytes = [0; PAGE as usize];
            // SAFETY: the buffer is this thread's own.
            let n = unsafe { sys::read_to(read.as_fd(), bytes.as_mut_ptr(), bytes.len())? };
            ensure_eq!(n, PAGE as usize, "bytes read");
            ensure!(
                bytes == content::bytes(page, 5),
                "write() wrote other bytes"
            );
        }
    }
    Ok(())
}

/// read(2) into an absent page waits, and what it reads stands in the page, on top of what was fetched.
fn system_call_writes() -> Result {
    const TEXT: &[u8] = b"from the pipe";
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let (read, write) = sys::pipe()?;
        let page = pages - 2;
        sys::write_from(write.as_fd(), TEXT.as_ptr(), TEXT.len())?;
        let reading = slot.clone();
        let mut task = Task::spawn(move || {
            let to = reading.address(page).cast::<u8>().wrapping_add(8);
            // SAFETY: guest memory, of which there are no references.
            unsafe { sys::read_to(read.as_fd(), to, TEXT.len()) }
        })?;
        let event = slot.event()?;
        ensure_eq!(
            (event.page, event.access.who, event.access.write),
            (page, Who::Kernel, true),
            "the event"
        );
        task.still_waits("read()")?;
        slot.place(page, 5)?;
        ensure_eq!(task.join("read()")??, TEXT.len(), "bytes read");
        let mut expected = content::bytes(page, 5);
        expected[8..8 + TEXT.len()].copy_from_slice(TEXT);
        let mut bytes = [0; PAGE as usize];
        slot.alias.read(page, &mut bytes)?;
        ensure!(bytes == expected, "the page has other bytes");
    }
    Ok(())
}

/// A plain signal to a thread whose system call waits for a page changes nothing: the call goes on
/// waiting, asleep, and there is still one event, read once.
fn signal_during_a_system_call() -> Result {
    sys::catch_idly(libc::SIGUSR1)?;
    let slot = Slot::new(Backing::Shmem, 8)?;
    let write = sys::pipe_to_write()?;
    let writing = slot.clone();
    let mut task = Task::spawn(move || {
        sys::write_from(write.as_fd(), writing.address(2).cast(), PAGE as usize)
    })?;
    ensure_eq!(slot.event()?.page, 2, "the event's page");
    let waits = slot.counter("waits")?;
    sys::signal_thread(task.tid, libc::SIGUSR1)?;
    task.still_waits("write()")?;
    let again = slot.counter("waits")? - waits;
    ensure!(
        again <= 2,
        "after a signal the thread has begun to wait {again} more times: it does not sleep"
    );
    slot.no_event()?;
    slot.place(2, 1)?;
    ensure_eq!(task.join("write()")??, PAGE as usize, "bytes written");
    Ok(())
}

/// Pages are made absent again while threads read them: a thread that begins to read after that sees the
/// bytes of the next version, or waits; never bytes of the past.
fn absent_again_while_threads_read() -> Result {
    const PAGES: u64 = 4;
    const THREADS: usize = 3;
    for backing in [Backing::Shmem, Backing::Huge2M] {
        let slot = Slot::new(backing, PAGES.next_multiple_of(BLOCK))?;
        let floors: Arc<Vec<AtomicU64>> =
            Arc::new((0..=PAGES).map(|_| AtomicU64::new(1)).collect());
        for page in 0..PAGES {
            slot.alias.write(page, &number_page(1))?;
            slot.mark(State::Present, page)?;
        }
        let mut threads = Vec::new();
        for _ in 0..THREADS {
            let (slot, floors) = (slot.clone(), floors.clone());
            threads.push(Task::work(move || -> Result<u64> {
                let mut looks = 0;
                while floors[PAGES as usize].load(Ordering::Acquire) != u64::MAX {
                    for page in 0..PAGES {
                        let floor = floors[page as usize].load(Ordering::Acquire);
                        for at in [0, 511] {
                            match sys::load(slot.address(page).wrapping_add(at)) {
                                sys::Touched::Value(saw) if saw >= floor => looks += 1,
                                other => fail!("page {page}, floor {floor}: {other:x?}"),
                            }
                        }
                    }
                }
                Ok(looks)
            })?);
        }
        for version in 2..2 + rounds(400) {
            let page = version % PAGES;
            slot.mark(State::Absent, page)?;
            // Whoever still has the page mapped reads what is no longer right.
            floors[page as usize].store(version, Ordering::Release);
            if version % 7 == 0 {
                std::thread::yield_now();
            }
            slot.alias.write(page, &number_page(version))?;
            slot.mark(State::Present, page)?;
        }
        floors[PAGES as usize].store(u64::MAX, Ordering::Release);
        for thread in threads {
            ensure!(thread.join("a reader")? > 0, "a thread has read nothing");
        }
    }
    Ok(())
}

/// A page whose every word is the number.
pub(super) fn number_page(number: u64) -> [u8; PAGE as usize] {
    let mut bytes = [0; PAGE as usize];
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}
