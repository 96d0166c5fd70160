//! Loads a kernel into guest memory. The magic number of its file tells the format:
//!
//! - a bzImage, which decompresses itself in the guest;
//! - an ELF file (vmlinux), which needs no decompression and starts sooner.

use std::io::{Cursor, Read};

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemory};

use super::layout::{HIGH, MAPPED_END};

/// The offset of the 64-bit entry of a bzImage from its load address.
const ENTRY_64: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;

/// The magic number of a setup header, and its offset in a bzImage.
const SETUP_MAGIC: &[u8; 4] = b"HdrS";
const SETUP_MAGIC_AT: usize = 0x202;

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Loaded {
    /// The address of the first instruction, in 64-bit mode.
    pub(super) entry: u64,
    /// The setup header for the boot parameters.
    pub(super) header: setup_header,
    /// The end of the memory that the kernel needs to start.
    pub(super) end: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum Format {
    BzImage,
    Elf,
}

/// Load a kernel from the contents of its file. An error says what is wrong with the file.
pub(super) fn load<M: GuestMemory>(memory: &M, file: Vec<u8>) -> Result<Loaded, String> {
    match format(&file)? {
        Format::BzImage => load_bzimage(memory, file),
        Format::Elf => load_elf(memory, file),
    }
}

fn format(file: &[u8]) -> Result<Format, String> {
    const COMPRESSED: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"\x04\x22\x4d\x18", "lz4"),
    ];
    if file.starts_with(b"\x7fELF") {
        return Ok(Format::Elf);
    }
    if file.get(SETUP_MAGIC_AT..SETUP_MAGIC_AT + 4) == Some(SETUP_MAGIC) {
        return Ok(Format::BzImage);
    }
    let known = COMPRESSED.iter().find(|(magic, _)| file.starts_with(magic));
    Err(match known {
        Some((_, name)) => format!("it is compressed with {name}: decompress it first"),
        None => format!(
            "it is neither a bzImage nor an ELF file (vmlinux): its {} bytes begin with {:02x?}",
            file.len(),
            &file[..file.len().min(8)]
        ),
    })
}

/// Fails if the kernel needs more memory than there is.
fn check_memory(memory: &impl GuestMemory, end: u64, why: &str) -> Result<(), String> {
    let last = memory.last_addr().0;
    if end > last + 1 {
        return Err(format!(
            "{} MiB of memory are too few: the kernel needs memory up to {end:#x} {why}",
            (last + 1) >> 20
        ));
    }
    Ok(())
}

fn load_bzimage(memory: &impl GuestMemory, file: Vec<u8>) -> Result<Loaded, String> {
    check_memory(memory, HIGH + file.len() as u64, "to be loaded")?;
    let loaded = BzImage::load(
        memory,
        Some(GuestAddress(HIGH)),
        &mut Cursor::new(file),
        Some(GuestAddress(HIGH)),
    )
    .map_err(|e| format!("it cannot be loaded as a bzImage: {e}"))?;
    let header = loaded.setup_header.ok_or("it has no setup header")?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err("it has no 64-bit entry".to_owned());
    }
    // The decompressor moves the kernel to this address, and needs this much memory.
    let end = (header.pref_address.max(HIGH)).saturating_add(u64::from(header.init_size));
    check_memory(memory, end, "to decompress itself")?;
    Ok(Loaded {
        entry: loaded.kernel_load.0 + ENTRY_64,
        header,
        end,
    })
}

fn load_elf(memory: &impl GuestMemory, file: Vec<u8>) -> Result<Loaded, String> {
    let (entry, segments) = read_elf(&file)?;
    let mut end = 0;
    for segment in &segments {
        let (from, len) = (segment.p_paddr, segment.p_memsz);
        if segment.p_filesz > len {
            return Err(format!(
                "its segment at physical address {from:#x} has {} bytes in the file and {len} in memory",
                segment.p_filesz
            ));
        }
        if from < HIGH {
            return Err(format!(
                "it has a segment at physical address {from:#x}, and kernels begin at {HIGH:#x}"
            ));
        }
        end = end.max(from.saturating_add(len));
    }
    let holds_entry =
        |s: &Elf64_Phdr| (s.p_paddr..s.p_paddr.saturating_add(s.p_filesz)).contains(&entry);
    if !segments.iter().any(holds_entry) {
        return Err(format!(
            "its entry, {entry:#x}, is not a physical address in any of its {} segments",
            segments.len()
        ));
    }
    if entry >= MAPPED_END {
        return Err(format!(
            "its entry {entry:#x} is not below {MAPPED_END:#x}, the end of the initial page tables"
        ));
    }
    check_memory(memory, end, "to be loaded")?;
    Elf::load(
        memory,
        None,
        &mut Cursor::new(file),
        Some(GuestAddress(HIGH)),
    )
    .map_err(|e| format!("it cannot be loaded as an ELF file: {e}"))?;
    Ok(Loaded {
        entry,
        header: header_without_bzimage(),
        end,
    })
}

