// SPDX-License-Identifier: GPL-2.0

//! Native memory and KVM's asynchronous page faults. A kworker waits for an absent page. Meanwhile
//! the vCPU continues, or halts until an interrupt comes.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kdp_vmm::linux::{PageRequester, Paged, Ram};
use kdp_vmm::{Stop, Vcpu};
use kvm_demand_paging::PageRange;

use super::native::{make_private, native, smaps};
use crate::check::Result;
use crate::content;
use crate::guest;
use crate::linux::{self, Console, Snapshot};
use crate::loop_device::Swap;
use crate::slot::{counter, next_event, Slot, GPA, PAGE};
use crate::sys::{self, Child, Ended};
use crate::task::{until, Task};

tests! {
    "native-async-kworker-leaves-the-vcpu-to-ask" => leaves_the_vcpu_to_ask,
    "native-async-kworker-ends-with-its-process" => ends_with_its_process,
    "native-async-kworker-ends-with-its-vm" => ends_with_its_vm,
    "native-async-kworker-lets-signals-through" => lets_signals_through,
    "native-async-read-makes-no-private-copy" => read_makes_no_private_copy,
    "native-async-linux-works-while-one-waits" => linux_works_while_one_waits,
    "native-async-linux-vcpu-never-sleeps" => linux_vcpu_never_sleeps,
}

const PAGES: u64 = 64;

/// Creates a vCPU that runs [`guest::peek`], in a machine with KVM's interrupt controllers.
fn vcpu(slot: &Slot, pages: &[u64]) -> Result<Vcpu> {
    let machine = slot.machine()?;
    machine.fd().create_irq_chip()?;
    Ok(machine.vcpu(0, &guest::peek(pages))?)
}

/// Runs a vCPU of [`vcpu`] until it has reported that many words. The guest must not halt after
/// them: KVM would wait for an interrupt. `interrupted` counts how often KVM_RUN returns for a
/// signal.
fn run(vcpu: &mut Vcpu, words: usize, interrupted: &AtomicU64) -> Result<Vec<u64>> {
    let mut reports = Vec::new();
    while reports.len() < words {
        match vcpu.run()? {
            Stop::Report(value) => reports.push(value),
            Stop::Fault(fault) => guest::no_fault(&fault)?,
            Stop::Interrupted => drop(interrupted.fetch_add(1, Ordering::Release)),
            other => fail!("the guest stopped: {other:?}"),
        }
    }
    Ok(reports)
}

/// Starts a thread that calls [`run`]. Returns the thread, and its counter of signals.
fn start(slot: &Slot, pages: &[u64]) -> Result<(Task<Vec<u64>>, Arc<AtomicU64>)> {
    let mut vcpu = vcpu(slot, pages)?;
    let interrupted = Arc::new(AtomicU64::new(0));
    let (counting, words) = (interrupted.clone(), pages.len());
    let task = Task::work(move || run(&mut vcpu, words, &counting))?;
    Ok((task, interrupted))
}

/// Reads the next event, which must be of an access to this page by a kworker. Returns the
/// kworker's thread ID.
fn event_of_kworker(slot: &Slot, page: u64) -> Result<u32> {
    let event = slot.event()?;
    ensure_eq!(event.gfn, GPA / PAGE + page, "the event's GFN");
    let Some(tid) = event.tid else {
        fail!("nobody asks for the page: {event:?}");
    };
    let comm = fs::read_to_string(format!("/proc/{tid}/comm"))?;
    ensure!(
        comm.starts_with("kworker/"),
        "'{}' asks for the page",
        comm.trim()
    );
    Ok(tid)
}

/// A kworker waits for a limited time. Then the vCPU's own thread waits, and gets the page.
fn leaves_the_vcpu_to_ask() -> Result {
    const LATE: u64 = 5;
    const NEXT: u64 = 6;
    let slot = native(PAGES)?;
    let (mut task, _) = start(&slot, &[LATE, NEXT])?;
    event_of_kworker(&slot, LATE)?;
    let waits = slot.counter("waits")?;
    // The event of this page was read already: there is no second one.
    until("the vCPU's own thread waits for the page", || {
        Ok(slot.counter("waits")? > waits)
    })?;
    task.still_waits("a vCPU that asks for an absent page")?;
    slot.place(LATE, 1)?;
    event_of_kworker(&slot, NEXT)?;
    slot.place(NEXT, 1)?;
    let words = [LATE, NEXT].map(|page| content::word(page, 1, 0));
    ensure_eq!(task.join("the vCPU")?, words, "what it read");
    Ok(())
}

