//! The memory of the memslots that `kdp` creates.

use crate::cli::HugeSize;
use kvm_demand_paging::{Backing, Memfd, Result, Vm};

/// Create the memory that the options ask for, of `size` bytes: of hugetlb pages, of shmem in folios of 2 MiB,
/// or else of shmem.
pub fn create(
    vm: &Vm,
    name: &str,
    hugetlb: Option<HugeSize>,
    shmem_huge: bool,
    size: u64,
) -> Result<Memfd> {
    if shmem_huge {
        return Memfd::create_huge_shmem(vm, size);
    }
    Memfd::create(name, hugetlb.map_or(Backing::Shmem, Backing::from), size)
}
