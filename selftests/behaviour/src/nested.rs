// SPDX-License-Identifier: GPL-2.0

//! Nested guests: an outer guest that runs an inner guest by AMD's SVM.
//!
//! Everything that the inner guest needs is in pages of the memslot:
//!
//! - the structures that the CPU and KVM read for VMRUN ("AMD64 Architecture Programmer's Manual",
//!   volume 2, chapter 15 and appendix B),
//! - the inner guest's page tables, its code and its data.
//!
//! The outer guest's own code and page tables are in the machine's low memory.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use kdp_vmm::{
    guest_code, page_hash, GuestProgram, Stop, Vcpu, HASH_FACTOR, PORT_REPORT, PORT_TICK,
};
use kvm_demand_paging::{Placed, State};

use crate::check::{skip, Result};
use crate::content::{self, WORDS};
use crate::guest::gpa;
use crate::slot::{Slot, ID, PAGE};

/// Number of entries into the inner guest, which the outer guest counts.
pub const ENTRIES: u64 = 0;
/// The inner guest's control block. KVM maps it at VMRUN and at #VMEXIT.
pub const VMCB: u64 = 1;
/// The page of VM_HSAVE_PA. KVM uses it for system management mode only.
const HSAVE: u64 = 2;
/// The outer guest's own state, which it saves by VMSAVE and loads by VMLOAD. If the CPU does not
/// execute these instructions itself, KVM maps this page as it maps the control block.
pub const HOST: u64 = 3;
/// The bitmap of MSR accesses that the outer guest intercepts: two pages. KVM reads both at VMRUN.
pub const MSRPM: Range<u64> = 4..6;
/// The bitmap of I/O ports that the outer guest intercepts: three pages. The bits of the ports that
/// the inner guest uses are in the first.
pub const IOPM: u64 = 6;
/// The nested page tables, one page for each of the four levels.
pub const NESTED_TABLES: Range<u64> = 9..13;
/// The inner guest's own page tables: two levels.
pub const INNER_TABLES: Range<u64> = 13..15;
/// The inner guest's code.
pub const CODE: u64 = 15;
/// The pages that the inner guest reads.
pub const SOURCES: Range<u64> = 16..20;
/// The pages that the inner guest writes: one for each page that it reads.
pub const RESULTS: Range<u64> = 24..28;
/// Number of pages of the memslot.
pub const PAGES: u64 = 64;

/// Exit code: the inner guest accessed an I/O port.
pub const EXIT_IO: u64 = 0x7b;
/// Exit code: the inner guest accessed an MSR.
pub const EXIT_MSR: u64 = 0x7c;
/// Exit code: the inner guest executed VMMCALL.
pub const EXIT_VMMCALL: u64 = 0x81;

/// A port that the outer guest intercepts.
const CAUGHT_PORT: u16 = 0x80;
/// An MSR that the outer guest intercepts: STAR.
const CAUGHT_MSR: u32 = 0xc000_0081;

/// Entries of page tables: present, writable, for the user. The CPU and KVM set "accessed" and
/// "dirty".
const PTE: u64 = 7;
const PTE_HUGE: u64 = 0x80;

/// Offsets in the control block.
mod vmcb {
    pub const INTERCEPTS_3: usize = 0x00c;
    pub const INTERCEPTS_4: usize = 0x010;
    pub const IOPM: usize = 0x040;
    pub const MSRPM: usize = 0x048;
    pub const ASID: usize = 0x058;
    pub const EXIT_CODE: usize = 0x070;
    pub const NESTED_PAGING: usize = 0x090;
    pub const NESTED_CR3: usize = 0x0b0;
    pub const ES: usize = 0x400;
    pub const CS: usize = 0x410;
    pub const SS: usize = 0x420;
    pub const DS: usize = 0x430;
    pub const EFER: usize = 0x4d0;
    pub const CR4: usize = 0x548;
    pub const CR3: usize = 0x550;
    pub const CR0: usize = 0x558;
    pub const DR7: usize = 0x560;
    pub const DR6: usize = 0x568;
    pub const RFLAGS: usize = 0x570;
    pub const RIP: usize = 0x578;
    pub const RAX: usize = 0x5f8;
    pub const PAT: usize = 0x668;

    /// I/O ports and MSRs by their bitmaps, and a triple fault.
    pub const INTERCEPT_IO_MSR_SHUTDOWN: u32 = (1 << 27) | (1 << 28) | (1 << 31);
    /// VMRUN, without which there is no entry, and VMMCALL.
    pub const INTERCEPT_VMRUN_VMMCALL: u32 = 3;
}

