//! Memory that a guest, its handler and the VMM share.

use std::sync::Arc;

use clap::ValueEnum;
use kvm_demand_paging::{AliasMap, Backing, GuestMap, Memfd, PageRange};
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

/// A [`Backing`] on a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackingArg {
    /// 4 KiB pages
    Shmem,
    /// 2 MiB hugetlb pages; reserve them in /proc/sys/vm/nr_hugepages
    #[value(name = "hugetlb-2M")]
    Huge2M,
    /// 1 GiB hugetlb pages; reserve them on the kernel's command line
    #[value(name = "hugetlb-1G")]
    Huge1G,
}

impl From<BackingArg> for Backing {
    fn from(backing: BackingArg) -> Self {
        match backing {
            BackingArg::Shmem => Self::Shmem,
            BackingArg::Huge2M => Self::Huge2M,
            BackingArg::Huge1G => Self::Huge1G,
        }
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
    populate_range(map, PageRange::new(0, map.pages()))
}

/// The same for a part of it.
pub(crate) fn populate_range(map: &AliasMap, range: PageRange) -> Result<()> {
    let part = map.slice(range)?;
    let guard = part.ptr_guard_mut();
    // SAFETY: the range is the mapping's own; MADV_POPULATE_WRITE changes none of its contents.
    unsafe { madvise(guard.as_ptr().cast(), part.len(), Advice::LinuxPopulateWrite) }.map_err(|errno| {
        Error::os(
            format!(
                "populate {} bytes of memory (for hugetlb: are there enough free huge pages in /proc/meminfo?)",
                part.len()
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
