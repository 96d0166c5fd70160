//! The measurements, each taken once.

use std::sync::Arc;
use std::time::Instant;

use kdp_vmm::session::{self, Config, Pattern, Report};
use kdp_vmm::{
    backing_name, populate, Backing, GuestProgram, Image, Machine, Mode, Source, Stop, MIN_GPA,
    PAGE_SIZE,
};
use kvm_demand_paging::{Memfd, PageRange};

use crate::Error;

/// What is common to the runs of one mode.
#[derive(Clone, Copy)]
pub struct Case {
    pub mode: Mode,
    pub backing: Backing,
    pub pattern: Pattern,
    pub pages: u64,
}

impl Case {
    /// Visit one page in so many: each visit must be a fault.
    fn stride(&self) -> u64 {
        self.mode.fault_bytes(self.backing) / PAGE_SIZE
    }
}

/// Run a guest once that reads a word of each page.
pub fn guest(case: &Case, image: &Arc<Image>) -> Result<Report, Error> {
    // The floor is made of stage-2 faults of 4 KiB. KVM maps huge pages where it can; it cannot where the
    // guest's address and the host's are out of step.
    let out_of_step = case.mode == Mode::Floor && case.backing != Backing::Shmem;
    let config = Config {
        mode: case.mode,
        backing: case.backing,
        bytes: case.pages * PAGE_SIZE,
        vcpus: 1,
        pattern: case.pattern,
        stride: case.stride(),
        whole_pages: false,
        gpa: MIN_GPA + if out_of_step { PAGE_SIZE } else { 0 },
        ..Config::default()
    };
    let named = |source| Error::Measure {
        mode: case.mode.name(),
        backing: backing_name(case.backing),
        pattern: case.pattern.name(),
        pages: case.pages,
        source: Box::new(source),
    };
    let report = session::run(&config, image.clone()).map_err(named)?;
    if !report.correct() {
        return Err(Error::Wrong {
            what: format!("{} on {}", case.mode.name(), backing_name(case.backing)),
        });
    }
    Ok(report)
}

/// Microseconds of one write to a port: from the guest to the VMM and back.
pub fn round_trip(count: u64) -> Result<f64, Error> {
    let machine = Machine::new(0)?;
    let mut vcpu = machine.vcpu(0, &GuestProgram::echo(count))?;
    let mut started = Instant::now();
    loop {
        match vcpu.run()? {
            Stop::Start => started = Instant::now(),
            Stop::Halted => return Ok(started.elapsed().as_secs_f64() * 1e6 / count as f64),
            _ => {}
        }
    }
}

/// Microseconds of copying one page of the image to memory of this backing that is in place.
pub fn copy(backing: Backing, pattern: Pattern, pages: u64, image: &Image) -> Result<f64, Error> {
    let memory = Memfd::create("kdp-bench-copy", backing, pages * PAGE_SIZE)?.map_all()?;
    populate(&memory)?;
    let order = pattern.order(pages, Config::default().seed);
    let started = Instant::now();
    for page in order.iter() {
        let range = PageRange::page(page);
        image.fetch(range, &memory.slice(range)?)?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / pages as f64)
}
