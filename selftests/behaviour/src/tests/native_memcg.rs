// SPDX-License-Identifier: GPL-2.0

//! Native memory and the kernel's limits: which memory cgroup is charged, what happens at
//! memory.max, and swap.

use std::fs;
use std::iter;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kdp_vmm::{Order, Touch};
use kvm_demand_paging::{abi, PageRange, Placed, State};

use super::native::{native, smaps};
use crate::busy::{Busy, VCPUS};
use crate::cgroup::Cgroup;
use crate::check::Result;
use crate::content;
use crate::guest;
use crate::handler::Handler;
use crate::harness::{count, soak};
use crate::loop_device::Swap;
use crate::numa::Setting;
use crate::shared::Shared;
use crate::slot::{need_kvm, Slot, BLOCK, GPA, ID, PAGE};
use crate::stuck;
use crate::sys::{self, Child, Ended};
use crate::task::until;

tests! {
    "native-memcg-charges-who-touches" => charges_who_touches,
    "native-memcg-place-at-the-limit-is-enomem" => || place_at_the_limit(OnLimit::Fails),
    "native-memcg-oom-kills-who-places" => || place_at_the_limit(OnLimit::Kills),
    "native-memcg-oom-kills-who-touches" => || oom_kills(process_touches),
    "native-memcg-oom-kills-a-vcpu" => || oom_kills(vcpu_touches),
    "native-swapped-pages-come-back" => swapped_pages_come_back,
    "native-swap-beside-a-guest" => swap_beside_a_guest,
}

const MIB: u64 = 1 << 20;

/// How long a child process may take.
const LONG: Duration = Duration::from_secs(60);

/// Bytes that the kernel may charge beside the pages: the stock of each CPU (MEMCG_CHARGE_BATCH),
/// page tables, and the other memory of a process.
const SLACK: u64 = 4 * MIB;

/// Creates a memory cgroup with a limit, and without swap.
fn limited(bytes: u64) -> Result<Cgroup> {
    let cgroup = Cgroup::new("memory")?;
    cgroup.set("memory.max", bytes)?;
    cgroup.set("memory.swap.max", 0)?;
    Ok(cgroup)
}

/// The kernel charges a page to the memory cgroup of the process that accesses it first, or that
/// places it. It charges no other cgroup.
fn charges_who_touches() -> Result {
    const PART: u64 = 4 * BLOCK;
    const BYTES: u64 = PART * PAGE;
    let vmm = Cgroup::new("memory")?;
    let toucher = limited(2 * BYTES + SLACK)?;
    vmm.enter()?;
    let slot = native(3 * PART)?;
    // The child accesses two parts: holes, and zero pages. This process places the third part.
    slot.mark_range(State::Present, PageRange::new(0, PART))?;
    slot.mark_range(State::Zero, PageRange::new(PART, PART))?;
    let before = vmm.number("memory.current")?;
    let mut child = Child::fork(|| {
        toucher.enter()?;
        for page in 0..2 * PART {
            ensure_eq!(slot.words(page)?, [0; content::WORDS], "page {page}");
            slot.guest.write(page, &content::bytes(page, 1))?;
        }
        Ok(())
    })?;
    child.join(LONG)?;
    let charged = vmm.number("memory.peak")?;
    ensure!(
        charged < before + SLACK,
        "{before} bytes were charged to the VMM, {charged} after another process had touched all"
    );
    let peak = toucher.number("memory.peak")?;
    ensure!(
        (2 * BYTES..=2 * BYTES + SLACK).contains(&peak),
        "{peak} bytes were charged to who touched {}",
        2 * BYTES
    );
    ensure_eq!(
        toucher.entry("memory.events", "max")?,
        0,
        "how often the limit was reached"
    );
    for page in 2 * PART..3 * PART {
        slot.vm.place(ID, page, &content::bytes(page, 1))?;
    }
    let charged = vmm.number("memory.peak")?;
    ensure!(
        (BYTES..before + BYTES + SLACK).contains(&charged),
        "{charged} bytes were charged to who placed {BYTES}, and {before} before that"
    );
    // An access to a page that is in memory already charges nobody.
    for page in 0..3 * PART {
        slot.check(page, 1)?;
    }
    ensure!(
        vmm.number("memory.peak")? < charged + SLACK,
        "who touches what is there is charged"
    );
    // When the memory is freed, so is the charge.
    slot.mark_range(State::Absent, PageRange::new(0, 3 * PART))?;
    slot.memfd.punch_hole(PageRange::new(0, 3 * PART))?;
    until("the charges are given back", || {
        Ok(toucher.number("memory.current")? < SLACK
            && vmm.number("memory.current")? < before + SLACK)
    })
}

