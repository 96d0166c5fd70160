//! A KVM virtual machine with just enough in it for a [`GuestProgram`] to run.
//!
//! Low memory, a memslot of plain memory at guest physical address 0, holds what the machine itself needs;
//! it is never demand-paged:
//!
//! | address | what |
//! |---|---|
//! | 0x1000, 0x2000 | page tables: 512 GiB one to one, by pages of 1 GiB |
//! | 0x3000, 0x4000 | descriptor tables, for programs that handle machine checks |
//! | 0x10000 + 4096 n | the code of vCPU n |
//! | 0x50000 + 4096 n | its parameters |
//! | 0x90000 + 4096 n | its stack |
//! | 0x100000 and up | scratch memory for the programs' own use |
//!
//! Everything else is mapped by [`Machine::map`].

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{kvm_userspace_memory_region, CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_demand_paging::AliasMap;
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::volatile_memory::VolatileSlice;

use crate::error::{kvm, Error, Result};
use crate::guest::GuestProgram;
use crate::memory::{buffer, GuestMemory, PAGE_SIZE};
use crate::vcpu::Vcpu;

/// The most vCPUs that a machine can have.
pub const MAX_VCPUS: u64 = 64;

/// Where scratch memory begins.
pub const SCRATCH_GPA: u64 = 0x10_0000;

/// The first address at which [`Machine::map`] can put memory.
pub const MIN_GPA: u64 = 1 << 30;

/// The end of what a guest can address.
pub const MAX_GPA: u64 = 512 << 30;

pub(crate) const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
pub(crate) const GDT: u64 = 0x3000;
pub(crate) const IDT: u64 = 0x4000;
const CODE: u64 = 0x1_0000;
const PARAMS: u64 = 0x5_0000;
const STACK: u64 = 0x9_0000;

/// Page table entry bits: present, writable, accessed, dirty; and a page of this level.
const PTE_PRESENT: u64 = 0x63;
const PTE_HUGE: u64 = 0x80;

/// A virtual machine. Clones are the same machine.
#[derive(Clone)]
pub struct Machine {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    // First, so that KVM lets go of the memory before it is unmapped.
    vm: VmFd,
    cpuid: CpuId,
    low: AliasMap,
    mapped: Mutex<Vec<GuestMemory>>,
}

impl Machine {
    /// A machine with this much scratch memory, in bytes, and nothing mapped.
    pub fn new(scratch: u64) -> Result<Self> {
        let host = Kvm::new().map_err(kvm("open /dev/kvm (is a KVM module loaded?)"))?;
        let vm = host.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
        // Intel's KVM wants three pages of its own somewhere; the address is out of every guest's way.
        if vm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(0xfffb_d000)
                .map_err(kvm("KVM_SET_TSS_ADDR"))?;
        }
        let cpuid = host
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        if scratch > MIN_GPA - SCRATCH_GPA {
            return Err(Error::invalid(format!(
                "{scratch} bytes of scratch memory do not fit below {MIN_GPA:#x}"
            )));
        }
        let low = buffer(SCRATCH_GPA + scratch)?;
        write_page_tables(&low)?;
        let machine = Self {
            inner: Arc::new(Inner {
                vm,
                cpuid,
                low,
                mapped: Mutex::default(),
            }),
        };
        let low = &machine.inner.low;
        machine.set_region(0, 0, low.as_ptr() as u64, low.len() as u64)?;
        Ok(machine)
    }

    /// Make `memory` the guest's memory at `gpa`. It stays mapped as long as the machine lives.
    pub fn map(&self, gpa: u64, memory: impl Into<GuestMemory>) -> Result<()> {
        let memory = memory.into();
        let end = gpa.checked_add(memory.len());
        if gpa % PAGE_SIZE != 0 || gpa < MIN_GPA || end.is_none_or(|end| end > MAX_GPA) {
            return Err(Error::invalid(format!(
                "{} bytes of memory at guest physical address {gpa:#x}: it must be page-aligned and lie \
                 between {MIN_GPA:#x} and {MAX_GPA:#x}",
                memory.len()
            )));
        }
        let mut mapped = self
            .inner
            .mapped
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let slot = mapped.len() as u32 + 1;
        self.set_region(slot, gpa, memory.addr(), memory.len())?;
        mapped.push(memory);
        Ok(())
    }

    fn set_region(&self, slot: u32, gpa: u64, addr: u64, len: u64) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: addr,
        };
        // SAFETY: the machine keeps every mapping that it gives to KVM for as long as KVM has the VM.
        unsafe { self.inner.vm.set_user_memory_region(region) }
            .map_err(kvm("KVM_SET_USER_MEMORY_REGION"))
    }

    /// A vCPU that starts with `program`.
    pub fn vcpu(&self, number: u64, program: &GuestProgram) -> Result<Vcpu> {
        if number >= MAX_VCPUS {
            return Err(Error::invalid(format!(
                "vCPU {number}: a machine has at most {MAX_VCPUS}"
            )));
        }
        let (code, params) = (program.code(), program.param_bytes());
        for (what, bytes) in [("code", code.len()), ("parameters", params.len())] {
            if bytes as u64 > PAGE_SIZE {
                return Err(Error::invalid(format!(
                    "{bytes} bytes of {what}: a guest program has room for {PAGE_SIZE}"
                )));
            }
        }
        let at = number * PAGE_SIZE;
        self.inner.write_low(CODE + at, code)?;
        self.inner.write_low(PARAMS + at, &params)?;
        let fd = self
            .inner
            .vm
            .create_vcpu(number)
            .map_err(kvm("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&self.inner.cpuid)
            .map_err(kvm("KVM_SET_CPUID2"))?;
        let start = crate::vcpu::Start {
            code: CODE + at,
            params: PARAMS + at,
            stack: STACK + at + PAGE_SIZE,
        };
        Vcpu::new(self.inner.clone(), fd, number, &start)
    }

    /// The VM itself, for everything else that kvm-ioctls can do with it.
    pub fn fd(&self) -> &VmFd {
        &self.inner.vm
    }

    /// Copy from low memory, such as scratch memory, while the guest is not writing there.
    pub fn read_low(&self, gpa: u64, to: &mut [u8]) -> Result<()> {
        low_part(&self.inner.low, gpa, to.len())?.copy_to(to);
        Ok(())
    }
}

impl Inner {
    pub(crate) fn write_low(&self, gpa: u64, from: &[u8]) -> Result<()> {
        low_part(&self.low, gpa, from.len())?.copy_from(from);
        Ok(())
    }
}

fn low_part(low: &AliasMap, gpa: u64, bytes: usize) -> Result<VolatileSlice<'_>> {
    low.volatile()
        .subslice(gpa as usize, bytes)
        .map_err(|e| Error::invalid(format!("{bytes} bytes of low memory at {gpa:#x}: {e}")))
}

fn write_page_tables(low: &AliasMap) -> Result<()> {
    let top = low_part(low, PML4, 8)?;
    top.copy_from(&(PDPT | PTE_PRESENT).to_le_bytes());
    let pages = low_part(low, PDPT, 512 * 8)?;
    let entries = (0..512_u64).flat_map(|n| ((n << 30) | PTE_PRESENT | PTE_HUGE).to_le_bytes());
    pages.copy_from(&entries.collect::<Vec<u8>>());
    Ok(())
}
