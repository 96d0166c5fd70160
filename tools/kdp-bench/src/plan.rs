//! Which measurements are taken, how often and in which order.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use kdp_vmm::session::Pattern;
use kdp_vmm::{backing_name, Backing, BackingArg, MemoryErrors, Mode, PAGE_SIZE};

use crate::args::{RunArgs, Series};
use crate::case::Case;
use crate::kernel_test;
use crate::machine::Machine;
use crate::measure::{measure, Job, Sample};
use crate::memory_error;
use crate::row::{Clock, Parts, Row};
use crate::setup;
use crate::stats::{median, range, QUANTILES};
use crate::Error;

/// How often the set-up of a memslot is measured.
const SETUPS: usize = 60;

/// Writes to a port in one measurement of the round trip.
const ECHOES: u64 = 2_000;

/// Pages that are visited again and again where memory is complete, and how often. More than the others visit, as a
/// visit there is a thousand times faster.
const LOOP_PAGES: u64 = 16_384;
const LOOP_ROUNDS: u64 = 31;

/// The backings to compare by default, and what reserves their pages.
const BACKINGS: [(BackingArg, &str); 3] = [
    (BackingArg::Shmem, ""),
    (BackingArg::Huge2M, "hugepages-2048kB"),
    (BackingArg::Huge1G, "hugepages-1048576kB"),
];

/// One thing to measure, and how often.
struct Step {
    what: What,
    runs: usize,
}

enum What {
    Guest(Case),
    /// The round trip that the limit adds to the floor.
    RoundTrip,
    /// The copy that it adds, for this floor.
    Copy(Case),
    Kernel {
        mode: (&'static str, &'static str),
        vcpus: u64,
    },
    MemoryError {
        backing: Backing,
        ours: bool,
    },
}

impl What {
    fn text(&self) -> String {
        match self {
            Self::Guest(case) => case.text(),
            Self::RoundTrip => "a round trip to the VMM".to_owned(),
            Self::Copy(case) => format!("copies on {}", backing_name(case.backing())),
            Self::Kernel { mode, vcpus } => format!("{}, {vcpus} vCPU", mode.1),
            Self::MemoryError { backing, ours } => format!(
                "a memory error on {}, {} us",
                backing_name(*backing),
                if *ours { "with" } else { "without" }
            ),
        }
    }
}

struct Plan {
    clock: Clock,
    quick: bool,
    runs: Option<usize>,
    series: Vec<Series>,
    modes: Vec<Mode>,
    backings: Vec<BackingArg>,
    patterns: Vec<Pattern>,
    pages: u64,
    kernel_test: Option<PathBuf>,
}

impl Plan {
    fn new(args: &RunArgs) -> Result<Self, Error> {
        if args.pages == 0 || args.pages % 4096 != 0 {
            return Err(kdp_vmm::Error::Invalid(format!(
                "--pages {}: it must be a multiple of 4096, whole huge pages for 8 vCPUs, and not 0",
                args.pages
            ))
            .into());
        }
        let series = match (&args.series, &args.modes) {
            (Some(series), _) => series.clone(),
            (None, Some(_)) => vec![Series::Base],
            (None, None) => Series::value_variants().to_vec(),
        };
        Ok(Self {
            clock: args.clock,
            quick: args.quick,
            runs: args.runs,
            series: series
                .into_iter()
                .filter(|&series| args.series.is_some() || usual(series, args))
                .collect(),
            modes: args
                .modes
                .clone()
                .unwrap_or_else(|| Mode::value_variants().to_vec()),
            backings: args
                .backings
                .clone()
                .unwrap_or_else(|| backings(args.quick)),
            patterns: args
                .patterns
                .clone()
                .unwrap_or_else(|| Pattern::value_variants().to_vec()),
            pages: args.pages,
            kernel_test: args.kernel_test.clone(),
        })
    }

    fn has(&self, series: Series) -> bool {
        self.series.contains(&series)
    }

    fn has_backing(&self, backing: BackingArg) -> bool {
        self.backings.contains(&backing)
    }