/// Code of the outer guest, which enters the inner guest in a loop. After each #VMEXIT it reports
/// the exit code and the inner guest's rax. Then it resumes the inner guest after the instruction.
///
/// Of the general registers, VMRUN switches only rax and rsp, and it switches rip. The inner guest
/// starts with the outer guest's values in all others.
fn outer_code() -> &'static [u8] {
    guest_code!(
        "mov r15, [rdi]",               // the control block
        "mov r14, [rdi + 8]",           // for VMSAVE
        "mov r13, [rdi + 24]",          // how often
        "mov ecx, {efer}",
        "rdmsr",
        "or eax, {svme}",
        "wrmsr",
        "mov ecx, {hsave}",
        "mov eax, [rdi + 16]",
        "mov edx, [rdi + 20]",
        "wrmsr",
        "mov r8, [rdi + 32]",           // for the inner guest: how many pages,
        "mov r9, [rdi + 40]",           // where it reads,
        "mov r10, [rdi + 48]",          // where it writes
        "2: inc qword ptr [r13]",
        "mov rax, r14",
        "vmsave",
        "mov rax, r15",
        "vmload",
        "vmrun",
        "vmsave",
        "mov rax, r14",
        "vmload",
        "mov rax, [r15 + {code}]",
        // VMMCALL has three bytes, the others have two.
        "mov ebx, 2",
        "mov ecx, 3",
        "cmp rax, {vmmcall}",
        "cmove ebx, ecx",
        "add [r15 + {rip}], rbx",
        "out {report}, al",
        "mov rax, [r15 + {rax}]",
        "out {report}, al",
        "jmp 2b";
        efer = 0xc000_0080_u32,
        svme = 1 << 12,
        hsave = 0xc001_0117_u32,
        code = vmcb::EXIT_CODE,
        rip = vmcb::RIP,
        rax = vmcb::RAX,
        vmmcall = EXIT_VMMCALL,
        report = PORT_REPORT
    )
}

/// Code of the inner guest, which runs in rounds. In each round it stores the hash of each page
/// that it reads in the first word of the page that it writes.
///
/// In each round it reports the sum of the hashes four times. It reports to the VMM by a port that
/// the outer guest does not intercept. It reports to the outer guest by a port and an MSR that the
/// outer guest intercepts, and by VMMCALL.
fn inner_code() -> &'static [u8] {
    guest_code!(
        "movabs r11, {factor}",
        "3: mov rsi, r9",
        "mov rdi, r10",
        "mov rbp, r8",
        "xor r12d, r12d",
        "4: xor eax, eax",
        "mov edx, {words}",
        "5: xor rax, [rsi]",
        "imul rax, r11",
        "add rsi, 8",
        "dec edx",
        "jnz 5b",
        "mov [rdi], rax",
        "add rdi, {page}",
        "add r12, rax",
        "dec rbp",
        "jnz 4b",
        "mov rax, r12",
        "out {tick}, eax",
        "out {caught}, al",
        "mov ecx, {msr}",
        "rdmsr",
        "mov rax, r12",
        "vmmcall",
        "jmp 3b";
        factor = HASH_FACTOR,
        words = WORDS,
        page = PAGE,
        tick = PORT_TICK,
        caught = CAUGHT_PORT,
        msr = CAUGHT_MSR
    )
}

/// How the inner guest's memory is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// By its own page tables only: its physical addresses are those of the outer guest.
    Same,
    /// By its own page tables, and by nested page tables of the outer guest.
    Nested,
}

/// All translations.
pub const TRANSLATIONS: [Translation; 2] = [Translation::Same, Translation::Nested];

impl Translation {
    /// The address that a page has for the inner guest.
    fn inner(self, page: u64) -> u64 {
        match self {
            Self::Same => gpa(page),
            Self::Nested => page * PAGE,
        }
    }

    /// Pages of the page tables that translate an address of the inner guest.
    pub fn tables(self) -> impl Iterator<Item = u64> {
        let nested = match self {
            Self::Same => 0..0,
            Self::Nested => NESTED_TABLES,
        };
        INNER_TABLES.chain(nested)
    }
}

type Bytes = [u8; PAGE as usize];

