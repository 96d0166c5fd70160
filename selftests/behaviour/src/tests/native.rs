// SPDX-License-Identifier: GPL-2.0

//! Native memory: a memslot of shmem as the kernel's own memory, for whoever accesses it.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use kvm_demand_paging::{abi, Backing, Memfd, Memslot, PageRange, State, Vm, Who};

use super::shmem::folios;
use crate::check::{skip, Result};
use crate::content;
use crate::guest;
use crate::handler::Handler;
use crate::loop_device::Disk;
use crate::numa::{self, Setting};
use crate::slot::{words_at, Slot, BLOCK, GPA, ID, PAGE, WINDOW};
use crate::sys::{self, Child, Ended, Touched};
use crate::task::{until, Task};

tests! {
    "native-nothing-is-pinned" => nothing_is_pinned,
    "native-process-vm-readv-waits" => process_vm_readv_waits,
    "native-proc-mem-reads-and-writes" => proc_mem,
    "native-direct-io-both-ways" => direct_io,
    "native-io-uring-buffer-stays" => io_uring_buffer_stays,
    "native-private-copies-stay" => private_copies_stay,
    "native-private-write-fetches-first" => private_write_fetches_first,
    "native-fork-shares-and-copies" => fork_shares_and_copies,
    "native-pages-move" => pages_move,
    "native-no-neighbour-is-mapped" => no_neighbour_is_mapped,
    "native-blocks-are-mapped-by-one-entry" => blocks_are_mapped_by_one_entry,
    "native-who-looks-fetches-nothing" => who_looks_fetches_nothing,
    "native-no-thrash-without-huge-entries" => no_thrash,
    "native-populate-fetches" => populate_fetches,
    "native-vcpu-exits" => vcpu_exits,
    "native-vcpu-waits-until-a-signal" => vcpu_waits_until_a_signal,
    "native-vcpu-own-accesses-wait" => own_accesses_wait,
    "native-vcpu-waits-and-is-killed" => vcpu_waits_and_is_killed,
    "native-read-only-mapping-stays-so" => read_only_stays_so,
    "native-remap-file-pages-is-refused" => remap_file_pages,
    "native-offset-in-the-memfd" => offset_in_the_memfd,
    "native-memslot-fd-does-not-open-the-memfd" => fd_does_not_open_the_memfd,
    "native-removed-memslot-keeps-private-copies" => removed,
}

const PAGES: u64 = 64;

pub(super) fn native(pages: u64) -> Result<Arc<Slot>> {
    Slot::new(Backing::Shmem, pages)
}

/// A handler that places version 1 of each page that is asked for.
fn served(slot: &Arc<Slot>) -> Result<Handler> {
    let placing = slot.clone();
    Handler::start(slot, move |event| placing.place(event.page, 1))
}

/// The memory is neither pinned nor charged to RLIMIT_MEMLOCK.
fn nothing_is_pinned() -> Result {
    let slot = native(PAGES)?;
    for page in 0..PAGES {
        slot.place(page, 1)?;
        slot.check(page, 1)?;
    }
    ensure_eq!(slot.counter("pinned-pages")?, 0, "pinned pages");
    ensure_eq!(slot.counter("faults")?, PAGES, "faults");
    Ok(())
}

/// Memory of another process, by process_vm_readv(2), of this one.
fn read_by_system_call(from: *const u64, to: &mut [u8]) -> isize {
    let local = libc::iovec {
        iov_base: to.as_mut_ptr().cast(),
        iov_len: to.len(),
    };
    let remote = libc::iovec {
        iov_base: from.cast_mut().cast(),
        iov_len: to.len(),
    };
    // SAFETY: the kernel writes to `to` alone; it checks the other address.
    unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) }
}

