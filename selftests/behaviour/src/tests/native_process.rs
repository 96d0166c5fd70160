// SPDX-License-Identifier: GPL-2.0

//! Native memory, and what the kernel does with the memory of a process: core dumps, futexes, the
//! end of a thread, and devices that pin memory.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvm_demand_paging::{Backing, Cause, PageRange, State, Who};
use libc::c_int;

use super::native::Private;
use crate::check::Result;
use crate::content;
use crate::numa::{self, Setting};
use crate::slot::{words_at, Slot, BACKINGS, GPA, ID, PAGE};
use crate::sys::{self, Child, Ended};
use crate::task::{until, Task, PATIENCE};
use crate::tun::{frame, Tap};
use crate::xdp::Socket;

tests! {
    "native-core-dump-leaves-the-memory-out" => core_dump,
    "native-exit-does-not-wait" => exit_does_not_wait,
    "native-futex-between-processes" => futex_between_processes,
    "native-futex-waits-for-its-page" => futex_waits_for_its_page,
    "native-device-pins-what-is-present" => device_pins_what_is_present,
    "native-device-keeps-what-it-pinned" => device_keeps_what_it_pinned,
}

const PAGES: u64 = 64;

/// A directory on a tmpfs, which is removed when this is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = PathBuf::from(format!("/dev/shm/kdp-core-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // If this fails, the files stay in memory until the machine ends.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A PT_LOAD segment of a core: a part of the process's memory.
struct Segment {
    address: u64,
    memory: u64,
    offset: u64,
    bytes: u64,
}

/// Reads the segments of a core, which is an ELF file of 64 bits. See elf(5).
fn segments(core: &File) -> Result<Vec<Segment>> {
    const PT_LOAD: u64 = 1;
    let word = |at: u64, len: usize| -> Result<u64> {
        let mut bytes = [0; 8];
        core.read_exact_at(&mut bytes[..len], at)?;
        Ok(u64::from_le_bytes(bytes))
    };
    ensure_eq!(word(0, 4)?, 0x464c_457f, "the magic number of the core");
    let (headers, size, count) = (word(32, 8)?, word(54, 2)?, word(56, 2)?);
    let mut segments = Vec::new();
    for at in (0..count).map(|number| headers + number * size) {
        if word(at, 4)? == PT_LOAD {
            segments.push(Segment {
                address: word(at + 16, 8)?,
                memory: word(at + 40, 8)?,
                offset: word(at + 8, 8)?,
                bytes: word(at + 32, 8)?,
            });
        }
    }
    Ok(segments)
}

/// Fails unless the core lists the mapping, and holds none of its bytes.
fn is_left_out(segments: &[Segment], at: *const u64) -> Result {
    let range = at as u64..at as u64 + PAGES * PAGE;
    let mut known = 0;
    for part in segments.iter().filter(|s| range.contains(&s.address)) {
        known += part.memory;
        let (bytes, address) = (part.bytes, part.address);
        ensure_eq!(bytes, 0, "bytes in the core of the memory at {address:#x}");
    }
    ensure_eq!(known, PAGES * PAGE, "bytes of the mapping in the core");
    Ok(())
}

/// Makes a core dump of this process include all kinds of memory.
fn dump_all() -> Result {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: it changes a limit of this process.
    sys::check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) })?;
    Ok(fs::write("/proc/self/coredump_filter", "0x1ff")?)
}

/// A signal that dumps core kills a process whose threads wait for absent pages. The process ends
/// at once. Its core leaves out the memslot, and has the other memory.
fn core_dump() -> Result {
    let slot = Slot::new(Backing::Shmem, PAGES)?;
    let private = Private::of(&slot)?;
    for page in 0..4 {
        slot.place(page, 1)?;
        slot.check(page, 1)?;
    }
    private.write(1, 2);
    // Anonymous memory, whose bytes must be in the core.
    let marker = content::bytes(77, 9).to_vec();
    let scratch = Scratch::new()?;
    let pattern = format!("{}/core", scratch.0.display());
    let _pattern = Setting::set("/proc/sys/kernel/core_pattern", &pattern)?;
    let mut child = Child::fork(|| {
        dump_all()?;
        for (at, count) in [
            (slot.address(0), 4),
            (slot.address(0), PAGES),
            (private.address(0), 4),
        ] {
            let dumped = sys::advise(at.cast(), (count * PAGE) as usize, libc::MADV_DODUMP);
            ensure_eq!(
                dumped.err().and_then(|e| e.raw_os_error()),
                Some(libc::EINVAL),
                "errno of MADV_DODUMP of {count} pages"
            );
        }
        let _reader = slot.toucher(5)?;
        let writing = slot.clone();
        let _writer = Task::work(move || {
            let pipe = sys::pipe_to_write()?;
            Ok(sys::write_from(pipe.as_fd(), writing.address(6).cast(), 8)?)
        })?;
        words_at(private.address(7)).map(drop)
    })?;
    let mut pages = Vec::new();
    for _ in 0..3 {
        pages.push(slot.event()?.page);
    }
    pages.sort_unstable();
    ensure_eq!(pages, [5, 6, 7], "pages that the process waits for");
    child.kill(libc::SIGABRT)?;
    let ended = child.wait(PATIENCE)?;
    ensure_eq!(ended, Ended::Signal(libc::SIGABRT), "the process's end");
    slot.no_event()?;
    let core = File::open(Path::new(&pattern))?;
    let segments = segments(&core)?;
    is_left_out(&segments, slot.address(0))?;
    is_left_out(&segments, private.address(0))?;
    let at = marker.as_ptr() as u64;
    let found = segments
        .iter()
        .find(|s| s.address <= at && at + PAGE <= s.address + s.bytes);
    let Some(found) = found else {
        fail!("the core does not have the memory at {at:#x}");
    };
    let mut bytes = vec![0; marker.len()];
    core.read_exact_at(&mut bytes, found.offset + (at - found.address))?;
    ensure!(bytes == marker, "the core has other bytes at {at:#x}");
    slot.place(5, 1)?;
    slot.check(5, 1)
}