fn put(page: &mut Bytes, at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

fn entries(page: &mut Bytes, entries: impl IntoIterator<Item = (u64, u64)>) {
    for (index, entry) in entries {
        put(page, index as usize * 8, &entry.to_le_bytes());
    }
}

/// The inner guest's control block, as it is before the first VMRUN.
fn control_block(translation: Translation) -> Bytes {
    let mut block = [0; PAGE as usize];
    let dword = |block: &mut Bytes, at, value: u32| put(block, at, &value.to_le_bytes());
    let qword = |block: &mut Bytes, at, value: u64| put(block, at, &value.to_le_bytes());
    dword(
        &mut block,
        vmcb::INTERCEPTS_3,
        vmcb::INTERCEPT_IO_MSR_SHUTDOWN,
    );
    dword(
        &mut block,
        vmcb::INTERCEPTS_4,
        vmcb::INTERCEPT_VMRUN_VMMCALL,
    );
    qword(&mut block, vmcb::IOPM, gpa(IOPM));
    qword(&mut block, vmcb::MSRPM, gpa(MSRPM.start));
    dword(&mut block, vmcb::ASID, 1);
    if translation == Translation::Nested {
        qword(&mut block, vmcb::NESTED_PAGING, 1);
        qword(&mut block, vmcb::NESTED_CR3, gpa(NESTED_TABLES.start));
    }
    // Selector, attributes (64-bit code; data), limit. The base is 0.
    let code = 8 | (0xa9b << 16) | (0xffff_ffff << 32);
    let data = 16 | (0xc93 << 16) | (0xffff_ffff << 32);
    qword(&mut block, vmcb::CS, code);
    for at in [vmcb::ES, vmcb::SS, vmcb::DS] {
        qword(&mut block, at, data);
    }
    // SVME, which VMRUN requires, and long mode.
    qword(&mut block, vmcb::EFER, 0x1500);
    qword(&mut block, vmcb::CR4, 0x620);
    qword(&mut block, vmcb::CR3, translation.inner(INNER_TABLES.start));
    qword(&mut block, vmcb::CR0, 0x8000_0033);
    qword(&mut block, vmcb::DR7, 0x400);
    qword(&mut block, vmcb::DR6, 0xffff_0ff0);
    qword(&mut block, vmcb::RFLAGS, 2);
    qword(&mut block, vmcb::RIP, translation.inner(CODE));
    qword(&mut block, vmcb::PAT, 0x0007_0406_0007_0406);
    block
}

/// What the pages hold before the outer guest's first instruction.
fn images(translation: Translation) -> HashMap<u64, Bytes> {
    let mut pages: HashMap<u64, Bytes> = (0..PAGES).map(|page| (page, [0; 4096])).collect();
    let mut set = |page: u64, bytes: Bytes| pages.insert(page, bytes);
    set(VMCB, control_block(translation));

    let mut bitmap = [0; PAGE as usize];
    bitmap[usize::from(CAUGHT_PORT / 8)] = 1 << (CAUGHT_PORT % 8);
    set(IOPM, bitmap);
    // Two bits for each MSR; the lower one is for reads. The bits of MSRs from 0xc0000000 on begin
    // at byte 2048.
    let mut bitmap = [0; PAGE as usize];
    let bit = (CAUGHT_MSR & 0x1fff) as usize * 2;
    bitmap[0x800 + bit / 8] = 1 << (bit % 8);
    set(MSRPM.start, bitmap);

    let mut table = [0; PAGE as usize];
    let [top, next] = [INNER_TABLES.start, INNER_TABLES.start + 1];
    entries(&mut table, [(0, translation.inner(next) | PTE)]);
    set(top, table);
    let mut table = [0; PAGE as usize];
    entries(&mut table, (0..2).map(|n| (n, (n << 30) | PTE | PTE_HUGE)));
    set(next, table);

    for table in NESTED_TABLES {
        let mut bytes = [0; PAGE as usize];
        if table + 1 < NESTED_TABLES.end {
            entries(&mut bytes, [(0, gpa(table + 1) | PTE)]);
        } else {
            let mapped = INNER_TABLES.chain([CODE]).chain(SOURCES).chain(RESULTS);
            entries(&mut bytes, mapped.map(|page| (page, gpa(page) | PTE)));
        }
        set(table, bytes);
    }

    let mut code = [0; PAGE as usize];
    put(&mut code, 0, inner_code());
    set(CODE, code);
    for page in SOURCES.chain(RESULTS) {
        set(page, content::bytes(page, 1));
    }
    pages
}

/// The bytes of absent pages. The memory of an absent page holds only [`GARBAGE`], so that the
/// tests notice a read of it.
pub struct Store {
    slot: Arc<Slot>,
    inner: Mutex<Stored>,
}

struct Stored {
    absent: HashMap<u64, Bytes>,
    fetched: Vec<u64>,
}

/// The byte of which absent pages' memory consists. A page table or a control block of it is
/// invalid, and a bitmap of it intercepts everything.
const GARBAGE: u8 = 0xff;

impl Store {
    /// Creates a store of all pages, which must be absent.
    pub fn new(slot: &Arc<Slot>, translation: Translation) -> Result<Arc<Self>> {
        let store = Self {
            slot: slot.clone(),
            inner: Mutex::new(Stored {
                absent: images(translation),
                fetched: Vec::new(),
            }),
        };
        for page in 0..PAGES {
            slot.alias.write(page, &[GARBAGE; PAGE as usize])?;
        }
        Ok(Arc::new(store))
    }

    fn stored(&self) -> std::sync::MutexGuard<'_, Stored> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places an absent page with its bytes.
    pub fn fetch(&self, page: u64) -> Result {
        let mut stored = self.stored();
        let Some(bytes) = stored.absent.remove(&page) else {
            fail!("page {page} was asked for, which is there");
        };
        stored.fetched.push(page);
        let placed = self.slot.vm.place(ID, page, &bytes)?;
        ensure_eq!(placed, [Placed::Now], "what became of page {page}");
        Ok(())
    }

    /// Makes a page absent, and keeps its bytes.
    pub fn take(&self, page: u64) -> Result {
        let mut stored = self.stored();
        if stored.absent.contains_key(&page) {
            return Ok(());
        }
        ensure_eq!(self.slot.mark(State::Absent, page)?, 1, "pages made absent");
        let mut bytes = [0; PAGE as usize];
        self.slot.alias.read(page, &mut bytes)?;
        self.slot.alias.write(page, &[GARBAGE; PAGE as usize])?;
        stored.absent.insert(page, bytes);
        Ok(())
    }

    /// Makes all pages absent.
    pub fn take_all(&self) -> Result {
        (0..PAGES).try_for_each(|page| self.take(page))
    }

    /// The bytes of an absent page.
    pub fn bytes(&self, page: u64) -> Result<Bytes> {
        match self.stored().absent.get(&page) {
            Some(bytes) => Ok(*bytes),
            None => fail!("page {page} is there"),
        }
    }

    /// Sets the bytes with which an absent page is placed to this version of its contents.
    pub fn renew(&self, page: u64, version: u64) {
        let bytes = content::bytes(page, version);
        self.stored().absent.insert(page, bytes);
    }

    /// Pages that were fetched since the last call, in ascending order. Omits the page of
    /// VM_HSAVE_PA: it depends on the CPU whether that is used.
    pub fn fetched(&self) -> Vec<u64> {
        let mut fetched = std::mem::take(&mut self.stored().fetched);
        fetched.retain(|&page| page != HSAVE);
        fetched.sort_unstable();
        fetched
    }
}

/// The sum of the hashes that the inner guest computes over this version of the pages that it
/// reads.
pub fn sum(version: u64) -> u64 {
    SOURCES.fold(0, |sum, page| sum.wrapping_add(hash(page, version)))
}

/// The hash of a page that the inner guest reads.
pub fn hash(page: u64, version: u64) -> u64 {
    page_hash((0..WORDS).map(|at| content::word(page, version, at)))
}

/// Creates a vCPU for the outer guest. Skips the test if KVM offers no SVM to its guests.
pub fn vcpu(machine: &kdp_vmm::Machine, translation: Translation) -> Result<Vcpu> {
    let program = GuestProgram::new(outer_code()).params(&[
        gpa(VMCB),
        gpa(HOST),
        gpa(HSAVE),
        gpa(ENTRIES),
        SOURCES.end - SOURCES.start,
        translation.inner(SOURCES.start),
        translation.inner(RESULTS.start),
    ]);
    let vcpu = machine.vcpu(0, &program)?;
    let cpuid = vcpu.fd().get_cpuid2(256)?;
    let mut entries = cpuid.as_slice().iter();
    if !entries.any(|entry| entry.function == 0x8000_0001 && entry.ecx & 4 != 0) {
        return skip("KVM gives its guests no SVM");
    }
    Ok(vcpu)
}

/// Runs the vCPU to its next stop that is no fault exit. Passes the page of each fault exit to
/// `on_fault`.
pub fn next(vcpu: &mut Vcpu, mut on_fault: impl FnMut(u64) -> Result) -> Result<Stop> {
    loop {
        match vcpu.run()? {
            Stop::Fault(fault) => on_fault(fault.gpa.wrapping_sub(gpa(0)) / PAGE)?,
            stop => return Ok(stop),
        }
    }
}
