// SPDX-License-Identifier: GPL-2.0

//! Linux in the small VMM: what it takes to move it, and how it tells which memory it does not use.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kdp_vmm::linux::{End, HintSink, PageRequester};
use kvm_demand_paging::PageRange;

use crate::check::Result;
use crate::linux::{self, restore, snapshot, Console, MEMORY};
use crate::slot::{counter, PAGE};
use crate::task::until;

tests! {
    "migrate-linux-goes-on-in-a-fresh-machine" => goes_on,
    "migrate-linux-other-states-are-refused" => other_states_are_refused,
    "migrate-linux-dirty-pages-are-logged" => dirty_pages_are_logged,
    "migrate-linux-pages-come-on-demand" => pages_come_on_demand,
    "migrate-linux-stops-if-a-page-never-comes" => stops_if_a_page_never_comes,
    "hint-linux-hints-carry-their-command" => hints_carry_their_command,
    "hint-linux-reported-pages-are-given-back" => reported_pages_are_given_back,
}

/// Stopped, saved and restored in a machine that is new, on the same memory, three times. The load's rounds go on without
/// one missing, and no time has passed for the guest.
fn goes_on() -> Result {
    const AWAY: Duration = Duration::from_secs(10);
    let snapshot = snapshot()?;
    let ram = linux::memory(Some(snapshot.memory.as_fd()))?;
    let console = Console::default();
    let mut state = snapshot.state;
    for turn in 0..3 {
        let before = console.rounds().len();
        let mut machine = restore(ram.clone(), &state, &console, None)?;
        console.wait_rounds(3)?;
        machine.stop()?;
        linux::still_runs(&machine)?;
        let rounds = console.rounds();
        if turn == 1 {
            let (last, first) = (rounds[before - 1], rounds[before]);
            let passed = Duration::from_nanos(first.ns.saturating_sub(last.ns));
            ensure!(
                passed < AWAY,
                "the guest's clock went on by {passed:?} while it was stopped for {AWAY:?}"
            );
        }
        state = machine.save()?;
        println!("{} bytes of state after {:?}", state.len(), rounds.last());
        // A second save is the same guest's: saving changes nothing.
        ensure_eq!(machine.save()?.len(), state.len(), "bytes of state");
        drop(machine);
        if turn == 0 {
            std::thread::sleep(AWAY);
        }
    }
    console.check()
}

/// What is not a state, is damaged, or is another machine's, is refused with what is wrong.
fn other_states_are_refused() -> Result {
    let snapshot = snapshot()?;
    let refused = |bytes: &[u8], why: &str| -> Result {
        let ram = linux::memory(None)?;
        let told = linux::refusal(ram, bytes);
        ensure!(
            told.as_ref().is_some_and(|told| told.contains(why)),
            "it does not say '{why}', but {told:?}"
        );
        Ok(())
    };
    let mut other = snapshot.state.clone();
    other[8] += 1;
    refused(&other, "this program reads 1")?;
    let mut damaged = snapshot.state.clone();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    refused(&damaged, "damaged")?;
    refused(&snapshot.state[..100], "behind its header")
}

/// Every page that has changed since logging began is in the log: what vCPUs write, KVM itself, and
/// the devices. Pages that nobody accesses are not in it.
///
/// How many pages are logged in all depends on the guest. Pages that it reports as free are given back,
/// which changes them. KVM also logs a page that is read for the first time after a restore, because
/// it maps the page writable.
fn dirty_pages_are_logged() -> Result {
    let snapshot = snapshot()?;
    let ram = linux::memory(Some(snapshot.memory.as_fd()))?;
    let console = Console::default();
    let mut machine = restore(ram.clone(), &snapshot.state, &console, None)?;
    console.wait_rounds(1)?;
    machine.stop()?;
    machine.log_dirty_pages(true)?;
    let before = linux::memory(Some(ram.memfd().as_fd()))?;
    let mut pages = vec![0; (ram.pages() / 64) as usize];
    machine.start()?;
    for _ in 0..3 {
        console.wait_rounds(1)?;
        machine.harvest_dirty_pages(&mut pages)?;
    }
    machine.balloon().statistics()?;
    console.wait_rounds(1)?;
    machine.stop()?;
    machine.harvest_dirty_pages(&mut pages)?;
    let is_logged = |page: u64| pages[(page / 64) as usize] & (1 << (page % 64)) != 0;
    let (mut changed, mut logged) = (0, 0);
    for page in 0..ram.pages() {
        let (mut was, mut is) = ([0; PAGE as usize], [0; PAGE as usize]);
        before.memfd().read(page, &mut was)?;
        ram.memfd().read(page, &mut is)?;
        changed += u64::from(was != is);
        logged += u64::from(is_logged(page));
        ensure!(
            was == is || is_logged(page),
            "page {page} was written, and is not in the log"
        );
    }
    println!(
        "{changed} pages changed, {logged} logged of {}",
        ram.pages()
    );
    ensure!(changed > 100, "only {changed} pages have changed");
    for page in linux::RESERVED_PAGES {
        ensure!(
            !is_logged(page),
            "page {page}, which is reserved, is in the log"
        );
    }
    let mut rest = vec![0; pages.len()];
    machine.harvest_dirty_pages(&mut rest)?;
    ensure_eq!(
        rest.iter().map(|word| word.count_ones()).sum::<u32>(),
        0,
        "pages logged of a guest that is stopped"
    );
    console.check()
}

