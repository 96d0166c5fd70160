// SPDX-License-Identifier: GPL-2.0

//! Absent pages that the kernel reads from a file by itself.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use kdp_vmm::{frame_of, Order, Touch};
use kvm_demand_paging::{Backing, EventKind, FaultExit, PageRange, Paging, Reason, State};

use crate::check::{skip, Result};
use crate::content;
use crate::guest;
use crate::harness::rounds;
use crate::loop_device::LoopDevice;
use crate::slot::{Slot, BACKINGS, BLOCK, GPA, ID, PAGE};
use crate::slow_fs::SlowFs;
use crate::sys::{self, Child, Ended, Touched};
use crate::task::{until, Task, PATIENCE};

tests! {
    "source-read-in-the-fault" => read_in_the_fault,
    "source-vcpu-neither-exits-nor-waits" => vcpu_neither_exits_nor_waits,
    "source-system-call" => system_call,
    "source-holes-are-zeros" => holes_are_zeros,
    "source-block-device" => block_device,
    "source-without-a-page-cache" => without_a_page_cache,
    "source-host-file-system" => host_file_system,
    "source-hangs-and-is-killed" => hangs_and_is_killed,
    "source-places-once" => places_once,
    "source-places-once-beside-marks" => places_once_beside_marks,
    "source-absent-again-is-not-read" => absent_again_is_not_read,
    "source-has-some-pages" => has_some_pages,
    "source-goes-with-paging" => goes_with_paging,
    "source-wakes-who-waits" => wakes_who_waits,
    "source-short-file" => short_file,
    "source-io-error" => io_error,
    "source-replaced-while-threads-read" => replaced_while_threads_read,
    "source-reads-ahead-in-order" => reads_ahead_in_order,
    "source-reads-nothing-ahead-at-random" => reads_nothing_ahead_at_random,
    "source-of-a-sequential-guest-maps-blocks" => sequential_guest_maps_blocks,
    "source-in-order-comes-by-blocks" => in_order_comes_by_blocks,
    "source-in-order-waits-for-no-neighbour" => in_order_waits_for_no_neighbour,
    "source-closed-vm" => closed_vm,
}

