//! The ACPI tables. A guest finds its CPUs, its interrupt controllers and its devices in them (ACPI
//! Specification 6.5, chapters 5, 6 and 20). The platform is hardware-reduced: the guest uses no
//! fixed registers, no PIC and no PIT.
//!
//! The tables are built by hand: the crate acpi_tables (0.2.1) does not compile with Rust 1.85.

use super::layout::*;

/// The maximum number of vCPUs in the tables.
pub(super) const MAX_CPUS: u8 = 16;

/// The header of all tables except the RSDP.
const HEADER: usize = 36;

const OEM: &[u8; 6] = b"KDP   ";

/// Build the tables for this number of vCPUs. They must be placed at [`ACPI`]. The RSDP is the
/// first.
pub(super) fn build(cpus: u8) -> Vec<u8> {
    let mut tables = Tables(vec![0; RSDP]);
    let dsdt = tables.add(&table(b"DSDT", 2, &devices()));
    let fadt = tables.add(&fadt(dsdt));
    let madt = tables.add(&madt(cpus));
    let xsdt = [fadt, madt].map(u64::to_le_bytes).concat();
    let xsdt = tables.add(&table(b"XSDT", 1, &xsdt));
    tables.0[..RSDP].copy_from_slice(&rsdp(xsdt));
    debug_assert!(tables.0.len() as u64 <= ACPI_END - ACPI);
    tables.0
}

/// Consecutive tables, from [`ACPI`] on.
struct Tables(Vec<u8>);

impl Tables {
    /// Add a table; returns its guest physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let at = self.0.len().next_multiple_of(16);
        self.0.resize(at, 0);
        self.0.extend(table);
        ACPI + at as u64
    }
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// The RSDP's length.
const RSDP: usize = 36;

