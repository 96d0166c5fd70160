// SPDX-License-Identifier: GPL-2.0

//! Guests that QEMU's emulation of SVM loses.
//!
//! Once in some 100,000 world switches the state that QEMU stores for the guest at a #VMEXIT is its host's: its RIP is the
//! instruction behind VMRUN in kvm_amd's __svm_vcpu_run(), to the byte, as if the exit had been taken a second time by the
//! host. KVM then runs the guest at that address: most take a triple fault at once, or end in an internal error of KVM's,
//! some in an endless row of page faults. It happens on userfaultfd without our module, too. No test can pass with such a
//! guest, and none of our guests has anything at these addresses, so the test is run again.
//!
//! By QEMU's source (10.0), any CPU's FXRSTOR or XRSTOR changes hflags2 of the first CPU, not atomically (cpu_clear_ignne()
//! in target/i386/tcg/system/fpu_helper.c), and may so undo what VMRUN or #VMEXIT have just changed in it there: GIF, nested
//! paging, who masks interrupts. That fits: every CPU that was seen to take an interrupt which it had masked was CPU 0. So the
//! test VM runs no program on CPU 0 (scripts/vm-inside/run.py), and this is for other VMs.

use std::fs;
use std::ops::Range;

use crate::stuck;

fn is_emulated() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG"))
}

/// Whether a test that failed with this output lost its guest at once.
pub fn ended_a_guest(output: &str) -> bool {
    if !is_emulated() {
        return false;
    }
    let stopped = || {
        let kvm = own_kvm()?;
        let mut stops = output
            .lines()
            .filter(|line| line.contains(" stopped at rip "));
        stops.find(|line| rip(line).is_some_and(|rip| kvm.contains(&rip)))
    };
    output.contains("triple fault") || stopped().is_some()
}

/// Where this machine's kvm_amd is.
fn own_kvm() -> Option<Range<u64>> {
    module_at(&fs::read_to_string("/proc/modules").ok()?, "kvm_amd")
}

/// If a guest that is running now is a lost one: where it is.
pub fn lost_guest() -> Option<String> {
    if !is_emulated() {
        return None;
    }
    let kvm = own_kvm()?;
    stuck::trace(&["kvm/kvm_entry"])
        .iter()
        .filter_map(|line| rip(line))
        .find(|rip| kvm.contains(rip))
        .map(|rip| format!("its vCPU is at {rip:#x}, in its host's kvm_amd"))
}

/// The addresses of a module: name, size and so on, address (proc_modules(5)).
fn module_at(modules: &str, name: &str) -> Option<Range<u64>> {
    let line = modules
        .lines()
        .find(|line| line.split(' ').next() == Some(name))?;
    let mut words = line.split(' ');
    let size: u64 = words.nth(1)?.parse().ok()?;
    let base = words.find_map(|word| word.strip_prefix("0x"))?;
    let base = u64::from_str_radix(base, 16)
        .ok()
        .filter(|base| *base > 0)?;
    Some(base..base + size)
}

/// The guest's instruction pointer in an event, or in what a VMM says.
fn rip(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once(" rip 0x")?;
    let digits = rest.split(|c: char| !c.is_ascii_hexdigit()).next()?;
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_guest_is_told_from_others() {
        let modules = "kvm_amd 389120 4 - Live 0xffffffffa0155000\nkvm 1622016 1 kvm_amd, Live 0xffffffffa0400000\n";
        let kvm = module_at(modules, "kvm_amd").expect("kvm_amd is in the list");
        let lost = " behaviour-7754 [000] d..1.  1063.6: kvm_entry: vcpu 0, rip 0xffffffffa019d3dc intr_info 0x80000b0e";
        assert!(kvm.contains(&rip(lost).expect("it has a rip")));
        let fine = " behaviour-7754 [000] d..1.  1063.6: kvm_entry: vcpu 0, rip 0x1007 intr_info 0x00000000";
        assert!(!kvm.contains(&rip(fine).expect("it has a rip")));
        let said = "error: vCPU 0 stopped at rip 0xffffffffa019d3dc: InternalError";
        assert!(kvm.contains(&rip(said).expect("it has a rip")));
        assert_eq!(rip("kvm_exit: reason npf"), None);
        assert_eq!(
            module_at("kvm_amd 389120 4 - Live 0x0000000000000000", "kvm_amd"),
            None
        );
        assert_eq!(module_at(modules, "kvm_intel"), None);
    }
}
