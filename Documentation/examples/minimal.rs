// SPDX-License-Identifier: MIT OR Apache-2.0
//! The smallest VMM whose guest's memory is paged in on demand: minimal.c, in Rust.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_demand_paging::{
    AliasMap, Backing, FaultExit, Memfd, PageRange, PresentBitmap, Reason, Vm, PAGE_SIZE,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use std::{
    error::Error,
    process::exit,
    sync::{
        atomic::{AtomicU64, Ordering::Relaxed},
        Mutex, PoisonError,
    },
    thread,
};

const BYTES: u64 = 2 << 20;
const SLOT: u32 = 0;
const CODE_PAGE: u64 = 1;
/// The guest adds up a word of each of these pages.
const READ: std::ops::Range<u64> = 16..144;
/// The VMM itself reads this one.
const VMM_PAGE: u64 = 200;
const PORT: u8 = 0x10;

#[rustfmt::skip]
const CODE: [u8; 24] = [
    0x31, 0xc0,             //     xor ax, ax
    0xbb, 0x00, 0x10,       //     mov bx, 0x1000
    0x8e, 0xdb,             // 1:  mov ds, bx
    0x03, 0x06, 0x00, 0x00, //     add ax, [0]
    0x81, 0xc3, 0x00, 0x01, //     add bx, 0x100
    0x81, 0xfb, 0x00, 0x90, //     cmp bx, 0x9000
    0x72, 0xf0,             //     jb 1b
    0xe7, PORT,             //     out PORT, ax
    0xf4,                   //     hlt
];

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Where the pages come from. A real VMM asks a file or another machine.
fn fetch(page: u64, to: &mut [u8; PAGE_SIZE]) {
    to.fill(0);
    if page == CODE_PAGE {
        to[..CODE.len()].copy_from_slice(&CODE);
    } else {
        to[..2].copy_from_slice(&word_of(page).to_le_bytes());
    }
}

fn word_of(page: u64) -> u16 {
    (page.wrapping_mul(2_654_435_761) >> 7) as u16
}

/// Fills pages, through the memfd's own mapping.
struct Filler {
    alias: AliasMap,
    present: PresentBitmap,
    /// Two threads may want one page: it is placed once.
    filling: Mutex<()>,
}

impl Filler {
    /// Data, then bit.
    fn place(&self, page: u64) -> kvm_demand_paging::Result<()> {
        let _one = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.present.is_present(page) {
            let mut data = [0; PAGE_SIZE];
            fetch(page, &mut data);
            self.alias.write(page, &data)?;
            self.present.set(page);
        }
        Ok(())
    }
}

/// Whoever is not a vCPU in a stage-2 fault waits, and is told of here.
fn handle(vm: &Vm, filler: &Filler, by_event: &AtomicU64) -> Result<()> {
    for event in vm.events() {
        let event = event?;
        filler.place(event.page)?;
        by_event.fetch_add(1, Relaxed);
        // The bit lets the page be mapped; the mark wakes who waits.
        vm.mark_present(event.slot_id, &[PageRange::page(event.page)])?;
    }
    Ok(())
}

/// Runs the guest to its end; returns what it wrote to the port, and how many faults exited.
fn run_guest(vm: &Vm, vcpu: &mut VcpuFd, filler: &Filler) -> Result<(u16, u64)> {
    let (mut sum, mut by_exit) = (0, 0);
    // For this thread: it is the one that runs the vCPU.
    vm.set_vcpu_exits(true)?;
    loop {
        match vcpu.run()? {
            VcpuExit::MemoryFault { flags, gpa, size } => {
                match FaultExit::decode(flags, gpa, size).map(|exit| exit.reason) {
                    Some(Reason::Absent) => filler.place(gpa / PAGE_SIZE as u64)?,
                    other => return Err(format!("fault at {gpa:#x}: {other:?}").into()),
                }
                by_exit += 1;
            }
            VcpuExit::IoOut(_, data) => sum = u16::from_le_bytes(data.try_into()?),
            VcpuExit::Hlt => return Ok((sum, by_exit)),
            other => return Err(format!("{other:?}").into()),
        }
    }
}

fn main() -> Result<()> {
    let backing = match std::env::args().nth(1).as_deref() {
        Some("hugetlb") => Backing::Huge2M,
        _ => Backing::Shmem,
    };
    // Ours: the memory, sealed by create(); the VM; a memslot of all of it, with every page absent.
    let memfd = Memfd::create("guest", backing, BYTES)?;
    let vm = Vm::open()?;
    let memslot = vm
        .create_memslot(SLOT, &memfd)
        .base_gfn(0)
        .paging(true)
        .create()?;
    let guest = memslot.map()?;
    let filler = Filler {
        alias: memfd.map_all()?,
        present: memslot.bitmap()?,
        filling: Mutex::new(()),
    };

    // KVM's: a machine with the memslot's mapping at guest physical address 0, and a vCPU.
    let machine = Kvm::new()?.create_vm()?;
    let region = kvm_userspace_memory_region {
        memory_size: BYTES,
        userspace_addr: guest.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: `guest` outlives `machine`, and is memory that nobody has Rust references to.
    unsafe { machine.set_user_memory_region(region)? };
    let mut vcpu = machine.create_vcpu(0)?;
    let (mut regs, mut sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
    (regs.rip, regs.rflags) = (CODE_PAGE * PAGE_SIZE as u64, 2);
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_regs(&regs)?;
    vcpu.set_sregs(&sregs)?;

    let by_event = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            if let Err(error) = handle(&vm, &filler, &by_event) {
                eprintln!("handler: {error}");
                exit(1);
            }
        });
        let mut page = [0; PAGE_SIZE];
        guest.read(VMM_PAGE, &mut page)?;
        let read = u16::from_le_bytes([page[0], page[1]]);
        let (sum, by_exit) = run_guest(&vm, &mut vcpu, &filler)?;
        let want = READ.map(word_of).fold(0, u16::wrapping_add);
        println!("the VMM read {read}, the guest's sum is {sum}");
        println!("{by_exit} pages came by exits, {by_event:?} by events");
        // The handler thread reads events for ever.
        exit(i32::from(sum != want || read != word_of(VMM_PAGE)));
    })
}
