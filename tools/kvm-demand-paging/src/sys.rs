//! The ioctls, each with the one type that it takes. The only file that hands addresses to the module.

use crate::{abi, PageRange, PAGE_SIZE};
use rustix::{
    fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    io::Errno,
    ioctl::{ioctl, Ioctl, IoctlOutput, Opcode, Updater},
};
use std::{ffi::c_void, mem};

/// The argument of one ioctl.
///
/// # Safety
///
/// `OPCODE` must be an ioctl that reads and writes a `Self` at the address it is given, and writes nowhere
/// else.
pub(crate) unsafe trait Command: Default {
    const OPCODE: Opcode;
    const NAME: &'static str;

    /// A zeroed argument that tells its size.
    fn sized() -> Self;
}

macro_rules! commands {
    ($($name:ident $argument:ident)*) => {$(
        // SAFETY: the header defines this ioctl with this argument; the out fields are inside it.
        unsafe impl Command for abi::$argument {
            const OPCODE: Opcode = abi::$name as Opcode;
            const NAME: &'static str = stringify!($name);

            fn sized() -> Self {
                Self {
                    size: mem::size_of::<Self>() as u32,
                    ..Self::default()
                }
            }
        }
    )*};
}

commands! {
    KDP_INFO kdp_info
    KDP_MEMSLOT_CREATE kdp_memslot_create
    KDP_MEMSLOT_REMOVE kdp_memslot_remove
    KDP_MEMSLOT_GET kdp_memslot_get
    KDP_PAGING kdp_paging
    KDP_MARK kdp_mark
    KDP_VCPU_EXITS kdp_vcpu_exits
    KDP_COLLAPSE kdp_collapse
    KDP_SOURCE kdp_source
    KDP_POISON kdp_poison
    KDP_REPLACE kdp_replace
    KDP_CLAIMANT kdp_claimant
    KDP_MEMFD kdp_memfd
}

struct Call<'a, T>(&'a mut T);

// SAFETY: `Command` states that the opcode takes a pointer to a T and writes to nothing but it.
unsafe impl<T: Command> Ioctl for Call<'_, T> {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        T::OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut *self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> Result<(), Errno> {
        Ok(())
    }
}

/// Run the ioctl that takes a `T`. What it returns stands in `argument`, after a failure too.
pub(crate) fn call<T: Command>(fd: impl AsFd, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: `Call` implements the ioctl as the header defines it; on a file descriptor of another kind
    // it fails with ENOTTY, its type byte being the module's own.
    unsafe { ioctl(fd, Call(argument)) }
}