/// Pages of a guest that was elsewhere.
struct Elsewhere {
    ram: Arc<kdp_vmm::linux::Ram>,
    source: File,
    fetched: Mutex<u64>,
    /// Fetch no more than that.
    most: u64,
}

impl PageRequester for Elsewhere {
    fn fetch(
        &self,
        page: u64,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        if *fetched == self.most {
            return Err("the connection is gone".into());
        }
        *fetched += 1;
        let mut bytes = [0; PAGE as usize];
        self.source.read_exact_at(&mut bytes, page * PAGE)?;
        let paged = self.ram.paged().ok_or("the device does not page it")?;
        paged.vm().place(paged.slot_id(), page, &bytes)?;
        Ok(())
    }
}

fn elsewhere(most: u64) -> Result<(Vec<u8>, Arc<Elsewhere>)> {
    let snapshot = snapshot()?;
    let elsewhere = Elsewhere {
        ram: linux::memory(None)?,
        source: snapshot.memory,
        fetched: Mutex::new(0),
        most,
    };
    Ok((snapshot.state, Arc::new(elsewhere)))
}

/// The guest goes on with none of its memory there.
fn pages_come_on_demand() -> Result {
    let (state, elsewhere) = elsewhere(u64::MAX)?;
    let console = Console::default();
    let mut machine = restore(
        elsewhere.ram.clone(),
        &state,
        &console,
        Some(elsewhere.clone()),
    )?;
    console.wait_rounds(3)?;
    machine.stop()?;
    linux::still_runs(&machine)?;
    let fetched = *elsewhere
        .fetched
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    println!("{fetched} of {} pages were fetched", MEMORY / PAGE);
    ensure!(fetched < MEMORY / PAGE / 2, "{fetched} pages were fetched");
    // With its local APIC in the kernel, KVM could halt the vCPU, and a kworker would wait.
    let vm = elsewhere.ram.paged().map(|paged| paged.vm().as_fd());
    let count = |name: &str| vm.map_or(Ok(0), |vm| counter(vm, name));
    let (exits, waits) = (count("exits")?, count("waits")?);
    println!("{exits} exits, {waits} waits");
    ensure!(exits > 10 * waits, "{exits} exits, {waits} waits");
    console.check()
}

/// A page that never comes stops the guest, which reads no zeros, and says which page it was.
fn stops_if_a_page_never_comes() -> Result {
    let (state, elsewhere) = elsewhere(300)?;
    let console = Console::default();
    let machine = restore(
        elsewhere.ram.clone(),
        &state,
        &console,
        Some(elsewhere.clone()),
    )?;
    match machine.wait(Some(linux::PATIENCE)) {
        Err(e) => {
            let text = e.to_string();
            ensure!(
                text.contains("will never come: the connection is gone"),
                "the guest was stopped with: {text}"
            );
        }
        Ok(end) => fail!("the guest came to {end:?}:\n{}", console.all()),
    }
    console.check()
}

/// What came of hints.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Started(u32),
    Hinted(u32, PageRange),
    Finished(u32),
}

#[derive(Default)]
struct Sink(Mutex<Vec<Told>>);

impl Sink {
    fn tell(&self, told: Told) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(told);
    }

    fn count(&self, is_it: impl Fn(&Told) -> bool) -> usize {
        let told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.iter().filter(|told| is_it(told)).count()
    }
}

impl HintSink for Sink {
    fn started(&self, command: u32) {
        self.tell(Told::Started(command));
    }

    fn hinted(&self, command: u32, range: PageRange) {
        self.tell(Told::Hinted(command, range));
    }

    fn finished(&self, command: u32) {
        self.tell(Told::Finished(command));
    }
}

