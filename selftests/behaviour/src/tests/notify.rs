// SPDX-License-Identifier: GPL-2.0

//! The VM's fd as notification fd.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use kvm_demand_paging::{receive_vm, send_vm, Backing, PageRange, State, Vm};

use crate::check::Result;
use crate::content;
use crate::harness::rounds;
use crate::slot::{next_event, Slot, ID};
use crate::sys::{self, Child};
use crate::task::{until, Task, MOMENT, PATIENCE};

tests! {
    "notify-epoll-tells-every-watcher" => epoll_tells_every_watcher,
    "notify-several-readers" => several_readers,
    "notify-several-reader-processes" => several_reader_processes,
    "notify-vm-passed-over-a-socket" => vm_passed_over_a_socket,
    "notify-closing-a-copy-of-the-fd" => closing_a_copy_of_the_fd,
}

fn epoll(vm: &Vm, flags: libc::c_int) -> Result<i32> {
    let mut event = libc::epoll_event {
        events: (libc::EPOLLIN | flags) as u32,
        u64: 7,
    };
    // SAFETY: the event is valid; the descriptor lives until the test's process ends.
    unsafe {
        let fd = sys::check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?;
        sys::check(libc::epoll_ctl(
            fd,
            libc::EPOLL_CTL_ADD,
            vm.as_fd().as_raw_fd(),
            &mut event,
        ))?;
        Ok(fd)
    }
}

fn epoll_wait(fd: i32, within: Duration) -> Result<bool> {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: room for one event.
    let n = sys::check(unsafe {
        libc::epoll_wait(fd, &mut event, 1, within.as_millis() as libc::c_int)
    })?;
    Ok(n == 1 && event.events & libc::EPOLLIN as u32 != 0)
}

/// Level- and edge-triggered watchers of one VM are told of an event; after it was read there is nothing
/// more, and O_NONBLOCK says so at once; a second page makes them tell again.
fn epoll_tells_every_watcher() -> Result {
    let slot = Slot::new(Backing::Shmem, 8)?;
    slot.vm.set_nonblocking(true)?;
    let (level, edge) = (epoll(&slot.vm, 0)?, epoll(&slot.vm, libc::EPOLLET)?);
    for page in [5, 2] {
        for watcher in [level, edge] {
            ensure!(
                !epoll_wait(watcher, Duration::from_millis(20))?,
                "told of nothing"
            );
        }
        let mut events = Vec::new();
        match slot.vm.read_events(&mut events, 1) {
            Err(e) => ensure_eq!(e.errno(), Some(libc::EAGAIN), "errno without an event"),
            Ok(n) => fail!("read {n} events where there is none"),
        }
        let waiting = slot.checker(page, 1)?;
        for watcher in [level, edge] {
            ensure!(epoll_wait(watcher, PATIENCE)?, "no watcher was told");
        }
        ensure!(
            epoll_wait(level, MOMENT)?,
            "the level is gone before the event was read"
        );
        ensure!(!epoll_wait(edge, MOMENT)?, "one event, two edges");
        ensure_eq!(slot.event()?.page, page, "the event's page");
        slot.place(page, 1)?;
        waiting.join("the thread")?;
    }
    Ok(())
}

/// Several threads read one VM: every page's event goes to one of them, once.
fn several_readers() -> Result {
    const READERS: usize = 4;
    let pages = rounds(400);
    let slot = Slot::new(Backing::Shmem, pages)?;
    slot.vm.set_nonblocking(true)?;
    let delivered: Arc<Vec<AtomicU64>> = Arc::new((0..pages).map(|_| AtomicU64::new(0)).collect());
    let ended = Arc::new(AtomicU64::new(0));
    let mut readers = Vec::new();
    for _ in 0..READERS {
        let (slot, delivered, ended) = (slot.clone(), delivered.clone(), ended.clone());
        readers.push(Task::work(move || -> Result {
            while ended.load(Ordering::Acquire) == 0 {
                slot.vm.wait_event(Some(Duration::from_millis(5)))?;
                for event in slot.vm.events() {
                    let event = event?;
                    delivered[event.page as usize].fetch_add(1, Ordering::Relaxed);
                    slot.place(event.page, 1)?;
                }
            }
            Ok(())
        })?);
    }
    let mut touchers = Vec::new();
    for first in 0..3 {
        let slot = slot.clone();
        touchers.push(Task::work(move || -> Result {
            for page in (0..pages).filter(|page| page % 3 == first || page % 5 == 0) {
                slot.check(page, 1)?;
            }
            Ok(())
        })?);
    }
    for toucher in touchers {
        toucher.join("a toucher")?;
    }
    ended.store(1, Ordering::Release);
    for reader in readers {
        reader.join("a reader")?;
    }
    for (page, times) in delivered.iter().enumerate() {
        ensure_eq!(
            times.load(Ordering::Relaxed),
            1,
            "deliveries of page {page}"
        );
    }
    Ok(())
}

