//! The threads of a session: one for each vCPU, and the handler's.

use std::collections::BTreeSet;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use kvm_demand_paging::PrefetchWindow;

use crate::error::{Error, Result};
use crate::memory::PAGE_SIZE;
use crate::paging::{Mode, Pager, ReaderThread};
use crate::vcpu::{Stop, Vcpu};

/// What one vCPU did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its number.
    pub vcpu: u64,
    /// When all vCPUs had come to [`PORT_START`](crate::PORT_START).
    pub started: Instant,
    /// What its program reported, and when.
    pub reports: Vec<(Instant, u64)>,
    /// How often its program wrote to [`PORT_TICK`](crate::PORT_TICK).
    pub ticks: u64,
    /// KVM_RUN returns with KVM_EXIT_MEMORY_FAULT.
    pub exits: u64,
    /// When its program ended.
    pub ended: Instant,
}

enum Message {
    Vcpu(u64, Result<Outcome>),
    HandlerFailed(Error),
}

/// Run every vCPU, and each of the pager's handlers, on a thread of its own until all programs have ended. The
/// outcomes are in the order of the vCPUs' numbers.
///
/// Every program must write to [`PORT_START`](crate::PORT_START) once: they all wait there for each other.
///
/// It is an error if that takes longer than `timeout`, or if for as long as `stall` no vCPU ends and no page is
/// fetched. Threads may stay behind then that wait for pages for ever: end the process after any error.
pub fn drive(
    vcpus: Vec<Vcpu>,
    pager: &Arc<dyn Pager>,
    mode: Mode,
    timeout: Duration,
    stall: Duration,
) -> Result<Vec<Outcome>> {
    let prefetch = mode.prefetch();
    let (sender, receiver) = mpsc::channel();
    let handlers = pager.clone().handlers().into_iter().map(|work| {
        let sender = sender.clone();
        ReaderThread::spawn(move |end| {
            if let Err(e) = work(end) {
                // Nobody listens any more when the session has failed for another reason.
                let _ = sender.send(Message::HandlerFailed(e));
            }
        })
    });
    let handlers = handlers.collect::<Result<Vec<_>>>()?;
    let barrier = Arc::new(Barrier::new(vcpus.len()));
    let mut running: BTreeSet<u64> = vcpus.iter().map(Vcpu::number).collect();
    for vcpu in vcpus {
        let (pager, barrier, sender) = (pager.clone(), barrier.clone(), sender.clone());
        thread::spawn(move || {
            let number = vcpu.number();
            let outcome = run_vcpu(vcpu, pager.as_ref(), prefetch, &barrier);
            let _ = sender.send(Message::Vcpu(number, outcome));
        });
    }
    let started = Instant::now();
    let mut outcomes = Vec::new();
    let mut fetched = 0;
    while !running.is_empty() {
        let left = timeout.saturating_sub(started.elapsed());
        match receiver.recv_timeout(left.min(stall)) {
            Ok(Message::Vcpu(number, outcome)) => {
                running.remove(&number);
                outcomes.push(outcome?);
            }
            Ok(Message::HandlerFailed(e)) => return Err(e),
            Err(RecvTimeoutError::Timeout)
                if left > stall && pager.counters().fetched() > fetched =>
            {
                fetched = pager.counters().fetched();
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                return Err(Error::TimedOut {
                    seconds: started.elapsed().as_secs(),
                    waiting: format!(
                        "vCPUs {running:?} still run; {} pages were fetched",
                        pager.counters().fetched()
                    ),
                })
            }
        }
    }
    handlers.into_iter().try_for_each(ReaderThread::end)?;
    outcomes.sort_by_key(|outcome| outcome.vcpu);
    Ok(outcomes)
}

fn run_vcpu(
    mut vcpu: Vcpu,
    pager: &dyn Pager,
    prefetch: u64,
    barrier: &Barrier,
) -> Result<Outcome> {
    pager.enter_vcpu_thread()?;
    let mut window = PrefetchWindow::new(prefetch);
    let now = Instant::now();
    let mut outcome = Outcome {
        vcpu: vcpu.number(),
        started: now,
        reports: Vec::new(),
        ticks: 0,
        exits: 0,
        ended: now,
    };
    loop {
        match vcpu.run()? {
            Stop::Fault(fault) => {
                outcome.exits += 1;
                let there = pager.resolve(&fault, window.fault(fault.gpa / PAGE_SIZE))?;
                vcpu.pre_fault(there.first * PAGE_SIZE, there.count * PAGE_SIZE);
            }
            Stop::Echo | Stop::Interrupted => {}
            Stop::Tick(_) => outcome.ticks += 1,
            Stop::Start => {
                barrier.wait();
                outcome.started = Instant::now();
            }
            Stop::Report(value) => outcome.reports.push((Instant::now(), value)),
            Stop::Halted => {
                outcome.ended = Instant::now();
                return Ok(outcome);
            }
        }
    }
}
