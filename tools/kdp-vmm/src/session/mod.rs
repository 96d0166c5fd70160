//! A session: one guest, run once over memory of a chosen mode, measured and verified.

mod clock;
mod drive;

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use kvm_demand_paging::{Backing, PageRange};

pub use self::clock::{run_clock, ClockOutcome};
pub use self::drive::{drive, Outcome};
use crate::error::{Error, Result};
pub use crate::guest::BLOCK;
use crate::guest::{Order, Touch};
use crate::machine::{Machine, MAX_GPA, MAX_VCPUS, MIN_GPA, SCRATCH_GPA};
use crate::memory::{backing_name, PAGE_SIZE};
use crate::paging::{self, Memory, Mode, Pager};
use crate::source::Source;
use crate::verify;

/// The order in which each vCPU visits its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Pattern {
    /// Shuffled, the same with the same seed
    Random,
    /// From the first page to the last
    Sequential,
}

impl Pattern {
    /// The name used on command lines and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Sequential => "sequential",
        }
    }

    /// This order of `count` pages.
    pub fn order(self, count: u64, seed: u64) -> Order {
        match self {
            Self::Random => Order::random(count, seed),
            Self::Sequential => Order::sequential(count),
        }
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// How memory is filled.
    pub mode: Mode,
    /// What it is made of.
    pub backing: Backing,
    /// Guest memory in bytes.
    pub bytes: u64,
    /// vCPUs; each visits its own share of the pages.
    pub vcpus: u64,
    /// In which order.
    pub pattern: Pattern,
    /// Which shuffle.
    pub seed: u64,
    /// Write to every page, too.
    pub write: bool,
    /// Read every word of each page, not just the first.
    pub whole_pages: bool,
    /// Visit only every so many pages.
    pub stride: u64,
    /// Visit only the first so many pages of the memory.
    pub extent: Option<u64>,
    /// Visit only so many pages, in whole blocks of [`BLOCK`] pages that are spread over the memory.
    pub visit: Option<u64>,
    /// Rounds over all pages: the first one pages them in.
    pub rounds: u64,
    /// Where the guest has the memory.
    pub gpa: u64,
    /// Measure the latency of each first access, by the guest's TSC.
    pub samples: bool,
    /// Handler threads, in modes that have them.
    pub readers: u64,
    /// How long the guest may take.
    pub timeout: Duration,
    /// How long it may take from one page to the next: a guest that is lost comes no further.
    pub stall: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::Exit,
            backing: Backing::Shmem,
            bytes: 64 << 20,
            vcpus: 1,
            pattern: Pattern::Random,
            seed: 1,
            write: false,
            whole_pages: true,
            stride: 1,
            extent: None,
            visit: None,
            rounds: 1,
            gpa: MIN_GPA,
            samples: true,
            readers: 1,
            timeout: Duration::from_secs(600),
            stall: Duration::from_secs(600),
        }
    }
}