    /// How often something is measured whose ratio is asked for, and how often something else: instructions repeat,
    /// time does not.
    fn runs(&self, asked_for: bool) -> usize {
        let usual = match (self.quick, self.clock, asked_for) {
            (true, Clock::Time, true) => 3,
            (true, _, _) => 1,
            (false, _, true) => 5,
            (false, Clock::Time, false) => 3,
            (false, Clock::Icount, false) => 1,
        };
        self.runs.unwrap_or(usual).max(1)
    }

    fn guest(&self, steps: &mut Vec<Step>, case: Case, asked_for: bool) {
        if self.modes.contains(&case.mode) && self.has_backing(case.backing) {
            steps.push(Step {
                what: What::Guest(case),
                runs: self.runs(asked_for),
            });
        }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.has(Series::Base) {
            self.base(&mut steps);
        }
        if self.has(Series::Vcpus) {
            self.vcpus(&mut steps);
        }
        if self.has(Series::Sizes) {
            self.sizes(&mut steps);
        }
        if self.has(Series::Loop) {
            self.loops(&mut steps);
        }
        if self.has(Series::Link) {
            self.links(&mut steps);
        }
        if self.has(Series::Kernel) {
            self.kernel(&mut steps);
        }
        if self.has(Series::MemoryErrors) {
            self.memory_errors(&mut steps);
        }
        steps
    }

    /// The guest's memory, of which as many pages are visited as of any other.
    fn base_case(&self, mode: Mode, backing: BackingArg, pattern: Pattern) -> Case {
        let bytes = self.pages * PAGE_SIZE;
        let case = Case::new(mode, backing, pattern, bytes);
        let unit = case.backing().page_size();
        if bytes % unit == 0 {
            return case;
        }
        // One page is larger than what is visited: of that the guest visits a part, unless a fault brings it all.
        Case {
            bytes: bytes.next_multiple_of(unit),
            visit: (case.fault_bytes() < unit).then_some(self.pages),
            ..case
        }
    }

    fn base(&self, steps: &mut Vec<Step>) {
        for &pattern in &self.patterns {
            for &backing in &self.backings {
                for &mode in &self.modes {
                    let case = self.base_case(mode, backing, pattern);
                    if case.fault_bytes() >= case.bytes {
                        // Whatever the order, it is one fault, which takes half a minute when it is emulated.
                        if pattern == Pattern::Random && !self.quick {
                            let runs = self.runs.unwrap_or(1);
                            steps.push(Step {
                                what: What::Guest(case),
                                runs,
                            });
                        }
                        continue;
                    }
                    // In instructions nobody asks for these.
                    let beside = matches!(mode, Mode::Prefetch | Mode::Wait | Mode::UffdMinor);
                    let asked_for =
                        backing != BackingArg::Huge1G && (self.clock == Clock::Time || !beside);
                    self.guest(steps, case, asked_for);
                    if mode == Mode::Floor {
                        let runs = self.runs(asked_for);
                        steps.push(Step {
                            what: What::Copy(case),
                            runs,
                        });
                    }
                }
            }
        }
        if self.modes.contains(&Mode::Floor) {
            let runs = self.runs(true);
            steps.push(Step {
                what: What::RoundTrip,
                runs,
            });
        }
    }

    fn vcpus(&self, steps: &mut Vec<Step>) {
        let backings = [BackingArg::Shmem, BackingArg::Huge2M];
        for vcpus in [2, 4, 8] {
            for &backing in &backings {
                for &mode in self.modes.iter().filter(|&&mode| mode != Mode::Prefetch) {
                    let case = self.base_case(mode, backing, Pattern::Random);
                    let case = Case { vcpus, ..case };
                    let asked_for = vcpus == 8 && matches!(mode, Mode::Exit | Mode::UffdMissing);
                    self.guest(steps, case, asked_for);
                    if matches!(mode, Mode::UffdMissing | Mode::UffdMinor) {
                        let readers = vcpus;
                        self.guest(steps, Case { readers, ..case }, asked_for);
                    }
                }
            }
        }
    }