/// Run KDP_POISON_LIST from page `first` on; what it found, and the page to go on with.
pub(crate) fn poison_list(
    fd: impl AsFd,
    slot_id: u32,
    first: u64,
    room: &mut [abi::kdp_poisoned],
) -> Result<(&[abi::kdp_poisoned], u64), Errno> {
    let mut argument = abi::kdp_poison_list {
        size: mem::size_of::<abi::kdp_poison_list>() as u32,
        slot_id,
        count: u32::try_from(room.len()).unwrap_or(u32::MAX),
        first,
        poisoned: room.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the ioctl reads and writes the argument, and writes to at most `count` entries of `room`; on a file
    // descriptor of another kind it fails with ENOTTY.
    unsafe {
        let call = Updater::<{ abi::KDP_POISON_LIST as Opcode }, _>::new(&mut argument);
        ioctl(fd, call)?;
    }
    Ok((&room[..argument.count as usize], argument.first))
}

/// Run KDP_PLACE with the bytes of the pages of a range, and a place for the result of each. On failure also says how many
/// were dealt with.
pub(crate) fn place(
    fd: impl AsFd,
    slot_id: u32,
    range: PageRange,
    data: &[u8],
    results: &mut [u8],
) -> Result<(), (Errno, u64)> {
    assert_eq!(data.len(), results.len() * PAGE_SIZE);
    let mut argument = abi::kdp_place {
        size: mem::size_of::<abi::kdp_place>() as u32,
        slot_id,
        first: range.first,
        count: results.len() as u64,
        data: data.as_ptr() as u64,
        results: results.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the ioctl reads and writes the argument, reads `count` pages of `data` and writes `count` bytes of
    // `results`; on a file descriptor of another kind it fails with ENOTTY.
    let done = unsafe {
        let call = Updater::<{ abi::KDP_PLACE as Opcode }, _>::new(&mut argument);
        ioctl(fd, call)
    };
    done.map_err(|errno| (errno, argument.done))
}

/// Run KDP_CLAIM on a claimant's fd, with a place for the result of each page. On failure also says how many were dealt
/// with.
pub(crate) fn claim(
    fd: BorrowedFd<'_>,
    flags: u32,
    range: PageRange,
    results: &mut [u8],
) -> Result<(), (Errno, u64)> {
    claim_call::<{ abi::KDP_CLAIM as Opcode }>(fd, flags, range, results)
}

/// The same for KDP_COMMIT.
pub(crate) fn commit(
    fd: BorrowedFd<'_>,
    flags: u32,
    range: PageRange,
    results: &mut [u8],
) -> Result<(), (Errno, u64)> {
    claim_call::<{ abi::KDP_COMMIT as Opcode }>(fd, flags, range, results)
}

fn claim_call<const OPCODE: Opcode>(
    fd: BorrowedFd<'_>,
    flags: u32,
    range: PageRange,
    results: &mut [u8],
) -> Result<(), (Errno, u64)> {
    const { assert!(OPCODE == abi::KDP_CLAIM as Opcode || OPCODE == abi::KDP_COMMIT as Opcode) };
    let mut argument = abi::kdp_claim {
        size: mem::size_of::<abi::kdp_claim>() as u32,
        flags,
        first: range.first,
        count: results.len() as u64,
        results: results.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: both ioctls read and write the argument, and write `count` bytes of `results`; on a file descriptor of another
    // kind they fail with ENOTTY.
    let done = unsafe { ioctl(fd, Updater::<OPCODE, _>::new(&mut argument)) };
    done.map_err(|errno| (errno, argument.done))
}

/// Take over a file descriptor that an ioctl returned, unless it returned none.
pub(crate) fn returned_fd(fd: i32) -> Option<OwnedFd> {
    // SAFETY: called once for each out field of an ioctl that succeeded: the fd is new and nobody else's.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_argument_begins_with_its_size() {
        assert_eq!(mem::offset_of!(abi::kdp_info, size), 0);
        assert_eq!(mem::offset_of!(abi::kdp_memslot_create, size), 0);
        assert_eq!(mem::offset_of!(abi::kdp_memslot_remove, size), 0);
        assert_eq!(mem::offset_of!(abi::kdp_memslot_get, size), 0);
        assert_eq!(mem::offset_of!(abi::kdp_paging, size), 0);
        assert_eq!(mem::offset_of!(abi::kdp_mark, size), 0);
        assert_eq!(mem::offset_of!(abi::kdp_vcpu_exits, size), 0);
        assert_eq!(mem::offset_of!(abi::kdp_collapse, size), 0);
        assert_eq!(abi::kdp_mark::sized().size, 40);
        assert_eq!(abi::kdp_memslot_get::sized().size, 88);
    }

    #[test]
    fn numbers_are_those_of_the_header() {
        // _IO(type, nr): no direction, no size.
        assert_eq!(abi::kdp_info::OPCODE, 0xdb80);
        assert_eq!(abi::kdp_vcpu_exits::OPCODE, 0xdb86);
        assert_eq!(abi::KDP_BITMAP_OFFSET, 1 << 60);
        assert_eq!(abi::KDP_EXIT_WRITE, 1 << 40);
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(call(&file, &mut abi::kdp_info::sized()), Err(Errno::NOTTY));
    }
}
