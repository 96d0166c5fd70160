//! The measurements, each taken once, each in a process of its own.
//!
//! A guest that is lost (which happens to guests inside an emulated machine, whoever pages them) leaves threads that
//! wait for ever: they end with its process, and the measurement is taken again.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kdp_vmm::session::{self, Config, Report};
use kdp_vmm::{
    populate, Backing, GuestProgram, Image, Machine, Mode, Source, Stop, MIN_GPA, PAGE_SIZE,
};
use kvm_demand_paging::{Memfd, PageRange};
use serde::{Deserialize, Serialize};

use crate::case::Case;
use crate::link::Link;
use crate::memory_error;
use crate::stats::{median, QUANTILES};
use crate::Error;

/// How often a measurement is tried.
const ATTEMPTS: usize = 3;

/// What one process measures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Job {
    /// A guest's run.
    Guest(Case),
    /// Writes to a port: from the guest to the VMM and back.
    RoundTrip { writes: u64 },
    /// Copying the pages that the guest of this case visits, to memory of its backing that is in place.
    Copy(Case),
    /// A memory error in a huge page of this size: in a memslot of ours, or in plain memory.
    MemoryError { page_size: u64, ours: bool },
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Microseconds for each page, or write.
    pub us: f64,
    /// Pages that the guest visited.
    pub visited: u64,
    pub exits: u64,
    pub events: u64,
    /// Pages that were fetched.
    pub fetched: u64,
    /// What one access took in microseconds, at each of [`QUANTILES`].
    pub quantiles: Vec<f64>,
    /// Of a memory error.
    pub memory_error: Option<memory_error::Sample>,
}

/// Let a process of its own do this. None if it failed again and again: that has been told then.
pub fn measure(job: &Job, text: &str) -> Result<Option<Sample>, Error> {
    let io = |source| Error::Io {
        what: "start a process that measures".to_owned(),
        source,
    };
    let json = |source| Error::Json {
        file: format!("what was measured of {text}"),
        source,
    };
    let argument = serde_json::to_string(job).map_err(json)?;
    for attempt in 1..=ATTEMPTS {
        let output = Command::new("/proc/self/exe")
            .args(["measure", &argument])
            .stderr(Stdio::inherit())
            .output()
            .map_err(io)?;
        if output.status.success() {
            return serde_json::from_slice(&output.stdout)
                .map(Some)
                .map_err(json);
        }
        eprintln!("{text}: attempt {attempt} of {ATTEMPTS} failed.");
    }
    Ok(None)
}

/// Do it here.
pub fn run(job: &Job) -> Result<Sample, Error> {
    match job {
        Job::Guest(case) => guest(case),
        Job::RoundTrip { writes } => round_trip(*writes),
        Job::Copy(case) => copy(case),
        Job::MemoryError { page_size, ours } => {
            let backing = Backing::of_page_size(*page_size).ok_or_else(|| {
                kdp_vmm::Error::Invalid(format!("there is no memory of pages of {page_size} bytes"))
            })?;
            Ok(Sample {
                memory_error: Some(memory_error::sample(backing, *ours)?),
                ..Sample::default()
            })
        }
    }
}

fn config(case: &Case) -> Config {
    // The floor is made of stage-2 faults of 4 KiB. KVM maps huge pages where it can; it cannot where the
    // guest's address and the host's are out of step.
    let out_of_step =
        case.mode == Mode::Floor && case.backing() != Backing::Shmem && case.rounds == 0;
    Config {
        mode: case.mode,
        backing: case.backing(),
        bytes: case.bytes,
        vcpus: case.vcpus,
        readers: case.readers.max(1),
        pattern: case.pattern,
        stride: case.stride(),
        visit: case.visit,
        // Round 1 pages the memory in; in round 2 the last blocks may still become huge mappings.
        rounds: match case.rounds {
            0 => 1,
            rounds => rounds + 2,
        },
        whole_pages: false,
        gpa: MIN_GPA + if out_of_step { PAGE_SIZE } else { 0 },
        // A fault of 1 GiB takes half a minute when it is emulated.
        stall: Duration::from_secs(if case.fault_bytes() >> 30 == 0 {
            20
        } else {
            180
        }),
        ..Config::default()
    }
}

/// Run a guest once that reads a word of each page.
fn guest(case: &Case) -> Result<Sample, Error> {
    let image = Image::repeating(case.bytes, 1)?;
    let source: Arc<dyn Source> = match case.link_gbit {
        Some(gbit) => Arc::new(Link::new(image, gbit)),
        None => Arc::new(image),
    };
    let report = session::run(&config(case), source).map_err(|source| Error::Measure {
        what: case.text(),
        source: Box::new(source),
    })?;
    if !report.correct() {
        return Err(Error::Wrong { what: case.text() });
    }
    Ok(sample(case, &report))
}

fn sample(case: &Case, report: &Report) -> Sample {
    let us = match case.rounds {
        0 => report.us_per_page(),
        _ => {
            let rounds = report.later.iter().skip(1);
            median(rounds.map(|time| time.as_secs_f64() * 1e6)) / report.visited as f64
        }
    };
    // The guest's samples end at 2^32 ticks, and one access of all that there are is in `us`.
    let latency = |quantile| match (case.rounds, report.visited) {
        (0, 2..) => report.latency(quantile).unwrap_or(us),
        _ => us,
    };
    Sample {
        us,
        visited: report.visited,
        exits: report.exits,
        events: report.events,
        fetched: report.pages_fetched,
        quantiles: QUANTILES.map(latency).to_vec(),
        memory_error: None,
    }
}

fn round_trip(writes: u64) -> Result<Sample, Error> {
    let machine = Machine::new(0)?;
    let mut vcpu = machine.vcpu(0, &GuestProgram::echo(writes))?;
    let mut started = Instant::now();
    loop {
        match vcpu.run()? {
            Stop::Start => started = Instant::now(),
            Stop::Halted => {
                return Ok(Sample {
                    us: started.elapsed().as_secs_f64() * 1e6 / writes as f64,
                    ..Sample::default()
                })
            }
            _ => {}
        }
    }
}

fn copy(case: &Case) -> Result<Sample, Error> {
    let image = Image::repeating(case.bytes, 1)?;
    let memory = Memfd::create("kdp-bench-copy", case.backing(), case.bytes)?.map_all()?;
    populate(&memory)?;
    let pages = case.visit.unwrap_or(case.bytes / PAGE_SIZE);
    let order = case.pattern.order(pages, Config::default().seed);
    let started = Instant::now();
    for page in order.iter() {
        let range = PageRange::page(page);
        image.fetch(range, &memory.slice(range)?)?;
    }
    Ok(Sample {
        us: started.elapsed().as_secs_f64() * 1e6 / pages as f64,
        ..Sample::default()
    })
}