    /// On shmem, which may be larger than the machine's memory.
    fn sizes(&self, steps: &mut Vec<Step>) {
        for bytes in [64 << 20, 1 << 30, 8 << 30] {
            for &mode in self.modes.iter().filter(|&&mode| mode != Mode::Prefetch) {
                let asked_for = bytes != 1 << 30 && matches!(mode, Mode::Floor | Mode::Exit);
                if !self.quick || asked_for {
                    let case = Case::new(mode, BackingArg::Shmem, Pattern::Random, bytes);
                    let visit = Some(self.pages);
                    self.guest(steps, Case { visit, ..case }, asked_for);
                }
            }
        }
    }

    fn loops(&self, steps: &mut Vec<Step>) {
        for backing in [BackingArg::Shmem, BackingArg::Huge2M] {
            for mode in [Mode::Floor, Mode::Exit] {
                let bytes = LOOP_PAGES * PAGE_SIZE;
                let case = Case::new(mode, backing, Pattern::Random, bytes);
                let rounds = LOOP_ROUNDS;
                self.guest(steps, Case { rounds, ..case }, true);
            }
        }
    }

    fn links(&self, steps: &mut Vec<Step>) {
        for gbit in [1, 10, 25] {
            for backing in [BackingArg::Huge2M, BackingArg::Huge1G] {
                for mode in [Mode::Exit, Mode::UffdMissing] {
                    let case = Case {
                        link_gbit: Some(gbit),
                        visit: None,
                        ..self.base_case(mode, backing, Pattern::Random)
                    };
                    let runs = match case.fault_bytes() >= case.bytes {
                        true => self.runs.unwrap_or(1),
                        false => self.runs(true),
                    };
                    if self.modes.contains(&mode) && self.has_backing(backing) {
                        steps.push(Step {
                            what: What::Guest(case),
                            runs,
                        });
                    }
                }
            }
        }
    }

    fn kernel(&self, steps: &mut Vec<Step>) {
        if self.kernel_test.is_none() {
            return;
        }
        for mode in kernel_test::MODES {
            let runs = self.runs(false);
            steps.push(Step {
                what: What::Kernel { mode, vcpus: 1 },
                runs,
            });
            if self.clock == Clock::Time {
                steps.push(Step {
                    what: What::Kernel { mode, vcpus: 8 },
                    runs,
                });
            }
        }
    }

    fn memory_errors(&self, steps: &mut Vec<Step>) {
        // 1 GiB takes a while to fill, to read and to replace, and its replacement has 4,096 parts to wait for.
        let runs = [
            (BackingArg::Huge2M, self.runs(true)),
            (BackingArg::Huge1G, self.runs.unwrap_or(1)),
        ];
        for (backing, runs) in runs {
            if self.has_backing(backing) {
                steps.extend([false, true].map(|ours| Step {
                    what: What::MemoryError {
                        backing: backing.into(),
                        ours,
                    },
                    runs,
                }));
            }
        }
    }

    fn take(&self, what: &What) -> Result<Option<Sample>, Error> {
        let text = what.text();
        match what {
            What::Guest(case) => measure(&Job::Guest(*case), &text),
            What::RoundTrip => measure(&Job::RoundTrip { writes: ECHOES }, &text),
            What::Copy(case) => measure(&Job::Copy(*case), &text),
            What::MemoryError { backing, ours } => {
                let (page_size, ours) = (backing.page_size(), *ours);
                measure(&Job::MemoryError { page_size, ours }, &text)
            }
            What::Kernel { mode, vcpus } => match &self.kernel_test {
                Some(program) => kernel_test::run(program, mode.0, *vcpus, self.pages * PAGE_SIZE),
                None => Ok(None),
            },
        }
    }
}

/// What is measured when nobody says what. A link is simulated in time. One CPU, which is what counts instructions,
/// says nothing about several vCPUs. Memory errors need a kernel that makes some.
fn usual(series: Series, args: &RunArgs) -> bool {
    match series {
        Series::Base | Series::Loop | Series::Sizes | Series::Setup => true,
        Series::Kernel => !args.quick,
        Series::Vcpus | Series::Link => !args.quick && args.clock == Clock::Time,
        Series::MemoryErrors => args.clock == Clock::Time && MemoryErrors::are_possible(),
    }
}