/// A file of these pages, in a version, behind `before` pages of something else. It has no name.
pub(super) fn file(dir: &Path, before: u64, pages: u64, version: u64) -> Result<File> {
    let path = dir.join(format!("source-{}-{version}", sys::gettid()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    write(&file, before, pages, version)?;
    Ok(file)
}

fn write(file: &File, before: u64, pages: u64, version: u64) -> Result {
    for page in 0..pages {
        file.write_all_at(&content::bytes(page, version), (before + page) * PAGE)?;
    }
    Ok(())
}

/// A folder in memory.
pub(super) fn tmp() -> &'static Path {
    Path::new("/dev/shm")
}

/// A memslot whose absent pages are all in a file.
pub(super) fn sourced(backing: Backing, pages: u64) -> Result<(Arc<Slot>, File)> {
    let slot = Slot::new(backing, pages)?;
    let file = file(tmp(), 3, pages, 1)?;
    slot.vm.set_source(ID, &file, 3 * PAGE, None)?;
    Ok((slot, file))
}

/// Each page was read once. The work that reads ahead counts what it has read a little later.
fn until_all_is_read(slot: &Slot) -> Result {
    until("each page has been read once", || {
        let read = slot.counter("source-reads")? + slot.counter("source-ahead")?;
        Ok(read == slot.guest.pages())
    })
}

/// Who touches a page gets its bytes, and nobody else is asked.
fn read_in_the_fault() -> Result {
    for (backing, pages) in BACKINGS {
        let (slot, _file) = sourced(backing, pages)?;
        let bitmap = slot.memslot.bitmap()?;
        // So far apart that neighbours are left alone, and in no order that would be read ahead.
        for page in (0..pages).rev().step_by(22) {
            ensure!(!bitmap.is_present(page), "page {page} is present already");
            slot.check(page, 1)?;
            ensure!(bitmap.is_present(page), "page {page} is absent still");
        }
        let read = pages.div_ceil(22);
        ensure_eq!(slot.counter("source-reads")?, read, "pages read");
        ensure_eq!(slot.counter("waits")?, 0, "waits");
        slot.no_event()?;
        for page in 0..pages {
            slot.check(page, 1)?;
        }
    }
    Ok(())
}

fn vcpu_neither_exits_nor_waits() -> Result {
    for exits in [true, false] {
        for (backing, pages) in BACKINGS {
            let (slot, _file) = sourced(backing, pages)?;
            let machine = slot.machine()?;
            let touched: Vec<u64> = (0..pages).rev().step_by(7).collect();
            let mut vcpu = machine.vcpu(0, &guest::peek(&touched))?;
            let vm = slot.vm.try_clone()?;
            let ran = Task::work(move || {
                vm.set_vcpu_exits(exits)?;
                guest::run(&mut vcpu, guest::no_fault)
            })?
            .join("the vCPU")?;
            let expected: Vec<u64> = touched.iter().map(|&p| content::word(p, 1, 0)).collect();
            ensure_eq!(ran.reports, expected, "what the guest read");
            ensure_eq!(slot.counter("exits")?, 0, "exits");
            ensure_eq!(slot.counter("waits")?, 0, "waits");
        }
    }
    Ok(())
}

/// The kernel's own copies read, too.
fn system_call() -> Result {
    for (backing, pages) in BACKINGS {
        let (slot, _file) = sourced(backing, pages)?;
        let out = file(tmp(), 0, 1, 9)?;
        let page = pages / 2;
        let n = sys::write_from(out.as_fd(), slot.address(page).cast(), PAGE as usize)?;
        ensure_eq!(n as u64, PAGE, "bytes written");
        let end = out.metadata()?.len();
        let mut bytes = [0; PAGE as usize];
        out.read_exact_at(&mut bytes, 0)?;
        ensure_eq!(end, PAGE, "the file's size");
        ensure!(bytes == content::bytes(page, 1), "the bytes are wrong");
    }
    Ok(())
}

/// A hole of the file reads as zeros, because that is what the file has; it is not filled in the file.
fn holes_are_zeros() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        for page in 0..pages {
            slot.fill(page, 666)?;
        }
        let file = file(tmp(), 0, 1, 1)?;
        file.set_len(pages * PAGE)?;
        slot.vm.set_source(ID, &file, 0, None)?;
        slot.check(0, 1)?;
        for page in (1..pages).rev() {
            ensure!(
                slot.words(page)?.iter().all(|&word| word == 0),
                "page {page} is not zeros"
            );
        }
        ensure!(file.metadata()?.blocks() <= 16, "the file has grown");
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<String> {
    let out = command.output()?;
    ensure!(
        out.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// Undoes what a command has done, whatever comes.
struct Undo(Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        // A test that has failed is not to fail for this instead.
        let _ = Command::new(&self.0[0]).args(&self.0[1..]).output();
    }
}

/// A disk: what is read has not been in memory before.
fn block_device() -> Result {
    for (backing, pages) in BACKINGS {
        let path = tmp().join("source-disk");
        let disk = File::create(&path)?;
        write(&disk, 8, pages, 1)?;
        // The size of a disk is in 512 bytes.
        let device = LoopDevice::of(&path)?;
        fs::remove_file(&path)?;
        let slot = Slot::new(backing, pages)?;
        slot.vm
            .set_source(ID, File::open(&device.path)?, 8 * PAGE, None)?;
        for page in (0..pages).step_by(2).chain((1..pages).step_by(2)) {
            slot.check(page, 1)?;
        }
        slot.vm.clear_source(ID)?;
    }
    Ok(())
}

/// An overlay has no pages of its own: it is read as any program reads it.
fn without_a_page_cache() -> Result {
    for (backing, pages) in BACKINGS {
        let dir = tmp().join("source-overlay");
        let [lower, upper, merged] = ["lower", "upper", "merged"].map(|name| dir.join(name));
        for dir in [&lower, &upper, &merged] {
            fs::create_dir_all(dir)?;
        }
        write(&File::create(lower.join("image"))?, 1, pages, 1)?;
        let options = format!("lowerdir={}:{}", lower.display(), upper.display());
        run(Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(&merged))?;
        let unmount = Undo(vec!["umount".into(), merged.display().to_string()]);
        {
            let slot = Slot::new(backing, pages)?;
            let image = File::open(merged.join("image"))?;
            slot.vm.set_source(ID, &image, PAGE, None)?;
            drop(image);
            let mut threads = vec![];
            for start in 0..4 {
                let slot = slot.clone();
                threads.push(Task::work(move || {
                    (0..pages).try_for_each(|i| slot.check((i + start * pages / 4) % pages, 1))
                })?);
            }
            for thread in threads {
                thread.join("a reader")?;
            }
            slot.vm.remove_memslot(ID)?;
        }
        drop(unmount);
        fs::remove_dir_all(&dir)?;
    }
    Ok(())
}

/// A disk does not answer: who touches its pages waits without a lock that anybody else needs, and can be killed.
fn hangs_and_is_killed() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let page = pages - 1;
        // It is to be forked before there are threads.
        let (told, tell) = sys::pipe()?;
        let touching = slot.clone();
        let mut child = Child::fork(move || {
            ensure!(sys::readable(told.as_raw_fd(), PATIENCE)?, "no word");
            touching.check(page, 1)
        })?;

        let bytes = (0..pages).flat_map(|page| content::bytes(page, 1));
        let slow = SlowFs::mount(bytes.collect())?;
        let device = LoopDevice::read_only(slow.file())?;
        slot.vm.set_source(ID, File::open(&device.path)?, 0, None)?;
        slot.check(0, 1)?;
        slot.place(1, 2)?;

        slow.hold();
        sys::write_from(tell.as_fd(), [1_u8].as_ptr(), 1)?;
        slow.until_held()?;
        // The same page, and one that nobody has touched.
        let mut tasks = [slot.checker(page, 1)?, slot.checker(pages / 2, 1)?];
        for task in &mut tasks {
            task.still_waits("a thread that reads from a disk that hangs")?;
        }
        // What does not need the disk goes on: present pages, calls that write, mappings that come and go.
        slot.check(1, 2)?;
        slot.place(2, 2)?;
        slot.check(2, 2)?;
        slot.mark(State::Absent, 2)?;
        slot.place(2, 3)?;
        slot.check(2, 3)?;
        drop(slot.memslot.map()?);

        child.kill(libc::SIGKILL)?;
        ensure_eq!(
            child.wait(PATIENCE)?,
            Ended::Signal(libc::SIGKILL),
            "the end of a process that reads from a disk that hangs"
        );
        slow.release();
        for task in tasks {
            task.join("a thread whose disk answers again")?;
        }
        slot.vm.clear_source(ID)?;
    }
    Ok(())
}

