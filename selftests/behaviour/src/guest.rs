// SPDX-License-Identifier: GPL-2.0

//! What guests do, and what a thread that runs one does.

use kdp_vmm::{
    guest_code, GuestProgram, Machine, MemoryFault, Order, Stop, Touch, Vcpu, MSR_ADDR,
    MSR_MCG_STATUS, PORT_REPORT, PORT_TICK,
};

use crate::check::Result;
use crate::slot::{GPA, PAGE};

/// The guest physical address of a page of the memslot.
pub fn gpa(page: u64) -> u64 {
    GPA + page * PAGE
}

/// What a guest did until it halted.
#[derive(Debug, Default)]
pub struct Ran {
    /// What it reported.
    pub reports: Vec<u64>,
    /// What it wrote to [`PORT_TICK`].
    pub ticks: Vec<u32>,
    /// Faults that KVM_RUN returned for.
    pub faults: Vec<MemoryFault>,
    /// How often KVM_RUN returned for a signal.
    pub interrupted: u64,
}

/// Runs a guest until it halts.
pub fn run(vcpu: &mut Vcpu, mut on_fault: impl FnMut(&MemoryFault) -> Result) -> Result<Ran> {
    run_with(vcpu, |_, fault| on_fault(fault))
}

/// Runs a guest until it halts; what is to be done at a fault may need the vCPU.
pub fn run_with(
    vcpu: &mut Vcpu,
    mut on_fault: impl FnMut(&mut Vcpu, &MemoryFault) -> Result,
) -> Result<Ran> {
    let mut ran = Ran::default();
    loop {
        match vcpu.run()? {
            Stop::Report(value) => ran.reports.push(value),
            Stop::Tick(value) => ran.ticks.push(value),
            Stop::Fault(fault) => {
                ran.faults.push(fault);
                on_fault(vcpu, &fault)?;
            }
            Stop::Halted => return Ok(ran),
            Stop::Interrupted => ran.interrupted += 1,
            _ => {}
        }
    }
}

/// For guests of threads that have exits off.
pub fn no_fault(fault: &MemoryFault) -> Result {
    fail!("KVM_RUN returned for a fault, and nobody asked it to: {fault:x?}")
}

/// Has a vCPU read every page of a range of the memslot, in order.
pub fn read_pages(machine: &Machine, number: u64, from: u64, count: u64) -> Result {
    let touch = Touch::new(GPA, Order::sequential(count)).first(from);
    run(&mut machine.vcpu(number, &touch.program())?, no_fault).map(drop)
}

/// A program whose parameters are how many pages there are, and where.
fn over(pages: &[u64], code: &'static [u8]) -> GuestProgram {
    let gpas: Vec<u64> = pages.iter().map(|&page| gpa(page)).collect();
    GuestProgram::new(code)
        .param(gpas.len() as u64)
        .params(&gpas)
}

/// Reads the first word of each of these pages, and reports it.
///
/// Interrupts are on: KVM requires that for asynchronous page faults (kvm_can_do_async_pf() in
/// arch/x86/kvm/x86.c). It also requires its own interrupt controller.
pub fn peek(pages: &[u64]) -> GuestProgram {
    let code = guest_code!(
        "sti",
        "mov rcx, [rdi]",
        "2: add rdi, 8",
        "mov rsi, [rdi]",
        "mov rax, [rsi]",
        "out {report}, al",
        "dec rcx",
        "jnz 2b",
        "hlt";
        report = PORT_REPORT
    );
    over(pages, code)
}

/// The same; for a page that is lost it reports, by its machine check, where that is, and all ones. Its handler is
/// [`PEEK_HANDLER`] bytes from its start.
pub fn peek_or_lose(pages: &[u64]) -> GuestProgram {
    let code = guest_code!(
        // Two bytes.
        "jmp 3f",
        "mov r8, rcx",
        "mov ecx, {address}",
        "rdmsr",
        "shl rdx, 32",
        "or rax, rdx",
        "out {report}, al",
        "mov ecx, {status}",
        "xor eax, eax",
        "xor edx, edx",
        "wrmsr",
        "mov rcx, r8",
        // Behind the access, which is of three bytes.
        "add qword ptr [rsp], 3",
        "mov rax, -1",
        "iretq",
        "3: mov rcx, [rdi]",
        "2: add rdi, 8",
        "mov rsi, [rdi]",
        "mov rax, [rsi]",
        "out {report}, al",
        "dec rcx",
        "jnz 2b",
        "hlt";
        report = PORT_REPORT, address = MSR_ADDR, status = MSR_MCG_STATUS
    );
    over(pages, code)
}

