//! Memory that a guest, its handler and the VMM share.

use std::sync::Arc;

use kvm_demand_paging::{AliasMap, Backing, GuestMap, Memfd};
use rustix::mm::{madvise, Advice};
use vm_memory::volatile_memory::VolatileSlice;

use crate::error::{Error, Result};

/// The page size of everything here, whatever the backing, in bytes.
pub const PAGE_SIZE: u64 = kvm_demand_paging::PAGE_SIZE as u64;

/// The name of a backing on command lines and in JSON.
pub fn backing_name(backing: Backing) -> &'static str {
    match backing {
        Backing::Shmem => "shmem",
        Backing::Huge2M => "hugetlb-2M",
        Backing::Huge1G => "hugetlb-1G",
    }
}

/// Memory that a [`Machine`](crate::Machine) can give to its guest. Clones are the same memory.
#[derive(Clone, Debug)]
pub enum GuestMemory {
    /// A memfd, mapped directly.
    Plain(Arc<AliasMap>),
    /// A memslot of the device.
    Paged(Arc<GuestMap>),
}

impl GuestMemory {
    /// All of it, as memory that others may write to.
    pub fn volatile(&self) -> VolatileSlice<'_> {
        match self {
            Self::Plain(map) => map.volatile(),
            Self::Paged(map) => map.volatile(),
        }
    }

    /// The address of its first byte.
    pub fn addr(&self) -> u64 {
        self.volatile().ptr_guard_mut().as_ptr() as u64
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u64 {
        self.volatile().len() as u64
    }
}

impl From<AliasMap> for GuestMemory {
    fn from(map: AliasMap) -> Self {
        Self::Plain(Arc::new(map))
    }
}

impl From<GuestMap> for GuestMemory {
    fn from(map: GuestMap) -> Self {
        Self::Paged(Arc::new(map))
    }
}

/// Fault every page of a memfd's mapping in, writable, so that no later access through it faults.
pub fn populate(map: &AliasMap) -> Result<()> {
    // SAFETY: the range is the mapping's own; MADV_POPULATE_WRITE changes none of its contents.
    unsafe { madvise(map.as_ptr().cast(), map.len(), Advice::LinuxPopulateWrite) }.map_err(|errno| {
        Error::os(
            format!(
                "populate {} bytes of memory (for hugetlb: are there enough free huge pages in /proc/meminfo?)",
                map.len()
            ),
            errno,
        )
    })
}

/// Memory of this process's own, populated.
pub fn buffer(bytes: u64) -> Result<AliasMap> {
    let memfd = Memfd::create("kdp-vmm", Backing::Shmem, bytes.next_multiple_of(PAGE_SIZE))?;
    let map = memfd.map_all()?;
    populate(&map)?;
    Ok(map)
}
