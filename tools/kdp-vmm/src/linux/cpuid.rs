//! What a guest's CPUs say of themselves: what KVM supports, each with its own number.

use kvm_bindings::{kvm_cpuid_entry2, CpuId};

use crate::error::{Error, Result};

/// The CPUID of one vCPU.
///
/// A guest of this VMM is never a host itself: its state would have to be saved, too.
pub(super) fn of_vcpu(supported: &CpuId, number: u8) -> Result<CpuId> {
    const VMX: u32 = 1 << 5;
    const HYPERVISOR: u32 = 1 << 31;
    const SVM: u32 = 1 << 2;
    const APIC_ID: u32 = 0xff << 24;
    let number = u32::from(number);
    let mut entries = supported.as_slice().to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & !APIC_ID) | (number << 24);
                entry.ecx = (entry.ecx & !VMX) | HYPERVISOR;
            }
            0xb | 0x1f => entry.edx = number,
            0x8000_0001 => entry.ecx &= !SVM,
            0x8000_000a => *entry = without_values(entry),
            0x8000_001e => entry.eax = number,
            _ => {}
        }
    }
    from_entries(&entries)
}

fn without_values(entry: &kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        eax: 0,
        ebx: 0,
        ecx: 0,
        edx: 0,
        ..*entry
    }
}

/// A list, as KVM takes it.
pub(super) fn from_entries(entries: &[kvm_cpuid_entry2]) -> Result<CpuId> {
    CpuId::from_entries(entries)
        .map_err(|e| Error::invalid(format!("a CPUID of {} entries: {e}", entries.len())))
}