/// The memory limit, in bytes, of a process that wants more.
const LIMIT: u64 = 16 * MIB;

/// The number of pages that this process wants: all pages of the memslot.
const WANTED: u64 = 2 * LIMIT / PAGE;

/// Writes to all pages in order, as a process.
fn process_touches(slot: &Slot) -> Result {
    for page in 0..WANTED {
        slot.guest.write(page, &content::bytes(page, 1))?;
    }
    Ok(())
}

/// Writes to all pages in order, as a vCPU.
fn vcpu_touches(slot: &Slot) -> Result {
    let touch = Touch::new(GPA, Order::sequential(WANTED)).write(1);
    guest::run(
        &mut slot.machine()?.vcpu(0, &touch.program())?,
        guest::no_fault,
    )
    .map(drop)
}

/// Waits until another process sets a word.
fn wait_for(shared: &Shared, index: usize) {
    while shared.at(index).load(Ordering::Acquire) == 0 {
        thread::sleep(Duration::from_millis(1));
    }
}

/// The OOM killer kills a process that accesses more guest memory than its cgroup may have, and no
/// other process. The bytes that it wrote stay. Its page handler and another VM continue.
fn oom_kills(touches: fn(&Slot) -> Result) -> Result {
    need_kvm()?;
    let (cgroup, other) = (limited(LIMIT)?, Cgroup::new("memory")?);
    let slot = native(WANTED)?;
    slot.mark_range(State::Zero, PageRange::new(1, WANTED - 1))?;
    let go = Shared::new(2)?;
    let mut bystander = Child::fork(|| {
        cgroup.enter()?;
        go.at(1).store(1, Ordering::Release);
        loop {
            // SAFETY: it takes no pointer.
            unsafe { libc::pause() };
        }
    })?;
    let mut victim = Child::fork(|| {
        cgroup.enter()?;
        wait_for(&go, 0);
        touches(&slot)
    })?;
    wait_for(&go, 1);
    other.enter()?;
    let zeros = |slot: &Arc<Slot>| {
        let placing = slot.clone();
        Handler::start(slot, move |event| {
            placing.vm.place(ID, event.page, &[0; PAGE as usize])?;
            Ok(())
        })
    };
    let handler = zeros(&slot)?;
    let neighbour = native(BLOCK)?;
    let its_handler = zeros(&neighbour)?;
    let busy = Busy::start(&neighbour)?;

    go.at(0).store(1, Ordering::Release);
    let ended = victim.wait(LONG)?;
    ensure_eq!(
        ended,
        Ended::Signal(libc::SIGKILL),
        "the end of who touches"
    );
    ensure_eq!(handler.events(), 1, "pages that were asked for");
    ensure_eq!(
        cgroup.entry("memory.events", "oom_kill")?,
        1,
        "processes of its cgroup that were killed"
    );
    ensure!(
        bystander.wait(Duration::ZERO).is_err(),
        "another process of its cgroup was killed"
    );
    ensure_eq!(
        other.entry("memory.events", "oom_kill")?,
        0,
        "processes of the other cgroup that were killed"
    );
    let peak = cgroup.number("memory.peak")?;
    ensure!(
        peak <= LIMIT,
        "{peak} bytes were charged, and {LIMIT} allowed"
    );

    // It wrote to all pages up to one, and to none after that.
    let touch = Touch::new(GPA, Order::sequential(WANTED)).write(1);
    let mut written = 0;
    for page in 0..WANTED {
        let words = slot.words(page)?;
        let is_written = content::check(&words, page, 1).is_ok()
            || (Some(words[0]) == touch.written(page) && words[1..] == [0; content::WORDS - 1]);
        if is_written && written == page {
            written += 1;
        }
        // The page that it was writing when it was killed may have a part of its bytes.
        ensure!(
            is_written || page == written || words == [0; content::WORDS],
            "page {page}, behind {written} written ones, holds {:x?}...",
            &words[..4]
        );
    }
    ensure!(
        (LIMIT / 2 / PAGE..LIMIT / PAGE).contains(&written),
        "it wrote {written} pages"
    );
    // Its page handler and the other VM continue.
    slot.mark(State::Absent, 7)?;
    ensure_eq!(slot.words(7)?, [0; content::WORDS], "page 7, placed anew");
    busy.goes_on(2)?;
    busy.end()?;
    bystander.kill(libc::SIGKILL)?;
    handler.stop()?;
    its_handler.stop()
}

