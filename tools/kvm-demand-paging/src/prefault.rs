//! Mapping a page for a vCPU before its guest touches it.

use rustix::{
    fd::AsFd,
    io::Errno,
    ioctl::{ioctl, opcode, Opcode, Updater},
};

use crate::{Error, Result};

/// struct kvm_pre_fault_memory
#[repr(C)]
#[derive(Default)]
struct Range {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

/// _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory); kvm-ioctls does not have it yet.
const KVM_PRE_FAULT_MEMORY: Opcode = opcode::read_write::<Range>(0xae, 0xd5);

/// Map guest memory into the vCPU's stage-2 page tables (KVM_PRE_FAULT_MEMORY), from the vCPU's own thread
/// between two KVM_RUNs. Returns how many bytes from `gpa` on are mapped now.
///
/// After a fault exit was resolved this saves the guest a second fault on the same page: it would leave the
/// guest once more only to find that the page is there. Both addresses are multiples of the page size.
///
/// Only for pages that are present: over an absent one it waits, as any access that is no guest's.
///
/// # Errors
///
/// EOPNOTSUPP or ENOTTY: this KVM cannot do it (KVM_CAP_PRE_FAULT_MEMORY); go on without. Any other: this page is
/// not mapped; the guest's own fault will tell why. So EFAULT is nothing bad: it comes, too, if the page is unmapped
/// (made absent, mapped anew as part of a block) at that very moment.
pub fn pre_fault(vcpu: impl AsFd, gpa: u64, bytes: u64) -> Result<u64> {
    let mut range = Range {
        gpa,
        size: bytes,
        ..Range::default()
    };
    // SAFETY: the ioctl reads and writes a `Range`; on a file descriptor of another kind it fails with ENOTTY.
    let done = unsafe {
        let call = Updater::<KVM_PRE_FAULT_MEMORY, _>::new(&mut range);
        ioctl(vcpu, call)
    };
    match done {
        Ok(()) => Ok(bytes - range.size),
        // What was done before the signal stands, and `range` says how much.
        Err(Errno::INTR) => Ok(bytes - range.size),
        Err(errno) => Err(Error::sys(
            "KVM_PRE_FAULT_MEMORY",
            format!("{bytes} bytes at {gpa:#x}"),
            errno,
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = pre_fault(&file, 0, 4096).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOTTY.raw_os_error()));
    }

    #[test]
    fn the_number_is_kvms() {
        assert_eq!(KVM_PRE_FAULT_MEMORY, 0xc040_aed5);
    }
}