/// A process ends with a robust mutex in an absent page. The kernel accesses the mutex then, and
/// must not wait for the page: no signal could end that wait.
fn exit_does_not_wait() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let mut child = Child::fork(|| {
            // struct robust_list_head, and an entry behind it.
            let head = Box::leak(Box::new([0; 4])).as_mut_ptr();
            let entry = head.wrapping_add(3);
            let offset = (slot.address(5) as u64).wrapping_sub(entry as u64);
            // SAFETY: the list has four words, and is never freed. The kernel reads it when the
            // process ends. Its head holds the first entry, the offset from an entry to its mutex,
            // and no mutex that is just being locked. The entry points back to the head.
            let ret = unsafe {
                head.write(entry as u64);
                head.add(1).write(offset);
                entry.write(head as u64);
                libc::syscall(libc::SYS_set_robust_list, head, 24)
            };
            sys::check(ret as c_int)?;
            Ok(())
        })?;
        let ended = child.wait(Duration::from_secs(20));
        // If the process waits, this ends its wait.
        slot.place(5, 1)?;
        ensure_eq!(ended?, Ended::Status(0), "the process's end");
        slot.no_event()?;
    }
    Ok(())
}

/// futex(2) on a futex that processes share.
fn futex(at: *const u64, op: c_int, value: u32, timeout: Option<Duration>) -> io::Result<u64> {
    let time = timeout.map(|time| libc::timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    });
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the kernel checks the address, and reads the time, if there is one.
    let ret = unsafe { libc::syscall(libc::SYS_futex, at, op, value, time, 0, 0) };
    sys::check(ret as c_int).map(|ret| ret as u64)
}

/// The first word of a page.
fn word(page: u64, version: u64) -> u32 {
    content::word(page, version, 0) as u32
}

/// Starts a process that sleeps in FUTEX_WAIT at a present page.
fn sleeper(slot: &Slot, page: u64, version: u64) -> Result<Child> {
    let child = Child::fork(|| {
        futex(
            slot.address(page),
            libc::FUTEX_WAIT,
            word(page, version),
            None,
        )?;
        Ok(())
    })?;
    let call = format!("/proc/{}/syscall", child.pid());
    let in_futex = format!("{} ", libc::SYS_futex);
    until("the child sleeps", || {
        Ok(fs::read_to_string(&call)?.starts_with(&in_futex))
    })?;
    Ok(child)
}

/// Wakes the process that sleeps at an address.
fn wake(at: usize) -> Result {
    until("the child is woken", || {
        Ok(futex(at as *const u64, libc::FUTEX_WAKE, 1, None)? == 1)
    })
}

/// The memfd's page identifies a futex. So one process can wake another through any mapping, also
/// after the page was absent meanwhile.
fn futex_between_processes() -> Result {
    let slot = Slot::new(Backing::Shmem, PAGES)?;
    for at in [
        slot.address(3),
        slot.alias.as_ptr().wrapping_add(3 * PAGE as usize).cast(),
    ] {
        slot.place(3, 1)?;
        let mut child = sleeper(&slot, 3, 1)?;
        wake(at as usize)?;
        child.join(PATIENCE)?;
    }
    let mut child = sleeper(&slot, 3, 1)?;
    slot.mark(State::Absent, 3)?;
    slot.memfd.punch_hole(PageRange::page(3))?;
    let at = slot.address(3) as usize;
    let mut waker = Task::work(move || wake(at))?;
    let event = slot.event()?;
    ensure_eq!(
        (event.page, event.access.who),
        (3, Who::Kernel),
        "the event"
    );
    waker.still_waits("FUTEX_WAKE at an absent page")?;
    slot.place(3, 2)?;
    waker.join("FUTEX_WAKE")?;
    child.join(PATIENCE)
}

