//! The devices of a Linux guest. All their work is done on the threads of vCPUs, at the access that asks for it: when the
//! vCPUs have stopped, so have the devices.

mod balloon;
mod control;
mod interrupt;
mod mmio;
mod serial;
mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;

use self::balloon::BalloonDevice;
pub use self::balloon::{HintSink, Statistics};
pub use self::control::Balloon;
use self::interrupt::Interrupt;
use self::mmio::VirtioMmio;
pub use self::serial::Console;
use self::serial::SerialPort;
pub(super) use self::state::DevicesState;
use super::layout::{I8042, SERIAL, SERIAL_IRQ, VIRTIO, VIRTIO_IRQ, VIRTIO_SIZE};
use super::ram::Ram;
use crate::error::Result;

/// What an access comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Done,
    /// The guest has pulled the reset line.
    Reset,
}

/// All of them.
pub(super) struct Devices {
    serial: Mutex<SerialPort>,
    balloon: Mutex<VirtioMmio<BalloonDevice>>,
    ram: Arc<Ram>,
}

impl Devices {
    /// As they are after a reset, or in a saved state. The serial port raises its interrupt, if it had one: what has saved
    /// the interrupt controllers restores them afterwards.
    pub(super) fn new(
        vm: &Arc<VmFd>,
        ram: Arc<Ram>,
        console: Console,
        state: Option<&DevicesState>,
    ) -> Result<Self> {
        let line = |line| Interrupt::new(vm.clone(), line);
        let mut balloon = VirtioMmio::new(BalloonDevice::new(), line(VIRTIO_IRQ))?;
        if let Some(state) = state {
            state.restore_balloon(&mut balloon)?;
        }
        let serial = state.map(DevicesState::serial).unwrap_or_default();
        Ok(Self {
            serial: Mutex::new(SerialPort::new(line(SERIAL_IRQ), console, &serial)?),
            balloon: Mutex::new(balloon),
            ram,
        })
    }

    /// A port is read. Instructions that repeat bring several accesses at once.
    pub(super) fn port_in(&self, port: u16, data: &mut [u8]) {
        /// The clock of PCs, of which there is none: it is never in the midst of an update.
        const CMOS_DATA: u16 = 0x71;
        match port {
            SERIAL..=0x3ff => {
                let mut serial = locked(&self.serial);
                data.fill_with(|| serial.read((port - SERIAL) as u8));
            }
            I8042..=0x64 | CMOS_DATA => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// A port is written.
    pub(super) fn port_out(&self, port: u16, data: &[u8]) -> Result<Access> {
        const I8042_COMMAND: u16 = I8042 + 4;
        const PULL_RESET: u8 = 0xfe;
        match port {
            SERIAL..=0x3ff => {
                let mut serial = locked(&self.serial);
                for byte in data {
                    serial.write((port - SERIAL) as u8, *byte)?;
                }
            }
            I8042_COMMAND if data == [PULL_RESET] => return Ok(Access::Reset),
            _ => {}
        }
        Ok(Access::Done)
    }

    /// An address with no memory behind it is read.
    pub(super) fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match virtio_register(gpa) {
            Some(register) => locked(&self.balloon).read(register, data),
            None => data.fill(0xff),
        }
    }

    /// Such an address is written.
    pub(super) fn mmio_write(&self, gpa: u64, data: &[u8]) -> Result<()> {
        match virtio_register(gpa) {
            Some(register) => locked(&self.balloon).write(register, data, &self.ram),
            None => Ok(()),
        }
    }
}

fn virtio_register(gpa: u64) -> Option<u32> {
    let offset = gpa.checked_sub(VIRTIO)?;
    (offset < VIRTIO_SIZE).then_some(offset as u32)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
