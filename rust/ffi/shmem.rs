// SPDX-License-Identifier: GPL-2.0

//! The module's own tmpfs, whose files have folios of 2 MiB.
//!
//! C source: shmem.c, on `mm/shmem.c`.

use super::{
    c,
    file::RawFile, //
};
use kernel::{
    error::to_result,
    prelude::*, //
};

/// The mount, as long as the module is loaded.
///
/// # Invariants
///
/// `kdp_shmem_init()` has succeeded.
pub(crate) struct Shmem(());

impl Shmem {
    /// Mounts it. Without huge pages in the kernel there is no mount, and no error.
    ///
    /// # Safety
    ///
    /// This is called once in the life of the loaded module, before a file of it can be opened.
    pub(crate) unsafe fn new() -> Result<Self> {
        // SAFETY: By the caller's promise.
        to_result(unsafe { c::kdp_shmem_init() })?;
        // INVARIANT: It has.
        Ok(Self(()))
    }
}

impl Drop for Shmem {
    fn drop(&mut self) {
        // SAFETY: It was initialised (type invariant). The module is being unloaded: no file of it is
        // open.
        unsafe { c::kdp_shmem_exit() };
    }
}

/// Whether the kernel has folios of 2 MiB for shmem.
pub(crate) fn has_huge() -> bool {
    // SAFETY: Always safe to call while the module is loaded.
    unsafe { c::kdp_shmem_has_huge() }
}

/// A new file of so many bytes. EOPNOTSUPP if the kernel has no folios of 2 MiB for it.
pub(crate) fn huge_file(bytes: u64) -> Result<RawFile> {
    let bytes = i64::try_from(bytes).map_err(|_| EINVAL)?;
    // SAFETY: Always safe to call in a process's context while the module is loaded. The file is new.
    unsafe { RawFile::of_new(c::kdp_shmem_huge_file(bytes)) }
}