/// Whatever the VM's root file system is: not tmpfs.
fn host_file_system() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let file = file(Path::new("/var/tmp"), 0, pages, 4)?;
        slot.vm.set_source(ID, &file, 0, None)?;
        for page in (0..pages).rev() {
            slot.check(page, 4)?;
        }
    }
    Ok(())
}

/// Many threads touch a page at once, and each adds one to a word of it: invariant 2. Were the page filled twice,
/// the second time would take back what was added since the first.
fn places_once() -> Result {
    for backing in [Backing::Shmem, Backing::Huge2M] {
        let slot = add_to_every_page(backing, |_, _| Ok(()))?;
        until_all_is_read(&slot)?;
    }
    Ok(())
}

/// The same while calls make the pages present, with what is in the memory already: who is in the middle of reading
/// such a page must be done by then.
fn places_once_beside_marks() -> Result {
    for backing in [Backing::Shmem, Backing::Huge2M] {
        add_to_every_page(backing, |slot, page| {
            slot.mark(State::Present, page).map(drop)
        })?;
    }
    Ok(())
}

/// Four threads add one to a word of every page, all at the same time, when somebody does something else to it.
fn add_to_every_page(
    backing: Backing,
    meanwhile: impl Fn(&Slot, u64) -> Result,
) -> Result<Arc<Slot>> {
    const THREADS: u64 = 4;
    let pages = rounds(2048).next_multiple_of(BLOCK);
    let slot = Slot::new(backing, pages)?;
    for page in 0..pages {
        slot.fill(page, 1)?;
    }
    let file = file(tmp(), 0, pages, 1)?;
    slot.vm.set_source(ID, &file, 0, None)?;
    // In an order that is not read ahead.
    let order = move |i: u64| (i * 389) % pages;
    let start = Arc::new(Barrier::new(THREADS as usize + 1));
    let mut threads = vec![];
    for _ in 0..THREADS {
        let (slot, start) = (slot.clone(), start.clone());
        threads.push(Task::work(move || -> Result {
            for i in 0..pages {
                start.wait();
                // SAFETY: the mapping lives as long as the slot, and all accesses to it are atomic.
                let word = unsafe { AtomicU64::from_ptr(slot.address(order(i))) };
                word.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })?);
    }
    for i in 0..pages {
        start.wait();
        meanwhile(&slot, order(i))?;
    }
    for thread in threads {
        thread.join("a thread that adds")?;
    }
    for page in 0..pages {
        let expected = content::word(page, 1, 0).wrapping_add(THREADS);
        ensure_eq!(
            slot.words(page)?[0],
            expected,
            "page {page}: the word that all added to"
        );
    }
    Ok(slot)
}

/// What a page held when it was made absent is not in the file: it is asked for, and not read.
fn absent_again_is_not_read() -> Result {
    for (backing, pages) in BACKINGS {
        let (slot, _file) = sourced(backing, pages)?;
        slot.check(5, 1)?;
        ensure_eq!(slot.mark(State::Absent, 5)?, 1, "pages that became absent");
        // One that was absent before is no longer read, either: its bytes are the caller's now.
        ensure_eq!(slot.mark(State::Absent, 9)?, 0, "pages that became absent");
        for page in [5, 9] {
            let waiting = slot.checker(page, 2)?;
            let event = slot.event()?;
            ensure_eq!(
                (event.page, event.kind),
                (page, EventKind::Absent),
                "the event"
            );
            slot.place(page, 2)?;
            waiting.join("who waits")?;
        }
        slot.check(6, 1)?;
        slot.check(10, 1)?;
        // Named again, they are read again.
        slot.mark(State::Absent, 5)?;
        slot.vm.add_source_ranges(ID, &[PageRange::page(5)])?;
        slot.check(5, 1)?;
    }
    Ok(())
}

/// A file that has some pages: the others are asked for.
fn has_some_pages() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let file = file(tmp(), 0, pages, 1)?;
        let ranges = [PageRange::new(2, 3), PageRange::page(pages - 1)];
        slot.vm.set_source(ID, &file, 0, Some(&ranges))?;
        let has = |page| (2..5).contains(&page) || page == pages - 1;
        for page in [0, 1, 2, 3, 4, 5, pages - 2, pages - 1] {
            let reader = slot.checker(page, if has(page) { 1 } else { 2 })?;
            if !has(page) {
                ensure_eq!(slot.event()?.page, page, "the event's page");
                slot.place(page, 2)?;
            }
            reader.join("a reader")?;
        }
        slot.no_event()?;
        slot.vm.add_source_ranges(ID, &[PageRange::new(6, 2)])?;
        slot.check(6, 1)?;
        slot.check(7, 1)?;
        // A page in the state zero stays one. Not near the others: it would be read ahead.
        slot.vm.add_source_ranges(ID, &[PageRange::new(50, 2)])?;
        slot.mark(State::Zero, 50)?;
        ensure!(
            slot.words(50)?.iter().all(|&w| w == 0),
            "page 50 is not zeros"
        );
        slot.check(51, 1)?;
        ensure_eq!(slot.counter("zero-filled")?, 1, "pages zero-filled");
    }
    Ok(())
}

