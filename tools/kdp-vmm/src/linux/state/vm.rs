//! What KVM knows of a machine beside its vCPUs: interrupt controllers, timer, clock.

use kvm_bindings::{
    kvm_clock_data, kvm_irqchip, kvm_pit_state2, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::error::{kvm, Result};

const IRQCHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

#[derive(Default, Serialize, Deserialize)]
pub(in crate::linux) struct VmState {
    irqchips: [kvm_irqchip; IRQCHIPS.len()],
    pit: kvm_pit_state2,
    /// What the guest's clock shows.
    pub(in crate::linux) clock: kvm_clock_data,
}

impl VmState {
    /// Of a machine that is stopped, whose clock shows this.
    pub(in crate::linux) fn save(vm: &VmFd, clock: kvm_clock_data) -> Result<Self> {
        let mut irqchips = [kvm_irqchip::default(); IRQCHIPS.len()];
        for (chip, id) in irqchips.iter_mut().zip(IRQCHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
        }
        Ok(Self {
            irqchips,
            pit: vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?,
            clock,
        })
    }

    pub(in crate::linux) fn restore(&self, vm: &VmFd) -> Result<()> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(kvm("KVM_SET_PIT2"))
    }
}