impl Config {
    fn check(&self, source: &dyn Source) -> Result<()> {
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(Error::invalid(format!(
                "{} vCPUs: take 1 to {MAX_VCPUS}",
                self.vcpus
            )));
        }
        let unit = self.backing.page_size();
        if self.bytes == 0 || self.bytes % unit != 0 {
            return Err(Error::invalid(format!(
                "{} bytes of memory on {}: it must be a multiple of {unit} and not 0",
                self.bytes,
                backing_name(self.backing)
            )));
        }
        if self.gpa.saturating_add(self.bytes) > MAX_GPA {
            return Err(Error::invalid(format!(
                "{} bytes of memory at {:#x}: the guest can address {MAX_GPA} bytes",
                self.bytes, self.gpa
            )));
        }
        if let Some(visit) = self.visit {
            let whole = visit % (BLOCK * self.vcpus) == 0 && self.bytes % (BLOCK * PAGE_SIZE) == 0;
            if !whole || visit == 0 || visit > self.bytes / PAGE_SIZE || self.stride != 1 {
                return Err(Error::invalid(format!(
                    "{visit} pages to visit of {} bytes by {} vCPUs: each must have whole blocks of {BLOCK} pages, \
                     and every page of them",
                    self.bytes, self.vcpus
                )));
            }
        }
        if self.stride == 0 || self.pages_visited() / self.vcpus == 0 {
            return Err(Error::invalid(format!(
                "{} pages, of which every {}th is visited, are too few for {} vCPUs",
                self.extent(),
                self.stride,
                self.vcpus
            )));
        }
        if source.pages() < self.bytes / PAGE_SIZE {
            return Err(Error::invalid(format!(
                "the source has {} pages, fewer than the {} of guest memory",
                source.pages(),
                self.bytes / PAGE_SIZE
            )));
        }
        Ok(())
    }

    /// Pages among which those that are visited are.
    fn extent(&self) -> u64 {
        let pages = self.bytes / PAGE_SIZE;
        self.extent.map_or(pages, |extent| extent.min(pages))
    }

    fn pages_visited(&self) -> u64 {
        let all = self.extent().checked_div(self.stride);
        self.visit.or(all).unwrap_or(0)
    }

    /// Pages from the start of a block of visited pages to the start of the next.
    fn block_distance(&self) -> u64 {
        let blocks = |pages: u64| (pages / BLOCK).max(1);
        self.visit.map_or(BLOCK, |visit| {
            blocks(self.bytes / PAGE_SIZE) / blocks(visit) * BLOCK
        })
    }

    /// What the guest will visit.
    fn used(&self) -> Vec<PageRange> {
        match self.visit {
            None => vec![PageRange::new(0, self.extent())],
            Some(visit) => (0..visit / BLOCK)
                .map(|n| PageRange::new(n * self.block_distance(), BLOCK))
                .collect(),
        }
    }

    /// The work of one vCPU: a contiguous share of the pages, the last one's with the remainder.
    fn touch(&self, vcpu: u64) -> Touch {
        let visited = self.pages_visited();
        let share = visited / self.vcpus;
        let first = vcpu * share;
        let count = if vcpu + 1 == self.vcpus {
            visited - first
        } else {
            share
        };
        let mut touch = Touch::new(self.gpa, self.pattern.order(count, self.seed + vcpu))
            .first(match self.visit {
                None => first * self.stride,
                Some(_) => first / BLOCK * self.block_distance(),
            })
            .stride(self.stride)
            .block_distance(self.block_distance())
            .rounds(self.rounds);
        if self.write {
            touch = touch.write(self.seed);
        }
        if self.whole_pages {
            touch = touch.hash();
        }
        touch
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Pages that the guest visited in each round.
    pub visited: u64,
    /// The first round's time.
    pub elapsed: Duration,
    /// Later rounds' times: everything is there.
    pub later: Vec<Duration>,
    /// KVM_RUN returns with KVM_EXIT_MEMORY_FAULT.
    pub exits: u64,
    /// Events that a handler thread read.
    pub events: u64,
    /// Faults' worth of memory fetched, in units of [`Mode::fault_bytes`].
    pub fetched: u64,
    /// The same, in pages of 4 KiB.
    pub pages_fetched: u64,
    /// Of those, pages that the guest never touched. All that it touched were fetched, or the checksum is wrong.
    pub pages_unneeded: u64,
    /// Latencies of the first round's first accesses in microseconds, sorted; empty without samples.
    pub latencies: Vec<f64>,
    /// What the guest computed in each round.
    pub checksums: Vec<u64>,
    /// What it should have been.
    pub expected: u64,
    /// Is guest memory, seen from the host, what it should be now?
    pub memory_ok: bool,
}

impl Report {
    /// Did the guest see the source's contents, and nothing else, in every round?
    pub fn correct(&self) -> bool {
        self.memory_ok && self.checksums.iter().all(|&sum| sum == self.expected)
    }

    /// Microseconds for each visited page.
    pub fn us_per_page(&self) -> f64 {
        self.elapsed.as_secs_f64() * 1e6 / self.visited as f64
    }