/// Linux's driver answers each command in its turn, with ranges of memory and the command's number, and none comes after a
/// stop. The guest goes on, and has its memory back.
fn hints_carry_their_command() -> Result {
    let snapshot = snapshot()?;
    let ram = linux::memory(Some(snapshot.memory.as_fd()))?;
    let console = Console::default();
    let mut machine = restore(ram.clone(), &snapshot.state, &console, None)?;
    let balloon = machine.balloon();
    ensure!(balloon.can_hint(), "the guest's driver does not hint");
    let (mut before, mut all) = (0, 0);
    for _ in 0..2 {
        let sink = Arc::new(Sink::default());
        let command = balloon.begin_hints(sink.clone())?;
        ensure!(command > before, "command {command} after {before}");
        until("the guest has hinted", || {
            Ok(sink.count(|told| matches!(told, Told::Finished(_))) > 0)
        })?;
        balloon.stop_hints()?;
        let hinted = sink.count(|told| matches!(told, Told::Hinted(..)));
        let told = sink.0.lock().unwrap_or_else(PoisonError::into_inner);
        ensure_eq!(
            told.first(),
            Some(&Told::Started(command)),
            "the first that it told"
        );
        ensure_eq!(
            told.last(),
            Some(&Told::Finished(command)),
            "the last that it told"
        );
        let mut pages = 0;
        for told in told.iter().skip(1).take(hinted) {
            let Told::Hinted(of, range) = told else {
                fail!("{told:?} among hints");
            };
            ensure_eq!(*of, command, "the command of a hint");
            ensure!(
                range.count > 0 && range.end() <= ram.pages(),
                "a hint of {range:?}"
            );
            pages += range.count;
        }
        println!("command {command}: {hinted} hints of {pages} pages");
        (before, all) = (command, all + pages);
        drop(told);
        balloon.end_hints()?;
        console.wait_rounds(1)?;
    }
    // How many there are of the size that Linux hints, 4 MiB, is a matter of what the load has left.
    ensure!(all > 0, "no page was hinted");
    // Stopped before the guest has had a chance to answer: nothing may come.
    let sink = Arc::new(Sink::default());
    machine.stop()?;
    balloon.begin_hints(sink.clone())?;
    balloon.stop_hints()?;
    machine.start()?;
    console.wait_rounds(2)?;
    ensure_eq!(
        sink.count(|told| matches!(told, Told::Hinted(..))),
        0,
        "hints after a stop"
    );
    balloon.end_hints()?;
    console.wait_rounds(1)?;
    machine.stop()?;
    console.check()
}

/// Bytes that a memfd takes.
fn allocated(fd: BorrowedFd<'_>) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// Memory that a guest does not use is given back, by Linux's driver, though all of it was there when the guest began; the
/// guest uses it again, and when it does not need it any more it is given back once more.
fn reported_pages_are_given_back() -> Result {
    /// Linux reports only while it has more than 64 MiB in a zone.
    const BYTES: u64 = 256 << 20;
    let console = Console::default();
    let ram = linux::full_memory(BYTES)?;
    let before = allocated(ram.memfd().as_fd())?;
    ensure!(before >= BYTES, "{before} bytes are there of {BYTES}");
    const PEAK: u64 = 64 << 20;
    let parameters =
        "kdp_spike=64 kdp_spike_at=25 kdp_mib=8 kdp_writes=64 kdp_rounds=80 kdp_pause=100";
    let machine = linux::boot_in(ram, 1, parameters, &console)?;
    let deadline = Instant::now() + linux::boot_time();
    let balloon = machine.balloon();
    let (mut known, mut least, mut most) = (None, before, 0);
    // When the peak was over: what there was of memory, and what there is now.
    let mut later: Option<(u64, u64)> = None;
    let given_back_again =
        |later: Option<(u64, u64)>| matches!(later, Some((peak, now)) if now < peak - PEAK / 2);
    while known.is_none() || !given_back_again(later) {
        linux::still_runs(&machine)?;
        let now = allocated(machine.ram().memfd().as_fd())?;
        match &mut later {
            Some((_, later)) => *later = now,
            None if console.all().contains("MiB is over") => later = Some((most.max(now), now)),
            None if now < least => (least, most) = (now, 0),
            None => most = most.max(now),
        }
        known = known.or(balloon.statistics()?);
        ensure!(
            Instant::now() < deadline,
            "{least} bytes of {BYTES}, {later:?} at the end of a peak and later; the guest's statistics are {known:?}:\n{}",
            console.all()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("{before} bytes, {least} at least, {later:?} at the end of a peak and later");
    ensure!(least < BYTES / 2, "{least} bytes of {BYTES} were kept");
    ensure!(
        later.is_some_and(|(peak, _)| peak > least + PEAK / 2),
        "{least} bytes before a peak, {later:?} at its end"
    );
    ensure!(
        known.is_some_and(|known| known.free < known.total && known.total < BYTES),
        "the guest's statistics are {known:?}"
    );
    ensure_eq!(
        machine.wait(Some(linux::boot_time()))?,
        Some(End::Reset),
        "the guest's end"
    );
    console.wait_for("KDP-LOAD done", Duration::ZERO)?;
    console.check()
}
