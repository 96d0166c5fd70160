//! Pages that come into plain memory which a userfaultfd watches: what the device is compared with.
//!
//! It is done as its users do it: missing faults, and one thread that reads them. A page is filled once and whole, at the
//! size of the backing. So of hugetlb all parts of a huge page that is touched are asked for and gathered beside it, and one
//! copy brings them in.
//!
//! A fault's latency is that of the whole backing page: from the event that tells of the touch, when it was read, until
//! the copy has returned that lets go who waits. (How long the thread takes to wake up for the event is not in it; with the
//! device the vCPU's exit is the touch, and nobody is woken to begin.)

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kdp_migrate::{MachineError, Misses, PageSet, Placed};
use kvm_demand_paging::{AliasMap, Backing, PageRange};

use super::Placer;
use crate::error::{Error, Result};
use crate::linux::machine::Ending;
use crate::linux::ram::punch;
use crate::linux::Ram;
use crate::memory::PAGE_SIZE;
use crate::paging::uffd_sys::{Allowed, Arrivals, Userfaultfd};
use crate::paging::{EndFlag, ReaderThread};

pub(super) struct ByUserfaultfd {
    watch: Arc<Watch>,
    // Nothing but `drop` takes it.
    reader: Option<ReaderThread>,
}

struct Watch {
    ram: Arc<Ram>,
    map: Arc<AliasMap>,
    uffd: Arc<Userfaultfd>,
    allowed: Allowed,
    misses: Misses,
    /// Pages of 4 KiB in one of the backing's.
    unit: u64,
    /// For zeros where UFFDIO_ZEROPAGE is not allowed.
    zeros: Vec<u8>,
    state: Mutex<State>,
}

struct State {
    /// Pages that have come; of hugetlb they may still be gathered.
    came: PageSet,
    /// Of those, pages that are in memory.
    there: PageSet,
    /// Of those that have come, pages that are lost.
    lost: PageSet,
    /// Parts of huge pages, by the first page of each.
    gathered: HashMap<u64, Vec<u8>>,
    /// Huge pages that somebody waits for, and since when.
    touched: HashMap<u64, Instant>,
    /// The machine is being made: what is in memory stays.
    begun: bool,
    over: bool,
    failed: Option<String>,
    machine: Option<Ending>,
}

/// What absent pages are filled with.
#[derive(Clone, Copy)]
enum Filling<'a> {
    Bytes(&'a [u8]),
    Zeros,
    Loss,
}

impl ByUserfaultfd {
    /// Memory for so many bytes, none of which has come.
    pub(super) fn new(backing: Backing, bytes: u64) -> Result<(Arc<Ram>, Misses, Self)> {
        let (ram, map, uffd, allowed) = Ram::watched(backing, bytes)?;
        let ram = Arc::new(ram);
        let misses = Misses::new(ram.pages());
        let unit = backing.page_size() / PAGE_SIZE;
        let none = || PageSet::new(ram.pages());
        let watch = Arc::new(Watch {
            map,
            uffd,
            allowed,
            misses: misses.clone(),
            unit,
            zeros: vec![0; backing.page_size() as usize],
            state: Mutex::new(State {
                came: none(),
                there: none(),
                lost: none(),
                gathered: HashMap::new(),
                touched: HashMap::new(),
                begun: false,
                over: false,
                failed: None,
                machine: None,
            }),
            ram: ram.clone(),
        });
        let watches = watch.clone();
        let reader = ReaderThread::spawn(move |end| {
            if let Err(e) = watches.read(end) {
                watches.fail(&e.to_string());
            }
        })?;
        let reader = Some(reader);
        Ok((ram, misses, Self { watch, reader }))
    }
}