/// FUTEX_WAIT and FUTEX_WAKE at an absent page wait until the page is placed, and then use its
/// bytes. No timeout ends that wait. At a poisoned page they fail.
fn futex_waits_for_its_page() -> Result {
    const TIMEOUT: Duration = Duration::from_millis(1);
    let slot = Slot::new(Backing::Shmem, PAGES)?;
    let errno = |result: io::Result<u64>| result.map_err(|e| e.raw_os_error().unwrap_or(0));
    for (op, value, expected) in [
        (libc::FUTEX_WAIT, word(9, 1), Err(libc::ETIMEDOUT)),
        (libc::FUTEX_WAIT, word(9, 2), Err(libc::EAGAIN)),
        (libc::FUTEX_WAKE, 1, Ok(0)),
    ] {
        let at = slot.address(9) as usize;
        let mut task = Task::spawn(move || futex(at as *const u64, op, value, Some(TIMEOUT)))?;
        let event = slot.event()?;
        ensure_eq!(
            (event.gfn, event.access.who, event.access.write),
            (GPA / PAGE + 9, Who::Kernel, true),
            "the event"
        );
        task.still_waits("futex() at an absent page")?;
        slot.place(9, 1)?;
        ensure_eq!(errno(task.join("futex()")?), expected, "operation {op}");
        slot.check(9, 1)?;
        slot.mark(State::Absent, 9)?;
    }
    slot.vm.poison(ID, &[PageRange::page(9)], Cause::Emulated)?;
    for op in [libc::FUTEX_WAIT, libc::FUTEX_WAKE] {
        let result = errno(futex(slot.address(9), op, 1, Some(TIMEOUT)));
        ensure_eq!(result, Err(libc::EFAULT), "operation {op} at a lost page");
    }
    slot.no_event()
}

/// A device that pins memory under the mmap lock gets an error if a page is absent. It does not
/// wait, and pins no zeros. The test uses AF_XDP; VFIO pins in the same way.
fn device_pins_what_is_present() -> Result {
    let slot = Slot::new(Backing::Shmem, PAGES)?;
    for page in 0..4 {
        slot.place(page, 1)?;
    }
    let socket = Socket::new()?;
    for (first, errno) in [(4, libc::EFAULT), (2, libc::ENOMEM)] {
        let refused = socket.register(slot.address(first), 4);
        ensure_eq!(
            refused.err().and_then(|e| e.raw_os_error()),
            Some(errno),
            "errno where pages from {first} on are pinned"
        );
    }
    slot.no_event()?;
    socket.register(slot.address(0), 4)?;
    for page in 4..8 {
        slot.toucher(page)?
            .still_waits("a read of an absent page")?;
        slot.place(page, 1)?;
        slot.check(page, 1)?;
    }
    Ok(())
}

/// A page that a device has pinned stays pinned in every state: the device continues to access it,
/// and does not wait. The memslot has the same page until a hole is punched there. From then on
/// only the device has it.
fn device_keeps_what_it_pinned() -> Result {
    let slot = Slot::new(Backing::Shmem, PAGES)?;
    let tap = Tap::new()?;
    let mut socket = Socket::new()?;
    let packets = [1, 2, 3].map(|seed| frame(200, seed));
    let put = |page: u64, packet: &[u8]| -> Result {
        let mut bytes = [0; PAGE as usize];
        bytes[..packet.len()].copy_from_slice(packet);
        Ok(slot.alias.write(page, &bytes)?)
    };
    for page in 0..4 {
        put(page, &packets[0])?;
        slot.mark(State::Present, page)?;
    }
    socket.register(slot.address(0), 4)?;
    socket.bind(tap.index)?;
    let sends = |socket: &Socket, page: u64, which: usize, when: &str| -> Result {
        socket.send(page, packets[which].len())?;
        ensure!(
            tap.sent()? == packets[which],
            "{when}, the device sends other bytes of page {page}"
        );
        Ok(())
    };
    let pinned = numa::frames(slot.guest.as_ptr(), 4)?;
    sends(&socket, 1, 0, "at first")?;
    slot.mark(State::Absent, 1)?;
    sends(&socket, 1, 0, "while it is absent")?;
    put(1, &packets[1])?;
    sends(&socket, 1, 1, "filled while it is absent")?;
    slot.mark(State::Present, 1)?;
    let frames = numa::frames(slot.guest.as_ptr(), 4)?;
    ensure_eq!(frames, pinned, "the frames, present again");
    // Processes cannot access a poisoned page, but the device can.
    slot.vm.poison(ID, &[PageRange::page(2)], Cause::Emulated)?;
    sends(&socket, 2, 0, "while it is lost")?;
    slot.vm.heal(ID, &[PageRange::page(2)])?;
    // A hole takes the page from the memslot.
    slot.mark(State::Absent, 3)?;
    slot.memfd.punch_hole(PageRange::page(3))?;
    put(3, &packets[2])?;
    slot.mark(State::Present, 3)?;
    sends(&socket, 3, 0, "after a hole was punched")?;
    let frames = numa::frames(slot.guest.as_ptr(), 4)?;
    ensure_eq!(
        frames[..3],
        pinned[..3],
        "the frames of pages without a hole"
    );
    ensure!(frames[3] != pinned[3], "page 3 has the device's frame");
    // Pinned again, the device has the memslot's page.
    drop(socket);
    let mut socket = Socket::new()?;
    socket.register(slot.address(0), 4)?;
    socket.bind(tap.index)?;
    sends(&socket, 3, 2, "pinned anew")
}
