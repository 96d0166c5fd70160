// SPDX-License-Identifier: GPL-2.0

//! ptrace(2) of a process that has a memslot mapped, as a debugger uses it.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use kvm_demand_paging::Backing;

use crate::check::Result;
use crate::content::{self, WORDS};
use crate::shared::Shared;
use crate::slot::{Slot, PAGE};
use crate::sys::{self, Child, Touched};
use crate::task::{until, PATIENCE};

tests! {
    "native-ptrace-peeks-and-pokes" => peeks_and_pokes,
    "native-ptrace-attaches-to-who-waits" => attaches_to_who_waits,
}

const PAGES: u64 = 64;

/// A process that this thread traces. The process is stopped until this is dropped.
struct Traced<'a>(&'a Child);

impl<'a> Traced<'a> {
    /// Attaches to a process, and waits until it has stopped.
    fn attach(child: &'a Child) -> Result<Self> {
        // SAFETY: the child belongs to this process, and was not reaped.
        sys::check(unsafe { libc::ptrace(libc::PTRACE_ATTACH, child.pid(), 0, 0) } as i32)?;
        let traced = Self(child);
        let mut status = 0;
        until("the traced process stops", || {
            // SAFETY: `status` is valid for a write. A child that only stops is not reaped.
            let pid = unsafe { libc::waitpid(child.pid(), &mut status, libc::WNOHANG) };
            Ok(sys::check(pid)? == child.pid())
        })?;
        ensure!(
            libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGSTOP,
            "the traced process has not stopped, its status is {status:#x}"
        );
        Ok(traced)
    }

    /// Reads a word of the process's memory.
    fn peek(&self, at: *const u64) -> io::Result<u64> {
        let mut word = 0_u64;
        // Not the C library's function: that returns the word, and so cannot tell it from an error.
        // SAFETY: `word` is valid for a write; the kernel checks the other address.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::c_long::from(libc::PTRACE_PEEKDATA),
                libc::c_long::from(self.0.pid()),
                at,
                &raw mut word,
            )
        };
        sys::check(ret as i32)?;
        Ok(word)
    }

    /// Writes a word of the process's memory.
    fn poke(&self, at: *mut u64, word: u64) -> io::Result<()> {
        // SAFETY: it writes to the other process; the kernel checks the address.
        let ret = unsafe { libc::ptrace(libc::PTRACE_POKEDATA, self.0.pid(), at, word) };
        sys::check(ret as i32).map(drop)
    }

    /// Reads a whole page of the process's memory.
    fn page(&self, slot: &Slot, page: u64) -> Result<[u64; WORDS]> {
        let mut words = [0; WORDS];
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.peek(slot.address(page).wrapping_add(i))?;
        }
        Ok(words)
    }

    /// Fails if ptrace() or /proc/PID/mem can access the page, or causes an event.
    fn has_no(&self, slot: &Slot, page: u64) -> Result {
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{}/mem", self.0.pid()))?;
        let at = slot.address(page);
        let mut bytes = [0; 8];
        let results = [
            ("PTRACE_PEEKDATA", self.peek(at).map(drop)),
            ("PTRACE_POKEDATA", self.poke(at, 1)),
            ("read", memory.read_exact_at(&mut bytes, at as u64)),
            ("write", memory.write_all_at(&bytes, at as u64)),
        ];
        for (what, result) in results {
            let errno = result.err().and_then(|e| e.raw_os_error());
            ensure_eq!(errno, Some(libc::EIO), "errno of {what} of an absent page");
        }
        slot.no_event()
    }
}

impl Drop for Traced<'_> {
    fn drop(&mut self) {
        // This fails if the process has ended.
        // SAFETY: the process continues where it was stopped.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0.pid(), 0, 0) };
    }
}

/// A debugger reads and writes present pages of the process. Its access to an absent page fails at
/// once.
fn peeks_and_pokes() -> Result {
    let slot = Slot::new(Backing::Shmem, PAGES)?;
    slot.place(3, 1)?;
    slot.place(4, 1)?;
    let shared = Shared::new(1)?;
    let mut child = Child::fork(|| {
        // Page 3 is in no page table of this process.
        slot.check(4, 1)?;
        shared.at(0).store(1, Ordering::Release);
        let last = WORDS - 1;
        until("the debugger has written", || {
            let word = sys::load(slot.address(4).wrapping_add(last));
            Ok(word == Touched::Value(content::word(4, 2, last)))
        })?;
        slot.check(4, 2)
    })?;
    until("the process has read", || {
        Ok(shared.at(0).load(Ordering::Acquire) == 1)
    })?;
    let traced = Traced::attach(&child)?;
    if let Err(wrong) = content::check(&traced.page(&slot, 3)?, 3, 1) {
        fail!("read by PTRACE_PEEKDATA: {wrong}");
    }
    for i in 0..WORDS {
        traced.poke(slot.address(4).wrapping_add(i), content::word(4, 2, i))?;
    }
    slot.check(4, 2)?;
    let mut bytes = [0; PAGE as usize];
    slot.alias.read(4, &mut bytes)?;
    ensure!(bytes == content::bytes(4, 2), "page 4 of the memfd");
    traced.has_no(&slot, 5)?;
    slot.place(5, 1)?;
    if let Err(wrong) = content::check(&traced.page(&slot, 5)?, 5, 1) {
        fail!("read by PTRACE_PEEKDATA, when it was present: {wrong}");
    }
    drop(traced);
    child.join(PATIENCE)
}

/// A process that waits for an absent page stops for a debugger. After the detach it waits again.
fn attaches_to_who_waits() -> Result {
    let slot = Slot::new(Backing::Shmem, PAGES)?;
    let mut child = Child::fork(|| slot.check(6, 1))?;
    slot.event()?;
    let traced = Traced::attach(&child)?;
    traced.has_no(&slot, 6)?;
    traced.has_no(&slot, 7)?;
    let before = slot.counter("waits")?;
    drop(traced);
    until("the process waits again", || {
        Ok(slot.counter("waits")? > before)
    })?;
    slot.place(6, 1)?;
    child.join(PATIENCE)
}
