// SPDX-License-Identifier: GPL-2.0

//! Runs tests, each in a process of its own, and prints TAP.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::check::{Fail, Result};
use crate::{emulator, stuck, sys};

/// A test.
pub struct Test {
    /// Its name: what it is about, and what is tested.
    pub name: &'static str,
    /// The test.
    pub run: fn() -> Result,
}

/// How long a test may take: five times what the longest takes on an idle machine.
const LIMIT: Duration = Duration::from_secs(120);
const DEBUG_KERNEL_LIMIT: Duration = Duration::from_secs(480);

/// A test that still makes progress is slow because of what runs beside it, and has this many limits.
const LIMITS_WITH_PROGRESS: u32 = 3;

const STATUS_SKIP: i32 = 4;

/// The factor by which a soak multiplies the repetitions in a test (KDP_SOAK). 1 without a soak.
pub fn soak() -> u32 {
    let soak = std::env::var("KDP_SOAK").ok();
    soak.and_then(|n| n.parse().ok()).unwrap_or(1).max(1)
}

/// Whether this is the debug kernel: several times as slow.
pub fn on_debug_kernel() -> bool {
    std::env::var("KDP_KERNEL").is_ok_and(|kind| kind == "debug")
}

/// How often to repeat something that is repeated `n` times as a rule.
pub fn rounds(n: u64) -> u64 {
    // The debug kernel is several times as slow, and finds in fewer rounds what it is there to find.
    let n = if on_debug_kernel() { n.div_ceil(4) } else { n };
    n * u64::from(soak())
}

/// Adds to what a soak counts (scripts/soak): how often something happened.
pub fn count(what: &str, number: u64) {
    println!("count: {number} {what}");
}

/// Adds to what this test has broken: `make soak N=100` runs it until each of those is 100.
pub fn broke(what: &str, number: u64) {
    println!("broke: {number} {what}");
}

fn limit() -> Duration {
    let limit = if on_debug_kernel() {
        DEBUG_KERNEL_LIMIT
    } else {
        LIMIT
    };
    limit * soak()
}

/// How often a test may lose its guest to the emulator.
const TRIES: u32 = 4;

/// How often a test that takes long is asked whether it has lost its guest. Most tests have ended before.
const LOOK: Duration = Duration::from_secs(20);

const TRIPLE_FAULT: &str = "it took a triple fault, or stopped in its host's kvm_amd";

enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
    Lost(String),
}

/// Runs the tests in this order.
pub fn run(tests: &[&Test]) -> ExitCode {
    println!("TAP version 13\n1..{}", tests.len());
    let mut failed = 0;
    for (number, test) in (1..).zip(tests) {
        let mut output = String::new();
        let start = Instant::now();
        let mut tries = 1;
        let outcome = loop {
            let outcome =
                run_one(test, &mut output).unwrap_or_else(|e| Outcome::Failed(e.to_string()));
            let how = match &outcome {
                Outcome::Lost(how) => how,
                Outcome::Failed(_) if emulator::ended_a_guest(&output) => TRIPLE_FAULT,
                _ => break outcome,
            };
            if tries == TRIES {
                break outcome;
            }
            output.push_str(&format!(
                "QEMU has lost the guest ({how}): once more\ncount: 1 guests lost by QEMU\n"
            ));
            tries += 1;
        };
        for line in output.lines() {
            println!("# {line}");
        }
        match outcome {
            Outcome::Passed => println!(
                "ok {number} {} # time={}ms",
                test.name,
                start.elapsed().as_millis()
            ),
            Outcome::Skipped(why) => println!("ok {number} {} # SKIP {why}", test.name),
            Outcome::Failed(why) | Outcome::Lost(why) => {
                failed += 1;
                for line in why.lines() {
                    println!("# {line}");
                }
                println!("not ok {number} {}", test.name);
            }
        }
        // Nothing is lost if this process is ended from outside.
        let _ = io::stdout().flush();
    }
    ExitCode::from(u8::from(failed > 0))
}