fn rsdp(xsdt: u64) -> [u8; RSDP] {
    /// The revision of an RSDP with an XSDT.
    const REVISION: u8 = 2;
    /// The length of the part that the first checksum covers.
    const FIRST: usize = 20;
    let mut rsdp = [0; RSDP];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(OEM);
    rsdp[15] = REVISION;
    rsdp[20..24].copy_from_slice(&(RSDP as u32).to_le_bytes());
    rsdp[24..32].copy_from_slice(&xsdt.to_le_bytes());
    rsdp[8] = checksum(&rsdp[..FIRST]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

/// A table: its header and its body.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const CHECKSUM: usize = 9;
    let mut table = signature.to_vec();
    table.extend(((HEADER + body.len()) as u32).to_le_bytes());
    table.extend([revision, 0]);
    table.extend(OEM);
    // OEM table ID, OEM revision, creator ID, creator revision.
    table.extend(b"KDPVMM  \x01\0\0\0KDP \x01\0\0\0");
    debug_assert_eq!(table.len(), HEADER);
    table.extend(body);
    table[CHECKSUM] = checksum(&table);
    table
}

/// The FADT, which says that the platform is hardware-reduced.
fn fadt(dsdt: u64) -> Vec<u8> {
    const REVISION: u8 = 6;
    const LENGTH: usize = 276;
    /// Boot architecture flags. Bit 1 (keyboard controller) is clear, so Linux does not probe for
    /// one.
    const NO_VGA: u16 = 1 << 2;
    const NO_MSI: u16 = 1 << 3;
    const NO_CMOS_RTC: u16 = 1 << 5;
    /// Feature flags. The first two say that the buttons are not fixed hardware.
    const NO_POWER_BUTTON: u32 = 1 << 4;
    const NO_SLEEP_BUTTON: u32 = 1 << 5;
    const HARDWARE_REDUCED: u32 = 1 << 20;
    let mut body = [0; LENGTH - HEADER];
    let mut put = |at: usize, bytes: &[u8]| {
        body[at - HEADER..][..bytes.len()].copy_from_slice(bytes);
    };
    put(109, &(NO_VGA | NO_MSI | NO_CMOS_RTC).to_le_bytes());
    let features = NO_POWER_BUTTON | NO_SLEEP_BUTTON | HARDWARE_REDUCED;
    put(112, &features.to_le_bytes());
    put(140, &dsdt.to_le_bytes());
    table(b"FACP", REVISION, &body)
}

/// The MADT: the local APICs of the vCPUs, and the I/O APIC, which has all interrupt lines.
fn madt(cpus: u8) -> Vec<u8> {
    const REVISION: u8 = 5;
    const ENABLED: u8 = 1;
    /// What KVM's I/O APIC says of itself.
    const IO_APIC_ID: u8 = 0;
    let mut body = LOCAL_APIC.to_le_bytes().to_vec();
    body.extend([0; 4]);
    for cpu in 0..cpus {
        body.extend([0, 8, cpu, cpu, ENABLED, 0, 0, 0]);
    }
    body.extend([1, 12, IO_APIC_ID, 0]);
    body.extend(IO_APIC.to_le_bytes());
    body.extend([0; 4]);
    table(b"APIC", REVISION, &body)
}

/// The devices, in AML: the balloon and the serial port.
fn devices() -> Vec<u8> {
    // The virtio-mmio device.
    let balloon = device(
        b"VIO0",
        &string("LNRO0005"),
        &memory(VIRTIO as u32, VIRTIO_SIZE as u32),
        VIRTIO_IRQ,
    );
    let serial_port = device(b"COM1", &PNP0501, &ports(SERIAL, SERIAL_PORTS), SERIAL_IRQ);
    const SCOPE: u8 = 0x10;
    let scope = [b"\\_SB_".as_slice(), &balloon, &serial_port].concat();
    [&[SCOPE], package(&scope).as_slice()].concat()
}

/// A device with one range of addresses and one interrupt line, which it pulses.
fn device(name: &[u8; 4], hid: &[u8], range: &[u8], line: u32) -> Vec<u8> {
    const DEVICE: [u8; 2] = [0x5b, 0x82];
    const ZERO: u8 = 0;
    let contents = [
        name.as_slice(),
        &named(b"_HID", hid),
        &named(b"_UID", &[ZERO]),
        &named(b"_CRS", &resources(&[range, &interrupt(line)])),
    ];
    [&DEVICE, package(&contents.concat()).as_slice()].concat()
}

fn named(name: &[u8; 4], value: &[u8]) -> Vec<u8> {
    const NAME: u8 = 0x08;
    [&[NAME], name.as_slice(), value].concat()
}

fn string(text: &str) -> Vec<u8> {
    const STRING: u8 = 0x0d;
    [&[STRING], text.as_bytes(), &[0]].concat()
}

/// "PNP0501", a 16550A serial port, packed into 32 bits as an EISA ID.
const PNP0501: [u8; 5] = [0x0c, 0x41, 0xd0, 0x05, 0x01];

/// A list of resources: a buffer that ends with a tag.
fn resources(list: &[&[u8]]) -> Vec<u8> {
    const BUFFER: u8 = 0x11;
    const BYTE: u8 = 0x0a;
    /// The checksum is zero, which means that there is none.
    const END: [u8; 2] = [0x79, 0];
    let bytes = [list.concat().as_slice(), &END].concat();
    let sized = [&[BYTE, bytes.len() as u8], bytes.as_slice()].concat();
    [&[BUFFER], package(&sized).as_slice()].concat()
}

/// A resource: a range of memory addresses for reading and writing.
fn memory(from: u32, len: u32) -> Vec<u8> {
    const MEMORY32_FIXED: u8 = 0x86;
    const WRITABLE: u8 = 1;
    [
        &[MEMORY32_FIXED, 9, 0, WRITABLE],
        from.to_le_bytes().as_slice(),
        &len.to_le_bytes(),
    ]
    .concat()
}

fn ports(from: u16, count: u8) -> Vec<u8> {
    const IO: u8 = 0x47;
    const DECODE_16: u8 = 1;
    const ALIGNMENT: u8 = 0;
    let [low, high] = from.to_le_bytes();
    vec![IO, DECODE_16, low, high, low, high, ALIGNMENT, count]
}

fn interrupt(line: u32) -> Vec<u8> {
    const EXTENDED_INTERRUPT: u8 = 0x89;
    /// The other bits are clear: active high, exclusive.
    const CONSUMER_EDGE_TRIGGERED: u8 = 0b0011;
    const COUNT: u8 = 1;
    [
        &[EXTENDED_INTERRUPT, 6, 0, CONSUMER_EDGE_TRIGGERED, COUNT],
        line.to_le_bytes().as_slice(),
    ]
    .concat()
}

/// Put the length before the contents. The length includes its own bytes: one, or two from 64 on.
fn package(contents: &[u8]) -> Vec<u8> {
    const ONE_BYTE: usize = 0x3f;
    const TWO_BYTES: usize = 0xfff;
    let len = contents.len() + 1;
    let length = if len <= ONE_BYTE {
        vec![len as u8]
    } else {
        let len = len + 1;
        debug_assert!(len <= TWO_BYTES, "{len} bytes of AML in one package");
        vec![(1 << 6) | (len & 0xf) as u8, (len >> 4) as u8]
    };
    [length.as_slice(), contents].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8]) -> u64 {
        bytes
            .iter()
            .rev()
            .fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    /// The table at a guest physical address. Asserts its signature, and that its sum is zero.
    fn table<'a>(tables: &'a [u8], address: u64, signature: &[u8; 4]) -> &'a [u8] {
        let table = &tables[(address - ACPI) as usize..];
        assert_eq!(&table[..4], signature);
        let table = &table[..number(&table[4..8]) as usize];
        assert_eq!(sum(table), 0, "{signature:?}");
        table
    }

    fn contains(table: &[u8], what: &[u8]) -> bool {
        table.windows(what.len()).any(|window| window == what)
    }

    #[test]
    fn everything_is_found_from_the_rsdp_on() {
        for cpus in 1..=MAX_CPUS {
            let tables = build(cpus);
            assert!(tables.len() as u64 <= ACPI_END - ACPI, "{cpus} CPUs");
            let rsdp = &tables[..36];
            assert_eq!(&rsdp[..8], b"RSD PTR ");
            assert_eq!(rsdp[15], 2, "the revision with an XSDT");
            assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));

            let xsdt = table(&tables, number(&rsdp[24..32]), b"XSDT");
            let entries: Vec<u64> = xsdt[36..].chunks_exact(8).map(number).collect();
            let [fadt, madt] = entries[..] else {
                panic!("{entries:x?}");
            };
            let fadt = table(&tables, fadt, b"FACP");
            const HARDWARE_REDUCED: u64 = 1 << 20;
            assert_ne!(number(&fadt[112..116]) & HARDWARE_REDUCED, 0);
            table(&tables, number(&fadt[140..148]), b"DSDT");
            table(&tables, madt, b"APIC");
        }
    }

    #[test]
    fn each_vcpu_has_a_local_apic_of_its_own_number() {
        const LOCAL: u8 = 0;
        const IO: u8 = 1;
        for cpus in [1, 2, MAX_CPUS] {
            let madt = madt(cpus);
            assert_eq!(number(&madt[36..40]), u64::from(LOCAL_APIC));
            let (mut locals, mut io_apics) = (Vec::new(), Vec::new());
            let mut rest = &madt[44..];
            while let [kind, len, ..] = *rest {
                let (entry, behind) = rest.split_at(len.into());
                match kind {
                    LOCAL => {
                        assert_eq!(number(&entry[4..8]), 1, "it is enabled");
                        locals.push((entry[2], entry[3]));
                    }
                    IO => io_apics.push((number(&entry[4..8]), number(&entry[8..12]))),
                    other => panic!("an entry of type {other}"),
                }
                rest = behind;
            }
            assert_eq!(locals, (0..cpus).map(|n| (n, n)).collect::<Vec<_>>());
            assert_eq!(io_apics, [(u64::from(IO_APIC), 0)]);
        }
    }

    #[test]
    fn packages_have_the_lengths_that_aml_wants() {
        for (len, prefix) in [
            (0, vec![1]),
            (62, vec![63]),
            (63, vec![0x41, 4]),
            (254, vec![0x40, 16]),
            (4093, vec![0x4f, 0xff]),
        ] {
            let package = package(&vec![0; len]);
            assert_eq!(&package[..prefix.len()], prefix, "{len} bytes");
            assert_eq!(package.len(), prefix.len() + len);
        }
    }

    #[test]
    fn the_balloon_and_the_serial_port_are_named_with_their_addresses_and_lines() {
        let dsdt = devices();
        for name in ["_SB_", "VIO0", "COM1", "_HID", "_UID", "_CRS", "LNRO0005\0"] {
            assert!(contains(&dsdt, name.as_bytes()), "{name}");
        }
        // PNP0501, as ACPI packs such a name.
        assert!(contains(&dsdt, &[0x41, 0xd0, 0x05, 0x01]));

        let mut memory = vec![0x86, 9, 0, 1];
        memory.extend((VIRTIO as u32).to_le_bytes());
        memory.extend((VIRTIO_SIZE as u32).to_le_bytes());
        assert!(contains(&dsdt, &memory));
        let [low, high] = SERIAL.to_le_bytes();
        assert!(contains(
            &dsdt,
            &[0x47, 1, low, high, low, high, 0, SERIAL_PORTS]
        ));
        for line in [VIRTIO_IRQ, SERIAL_IRQ] {
            // A consumer, edge-triggered, active high, not shared; one line.
            let mut interrupt = vec![0x89, 6, 0, 0b0011, 1];
            interrupt.extend(line.to_le_bytes());
            assert!(contains(&dsdt, &interrupt), "line {line}");
        }
    }
}
