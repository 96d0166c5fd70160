//! Post-copy of a Linux guest: memory of the device beside memory of the same VMM on userfaultfd.
//!
//! The guest boots once and is stopped. Each move begins with that very state: it is brought to a `kdp-vmm linux` on the
//! device, runs there with all of its memory until its speed is known, and is then moved by post-copy alone, over a
//! simulated link, to another one, in memory as the case has it. The cases take turns.

mod link;
mod report;
mod vmm;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use kdp_migrate::control::Order;
use kdp_migrate::{Source, SourceOptions};
use kdp_vmm::linux::{Kernel, Machine, Outgoing, Ram, Setup};
use kdp_vmm::{backing_name, Backing, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use self::link::Link;
pub use self::report::report;
use self::vmm::{Console, Vmm};
use crate::machine::Machine as Host;
use crate::row;
use crate::stats::{median, range};
use crate::Error;

/// Rounds of the load after each of which it has looked at all of its pages once.
const WINDOW: usize = 16;

/// Windows before the move: those that are left out, and those whose median counts.
const WARM_UP: usize = 2;
const BEFORE: usize = 5;

/// How often a move is tried.
const ATTEMPTS: usize = 3;

/// The guest is back when it is as fast again as this, of its speed before.
const BACK: f64 = 0.9;

/// How long the guest is left alone before it is stopped: what it has to say of free memory it has said then.
const SETTLE: Duration = Duration::from_secs(10);

#[derive(ClapArgs)]
pub struct MigrationArgs {
    /// Where to write the result
    #[arg(
        long,
        default_value = "build/bench/migration.json",
        value_name = "FILE"
    )]
    pub out: PathBuf,

    /// How often each case is measured; the medians count
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub runs: usize,

    /// The link's rate in Mbit/s; 0: loopback, as fast as it goes
    #[arg(long, default_value_t = 100, value_name = "MBIT")]
    pub link: u64,

    /// The most MiB a second that are sent; pages that the guest waits for do not wait for it. 0: no limit but the link's
    #[arg(long, default_value_t = 0, value_name = "MIB")]
    pub bandwidth: u64,

    /// Guest memory in MiB
    #[arg(long, default_value_t = 192, value_name = "MIB")]
    pub memory: u64,

    /// The VMM
    #[arg(long, default_value = "build/bin/kdp-vmm", value_name = "PROGRAM")]
    pub vmm: PathBuf,

    /// The guest's kernel
    #[arg(long, default_value = "build/demo/vmlinux", value_name = "FILE")]
    pub kernel: PathBuf,

    /// Its initramfs, with the load
    #[arg(long, default_value = "build/demo/initrd-load", value_name = "FILE")]
    pub initrd: PathBuf,
}

impl MigrationArgs {
    fn bytes(&self) -> u64 {
        self.memory << 20
    }
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    userfaultfd: bool,
    backing: Backing,
    /// The guest is asked which pages are free.
    hints: bool,
}

impl Case {
    fn pager(&self) -> &'static str {
        match self.userfaultfd {
            true => "userfaultfd",
            false => "device",
        }
    }

    fn text(&self) -> String {
        let hints = if self.hints { "with" } else { "without" };
        let backing = backing_name(self.backing);
        format!("{} on {backing}, {hints} hints", self.pager())
    }

    /// The device with hints is what there is to use; userfaultfd without them is a VMM that has none, and with them shows
    /// what of the difference is theirs.
    fn all() -> Vec<Self> {
        let of = |backing| {
            [(false, true), (true, false), (true, true)].map(|(userfaultfd, hints)| Self {
                userfaultfd,
                backing,
                hints,
            })
        };
        [Backing::Shmem, Backing::Huge2M]
            .into_iter()
            .flat_map(of)
            .collect()
    }
}

/// What came of one move, or the median, the least or the greatest of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sample {
    /// From the guest's stop until it ran at the destination.
    downtime_ms: f64,
    /// From the guest's stop to the beginning of the first [`WINDOW`] rounds that took no longer than before, but for
    /// [`BACK`].
    back_ms: f64,
    /// From a touch until the page, of the backing's size with userfaultfd, is in memory; as the destination measures it.
    fault_p50_us: f64,
    fault_p99_us: f64,
    /// Touches that had to wait.
    faults: f64,
    /// All that the source has sent.
    bytes: f64,
    /// What the guest has said is free: none of it was sent.
    free_bytes: f64,
    /// Pages of zeros, each of which was sent as a word.
    zero_bytes: f64,
    /// From the order to run to the last page.
    postcopy_ms: f64,
    /// A round of the load before the move.
    round_ms: f64,
}

