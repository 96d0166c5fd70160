//! What is saved of the devices.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};
use vm_superio::SerialState;

use super::balloon::{BalloonDevice, Saved};
use super::mmio::{Registers, VirtioMmio};
use super::{locked, Devices};
use crate::error::{Error, Result};

#[derive(Default, Serialize, Deserialize)]
pub(in crate::linux) struct DevicesState {
    serial: Serial,
    registers: Registers,
    queues: Vec<Ring>,
    balloon: Saved,
}

#[derive(Default, Serialize, Deserialize)]
struct Serial {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl From<SerialState> for Serial {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }
}

impl From<&Serial> for SerialState {
    fn from(serial: &Serial) -> Self {
        Self {
            baud_divisor_low: serial.baud_divisor[0],
            baud_divisor_high: serial.baud_divisor[1],
            interrupt_enable: serial.interrupt_enable,
            interrupt_identification: serial.interrupt_identification,
            line_control: serial.line_control,
            line_status: serial.line_status,
            modem_control: serial.modem_control,
            modem_status: serial.modem_status,
            scratch: serial.scratch,
            in_buffer: serial.in_buffer.clone(),
        }
    }
}

/// A queue.
#[derive(Serialize, Deserialize)]
struct Ring {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<QueueState> for Ring {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl TryFrom<&Ring> for Queue {
    type Error = virtio_queue::Error;

    fn try_from(ring: &Ring) -> Result<Self, virtio_queue::Error> {
        Self::try_from(QueueState {
            max_size: ring.max_size,
            next_avail: ring.next_avail,
            next_used: ring.next_used,
            event_idx_enabled: ring.event_idx_enabled,
            size: ring.size,
            ready: ring.ready,
            desc_table: ring.desc_table,
            avail_ring: ring.avail_ring,
            used_ring: ring.used_ring,
        })
    }
}

impl Devices {
    /// Of a machine that is stopped.
    pub(in crate::linux) fn save(&self) -> DevicesState {
        let balloon = locked(&self.balloon);
        DevicesState {
            serial: locked(&self.serial).state().into(),
            registers: balloon.registers,
            queues: balloon
                .queues
                .iter()
                .map(|queue| queue.state().into())
                .collect(),
            balloon: balloon.device.saved,
        }
    }
}

impl DevicesState {
    pub(super) fn serial(&self) -> SerialState {
        (&self.serial).into()
    }

    /// To a balloon that no guest has seen.
    pub(super) fn restore_balloon(&self, balloon: &mut VirtioMmio<BalloonDevice>) -> Result<()> {
        let wrong = |why: &dyn std::fmt::Display| {
            Error::invalid(format!("the state of a machine, its balloon: {why}"))
        };
        if self.queues.len() != balloon.queues.len() {
            return Err(wrong(&format!(
                "it has {} queues, and here it has {}",
                self.queues.len(),
                balloon.queues.len()
            )));
        }
        for (queue, ring) in balloon.queues.iter_mut().zip(&self.queues) {
            *queue = Queue::try_from(ring).map_err(|e| wrong(&e))?;
        }
        balloon.registers = self.registers;
        balloon.device.saved = self.balloon;
        Ok(())
    }
}