fn process_vm_readv_waits() -> Result {
    let slot = native(PAGES)?;
    slot.place(8, 1)?;
    let mut bytes = [0; PAGE as usize];
    if read_by_system_call(slot.address(8), &mut bytes) < 0 {
        return skip("this kernel has no process_vm_readv()");
    }
    let reading = slot.clone();
    let mut reader = Task::spawn(move || {
        let mut bytes = [0; PAGE as usize];
        let read = read_by_system_call(reading.address(7), &mut bytes);
        (read, bytes)
    })?;
    let event = slot.event()?;
    ensure_eq!(event.gfn, GPA / PAGE + 7, "the event's GFN");
    reader.still_waits("process_vm_readv() of an absent page")?;
    slot.place(7, 1)?;
    let (read, bytes) = reader.join("process_vm_readv()")?;
    ensure_eq!(read, PAGE as isize, "bytes read");
    ensure!(bytes == content::bytes(7, 1), "it read something else");
    Ok(())
}

/// /proc/PID/mem has the bytes of present pages. The kernel holds the mmap lock there, and keeps it: of an absent page there is an error, and no zeros.
fn proc_mem() -> Result {
    let slot = native(PAGES)?;
    slot.place(3, 1)?;
    slot.place(4, 1)?;
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/mem")?;
    let mut bytes = [0; PAGE as usize];
    memory.read_exact_at(&mut bytes, slot.address(3) as u64)?;
    ensure!(bytes == content::bytes(3, 1), "it read something else");
    memory.write_all_at(&content::bytes(4, 2), slot.address(4) as u64)?;
    slot.check(4, 2)?;
    slot.alias.read(4, &mut bytes)?;
    ensure!(bytes == content::bytes(4, 2), "page 4 of the memfd");
    let read = memory.read_at(&mut bytes, slot.address(5) as u64);
    ensure_eq!(
        read.err().and_then(|e| e.raw_os_error()),
        Some(libc::EIO),
        "errno of a read of an absent page"
    );
    slot.no_event()
}

/// From absent pages to a disk, and from the disk to absent pages.
fn direct_io() -> Result {
    let slot = native(PAGES)?;
    let handler = served(&slot)?;
    let disk = Disk::new(PAGES * PAGE)?;
    let file = disk.open()?;
    let bytes = (PAGES / 2 * PAGE) as usize;
    let written = sys::write_from(file.as_fd(), slot.address(0).cast(), bytes)?;
    ensure_eq!(written, bytes, "bytes written");
    ensure_eq!(handler.events(), PAGES / 2, "pages fetched");
    let image = File::open(&disk.image)?;
    for page in 0..PAGES / 2 {
        let mut there = [0; PAGE as usize];
        image.read_exact_at(&mut there, page * PAGE)?;
        ensure!(there == content::bytes(page, 1), "page {page} of the disk");
    }
    let file = disk.open()?;
    // SAFETY: the memory is accessed as words only.
    let read = unsafe { sys::read_to(file.as_fd(), slot.address(PAGES / 2).cast(), bytes)? };
    ensure_eq!(read, bytes, "bytes read");
    for page in 0..PAGES / 2 {
        match content::check(&slot.words(PAGES / 2 + page)?, page, 1) {
            Ok(()) => (),
            Err(wrong) => fail!("read from the disk: {wrong}"),
        }
    }
    handler.stop()
}

/// io_uring pins a buffer for long, absent pages too, and it stays the memslot's memory.
fn io_uring_buffer_stays() -> Result {
    let slot = native(PAGES)?;
    let handler = served(&slot)?;
    let buffer = sys::register_buffer(slot.address(0).cast(), (PAGES * PAGE) as usize)?;
    ensure_eq!(handler.events(), PAGES, "pages fetched");
    for page in 0..PAGES {
        slot.check(page, 1)?;
    }
    slot.mark(State::Absent, 5)?;
    slot.check(5, 1)?;
    drop(buffer);
    handler.stop()
}

/// A mapping of a memslot of its own.
pub(super) struct Private {
    at: *mut u8,
    len: usize,
}

