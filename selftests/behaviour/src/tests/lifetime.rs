// SPDX-License-Identifier: GPL-2.0

//! What ends while somebody waits: the VM, the memslot, the mapping, the waiter.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kdp_vmm::{Machine, Stop, Vcpu};
use kvm_demand_paging::{Backing, State, Who};

use crate::check::Result;
use crate::content;
use crate::guest;
use crate::slot::{words_at, Slot, BACKINGS, GPA, ID, PAGE};
use crate::sys::{self, Child, Ended, Touched};
use crate::task::{until, Task, PATIENCE};

tests! {
    "lifetime-fails-closed" => fails_closed,
    "lifetime-vm-held-by-another-process" => vm_held_by_another_process,
    "lifetime-killed-while-waiting" => killed_while_waiting,
    "lifetime-signal-to-a-waiting-thread" => signal_to_a_waiting_thread,
    "lifetime-signal-to-a-waiting-vcpu" => signal_to_a_waiting_vcpu,
    "lifetime-exec-or-exit-while-waiting" => exec_or_exit_while_waiting,
    "lifetime-removed-under-vcpus" => removed_under_vcpus,
}

/// SIGBUS of an access to this page.
pub(super) fn sigbus(slot_guest: *const u64) -> Touched {
    /// Nonexistent physical address.
    const BUS_ADRERR: i32 = 2;
    Touched::sigbus(BUS_ADRERR, slot_guest, 0)
}

fn run_fails(mut vcpu: Vcpu) -> impl FnOnce() -> std::result::Result<Stop, String> + Send {
    move || vcpu.run().map_err(|e| e.to_string())
}

/// Invariant 6, fail closed: when the last fd of the VM is closed, everybody who waits for an absent page
/// gets an error, and so does everybody who comes later: a thread SIGBUS, a system call EFAULT, KVM_RUN a
/// failure. Nobody reads zeros. What was present can still be read.
fn fails_closed() -> Result {
    for (backing, pages) in BACKINGS {
        let Ok(slot) = Arc::try_unwrap(Slot::new(backing, pages)?) else {
            fail!("somebody else has the memslot");
        };
        let machine = slot.machine()?;
        let absent = pages / 2;
        slot.place(0, 1)?;
        let write = sys::pipe_to_write()?;
        let guest = slot.guest.clone();
        let address = move |page: u64| -> *const u64 {
            guest.as_ptr().wrapping_add((page * PAGE) as usize).cast()
        };

        let at = address.clone();
        let thread = Task::spawn(move || sys::load(at(absent)))?;
        let (at, into) = (address.clone(), write.try_clone()?);
        let call = Task::spawn(move || sys::write_from(into.as_fd(), at(absent).cast(), 64))?;
        let waiting_vcpu = Task::spawn(run_fails(machine.vcpu(0, &guest::peek(&[absent]))?))?;
        let mut exiter = machine.vcpu(1, &guest::peek(&[absent]))?;
        let vm = slot.vm.try_clone()?;
        // 1: the thread has closed its fd; 2: the last one is closed.
        let step = Arc::new(AtomicU64::new(0));
        let steps = step.clone();
        let exiting_vcpu = Task::work(move || -> Result<String> {
            vm.set_vcpu_exits(true)?;
            ensure!(
                matches!(exiter.run()?, Stop::Fault(fault) if fault.gpa == guest::gpa(absent)),
                "it did not exit"
            );
            drop(vm);
            steps.store(1, Ordering::Release);
            until(
                "the VM is closed",
                || Ok(steps.load(Ordering::Acquire) == 2),
            )?;
            match exiter.run() {
                Ok(stop) => fail!("KVM_RUN returned {stop:x?} after the VM was closed"),
                Err(e) => Ok(e.to_string()),
            }
        })?;
        until("all wait", || {
            Ok(slot.counter("waits")? >= 3 && slot.counter("exits")? == 1)
        })?;

        until("the vCPU's thread lets go of its copy of the fd", || {
            Ok(step.load(Ordering::Acquire) == 1)
        })?;
        let Slot { vm, memslot, .. } = slot;
        drop(vm);
        step.store(2, Ordering::Release);

        ensure_eq!(
            thread.join("the thread")?,
            sigbus(address(absent)),
            "its touch"
        );
        match call.join("write()")? {
            Err(e) => ensure_eq!(e.raw_os_error(), Some(libc::EFAULT), "errno of write()"),
            Ok(n) => fail!("write() wrote {n} bytes of a page that nobody can bring"),
        }
        match waiting_vcpu.join("the vCPU that waits")? {
            Err(e) => ensure!(e.contains("Bad address"), "KVM_RUN failed by: {e}"),
            Ok(stop) => fail!("KVM_RUN returned {stop:x?}"),
        }
        let error = exiting_vcpu.join("the vCPU with exits")?;
        ensure!(error.contains("Bad address"), "KVM_RUN failed by: {error}");

        // Those who come later.
        ensure_eq!(
            sys::load(address(absent)),
            sigbus(address(absent)),
            "a later read"
        );
        // SAFETY: an address in a mapping of guest memory, which there are no references to.
        let stored = unsafe { sys::store(address(absent).cast_mut(), 1) };
        ensure_eq!(stored, sigbus(address(absent)), "a later write");
        let again = memslot.map()?;
        let at = again.as_ptr().wrapping_add((absent * PAGE) as usize).cast();
        ensure_eq!(sys::load(at), sigbus(at), "a read through a new mapping");
        if let Err(wrong) = content::check(&words_at(address(0))?, 0, 1) {
            fail!("{wrong}");
        }
    }
    Ok(())
}

