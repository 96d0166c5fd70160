// SPDX-License-Identifier: GPL-2.0

//! Three processes on the same memory, while it has errors and is replaced: a VMM with a vCPU, a backend that does I/O into
//! the VMM's memslot, and a second VMM with a memslot of its own on the same memfd. Each counts in a word of its own in
//! every page, and keeps what it has counted in a ledger: a write that is lost, or bytes of the past, show at once.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use kdp_vmm::{frame_of, guest_code, GuestProgram, Machine, Stop, Vcpu, PORT_REPORT};
use kvm_demand_paging::{Backing, FaultExit, PageRange, Paging, Reason, Replaced, Vm};

use super::memory_error::{alias_of, Errors};
use super::poison::lost;
use crate::check::Result;
use crate::harness::rounds;
use crate::shared::Shared;
use crate::slot::{Slot, BLOCK, GPA, ID, PAGE};
use crate::sys::{self, Child, Touched};
use crate::task::{until, Task, PATIENCE};

tests! {
    "poison-consistency-of-three-processes" => || three_processes(false),
    "poison-consistency-with-signals" => || three_processes(true),
}

/// The vCPU, the backend, the second VMM.
const COUNTERS: usize = 3;
const PAGES: usize = BLOCK as usize;

/// Where guests have the ledgers.
const LEDGER_GPA: u64 = 1 << 36;

/// What the processes share, beside the memory. Words: each counter's ledger, a number for each page; whether a page may be
/// lost just now; what each one is at: whether to stop, the page that it touches, plus 1, and the losses that it has seen.
#[derive(Clone)]
struct Books(Shared);

impl Books {
    fn new() -> Result<Self> {
        Ok(Self(Shared::new((COUNTERS + 1) * PAGES + 4 * COUNTERS)?))
    }

    fn ledger(&self, counter: usize, page: usize) -> &AtomicU64 {
        self.0.at(counter * PAGES + page)
    }

    fn may_be_lost(&self, page: usize) -> &AtomicU64 {
        self.0.at(COUNTERS * PAGES + page)
    }

    fn control(counter: usize) -> usize {
        (COUNTERS + 1) * PAGES + 4 * counter
    }

    fn stop(&self, counter: usize) -> &AtomicU64 {
        self.0.at(Self::control(counter))
    }

    fn at(&self, counter: usize) -> &AtomicU64 {
        self.0.at(Self::control(counter) + 1)
    }

    fn losses(&self, counter: usize) -> &AtomicU64 {
        self.0.at(Self::control(counter) + 2)
    }

    /// The page that the second VM is to heal in its memslot, plus 1.
    fn heal(&self) -> &AtomicU64 {
        self.0.at(Self::control(1) + 3)
    }

    /// The page that all are to touch soon, plus 1.
    fn hint(&self) -> &AtomicU64 {
        self.0.at(Self::control(0) + 3)
    }
}

fn get(word: &AtomicU64) -> u64 {
    word.load(Ordering::SeqCst)
}

