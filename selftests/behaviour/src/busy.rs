// SPDX-License-Identifier: GPL-2.0

//! A busy guest: vCPUs that count in every page, and notice each write that is lost.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use kdp_vmm::{guest_code, GuestProgram, Machine, PORT_REPORT};

use crate::check::Result;
use crate::guest::{self, gpa};
use crate::shared::Shared;
use crate::slot::{Slot, PAGE};
use crate::sys::{self, Touched};
use crate::task::{until, Task};

/// vCPUs: one on each of two NUMA nodes.
const VCPUS: u64 = 2;

/// How far apart their CPUs are.
const CPUS_APART: u64 = 2;

/// Where the guest has what it shares with the test.
const BOOKS_GPA: u64 = 1 << 36;

/// Words for each vCPU: the rounds that it has done; whether to stop.
const BOOKS: usize = 2;

/// Goes through the memory, round by round, until it is told to stop. In round n each page's word of this vCPU must be
/// n - 1, and becomes n. Reports the rounds in the end, or what it has found instead: pages left, value, round.
fn count(memory: u64, pages: u64, books: u64) -> GuestProgram {
    let code = guest_code!(
        "mov r8, [rdi]",        // the first word
        "mov r11, [rdi + 8]",   // pages
        "mov r10, [rdi + 16]",  // the books
        "xor r12d, r12d",       // the round
        "2: mov rbx, r12",
        "inc r12",
        "mov rsi, r8",
        "mov rcx, r11",
        "3: mov rax, [rsi]",
        "cmp rax, rbx",
        "jne 5f",
        "mov [rsi], r12",
        "add rsi, 4096",
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
    GuestProgram::new(code).params(&[memory, pages, books])
}

/// A guest that counts in the memory of a slot, whose pages are zeros at first.
pub struct Busy {
    slot: Arc<Slot>,
    books: Shared,
    vcpus: Vec<Task<u64>>,
}

impl Busy {
    /// Returns when each page has been written by each vCPU.
    pub fn start(slot: &Arc<Slot>) -> Result<Self> {
        let machine: Machine = slot.machine()?;
        let books = Shared::new(BOOKS * VCPUS as usize)?;
        machine.map(BOOKS_GPA, books.memory())?;
        let mut vcpus = Vec::new();
        for number in 0..VCPUS {
            let (word, book) = (8 * number, 8 * BOOKS as u64 * number);
            let program = count(gpa(0) + word, slot.guest.pages(), BOOKS_GPA + book);
            let mut vcpu = machine.vcpu(number, &program)?;
            vcpus.push(Task::work(move || {
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
        let busy = Self {
            slot: slot.clone(),
            books,
            vcpus,
        };
        busy.goes_on(1)?;
        Ok(busy)
    }

    fn rounds(&self, number: usize) -> u64 {
        self.books.at(BOOKS * number).load(Ordering::Acquire)
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
        let mut total = 0;
        for number in 0..self.vcpus.len() {
            self.books
                .at(BOOKS * number + 1)
                .store(1, Ordering::Release);
        }
        for (number, vcpu) in self.vcpus.into_iter().enumerate() {
            let rounds = vcpu.join("a vCPU")?;
            total += rounds;
            for page in 0..self.slot.guest.pages() {
                let into = (page * PAGE) as usize;
                for map in [self.slot.guest.as_ptr(), self.slot.alias.as_ptr()] {
                    let at = map.wrapping_add(into).cast::<u64>().wrapping_add(number);
                    ensure_eq!(
                        sys::load(at),
                        Touched::Value(rounds),
                        "page {page}, what vCPU {number} wrote last"
                    );
                }
            }
        }
        Ok(total)
    }
}
