//! An interrupt line of the in-kernel interrupt controllers.

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_superio::Trigger;

/// A line that a device pulses.
///
/// By a call and not by an irqfd: KVM delivers an irqfd's interrupt to these controllers later, from a work queue, and
/// who saves a machine's state in between would lose it.
#[derive(Clone)]
pub(crate) struct Interrupt {
    vm: Arc<VmFd>,
    line: u32,
}

impl Interrupt {
    pub(crate) fn new(vm: Arc<VmFd>, line: u32) -> Self {
        Self { vm, line }
    }
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        for level in [true, false] {
            self.vm
                .set_irq_line(self.line, level)
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        }
        Ok(())
    }
}