/// What happens to a process at its cgroup's limit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnLimit {
    /// The OOM killer may kill it.
    Kills,
    /// The OOM killer may not kill it: its allocation fails.
    Fails,
}

/// A page handler places pages until its cgroup reaches its limit. Then each page is either placed
/// or absent. An absent page can be placed when there is memory again.
fn place_at_the_limit(on_limit: OnLimit) -> Result {
    /// Pages that one call places.
    const BATCH: u64 = 8;
    /// Words that the page handler shares with the test: the pages that are done, the errno of a
    /// call, and whether to continue.
    const DONE: usize = 0;
    const ERRNO: usize = 1;
    const GO: usize = 2;
    let cgroup = limited(LIMIT)?;
    let slot = native(WANTED)?;
    let shared = Shared::new(3)?;
    let mut handler = Child::fork(|| {
        if on_limit == OnLimit::Fails {
            fs::write("/proc/self/oom_score_adj", "-1000")?;
        }
        cgroup.enter()?;
        // Allocate before the limit is reached: at the limit, this process gets no memory.
        let mut data = vec![0; (BATCH * PAGE) as usize];
        let mut place = |first: u64| {
            for (page, bytes) in (first..).zip(data.chunks_exact_mut(PAGE as usize)) {
                bytes.copy_from_slice(&content::bytes(page, 1));
            }
            let mut call = abi::kdp_place {
                size: size_of::<abi::kdp_place>() as u32,
                slot_id: ID,
                first,
                count: BATCH,
                data: data.as_ptr() as u64,
                ..Default::default()
            };
            let fd = slot.vm.as_fd().as_raw_fd();
            // SAFETY: the call reads and writes its argument. It reads `BATCH` pages of `data`,
            // which has as many.
            let ret = unsafe { libc::ioctl(fd, abi::KDP_PLACE.into(), &raw mut call) };
            let errno = sys::check(ret).err().and_then(|e| e.raw_os_error());
            (call.done, errno)
        };
        for first in (0..WANTED).step_by(BATCH as usize) {
            let (done, errno) = place(first);
            shared.at(DONE).store(first + done, Ordering::Release);
            if let Some(errno) = errno {
                shared.at(ERRNO).store(errno as u64, Ordering::Release);
                wait_for(&shared, GO);
                ensure_eq!(place(first), (BATCH, None), "the same call, with memory");
                return Ok(());
            }
        }
        fail!("it has placed all pages")
    })?;
    if on_limit == OnLimit::Kills {
        let ended = handler.wait(LONG)?;
        ensure_eq!(
            ended,
            Ended::Signal(libc::SIGKILL),
            "the page handler's end"
        );
    } else {
        wait_for(&shared, ERRNO);
        let errno = shared.at(ERRNO).load(Ordering::Acquire);
        ensure_eq!(errno, libc::ENOMEM as u64, "errno of KDP_PLACE");
    }
    let placed = slot.memslot.bitmap()?.count();
    ensure!(
        (LIMIT / 2 / PAGE..LIMIT / PAGE).contains(&placed),
        "{placed} pages were placed"
    );
    let done = shared.at(DONE).load(Ordering::Acquire);
    if on_limit == OnLimit::Fails {
        ensure_eq!(placed, done, "pages that are present");
    }
    for page in 0..placed {
        slot.check(page, 1)?;
    }
    slot.no_event()?;
    // The first page that was not placed.
    let mut reader = slot.checker(placed, 1)?;
    let event = slot.event()?;
    ensure_eq!(event.page, placed, "the page that was asked for");
    reader.still_waits("a read of the page that was not placed")?;
    if on_limit == OnLimit::Fails {
        cgroup.set("memory.max", 2 * LIMIT)?;
        shared.at(GO).store(1, Ordering::Release);
        handler.join(LONG)?;
    } else {
        slot.vm.place(ID, placed, &content::bytes(placed, 1))?;
    }
    reader.join("who waits for the page")
}