fn set(word: &AtomicU64, value: u64) {
    word.store(value, Ordering::SeqCst);
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// The vCPU's part: counts in word 0 of every page, in an order that looks random, until it is told to stop. Reports how
/// often; or the page, the ledger and what it has read instead.
fn count_in_guest() -> GuestProgram {
    let code = guest_code!(
        "mov r8, [rdi]",        // the memory
        "mov r9, [rdi + 8]",    // the ledger
        "mov r10, [rdi + 16]",  // to stop, at
        "mov r12, [rdi + 24]",
        "xor r13d, r13d",
        "2: mov rax, r12",
        "shl rax, 13",
        "xor r12, rax",
        "mov rax, r12",
        "shr rax, 7",
        "xor r12, rax",
        "mov rax, r12",
        "shl rax, 17",
        "xor r12, rax",
        "mov rcx, r12",
        "shr rcx, 11",
        "and rcx, 511",
        "lea rax, [rcx + 1]",
        "mov [r10 + 8], rax",
        "mov rsi, rcx",
        "shl rsi, 12",
        "add rsi, r8",
        "mov rbx, [r9 + rcx * 8]",
        "mov rax, [rsi]",
        "cmp rax, rbx",
        "jne 5f",
        "inc rax",
        "mov [rsi], rax",
        "mov [r9 + rcx * 8], rax",
        "mov qword ptr [r10 + 8], 0",
        "inc r13",
        "cmp qword ptr [r10], 0",
        "je 2b",
        "mov rax, r13",
        "out {report}, al",
        "hlt",
        "5: mov rdx, rax",
        "mov rax, rcx",
        "out {report}, al",
        "mov rax, rbx",
        "out {report}, al",
        "mov rax, rdx",
        "out {report}, al",
        "hlt";
        report = PORT_REPORT
    );
    let word = |index: usize| LEDGER_GPA + 8 * index as u64;
    GuestProgram::new(code).params(&[GPA, word(0), word(Books::control(0)), 0x9e37_79b9_7f4a_7c15])
}

/// How a process writes into the memory.
enum Writes {
    /// Itself.
    Stores,
    /// By system calls, as who does I/O for a guest.
    Io,
}

/// Counts in the word of this counter until it is told to stop, and looks at those of the others.
/// `meanwhile` is called time and again.
fn count(
    books: &Books,
    me: usize,
    memory: *mut u64,
    writes: &Writes,
    meanwhile: impl Fn() -> Result,
) -> Result {
    let mut random = Random(0x1234_5678 + me as u64);
    let (pipe_out, pipe_in) = sys::pipe()?;
    let word =
        |page: usize, counter: usize| memory.wrapping_add(page * PAGE as usize / 8 + counter);
    let check_lost = |page: usize, told: Touched, at: *const u64| -> Result {
        ensure_eq!(told, lost(at), "counter {me}, page {page}");
        ensure!(
            get(books.may_be_lost(page)) == 1,
            "counter {me}: page {page} is lost"
        );
        books.losses(me).fetch_add(1, Ordering::SeqCst);
        Ok(())
    };
    while get(books.stop(me)) == 0 {
        meanwhile()?;
        let page = match get(books.hint()) {
            hint if hint > 0 && random.below(4) == 0 => hint as usize - 1,
            _ => random.below(BLOCK) as usize,
        };
        set(books.at(me), page as u64 + 1);
        let (at, ledger) = (word(page, me), books.ledger(me, page));
        match sys::load(at) {
            Touched::Value(value) => {
                ensure_eq!(
                    value,
                    get(ledger),
                    "counter {me}, page {page}: what it wrote last"
                );
                let next = value + 1;
                let written = match writes {
                    // SAFETY: it is guest memory.
                    Writes::Stores => match unsafe { sys::store(at, next) } {
                        Touched::Value(_) => true,
                        told => {
                            check_lost(page, told, at)?;
                            false
                        }
                    },
                    Writes::Io => {
                        let bytes = next.to_ne_bytes();
                        sys::write_from(pipe_in.as_fd(), bytes.as_ptr(), 8)?;
                        // SAFETY: it is guest memory.
                        match unsafe { sys::read_to(pipe_out.as_fd(), at.cast(), 8) } {
                            Ok(8) => true,
                            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                                check_lost(page, sys::load(at), at)?;
                                let mut sink = [0_u64];
                                // SAFETY: eight bytes of ours.
                                unsafe {
                                    sys::read_to(pipe_out.as_fd(), sink.as_mut_ptr().cast(), 8)
                                }?;
                                false
                            }
                            other => fail!("counter {me}, page {page}: read(2) came to {other:?}"),
                        }
                    }
                };
                if written {
                    set(ledger, next);
                }
            }
            told => check_lost(page, told, at)?,
        }
        let other = (me + 1) % COUNTERS;
        let before = get(books.ledger(other, page));
        if let Touched::Value(value) = sys::load(word(page, other)) {
            let after = get(books.ledger(other, page));
            ensure!(
                (before..=after + 1).contains(&value),
                "counter {me}, page {page}: counter {other} is at {value}, and was at {before} before, at {after} after that"
            );
        }
        set(books.at(me), 0);
    }
    // All have stopped when the last one looks.
    until("all counters have stopped", || {
        Ok((0..COUNTERS).all(|counter| get(books.stop(counter)) == 2))
    })?;
    check_all(books, memory)
}

