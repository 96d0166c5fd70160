// SPDX-License-Identifier: GPL-2.0

//! A TAP device, and a packet socket at its other side. See tun(4), packet(7).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::check::{skip, Result};
use crate::sys;
use crate::task::PATIENCE;

/// The bytes of a struct virtio_net_hdr with num_buffers, which stands before every packet.
pub const HEADER: usize = 12;

/// An ethertype for experiments: nobody else sends it.
pub const ETHERTYPE: u16 = 0x88b5;

const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;

/// struct ifreq with the flags in its union.
#[repr(C)]
struct Ifreq {
    name: [u8; 16],
    flags: i16,
    padding: [u8; 22],
}

/// A TAP device that is up. It goes when this is dropped.
pub struct Tap {
    file: File,
    /// What the kernel's network stack gets from the device, and what it gives to it.
    socket: OwnedFd,
    /// The kernel's interface index of the device.
    pub index: u32,
}

impl Tap {
    /// A new one.
    pub fn new() -> Result<Self> {
        let Ok(file) = File::options().read(true).write(true).open("/dev/net/tun") else {
            return skip("there is no /dev/net/tun");
        };
        let mut request = Ifreq {
            name: [0; 16],
            flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
            padding: [0; 22],
        };
        let header = HEADER as libc::c_int;
        // SAFETY: each argument is what its ioctl reads and writes.
        unsafe {
            sys::check(libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request))?;
            sys::check(libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &header))?;
        }
        let socket = packet_socket()?;
        // IPv6 would send packets of its own as soon as the device is up.
        let name = String::from_utf8_lossy(&request.name);
        let ipv6 = format!(
            "/proc/sys/net/ipv6/conf/{}/disable_ipv6",
            name.trim_end_matches('\0')
        );
        if fs::exists(&ipv6)? {
            fs::write(&ipv6, "1")?;
        }
        request.flags = (libc::IFF_UP | libc::IFF_RUNNING | libc::IFF_NOARP) as i16;
        // SAFETY: SIOCSIFFLAGS reads a struct ifreq.
        sys::check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })?;
        let index = bind(&socket, &request.name)?;
        Ok(Self {
            file,
            socket,
            index,
        })
    }

    /// A packet with our ethertype came out of the device, within that time.
    pub fn packet_came(&self, within: Duration) -> Result<bool> {
        Ok(sys::readable(self.socket.as_raw_fd(), within)?)
    }

    /// The packet that came out of the device.
    pub fn receive(&self) -> Result<Vec<u8>> {
        let mut packet = vec![0; 4096];
        // SAFETY: the buffer is this thread's own.
        let n = unsafe { sys::read_to(self.socket.as_fd(), packet.as_mut_ptr(), packet.len())? };
        packet.truncate(n);
        Ok(packet)
    }

    /// The next packet with the tests' ethertype that the network stack has passed to the device.
    pub fn sent(&self) -> Result<Vec<u8>> {
        loop {
            let came = sys::readable(self.file.as_raw_fd(), PATIENCE)?;
            ensure!(came, "nothing was given to the device");
            let mut packet = vec![0; 4096];
            // SAFETY: the buffer is this thread's own.
            let n = unsafe { sys::read_to(self.as_fd(), packet.as_mut_ptr(), packet.len())? };
            packet.truncate(n);
            packet.drain(..HEADER.min(n));
            if packet.get(12..14) == Some(&ETHERTYPE.to_be_bytes()) {
                return Ok(packet);
            }
        }
    }

    /// Puts a packet into the device.
    pub fn send(&self, packet: &[u8]) -> Result {
        let n = sys::write_from(self.socket.as_fd(), packet.as_ptr(), packet.len())?;
        ensure_eq!(n, packet.len(), "bytes sent");
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn packet_socket() -> Result<OwnedFd> {
    let protocol = i32::from(ETHERTYPE.to_be());
    // SAFETY: the descriptor that comes back is new and nobody else's.
    unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            protocol,
        );
        Ok(OwnedFd::from_raw_fd(sys::check(fd)?))
    }
}

fn bind(socket: &OwnedFd, name: &[u8; 16]) -> Result<u32> {
    // SAFETY: the kernel has written a NUL-terminated name.
    let index = unsafe { libc::if_nametoindex(name.as_ptr().cast()) };
    if index == 0 {
        return Err(io::Error::last_os_error().into());
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ETHERTYPE.to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address is valid and as long as it says.
    sys::check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(index)
}

/// An Ethernet frame of our ethertype with this many bytes of payload.
pub fn frame(payload: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.extend((0..payload).map(|i| seed.wrapping_add((i % 251) as u8)));
    frame
}
