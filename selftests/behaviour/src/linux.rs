// SPDX-License-Identifier: GPL-2.0

//! A Linux guest in the small VMM, with the load that checks itself (demo/guest/load.c).

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kdp_vmm::linux::{Kernel, Machine, PageRequester, Ram, Setup};
use kvm_demand_paging::{Backing, Memfd, Paging, Vm};

use crate::check::{skip, Result};
use crate::harness::on_debug_kernel;
use crate::slot::{need_kvm, PAGE};

/// Guest memory.
pub const MEMORY: u64 = 96 << 20;

/// How long a guest may take for what it does in a second on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How long it may take to boot, and a little more.
pub fn boot_time() -> Duration {
    Duration::from_secs(if on_debug_kernel() { 1200 } else { 300 })
}

/// A page that needs no copy.
const ZEROS: &[u8] = &[0; PAGE as usize];

/// Rounds until the load of [`snapshot`] looks at all of its pages.
const CHECK: u64 = 4;

const KERNEL: &str = "build/demo/bzImage";
const INITRD: &str = "build/demo/initrd-load";

/// Pages below 1 MiB that the guest does not use: addresses of PCs' video memory and firmware. The
/// ACPI tables are there, which it reads at boot only.
pub const RESERVED_PAGES: Range<u64> = 0xa0..0x100;

/// What the console has said so far.
#[derive(Clone, Default)]
pub struct Console {
    text: Arc<(Mutex<String>, Condvar)>,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text().push_str(&String::from_utf8_lossy(bytes));
        self.text.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the load said of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Its number.
    pub number: u64,
    /// The guest's clock.
    pub ns: u64,
}

impl Console {
    fn text(&self) -> MutexGuard<'_, String> {
        self.text.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it.
    pub fn all(&self) -> String {
        self.text().clone()
    }

