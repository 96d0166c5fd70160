// SPDX-License-Identifier: GPL-2.0

//! `kdp-vmm linux` as the program that it is, whose guest comes from elsewhere and goes elsewhere.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kdp_migrate::control::{self, Reply, Status, Whereabouts};
use kdp_migrate::{Phase, Source, SourceOptions, SourceReport};
use kdp_vmm::linux::Outgoing;

use crate::check::{skip, Fail, Result};
use crate::harness::{count, on_debug_kernel};
use crate::linux::{self, snapshot, Console, MEMORY};
use crate::task::until;

const VMM: &str = "build/bin/kdp-vmm";
pub const KDP: &str = "build/bin/kdp";

/// How long a migration may take.
fn patience() -> Duration {
    Duration::from_secs(if on_debug_kernel() { 400 } else { 90 })
}

/// A VMM.
pub struct Vmm {
    child: Child,
    control: PathBuf,
    /// What its guest says.
    pub console: Console,
    /// What it says itself.
    said: Console,
    readers: Vec<JoinHandle<()>>,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
        // It may have been removed by the VMM itself.
        let _ = fs::remove_file(&self.control);
    }
}

fn pour(mut from: impl Read + Send + 'static, mut to: Console) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            // A console takes everything.
            let _ = to.write_all(&bytes[..count]);
        }
    })
}

/// What it says is told at once: a test that waits for something else may be ended at any time.
fn repeat(from: impl Read + Send + 'static, name: String, mut to: Console) -> JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(from)
            .lines()
            .map_while(std::result::Result::ok)
        {
            println!("{name}: {line}");
            // A console takes everything.
            let _ = writeln!(to, "{line}");
        }
    })
}

impl Vmm {
    /// One that waits for a guest, with memory of this kind.
    pub fn waiting(backing: &str, more: &[&str]) -> Result<Self> {
        Self::with_memory(MEMORY, backing, more)
    }

    /// The same, with so many bytes.
    pub fn with_memory(bytes: u64, backing: &str, more: &[&str]) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !fs::exists(VMM)? || !fs::exists(KDP)? {
            return skip("there is no VMM: run scripts/tools build");
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let control = PathBuf::from(format!("/tmp/kdp-vmm-{}-{number}", std::process::id()));
        let mut child = Command::new(VMM)
            .args(["linux", "--incoming", "127.0.0.1:0", "--backing", backing])
            .args(["--memory", &bytes.to_string(), "--control"])
            .arg(&control)
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (console, said) = (Console::default(), Console::default());
        let name = format!("kdp-vmm {number}");
        let out = child.stdout.take().map(|out| pour(out, console.clone()));
        let err = child
            .stderr
            .take()
            .map(|err| repeat(err, name, said.clone()));
        let mut vmm = Self {
            child,
            control,
            console,
            said,
            readers: out.into_iter().chain(err).collect(),
        };
        until("the VMM listens", || {
            if let Some(status) = vmm.child.try_wait()? {
                fail!("it ended with {status}: {}", vmm.said.all());
            }
            Ok(vmm.status().is_ok())
        })?;
        Ok(vmm)
    }

    /// What it says of itself.
    pub fn status(&self) -> Result<Status> {
        let stream = UnixStream::connect(&self.control)?;
        control::send(&stream, &control::Command::Status)?;
        match control::receive(&mut BufReader::new(&stream))? {
            Some(Reply::Status(status)) => Ok(status),
            other => fail!("asked for its status it says {other:?}"),
        }
    }

    /// Where it waits for a guest.
    pub fn address(&self) -> Result<String> {
        match self.status()?.listening {
            Some(address) => Ok(address),
            None => fail!("it waits for no guest"),
        }
    }

