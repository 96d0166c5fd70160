//! Which measurements are taken, how often and in which order.

use std::io::{self, IsTerminal};
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use kdp_vmm::session::{Pattern, Report};
use kdp_vmm::{backing_name, Backing, Image, Mode, PAGE_SIZE};

use crate::args::{ModeArg, RunArgs};
use crate::measure::{self, Case};
use crate::row::{Clock, Parts, Row};
use crate::setup;
use crate::stats::{median, range};
use crate::Error;

const PATTERNS: [Pattern; 2] = [Pattern::Random, Pattern::Sequential];
const MODES: [ModeArg; 8] = [
    ModeArg::Floor,
    ModeArg::Limit,
    ModeArg::Exit,
    ModeArg::ExitPrefetch,
    ModeArg::Wait,
    ModeArg::UffdMissing,
    ModeArg::UffdMinor,
    ModeArg::Setup,
];

/// How often the set-up of a memslot is measured in each run.
const SETUPS: usize = 20;

/// Writes to a port in one measurement of the round trip.
const ECHOES: u64 = 2_000;

struct Plan {
    clock: Clock,
    modes: Vec<ModeArg>,
    backings: Vec<Backing>,
    patterns: Vec<Pattern>,
    /// Numbers of pages, and how often everything is measured with them.
    sizes: Vec<(u64, usize)>,
}

impl Plan {
    fn new(args: &RunArgs) -> Result<Self, Error> {
        // Instructions repeat, time does not; and 65,536 pages take as long as 16 runs of 4,096.
        let (few, many) = match (args.quick, args.clock) {
            (true, Clock::Time) => (3, None),
            (true, Clock::Icount) => (1, None),
            (false, Clock::Time) => (5, Some(3)),
            (false, Clock::Icount) => (3, Some(1)),
        };
        let sizes = match &args.pages {
            Some(pages) => pages.iter().map(|&pages| (pages, few)).collect(),
            None => {
                let large = many.map(|runs| (65_536, runs));
                std::iter::once((4_096, few)).chain(large).collect()
            }
        };
        let sizes: Vec<(u64, usize)> = sizes;
        if let Some((bad, _)) = sizes
            .iter()
            .find(|(pages, _)| pages % 512 != 0 || *pages == 0)
        {
            return Err(kdp_vmm::Error::Invalid(format!(
                "--pages {bad}: it must be a multiple of 512, the pages of a huge page, and not 0"
            ))
            .into());
        }
        let runs = |usual| args.runs.unwrap_or(usual).max(1);
        Ok(Self {
            clock: args.clock,
            modes: args.modes.clone().unwrap_or_else(|| MODES.to_vec()),
            backings: args.backings.as_ref().map_or_else(
                || vec![Backing::Shmem, Backing::Huge2M],
                |backings| backings.iter().map(|&backing| backing.into()).collect(),
            ),
            patterns: args.patterns.as_ref().map_or_else(
                || PATTERNS.to_vec(),
                |patterns| patterns.iter().map(|&pattern| pattern.into()).collect(),
            ),
            sizes: sizes
                .into_iter()
                .map(|(pages, usual)| (pages, runs(usual)))
                .collect(),
        })
    }

    fn cases(&self, pages: u64) -> Vec<Case> {
        let mut cases = Vec::new();
        for &pattern in &self.patterns {
            for &backing in &self.backings {
                for mode in self.modes.iter().filter_map(|mode| mode.session()) {
                    cases.push(Case {
                        mode,
                        backing,
                        pattern,
                        pages,
                    });
                }
            }
        }
        cases
    }

    fn has(&self, mode: ModeArg) -> bool {
        self.modes.contains(&mode)
    }
}

/// Measure everything.
pub fn run(args: &RunArgs) -> Result<Vec<Row>, Error> {
    let plan = Plan::new(args)?;
    let steps = plan
        .sizes
        .iter()
        .map(|&(pages, runs)| plan.cases(pages).len() * runs)
        .sum::<usize>();
    let progress = Progress::new(steps);
    let mut rows = Vec::new();
    if plan.has(ModeArg::Setup) {
        rows.extend(set_ups(&plan)?);
    }
    for &(pages, runs) in &plan.sizes {
        rows.extend(size(&plan, pages, runs, &progress)?);
    }
    progress.done();
    Ok(rows)
}