fn swapped_pages_come_back() -> Result {
    let slot = native(4 * BLOCK)?;
    let _swap = Swap::on(16 * MIB)?;
    for round in 1..=3 {
        for page in 0..slot.guest.pages() {
            slot.mark(State::Absent, page)?;
            // Not by the alias mapping: the kernel does not page out what is mapped twice.
            slot.vm.place(ID, page, &content::bytes(page, round))?;
            slot.check(page, round)?;
        }
        until("most pages are swapped out", || {
            let len = (slot.guest.pages() * PAGE) as usize;
            sys::advise(slot.address(0).cast(), len, libc::MADV_PAGEOUT)?;
            Ok(smaps(slot.address(0), "Swap")? > slot.guest.pages() * 3 / 4)
        })?;
        for page in 0..slot.guest.pages() {
            slot.check(page, round)?;
        }
    }
    Ok(())
}

/// Guest memory whose pages are placed when they are accessed. Some pages are made absent again, so
/// that there are always absent pages.
struct Coming {
    slot: Arc<Slot>,
    away: Mutex<Away>,
}

struct Away {
    /// For each absent page, the bytes with which it is placed. `None` for a present page.
    bytes: Vec<Option<Box<[u8]>>>,
    /// The number of absent pages.
    absent: u64,
    /// The pages, in the order in which they are made absent, and the number of times that one was.
    next: Box<dyn Iterator<Item = u64> + Send>,
    taken: u64,
}