fn run_one(test: &Test, output: &mut String) -> Result<Outcome> {
    let (out, into) = sys::pipe()?;
    // What stands in a buffer would be printed by the child, too.
    io::stdout().flush()?;
    let run = test.run;
    let mut child = sys::Child::fork(move || child(run, into))?;
    // SAFETY: the child was not waited for. It does the same; who comes first does not matter.
    unsafe { libc::setpgid(child.pid(), child.pid()) };

    let mut deadline = Deadline::new(&child);
    let mut bytes = Vec::new();
    let mut stuck = None;
    let mut lost = None;
    let mut next_look = Instant::now() + LOOK;
    let ended = loop {
        drain(&out, &mut bytes, Duration::from_millis(5))?;
        match child.wait(Duration::ZERO) {
            Ok(ended) => break Some(ended),
            Err(_) if !deadline.is_over() => {
                if Instant::now() > next_look {
                    lost = emulator::lost_guest().or_else(|| {
                        // The test may not have noticed: it waits for another VMM, say.
                        let ended = emulator::ended_a_guest(&String::from_utf8_lossy(&bytes));
                        ended.then(|| TRIPLE_FAULT.to_owned())
                    });
                    next_look = Instant::now() + LOOK;
                }
                if lost.is_some() {
                    // SAFETY: it names the child's group.
                    unsafe { libc::kill(-child.pid(), libc::SIGKILL) };
                    break child.wait(Duration::from_secs(20)).ok();
                }
            }
            Err(_) => {
                stuck = Some(format!(
                    "{}\n{}",
                    stuck::threads_of(child.pid()),
                    stuck::trace_of_kvm()
                ));
                // SAFETY: it names the child's group.
                unsafe { libc::kill(-child.pid(), libc::SIGKILL) };
                break child.wait(Duration::from_secs(20)).ok();
            }
        }
    };
    // What it started goes with it.
    // SAFETY: it names the child's group; there may be nobody left in it.
    unsafe { libc::kill(-child.pid(), libc::SIGKILL) };
    drain(&out, &mut bytes, Duration::ZERO)?;
    output.push_str(&String::from_utf8_lossy(&bytes));

    if let Some(how) = lost {
        return Ok(Outcome::Lost(how));
    }
    Ok(match (stuck, ended) {
        (Some(threads), ended) => Outcome::Failed(format!(
            "it did not end within {:?}{}; its threads were:\n{threads}",
            deadline.start.elapsed(),
            if ended.is_none() {
                ", and could not be killed"
            } else {
                ""
            },
        )),
        (None, Some(sys::Ended::Status(0))) => Outcome::Passed,
        (None, Some(sys::Ended::Status(STATUS_SKIP))) => {
            let why = output.lines().last().unwrap_or_default().to_owned();
            output.truncate(output.trim_end().len() - why.len());
            Outcome::Skipped(why)
        }
        (None, Some(sys::Ended::Status(status))) => Outcome::Failed(format!("status {status}")),
        (None, Some(sys::Ended::Signal(signal))) => {
            Outcome::Failed(format!("it was ended by signal {signal}"))
        }
        (None, None) => Outcome::Failed("it could not be waited for".to_owned()),
    })
}

/// When a test has had its time.
struct Deadline {
    start: Instant,
    next: Instant,
    progress: stuck::Progress,
}

impl Deadline {
    fn new(child: &sys::Child) -> Self {
        let start = Instant::now();
        Self {
            start,
            next: start + limit(),
            progress: stuck::Progress::of_group(child.pid()),
        }
    }

    fn is_over(&mut self) -> bool {
        let now = Instant::now();
        if now < self.next {
            return false;
        }
        if !self.progress.is_made(limit()) || now >= self.start + limit() * LIMITS_WITH_PROGRESS {
            return true;
        }
        self.next = now + limit();
        false
    }
}

/// The test's own process.
fn child(run: fn() -> Result, into: OwnedFd) -> Result {
    // SAFETY: these change this process alone: its group, and where its output goes.
    unsafe {
        libc::setpgid(0, 0);
        for standard in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
            sys::check(libc::dup2(into.as_raw_fd(), standard))?;
        }
    }
    drop(into);
    let status = match run() {
        Ok(()) => 0,
        Err(Fail::Skip(why)) => {
            eprintln!("{why}");
            STATUS_SKIP
        }
        Err(Fail::Wrong(why)) => {
            eprintln!("{why}");
            1
        }
    };
    // SAFETY: threads may be left that wait for pages for ever: they end with the process.
    unsafe { libc::_exit(status) }
}

/// Reads what there is, after waiting for it that long.
fn drain(out: &OwnedFd, bytes: &mut Vec<u8>, wait: Duration) -> Result {
    let mut wait = wait;
    while sys::readable(out.as_raw_fd(), wait)? {
        let mut buffer = [0; 4096];
        // SAFETY: no Rust reference to the buffer is used during the call.
        let n = unsafe { libc::read(out.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        let Some(read) = usize::try_from(n).ok().filter(|n| *n > 0) else {
            return Ok(());
        };
        bytes.extend_from_slice(&buffer[..read]);
        wait = Duration::ZERO;
    }
    Ok(())
}