/// See [`peek_or_lose`].
pub const PEEK_HANDLER: u64 = 2;

/// Reads one page, writes a word to another and jumps into a third, where [`HALT`] must be. Reports what
/// it has read.
pub fn read_write_execute(read: u64, write: u64, value: u64, execute: u64) -> GuestProgram {
    let code = guest_code!(
        "mov rsi, [rdi]",
        "mov rax, [rsi]",
        "out {report}, al",
        "mov rsi, [rdi + 8]",
        "mov rax, [rdi + 16]",
        "mov [rsi], rax",
        "jmp [rdi + 24]";
        report = PORT_REPORT
    );
    GuestProgram::new(code).params(&[gpa(read), gpa(write), value, gpa(execute)])
}

/// Code that halts.
pub const HALT: [u8; 1] = [0xf4];

/// Writes a word of a page to [`PORT_TICK`] by a string instruction, which KVM emulates: it reads the
/// guest's memory itself.
pub fn string_output(page: u64) -> GuestProgram {
    let code = guest_code!(
        "mov rsi, [rdi]",
        "mov edx, {tick}",
        "cld",
        "outsd",
        "hlt";
        tick = PORT_TICK
    );
    GuestProgram::new(code).param(gpa(page))
}

/// Turns steal time accounting on, with its structure in a page of the memslot, and reports its version
/// when KVM has begun to write it.
pub fn steal_time(page: u64) -> GuestProgram {
    /// MSR_KVM_STEAL_TIME.
    const MSR: u32 = 0x4b56_4d03;
    let code = guest_code!(
        "mov rax, [rdi]",
        "or rax, 1",
        "mov rdx, rax",
        "shr rdx, 32",
        "mov ecx, {msr}",
        "wrmsr",
        // KVM fills the structure in at the next entry, which this brings about.
        "out {tick}, eax",
        "mov rsi, [rdi]",
        "mov eax, [rsi + 8]",
        "out {report}, al",
        "hlt";
        msr = MSR,
        tick = PORT_TICK,
        report = PORT_REPORT
    );
    GuestProgram::new(code).param(gpa(page))
}

/// Ends a [`watch`] when the host sets it.
pub const WATCH_STOP: u64 = u64::MAX;

/// Watches pages whose every word is a number that only grows, and for each of which the host keeps, in
/// `floors`, a number that is never above it: word n of `floors` is page n's.
///
/// Goes through pages 0 to `pages` - 1 again and again, until the word behind the floors is
/// [`WATCH_STOP`]. Of each page it reads the floor first, and then the page's first and last word: one
/// that is below the floor is a byte of the past. At the first of those it reports the page, the floor and
/// what it has read, and halts. Else it reports, in the end, [`WATCH_STOP`] and how many pages it has
/// looked at.
pub fn watch(floors_gpa: u64, pages: u64) -> GuestProgram {
    let code = guest_code!(
        "mov r8, [rdi]",                // the floors
        "mov r10, [rdi + 16]",          // pages
        "xor r12d, r12d",               // looks
        "2: mov r9, [rdi + 8]",         // the page's address
        "xor r11d, r11d",               // the page
        "3: mov rbx, [r8 + r11 * 8]",
        "mov rcx, [r9]",
        "cmp rcx, rbx",
        "jb 5f",
        "mov rcx, [r9 + 4088]",
        "cmp rcx, rbx",
        "jb 5f",
        "inc r12",
        "add r9, 4096",
        "inc r11",
        "cmp r11, r10",
        "jb 3b",
        "mov rbx, [r8 + r10 * 8]",
        "cmp rbx, -1",
        "jne 2b",
        "mov rax, rbx",
        "out {report}, al",
        "mov rax, r12",
        "out {report}, al",
        "hlt",
        "5: mov rax, r11",
        "out {report}, al",
        "mov rax, rbx",
        "out {report}, al",
        "mov rax, rcx",
        "out {report}, al",
        "hlt";
        report = PORT_REPORT
    );
    GuestProgram::new(code).params(&[floors_gpa, gpa(0), pages])
}

/// What a [`watch`] has reported: how many pages it has looked at. Fails if it saw the past.
pub fn watched(ran: &Ran) -> Result<u64> {
    match ran.reports.as_slice() {
        [WATCH_STOP, looks] => Ok(*looks),
        [page, floor, saw] => {
            fail!("the guest read {saw} in page {page} when all of it had been {floor} or more")
        }
        other => fail!("the guest reported {other:x?}"),
    }
}