/// Maps the memslot's file privately: at `at` if `fixed` is MAP_FIXED, else where the kernel
/// chooses.
///
/// # Safety
///
/// With MAP_FIXED, there must be no Rust reference to the memory at `at`.
unsafe fn map_private(slot: &Slot, at: *mut u8, fixed: i32) -> Result<*mut u8> {
    // SAFETY: by the caller's promise.
    let at = unsafe {
        libc::mmap(
            at.cast(),
            (slot.guest.pages() * PAGE) as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | fixed,
            slot.memslot.as_fd().as_raw_fd(),
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(at.cast())
}

/// Replaces the VMM's mapping of the memslot by a private one.
pub(super) fn make_private(slot: &Slot) -> Result {
    // SAFETY: the mapping is accessed as words only, and unmapped like the one that it replaces.
    unsafe { map_private(slot, slot.address(0).cast(), libc::MAP_FIXED) }.map(drop)
}

impl Private {
    pub(super) fn of(slot: &Slot) -> Result<Self> {
        // SAFETY: a new mapping, where the kernel chooses.
        let at = unsafe { map_private(slot, std::ptr::null_mut(), 0) }?;
        let len = (slot.guest.pages() * PAGE) as usize;
        Ok(Self { at, len })
    }

    pub(super) fn address(&self, page: u64) -> *mut u64 {
        self.at.wrapping_add((page * PAGE) as usize).cast()
    }

    pub(super) fn check(&self, page: u64, version: u64) -> Result {
        match content::check(&words_at(self.address(page))?, page, version) {
            Ok(()) => Ok(()),
            Err(wrong) => fail!("in the private mapping: {wrong}"),
        }
    }

    pub(super) fn write(&self, page: u64, version: u64) {
        for at in 0..content::WORDS {
            let word = content::word(page, version, at);
            // SAFETY: the mapping is accessed as words only.
            unsafe { sys::store(self.address(page).wrapping_add(at), word) };
        }
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// A private page is written alone, and stays when the memslot's page becomes absent. A clean one is
/// the memslot's.
fn private_copies_stay() -> Result {
    let slot = native(PAGES)?;
    let private = Private::of(&slot)?;
    for page in 0..4 {
        slot.place(page, 1)?;
        private.check(page, 1)?;
    }
    private.write(1, 2);
    private.check(1, 2)?;
    slot.check(1, 1)?;
    slot.mark_range(State::Absent, PageRange { first: 0, count: 4 })?;
    private.check(1, 2)?;
    slot.no_event()?;
    let page = private.address(2) as usize;
    let mut reader = Task::spawn(move || sys::load(page as *const u64))?;
    ensure_eq!(slot.event()?.gfn, GPA / PAGE + 2, "the event's GFN");
    reader.still_waits("a read of an absent page in a private mapping")?;
    slot.place(2, 3)?;
    reader.join("the reader")?;
    private.check(2, 3)?;
    // Written past the private mapping: a clean page shows it.
    slot.place(0, 1)?;
    private.check(0, 1)?;
    slot.fill(0, 4)?;
    private.check(0, 4)
}

fn private_write_fetches_first() -> Result {
    let slot = native(PAGES)?;
    let private = Private::of(&slot)?;
    let at = private.address(9) as usize;
    // SAFETY: the mapping is accessed as words only.
    let mut writer = Task::spawn(move || unsafe { sys::store(at as *mut u64, 42) })?;
    slot.event()?;
    writer.still_waits("a write to an absent page in a private mapping")?;
    slot.place(9, 1)?;
    writer.join("the writer")?;
    let words = words_at(private.address(9))?;
    ensure_eq!(words[0], 42, "the word that was written");
    ensure_eq!(words[1], content::word(9, 1, 1), "the word behind it");
    slot.check(9, 1)
}

fn fork_shares_and_copies() -> Result {
    let slot = native(PAGES)?;
    let private = Private::of(&slot)?;
    slot.place(0, 1)?;
    slot.place(1, 1)?;
    slot.check(0, 1)?;
    private.write(1, 2);
    let mut child = Child::fork(|| {
        slot.check(0, 1)?;
        private.check(1, 2)?;
        private.write(1, 3);
        private.check(1, 3)?;
        // SAFETY: the mapping is accessed as words only.
        unsafe { sys::store(slot.address(0), 7) };
        // It waits, and the parent serves it.
        slot.check(5, 1)
    })?;
    ensure_eq!(slot.event()?.gfn, GPA / PAGE + 5, "the event's GFN");
    slot.place(5, 1)?;
    child.join(Duration::from_secs(60))?;
    private.check(1, 2)?;
    ensure_eq!(sys::load(slot.address(0)), Touched::Value(7), "page 0");
    Ok(())
}

/// A number in /proc/self/smaps, in pages, of the mapping that begins at `at`.
pub(super) fn smaps(at: *const u64, name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/smaps")?;
    let start = format!("{:x}-", at as u64);
    let key = format!("{name}:");
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&start));
    let Some(line) = lines.find(|line| line.starts_with(&key)) else {
        fail!("smaps says no {name} of the memslot");
    };
    match line.split_whitespace().nth(1) {
        Some(kib) => Ok(kib.parse::<u64>()? * 1024 / PAGE),
        None => fail!("smaps says '{line}'"),
    }
}

/// Pages of the mapping that are in memory, by mincore(2).
fn resident(slot: &Slot) -> Result<u64> {
    let mut there = vec![0u8; slot.guest.pages() as usize];
    let len = there.len() * PAGE as usize;
    // SAFETY: one byte for each page.
    sys::check(unsafe { libc::mincore(slot.address(0).cast(), len, there.as_mut_ptr()) })?;
    Ok(there.iter().map(|byte| u64::from(byte & 1)).sum())
}

/// move_pages(2) moves pages, and their bytes with them.
fn pages_move() -> Result {
    numa::need_nodes()?;
    let slot = native(PAGES)?;
    for page in 0..PAGES {
        slot.place(page, 1)?;
        slot.check(page, 1)?;
    }
    let addresses: Vec<u64> = (0..PAGES).map(|page| slot.address(page) as u64).collect();
    for node in [numa::NODES[1], numa::NODES[0]] {
        until("all pages are moved", || {
            Ok(numa::move_pages(&addresses, node)? == 0)
        })?;
        let frames = numa::frames(slot.guest.as_ptr(), PAGES)?;
        ensure!(
            numa::are_on(node, &frames),
            "not all pages are on node {node}"
        );
        for page in 0..PAGES {
            slot.check(page, 1)?;
        }
    }
    slot.no_event()
}

/// Pages of the mapping that the page tables have.
pub(super) fn mapped(slot: &Slot) -> Result<Vec<u64>> {
    let frames = numa::mapped_frames(slot.guest.as_ptr(), slot.guest.pages())?;
    let has_frame = |page: &u64| frames[*page as usize] != 0;
    Ok((0..slot.guest.pages()).filter(has_frame).collect())
}

/// Of a folio of 2 MiB only the page is mapped that was touched, whatever asks for more.
fn no_neighbour_is_mapped() -> Result {
    let setting = folios("always")?;
    let slot = native(BLOCK)?;
    slot.alias.write(0, &content::bytes(0, 1))?;
    slot.place(77, 1)?;
    slot.check(77, 1)?;
    drop(setting);
    ensure_eq!(mapped(&slot)?, [77], "mapped pages");
    let len = (BLOCK * PAGE) as usize;
    let at = slot.address(0).cast::<u8>();
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_WILLNEED] {
        sys::advise(at, len, advice)?;
    }
    const MADV_COLLAPSE: i32 = 25;
    let refused = sys::advise(at, len, MADV_COLLAPSE);
    ensure_eq!(
        refused.err().and_then(|e| e.raw_os_error()),
        Some(libc::EINVAL),
        "errno of MADV_COLLAPSE"
    );
    // The memfd's own mapping may be huge: the memslot's is not.
    sys::advise(slot.alias.as_ptr(), len, MADV_COLLAPSE).ok();
    slot.check(77, 1)?;
    ensure_eq!(mapped(&slot)?, [77], "mapped pages, after that");
    slot.no_event()
}

fn blocks_are_mapped_by_one_entry() -> Result {
    let setting = folios("always")?;
    let slot = native(2 * BLOCK)?;
    for page in 0..2 * BLOCK {
        slot.fill(page, 1)?;
    }
    drop(setting);
    let whole = PageRange {
        first: 0,
        count: BLOCK,
    };
    slot.mark_range(State::Present, whole)?;
    slot.check(33, 1)?;
    ensure_eq!(slot.counter("faults-huge")?, 1, "huge faults");
    ensure_eq!(mapped(&slot)?.len() as u64, BLOCK, "mapped pages");
    // One that is absent takes the entry away.
    slot.mark(State::Absent, 34)?;
    slot.check(33, 1)?;
    let near: Vec<u64> = (32..32 + WINDOW).filter(|&page| page != 34).collect();
    ensure_eq!(mapped(&slot)?, near, "mapped pages, without one");
    let mut reader = slot.toucher(34)?;
    slot.event()?;
    reader.still_waits("a read of the absent page")?;
    slot.place(34, 1)?;
    reader.join("the reader")?;
    // The last page of the other block makes it whole, and its page table is freed.
    let rest = PageRange {
        first: BLOCK,
        count: BLOCK - 1,
    };
    slot.mark_range(State::Present, rest)?;
    slot.check(BLOCK, 1)?;
    slot.mark(State::Present, 2 * BLOCK - 1)?;
    until("the block is mapped by one entry", || {
        slot.check(BLOCK + 5, 1)?;
        Ok(slot.counter("faults-huge")? > 1)
    })?;
    for page in 0..2 * BLOCK {
        slot.check(page, 1)?;
    }
    Ok(())
}

/// Where the host allows no huge entries, whole blocks are not mapped anew again and again.
fn no_thrash() -> Result {
    let _setting = Setting::set("/sys/kernel/mm/transparent_hugepage/enabled", "never")?;
    let setting = folios("always")?;
    let slot = native(BLOCK)?;
    for page in 0..BLOCK {
        slot.fill(page, 1)?;
    }
    drop(setting);
    slot.mark_range(
        State::Present,
        PageRange {
            first: 0,
            count: BLOCK,
        },
    )?;
    for _ in 0..3 {
        for page in 0..BLOCK {
            slot.check(page, 1)?;
        }
    }
    let (faults, collapses) = (slot.counter("faults")?, slot.counter("collapses")?);
    ensure!(faults < 2 * BLOCK, "{faults} faults");
    ensure!(collapses <= 4, "{collapses} ranges mapped anew");
    Ok(())
}

/// smaps, mincore(2) and pagemap look at absent pages without a fetch.
fn who_looks_fetches_nothing() -> Result {
    let slot = native(PAGES)?;
    slot.place(1, 1)?;
    slot.check(1, 1)?;
    ensure_eq!(smaps(slot.address(0), "Rss")?, 1, "pages in smaps");
    ensure_eq!(resident(&slot)?, 1, "pages that mincore() sees");
    ensure_eq!(mapped(&slot)?, [1], "mapped pages");
    slot.no_event()
}

/// MADV_POPULATE_READ and MADV_POPULATE_WRITE do fetch.
fn populate_fetches() -> Result {
    let slot = native(PAGES)?;
    let handler = served(&slot)?;
    let half = (PAGES / 2 * PAGE) as usize;
    sys::advise(slot.address(0).cast(), half, libc::MADV_POPULATE_READ)?;
    ensure_eq!(handler.events(), PAGES / 2, "pages fetched");
    let rest = slot.address(PAGES / 2).cast();
    sys::advise(rest, half, libc::MADV_POPULATE_WRITE)?;
    ensure_eq!(handler.events(), PAGES, "pages fetched");
    sys::advise(slot.address(0).cast(), 2 * half, libc::MADV_DONTNEED)?;
    for page in 0..PAGES {
        slot.check(page, 1)?;
    }
    handler.stop()
}

/// A vCPU's touch of an absent page is an exit; no event is told.
fn vcpu_exits() -> Result {
    let slot = native(PAGES)?;
    let machine = slot.machine()?;
    let pages = [PAGES - 1, 3, PAGES / 2];
    let mut vcpu = machine.vcpu(0, &guest::peek(&pages))?;
    let exiting = slot.clone();
    let task = Task::work(move || -> Result<_> {
        exiting.vm.set_vcpu_exits(true)?;
        guest::run(&mut vcpu, |fault| {
            exiting.place((fault.gpa - guest::gpa(0)) / PAGE, 1)
        })
    })?;
    let ran = task.join("the vCPU")?;
    let exits: Vec<_> = ran
        .faults
        .iter()
        .map(|fault| (fault.gpa, fault.flags))
        .collect();
    let expected = pages.map(|page| (guest::gpa(page), abi::KDP_EXIT_ABSENT));
    ensure_eq!(exits, expected, "the exits");
    let read = pages.map(|page| content::word(page, 1, 0));
    ensure_eq!(ran.reports, read, "what it read");
    slot.no_event()
}

/// A vCPU that waits leaves KVM_RUN for a signal, and waits again.
fn vcpu_waits_until_a_signal() -> Result {
    let slot = native(PAGES)?;
    let machine = slot.machine()?;
    let mut vcpu = machine.vcpu(0, &guest::peek(&[5]))?;
    sys::catch_idly(libc::SIGUSR1)?;
    let mut task = Task::work(move || guest::run(&mut vcpu, guest::no_fault))?;
    let event = slot.event()?;
    ensure_eq!(event.gfn, GPA / PAGE + 5, "the event's GFN");
    ensure!(event.access.who != Who::User, "it is told of as {event:?}");
    task.still_waits("a vCPU that touches an absent page")?;
    let before = slot.counter("waits")?;
    sys::signal_thread(task.tid, libc::SIGUSR1)?;
    until("the vCPU waits again", || {
        Ok(slot.counter("waits")? > before)
    })?;
    slot.place(5, 1)?;
    let ran = task.join("the vCPU")?;
    ensure!(ran.interrupted > 0, "KVM_RUN did not end for the signal");
    ensure_eq!(ran.reports, [content::word(5, 1, 0)], "what it read");
    Ok(())
}

/// A VMM whose guest waits for a page that never comes is killed, and ends.
fn vcpu_waits_and_is_killed() -> Result {
    let slot = native(PAGES)?;
    let mut child = Child::fork(|| {
        let machine = slot.machine()?;
        let mut vcpu = machine.vcpu(0, &guest::peek(&[5]))?;
        guest::run(&mut vcpu, guest::no_fault).map(drop)
    })?;
    slot.event()?;
    child.kill(libc::SIGKILL)?;
    let ended = child.wait(Duration::from_secs(20))?;
    ensure_eq!(ended, Ended::Signal(libc::SIGKILL), "the VMM's end");
    Ok(())
}

/// A mapping of a file that is open for reading only cannot be made writable, also after its block
/// was mapped anew.
fn read_only_stays_so() -> Result {
    const NAME: &str = "native-read-only";
    let setting = folios("always")?;
    let slot = Slot::with(Backing::Shmem, BLOCK, |builder| {
        builder.paging(true).name(NAME)
    })?;
    for page in 0..BLOCK {
        slot.fill(page, 1)?;
    }
    drop(setting);
    let file = File::open(Memslot::path(NAME))?;
    let len = (BLOCK * PAGE) as usize;
    // Aligned, so that one entry can map it.
    // SAFETY: new mappings, wherever the kernel likes, and then over the first one.
    let at = unsafe {
        let fd = file.as_raw_fd();
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    ensure!(at != libc::MAP_FAILED, "the file cannot be mapped");
    let word = |page: u64| {
        let at = at.cast::<u8>().wrapping_add((page * PAGE) as usize);
        sys::load(at.cast())
    };
    slot.mark(State::Present, 3)?;
    ensure_eq!(word(3), Touched::Value(content::word(3, 1, 0)), "page 3");
    slot.mark_range(State::Present, PageRange::new(0, BLOCK))?;
    until("the block is mapped by one entry", || {
        word(4);
        Ok(slot.counter("collapses")? > 0)
    })?;
    // SAFETY: it changes the rights of a mapping of this test, or does not.
    let ret = unsafe { libc::mprotect(at, len, libc::PROT_READ | libc::PROT_WRITE) };
    let errno = sys::check(ret).err().and_then(|e| e.raw_os_error());
    ensure_eq!(errno, Some(libc::EACCES), "errno of mprotect()");
    // SAFETY: nobody uses the mapping any more.
    unsafe { libc::munmap(at, len) };
    Ok(())
}

/// remap_file_pages(2) would map pages by the number that they have in the memfd.
fn remap_file_pages() -> Result {
    let slot = native(PAGES)?;
    for pgoff in [0, 1, 1_usize << 48] {
        // SAFETY: if it did anything, it would map other pages of the memslot.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_remap_file_pages,
                slot.address(0),
                PAGE as usize,
                0,
                pgoff,
                0,
            )
        };
        ensure!(ret != 0, "remap_file_pages() to page {pgoff} worked");
    }
    Ok(())
}

