//! Puts a kernel into guest memory, with what the 64-bit boot protocol asks for (Documentation/arch/x86/boot.rst of the
//! kernel), and sets the first vCPU to its entry.

use std::fs;
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, Msrs};
use kvm_ioctls::VcpuFd;
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::load_cmdline;
use vm_memory::{Bytes, GuestAddress};

use super::layout::*;
use super::ram::{DeviceMemory, Ram};
use super::{acpi, kernel};
use crate::error::{kvm, Error, Result};
use crate::memory::PAGE_SIZE;

/// Bits of the boot protocol.
const LOADER_UNDEFINED: u8 = 0xff;
const CAN_USE_HEAP: u8 = 0x80;
const E820_RAM: u32 = 1;
const E820_ACPI: u32 = 3;

/// The first line describes the machine: one serial port, no PCI, a keyboard controller that only
/// has a reset line. A panic resets the machine at once.
///
/// The second line makes the boot of a distribution's kernel faster. It turns off patches for
/// mitigations, self-tests of ciphers, the protection of kernel code, and the clearing of each
/// allocated page. [`Kernel::append`] can turn them on again: Linux takes the last value of a
/// parameter.
const COMMAND_LINE_ALWAYS: &str = "console=ttyS0 8250.nr_uarts=1 reboot=k panic=-1 pci=off \
     mitigations=off cryptomgr.notests rodata=off init_on_alloc=0";

/// What a guest boots.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The kernel: a bzImage or an ELF file (vmlinux).
    pub image: PathBuf,
    /// Its initramfs.
    pub initrd: Option<PathBuf>,
    /// What comes behind the command line that the machine itself needs.
    pub append: String,
}

/// Load it; where the guest begins.
pub(super) fn load(ram: &Ram, kernel: &Kernel, vcpus: u8) -> Result<u64> {
    let memory = ram.memory();
    let wrong = |what: &Path, why: &dyn std::fmt::Display| {
        Error::invalid(format!("{}: {why}", what.display()))
    };
    let loaded =
        kernel::load(memory, contents(&kernel.image)?).map_err(|e| wrong(&kernel.image, &e))?;
    let (mut header, needed) = (loaded.header, loaded.end);
    header.type_of_loader = LOADER_UNDEFINED;
    header.loadflags |= CAN_USE_HEAP;
    header.heap_end_ptr = 0xfe00;
    header.cmd_line_ptr = COMMAND_LINE as u32;
    if let Some(path) = &kernel.initrd {
        let (at, len) = load_initrd(memory, path, ram.bytes(), needed, header.initrd_addr_max)?;
        (header.ramdisk_image, header.ramdisk_size) = (at as u32, len as u32);
    }
    let line = command_line(&kernel.append)?;
    load_cmdline(memory, GuestAddress(COMMAND_LINE), &line)
        .map_err(|e| Error::invalid(format!("the kernel's command line: {e}")))?;
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: ACPI,
        ..Default::default()
    };
    let map = [
        (0, LOW_END, E820_RAM),
        (ACPI, ACPI_END, E820_ACPI),
        (HIGH, ram.bytes(), E820_RAM),
    ];
    for (entry, (from, to, kind)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr: from,
            size: to - from,
            type_: kind,
        };
    }
    params.e820_entries = map.len() as u8;
    let params = BootParams::new(&params, GuestAddress(BOOT_PARAMS));
    LinuxBootConfigurator::write_bootparams(&params, memory)
        .map_err(|e| Error::invalid(format!("the boot parameters: {e}")))?;
    write(memory, ACPI, &acpi::build(vcpus))?;
    write_tables(memory)?;
    Ok(loaded.entry)
}

/// Not read into guest memory at once: some filesystems pin what they read into, and the device's mapping of hugetlb
/// cannot be pinned.
fn contents(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::os(format!("read {}", path.display()), e))
}

/// As high as it may be, so that it is in nobody's way. Where it is, and its length.
fn load_initrd(
    memory: &DeviceMemory,
    path: &Path,
    end: u64,
    kernel_end: u64,
    limit: u32,
) -> Result<(u64, u64)> {
    let bytes = contents(path)?;
    let len = bytes.len() as u64;
    let top = end.min(u64::from(limit) + 1);
    let at = top.checked_sub(len).map(|at| at / PAGE_SIZE * PAGE_SIZE);
    match at {
        Some(at) if at >= kernel_end => {
            write(memory, at, &bytes)?;
            Ok((at, len))
        }
        _ => Err(Error::invalid(format!(
            "{}: its {len} bytes do not fit between the kernel's end, {kernel_end:#x}, and {top:#x}: give the guest more \
             memory",
            path.display()
        ))),
    }
}

