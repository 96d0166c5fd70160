// SPDX-License-Identifier: GPL-2.0

//! A busy guest: its vCPUs count in every page, and notice each lost write.
//!
//! Each vCPU has its own word in each page: vCPU N has word N.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use kdp_vmm::{guest_code, GuestProgram, Machine, Order, PORT_REPORT};

use crate::check::Result;
use crate::guest::{self, gpa};
use crate::shared::Shared;
use crate::slot::{Slot, PAGE};
use crate::sys::{self, Touched};
use crate::task::{until, Task};

/// vCPUs: one on each of two NUMA nodes.
pub const VCPUS: u64 = 2;

/// How far apart their CPUs are.
const CPUS_APART: u64 = 2;

/// Where the guest has what it shares with the test.
const BOOKS_GPA: u64 = 1 << 36;

/// Words at the start of each vCPU's book: the rounds that it has done, and whether to stop. The
/// addresses of its words follow, in the order in which it visits them.
const BOOKS: usize = 2;

/// Goes through the memory, round by round, until it is told to stop. In round n each page's word of this vCPU must be
/// n - 1, and becomes n. Reports the rounds in the end, or what it has found instead: pages left, value, round.
fn count(pages: u64, books: u64) -> GuestProgram {
    let code = guest_code!(
        "mov r11, [rdi]",       // pages
        "mov r10, [rdi + 8]",   // the books
        "xor r12d, r12d",       // the round
        "2: mov rbx, r12",
        "inc r12",
        "lea r8, [r10 + 16]",   // where its words are
        "mov rcx, r11",
        "3: mov rsi, [r8]",
        "mov rax, [rsi]",
        "cmp rax, rbx",
        "jne 5f",
        "mov [rsi], r12",
        "add r8, 8",
        "dec rcx",
        "jnz 3b",
        "mov [r10], r12",
        "cmp qword ptr [r10 + 8], 0",
        "je 2b",
        "mov rax, r12",
        "out {report}, al",
        "hlt",
        "5: mov rdx, rax",
        "mov rax, rcx",
        "out {report}, al",
        "mov rax, rdx",
        "out {report}, al",
        "mov rax, r12",
        "out {report}, al",
        "hlt";
        report = PORT_REPORT
    );
    GuestProgram::new(code).params(&[pages, books])
}

/// A guest that counts in the memory of a slot. The words of the vCPUs must be zero at first.
pub struct Busy {
    slot: Arc<Slot>,
    books: Shared,
    vcpus: Vec<Task<u64>>,
}

impl Busy {
    /// Returns when each page has been written by each vCPU.
    pub fn start(slot: &Arc<Slot>) -> Result<Self> {
        let busy = Self::start_in_order(slot, |_| Order::sequential(slot.guest.pages()))?;
        busy.goes_on(1)?;
        Ok(busy)
    }

    /// Starts the guest without waiting for it. Each vCPU visits the pages in the order that
    /// `order` gives for its number.
    pub fn start_in_order(slot: &Arc<Slot>, order: impl Fn(u64) -> Order) -> Result<Self> {
        let pages = slot.guest.pages();
        let machine: Machine = slot.machine()?;
        let mut busy = Self {
            slot: slot.clone(),
            books: Shared::new(VCPUS as usize * Self::words(pages))?,
            vcpus: Vec::new(),
        };
        machine.map(BOOKS_GPA, busy.books.memory())?;
        for number in 0..VCPUS {
            let book = number as usize * Self::words(pages);
            for (at, page) in (book + BOOKS..).zip(order(number).iter()) {
                let word = gpa(page) + 8 * number;
                busy.books.at(at).store(word, Ordering::Relaxed);
            }
            let program = count(pages, BOOKS_GPA + 8 * book as u64);
            let mut vcpu = machine.vcpu(number, &program)?;
            busy.vcpus.push(Task::work(move || {
                sys::stay_on_cpu(number * CPUS_APART)?;
                let ran = guest::run(&mut vcpu, guest::no_fault)?;
                match ran.reports.as_slice() {
                    &[rounds] => Ok(rounds),
                    &[left, found, round] => fail!(
                        "vCPU {number}, round {round}, {left} pages before the end: the page's word was {found}"
                    ),
                    other => fail!("vCPU {number} reported {other:x?}"),
                }
            })?);
        }
        Ok(busy)
    }

    /// The number of words in the book of a vCPU.
    fn words(pages: u64) -> usize {
        BOOKS + pages as usize
    }

    fn book(&self, number: usize) -> usize {
        number * Self::words(self.slot.guest.pages())
    }

    /// The number of whole rounds that a vCPU has done.
    fn rounds(&self, number: usize) -> u64 {
        self.books.at(self.book(number)).load(Ordering::Acquire)
    }

    /// The number of whole rounds that every vCPU has done.
    pub fn rounds_of_all(&self) -> u64 {
        let rounds = (0..self.vcpus.len()).map(|number| self.rounds(number));
        rounds.min().unwrap_or(0)
    }

    /// Returns when each vCPU has done so many whole rounds from now on.
    pub fn goes_on(&self, rounds: u64) -> Result {
        let now: Vec<u64> = (0..self.vcpus.len()).map(|n| self.rounds(n)).collect();
        until("the guest goes on", || {
            // The round that it is in has begun before.
            Ok((0..self.vcpus.len()).all(|n| self.rounds(n) > now[n] + rounds))
        })
    }

    /// Stops it: each word is what was written there last, in the VMM's mapping and in the memfd. How many rounds there
    /// were.
    pub fn end(self) -> Result<u64> {
        for number in 0..self.vcpus.len() {
            self.books
                .at(self.book(number) + 1)
                .store(1, Ordering::Release);
        }
        let mut rounds = Vec::new();
        for vcpu in self.vcpus {
            rounds.push(vcpu.join("a vCPU")?);
        }
        for page in 0..self.slot.guest.pages() {
            let into = (page * PAGE) as usize;
            for map in [self.slot.guest.as_ptr(), self.slot.alias.as_ptr()] {
                let words = map.wrapping_add(into).cast::<u64>();
                for (number, &rounds) in rounds.iter().enumerate() {
                    ensure_eq!(
                        sys::load(words.wrapping_add(number)),
                        Touched::Value(rounds),
                        "page {page}, what vCPU {number} wrote last"
                    );
                }
            }
        }
        Ok(rounds.into_iter().sum())
    }
}