/// What KVM itself accesses waits, in a thread with exits on.
fn own_accesses_wait() -> Result {
    let slot = native(PAGES)?;
    let machine = slot.machine()?;
    let mut vcpu = machine.vcpu(0, &guest::steal_time(6))?;
    let exiting = slot.clone();
    let task = Task::work(move || -> Result<_> {
        exiting.vm.set_vcpu_exits(true)?;
        guest::run(&mut vcpu, guest::no_fault)
    })?;
    let event = slot.event()?;
    ensure_eq!(event.gfn, GPA / PAGE + 6, "the event's GFN");
    slot.place(6, 1)?;
    task.join("the vCPU")?;
    Ok(())
}

/// A memslot that does not begin where its memfd begins.
fn offset_in_the_memfd() -> Result {
    const OFFSET: u64 = 3;
    let vm = Vm::open()?;
    let memfd = Memfd::create("kdp-behaviour", Backing::Shmem, PAGES * PAGE)?;
    let memslot = vm
        .create_memslot(ID, &memfd)
        .part(OFFSET * PAGE, PAGES - OFFSET)
        .base_gfn(GPA / PAGE)
        .paging(true)
        .create()?;
    let (guest, alias) = (memslot.map()?, memfd.map_all()?);
    let at = |page: u64| {
        guest
            .as_ptr()
            .wrapping_add((page * PAGE) as usize)
            .cast::<u64>()
    };
    for page in [0, 9, PAGES - OFFSET - 1] {
        alias.write(OFFSET + page, &content::bytes(page, 1))?;
        vm.mark(ID, State::Present, &[PageRange::page(page)])?;
        if let Err(wrong) = content::check(&words_at(at(page))?, page, 1) {
            fail!("{wrong}");
        }
        vm.mark(ID, State::Absent, &[PageRange::page(page)])?;
        let address = at(page) as usize;
        let mut reader = Task::spawn(move || sys::load(address as *const u64))?;
        let event = crate::slot::next_event(&vm)?;
        ensure_eq!(event.gfn, GPA / PAGE + page, "the event's GFN");
        reader.still_waits("a read of the absent page")?;
        vm.mark(ID, State::Present, &[PageRange::page(page)])?;
        reader.join("the reader")?;
    }
    Ok(())
}

/// Who has a memslot's fd cannot come to its memfd by /proc, where absent pages are zeros.
fn fd_does_not_open_the_memfd() -> Result {
    let slot = native(PAGES)?;
    slot.place(0, 1)?;
    slot.check(0, 1)?;
    let link = format!("/proc/self/fd/{}", slot.memslot.as_fd().as_raw_fd());
    ensure!(File::open(&link).is_err(), "{link} can be opened");
    // SAFETY: it asks for the seals of a file.
    let seals = unsafe { libc::fcntl(slot.memslot.as_fd().as_raw_fd(), libc::F_GET_SEALS) };
    ensure_eq!(seals, -1, "seals of the memslot's file");
    Ok(())
}

fn removed() -> Result {
    let slot = native(PAGES)?;
    let private = Private::of(&slot)?;
    slot.place(1, 1)?;
    slot.place(2, 1)?;
    private.write(1, 2);
    private.check(2, 1)?;
    slot.vm.remove_memslot(ID)?;
    private.check(1, 2)?;
    let gone = Touched::sigbus(libc::BUS_ADRERR, private.address(2), 0);
    ensure_eq!(sys::load(private.address(2)), gone, "a clean page");
    Ok(())
}