fn command_line(append: &str) -> Result<Cmdline> {
    let build = || -> linux_loader::cmdline::Result<Cmdline> {
        let mut line = Cmdline::new(COMMAND_LINE_MAX)?;
        line.insert_str(COMMAND_LINE_ALWAYS)?;
        if !append.is_empty() {
            line.insert_str(append)?;
        }
        Ok(line)
    };
    build().map_err(|e| {
        Error::invalid(format!(
            "the kernel's command line, with '{append}' behind what the machine needs: {e}"
        ))
    })
}

fn write(memory: &DeviceMemory, at: u64, bytes: &[u8]) -> Result<()> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|e| Error::invalid(format!("{} bytes at {at:#x}: {e}", bytes.len())))
}

/// Selectors that the protocol prescribes.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

fn segment(selector: u16) -> kvm_segment {
    let code = selector == CODE;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: if code { 11 } else { 3 },
        present: 1,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// The descriptor of a flat segment, as it stands in a table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let access = u64::from(segment.type_) | (u64::from(segment.s) << 4) | (1 << 7);
    let flags =
        (u64::from(segment.l) << 1) | (u64::from(segment.db) << 2) | (u64::from(segment.g) << 3);
    0xffff | (access << 40) | (0xf << 48) | (flags << 52)
}

/// Maps memory up to [`MAPPED_END`] one to one, by pages of 2 MiB, and writes the flat segments.
fn write_tables(memory: &DeviceMemory) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 3;
    const HUGE: u64 = 0x80;
    let (directory_pointers, directory) = (PAGE_TABLES + PAGE_SIZE, PAGE_TABLES + 2 * PAGE_SIZE);
    write(
        memory,
        PAGE_TABLES,
        &(directory_pointers | PRESENT_WRITABLE).to_le_bytes(),
    )?;
    write(
        memory,
        directory_pointers,
        &(directory | PRESENT_WRITABLE).to_le_bytes(),
    )?;
    let entries =
        (0..MAPPED_END >> 21).flat_map(|n| ((n << 21) | PRESENT_WRITABLE | HUGE).to_le_bytes());
    write(memory, directory, &entries.collect::<Vec<u8>>())?;
    let table = [0, 0, descriptor(&segment(CODE)), descriptor(&segment(DATA))];
    let table = table.into_iter().flat_map(u64::to_le_bytes);
    write(memory, GDT, &table.collect::<Vec<u8>>())
}

/// Let the first vCPU begin at `entry`, in 64-bit mode.
pub(super) fn enter(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    sregs.cs = segment(CODE);
    for data in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *data = segment(DATA);
    }
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.limit = 0;
    // Protection and paging; PAE; LME and LMA.
    sregs.cr0 |= 0x8000_0001;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= 0x20;
    sregs.efer |= 0x500;
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsp: STACK,
        rsi: BOOT_PARAMS,
        rflags: 2,
        ..Default::default()
    })
    .map_err(kvm("KVM_SET_REGS"))
}

/// What firmware sets on every CPU.
pub(super) fn reset(vcpu: &VcpuFd) -> Result<()> {
    /// Memory is write-back where no range register says otherwise.
    const MTRR_DEF_TYPE: u32 = 0x2ff;
    const ENABLED_WRITE_BACK: u64 = 0x806;
    let msrs = Msrs::from_entries(&[kvm_msr_entry {
        index: MTRR_DEF_TYPE,
        data: ENABLED_WRITE_BACK,
        ..Default::default()
    }])
    .map_err(|e| Error::invalid(format!("a list of MSRs: {e}")))?;
    vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?;

    /// Offsets of the local vector table, and the modes of its entries.
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_MASK: u32 = 0x700;
    const MODE_NMI: u32 = 0x400;
    const MODE_EXT_INT: u32 = 0x700;
    let mut lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
    for (at, mode) in [(LVT_LINT0, MODE_EXT_INT), (LVT_LINT1, MODE_NMI)] {
        let mut bytes = [0; 4];
        for (byte, reg) in bytes.iter_mut().zip(&lapic.regs[at..]) {
            *byte = *reg as u8;
        }
        let value = (u32::from_le_bytes(bytes) & !MODE_MASK) | mode;
        for (reg, byte) in lapic.regs[at..].iter_mut().zip(value.to_le_bytes()) {
            *reg = byte as i8;
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))
}
