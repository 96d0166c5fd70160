//! The memory of the memslots that `kdp` creates.

use crate::cli::HugeSize;
use kvm_demand_paging::{Backing, Memfd, Result, Vm};

/// Create memory of `size` bytes.
///
/// `hugetlb` asks for hugetlb pages of that size, and `shmem_huge` for shmem in folios of 2 MiB.
/// Without either, the memory is ordinary shmem.
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