impl Drop for ByUserfaultfd {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.take() {
            // One that panicked has ended, too.
            let _ = reader.end();
        }
    }
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The backing's page that a page is in.
    fn around(&self, page: u64) -> PageRange {
        PageRange::new(page / self.unit * self.unit, self.unit)
    }

    /// The thread that reads faults.
    fn read(&self, end: &EndFlag) -> Result<()> {
        let arrivals = Arrivals::new(&self.uffd)?;
        let mut offsets = Vec::new();
        while !end.is_set() {
            arrivals.wait()?;
            self.uffd.read_faults(&self.map, &mut offsets)?;
            for offset in &offsets {
                self.touched(offset / PAGE_SIZE)?;
            }
        }
        Ok(())
    }

    fn touched(&self, page: u64) -> Result<()> {
        let whole = self.around(page);
        let mut state = self.lock();
        // Two vCPUs that touch one page make two events.
        if state.there.contains(page) {
            drop(state);
            return self.uffd.wake(&self.map, at(whole.first), bytes(whole));
        }
        if self.unit > 1 {
            state
                .touched
                .entry(whole.first)
                .or_insert_with(Instant::now);
        }
        drop(state);
        match self.unit {
            1 => self.misses.miss(page),
            _ => self.misses.want(whole),
        }
        Ok(())
    }

    /// Which pages have come is changed by one thread only, which brings them.
    fn fill(&self, pages: PageRange, filling: Filling<'_>) -> Result<u64> {
        let missing = {
            let mut missing = PageSet::new(self.ram.pages());
            missing.insert_range(pages);
            missing.subtract(&self.lock().came);
            missing
        };
        for run in missing.runs() {
            let part = match filling {
                Filling::Bytes(bytes) => {
                    let from = at(run.first - pages.first) as usize;
                    let part = bytes.get(from..from + at(run.count) as usize);
                    Filling::Bytes(part.ok_or_else(|| Error::invalid("fewer bytes than pages"))?)
                }
                other => other,
            };
            match self.unit {
                1 => self.put(run, part)?,
                _ => self.gather(run, part)?,
            }
        }
        Ok(missing.count())
    }

    /// Pages of 4 KiB go into memory as they come.
    fn put(&self, pages: PageRange, filling: Filling<'_>) -> Result<()> {
        let begun = self.lock().begun;
        match filling {
            Filling::Bytes(bytes) => {
                self.uffd.copy_bytes(&self.map, at(pages.first), bytes)?;
            }
            Filling::Zeros if self.allowed.zero => {
                self.uffd.zero(&self.map, at(pages.first), bytes(pages))?;
            }
            Filling::Zeros => pages
                .iter()
                .try_for_each(|page| self.uffd.copy_bytes(&self.map, at(page), &self.zeros))?,
            Filling::Loss if begun => self.poison(pages)?,
            // It may still turn out to be stale.
            Filling::Loss => {}
        }
        let mut state = self.lock();
        state.came.insert_range(pages);
        match filling {
            Filling::Loss if !begun => {
                state.lost.insert_range(pages);
            }
            _ => {
                state.there.insert_range(pages);
            }
        }
        Ok(())
    }

    /// Pages of 4 KiB of hugetlb are kept until all of their huge page have come.
    fn gather(&self, pages: PageRange, filling: Filling<'_>) -> Result<()> {
        let mut page = pages.first;
        while page < pages.end() {
            let whole = self.around(page);
            let part = PageRange::from(page..whole.end().min(pages.end()));
            let mut state = self.lock();
            let huge = state
                .gathered
                .entry(whole.first)
                .or_insert_with(|| vec![0; bytes(whole) as usize]);
            let from = at(part.first - whole.first) as usize;
            let to = huge.get_mut(from..from + bytes(part) as usize);
            match (filling, to) {
                (Filling::Bytes(bytes), Some(to)) => {
                    let from = at(part.first - pages.first) as usize;
                    to.copy_from_slice(&bytes[from..from + to.len()]);
                }
                (_, Some(to)) => to.fill(0),
                (_, None) => return Err(Error::invalid("a part that its huge page has not")),
            }
            if let Filling::Loss = filling {
                state.lost.insert_range(part);
            }
            state.came.insert_range(part);
            let huge = state.take_whole(whole);
            drop(state);
            if let Some(huge) = huge {
                self.bring(whole, &huge)?;
            }
            page = part.end();
        }
        Ok(())
    }

    /// A huge page that has come whole. Of one that has a lost part nothing can be shown.
    fn bring(&self, whole: PageRange, huge: &[u8]) -> Result<()> {
        let is_lost = {
            let state = self.lock();
            whole.iter().any(|page| state.lost.contains(page))
        };
        if is_lost {
            self.poison(whole)?;
        } else {
            self.uffd.copy_bytes(&self.map, at(whole.first), huge)?;
        }
        let mut state = self.lock();
        state.there.insert_range(whole);
        if let Some(since) = state.touched.remove(&whole.first) {
            self.misses.waited(since.elapsed());
        }
        Ok(())
    }

    fn poison(&self, pages: PageRange) -> Result<()> {
        if !self.allowed.poison {
            return Err(Error::invalid(format!(
                "page {} is lost at the source, and this kernel has no UFFDIO_POISON: nothing else would keep the guest \
                 from reading it as zeros",
                pages.first
            )));
        }
        self.uffd.poison(&self.map, at(pages.first), bytes(pages))?;
        self.ram.lose(pages);
        Ok(())
    }

    /// What was kept back goes into memory.
    fn begin(&self) -> Result<()> {
        let (whole, lost) = {
            let mut state = self.lock();
            state.begun = true;
            let firsts: Vec<u64> = state.gathered.keys().copied().collect();
            let whole: Vec<(PageRange, Vec<u8>)> = firsts
                .into_iter()
                .map(|first| self.around(first))
                .filter_map(|whole| Some((whole, state.take_whole(whole)?)))
                .collect();
            let lost: Vec<PageRange> = state.lost.runs().collect();
            (whole, lost)
        };
        for (whole, huge) in whole {
            self.bring(whole, &huge)?;
        }
        if self.unit == 1 {
            for pages in lost {
                self.poison(pages)?;
                self.lock().there.insert_range(pages);
            }
        }
        self.end_if_all_is_there()
    }

    /// When nothing is missing any more there is nothing to watch.
    fn end_if_all_is_there(&self) -> Result<()> {
        let mut state = self.lock();
        if !state.begun || state.over || state.there.count() < self.ram.pages() {
            return Ok(());
        }
        state.over = true;
        drop(state);
        self.uffd.unregister(&self.map)?;
        self.ram.take_back(true);
        Ok(())
    }

    /// The userfaultfd stays registered, and who waits goes on waiting: without it what is missing would be zeros.
    fn fail(&self, why: &str) {
        let mut state = self.lock();
        let why = state.failed.get_or_insert_with(|| why.to_owned()).clone();
        if let Some(machine) = state.machine.take() {
            machine.end(Error::invalid(format!("pages will never come: {why}")));
        }
    }
}