impl Coming {
    fn new(slot: &Arc<Slot>) -> Arc<Self> {
        let pages = slot.guest.pages();
        let order = (1000..).flat_map(move |seed| Order::random(pages, seed).iter());
        Arc::new(Self {
            slot: slot.clone(),
            away: Mutex::new(Away {
                bytes: (0..pages)
                    .map(|page| Some(Self::bytes(page).into()))
                    .collect(),
                absent: pages,
                next: Box::new(order),
                taken: 0,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Away> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes that a page holds at first: zeros where vCPUs count.
    fn bytes(page: u64) -> [u8; PAGE as usize] {
        let mut bytes = content::bytes(page, 1);
        bytes[..8 * VCPUS as usize].fill(0);
        bytes
    }

    /// Checks the bytes of a page that no vCPU writes.
    fn check(page: u64, bytes: &[u8]) -> Result {
        let counted = 8 * VCPUS as usize;
        ensure!(
            bytes[counted..] == Self::bytes(page)[counted..],
            "page {page} holds {:x?}...",
            &bytes[..64]
        );
        Ok(())
    }

    /// Places a page if it is absent. Then makes other pages absent while too few are.
    fn place(&self, page: u64) -> Result {
        let mut away = self.lock();
        if let Some(bytes) = away.bytes[page as usize].take() {
            let results = self.slot.vm.place(ID, page, &bytes)?;
            ensure_eq!(results, [Placed::Now], "what became of page {page}");
            away.absent -= 1;
        }
        while away.absent < self.slot.guest.pages() / 16 {
            let Some(other) = away.next.next() else {
                break;
            };
            self.take_away(&mut away, other)?;
        }
        Ok(())
    }

    /// Makes a page absent if it is present, and frees its memory.
    fn take_away(&self, away: &mut Away, page: u64) -> Result {
        let saved = &mut away.bytes[page as usize];
        if saved.is_some() {
            return Ok(());
        }
        self.slot.mark(State::Absent, page)?;
        let mut bytes = vec![0; PAGE as usize];
        self.slot.alias.read(page, &mut bytes)?;
        Self::check(page, &bytes)?;
        self.slot.memfd.punch_hole(PageRange::page(page))?;
        *saved = Some(bytes.into());
        away.absent += 1;
        away.taken += 1;
        Ok(())
    }
}

/// A guest writes to all of its memory in random order, in a cgroup that may have half of that
/// memory. The other half is in swap. Meanwhile pages are placed and made absent. No byte may be
/// lost.
///
/// With KDP_SOAK=N the test runs N times as long, with a larger guest.
fn swap_beside_a_guest() -> Result {
    const SPAN: Duration = Duration::from_secs(4);
    let pages = if soak() > 1 { 16 * BLOCK } else { 4 * BLOCK };
    let bytes = pages * PAGE;
    let _swap = Swap::on(2 * bytes)?;
    // The vCPUs visit pages in random order: do not read their neighbours in swap.
    let _setting = Setting::set("/proc/sys/vm/page-cluster", "0")?;
    let cgroup = Cgroup::new("memory")?;
    cgroup.set("memory.max", bytes / 2)?;
    let slot = native(pages)?;
    // Allocate its copies of the pages before this process enters the cgroup.
    let coming = Coming::new(&slot);
    cgroup.enter()?;
    let start = Instant::now();
    let placing = coming.clone();
    let handler = Handler::start(&slot, move |event| placing.place(event.page))?;
    let busy = Busy::start_in_order(&slot, |vcpu| Order::random(pages, vcpu + 1))?;
    let swapped = || -> Result<_> {
        let pages = |key| cgroup.entry("memory.stat", key);
        Ok((pages("pswpout")?, pages("pswpin")?))
    };
    loop {
        let (rounds, events, (out, back)) = (busy.rounds_of_all(), handler.events(), swapped()?);
        let is_swapping = rounds >= 1 && out >= pages / 2 && back >= pages / 2;
        if is_swapping && start.elapsed() >= SPAN * soak() {
            break;
        }
        let goes_on = until("the guest goes on, or its memory is swapped", || {
            let now = swapped()?;
            Ok(busy.rounds_of_all() > rounds
                || handler.events() > events
                || (now.0 > out && now.1 > back))
        });
        if let Err(e) = goes_on {
            fail!(
                "{e}; {rounds} rounds, {events} pages asked for, {out} swapped out, {back} back\n{}\n{}",
                stuck::threads_of(std::process::id()),
                stuck::trace_of_kvm()
            );
        }
        thread::sleep(Duration::from_millis(20));
    }
    let ((out, back), span) = (swapped()?, start.elapsed());
    ensure_eq!(cgroup.entry("memory.events", "oom_kill")?, 0, "OOM kills");
    let peak = cgroup.number("memory.peak")?;
    ensure!(peak <= bytes / 2, "{peak} bytes were charged");
    // From now on no page is made absent again.
    coming.lock().next = Box::new(iter::empty());
    let rounds = busy.end()?;
    let events = handler.events();
    handler.stop()?;
    for page in 0..pages {
        let mut bytes = [0; PAGE as usize];
        slot.guest.read(page, &mut bytes)?;
        Coming::check(page, &bytes)?;
    }
    let taken = coming.lock().taken;
    ensure!(taken > 0, "no page was made absent again");
    println!("{pages} pages, half of them in memory, for {span:?}; {events} were asked for");
    count("pages swapped out beside a guest", out);
    count("pages swapped in beside a guest", back);
    count("pages taken away beside swap", taken);
    count("pages that a swapping guest has checked", rounds * pages);
    Ok(())
}