/// KDP_PAGING starts over, without a source.
fn goes_with_paging() -> Result {
    for (backing, pages) in BACKINGS {
        let (slot, file) = sourced(backing, pages)?;
        slot.check(1, 1)?;
        slot.vm.set_paging(ID, Paging::On)?;
        let waiting = slot.toucher(1)?;
        ensure_eq!(slot.event()?.page, 1, "the event's page");
        slot.vm.set_source(ID, &file, 3 * PAGE, None)?;
        waiting.join("who waits")?;
        slot.check(1, 1)?;
        slot.vm.set_paging(ID, Paging::Off)?;
        match slot.vm.set_source(ID, &file, 3 * PAGE, None) {
            Err(error) => ensure_eq!(error.errno(), Some(libc::ENXIO), "the error"),
            Ok(()) => fail!("a memslot that is not paged has a source"),
        }
    }
    Ok(())
}

/// Who waits for a page when its source is named goes on.
fn wakes_who_waits() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let waiting = slot.checker(pages - 1, 1)?;
        ensure_eq!(slot.event()?.page, pages - 1, "the event's page");
        let file = file(tmp(), 0, pages, 1)?;
        slot.vm.set_source(ID, &file, 0, None)?;
        waiting.join("who waits")?;
    }
    Ok(())
}