/// All words are what the ledgers say.
fn check_all(books: &Books, memory: *const u64) -> Result {
    for page in 0..PAGES {
        for counter in 0..COUNTERS {
            let at = memory.wrapping_add(page * PAGE as usize / 8 + counter);
            let expected = Touched::Value(get(books.ledger(counter, page)));
            ensure_eq!(
                sys::load(at),
                expected,
                "in the end, page {page}, counter {counter}"
            );
        }
    }
    Ok(())
}

/// Runs the vCPU until it halts; how often it has counted.
fn run_counter(vcpu: &mut Vcpu, slot: &Slot, books: &Books, signals: bool) -> Result<u64> {
    slot.vm.set_vcpu_exits(!signals)?;
    let lose = |page: u64| -> Result {
        ensure!(
            get(books.may_be_lost(page as usize)) == 1,
            "the vCPU lost page {page}"
        );
        books.losses(0).fetch_add(1, Ordering::SeqCst);
        Ok(())
    };
    let mut reports = Vec::new();
    loop {
        match vcpu.run()? {
            Stop::Report(value) => reports.push(value),
            Stop::Fault(fault) => match FaultExit::decode(fault.flags, fault.gpa, fault.size) {
                Some(exit) if exit.reason == Reason::Poisoned && !signals => {
                    lose((fault.gpa - GPA) / PAGE)?;
                }
                Some(exit) if exit.reason == Reason::Retry => {}
                other => fail!("the vCPU: {other:?}, {fault:x?}"),
            },
            Stop::Interrupted => match sys::bus_error() {
                Some(told @ Touched::Signal { address, .. }) if signals => {
                    let page = (address - slot.address(0) as u64) / PAGE;
                    ensure_eq!(told, lost(slot.address(page)), "the vCPU's signal");
                    lose(page)?;
                }
                other => fail!("the vCPU: {other:x?}"),
            },
            Stop::Halted => break,
            _ => {}
        }
    }
    match reports.as_slice() {
        &[counted] => Ok(counted),
        other => fail!("the vCPU reported {other:x?}: page, ledger, and what it read"),
    }
}

