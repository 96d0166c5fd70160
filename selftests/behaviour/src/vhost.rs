// SPDX-License-Identifier: GPL-2.0

//! vhost-net with one queue, whose rings and buffers are in a memslot. See include/uapi/linux/vhost.h and
//! the split virtqueues of the virtio specification.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use crate::check::{skip, Result};
use crate::guest::gpa;
use crate::slot::{Slot, GPA, PAGE};
use crate::sys;
use crate::tun::Tap;

/// Descriptors of the ring.
const SIZE: u16 = 4;

/// The page that holds the descriptors and, behind them, the available ring.
pub const DRIVER_PAGE: u64 = 0;
/// The page of the used ring, which vhost writes.
pub const USED_PAGE: u64 = 1;

const AVAILABLE: u64 = SIZE as u64 * 16;

const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const DESC_F_WRITE: u16 = 2;

const fn iow(nr: u64, size: usize) -> u64 {
    (1 << 30) | ((size as u64) << 16) | (0xaf << 8) | nr
}

const SET_FEATURES: u64 = iow(0x00, 8);
const SET_OWNER: u64 = 0xaf01;
const SET_MEM_TABLE: u64 = iow(0x03, 8);
const SET_VRING_NUM: u64 = iow(0x10, size_of::<State>());
const SET_VRING_ADDR: u64 = iow(0x11, size_of::<Addresses>());
const SET_VRING_BASE: u64 = iow(0x12, size_of::<State>());
const SET_VRING_KICK: u64 = iow(0x20, size_of::<State>());
const SET_VRING_CALL: u64 = iow(0x21, size_of::<State>());
const NET_SET_BACKEND: u64 = iow(0x30, size_of::<State>());

/// struct vhost_vring_state, and struct vhost_vring_file.
#[repr(C)]
struct State {
    index: u32,
    value: i32,
}

#[repr(C)]
struct Addresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// struct vhost_memory with one region.
#[repr(C)]
struct Memory {
    regions: u32,
    padding: u32,
    guest_phys_addr: u64,
    bytes: u64,
    userspace_addr: u64,
    flags: u64,
}

/// Which way packets go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// Out of the device, into the guest.
    Receive = 0,
    /// From the guest, into the device.
    Transmit = 1,
}

/// vhost-net at work on one queue. The guest is played by whoever writes to the memory.
pub struct Vhost {
    file: File,
    queue: Queue,
    kick: OwnedFd,
    _call: OwnedFd,
    slot: Arc<Slot>,
}

impl Vhost {
    /// Sets the queue up, without a backend.
    pub fn new(slot: &Arc<Slot>, queue: Queue) -> Result<Self> {
        let Ok(file) = File::options()
            .read(true)
            .write(true)
            .open("/dev/vhost-net")
        else {
            return skip("there is no /dev/vhost-net");
        };
        let this = Self {
            file,
            queue,
            kick: sys::eventfd()?,
            _call: sys::eventfd()?,
            slot: slot.clone(),
        };
        this.ioctl(SET_OWNER, &())?;
        this.ioctl(SET_FEATURES, &VIRTIO_F_VERSION_1)?;
        this.ioctl(
            SET_MEM_TABLE,
            &Memory {
                regions: 1,
                padding: 0,
                guest_phys_addr: GPA,
                bytes: slot.guest.len() as u64,
                userspace_addr: slot.guest.as_ptr() as u64,
                flags: 0,
            },
        )?;
        this.state(SET_VRING_NUM, SIZE.into())?;
        this.state(SET_VRING_BASE, 0)?;
        this.ioctl(
            SET_VRING_ADDR,
            &Addresses {
                index: queue as u32,
                flags: 0,
                descriptors: slot.address(DRIVER_PAGE) as u64,
                used: slot.address(USED_PAGE) as u64,
                available: slot.address(DRIVER_PAGE) as u64 + AVAILABLE,
                log: 0,
            },
        )?;
        this.state(SET_VRING_KICK, this.kick.as_raw_fd())?;
        this.state(SET_VRING_CALL, this._call.as_raw_fd())?;
        Ok(this)
    }

    /// Begins to work. vhost reads the rings in this call.
    pub fn start(&self, tap: &Tap) -> Result {
        self.state(NET_SET_BACKEND, tap.as_fd().as_raw_fd())
    }

    /// Says that there is something in the available ring.
    pub fn kick(&self) -> Result {
        sys::write_from(self.kick.as_fd(), 1_u64.to_ne_bytes().as_ptr(), 8)?;
        Ok(())
    }

    /// The contents of [`DRIVER_PAGE`] that make one buffer available, which begins with its page.
    pub fn driver_page(&self, buffer_page: u64, len: u32) -> [u8; PAGE as usize] {
        let mut page = [0; PAGE as usize];
        let flags = if self.queue == Queue::Receive {
            DESC_F_WRITE
        } else {
            0
        };
        page[0..8].copy_from_slice(&gpa(buffer_page).to_le_bytes());
        page[8..12].copy_from_slice(&len.to_le_bytes());
        page[12..14].copy_from_slice(&flags.to_le_bytes());
        // The available ring: no flags, index 1, its first entry is descriptor 0.
        let index = AVAILABLE as usize + 2;
        page[index..index + 2].copy_from_slice(&1_u16.to_le_bytes());
        page
    }

    /// How many buffers vhost has used, and the bytes it has written to the first.
    pub fn used(&self) -> Result<(u16, u32)> {
        let mut page = [0; PAGE as usize];
        self.slot.alias.read(USED_PAGE, &mut page)?;
        let index = u16::from_le_bytes([page[2], page[3]]);
        let len = u32::from_le_bytes([page[8], page[9], page[10], page[11]]);
        Ok((index, len))
    }

    fn state(&self, request: u64, value: i32) -> Result {
        let index = self.queue as u32;
        self.ioctl(request, &State { index, value })
    }

    fn ioctl<T>(&self, request: u64, argument: &T) -> Result {
        // SAFETY: every caller passes what its request reads; vhost checks the addresses in it.
        sys::check(unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) })?;
        Ok(())
    }
}