/// As long as another process holds the VM's fd, closing it here changes nothing: who waits goes on
/// waiting, and is served by the other one.
fn vm_held_by_another_process() -> Result {
    let Ok(slot) = Arc::try_unwrap(Slot::new(Backing::Shmem, 8)?) else {
        fail!("somebody else has the memslot");
    };
    let (go, wait_for_go) = sys::pipe().map(|(r, w)| (w, r))?;
    let (vm, alias) = (slot.vm.try_clone()?, slot.memfd.map_all()?);
    let mut child = Child::fork(move || {
        let mut byte = [0_u8];
        // SAFETY: the buffer is this process's own.
        unsafe { sys::read_to(wait_for_go.as_fd(), byte.as_mut_ptr(), 1)? };
        let event = crate::slot::next_event(&vm)?;
        alias.write(event.page, &content::bytes(event.page, 2))?;
        vm.mark(
            ID,
            State::Present,
            &[kvm_demand_paging::PageRange::page(event.page)],
        )?;
        Ok(())
    })?;
    let guest = slot.guest.clone();
    let Slot { vm, .. } = slot;
    drop(vm);
    let mut waiting = Task::spawn(move || words_at(guest.as_ptr().wrapping_add(5 * 4096).cast()))?;
    waiting.still_waits("the thread")?;
    sys::write_from(go.as_fd(), [1_u8].as_ptr(), 1)?;
    if let Err(wrong) = content::check(&waiting.join("the thread")??, 5, 2) {
        fail!("{wrong}");
    }
    child.join(PATIENCE)
}

/// SIGKILL ends a process whose threads wait for pages in every way that there is, at once, and their
/// events are gone.
fn killed_while_waiting() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        crate::slot::need_kvm()?;
        let waiting = slot.clone();
        let mut child = Child::fork(move || {
            let machine = waiting.machine()?;
            let write = sys::pipe_to_write()?;
            let _thread = waiting.toucher(1)?;
            let at = waiting.clone();
            let _call =
                Task::spawn(move || sys::write_from(write.as_fd(), at.address(2).cast(), 64))?;
            let mut vcpu = machine.vcpu(0, &guest::peek(&[3]))?;
            let _vcpu = Task::spawn(move || vcpu.run().map_err(|e| e.to_string()))?;
            std::thread::sleep(Duration::from_secs(60));
            Ok(())
        })?;
        until("all three wait", || {
            Ok(slot.vm_counter("events-pending")? == 3)
        })?;
        child.kill(libc::SIGKILL)?;
        let killed = Instant::now();
        ensure_eq!(
            child.wait(PATIENCE)?,
            Ended::Signal(libc::SIGKILL),
            "the child's end"
        );
        ensure!(
            killed.elapsed() < Duration::from_secs(5),
            "it took {:?} to die",
            killed.elapsed()
        );
        ensure_eq!(slot.vm_counter("events-pending")?, 0, "events of the dead");
        slot.no_event()?;
        slot.place(1, 1)?;
        slot.check(1, 1)?;
    }
    Ok(())
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn handled(_signal: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::AcqRel);
}

/// A plain signal to a thread that waits in user mode: its handler runs at once, then the thread waits on.
/// Before and after the event was read; in all there is one event, delivered once.
fn signal_to_a_waiting_thread() -> Result {
    sys::catch(libc::SIGUSR1, handled)?;
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let mut task = slot.checker(6, 1)?;
        until("the thread waits", || Ok(slot.counter("waits")? == 1))?;
        for round in 0..4 {
            let before = HANDLED.load(Ordering::Acquire);
            sys::signal_thread(task.tid, libc::SIGUSR1)?;
            until("the handler has run", || {
                Ok(HANDLED.load(Ordering::Acquire) > before)
            })?;
            until("the thread waits again", || {
                Ok(slot.counter("waits")? == round + 2)
            })?;
            task.still_waits("the thread")?;
            if round == 1 {
                let event = slot.event()?;
                ensure_eq!((event.page, event.deliveries), (6, 1), "the event");
            }
            if round > 0 {
                slot.no_event()?;
            }
        }
        slot.place(6, 1)?;
        task.join("the thread")?;
        slot.no_event()?;
    }
    Ok(())
}

