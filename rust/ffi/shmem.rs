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

/// The mount of that tmpfs, which exists as long as the module is loaded.
///
/// # Invariants
///
/// `kdp_shmem_init()` has succeeded.
pub(crate) struct Shmem(());

impl Shmem {
    /// Mounts the tmpfs. If the kernel has no transparent huge pages, mounts nothing and succeeds.
    ///
    /// # Safety
    ///
    /// Call this once in the life of the loaded module, before anybody can open one of its files.
    pub(crate) unsafe fn new() -> Result<Self> {
        // SAFETY: By the caller's promise.
        to_result(unsafe { c::kdp_shmem_init() })?;
        // INVARIANT: `kdp_shmem_init()` has just succeeded.
        Ok(Self(()))
    }
}

impl Drop for Shmem {
    fn drop(&mut self) {
        // SAFETY: `kdp_shmem_init()` has succeeded (type invariant). The module is being unloaded:
        // none of its files is open.
        unsafe { c::kdp_shmem_exit() };
    }
}

/// Whether the kernel has folios of 2 MiB for shmem.
pub(crate) fn has_huge() -> bool {
    // SAFETY: Always safe to call while the module is loaded.
    unsafe { c::kdp_shmem_has_huge() }
}

/// Creates a file of that many bytes, in folios of 2 MiB. EOPNOTSUPP if the kernel has no such
/// folios.
pub(crate) fn huge_file(bytes: u64) -> Result<RawFile> {
    let bytes = i64::try_from(bytes).map_err(|_| EINVAL)?;
    // SAFETY: Always safe to call in a process's context while the module is loaded. The file is
    // new.
    unsafe { RawFile::of_new(c::kdp_shmem_huge_file(bytes)) }
}