/// Those that the machine has pages for; 1 GiB takes a while to clear.
fn backings(quick: bool) -> Vec<BackingArg> {
    let reserved = |size: &str| {
        let file = format!("/sys/kernel/mm/hugepages/{size}/free_hugepages");
        let text = fs::read_to_string(file).unwrap_or_default();
        text.trim().parse().unwrap_or(0_u64)
    };
    let there = BACKINGS.iter().filter(|(backing, size)| match backing {
        BackingArg::Shmem => true,
        BackingArg::Huge2M => reserved(size) > 0,
        BackingArg::Huge1G => reserved(size) > 0 && !quick,
    });
    there.map(|&(backing, _)| backing).collect()
}

/// What was measured.
pub struct Outcome {
    pub rows: Vec<Row>,
    /// Rows that are not there because nothing could be measured for them.
    pub missing: usize,
}

/// Measure everything, taking turns, so that what disturbs the machine for a while disturbs all alike.
pub fn run(args: &RunArgs) -> Result<Outcome, Error> {
    let plan = Plan::new(args)?;
    let steps = plan.steps();
    let progress = Progress::new(steps.iter().map(|step| step.runs).sum());
    let mut rows = Vec::new();
    if plan.has(Series::Setup) {
        rows.extend(set_ups(plan.clock)?);
    }
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); steps.len()];
    let most = steps.iter().map(|step| step.runs).max().unwrap_or(0);
    for run in 1..=most {
        for (step, samples) in steps.iter().zip(&mut samples) {
            if run > step.runs {
                continue;
            }
            progress.step(&format!("run {run}: {}", step.what.text()));
            samples.extend(plan.take(&step.what)?);
        }
    }
    progress.done();
    let missing = samples.iter().filter(|samples| samples.is_empty()).count();
    rows.extend(to_rows(&plan, &steps, &samples));
    let machine = Machine::here();
    for row in &mut rows {
        row.machine = Some(machine.clone());
    }
    Ok(Outcome { rows, missing })
}

fn set_ups(clock: Clock) -> Result<Vec<Row>, Error> {
    let mut times = setup::SIZES.map(|bytes| (bytes, Vec::new()));
    for _ in 0..SETUPS {
        for (bytes, us) in &mut times {
            us.push(setup::once(*bytes)?);
        }
    }
    let rows = times
        .iter_mut()
        .map(|(bytes, us)| setup::row(*bytes, clock, us));
    Ok(rows.collect())
}

fn to_rows(plan: &Plan, steps: &[Step], samples: &[Vec<Sample>]) -> Vec<Row> {
    let taken = || steps.iter().zip(samples).filter(|(_, s)| !s.is_empty());
    let trips = taken().find(|(step, _)| matches!(step.what, What::RoundTrip));
    let mut rows = Vec::new();
    for (step, samples) in taken() {
        match &step.what {
            What::Guest(case) => {
                let row = guest_row(case, plan.clock, samples);
                let copies =
                    taken().find(|(step, _)| matches!(step.what, What::Copy(of) if of == *case));
                let limit = trips
                    .zip(copies)
                    .map(|((_, trips), (_, copies))| limit_row(&row, samples, trips, copies));
                rows.push(row);
                rows.extend(limit);
            }
            What::Kernel { mode, vcpus } => {
                let bytes = plan.pages * PAGE_SIZE;
                let alike = Case {
                    vcpus: *vcpus,
                    readers: *vcpus,
                    ..Case::new(
                        Mode::UffdMissing,
                        BackingArg::Shmem,
                        Pattern::Sequential,
                        bytes,
                    )
                };
                rows.push(Row {
                    mode: mode.1.to_owned(),
                    cdf: Vec::new(),
                    ..guest_row(&alike, plan.clock, samples)
                });
            }
            What::MemoryError { backing, .. } => {
                let samples: Vec<_> = samples.iter().filter_map(|s| s.memory_error).collect();
                rows.extend(memory_error::rows(*backing, plan.clock, &samples));
            }
            What::RoundTrip | What::Copy(_) => {}
        }
    }
    rows
}

