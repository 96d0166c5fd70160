//! A session whose guest uses kvmclock: KVM itself writes to guest memory that may be absent.

use std::sync::Arc;
use std::time::Duration;

use kvm_demand_paging::Backing;

use super::drive;
use crate::error::{Error, Result};
use crate::guest::{Clock, ClockReport};
use crate::machine::Machine;
use crate::memory::PAGE_SIZE;
use crate::paging::{self, Memory, Mode};
use crate::source::Source;

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockOutcome {
    /// What the guest saw.
    pub clock: ClockReport,
    /// KVM_RUN returns with KVM_EXIT_MEMORY_FAULT.
    pub exits: u64,
    /// Events that the handler thread read.
    pub events: u64,
}

/// Run a guest with this page of its memory, whose contents are in `source`, as its kvmclock. The guest reads
/// the clock `reads` times.
pub fn run_clock(
    mode: Mode,
    backing: Backing,
    gpa: u64,
    page: u64,
    reads: u64,
    source: Arc<dyn Source>,
    timeout: Duration,
) -> Result<ClockOutcome> {
    let pages = source.pages();
    if page >= pages {
        return Err(Error::invalid(format!(
            "page {page} for the clock: memory has {pages} pages"
        )));
    }
    let pager = paging::pager(mode, &Memory::new(backing, pages * PAGE_SIZE, gpa), source)?;
    let machine = Machine::new(0)?;
    machine.map(gpa, pager.guest())?;
    let program = Clock::new(gpa + page * PAGE_SIZE, reads).program();
    let vcpus = vec![machine.vcpu(0, &program)?];
    let outcomes = drive(vcpus, &pager, mode, timeout, timeout)?;
    let outcome = &outcomes[0];
    let values: Vec<u64> = outcome.reports.iter().map(|&(_, value)| value).collect();
    let clock = ClockReport::from_reports(&values)
        .ok_or_else(|| Error::invalid(format!("the guest reported {} values", values.len())))?;
    Ok(ClockOutcome {
        clock,
        exits: outcome.exits,
        events: pager.counters().events(),
    })
}
