//! Where things are in a Linux guest's address space.

/// The descriptor table that the kernel starts with.
pub(super) const GDT: u64 = 0x500;

/// The boot parameters, or "zero page".
pub(super) const BOOT_PARAMS: u64 = 0x7000;

/// The stack that the kernel starts with grows down from here.
pub(super) const STACK: u64 = 0x8ff0;

/// The page tables that it starts with: three pages.
pub(super) const PAGE_TABLES: u64 = 0x9000;

/// The kernel's command line, and room for it.
pub(super) const COMMAND_LINE: u64 = 0x2_0000;
pub(super) const COMMAND_LINE_MAX: usize = 2048;

/// Where low memory ends, and where memory goes on.
pub(super) const LOW_END: u64 = 0xa_0000;
pub(super) const HIGH: u64 = 0x10_0000;

/// The end of the memory that the vCPU's initial page tables map.
pub(super) const MAPPED_END: u64 = 512 << 21;

/// The room for the ACPI tables. Kernels also search here if they are not told the address.
pub(super) const ACPI: u64 = 0xe_0000;
pub(super) const ACPI_END: u64 = HIGH;

/// The virtio device.
pub(super) const VIRTIO: u64 = 0xd000_0000;
pub(super) const VIRTIO_SIZE: u64 = 0x1000;
pub(super) const VIRTIO_IRQ: u32 = 5;

/// The serial port: its first I/O port, and the number of its I/O ports.
pub(super) const SERIAL: u16 = 0x3f8;
pub(super) const SERIAL_PORTS: u8 = 8;
pub(super) const SERIAL_IRQ: u32 = 4;

/// The keyboard controller, for its reset line.
pub(super) const I8042: u16 = 0x60;

pub(super) const IO_APIC: u32 = 0xfec0_0000;
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;

/// Three pages that Intel's KVM wants for itself.
pub(super) const TSS: usize = 0xfffb_d000;
