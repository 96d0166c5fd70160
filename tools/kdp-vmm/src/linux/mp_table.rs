//! The table by which a guest without ACPI finds its CPUs and interrupts (Intel's MultiProcessor Specification 1.4,
//! chapter 4). Everything in it is bytes, little-endian, and sums up to 0.

use super::layout::{IO_APIC, LOCAL_APIC, LOW_END, MP_TABLE};

/// The most vCPUs that it is used for.
pub(super) const MAX_CPUS: u8 = 16;

const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const ISA_IRQS: u8 = 16;
const ISA_BUS: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

const ENABLED: u8 = 1;
const BOOT_CPU: u8 = 2;

/// What an interrupt is.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// The table, to be put to [`MP_TABLE`].
pub(super) fn build(cpus: u8) -> Vec<u8> {
    let entries = entries(cpus);
    let config = configuration(&entries, u16::from(cpus) + 2 + u16::from(ISA_IRQS) + 2);
    let mut table = floating_pointer().to_vec();
    table.extend(config);
    debug_assert!(table.len() as u64 <= LOW_END - MP_TABLE);
    table
}

fn floating_pointer() -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(MP_TABLE as u32 + 16).to_le_bytes());
    // Its own length in units of 16 bytes.
    pointer[8] = 1;
    pointer[9] = SPEC_1_4;
    pointer[10] = checksum(&pointer);
    pointer
}

fn configuration(entries: &[u8], count: u16) -> Vec<u8> {
    const HEADER: usize = 44;
    let mut table = vec![0; HEADER];
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&((HEADER + entries.len()) as u16).to_le_bytes());
    table[6] = SPEC_1_4;
    table[8..16].copy_from_slice(b"KDP     ");
    table[16..28].copy_from_slice(b"kdp-vmm     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

fn entries(cpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    for cpu in 0..cpus {
        let flags = ENABLED | if cpu == 0 { BOOT_CPU } else { 0 };
        let mut processor = [0; 20];
        processor[1] = cpu;
        processor[2] = APIC_VERSION;
        processor[3] = flags;
        entries.extend(processor);
    }
    entries.extend([1, ISA_BUS]);
    entries.extend(b"ISA   ");
    // The I/O APIC has the number after the last CPU's.
    entries.extend([2, cpus, APIC_VERSION, ENABLED]);
    entries.extend(IO_APIC.to_le_bytes());
    // Type, what, polarity and trigger as the bus has them, bus, line; APIC, pin.
    for irq in 0..ISA_IRQS {
        entries.extend([3, INT, 0, 0, ISA_BUS, irq, cpus, irq]);
    }
    entries.extend([4, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.extend([4, NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);
    entries
}

/// The byte that makes the sum 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_true() {
        for cpus in 1..=MAX_CPUS {
            let table = build(cpus);
            let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum(&table[..16]), 0);
            assert_eq!(sum(&table[16..]), 0);
            let len = usize::from(u16::from_le_bytes([table[20], table[21]]));
            assert_eq!(len, table.len() - 16);
            assert!(table.len() as u64 <= LOW_END - MP_TABLE, "{cpus} CPUs");
        }
    }
}