/// The entry and the segments to load of an ELF file for x86-64.
fn read_elf(file: &[u8]) -> Result<(u64, Vec<Elf64_Phdr>), String> {
    const CLASS: usize = 4;
    const DATA: usize = 5;
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const X86_64: u16 = 62;
    let cut = || format!("it is cut off: an ELF file of {} bytes", file.len());
    let mut reader = Cursor::new(file);
    let mut header = Elf64_Ehdr::default();
    reader
        .read_exact(header.as_mut_slice())
        .map_err(|_| cut())?;
    let ident = header.e_ident;
    if (ident[CLASS], ident[DATA], header.e_machine) != (CLASS_64, LITTLE_ENDIAN, X86_64) {
        return Err(format!(
            "it is not an ELF file for x86-64: class {}, byte order {}, machine {} instead of \
             {CLASS_64}, {LITTLE_ENDIAN}, {X86_64}",
            ident[CLASS], ident[DATA], header.e_machine
        ));
    }
    reader.set_position(header.e_phoff);
    let mut segments = Vec::new();
    for _ in 0..header.e_phnum {
        let mut segment = Elf64_Phdr::default();
        reader
            .read_exact(segment.as_mut_slice())
            .map_err(|_| cut())?;
        if segment.p_type != PT_LOAD || (segment.p_memsz, segment.p_filesz) == (0, 0) {
            continue;
        }
        let end = segment.p_offset.checked_add(segment.p_filesz);
        if end.is_none_or(|end| end > file.len() as u64) {
            return Err(cut());
        }
        segments.push(segment);
    }
    if segments.is_empty() {
        return Err("it is an ELF file without a segment to load".to_owned());
    }
    Ok((header.e_entry, segments))
}

