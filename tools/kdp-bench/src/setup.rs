//! What making a memslot costs, which must not depend on its size.

use std::time::Instant;

use kdp_vmm::{Backing, MIN_GPA, PAGE_SIZE};
use kvm_demand_paging::{Memfd, Vm};

use crate::row::{Clock, Row};
use crate::stats::{median, range};
use crate::Error;

/// Sizes in bytes. The memory is sparse: none of it is ever touched.
pub const SIZES: [u64; 4] = [64 << 20, 1 << 30, 8 << 30, 64 << 30];

/// Microseconds to create a memslot of this size with demand paging on, and to map it and its bitmap.
pub fn once(bytes: u64) -> Result<f64, Error> {
    let memfd = Memfd::create("kdp-bench-setup", Backing::Shmem, bytes)?;
    let vm = Vm::open()?;
    let started = Instant::now();
    let memslot = vm
        .create_memslot(0, &memfd)
        .base_gfn(MIN_GPA / PAGE_SIZE)
        .paging(true)
        .create()?;
    let guest = memslot.map()?;
    let bitmap = memslot.bitmap()?;
    let elapsed = started.elapsed();
    drop((guest, bitmap));
    Ok(elapsed.as_secs_f64() * 1e6)
}

/// The row for `us`, the microseconds of several times.
pub fn row(bytes: u64, clock: Clock, us: &mut [f64]) -> Row {
    us.sort_by(f64::total_cmp);
    let pages = bytes / PAGE_SIZE;
    let p50 = median(us.iter().copied());
    let p99 = us[(us.len() - 1) * 99 / 100];
    Row {
        mode: "setup".to_owned(),
        backing: "shmem".to_owned(),
        pattern: "sequential".to_owned(),
        vcpus: 1,
        readers: 0,
        link_gbit: None,
        bytes,
        clock,
        us_per_page: p50 / pages as f64,
        pages_per_s: pages as f64 * 1e6 / p50,
        p50_us: p50,
        p99_us: p99,
        exits: 0,
        events: 0,
        pages,
        pages_fetched: 0,
        pages_unneeded: 0,
        fault_bytes: PAGE_SIZE,
        runs: us.len(),
        us_per_page_range: range(us.iter().map(|us| us / pages as f64)),
        cdf: Vec::new(),
        machine: None,
        parts: None,
        damage: None,
    }
}