fn guest_row(case: &Case, clock: Clock, samples: &[Sample]) -> Row {
    let over = |value: &dyn Fn(&Sample) -> f64| median(samples.iter().map(value));
    let us_per_page = over(&|s| s.us);
    let cdf: Vec<[f64; 2]> = QUANTILES
        .iter()
        .enumerate()
        .map(|(n, &part)| [part, over(&|s| s.quantiles.get(n).copied().unwrap_or(s.us))])
        .collect();
    let latency = |quantile: f64| {
        let found = cdf.iter().find(|[part, _]| *part >= quantile);
        found.map_or(us_per_page, |&[_, us]| us)
    };
    let visited = samples.first().map_or(0, |s| s.visited);
    Row {
        mode: case.name().to_owned(),
        backing: backing_name(case.backing()).to_owned(),
        pattern: case.pattern.name().to_owned(),
        vcpus: case.vcpus,
        readers: case.readers,
        link_gbit: case.link_gbit,
        bytes: case.bytes,
        clock,
        us_per_page,
        pages_per_s: 1e6 / us_per_page,
        p50_us: latency(0.50),
        p99_us: latency(0.99),
        exits: over(&|s| s.exits as f64) as u64,
        events: over(&|s| s.events as f64) as u64,
        pages: visited,
        fault_bytes: case.fault_bytes(),
        pages_fetched: over(&|s| s.fetched as f64) as u64,
        pages_unneeded: over(&|s| s.fetched.saturating_sub(s.visited) as f64) as u64,
        runs: samples.len(),
        us_per_page_range: range(samples.iter().map(|s| s.us)),
        // A round over complete memory has no single accesses, and one access has no distribution.
        cdf: if case.rounds == 0 && visited > 1 {
            cdf
        } else {
            Vec::new()
        },
        machine: None,
        parts: None,
        damage: None,
    }
}

/// The floor, plus a round trip and a copy for each page, run by run.
fn limit_row(floor: &Row, floors: &[Sample], trips: &[Sample], copies: &[Sample]) -> Row {
    let extra: Vec<f64> = trips
        .iter()
        .zip(copies)
        .map(|(trip, copy)| trip.us + copy.us)
        .collect();
    let sums = || {
        floors
            .iter()
            .zip(&extra)
            .map(|(floor, extra)| floor.us + extra)
    };
    let us_per_page = median(sums());
    let extra = median(extra.iter().copied());
    Row {
        mode: "limit".to_owned(),
        us_per_page,
        pages_per_s: 1e6 / us_per_page,
        p50_us: floor.p50_us + extra,
        p99_us: floor.p99_us + extra,
        exits: floor.pages,
        us_per_page_range: range(sums()),
        cdf: Vec::new(),
        parts: Some(Parts {
            round_trip_us: median(trips.iter().map(|s| s.us)),
            copy_us: median(copies.iter().map(|s| s.us)),
        }),
        ..floor.clone()
    }
}

/// A bar on a terminal; elsewhere a line now and then.
struct Progress {
    bar: Option<ProgressBar>,
    steps: usize,
    step: std::cell::Cell<usize>,
}

