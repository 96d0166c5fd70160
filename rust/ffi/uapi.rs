// SPDX-License-Identifier: GPL-2.0

//! The ABI: what bindgen makes of include/uapi/linux/kvm_demand_paging.h, and how its structs cross
//! the border to userspace.

use kernel::{
    prelude::*,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

#[allow(
    clippy::all,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    unreachable_pub,
    unused_imports
)]
mod generated {
    include!(concat!(env!("KDP_GENERATED"), "/uapi_generated.rs"));
}

pub(crate) use generated::*;

/// A struct of the ABI.
///
/// # Safety
///
/// Every bit pattern is a value of it, and it has no padding: it may be copied from and to userspace
/// byte by byte.
pub(crate) unsafe trait Plain: Default + Copy {
    fn bytes(&self) -> &[u8] {
        // SAFETY: A value of a type without padding (safety of the trait) is initialised bytes.
        unsafe { core::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: As above, and any bytes written make a value.
        unsafe { core::slice::from_raw_parts_mut((&raw mut *self).cast(), size_of::<Self>()) }
    }
}

/// The argument of an ioctl: begins with its size in bytes.
pub(crate) trait Argument: Plain {
    /// The size that was published first. Smaller ones are refused.
    const FIRST_SIZE: usize;
}

macro_rules! arguments {
    ($($name:ident: $first_size:literal;)*) => { $(
        const _: () = assert!(size_of::<$name>() >= $first_size && size_of::<$name>() % 8 == 0);
        // SAFETY: Integers and arrays of them, padded explicitly: the header says so, and the test
        // abi-layout compares the offsets.
        unsafe impl Plain for $name {}
        impl Argument for $name {
            const FIRST_SIZE: usize = $first_size;
        }
    )* };
}

arguments! {
    kdp_info: 56;
    kdp_memslot_create: 80;
    kdp_memslot_remove: 16;
    kdp_memslot_get: 88;
    kdp_paging: 16;
    kdp_mark: 40;
    kdp_vcpu_exits: 16;
    kdp_collapse: 64;
    kdp_source: 40;
    kdp_poison: 40;
    kdp_poison_list: 32;
    kdp_replace: 64;
    kdp_place: 64;
    kdp_claimant: 16;
    kdp_claim: 48;
    kdp_memfd: 24;
}

const _: () = assert!(size_of::<kdp_event>() == 48 && size_of::<kdp_range>() == 16);
const _: () = assert!(size_of::<kdp_poisoned>() == 24);
// SAFETY: As above.
unsafe impl Plain for kdp_event {}
// SAFETY: As above.
unsafe impl Plain for kdp_range {}
// SAFETY: As above.
unsafe impl Plain for kdp_poisoned {}

/// No struct is longer than this, whatever comes.
const MAX_SIZE: usize = 4096;

/// Copies an argument in. What the caller knows beyond `T` must be zero.
pub(crate) fn copy_in<T: Argument>(arg: UserPtr) -> Result<T> {
    let size: u32 = UserSlice::new(arg, 4).reader().read()?;
    let size = size as usize;
    if size < T::FIRST_SIZE {
        return Err(EINVAL);
    }
    if size > MAX_SIZE {
        return Err(E2BIG);
    }
    let mut value = T::default();
    let known = size.min(size_of::<T>());
    let mut reader = UserSlice::new(arg, size).reader();
    reader.read_slice(&mut value.bytes_mut()[..known])?;
    while !reader.is_empty() {
        if reader.read::<u8>()? != 0 {
            return Err(E2BIG);
        }
    }
    // The caller may have changed it meanwhile; what was checked counts.
    value.bytes_mut()[..4].copy_from_slice(&(size as u32).to_ne_bytes());
    Ok(value)
}

/// Copies an argument back, as much of it as the caller knows.
pub(crate) fn copy_out<T: Argument>(arg: UserPtr, value: &T) -> Result {
    let bytes = value.bytes();
    let mut size = [0; 4];
    size.copy_from_slice(&bytes[..4]);
    let known = (u32::from_ne_bytes(size) as usize).min(bytes.len());
    UserSlice::new(arg, known)
        .writer()
        .write_slice(&bytes[..known])
}
