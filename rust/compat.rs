// SPDX-License-Identifier: GPL-2.0

//! Differences between the releases of the kernel's Rust API.
//!
//! The code compiles on each kernel that the module supports, without a check of the version. For a
//! difference that needs a check, Kbuild probes whether the symbol, the signature or the field
//! exists.

use core::borrow::Borrow;
use kernel::{
    bindings,
    ffi::c_int,
    prelude::*, //
};

/// The value of a module parameter: `value()` returns a reference in 7.2 and a copy in 7.3.
pub(crate) fn parameter(value: impl Borrow<u32>) -> u32 {
    *value.borrow()
}

/// An error whose code `kernel::error::code` lacks in 7.2.
fn error(errno: u32) -> Error {
    Error::from_errno(-(errno as c_int))
}

/// `EHWPOISON`.
pub(crate) fn ehwpoison() -> Error {
    error(bindings::EHWPOISON)
}

/// `EOPNOTSUPP`.
pub(crate) fn eopnotsupp() -> Error {
    error(bindings::EOPNOTSUPP)
}

/// `ESTALE`.
pub(crate) fn estale() -> Error {
    error(bindings::ESTALE)
}