fn set_ups(plan: &Plan) -> Result<Vec<Row>, Error> {
    let runs = plan.sizes.iter().map(|&(_, runs)| runs).max().unwrap_or(1);
    let mut times = setup::SIZES.map(|bytes| (bytes, Vec::new()));
    for _ in 0..runs * SETUPS {
        for (bytes, us) in &mut times {
            us.push(setup::once(*bytes)?);
        }
    }
    let rows = times
        .iter_mut()
        .map(|(bytes, us)| setup::row(*bytes, plan.clock, us));
    Ok(rows.collect())
}

/// All modes with this number of pages, taking turns, so that what disturbs the machine for a while disturbs
/// them alike.
fn size(plan: &Plan, pages: u64, runs: usize, progress: &Progress) -> Result<Vec<Row>, Error> {
    let image = Arc::new(Image::generate(pages * PAGE_SIZE, 1)?);
    let cases = plan.cases(pages);
    let mut reports: Vec<Vec<Report>> = vec![Vec::new(); cases.len()];
    let mut trips = Vec::new();
    let mut copies: Vec<(Backing, Pattern, Vec<f64>)> = Vec::new();
    if plan.has(ModeArg::Limit) && plan.has(ModeArg::Floor) {
        for &pattern in &plan.patterns {
            copies.extend(
                plan.backings
                    .iter()
                    .map(|&backing| (backing, pattern, Vec::new())),
            );
        }
    }
    for run in 1..=runs {
        for (case, reports) in cases.iter().zip(&mut reports) {
            progress.step(&format!(
                "{pages} pages, run {run} of {runs}: {} on {}, {}",
                case.mode.name(),
                backing_name(case.backing),
                case.pattern.name()
            ));
            reports.push(measure::guest(case, &image)?);
        }
        if !copies.is_empty() {
            trips.push(measure::round_trip(ECHOES)?);
        }
        for (backing, pattern, us) in &mut copies {
            us.push(measure::copy(*backing, *pattern, pages, &image)?);
        }
    }
    let mut rows = Vec::new();
    for (case, reports) in cases.iter().zip(&reports) {
        let row = guest_row(case, plan.clock, reports);
        let extra = copies
            .iter()
            .find(|(backing, pattern, _)| *backing == case.backing && *pattern == case.pattern)
            .filter(|_| case.mode == Mode::Floor)
            .map(|(_, _, us)| limit_row(&row, reports, &trips, us));
        rows.push(row);
        rows.extend(extra);
    }
    Ok(rows)
}

fn guest_row(case: &Case, clock: Clock, reports: &[Report]) -> Row {
    let latency = |quantile| median(reports.iter().filter_map(|report| report.latency(quantile)));
    let us_per_page = median(reports.iter().map(Report::us_per_page));
    Row {
        mode: case.mode.name().to_owned(),
        backing: backing_name(case.backing).to_owned(),
        pattern: case.pattern.name().to_owned(),
        vcpus: 1,
        bytes: case.pages * PAGE_SIZE,
        clock,
        us_per_page,
        pages_per_s: 1e6 / us_per_page,
        p50_us: latency(0.50),
        p99_us: latency(0.99),
        exits: median(reports.iter().map(|report| report.exits as f64)) as u64,
        events: median(reports.iter().map(|report| report.events as f64)) as u64,
        pages: reports.first().map_or(0, |report| report.visited),
        pages_fetched: median(reports.iter().map(|report| report.pages_fetched as f64)) as u64,
        pages_unneeded: median(reports.iter().map(|report| report.pages_unneeded as f64)) as u64,
        fault_bytes: case.mode.fault_bytes(case.backing),
        runs: reports.len(),
        us_per_page_range: range(reports.iter().map(Report::us_per_page)),
        parts: None,
    }
}

/// The floor, plus a round trip and a copy for each page, run by run.
fn limit_row(floor: &Row, reports: &[Report], trips: &[f64], copies: &[f64]) -> Row {
    let extra: Vec<f64> = trips
        .iter()
        .zip(copies)
        .map(|(trip, copy)| trip + copy)
        .collect();
    let sums = || {
        reports
            .iter()
            .zip(&extra)
            .map(|(report, extra)| report.us_per_page() + extra)
    };
    let us_per_page = median(sums());
    Row {
        mode: "limit".to_owned(),
        us_per_page,
        pages_per_s: 1e6 / us_per_page,
        p50_us: floor.p50_us + median(extra.iter().copied()),
        p99_us: floor.p99_us + median(extra.iter().copied()),
        exits: floor.pages,
        us_per_page_range: range(sums()),
        parts: Some(Parts {
            round_trip_us: median(trips.iter().copied()),
            copy_us: median(copies.iter().copied()),
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
            None if step % self.steps.div_ceil(20) == 0 => {
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