/// A VMM that is killed ends although a kworker waits for one of its pages. The memory and the KVM
/// VM stay until the kworker has ended. No signal can end the kworker.
fn ends_with_its_process() -> Result {
    let slot = native(PAGES)?;
    let mut child = Child::fork(|| {
        let mut vcpu = vcpu(&slot, &[5])?;
        run(&mut vcpu, 1, &AtomicU64::new(0)).map(drop)
    })?;
    let kworker = event_of_kworker(&slot, 5)?;
    let killed = Instant::now();
    child.kill(libc::SIGKILL)?;
    let ended = child.wait(Duration::from_secs(20))?;
    ensure_eq!(ended, Ended::Signal(libc::SIGKILL), "the VMM's end");
    println!("the VMM ended after {:?}", killed.elapsed());
    until("its kworker has ended", || {
        let stack = fs::read_to_string(format!("/proc/{kworker}/stack"));
        Ok(!stack.is_ok_and(|stack| stack.contains("async_pf_execute")))
    })?;
    println!("its kworker ended after {:?}", killed.elapsed());
    Ok(())
}

/// A task that closes a VM waits for the VM's kworkers (kvm_clear_async_pf_completion_queue() in
/// virt/kvm/async_pf.c), but not for the page.
fn ends_with_its_vm() -> Result {
    let slot = native(PAGES)?;
    let mut vcpu = vcpu(&slot, &[5])?;
    sys::catch_idly(libc::SIGUSR1)?;
    let task = Task::work(move || match vcpu.run()? {
        Stop::Interrupted => {
            let start = Instant::now();
            drop(vcpu);
            Ok(start.elapsed())
        }
        other => fail!("the guest stopped: {other:?}"),
    })?;
    event_of_kworker(&slot, 5)?;
    sys::signal_thread(task.tid, libc::SIGUSR1)?;
    println!("the VM was closed in {:?}", task.join("who closes the VM")?);
    Ok(())
}

/// A signal ends KVM_RUN while a kworker waits.
fn lets_signals_through() -> Result {
    let slot = native(PAGES)?;
    let pages: Vec<u64> = (0..PAGES).collect();
    sys::catch_idly(libc::SIGUSR1)?;
    let (task, interrupted) = start(&slot, &pages)?;
    let mut seen = false;
    for page in 0..PAGES {
        event_of_kworker(&slot, page)?;
        if !seen {
            let (waits, before) = (slot.counter("waits")?, interrupted.load(Ordering::Acquire));
            sys::signal_thread(task.tid, libc::SIGUSR1)?;
            until("KVM_RUN ends for a signal", || {
                Ok(interrupted.load(Ordering::Acquire) > before)
            })?;
            // On a slow machine, the kworker's time may be over, and the vCPU's thread may wait.
            seen = slot.counter("waits")? == waits;
        }
        slot.place(page, 1)?;
    }
    ensure!(seen, "no signal came while a kworker waited");
    let words: Vec<u64> = pages
        .iter()
        .map(|&page| content::word(page, 1, 0))
        .collect();
    ensure_eq!(task.join("the vCPU")?, words, "what it read");
    Ok(())
}

/// In a private mapping, a page that the guest only reads gets no private copy, also if it was
/// absent. KVM's asynchronous page fault asks for write access.
fn read_makes_no_private_copy() -> Result {
    let slot = native(PAGES)?;
    make_private(&slot)?;
    let pages: Vec<u64> = (0..PAGES).collect();
    let (task, _) = start(&slot, &pages)?;
    for page in 0..PAGES {
        event_of_kworker(&slot, page)?;
        slot.place(page, 1)?;
    }
    let words: Vec<u64> = pages
        .iter()
        .map(|&page| content::word(page, 1, 0))
        .collect();
    ensure_eq!(task.join("the vCPU")?, words, "what it read");
    ensure_eq!(smaps(slot.address(0), "Anonymous")?, 0, "private pages");
    // The module does not count the failed accesses of kworkers.
    ensure_eq!(slot.counter("sigbus")?, 0, "accesses that failed");
    Ok(())
}