fn three_processes(signals: bool) -> Result {
    let first_errors = Errors::new()?;
    let books = Books::new()?;
    let slot = Slot::with(Backing::Huge2M, BLOCK, |builder| {
        builder.paging(true).poison_signals(signals)
    })?;
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    sys::note_bus_errors();

    let mut backend = {
        let (books, slot) = (books.clone(), slot.clone());
        Child::fork(move || {
            let memory = slot.memslot.map()?;
            count(&books, 1, memory.as_ptr().cast(), &Writes::Io, || Ok(()))
        })?
    };
    let mut second = {
        let (books, slot) = (books.clone(), slot.clone());
        Child::fork(move || {
            let vm = Vm::open()?;
            let memory = vm.create_memslot(9, &slot.memfd).create()?.map()?;
            let heal = || {
                if let Some(page) = get(books.heal()).checked_sub(1) {
                    vm.heal(9, &[PageRange::page(page)])?;
                    set(books.heal(), 0);
                }
                Ok(())
            };
            count(&books, 2, memory.as_ptr().cast(), &Writes::Stores, heal)
        })?
    };
    let machine = Machine::new(0)?;
    machine.map(GPA, slot.guest_memory())?;
    machine.map(LEDGER_GPA, books.0.memory())?;
    let mut vcpu = machine.vcpu(0, &count_in_guest())?;
    let vcpu = {
        let (slot, books) = (slot.clone(), books.clone());
        Task::work(move || run_counter(&mut vcpu, &slot, &books, signals))?
    };

    let mut random = Random(0xabcd_ef01);
    let mut errors = Some(first_errors);
    for round in 0..rounds(20) {
        let errors = match errors.take() {
            Some(errors) => errors,
            None => Errors::new()?,
        };
        one_error(&slot, &books, &errors, &mut random)
            .map_err(|e| crate::check::Fail::Wrong(format!("round {round}: {e}")))?;
    }
    for counter in 0..COUNTERS {
        set(books.stop(counter), 1);
    }
    let counted = vcpu.join("the vCPU")?;
    until("nobody counts", || {
        Ok((1..COUNTERS).all(|counter| get(books.at(counter)) == 0))
    })?;
    for counter in 0..COUNTERS {
        set(books.stop(counter), 2);
    }
    backend.join(PATIENCE)?;
    second.join(PATIENCE)?;
    check_all(&books, slot.address(0))?;
    let sum = |counter: usize| {
        (0..PAGES)
            .map(|page| get(books.ledger(counter, page)))
            .sum::<u64>()
    };
    println!(
        "{} errors; counted: {counted}, {}, {}",
        rounds(20),
        sum(1),
        sum(2)
    );
    Ok(())
}

/// An error at a random moment in a random page, and a fresh huge page at another: all are told of the page, and it is
/// put right.
fn one_error(slot: &Slot, books: &Books, errors: &Errors, random: &mut Random) -> Result {
    let moment = |random: &mut Random| thread::sleep(Duration::from_micros(random.below(3000)));
    let page = random.below(BLOCK);
    let mut bytes = [0; PAGE as usize];
    slot.alias.read(page, &mut bytes)?;
    let bad = frame_of(alias_of(&slot.alias, page))?;
    let seen: Vec<u64> = (0..COUNTERS)
        .map(|counter| get(books.losses(counter)))
        .collect();
    set(books.may_be_lost(page as usize), 1);
    moment(random);
    errors.inject(Backing::Huge2M, bad)?;
    let event = slot.event()?;
    ensure_eq!(event.page, page, "the page of the event");
    moment(random);
    let replaced = slot.vm.replace(ID, 0)?;
    let expected = Replaced {
        copied: BLOCK - 1,
        lost: 1,
        healed: 0,
        errors: 0,
    };
    ensure_eq!(replaced, expected, "what was replaced");
    set(books.hint(), page + 1);
    until("all were told of the lost page", || {
        Ok((0..COUNTERS).all(|counter| get(books.losses(counter)) > seen[counter]))
    })?;
    set(books.hint(), 0);
    // The vCPU stands at it until it is healed.
    let nobody_touches = |from: usize| {
        until("nobody touches it just now", || {
            Ok((from..COUNTERS).all(|counter| get(books.at(counter)) != page + 1))
        })
    };
    nobody_touches(1)?;
    // What the ledgers say: in good memory.
    slot.alias.refresh(PageRange::new(0, BLOCK))?;
    bytes.fill(0);
    for counter in 0..COUNTERS {
        let value = get(books.ledger(counter, page as usize));
        bytes[8 * counter..8 * counter + 8].copy_from_slice(&value.to_ne_bytes());
    }
    slot.alias.write(page, &bytes)?;
    slot.vm.heal(ID, &[PageRange::page(page)])?;
    set(books.heal(), page + 1);
    until("the second VM heals it, too", || Ok(get(books.heal()) == 0))?;
    nobody_touches(0)?;
    set(books.may_be_lost(page as usize), 0);
    Ok(())
}
