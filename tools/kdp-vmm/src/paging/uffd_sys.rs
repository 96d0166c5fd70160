//! The few calls of userfaultfd(2) that are needed here. See ioctl_userfaultfd(2).
//!
//! The `userfaultfd` crate would do, but it brings a second bindgen and a second errno crate into the build.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvm_demand_paging::AliasMap;
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

#[repr(C)]
struct Continue {
    range: Range,
    mode: u64,
    mapped: i64,
}

/// struct uffd_msg: an event and its argument, for page faults flags, address and thread.
const MSG_SIZE: usize = 32;
const MSG_ADDRESS: std::ops::Range<usize> = 16..24;

const UFFDIO_API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0x00);
const UFFDIO_WAKE: Opcode = opcode::read::<Range>(0xaa, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<Copy>(0xaa, 0x03);
const UFFDIO_CONTINUE: Opcode = opcode::read_write::<Continue>(0xaa, 0x07);

/// Which faults are handed to userspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Faults {
    /// The page does not exist.
    Missing,
    /// The page exists and is not mapped.
    Minor,
}

/// A userfaultfd.
#[derive(Debug)]
pub(super) struct Userfaultfd {
    fd: OwnedFd,
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Userfaultfd {
    pub(super) fn new(faults: Faults) -> Result<Self> {
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
    pub(super) fn register(
        &self,
        faults: Faults,
        memory: &AliasMap,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let mut register = Register {
            range: range(memory, offset, len),
            mode: match faults {
                Faults::Missing => REGISTER_MODE_MISSING,
                Faults::Minor => REGISTER_MODE_MINOR,
            },
            ioctls: 0,
        };
        self.ioctl::<UFFDIO_REGISTER, _>(&mut register)
            .map_err(|e| Error::os("UFFDIO_REGISTER", e))
    }

    /// Replace `offsets` by those of the faults on `memory` that are to be read now, perhaps none.
    pub(super) fn read_faults(&self, memory: &AliasMap, offsets: &mut Vec<u64>) -> Result<()> {
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
    pub(super) fn copy(
        &self,
        memory: &AliasMap,
        offset: u64,
        from: &VolatileSlice<'_>,
    ) -> Result<()> {
        let guard = from.ptr_guard();
        whole(from.len() as u64, "UFFDIO_COPY", |done, left| {
            let mut copy = Copy {
                dst: range(memory, offset + done, left).start,
                src: guard.as_ptr() as u64 + done,
                len: left,
                mode: 0,
                copied: 0,
            };
            (self.ioctl::<UFFDIO_COPY, _>(&mut copy), copy.copied)
        })
    }

    /// Map the pages at `offset`, which exist by now, and let go who waits for them.
    pub(super) fn resume(&self, memory: &AliasMap, offset: u64, len: u64) -> Result<()> {
        whole(len, "UFFDIO_CONTINUE", |done, left| {
            let mut resume = Continue {
                range: range(memory, offset + done, left),
                mode: 0,
                mapped: 0,
            };
            (self.ioctl::<UFFDIO_CONTINUE, _>(&mut resume), resume.mapped)
        })
    }

    /// Let go who waits for these pages.
    pub(super) fn wake(&self, memory: &AliasMap, offset: u64, len: u64) -> Result<()> {
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