/// How many pages the Linux guest reads.
const READ: u64 = 16;

/// How long the test keeps a page absent.
const AWAY: Duration = Duration::from_millis(100);

/// A Linux guest of one vCPU. One of its processes reads pages in turn, and another one counts
/// without a pause (demo/guest/waits.h).
struct Linux {
    ram: Arc<Ram>,
    memory: File,
    /// The pages that the guest reads.
    pages: Vec<u64>,
    /// The address of the counter in the memory.
    counter: u64,
}

impl Linux {
    /// Creates the guest. Also returns the state from which [`linux::restore`] runs it.
    fn new() -> Result<(Self, Vec<u8>)> {
        let load = format!("kdp_waits={READ}");
        let snapshot = linux::snapshot_of("waits", 1, &load, "KDP-WAITS ")?;
        let found = find(&snapshot)?;
        let (Some(first), pages) = (found[0], &found[1..]) else {
            fail!("the guest's counter is not in its memory");
        };
        let pages = pages.iter().flatten().copied().collect::<Vec<_>>();
        ensure_eq!(
            pages.len() as u64,
            READ,
            "pages found of those that are read"
        );
        let ram = linux::memory(Some(snapshot.memory.as_fd()))?;
        let linux = Self {
            memory: ram.memfd().as_fd().try_clone_to_owned()?.into(),
            ram,
            pages,
            counter: first * PAGE + 16,
        };
        Ok((linux, snapshot.state))
    }

    fn paged(&self) -> &Paged {
        self.ram.paged().expect("memory of the device")
    }

    fn stat(&self, name: &str) -> Result<u64> {
        counter(self.paged().memslot().as_fd(), name)
    }

    fn count(&self) -> Result<u64> {
        word(&self.memory, self.counter)
    }

    /// How far the counting process counts in a millisecond. Measures for [`AWAY`].
    fn pace(&self) -> Result<f64> {
        let (start, before) = (Instant::now(), self.count()?);
        std::thread::sleep(AWAY);
        let counted = self.count()? - before;
        Ok(counted as f64 / start.elapsed().as_secs_f64() / 1e3)
    }

    fn take_away(&self, page: u64) -> Result {
        let range = [PageRange::page(page)];
        Ok(self
            .paged()
            .vm()
            .mark_absent(self.paged().slot_id(), &range)
            .map(drop)?)
    }

    fn give_back(&self, page: u64) -> Result {
        let range = [PageRange::page(page)];
        Ok(self
            .paged()
            .vm()
            .mark_present(self.paged().slot_id(), &range)
            .map(drop)?)
    }
}