/// The thread gets SIGBUS, and the readers are told, once.
fn expect_failure(slot: &Arc<Slot>, page: u64, errno: i32) -> Result {
    let errors = slot.counter("source-errors")?;
    let touched = slot.toucher(page)?.join("who touches the page")?;
    ensure!(
        matches!(
            touched,
            Touched::Signal {
                signal: libc::SIGBUS,
                ..
            }
        ),
        "page {page} reads as {touched:x?}"
    );
    let event = slot.event()?;
    ensure_eq!(
        (event.page, event.kind, event.waiters),
        (page, EventKind::SourceError(errno), 0),
        "the event"
    );
    ensure_eq!(slot.counter("source-errors")?, errors + 1, "errors counted");
    slot.no_event()
}

/// A file that ends too early: an error, never zeros, and the page stays absent; when the file has it, the page is
/// read.
fn short_file() -> Result {
    for (backing, pages) in BACKINGS {
        for cut in [0, 1, PAGE / 2, PAGE - 1] {
            let (slot, file) = sourced(backing, pages)?;
            let last = pages - 1;
            file.set_len((3 + last) * PAGE + cut)?;
            for _ in 0..2 {
                expect_failure(&slot, last, libc::ENODATA)?;
            }
            slot.check(last - 1, 1)?;
            let machine = slot.machine()?;
            let mut vcpu = machine.vcpu(0, &guest::peek(&[last]))?;
            let (exiting, again) = (slot.clone(), file.try_clone()?);
            let ran = Task::work(move || -> Result<_> {
                exiting.vm.set_vcpu_exits(true)?;
                guest::run(&mut vcpu, |fault| {
                    let exit = FaultExit::decode(fault.flags, fault.gpa, fault.size);
                    ensure_eq!(
                        exit.map(|exit| (exit.reason, exit.gpa)),
                        Some((Reason::SourceError, guest::gpa(last))),
                        "the exit"
                    );
                    write(&again, 3, pages, 1)
                })
            })?
            .join("the vCPU")?;
            ensure_eq!(ran.reports, [content::word(last, 1, 0)], "what it read");
            ensure_eq!(ran.faults.len(), 1, "exits");
            slot.check(last, 1)?;
        }
    }
    Ok(())
}

/// Memory of the file has failed: its page cannot be read. When it has a good one, it can.
fn io_error() -> Result {
    const INJECT: &str = "/sys/kernel/debug/hwpoison";
    if !fs::exists(INJECT)? {
        return skip("this kernel cannot inject memory errors");
    }
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let file = kvm_demand_paging::Memfd::create("source", Backing::Shmem, pages * PAGE)?;
        let alias = file.map_all()?;
        for page in 0..pages {
            alias.write(page, &content::bytes(page, 1))?;
        }
        slot.vm.set_source(ID, &file, 0, None)?;
        let bad = 3;
        let pfn = frame_of(alias.as_ptr().wrapping_add((bad * PAGE) as usize))?;
        drop(alias);
        fs::write(format!("{INJECT}/corrupt-pfn"), pfn.to_string())?;
        for _ in 0..2 {
            expect_failure(&slot, bad, libc::EIO)?;
        }
        slot.check(bad + 1, 1)?;
        slot.check(bad - 1, 1)?;
        // Without the bad page, the file has a hole there, and then a good one.
        file.punch_hole(PageRange::page(bad))?;
        File::from(OwnedFd::from(file)).write_all_at(&content::bytes(bad, 1), bad * PAGE)?;
        slot.check(bad, 1)?;
    }
    Ok(())
}

