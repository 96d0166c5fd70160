//! The few calls of userfaultfd(2) that are needed here. See ioctl_userfaultfd(2).
//!
//! The `userfaultfd` crate would do, but it brings a second bindgen and a second errno crate into the build.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvm_demand_paging::AliasMap;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::ioctl::{self, opcode, Opcode, Updater};
use rustix::mm::{userfaultfd, UserfaultfdFlags};
use vm_memory::volatile_memory::VolatileSlice;

use crate::error::{Error, Result};

const UFFD_API: u64 = 0xaa;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_MINOR: u64 = 1 << 2;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// Of UFFDIO_ZEROPAGE, UFFDIO_CONTINUE and UFFDIO_POISON.
#[repr(C)]
struct Fill {
    range: Range,
    mode: u64,
    filled: i64,
}

/// struct uffd_msg: an event and its argument, for page faults flags, address and thread.
const MSG_SIZE: usize = 32;
const MSG_ADDRESS: std::ops::Range<usize> = 16..24;

const UFFDIO_API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0x00);
const UFFDIO_UNREGISTER: Opcode = opcode::read::<Range>(0xaa, 0x01);
const UFFDIO_WAKE: Opcode = opcode::read::<Range>(0xaa, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<Copy>(0xaa, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<Fill>(0xaa, ZEROPAGE);
const UFFDIO_CONTINUE: Opcode = opcode::read_write::<Fill>(0xaa, 0x07);
const UFFDIO_POISON: Opcode = opcode::read_write::<Fill>(0xaa, POISON);

/// Numbers of calls, which are also the bits by which UFFDIO_REGISTER says which of them the memory allows.
const ZEROPAGE: u8 = 0x04;
const POISON: u8 = 0x08;

/// What may be done with memory that was registered, beside what all memory allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowed {
    pub(crate) zero: bool,
    pub(crate) poison: bool,
}

/// Which faults are handed to userspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Faults {
    /// The page does not exist.
    Missing,
    /// The page exists and is not mapped.
    Minor,
}