    /// The latency that this part of the accesses stayed below or at, in microseconds.
    pub fn latency(&self, quantile: f64) -> Option<f64> {
        let last = self.latencies.len().checked_sub(1)?;
        self.latencies
            .get((last as f64 * quantile).round() as usize)
            .copied()
    }
}

/// Run a guest over memory whose contents are in `source`.
///
/// If this fails while the guest runs, threads may stay behind that wait for pages for ever: end the
/// process then.
pub fn run(config: &Config, source: Arc<dyn Source>) -> Result<Report> {
    config.check(source.as_ref())?;
    let memory = Memory {
        used: config.used(),
        readers: config.readers,
        ..Memory::new(config.backing, config.bytes, config.gpa)
    };
    let pager = paging::pager(config.mode, &memory, source.clone())?;
    let touches: Vec<Touch> = (0..config.vcpus).map(|n| config.touch(n)).collect();
    let mut scratch = SCRATCH_GPA;
    let samples: Vec<u64> = touches
        .iter()
        .map(|touch| {
            let at = scratch;
            scratch += (touch.count() * 4).next_multiple_of(PAGE_SIZE);
            at
        })
        .collect();
    let machine = Machine::new(scratch - SCRATCH_GPA)?;
    machine.map(config.gpa, pager.guest())?;
    let mut vcpus = Vec::new();
    for ((n, touch), &at) in (0..).zip(&touches).zip(&samples) {
        let touch = touch.clone().samples(if config.samples { at } else { 0 });
        vcpus.push(machine.vcpu(n, &touch.program())?);
    }
    let khz = vcpus[0].tsc_khz()?;

    let outcomes = drive(vcpus, &pager, config.mode, config.timeout, config.stall)?;

    let mut latencies = Vec::new();
    if config.samples {
        for (touch, &at) in touches.iter().zip(&samples) {
            let mut raw = vec![0; (touch.count() * 4) as usize];
            machine.read_low(at, &mut raw)?;
            let ticks = raw.chunks_exact(4).map(|t| {
                let mut ticks = [0; 4];
                ticks.copy_from_slice(t);
                f64::from(u32::from_le_bytes(ticks))
            });
            latencies.extend(ticks.map(|t| t * 1e3 / f64::from(khz)));
        }
        latencies.sort_by(f64::total_cmp);
    }
    let verdict = verify::verify(&touches, source.as_ref(), pager.alias())?;
    Ok(report(
        config,
        pager.as_ref(),
        &outcomes,
        latencies,
        &verdict,
    ))
}

fn report(
    config: &Config,
    pager: &dyn Pager,
    outcomes: &[Outcome],
    latencies: Vec<f64>,
    verdict: &verify::Verdict,
) -> Report {
    let rounds = config.rounds.max(1) as usize;
    let ends: Vec<Instant> = (0..rounds)
        .filter_map(|round| outcomes.iter().map(|o| o.reports[round].0).max())
        .collect();
    let started = outcomes.iter().map(|o| o.started).min();
    let fetched = pager.counters().fetched();
    let pages_fetched = fetched * (config.mode.fault_bytes(config.backing) / PAGE_SIZE);
    Report {
        visited: config.pages_visited(),
        elapsed: started.map_or(Duration::ZERO, |started| ends[0] - started),
        later: ends.windows(2).map(|pair| pair[1] - pair[0]).collect(),
        exits: outcomes.iter().map(|o| o.exits).sum(),
        events: pager.counters().events(),
        fetched,
        pages_fetched,
        pages_unneeded: pages_fetched.saturating_sub(config.pages_visited()),
        latencies,
        checksums: (0..rounds)
            .map(|round| {
                let sums = outcomes.iter().map(|o| o.reports[round].1);
                sums.fold(0, u64::wrapping_add)
            })
            .collect(),
        expected: verdict.checksum,
        memory_ok: verdict.memory_ok,
    }
}