/// Two files take turns as the source while threads read: a page is one file's or the other's, never a part of
/// each, and is the same to everybody.
fn replaced_while_threads_read() -> Result {
    for backing in [Backing::Shmem, Backing::Huge2M] {
        let pages = 2 * BLOCK;
        let slot = Slot::new(backing, pages)?;
        let files = [file(tmp(), 0, pages, 1)?, file(tmp(), 0, pages, 2)?];
        slot.vm.set_source(ID, &files[0], 0, None)?;
        let done = Arc::new(AtomicBool::new(false));
        let mut readers = vec![];
        for thread in 0..3_u64 {
            let (slot, done) = (slot.clone(), done.clone());
            readers.push(Task::work(move || -> Result<u64> {
                let mut looks = 0;
                while !done.load(Ordering::Relaxed) {
                    let page = (looks * 31 + thread * 7) % pages;
                    let words = slot.words(page)?;
                    let version = if words[0] == content::word(page, 1, 0) {
                        1
                    } else {
                        2
                    };
                    if let Err(wrong) = content::check(&words, page, version) {
                        // It may have been made absent and read anew meanwhile: by then it is one version.
                        let words = slot.words(page)?;
                        let torn = words.iter().enumerate().any(|(at, &word)| {
                            word != content::word(page, 1, at) && word != content::word(page, 2, at)
                        });
                        ensure!(!torn, "{wrong}");
                    }
                    looks += 1;
                }
                Ok(looks)
            })?);
        }
        for round in 0..rounds(100) {
            slot.vm
                .set_source(ID, &files[round as usize % 2], 0, None)?;
            if round % 4 == 3 {
                slot.vm.set_paging(ID, Paging::On)?;
            } else {
                slot.mark_range(State::Absent, PageRange::new(0, pages))?;
            }
            slot.vm
                .set_source(ID, &files[round as usize / 2 % 2], 0, None)?;
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            let looks = reader.join("a reader")?;
            ensure!(looks > 0, "a reader saw nothing");
        }
    }
    Ok(())
}

/// A thread that reads on in order: nearly all pages are there before it comes.
fn reads_ahead_in_order() -> Result {
    for backing in [Backing::Shmem, Backing::Huge2M] {
        let pages = 8 * BLOCK;
        let (slot, _file) = sourced(backing, pages)?;
        for page in 0..pages {
            slot.check(page, 1)?;
        }
        let ahead = slot.counter("source-ahead")?;
        ensure!(
            ahead > pages / 2,
            "{ahead} of {pages} pages were read ahead"
        );
        until_all_is_read(&slot)?;
        slot.no_event()?;
    }
    Ok(())
}

/// Nor what is beside a page, on shmem: it would have to be allocated, and charged.
fn reads_nothing_ahead_at_random() -> Result {
    let pages = 2 * BLOCK;
    let (slot, _file) = sourced(Backing::Shmem, pages)?;
    for i in 0..pages {
        slot.check((i * 389) % pages, 1)?;
        ensure_eq!(slot.counter("source-reads")?, i + 1, "pages read");
    }
    ensure_eq!(slot.counter("source-ahead")?, 0, "pages read ahead");
    ensure_eq!(slot.counter("source-reads")?, pages, "pages read");
    Ok(())
}