fn word(memory: &File, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Finds the guest's pages of demo/guest/waits.h. The index is the page's number there.
fn find(snapshot: &Snapshot) -> Result<Vec<Option<u64>>> {
    const MAGIC: u64 = 0x6b64_702d_7761_6974;
    let mut found = vec![None; READ as usize + 1];
    for page in 0..linux::MEMORY / PAGE {
        if word(&snapshot.memory, page * PAGE)? == MAGIC {
            let number = word(&snapshot.memory, page * PAGE + 8)?;
            if let Some(place) = found.get_mut(number as usize) {
                *place = Some(page);
            }
        }
    }
    Ok(found)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A page requester for a guest with exits on. It measures the counter's pace before it provides a
/// page.
struct Slow {
    linux: Arc<Linux>,
    paces: Mutex<Vec<f64>>,
}

impl Slow {
    fn paces(&self) -> MutexGuard<'_, Vec<f64>> {
        self.paces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PageRequester for Slow {
    fn fetch(
        &self,
        page: u64,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let pace = self.linux.pace().map_err(|e| e.to_string())?;
        self.paces().push(pace);
        self.linux.give_back(page).map_err(|e| e.to_string())?;
        Ok(())
    }
}

/// While a process of a Linux guest waits for a page, another process works on the same vCPU. That
/// is by asynchronous page faults, and so only with exits off. With exits on, the vCPU runs
/// nothing.
fn linux_works_while_one_waits() -> Result {
    let (linux, state) = Linux::new()?;
    let console = Console::default();
    let machine = linux::restore(linux.ram.clone(), &state, &console, None)?;
    let (mut alone, mut waiting) = (Vec::new(), Vec::new());
    for &page in &linux.pages {
        alone.push(linux.pace()?);
        linux.take_away(page)?;
        let event = next_event(linux.paged().vm())?;
        ensure_eq!(event.page, page, "the page that the guest waits for");
        waiting.push(linux.pace()?);
        linux.give_back(page)?;
    }
    linux::still_runs(&machine)?;
    drop(machine);
    console.check()?;

    let (linux, state) = Linux::new()?;
    let slow = Arc::new(Slow {
        linux: Arc::new(linux),
        paces: Mutex::default(),
    });
    let (linux, console) = (&slow.linux, Console::default());
    let machine = linux::restore(
        linux.ram.clone(),
        &state,
        &console,
        Some(slow.clone() as Arc<dyn PageRequester>),
    )?;
    for (&page, number) in linux.pages.iter().zip(1..) {
        linux.pace()?;
        linux.take_away(page)?;
        until("the vCPU's thread has fetched the page", || {
            Ok(slow.paces().len() >= number)
        })?;
    }
    linux::still_runs(&machine)?;
    drop(machine);
    console.check()?;
    let exits = median(slow.paces().clone());

    let [alone, waiting, exits] =
        [median(alone), median(waiting), exits].map(|pace| pace.round() as u64);
    println!(
        "counted in a millisecond: {alone} with no page away; while a process waits for one, \
         {waiting} with asynchronous page faults and {exits} with exits"
    );
    ensure!(
        waiting > alone / 2,
        "{waiting} in a millisecond while a process waits, of {alone}"
    );
    ensure!(
        exits < alone / 10,
        "{exits} in a millisecond while the vCPU's thread waits, of {alone}"
    );
    Ok(())
}

/// How often a thread of this process has gone to sleep. `name` is the thread's name.
fn sleeps(name: &str) -> Result<u64> {
    for task in fs::read_dir("/proc/self/task")? {
        let at = task?.path();
        if fs::read_to_string(at.join("comm"))?.trim() != name {
            continue;
        }
        let status = fs::read_to_string(at.join("status"))?;
        let key = "voluntary_ctxt_switches:";
        if let Some(count) = status.lines().find_map(|line| line.strip_prefix(key)) {
            return Ok(count.trim().parse()?);
        }
    }
    fail!("there is no thread '{name}'")
}

/// A vCPU's thread does not sleep for a page if KVM has asynchronous page faults. It sleeps neither
/// for an absent page nor for a page in swap, or on its way there.
fn linux_vcpu_never_sleeps() -> Result {
    const VCPU: &str = "vcpu-0";
    let (linux, state) = Linux::new()?;
    let console = Console::default();
    let machine = linux::restore(linux.ram.clone(), &state, &console, None)?;
    // The guest has read all pages once: KVM has mapped what both processes need.
    let faults = linux.stat("faults")?;
    until("the guest reads", || {
        Ok(linux.stat("faults")? >= faults + READ)
    })?;

    let mut slept = 0;
    for &page in &linux.pages {
        let before = sleeps(VCPU)?;
        linux.take_away(page)?;
        next_event(linux.paged().vm())?;
        linux.pace()?;
        slept += sleeps(VCPU)? - before;
        linux.give_back(page)?;
    }
    println!("{slept} sleeps for {READ} absent pages");
    // The vCPU's thread may also sleep for reasons of the guest's own.
    ensure!(slept < READ / 2, "{slept} sleeps for {READ} absent pages");

    let _swap = Swap::on(8 << 20)?;
    let (mut slept, mut swapped) = (0, 0);
    for &page in &linux.pages {
        let at = (linux.ram.guest().addr() + page * PAGE) as *mut u8;
        let (faults, before) = (linux.stat("faults")?, sleeps(VCPU)?);
        sys::advise(at, PAGE as usize, libc::MADV_PAGEOUT)?;
        until("the guest reads the page", || {
            Ok(linux.stat("faults")? > faults)
        })?;
        slept += sleeps(VCPU)? - before;
        swapped += 1;
    }
    println!("{slept} sleeps for {swapped} pages in swap");
    ensure!(
        slept < READ / 2,
        "{slept} sleeps for {swapped} pages in swap"
    );
    linux::still_runs(&machine)?;
    drop(machine);
    console.check()
}