/// A plain signal to a vCPU that waits for a page, exits off: on shmem KVM_RUN returns at once; on hugetlb
/// it does not return until the page is there (a documented limit). Nothing is lost.
fn signal_to_a_waiting_vcpu() -> Result {
    sys::catch_idly(libc::SIGUSR1)?;
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let machine = slot.machine()?;
        let mut vcpu = machine.vcpu(0, &guest::peek(&[4]))?;
        let mut task = Task::work(move || guest::run(&mut vcpu, guest::no_fault))?;
        ensure_eq!(slot.event()?.access.who, Who::Guest, "who waits");
        let waits = slot.counter("waits")?;
        sys::signal_thread(task.tid, libc::SIGUSR1)?;
        task.still_waits("the vCPU")?;
        let again = u64::from(backing == Backing::Shmem);
        ensure_eq!(
            slot.counter("waits")?.min(waits + 1),
            waits + again,
            "waits after the signal, at least"
        );
        if backing != Backing::Shmem {
            slot.no_event()?;
        }
        slot.place(4, 3)?;
        let ran = task.join("the vCPU")?;
        ensure_eq!(ran.interrupted, 1, "returns of KVM_RUN for the signal");
        ensure_eq!(ran.reports, [content::word(4, 3, 0)], "what the guest read");
    }
    Ok(())
}

/// exec() or exit() in a process whose other threads wait: they end, the program runs, their events are
/// gone, and the VM, which the parent holds, goes on.
fn exec_or_exit_while_waiting() -> Result {
    let slot = Slot::new(Backing::Shmem, 8)?;
    for exec in [true, false] {
        let waiting = slot.clone();
        let mut child = Child::fork(move || {
            let write = sys::pipe_to_write()?;
            let _thread = waiting.toucher(1)?;
            let at = waiting.clone();
            let _call =
                Task::spawn(move || sys::write_from(write.as_fd(), at.address(2).cast(), 64))?;
            until("both wait", || {
                Ok(waiting.vm_counter("events-pending")? == 2)
            })?;
            if exec {
                // SAFETY: the arguments are C strings, the last one null.
                unsafe { libc::execl(c"/bin/true".as_ptr(), c"true".as_ptr(), 0_usize) };
                fail!("execl: {}", std::io::Error::last_os_error());
            }
            Ok(())
        })?;
        child.join(PATIENCE)?;
        ensure_eq!(
            slot.vm_counter("events-pending")?,
            0,
            "events of threads that are gone"
        );
    }
    slot.place(1, 1)?;
    slot.check(1, 1)
}

/// The memslot is removed under a vCPU that waits and one that has exited: both get a failure, never
/// zeros; the VM can have a new memslot in its place.
fn removed_under_vcpus() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let machine: Machine = slot.machine()?;
        let waiter = Task::spawn(run_fails(machine.vcpu(0, &guest::peek(&[2]))?))?;
        ensure_eq!(slot.event()?.page, 2, "the event's page");
        let mut exiter = machine.vcpu(1, &guest::peek(&[2]))?;
        let vm = slot.vm.try_clone()?;
        let exited = Arc::new(AtomicU64::new(0));
        let (has_exited, removed) = (exited.clone(), exited.clone());
        let exiter = Task::work(move || -> Result<std::result::Result<Stop, String>> {
            vm.set_vcpu_exits(true)?;
            ensure!(matches!(exiter.run()?, Stop::Fault(_)), "it did not exit");
            has_exited.store(1, Ordering::Release);
            until("the memslot is removed", || {
                Ok(has_exited.load(Ordering::Acquire) == 2)
            })?;
            Ok(exiter.run().map_err(|e| e.to_string()))
        })?;
        until("the vCPU exits", || Ok(exited.load(Ordering::Acquire) == 1))?;
        slot.vm.remove_memslot(ID)?;
        removed.store(2, Ordering::Release);
        for (who, result) in [
            ("the vCPU that waits", waiter.join("the vCPU that waits")?),
            ("the vCPU with exits", exiter.join("the vCPU with exits")?),
        ] {
            match result {
                Err(e) => ensure!(e.contains("Bad address"), "{who}: KVM_RUN failed by: {e}"),
                Ok(stop) => fail!("{who}: KVM_RUN returned {stop:x?}"),
            }
        }
        ensure_eq!(
            sys::load(slot.address(2)),
            sigbus(slot.address(2)),
            "a later touch"
        );
        let again = slot
            .vm
            .create_memslot(ID, &slot.memfd)
            .base_gfn(GPA / PAGE)
            .create()?;
        slot.fill(2, 8)?;
        let map = again.map()?;
        let words = words_at(map.as_ptr().wrapping_add(2 * PAGE as usize).cast())?;
        if let Err(wrong) = content::check(&words, 2, 8) {
            fail!("in a new memslot: {wrong}");
        }
    }
    Ok(())
}