/// What was measured of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationRow {
    pager: String,
    backing: String,
    hints: bool,
    guest_bytes: u64,
    /// Of the link; 0: loopback.
    link_mbit: u64,
    /// Bytes a second at most in the background; 0: no limit.
    bandwidth: u64,
    runs: usize,
    median: Sample,
    least: Sample,
    greatest: Sample,
    machine: Host,
}

fn failed(why: impl Into<String>) -> Error {
    Error::Migration(why.into())
}

/// Measure all cases.
pub fn run(args: &MigrationArgs) -> Result<Vec<MigrationRow>, Error> {
    let cases = Case::all();
    let guest = boot(args)?;
    let mut samples = vec![Vec::new(); cases.len()];
    for turn in 1..=args.runs.max(1) {
        for (case, samples) in cases.iter().zip(&mut samples) {
            samples.push(try_measure(args, case, &guest)?);
            eprintln!("{turn}: {}: {:?}", case.text(), samples.last());
        }
    }
    let rows = cases.iter().zip(&samples).map(|(case, samples)| {
        let [median, least, greatest] = summary(samples);
        MigrationRow {
            pager: case.pager().to_owned(),
            backing: backing_name(case.backing).to_owned(),
            hints: case.hints,
            guest_bytes: args.bytes(),
            link_mbit: args.link,
            bandwidth: args.bandwidth << 20,
            runs: samples.len(),
            median,
            least,
            greatest,
            machine: Host::here(),
        }
    });
    let rows: Vec<MigrationRow> = rows.collect();
    save(&rows, args)?;
    Ok(rows)
}

fn save(rows: &[MigrationRow], args: &MigrationArgs) -> Result<(), Error> {
    let json = serde_json::to_string_pretty(rows).map_err(|source| Error::Json {
        file: args.out.display().to_string(),
        source,
    })?;
    row::write(&args.out, &(json + "\n"))
}

/// The medians of all samples, the least and the greatest, each for itself.
fn summary(samples: &[Sample]) -> [Sample; 3] {
    let of = |value: fn(&Sample) -> f64| {
        let [least, greatest] = range(samples.iter().map(value));
        [median(samples.iter().map(value)), least, greatest]
    };
    let downtime_ms = of(|sample| sample.downtime_ms);
    let back_ms = of(|sample| sample.back_ms);
    let fault_p50_us = of(|sample| sample.fault_p50_us);
    let fault_p99_us = of(|sample| sample.fault_p99_us);
    let faults = of(|sample| sample.faults);
    let bytes = of(|sample| sample.bytes);
    let free_bytes = of(|sample| sample.free_bytes);
    let zero_bytes = of(|sample| sample.zero_bytes);
    let postcopy_ms = of(|sample| sample.postcopy_ms);
    let round_ms = of(|sample| sample.round_ms);
    [0, 1, 2].map(|n| Sample {
        downtime_ms: downtime_ms[n],
        back_ms: back_ms[n],
        fault_p50_us: fault_p50_us[n],
        fault_p99_us: fault_p99_us[n],
        faults: faults[n],
        bytes: bytes[n],
        free_bytes: free_bytes[n],
        zero_bytes: zero_bytes[n],
        postcopy_ms: postcopy_ms[n],
        round_ms: round_ms[n],
    })
}