    /// Wait until it says so of itself.
    pub fn wait(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Result<Status> {
        let deadline = Instant::now() + patience();
        loop {
            let status = self
                .status()
                .map_err(|e| Fail::Wrong(format!("{e}; it says: {}", self.said.all())))?;
            if is_so(&status) {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "not {what} within {:?}, but {status:?}",
                patience()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Wait until its guest runs there.
    pub fn wait_here(&self) -> Result {
        self.wait("its guest runs", |status| status.guest == Whereabouts::Here)?;
        Ok(())
    }

    /// Wait until its guest has all its pages there.
    pub fn wait_arrival(&self) -> Result {
        self.wait("all is there", |status| status.arrival.is_some())?;
        Ok(())
    }

    /// Wait until its migration, to or from it, is in this phase.
    pub fn wait_phase(&self, phase: Phase) -> Result<Status> {
        self.wait(phase.name(), |status| {
            status.progress.is_some_and(|now| now.phase == phase)
        })
    }

    /// Have the guest of a snapshot come, with all its pages. What it says on the way is on the console that is returned.
    pub fn bring(&self) -> Result<Console> {
        let snapshot = snapshot()?;
        let console = Console::default();
        let ram = linux::memory(Some(snapshot.memory.as_fd()))?;
        // While it does not run, it takes no CPU time from the migration, and writes nothing.
        let machine = linux::restore_stopped(ram, &snapshot.state, &console)?;
        let mut options = SourceOptions::default();
        options.rounds.max_rounds = 1;
        let source = Source::new(Outgoing::new(Arc::new(Mutex::new(machine)), true), options);
        let report = source.run(&self.address()?, &mut |_| {})?;
        println!("brought: {report:?}");
        self.wait_arrival()?;
        Ok(console)
    }

    fn kdp(&self, command: &str, more: &[&str]) -> Result<String> {
        let output = Command::new(KDP)
            .args([command, "--pid", &self.child.id().to_string()])
            .args(more)
            .output()?;
        ensure!(
            output.status.success(),
            "kdp {command}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A page of its memory is lost.
    pub fn poison(&self, page: u64) -> Result {
        self.kdp("poison", &[&page.to_string()])?;
        Ok(())
    }

    /// Pages of its memory that are lost.
    pub fn poisoned(&self) -> Result<Vec<u64>> {
        let list: Vec<serde_json::Value> = serde_json::from_str(&self.kdp("list", &["--json"])?)?;
        let number = |run: &serde_json::Value, key: &str| run[key].as_u64().unwrap_or(0);
        Ok(list
            .iter()
            .flat_map(|run| number(run, "first")..number(run, "first") + number(run, "count"))
            .collect())
    }

    /// Begin to move its guest, by the command.
    pub fn move_to(&self, address: &str, more: &[&str]) -> Result<Move> {
        let child = Command::new(KDP)
            .args(["migrate", "--json", "--to", address, "--from"])
            .arg(format!("unix:{}", self.control.display()))
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Move(Some(child)))
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        // It fails for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.read_all();
    }

    fn read_all(&mut self) {
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }

    /// Wait for its end: its status, and what it said.
    pub fn wait_end(&mut self) -> Result<(Option<i32>, String)> {
        let deadline = Instant::now() + patience();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(
                Instant::now() < deadline,
                "it has not ended within {:?}: {:?}",
                patience(),
                self.status().ok()
            );
            thread::sleep(Duration::from_millis(10));
        };
        self.read_all();
        Ok((status.code(), self.said.all()))
    }
}

/// A migration that is under way.
pub struct Move(Option<Child>);

impl Drop for Move {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It fails for one that has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Move {
    fn output(mut self) -> Result<std::process::Output> {
        match self.0.take() {
            Some(child) => Ok(child.wait_with_output()?),
            None => fail!("it was waited for"),
        }
    }

    /// Whether it has.
    pub fn has_ended(&mut self) -> Result<bool> {
        match &mut self.0 {
            Some(child) => Ok(child.try_wait()?.is_some()),
            None => Ok(true),
        }
    }

    /// It must come to a good end.
    pub fn report(self) -> Result<SourceReport> {
        let output = self.output()?;
        ensure!(
            output.status.success(),
            "the migration failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let report: SourceReport = serde_json::from_slice(&output.stdout)?;
        println!("{report:?}");
        count("migrations", 1);
        count("pages asked for", report.destination.faults);
        count("pages hinted free", report.pages_hinted_free);
        Ok(report)
    }

    /// It must fail: what it says.
    pub fn failure(self) -> Result<String> {
        let output = self.output()?;
        ensure_eq!(output.status.code(), Some(1), "the exit status");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// One guest's consoles, in the order in which it was there, are one console.
pub fn check_all(consoles: &[&Console]) -> Result {
    let mut whole = Console::default();
    for console in consoles {
        whole.write_all(console.all().as_bytes())?;
    }
    whole.check()
}
