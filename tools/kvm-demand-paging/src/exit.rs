//! Fault exits: what KVM_RUN tells a vCPU thread that asked for them.

use crate::{abi, PAGE_SIZE};

/// Why a guest's access could not be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The page is absent: place it, make it present, enter KVM_RUN again.
    Absent,
    /// There is no memory for the page: on hugetlb, no free huge page.
    NoMemory,
    /// Its source ([`Vm::set_source`](crate::Vm::set_source)) cannot be read.
    SourceError,
    /// It was there, and was unmapped at that very moment: enter KVM_RUN again, nothing else is to be done.
    Retry,
    /// Its bytes are lost ([`Vm::poison`](crate::Vm::poison), a memory error): tell the guest, as by a machine check.
    Poisoned,
    /// A reason of a newer module that this crate does not know: the bits 32 to 63 of the flags.
    Unknown(u64),
}

/// A guest's access that KVM_RUN returned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultExit {
    /// The guest physical address of the page.
    pub gpa: u64,
    /// Why the access could not be served.
    pub reason: Reason,
    /// Whether the guest wrote.
    pub write: bool,
}

impl FaultExit {
    /// Read `kvm_run.memory_fault`, after KVM_RUN failed with EFAULT and exit_reason
    /// KVM_EXIT_MEMORY_FAULT. `None` if the exit is not the module's but KVM's own.
    ///
    /// ```
    /// use kvm_demand_paging::{FaultExit, Reason};
    ///
    /// let exit = FaultExit::decode(1 << 32 | 1 << 40, 0x7000, 4096).expect("an exit of the module");
    /// assert_eq!((exit.reason, exit.gfn(), exit.write), (Reason::Absent, 7, true));
    /// assert_eq!(FaultExit::decode(1 << 3, 0x7000, 4096), None); // a private page of KVM's
    /// ```
    pub fn decode(flags: u64, gpa: u64, size: u64) -> Option<Self> {
        const PAGE: u64 = PAGE_SIZE as u64;

        // KVM's own flags are below bit 32; the module never sets one of those.
        if flags as u32 != 0 || flags == 0 || size != PAGE || gpa % PAGE != 0 {
            return None;
        }
        let reason = match flags & !abi::KDP_EXIT_WRITE {
            abi::KDP_EXIT_ABSENT => Reason::Absent,
            abi::KDP_EXIT_NO_MEMORY => Reason::NoMemory,
            abi::KDP_EXIT_SOURCE_ERROR => Reason::SourceError,
            abi::KDP_EXIT_RETRY => Reason::Retry,
            abi::KDP_EXIT_POISONED => Reason::Poisoned,
            0 => return None,
            other => Reason::Unknown(other),
        };
        Some(Self {
            gpa,
            reason,
            write: flags & abi::KDP_EXIT_WRITE != 0,
        })
    }

    /// The guest frame number of the page.
    pub fn gfn(&self) -> u64 {
        self.gpa >> abi::KDP_PAGE_SHIFT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KNOWN: u64 = abi::KDP_EXIT_ABSENT
        | abi::KDP_EXIT_NO_MEMORY
        | abi::KDP_EXIT_SOURCE_ERROR
        | abi::KDP_EXIT_RETRY
        | abi::KDP_EXIT_POISONED
        | abi::KDP_EXIT_WRITE;

    #[test]
    fn reasons() {
        let decode =
            |flags| FaultExit::decode(flags, 0x1000, 4096).map(|exit| (exit.reason, exit.write));
        assert_eq!(decode(abi::KDP_EXIT_ABSENT), Some((Reason::Absent, false)));
        assert_eq!(
            decode(abi::KDP_EXIT_NO_MEMORY | abi::KDP_EXIT_WRITE),
            Some((Reason::NoMemory, true))
        );
        assert_eq!(decode(1 << 34), Some((Reason::SourceError, false)));
        assert_eq!(decode(1 << 35), Some((Reason::Retry, false)));
        assert_eq!(decode(1 << 36), Some((Reason::Poisoned, false)));
        assert_eq!(decode(1 << 37), Some((Reason::Unknown(1 << 37), false)));
        // Never taken for a reason that is known.
        let both = abi::KDP_EXIT_ABSENT | abi::KDP_EXIT_NO_MEMORY;
        assert_eq!(decode(both), Some((Reason::Unknown(both), false)));
        assert_eq!(decode(0), None);
        assert_eq!(decode(abi::KDP_EXIT_WRITE), None);
    }

    proptest! {
        #[test]
        fn others_are_left_alone(flags: u64, gpa: u64, size: u64) {
            let exit = FaultExit::decode(flags, gpa, size);
            if flags & 0xffff_ffff != 0 || size != 4096 || gpa % 4096 != 0 {
                prop_assert_eq!(exit, None);
            }
            if let Some(exit) = exit {
                prop_assert_eq!(exit.gfn() << 12, gpa);
                if flags & !KNOWN != 0 {
                    prop_assert!(matches!(exit.reason, Reason::Unknown(_)));
                }
            }
        }
    }
}