/// The guest's console while it boots.
struct Lines {
    console: Console,
    line: Vec<u8>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' {
                self.console.line(&String::from_utf8_lossy(&self.line));
                self.line.clear();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The guest that is moved, stopped. Its load has a quarter of its memory, and writes all the time; as much again, and half
/// of that, it has used and freed, so what is free holds other bytes than zeros. Nobody has taken that back: here
/// memory is plain, and there a page that was reported as free is not reported again.
fn boot(args: &MigrationArgs) -> Result<Arc<Mutex<Machine>>, Error> {
    let ram = Arc::new(Ram::plain(Backing::Shmem, args.bytes())?);
    let kernel = Kernel {
        image: args.kernel.clone(),
        initrd: Some(args.initrd.clone()),
        append: format!(
            "quiet kdp_mib={} kdp_spike={} kdp_writes=64 kdp_pause=0",
            args.memory / 4,
            args.memory * 5 / 8
        ),
    };
    let console = Console::default();
    let lines = Lines {
        console: console.clone(),
        line: Vec::new(),
    };
    let setup = Setup {
        console: Box::new(lines),
        requester: None,
    };
    let mut machine = Machine::boot(ram, 1, &kernel, setup)?;
    machine.start()?;
    console.wait("the guest has booted", |rounds| rounds.get(2).copied())?;
    thread::sleep(SETTLE);
    console.wait("the guest has run for a while", |rounds| {
        rounds.get(4 * WINDOW).copied()
    })?;
    machine.stop()?;
    Ok(Arc::new(Mutex::new(machine)))
}

/// Move the guest once. Guests inside an emulated machine are lost now and then, whoever pages them.
fn try_measure(
    args: &MigrationArgs,
    case: &Case,
    guest: &Arc<Mutex<Machine>>,
) -> Result<Sample, Error> {
    let mut attempt = 1;
    loop {
        match measure(args, case, guest) {
            Err(e) if attempt < ATTEMPTS => {
                eprintln!("{}: attempt {attempt} of {ATTEMPTS}: {e}", case.text());
                attempt += 1;
            }
            other => return other,
        }
    }
}

/// Move the guest once.
fn measure(
    args: &MigrationArgs,
    case: &Case,
    guest: &Arc<Mutex<Machine>>,
) -> Result<Sample, Error> {
    let from = Vmm::waiting(
        args,
        &Case {
            userfaultfd: false,
            backing: Backing::Shmem,
            hints: true,
        },
    )?;
    bring(guest, &from)?;
    let windows = WARM_UP + BEFORE;
    let before = from.console.wait("the guest's speed", |rounds| {
        (rounds.len() > windows * WINDOW).then(|| rounds.to_vec())
    })?;
    let before = before.chunks_exact(WINDOW).map(|chunk| chunk[0]);
    let before: Vec<Instant> = before.skip(WARM_UP).collect();
    let times = before
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64());
    let usual = median(times);

    let to = Vmm::waiting(args, case)?;
    let address = match args.link {
        0 => to.address()?,
        mbit => Link::to(&to.address()?, mbit)?.address().to_owned(),
    };
    let (report, stopped) = from.move_to(Order {
        to: address,
        bandwidth: (args.bandwidth > 0).then_some(args.bandwidth << 20),
        downtime_ms: None,
        rounds: Some(0),
        no_hints: !case.hints,
        give_up_s: Some(10.0),
    })?;
    let back = to.console.wait("the guest is as fast again", |rounds| {
        let fast = |window: &[Instant]| (window[WINDOW] - window[0]).as_secs_f64() <= usual / BACK;
        let first = rounds.windows(WINDOW + 1).find(|window| fast(window))?;
        Some(first[0].saturating_duration_since(stopped))
    })?;
    let there = report.destination;
    Ok(Sample {
        downtime_ms: report.downtime_ms,
        back_ms: back.as_secs_f64() * 1e3,
        fault_p50_us: there.fault_p50_us as f64,
        fault_p99_us: there.fault_p99_us as f64,
        faults: there.faults as f64,
        bytes: report.bytes_sent as f64,
        free_bytes: (report.pages_hinted_free * PAGE_SIZE) as f64,
        zero_bytes: (report.sent.zero * PAGE_SIZE) as f64,
        postcopy_ms: there.postcopy_ms,
        round_ms: usual * 1e3 / WINDOW as f64,
    })
}

/// Have the guest run in a VMM, with all of its memory. It stays stopped here, as it is.
fn bring(guest: &Arc<Mutex<Machine>>, to: &Vmm) -> Result<(), Error> {
    let mut options = SourceOptions::default();
    options.rounds.max_rounds = 0;
    let source = Source::new(Outgoing::new(guest.clone(), false), options);
    source
        .run(&to.address()?, &mut |_| {})
        .map_err(|e| failed(format!("the guest was not brought: {e}")))?;
    to.wait_whole()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_up_field_by_field() {
        let of = |downtime_ms, bytes| Sample {
            downtime_ms,
            bytes,
            ..Sample::default()
        };
        let [median, least, greatest] = summary(&[of(3.0, 1.0), of(1.0, 2.0), of(2.0, 9.0)]);
        assert_eq!(median, of(2.0, 2.0));
        assert_eq!(least, of(1.0, 1.0));
        assert_eq!(greatest, of(3.0, 9.0));
    }
}