/// A setup header for an ELF file, which has none of its own.
fn header_without_bzimage() -> setup_header {
    const BOOT_FLAG: u16 = 0xaa55;
    /// The version of the boot protocol.
    const VERSION: u16 = 0x20f;
    const ALIGNMENT: u32 = 2 << 20;
    setup_header {
        boot_flag: BOOT_FLAG,
        header: u32::from_le_bytes(*SETUP_MAGIC),
        version: VERSION,
        kernel_alignment: ALIGNMENT,
        initrd_addr_max: i32::MAX as u32,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;

    const MIB: u64 = 1 << 20;
    const AT: u64 = 2 * MIB;
    const TEXT: &[u8] = b"the first instructions";

    fn memory(mib: u64) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (mib * MIB) as usize)]).expect("memory")
    }

    /// A small vmlinux with one segment at `AT`, changed by `change`.
    fn elf(change: impl FnOnce(&mut Elf64_Ehdr, &mut Elf64_Phdr)) -> Vec<u8> {
        let mut header = Elf64_Ehdr {
            e_machine: 62,
            e_entry: AT + 4,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: 1,
            ..Default::default()
        };
        header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let mut segment = Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: 120,
            p_paddr: AT,
            p_filesz: TEXT.len() as u64,
            p_memsz: MIB,
            ..Default::default()
        };
        change(&mut header, &mut segment);
        [header.as_slice(), segment.as_slice(), TEXT].concat()
    }

    /// A bzImage with a 64-bit entry, changed by `change`.
    fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        const HEADER: usize = 0x1f1;
        const SETUP: usize = 2 * 512;
        let mut header = setup_header {
            setup_sects: 1,
            header: u32::from_le_bytes(*SETUP_MAGIC),
            version: 0x20f,
            loadflags: 1,
            code32_start: HIGH as u32,
            xloadflags: XLF_KERNEL_64,
            pref_address: AT,
            init_size: MIB as u32,
            ..Default::default()
        };
        change(&mut header);
        let mut file = vec![0; SETUP];
        let header = header.as_slice();
        file[HEADER..HEADER + header.len()].copy_from_slice(header);
        file.extend(TEXT);
        file
    }

    fn text_at(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let mut text = vec![0; TEXT.len()];
        memory
            .read_slice(&mut text, GuestAddress(at))
            .expect("in memory");
        text
    }

    fn refusal(mib: u64, file: Vec<u8>) -> String {
        load(&memory(mib), file).expect_err("it was loaded")
    }

    #[test]
    fn a_bzimage_is_loaded_at_one_mib_and_entered_behind_its_start() {
        let memory = memory(8);
        let loaded = load(&memory, bzimage(|_| ())).expect("a bzImage");
        assert_eq!((loaded.entry, loaded.end), (HIGH + 0x200, AT + MIB));
        assert_eq!(text_at(&memory, HIGH), TEXT);
    }

    #[test]
    fn an_elf_file_is_loaded_where_it_says_and_entered_where_it_says() {
        let memory = memory(8);
        let loaded = load(&memory, elf(|_, _| ())).expect("an ELF file");
        assert_eq!((loaded.entry, loaded.end), (AT + 4, AT + MIB));
        assert_eq!(text_at(&memory, AT), TEXT);
        let header = loaded.header;
        let magic = header.header;
        assert_eq!(magic.to_le_bytes(), *SETUP_MAGIC);
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_what_it_is() {
        for (file, why) in [
            (b"".to_vec(), "its 0 bytes begin with []"),
            (
                b"#!/bin/sh\n".to_vec(),
                "begin with [23, 21, 2f, 62, 69, 6e, 2f, 73]",
            ),
            (
                b"\x28\xb5\x2f\xfd and so on".to_vec(),
                "compressed with zstd",
            ),
            (b"\x1f\x8b\x08".to_vec(), "compressed with gzip"),
            (
                b"\x7fELF\x02\x01".to_vec(),
                "cut off: an ELF file of 6 bytes",
            ),
            (
                elf(|header, _| header.e_machine = 183),
                "machine 183 instead of",
            ),
            (
                elf(|header, _| header.e_ident[4] = 1),
                "class 1, byte order 1",
            ),
            (elf(|header, _| header.e_phnum = 0), "without a segment"),
            (elf(|header, _| header.e_phnum = 9), "cut off"),
            (
                elf(|header, _| header.e_entry = 0xffff_ffff_8100_0000),
                "0xffffffff81000000, is not a physical",
            ),
            (
                elf(|header, segment| {
                    (header.e_entry, segment.p_paddr) = (MAPPED_END, MAPPED_END);
                }),
                "0x40000000 is not below 0x40000000",
            ),
            (
                elf(|_, segment| segment.p_paddr = 0x1000),
                "physical address 0x1000, and",
            ),
            (elf(|_, segment| segment.p_offset = u64::MAX), "cut off"),
            (bzimage(|header| header.xloadflags = 0), "no 64-bit entry"),
            (bzimage(|header| header.setup_sects = 200), "as a bzImage"),
        ] {
            let told = refusal(8, file);
            assert!(told.contains(why), "'{told}' does not say '{why}'");
        }
    }

    #[test]
    fn a_kernel_that_does_not_fit_into_memory_is_refused_before_it_is_loaded() {
        let told = refusal(2, elf(|_, _| ()));
        assert_eq!(
            told,
            "2 MiB of memory are too few: the kernel needs memory up to 0x300000 to be loaded"
        );
        let told = refusal(8, elf(|_, segment| segment.p_memsz = u64::MAX));
        assert!(told.contains("up to 0xffffffffffffffff"), "{told}");
        let told = refusal(2, bzimage(|_| ()));
        assert!(
            told.contains("up to 0x300000 to decompress itself"),
            "{told}"
        );
        let mut long = bzimage(|_| ());
        long.resize(3 << 20, 0);
        assert!(refusal(2, long).contains("to be loaded"));
    }
}
