//! What KVM knows of a vCPU.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave, Msrs, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::error::{kvm, Error, Result};

/// Set last: it is a time on a clock that other MSRs set.
const TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that one call takes.
const MSRS_PER_CALL: usize = 256;

#[derive(Default, Serialize, Deserialize)]
pub(in crate::linux) struct VcpuState {
    pub(in crate::linux) cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    // KVM has more than its 4 KiB only for processes that have asked for AMX, which this is not.
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Of a vCPU that is stopped. `indices` are the MSRs that KVM has to save.
    pub(in crate::linux) fn save(fd: &VcpuFd, indices: &[u32]) -> Result<Self> {
        let cpuid = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_CPUID2"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: fd.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?,
            // First: KVM acts on an INIT or SIPI that is pending then, which changes everything else.
            mp_state: fd.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?,
            regs: fd.get_regs().map_err(kvm("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
            xsave: Box::new(fd.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?),
            xcrs: fd.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?,
            debugregs: fd.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
            lapic: Box::new(fd.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?),
            msrs: read_msrs(fd, indices)?,
            events: fd.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// To a vCPU that has its CPUID and has never run.
    pub(in crate::linux) fn restore(&self, fd: &VcpuFd) -> Result<()> {
        if fd.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))? != self.tsc_khz {
            fd.set_tsc_khz(self.tsc_khz).map_err(kvm(
                "KVM_SET_TSC_KHZ (this CPU cannot have the other's TSC frequency)",
            ))?;
        }
        fd.set_mp_state(self.mp_state)
            .map_err(kvm("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        fd.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads 4 KiB, which a kvm_xsave has, unless the process has asked for AMX, which it has not.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&self.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&self.debugregs)
            .map_err(kvm("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        let (last, first): (Vec<_>, Vec<_>) =
            self.msrs.iter().partition(|msr| msr.index == TSC_DEADLINE);
        for msrs in [first, last] {
            write_msrs(fd, &msrs)?;
        }
        fd.set_vcpu_events(&self.events)
            .map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries)
        .map_err(|e| Error::invalid(format!("a list of {} MSRs: {e}", entries.len())))
}

/// The MSRs of a vCPU. One that this vCPU does not have, by its CPUID, is left out.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut msrs = Vec::new();
    let mut left = indices;
    while !left.is_empty() {
        let part = &left[..left.len().min(MSRS_PER_CALL)];
        let entries: Vec<_> = part
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut read = list(&entries)?;
        let done = fd.get_msrs(&mut read).map_err(kvm("KVM_GET_MSRS"))?;
        msrs.extend_from_slice(&read.as_slice()[..done]);
        // It stops at the first that it cannot read.
        left = &left[if done < part.len() { done + 1 } else { done }..];
    }
    Ok(msrs)
}

/// Set MSRs. One that cannot be set is no error if it has its value already.
fn write_msrs(fd: &VcpuFd, msrs: &[&kvm_msr_entry]) -> Result<()> {
    let msrs: Vec<kvm_msr_entry> = msrs.iter().map(|msr| **msr).collect();
    let mut left = &msrs[..];
    while !left.is_empty() {
        let part = &left[..left.len().min(MSRS_PER_CALL)];
        let done = fd.set_msrs(&list(part)?).map_err(kvm("KVM_SET_MSRS"))?;
        left = &left[done..];
        if done < part.len() {
            let refused = left[0];
            let now = read_msrs(fd, &[refused.index])?;
            if now.first().map(|msr| msr.data) != Some(refused.data) {
                return Err(Error::invalid(format!(
                    "KVM_SET_MSRS: this CPU cannot have the value {:#x} in MSR {:#x}, as the other's guest had",
                    refused.data, refused.index
                )));
            }
            left = &left[1..];
        }
    }
    Ok(())
}