/// Two processes read one VM, and each serves what it reads: together they serve everything.
fn several_reader_processes() -> Result {
    let pages = rounds(200);
    let slot = Slot::new(Backing::Shmem, pages)?;
    slot.vm.set_nonblocking(true)?;
    let mut children = Vec::new();
    for _ in 0..2 {
        let slot = slot.clone();
        children.push(Child::fork(move || loop {
            slot.vm.wait_event(Some(Duration::from_millis(50)))?;
            for event in slot.vm.events() {
                let event = event?;
                slot.place(event.page, 1)?;
            }
        })?);
    }
    let touching = slot.clone();
    let toucher = Task::work(move || -> Result {
        for page in 0..pages {
            touching.check(page, 1)?;
        }
        Ok(())
    })?;
    toucher.join("the toucher")?;
    ensure_eq!(slot.vm_counter("events-read")?, pages, "events read");
    Ok(())
}

/// A handler in another process that gets nothing but the VM's fd, over a socket, finds memslot and memory
/// by it, and serves; the faulting process has no part in it.
fn vm_passed_over_a_socket() -> Result {
    let slot = Slot::new(Backing::Shmem, 16)?;
    let (here, there) = UnixStream::pair()?;
    let mut child = {
        let here = here.try_clone()?;
        Child::fork(move || {
            drop(here);
            // All that it has by birth is out of its reach.
            close_all_but(&there);
            let (vm, name) = receive_vm(&there)?;
            ensure_eq!(name, "guest-7", "the VM's name");
            let Some(info) = vm.memslots().next() else {
                fail!("the VM has no memslot");
            };
            let info = info?;
            ensure_eq!(
                (info.slot_id, info.pages, info.paging),
                (ID, 16, true),
                "the memslot"
            );
            let alias = vm.memslot_memfd(info.slot_id)?.map_all()?;
            let present = vm.memslot(info.slot_id)?.bitmap()?;
            for _ in 0..16 {
                let event = next_event(&vm)?;
                alias.write(event.page, &content::bytes(event.page, 4))?;
                vm.mark_present(event.slot_id, &[PageRange::page(event.page)])?;
                ensure!(present.is_present(event.page), "its bit is not set");
            }
            Ok(())
        })?
    };
    send_vm(&here, &slot.vm, "guest-7")?;
    for page in 0..16 {
        slot.checker(page, 4)?.join("a toucher")?;
    }
    child.join(PATIENCE)
}

fn close_all_but(stream: &UnixStream) {
    let keep = stream.as_raw_fd() as libc::c_uint;
    // SAFETY: nothing of this process uses them any more; it ends without dropping what owns them.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, keep - 1, 0);
        libc::syscall(libc::SYS_close_range, keep + 1, libc::c_uint::MAX, 0);
    }
}

/// Closing a copy of the VM's fd in the process that has read an event tells nothing: it goes on serving
/// through the other one, and the event is not delivered again.
fn closing_a_copy_of_the_fd() -> Result {
    let slot = Slot::new(Backing::Shmem, 8)?;
    let waiting = slot.checker(1, 1)?;
    let copy = slot.vm.try_clone()?;
    ensure_eq!(next_event(&copy)?.page, 1, "the event's page");
    drop(copy);
    slot.no_event()?;
    until("the event is pending", || {
        Ok(slot.vm_counter("events-pending")? == 1)
    })?;
    slot.fill(1, 1)?;
    ensure_eq!(slot.mark(State::Present, 1)?, 1, "pages changed");
    waiting.join("the thread")
}