/// What is read ahead becomes whole blocks, and is mapped by them.
fn sequential_guest_maps_blocks() -> Result {
    let pages = 16 * BLOCK;
    let (slot, _file) = sourced(Backing::Huge2M, pages)?;
    let machine = slot.machine()?;
    let before = crate::tables::kvm_pages()?;
    let touch = Touch::new(GPA, Order::sequential(pages)).hash();
    let mut vcpu = machine.vcpu(0, &touch.program())?;
    let vm = slot.vm.try_clone()?;
    Task::work(move || {
        vm.set_vcpu_exits(true)?;
        guest::run(&mut vcpu, guest::no_fault)
    })?
    .join("the vCPU")?;
    until_all_is_read(&slot)?;
    let mut again = machine.vcpu(1, &touch.program())?;
    guest::run(&mut again, guest::no_fault)?;
    let after = crate::tables::kvm_pages()?;
    ensure!(
        after.1 - before.1 >= 15,
        "{} entries of 2 MiB for 16 blocks",
        after.1 - before.1
    );
    ensure!(
        slot.counter("faults")? < pages / 2,
        "{} faults of single pages",
        slot.counter("faults")?
    );
    Ok(())
}

/// Who has come to a block in order fills it, unless that is done: nothing but the first block is mapped by pages.
fn in_order_comes_by_blocks() -> Result {
    for round in 0..rounds(10) {
        let pages = 8 * BLOCK;
        let (slot, _file) = sourced(Backing::Huge2M, pages)?;
        // Of each page one word: as fast as can be.
        for page in 0..pages {
            ensure_eq!(
                sys::load(slot.address(page)),
                Touched::Value(content::word(page, 1, 0)),
                "a read of page {page}"
            );
        }
        let (small, huge) = (slot.counter("faults")?, slot.counter("faults-huge")?);
        // The work that reads may zap a block once more, when it was at its end.
        ensure!(
            small <= BLOCK && (7..=16).contains(&huge),
            "{small} faults of pages, {huge} of blocks (round {round})"
        );
        until_all_is_read(&slot)?;
        slot.no_event()?;
        for page in 0..pages {
            slot.check(page, 1)?;
        }
    }
    Ok(())
}

/// A page that is in memory is there at once, whatever the device does that has the rest of its block.
fn in_order_waits_for_no_neighbour() -> Result {
    let pages = 4 * BLOCK;
    let slot = Slot::new(Backing::Huge2M, pages)?;
    let bytes = (0..pages).flat_map(|page| content::bytes(page, 1));
    let slow = SlowFs::mount(bytes.collect())?;
    let device = LoopDevice::read_only(slow.file())?;
    let disk = File::open(&device.path)?;
    // SAFETY: it takes no memory of ours.
    let advised = unsafe { libc::posix_fadvise(disk.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
    ensure_eq!(advised, 0, "posix_fadvise(2)");
    // Two blocks, and the first page of the third.
    let mut buffer = vec![0; ((2 * BLOCK + 1) * PAGE) as usize];
    disk.read_exact_at(&mut buffer, 0)?;
    slot.vm.set_source(ID, &disk, 0, None)?;

    slow.hold();
    let touching = slot.clone();
    Task::work(move || {
        for page in 0..=2 * BLOCK {
            touching.check(page, 1)?;
        }
        Ok(())
    })?
    .join("a thread whose pages are all in memory")?;
    let mut next = slot.checker(2 * BLOCK + 1, 1)?;
    next.still_waits("a thread whose page is not")?;
    slow.release();
    next.join("a thread whose disk answers again")?;
    for page in 0..pages {
        slot.check(page, 1)?;
    }
    slot.vm.clear_source(ID)?;
    Ok(())
}

/// A source needs no handler: what it has is there when the VM's last descriptor is closed.
fn closed_vm() -> Result {
    for (backing, pages) in BACKINGS {
        let (slot, _file) = sourced(backing, pages)?;
        slot.mark(State::Absent, 1)?;
        let Ok(slot) = Arc::try_unwrap(slot) else {
            fail!("the slot is in use");
        };
        let Slot { vm, guest, .. } = slot;
        drop(vm);
        let at = |page: u64| {
            guest
                .as_ptr()
                .wrapping_add((page * PAGE) as usize)
                .cast::<u64>()
        };
        ensure!(
            matches!(sys::load(at(0)), Touched::Value(value) if value == content::word(0, 1, 0)),
            "page 0 is not read"
        );
        ensure!(
            matches!(
                sys::load(at(1)),
                Touched::Signal {
                    signal: libc::SIGBUS,
                    ..
                }
            ),
            "page 1, which nobody has"
        );
    }
    Ok(())
}
