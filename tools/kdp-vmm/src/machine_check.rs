//! Memory errors, as a guest learns of them: the callback of a VMM that was told of a poisoned page.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::kvm_x86_mce;
use rustix::ioctl::{ioctl, opcode, Opcode, Setter};

use crate::error::{kvm, Error, Result};
use crate::machine::{GDT, IDT};
use crate::vcpu::Vcpu;

/// _IOW(KVMIO, 0x9c, __u64) and _IOW(KVMIO, 0x9e, struct kvm_x86_mce); kvm-ioctls has neither.
const KVM_X86_SETUP_MCE: Opcode = opcode::write::<u64>(0xae, 0x9c);
const KVM_X86_SET_MCE: Opcode = opcode::write::<kvm_x86_mce>(0xae, 0x9e);

/// The bank that has the guest's errors. MCi_ADDR of it is the MSR [`MSR_ADDR`].
const BANK: u8 = 1;
/// Where the guest reads the address (IA32_MC1_ADDR).
pub const MSR_ADDR: u32 = 0x406;
/// What the guest clears when it is done (IA32_MCG_STATUS).
pub const MSR_MCG_STATUS: u32 = 0x17a;

/// Banks 0 and 1, and IA32_MCG_CTL.
const MCG_CAP: u64 = (BANK as u64 + 1) | (1 << 8);

/// Valid, uncorrected, enabled, with address and MISC, signalled, action required; an error of a data load (Intel SDM,
/// volume 3, "Software recoverable action required errors").
const STATUS: u64 = 0xbd80_0000_0000_0134;
/// The address is physical, and right from bit 12 on: a page.
const MISC: u64 = (2 << 6) | 12;
/// In progress; the instruction that was interrupted is the one that met the error, and can be gone on with.
const MCG_STATUS: u64 = 7;

const MACHINE_CHECK: u64 = 18;
const CR4_MCE: u64 = 1 << 6;
const CODE_SELECTOR: u16 = 8;

impl Vcpu {
    /// Have machine checks go to the program's own code, `handler` bytes from its start. Before the first run.
    pub fn handle_machine_checks(&mut self, handler: u64) -> Result<()> {
        // Null, 64-bit code, data: as the segment registers have them.
        let gdt = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff_u64];
        let at = self.code() + handler;
        // An interrupt gate (AMD64 APM, volume 2, "Long-Mode Gate Descriptors").
        let low = (at & 0xffff)
            | (u64::from(CODE_SELECTOR) << 16)
            | (0x8e00 << 32)
            | (((at >> 16) & 0xffff) << 48);
        let bytes = |words: &[u64]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        self.machine().write_low(GDT, &bytes(&gdt))?;
        self.machine()
            .write_low(IDT + 16 * MACHINE_CHECK, &bytes(&[low, at >> 32]))?;
        self.set(
            "KVM_X86_SETUP_MCE",
            // SAFETY: the ioctl reads a 64-bit word; this is KVM's vCPU.
            unsafe { Setter::<KVM_X86_SETUP_MCE, _>::new(MCG_CAP) },
        )?;
        let mut sregs = self.fd().get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 8 * gdt.len() as u16 - 1);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 16 * (MACHINE_CHECK as u16 + 1) - 1);
        sregs.cr4 |= CR4_MCE;
        self.fd().set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))
    }

    /// Tell the guest that its access at `gpa` has met bad memory: a machine check, before it goes on.
    ///
    /// A vCPU that is not prepared ([`Vcpu::handle_machine_checks`]) ends in a triple fault, as a CPU does.
    pub fn inject_memory_error(&self, gpa: u64) -> Result<()> {
        let error = kvm_x86_mce {
            status: STATUS,
            addr: gpa,
            misc: MISC,
            mcg_status: MCG_STATUS,
            bank: BANK,
            ..Default::default()
        };
        self.set(
            "KVM_X86_SET_MCE",
            // SAFETY: the ioctl reads a `kvm_x86_mce`; this is KVM's vCPU.
            unsafe { Setter::<KVM_X86_SET_MCE, _>::new(error) },
        )
    }

    fn set<const OPCODE: Opcode, T>(&self, what: &str, call: Setter<OPCODE, T>) -> Result<()> {
        // SAFETY: the fd is open as long as the vCPU is, which this call does not outlive.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd().as_raw_fd()) };
        // SAFETY: the setter was made for this ioctl by the caller.
        unsafe { ioctl(fd, call) }.map_err(|errno| Error::os(what, errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_kvms() {
        assert_eq!(KVM_X86_SETUP_MCE, 0x4008_ae9c);
        assert_eq!(KVM_X86_SET_MCE, 0x4040_ae9e);
    }
}