    /// Wait until there is a line with this in it.
    pub fn wait_for(&self, what: &str, within: Duration) -> Result {
        let deadline = Instant::now() + within;
        let mut text = self.text();
        while !text.contains(what) {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                left > Duration::ZERO,
                "the guest has not said '{what}' within {within:?}. Its console:\n{}",
                *text
            );
            text = self
                .text
                .1
                .wait_timeout(text, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// The rounds that were told of, by whole lines.
    pub fn rounds(&self) -> Vec<Round> {
        let text = self.text();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().filter_map(round).collect()
    }

    /// Wait for so many more rounds.
    pub fn wait_rounds(&self, more: usize) -> Result {
        let deadline = Instant::now() + PATIENCE;
        let wanted = self.rounds().len() + more;
        while self.rounds().len() < wanted {
            ensure!(
                Instant::now() < deadline,
                "the guest has not come {more} rounds further within {PATIENCE:?}. Its console:\n{}",
                self.all()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Wait until its load has looked at all that it has written, as it does now and then.
    pub fn wait_whole_check(&self) -> Result {
        let deadline = Instant::now() + PATIENCE;
        let before = self.rounds().last().map_or(0, |round| round.number);
        let is_whole = |round: &Round| round.number > before && round.number % CHECK == 0;
        while !self.rounds().iter().any(is_whole) {
            ensure!(
                Instant::now() < deadline,
                "the guest has not checked everything within {PATIENCE:?}. Its console:\n{}",
                self.all()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// No page was wrong, no round is missing or twice, no kernel complained.
    pub fn check(&self) -> Result {
        let text = self.all();
        for bad in [
            "KDP-LOAD BAD",
            "KDP-FAILED",
            "soft lockup",
            "stall",
            "BUG:",
            "WARNING:",
            "Oops",
            "Marking TSC unstable",
        ] {
            ensure!(!text.contains(bad), "the guest says '{bad}':\n{text}");
        }
        let rounds = self.rounds();
        for pair in rounds.windows(2) {
            ensure!(
                pair[1].number == pair[0].number + 1 && pair[1].ns > pair[0].ns,
                "round {:?} came after {:?}:\n{text}",
                pair[1],
                pair[0]
            );
        }
        Ok(())
    }
}

fn round(line: &str) -> Option<Round> {
    let mut words = line.trim().strip_prefix("KDP-LOAD round ")?.split(' ');
    let number = words.next()?.parse().ok()?;
    let ns = words
        .skip_while(|word| *word != "ns")
        .nth(1)?
        .parse()
        .ok()?;
    Some(Round { number, ns })
}

fn setup(console: &Console, requester: Option<Arc<dyn PageRequester>>) -> Setup {
    Setup {
        console: Box::new(console.clone()),
        requester,
    }
}

/// Memory for a guest, none of which is a hole; what it has is not zeros.
pub fn full_memory(bytes: u64) -> Result<Arc<Ram>> {
    let ram = Ram::create(Backing::Shmem, bytes)?;
    let map = ram.memfd().map_all()?;
    for page in 0..ram.pages() {
        map.write(page, &[0xa5; PAGE as usize])?;
    }
    Ok(Arc::new(ram))
}

/// A guest that boots, with these parameters for its load.
pub fn boot_in(ram: Arc<Ram>, vcpus: u8, parameters: &str, console: &Console) -> Result<Machine> {
    need_kvm()?;
    if !fs::exists(KERNEL)? || !fs::exists(INITRD)? {
        return skip("there is no guest to boot: run scripts/demo-image");
    }
    let kernel = Kernel {
        image: KERNEL.into(),
        initrd: Some(INITRD.into()),
        // An emulated CPU does not speculate, and no test needs audit or an LSM in the guest.
        append: format!("quiet mitigations=off audit=0 lsm= {parameters}"),
    };
    let mut machine = Machine::boot(ram, vcpus, &kernel, setup(console, None))?;
    machine.start()?;
    Ok(machine)
}

/// A guest that goes on from a state.
pub fn restore(
    ram: Arc<Ram>,
    state: &[u8],
    console: &Console,
    requester: Option<Arc<dyn PageRequester>>,
) -> Result<Machine> {
    let mut machine = Machine::restore(ram, state, setup(console, requester))?;
    machine.start()?;
    Ok(machine)
}

/// A guest in a state, which does not run yet.
pub fn restore_stopped(ram: Arc<Ram>, state: &[u8], console: &Console) -> Result<Machine> {
    Ok(Machine::restore(ram, state, setup(console, None))?)
}

/// Why a state is refused, if it is.
pub fn refusal(ram: Arc<Ram>, state: &[u8]) -> Option<String> {
    let machine = Machine::restore(ram, state, setup(&Console::default(), None));
    machine.err().map(|e| e.to_string())
}

/// Memory of a guest that is to go on: what a file has, or all of it absent.
pub fn memory(from: Option<BorrowedFd<'_>>) -> Result<Arc<Ram>> {
    let memfd = Memfd::create("kdp-behaviour", Backing::Shmem, MEMORY)?;
    let paging = match from {
        Some(from) => {
            let to = File::from(memfd.as_fd().try_clone_to_owned()?);
            copy_data(&File::from(from.try_clone_to_owned()?), &to)?;
            Paging::OnPresent
        }
        None => Paging::On,
    };
    Ok(Arc::new(Ram::new(Vm::open()?, 0, memfd, paging)?))
}

/// Copy the pages of guest memory that are not zeros. The others stay holes.
fn copy_data(from: &File, to: &File) -> Result {
    const STEP: usize = 1 << 20;
    let mut bytes = vec![0; STEP];
    for start in (0..MEMORY).step_by(STEP) {
        from.read_exact_at(&mut bytes, start)?;
        for (n, page) in (0..).zip(bytes.chunks_exact(ZEROS.len())) {
            if page != ZEROS {
                to.write_all_at(page, start + n * PAGE)?;
            }
        }
    }
    Ok(())
}

/// A guest that was stopped in its first rounds: its state, and its memory.
pub struct Snapshot {
    /// What [`restore`] takes.
    pub state: Vec<u8>,
    /// Its memory.
    pub memory: File,
}

/// The guest of several tests: a boot takes long, so the first of them saves it for all.
pub fn snapshot() -> Result<Snapshot> {
    // Each byte of the console is an exit to the VMM, so there are few rounds, of many writes.
    // The churn leaves CPU time to the migration.
    let load = format!(
        "kdp_mib=4 kdp_writes=256 kdp_check={CHECK} kdp_pause=150 kdp_churn=4 kdp_churn_pause=300"
    );
    snapshot_of("load", 2, &load, "KDP-LOAD round 3 ")
}

/// A guest that was stopped when it had printed `ready`. `load` holds the parameters of its load.
/// The first test that needs the guest boots it, and saves it under `name`.
pub fn snapshot_of(name: &str, vcpus: u8, load: &str, ready: &str) -> Result<Snapshot> {
    let state_file = format!("/dev/shm/kdp-behaviour-linux-{name}-state");
    let memory_file = format!("/dev/shm/kdp-behaviour-linux-{name}-memory");
    if !fs::exists(&state_file)? {
        let console = Console::default();
        let ram = Arc::new(Ram::create(Backing::Shmem, MEMORY)?);
        let mut machine = boot_in(ram, vcpus, load, &console)?;
        console.wait_for(ready, boot_time())?;
        machine.stop()?;
        console.check()?;
        let state = machine.save()?;
        let memory = File::create(&memory_file)?;
        memory.set_len(MEMORY)?;
        copy_data(
            &machine.ram().memfd().as_fd().try_clone_to_owned()?.into(),
            &memory,
        )?;
        // Written last: if this file exists, so does the other one.
        let part = format!("{state_file}.part");
        fs::write(&part, state)?;
        fs::rename(part, &state_file)?;
    }
    Ok(Snapshot {
        state: fs::read(state_file)?,
        memory: File::open(memory_file)?,
    })
}

/// Fails if the guest has ended, with how it did.
pub fn still_runs(machine: &Machine) -> Result {
    if let Some(end) = machine.wait(Some(Duration::ZERO))? {
        fail!("it ended: {end}");
    }
    Ok(())
}
