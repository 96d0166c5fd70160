// SPDX-License-Identifier: GPL-2.0

//! AF_XDP sockets. They stand for a device that pins memory of a process for a long time, and reads
//! it without the process's mapping. See Documentation/networking/af_xdp.rst in the kernel.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::c_int;

use crate::check::{skip, Result};
use crate::slot::PAGE;
use crate::sys;
use crate::task::until;

/// Entries of each ring. A socket can send only that many packets: the tests take none out of the
/// completion ring.
const ENTRIES: u32 = 16;

/// struct xdp_desc.
#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    options: u32,
}

/// A socket with pinned memory (a UMEM), in chunks of one page.
pub struct Socket {
    fd: OwnedFd,
    ring: *mut u8,
    ring_len: usize,
    offsets: libc::xdp_ring_offset,
}

// SAFETY: the ring is the socket's own mapping, which is unmapped when the socket is dropped.
unsafe impl Send for Socket {}

impl Socket {
    /// Creates a socket without memory.
    pub fn new() -> Result<Self> {
        // SAFETY: the descriptor that comes back is new and nobody else's.
        let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EAFNOSUPPORT) {
            return skip("this kernel has no AF_XDP");
        }
        sys::check(fd)?;
        Ok(Self {
            // SAFETY: the descriptor is new and nobody else's.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            ring: ptr::null_mut(),
            ring_len: 0,
            // SAFETY: zeros are valid numbers.
            offsets: unsafe { mem::zeroed() },
        })
    }

    fn set<T>(&self, option: c_int, value: &T) -> io::Result<()> {
        // SAFETY: the kernel reads as many bytes as `value` has.
        let ret = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_XDP,
                option,
                ptr::from_ref(value).cast(),
                size_of::<T>() as u32,
            )
        };
        sys::check(ret).map(drop)
    }

    /// Pins memory. The kernel holds the mmap lock while it pins.
    pub fn register(&self, at: *const u64, pages: u64) -> io::Result<()> {
        let umem = libc::xdp_umem_reg {
            addr: at as u64,
            len: pages * PAGE,
            chunk_size: PAGE as u32,
            headroom: 0,
            flags: 0,
            tx_metadata_len: 0,
        };
        self.set(libc::XDP_UMEM_REG, &umem)
    }

    /// Creates the rings, and binds the socket to the device that it sends to.
    pub fn bind(&mut self, index: u32) -> Result {
        for ring in [
            libc::XDP_UMEM_FILL_RING,
            libc::XDP_UMEM_COMPLETION_RING,
            libc::XDP_TX_RING,
        ] {
            self.set(ring, &ENTRIES)?;
        }
        // SAFETY: zeros are valid numbers, and the kernel writes at most `len` bytes. The mapping
        // is new.
        unsafe {
            let mut offsets: libc::xdp_mmap_offsets = mem::zeroed();
            let mut len = size_of::<libc::xdp_mmap_offsets>() as u32;
            sys::check(libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_XDP,
                libc::XDP_MMAP_OFFSETS,
                (&raw mut offsets).cast(),
                &mut len,
            ))?;
            self.offsets = offsets.tx;
            let len = self.offsets.desc as usize + ENTRIES as usize * size_of::<Descriptor>();
            let ring = libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                self.fd.as_raw_fd(),
                libc::XDP_PGOFF_TX_RING,
            );
            if ring == libc::MAP_FAILED {
                return Err(io::Error::last_os_error().into());
            }
            (self.ring, self.ring_len) = (ring.cast(), len);
            let address = libc::sockaddr_xdp {
                sxdp_family: libc::AF_XDP as u16,
                sxdp_flags: libc::XDP_COPY,
                sxdp_ifindex: index,
                sxdp_queue_id: 0,
                sxdp_shared_umem_fd: 0,
            };
            // A socket that was closed occupies the device until a kworker has released it.
            until("the device has no other socket", || {
                let ret = libc::bind(
                    self.fd.as_raw_fd(),
                    (&raw const address).cast(),
                    size_of::<libc::sockaddr_xdp>() as u32,
                );
                match sys::check(ret) {
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(false),
                    other => Ok(other.map(|_| true)?),
                }
            })?;
        }
        Ok(())
    }

    /// Sends the first `len` bytes of a page of the pinned memory.
    pub fn send(&self, page: u64, len: usize) -> Result {
        // SAFETY: the ring is mapped, and the kernel gave the offsets in it. The entry belongs to
        // this thread until the producer's number passes it to the kernel.
        unsafe {
            let producer = self.ring.add(self.offsets.producer as usize);
            let producer = &*producer.cast::<AtomicU32>();
            let number = producer.load(Ordering::Relaxed);
            ensure!(number < ENTRIES, "{number} packets were sent already");
            let entries = self.ring.add(self.offsets.desc as usize);
            let entry = entries.cast::<Descriptor>().add(number as usize);
            entry.write(Descriptor {
                address: page * PAGE,
                len: len as u32,
                options: 0,
            });
            producer.store(number + 1, Ordering::Release);
            let ret = libc::sendto(
                self.fd.as_raw_fd(),
                ptr::null(),
                0,
                libc::MSG_DONTWAIT,
                ptr::null(),
                0,
            );
            sys::check(ret as c_int)?;
        }
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.ring.is_null() {
            // SAFETY: nobody uses the ring any more.
            unsafe { libc::munmap(self.ring.cast(), self.ring_len) };
        }
    }
}