/// A userfaultfd.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    fd: OwnedFd,
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Userfaultfd {
    pub(crate) fn new(faults: Faults) -> Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: what the fd does to memory is up to the ranges that are registered later.
        let fd = unsafe { userfaultfd(flags) }.map_err(|e| {
            Error::os(
                "userfaultfd (it needs root, or 1 in /proc/sys/vm/unprivileged_userfaultfd)",
                e,
            )
        })?;
        let uffd = Self { fd };
        let mut api = Api {
            api: UFFD_API,
            features: match faults {
                Faults::Missing => FEATURE_MISSING_HUGETLBFS | FEATURE_MISSING_SHMEM,
                Faults::Minor => FEATURE_MINOR_HUGETLBFS | FEATURE_MINOR_SHMEM,
            },
            ioctls: 0,
        };
        uffd.ioctl::<UFFDIO_API, _>(&mut api)
            .map_err(|e| Error::os("UFFDIO_API (the kernel lacks what the mode needs)", e))?;
        Ok(uffd)
    }

    /// Hand faults on this part of the memory to whoever reads the userfaultfd.
    pub(crate) fn register(
        &self,
        faults: Faults,
        memory: &AliasMap,
        offset: u64,
        len: u64,
    ) -> Result<Allowed> {
        let mut register = Register {
            range: range(memory, offset, len),
            mode: match faults {
                Faults::Missing => REGISTER_MODE_MISSING,
                Faults::Minor => REGISTER_MODE_MINOR,
            },
            ioctls: 0,
        };
        self.ioctl::<UFFDIO_REGISTER, _>(&mut register)
            .map_err(|e| Error::os("UFFDIO_REGISTER", e))?;
        let allows = |call: u8| register.ioctls & (1 << call) != 0;
        Ok(Allowed {
            zero: allows(ZEROPAGE),
            poison: allows(POISON),
        })
    }

    /// Watch this memory no more, and let go who waits: pages that are missing read as zeros.
    pub(crate) fn unregister(&self, memory: &AliasMap) -> Result<()> {
        self.ioctl::<UFFDIO_UNREGISTER, _>(&mut range(memory, 0, memory.len() as u64))
            .map_err(|e| Error::os("UFFDIO_UNREGISTER", e))
    }

    /// Replace `offsets` by those of the faults on `memory` that are to be read now, perhaps none.
    pub(crate) fn read_faults(&self, memory: &AliasMap, offsets: &mut Vec<u64>) -> Result<()> {
        let mut buffer = [0; 64 * MSG_SIZE];
        offsets.clear();
        let len = match rustix::io::read(&self.fd, &mut buffer) {
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(e) => return Err(Error::os("read from a userfaultfd", e)),
        };
        let base = memory.as_ptr() as u64;
        for message in buffer[..len].chunks_exact(MSG_SIZE) {
            if message[0] != UFFD_EVENT_PAGEFAULT {
                return Err(Error::invalid(format!(
                    "userfaultfd delivered event {:#x}, which nobody asked for",
                    message[0]
                )));
            }
            let mut address = [0; 8];
            address.copy_from_slice(&message[MSG_ADDRESS]);
            offsets.push(u64::from_ne_bytes(address).wrapping_sub(base));
        }
        Ok(())
    }

    /// Fill the missing pages at `offset` and let go who waits for them.
    pub(crate) fn copy(
        &self,
        memory: &AliasMap,
        offset: u64,
        from: &VolatileSlice<'_>,
    ) -> Result<()> {
        let guard = from.ptr_guard();
        self.copy_from(memory, offset, guard.as_ptr() as u64, from.len() as u64)
    }

    /// The same, from bytes that nobody else writes.
    pub(crate) fn copy_bytes(&self, memory: &AliasMap, offset: u64, from: &[u8]) -> Result<()> {
        self.copy_from(memory, offset, from.as_ptr() as u64, from.len() as u64)
    }

    fn copy_from(&self, memory: &AliasMap, offset: u64, src: u64, len: u64) -> Result<()> {
        whole(len, "UFFDIO_COPY", |done, left| {
            let mut copy = Copy {
                dst: range(memory, offset + done, left).start,
                src: src + done,
                len: left,
                mode: 0,
                copied: 0,
            };
            (self.ioctl::<UFFDIO_COPY, _>(&mut copy), copy.copied)
        })
    }

    /// Map the pages at `offset`, which exist by now, and let go who waits for them.
    pub(crate) fn resume(&self, memory: &AliasMap, offset: u64, len: u64) -> Result<()> {
        self.fill::<UFFDIO_CONTINUE>("UFFDIO_CONTINUE", memory, offset, len)
    }

    /// Fill the missing pages at `offset` with zeros, if that is allowed, and let go who waits for them.
    pub(crate) fn zero(&self, memory: &AliasMap, offset: u64, len: u64) -> Result<()> {
        self.fill::<UFFDIO_ZEROPAGE>("UFFDIO_ZEROPAGE", memory, offset, len)
    }

    /// Have the missing pages at `offset` be lost, if that is allowed: who touches one of them is told of a memory error.
    pub(crate) fn poison(&self, memory: &AliasMap, offset: u64, len: u64) -> Result<()> {
        self.fill::<UFFDIO_POISON>("UFFDIO_POISON", memory, offset, len)
    }

    fn fill<const OPCODE: Opcode>(
        &self,
        what: &str,
        memory: &AliasMap,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        whole(len, what, |done, left| {
            let mut fill = Fill {
                range: range(memory, offset + done, left),
                mode: 0,
                filled: 0,
            };
            (self.ioctl::<OPCODE, _>(&mut fill), fill.filled)
        })
    }

    /// Let go who waits for these pages.
    pub(crate) fn wake(&self, memory: &AliasMap, offset: u64, len: u64) -> Result<()> {
        self.ioctl::<UFFDIO_WAKE, _>(&mut range(memory, offset, len))
            .map_err(|e| Error::os("UFFDIO_WAKE", e))
    }

    #[inline]
    fn ioctl<const OPCODE: Opcode, T>(&self, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: each caller passes the struct that belongs to its opcode; the memory that it names is of
        // mappings that the caller borrows.
        unsafe { ioctl::ioctl(&self.fd, Updater::<OPCODE, T>::new(argument)) }
    }
}

/// Waits for a userfaultfd as its users do (its manual page, QEMU, the kernel's own tests): it is polled, and then read
/// without waiting. A read that waits is a system call less; the kernel gives it no other advantage.
pub(crate) struct Arrivals(OwnedFd);

impl Arrivals {
    pub(crate) fn new(uffd: &Userfaultfd) -> Result<Self> {
        let epoll =
            epoll::create(CreateFlags::CLOEXEC).map_err(|e| Error::os("epoll_create1", e))?;
        epoll::add(&epoll, uffd, EventData::new_u64(0), EventFlags::IN)
            .map_err(|e| Error::os("epoll_ctl", e))?;
        Ok(Self(epoll))
    }

    /// Returns at a signal, too.
    pub(crate) fn wait(&self) -> Result<()> {
        let mut ready = Vec::with_capacity(1);
        match epoll::wait(&self.0, spare_capacity(&mut ready), None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(Error::os("epoll_wait", e)),
        }
    }
}

/// Call again while the kernel, with EAGAIN, says that it did only a part.
fn whole(
    len: u64,
    what: &str,
    mut call: impl FnMut(u64, u64) -> (Result<(), Errno>, i64),
) -> Result<()> {
    let mut done = 0;
    while done < len {
        match call(done, len - done) {
            (Ok(()), _) => done = len,
            (Err(Errno::AGAIN), part) => done += u64::try_from(part).unwrap_or(0),
            (Err(e), _) => return Err(Error::os(what, e)),
        }
    }
    Ok(())
}

fn range(memory: &AliasMap, offset: u64, len: u64) -> Range {
    Range {
        start: memory.as_ptr() as u64 + offset,
        len,
    }
}