impl State {
    /// Take what was gathered of a huge page, if all of it was and may go into memory.
    fn take_whole(&mut self, whole: PageRange) -> Option<Vec<u8>> {
        let all = self.begun && whole.iter().all(|page| self.came.contains(page));
        all.then(|| self.gathered.remove(&whole.first)).flatten()
    }
}

/// Where a page is, in bytes.
fn at(page: u64) -> u64 {
    page * PAGE_SIZE
}

fn bytes(pages: PageRange) -> u64 {
    at(pages.count)
}

impl Placer for ByUserfaultfd {
    fn place(&self, first: u64, bytes: &[u8], results: &mut [Placed]) -> Result<(), MachineError> {
        let pages = PageRange::new(first, results.len() as u64);
        {
            let state = self.watch.lock();
            for (page, result) in pages.iter().zip(results) {
                *result = match state.came.contains(page) {
                    true => Placed::Present,
                    false => Placed::Now,
                };
            }
        }
        self.watch.fill(pages, Filling::Bytes(bytes))?;
        Ok(self.watch.end_if_all_is_there()?)
    }

    fn mark_zero(&self, pages: PageRange) -> Result<(), MachineError> {
        self.watch.fill(pages, Filling::Zeros)?;
        Ok(self.watch.end_if_all_is_there()?)
    }

    fn mark_lost(&self, pages: PageRange) -> Result<(), MachineError> {
        self.watch.fill(pages, Filling::Loss)?;
        Ok(self.watch.end_if_all_is_there()?)
    }

    /// What was gathered of hugetlb is not in memory yet, and is overwritten by what comes next.
    fn discard(&self, pages: PageRange) -> Result<(), MachineError> {
        let watch = &self.watch;
        if watch.unit == 1 {
            punch(watch.ram.memfd(), pages)?;
        }
        let mut state = watch.lock();
        state.came.remove_range(pages);
        state.there.remove_range(pages);
        state.lost.remove_range(pages);
        Ok(())
    }

    fn begin(&self) -> Result<(), MachineError> {
        Ok(self.watch.begin()?)
    }

    fn made(&self, machine: Ending) {
        let mut state = self.watch.lock();
        if let Some(why) = &state.failed {
            machine.end(Error::invalid(format!("pages will never come: {why}")));
        }
        state.machine = Some(machine);
    }

    fn fail(&self, why: &str) {
        self.watch.fail(why);
    }
}