impl Progress {
    fn new(steps: usize) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("[{elapsed:>4}] {bar:24} {pos}/{len} {msg}");
            let bar = ProgressBar::new(steps as u64);
            // A template that does not parse costs the style, not the benchmark.
            if let Ok(style) = style {
                bar.set_style(style);
            }
            bar
        });
        Self {
            bar,
            steps,
            step: std::cell::Cell::new(0),
        }
    }

    fn step(&self, text: &str) {
        let step = self.step.get();
        self.step.set(step + 1);
        match &self.bar {
            Some(bar) => {
                bar.set_position(step as u64);
                bar.set_message(text.to_owned());
            }
            // About twenty lines in all.
            None if step % self.steps.div_ceil(20).max(1) == 0 => {
                eprintln!("{}/{} {text}", step + 1, self.steps);
            }
            None => {}
        }
    }

    fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use clap::Parser;

    fn cases(arguments: &[&str]) -> Vec<Case> {
        let all = [
            &["kdp-bench", "--backings", "shmem,hugetlb-2M,hugetlb-1G"],
            arguments,
        ]
        .concat();
        let plan = Plan::new(&Args::parse_from(all).run).unwrap();
        let steps = plan.steps();
        let case = |step: &Step| match step.what {
            What::Guest(case) => Some(case),
            _ => None,
        };
        steps.iter().filter_map(case).collect()
    }

    #[test]
    fn every_row_is_measured_once() {
        for arguments in [&[][..], &["--quick"], &["--clock", "icount"]] {
            let rows: Vec<Row> = cases(arguments)
                .iter()
                .map(|case| guest_row(case, Clock::Time, &[]))
                .collect();
            for (n, row) in rows.iter().enumerate() {
                assert!(!rows[..n].iter().any(|other| other.same_as(row)), "{row:?}");
            }
        }
    }

    #[test]
    fn the_usual_series_are_what_the_clock_can_tell() {
        let all = cases(&[]);
        assert!(all.iter().any(|case| case.vcpus == 8 && case.readers == 8));
        assert!(all.iter().any(|case| case.link_gbit == Some(25)));
        for few in [cases(&["--quick"]), cases(&["--clock", "icount"])] {
            assert!(few
                .iter()
                .all(|case| case.vcpus == 1 && case.link_gbit.is_none()));
        }
        let one = cases(&["--modes", "exit", "--patterns", "random"]);
        assert!(
            one.iter()
                .all(|case| case.mode == Mode::Exit && case.rounds == 0),
            "{one:?}"
        );
        assert_eq!(one.len(), 3);
    }

    #[test]
    fn memory_errors_are_measured_with_us_and_without() {
        let errors = |arguments: &[&str]| {
            let series = ["kdp-bench", "--series", "memory-errors"];
            let all = [&series[..], arguments].concat();
            let plan = Plan::new(&Args::parse_from(all).run).unwrap();
            let steps = plan.steps();
            let texts = steps.iter().map(|step| step.what.text());
            texts.collect::<Vec<String>>()
        };
        assert_eq!(
            errors(&["--backings", "shmem,hugetlb-2M"]),
            [
                "a memory error on hugetlb-2M, without us",
                "a memory error on hugetlb-2M, with us"
            ]
        );
        let all = ["--backings", "shmem,hugetlb-2M,hugetlb-1G"];
        assert_eq!(errors(&all).len(), 4);
    }

    #[test]
    fn only_a_part_of_a_page_of_1_gib_is_visited_unless_a_fault_brings_it() {
        for case in cases(&["--series", "base"]) {
            if case.backing == BackingArg::Huge1G {
                assert_eq!(case.bytes, 1 << 30);
                let whole = case.fault_bytes() == case.bytes;
                assert_eq!(case.visit, (!whole).then_some(4096));
            }
        }
    }

    #[test]
    fn rows_are_medians_and_the_limit_is_a_sum() {
        let sample = |us| Sample {
            us,
            visited: 4096,
            fetched: 5000,
            quantiles: QUANTILES.map(|q| q * us).to_vec(),
            ..Sample::default()
        };
        let case = Case::new(Mode::Floor, BackingArg::Shmem, Pattern::Random, 16 << 20);
        let samples = [30.0, 10.0, 20.0].map(sample);
        let row = guest_row(&case, Clock::Time, &samples);
        assert_eq!(
            (row.us_per_page, row.p50_us, row.pages_unneeded),
            (20.0, 10.0, 904)
        );
        assert_eq!((row.us_per_page_range, row.runs), ([10.0, 30.0], 3));
        let limit = limit_row(
            &row,
            &samples,
            &[4.0, 4.0, 5.0].map(sample),
            &[1.0; 3].map(sample),
        );
        assert_eq!((limit.us_per_page, limit.p50_us), (26.0, 15.0));
    }
}
