//! A virtio device in a page of addresses (virtio 1.x, "Virtio Over MMIO").

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::*;
use virtio_queue::{Queue, QueueT};
use vm_superio::Trigger;

use super::interrupt::Interrupt;
use crate::error::{Error, Result};
use crate::linux::ram::{DeviceMemory, Ram};

/// "virt", and the version that is not the legacy one.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"KDP ");

/// What a device cannot go on after.
pub(super) enum Broken {
    /// The driver's queue makes no sense: the device waits to be reset.
    Driver,
    /// The machine is broken.
    Host(Error),
}

impl From<virtio_queue::Error> for Broken {
    fn from(_: virtio_queue::Error) -> Self {
        Self::Driver
    }
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self::Host(error)
    }
}

/// What is behind the transport.
pub(super) trait VirtioDevice {
    /// What it is.
    const ID: u32;
    /// Its queues, each with how many entries it can have.
    const QUEUES: &'static [u16];
    /// What it can, as bits.
    const FEATURES: u64;

    /// Its configuration.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to its configuration.
    fn write_config(&mut self, offset: usize, data: &[u8]);
    /// The driver has put something into a queue.
    fn work(&mut self, index: usize, queue: &mut Queue, ram: &Ram) -> Result<(), Broken>;
    /// The driver begins anew.
    fn reset(&mut self);
}

/// The registers, and the device behind them.
pub(super) struct VirtioMmio<D> {
    pub(super) device: D,
    interrupt: Interrupt,
    pub(super) queues: Vec<Queue>,
    pub(super) registers: Registers,
}

/// What the driver has set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) status: u32,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
}

fn half(value: u64, sel: u32) -> u32 {
    match sel {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

impl<D: VirtioDevice> VirtioMmio<D> {
    const FEATURES: u64 = D::FEATURES | (1 << VIRTIO_F_VERSION_1);

    pub(super) fn new(device: D, interrupt: Interrupt) -> Result<Self> {
        let queues = D::QUEUES.iter().map(|&size| Queue::new(size));
        let queues = queues
            .collect::<Result<_, _>>()
            .map_err(|e| Error::invalid(format!("virtio queues of {:?}: {e}", D::QUEUES)))?;
        Ok(Self {
            device,
            interrupt,
            queues,
            registers: Registers::default(),
        })
    }

    /// Whether the driver is at work, and has agreed to this feature.
    pub(super) fn has(&self, feature: u32) -> bool {
        self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && self.registers.driver_features & (1 << feature) != 0
    }

    pub(super) fn read(&self, offset: u32, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            let config = self.device.config();
            let from = config.iter().skip(at as usize);
            data.fill(0);
            for (to, from) in data.iter_mut().zip(from) {
                *to = *from;
            }
            return;
        }
        let value = match data.len() {
            4 => self.register(offset),
            _ => 0,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn register(&self, offset: u32) -> u32 {
        let queue = self.queues.get(self.registers.queue_sel as usize);
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => D::ID,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(Self::FEATURES, self.registers.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(QueueT::ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.registers.interrupt_status,
            VIRTIO_MMIO_STATUS => self.registers.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.registers.config_generation,
            // There is no shared memory.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, offset: u32, data: &[u8], ram: &Ram) -> Result<()> {
        if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            self.device.write_config(at as usize, data);
            return Ok(());
        }
        let Ok(bytes) = data.try_into() else {
            return Ok(());
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.set_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notified(value as usize, ram)?,
            VIRTIO_MMIO_INTERRUPT_ACK => self.registers.interrupt_status &= !value,
            VIRTIO_MMIO_STATUS => self.set_status(value, ram)?,
            _ => self.set_up_queue(offset, value, ram.memory())?,
        }
        Ok(())
    }

    fn set_driver_features(&mut self, value: u32) {
        let features = &mut self.registers.driver_features;
        match self.registers.driver_features_sel {
            0 => *features = (*features >> 32 << 32) | u64::from(value),
            1 => *features = (u64::from(value) << 32) | (*features & u64::from(u32::MAX)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32, ram: &Ram) -> Result<()> {
        if value == 0 {
            self.registers = Registers {
                config_generation: self.registers.config_generation,
                ..Registers::default()
            };
            self.queues.iter_mut().for_each(QueueT::reset);
            self.device.reset();
            return Ok(());
        }
        let features = self.registers.driver_features;
        let agreed = features & !Self::FEATURES == 0 && features & (1 << VIRTIO_F_VERSION_1) != 0;
        let refused = if agreed {
            0
        } else {
            VIRTIO_CONFIG_S_FEATURES_OK
        };
        let needs_reset = self.registers.status & VIRTIO_CONFIG_S_NEEDS_RESET;
        let begins = value & !self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        self.registers.status = (value & !refused) | needs_reset;
        // Linux leaves the first buffer for statistics before it says that it is at work, when nothing may be taken yet.
        if begins {
            (0..self.queues.len()).try_for_each(|index| self.notified(index, ram))?;
        }
        Ok(())
    }

    fn set_up_queue(&mut self, offset: u32, value: u32, memory: &DeviceMemory) -> Result<()> {
        let Some(queue) = self.queues.get_mut(self.registers.queue_sel as usize) else {
            return Ok(());
        };
        match offset {
            // What does not fit is found when the queue is to be ready.
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_READY => {
                queue.set_ready(value == 1);
                if value == 1 && !queue.is_valid(memory) {
                    queue.set_ready(false);
                    return self.needs_reset();
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn notified(&mut self, index: usize, ram: &Ram) -> Result<()> {
        let Some(queue) = self.queues.get_mut(index) else {
            return Ok(());
        };
        let at_work = self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && self.registers.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0;
        if !at_work || !queue.ready() {
            return Ok(());
        }
        let worked = self.device.work(index, queue, ram);
        self.answer(index, worked, ram)
    }

    /// Tell the driver that some of a queue was used, if it wants to know.
    pub(super) fn answer(
        &mut self,
        index: usize,
        worked: Result<(), Broken>,
        ram: &Ram,
    ) -> Result<()> {
        let queue = &mut self.queues[index];
        let notify = worked.and_then(|()| Ok(queue.needs_notification(ram.memory())?));
        match notify {
            Ok(true) => self.raise(VIRTIO_MMIO_INT_VRING),
            Ok(false) => Ok(()),
            Err(Broken::Driver) => self.needs_reset(),
            Err(Broken::Host(e)) => Err(e),
        }
    }

    fn needs_reset(&mut self) -> Result<()> {
        self.registers.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.raise(VIRTIO_MMIO_INT_CONFIG)
    }

    /// Tell the driver that the configuration has changed.
    pub(super) fn config_changed(&mut self) -> Result<()> {
        self.registers.config_generation = self.registers.config_generation.wrapping_add(1);
        if self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.raise(VIRTIO_MMIO_INT_CONFIG)?;
        }
        Ok(())
    }

    fn raise(&mut self, why: u32) -> Result<()> {
        self.registers.interrupt_status |= why;
        self.interrupt
            .trigger()
            .map_err(|e| Error::os("KVM_IRQ_LINE, a virtio device's", e))
    }
}
