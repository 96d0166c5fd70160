//! What a memory error costs, without us and with us, and what KDP_REPLACE makes of it.
//!
//! The error is injected into the very frame of a page, and what follows is the kernel's own handling. A huge page
//! holds known contents; then every page of it is read: what cannot be read is lost, what can must be as it was.

use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kdp_vmm::{
    backing_name, frame_of, Backing, GuestMemory, Image, Machine, MemoryErrors, Revisit, Source,
    Stop, Vcpu, MIN_GPA, PAGE_SIZE,
};
use kvm_demand_paging::{AliasMap, EventKind, GuestMap, Memfd, PageRange, Replaced, Vm};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vm_memory::volatile_memory::{Error as VolatileMemoryError, VolatileSlice};
use vm_memory::WriteVolatile;

use crate::figures::Key;
use crate::row::{Clock, Damage, Pause, Row};
use crate::stats::{median, range};
use crate::table::{number, thousands};
use crate::Error;

/// Pages that KDP_REPLACE has on their way at once.
const PART_PAGES: u64 = 64;

const SLOT: u32 = 0;

/// What is read of a page to see whether it can be.
const WORD: u64 = 8;

/// The pages that a guest visits in a sweep, at most: as many as in the other series. Of 1 GiB that is one in each part.
const SWEEP: u64 = 4096;

/// What a guest or an event may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What came of one error.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Microseconds from the injection to the event, or without us to the end of the kernel's handling.
    us: f64,
    bytes_lost: u64,
    /// None without us.
    replaced: Option<ReplaceSample>,
}

/// What came of replacing the huge page then.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct ReplaceSample {
    us: f64,
    copied: u64,
    bytes_lost: u64,
    /// The longest visit of a guest meanwhile, and over the same time without.
    pause_us: f64,
    pause_without_us: f64,
}

/// A huge page with known contents, and which page of it is to be lost.
struct Prepared {
    backing: Backing,
    image: Image,
    memfd: Memfd,
    alias: AliasMap,
    /// The last page: a guest can visit all others in one go.
    bad: u64,
}

impl Prepared {
    fn new(backing: Backing) -> Result<Self, Error> {
        let bytes = backing.page_size();
        let image = Image::repeating(bytes, 1)?;
        let memfd = Memfd::create("kdp-bench-error", backing, bytes)?;
        let alias = memfd.map_all()?;
        let pages = alias.pages();
        image.fetch(PageRange::new(0, pages), &alias.volatile())?;
        Ok(Self {
            backing,
            image,
            memfd,
            alias,
            bad: pages - 1,
        })
    }

    fn inject(&self, errors: &MemoryErrors) -> Result<(), Error> {
        let at = self.alias.slice(PageRange::page(self.bad))?;
        let frame = frame_of(at.ptr_guard().as_ptr())?;
        Ok(errors.inject(self.backing, frame)?)
    }

    /// The bytes that can no longer be read in this mapping of it. A system call is told, and no signal comes.
    fn bytes_lost(&self, mapping: &VolatileSlice<'_>) -> Result<u64, Error> {
        let sink = Memfd::create("kdp-bench-sink", Backing::Shmem, PAGE_SIZE)?;
        let mut lost = 0;
        for page in 0..self.alias.pages() {
            let bytes = part(mapping, page * PAGE_SIZE, PAGE_SIZE)?;
            match sink.as_fd().write_volatile(&part(&bytes, 0, WORD)?) {
                Ok(_) if self.is_as_it_was(page, &bytes)? => {}
                Ok(_) => {
                    return Err(Error::Wrong {
                        what: format!("page {page} beside a memory error"),
                    })
                }
                Err(VolatileMemoryError::IOError(e))
                    if e.raw_os_error() == Some(Errno::FAULT.raw_os_error()) =>
                {
                    lost += PAGE_SIZE;
                }
                Err(e) => return Err(volatile(e)),
            }
        }
        Ok(lost)
    }

    fn is_as_it_was(&self, page: u64, bytes: &VolatileSlice<'_>) -> Result<bool, Error> {
        let mut both = [[0_u8; PAGE_SIZE as usize]; 2];
        let [is, was] = &mut both;
        bytes.copy_to(&mut is[..]);
        self.image
            .fetch(PageRange::page(page), &VolatileSlice::from(&mut was[..]))?;
        Ok(is == was)
    }
}

fn part<'a>(of: &VolatileSlice<'a>, at: u64, bytes: u64) -> Result<VolatileSlice<'a>, Error> {
    of.subslice(at as usize, bytes as usize).map_err(volatile)
}

fn volatile(e: VolatileMemoryError) -> Error {
    kdp_vmm::Error::Invalid(e.to_string()).into()
}

/// A stretch of a guest's visits: the longest of them took so many microseconds.
struct Stretch {
    begin: Instant,
    end: Instant,
    longest_us: f64,
}

/// A guest that reads pages of the huge page over and over, and leaves out the bad one. It ends when nobody asks it any more.
struct Reader(Receiver<Result<Stretch, kdp_vmm::Error>>);

impl Reader {
    fn start(memory: GuestMemory, pages: u64) -> Result<Self, Error> {
        let stride = pages.div_ceil(SWEEP);
        // Without the last one, which is bad.
        let count = (pages - 1).div_ceil(stride);
        let program = Revisit::new(MIN_GPA, count)
            .stride(stride)
            .sweeps(SWEEP / count)
            .program();
        let machine = Machine::new(0)?;
        machine.map(MIN_GPA, memory)?;
        let mut vcpu = machine.vcpu(0, &program)?;
        let khz = f64::from(vcpu.tsc_khz()?);
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut sum = None;
            let mut begin = Instant::now();
            loop {
                let stretch = next_stretch(&mut vcpu, begin, khz, &mut sum);
                let is_last = stretch.is_err();
                begin = Instant::now();
                if sender.send(stretch).is_err() || is_last {
                    return;
                }
            }
        });
        Ok(Self(receiver))
    }

    fn next(&self) -> Result<Stretch, Error> {
        self.0
            .recv_timeout(PATIENCE)
            .map_err(|e| match e {
                RecvTimeoutError::Timeout => kdp_vmm::Error::TimedOut {
                    seconds: PATIENCE.as_secs(),
                    waiting: "the guest has not visited all of its pages".to_owned(),
                },
                RecvTimeoutError::Disconnected => {
                    kdp_vmm::Error::Invalid("the guest's thread is gone".to_owned())
                }
            })?
            .map_err(Error::from)
    }

    /// Its longest visit from then on until a stretch comes that is the last; and when that was over.
    fn longest(
        &self,
        from: Instant,
        is_last: impl Fn(&Stretch) -> bool,
    ) -> Result<(f64, Instant), Error> {
        let mut longest_us = 0.0_f64;
        loop {
            let stretch = self.next()?;
            if stretch.end > from {
                longest_us = longest_us.max(stretch.longest_us);
            }
            if is_last(&stretch) {
                return Ok((longest_us, stretch.end));
            }
        }
    }
}

/// Runs a guest until a stretch is over. `sum` is what it read in the one before, and must read again.
fn next_stretch(
    vcpu: &mut Vcpu,
    begin: Instant,
    khz: f64,
    sum: &mut Option<u64>,
) -> Result<Stretch, kdp_vmm::Error> {
    let mut report = || loop {
        match vcpu.run()? {
            Stop::Report(value) => return Ok(value),
            Stop::Start | Stop::Interrupted => {}
            stop => {
                return Err(kdp_vmm::Error::Invalid(format!(
                    "the guest stopped: {stop:?}"
                )))
            }
        }
    };
    let (read, ticks) = (report()?, report()?);
    if *sum.get_or_insert(read) != read {
        return Err(kdp_vmm::Error::Invalid(
            "the guest read something else than before".to_owned(),
        ));
    }
    Ok(Stretch {
        begin,
        end: Instant::now(),
        longest_us: ticks as f64 * 1e3 / khz,
    })
}

/// One error, in plain memory of this backing or in a memslot of ours.
pub fn sample(backing: Backing, ours: bool) -> Result<Sample, Error> {
    let errors = MemoryErrors::new();
    let memory = Prepared::new(backing)?;
    match ours {
        false => without_us(&errors, &memory),
        true => with_us(&errors, &memory),
    }
}

fn without_us(errors: &MemoryErrors, memory: &Prepared) -> Result<Sample, Error> {
    let started = Instant::now();
    memory.inject(errors)?;
    Ok(Sample {
        us: micros(started),
        bytes_lost: memory.bytes_lost(&memory.alias.volatile())?,
        replaced: None,
    })
}

fn with_us(errors: &MemoryErrors, memory: &Prepared) -> Result<Sample, Error> {
    let vm = Vm::open()?;
    let memslot = vm
        .create_memslot(SLOT, &memory.memfd)
        .base_gfn(MIN_GPA / PAGE_SIZE)
        .create()?;
    let guest = Arc::new(memslot.map()?);
    let reader = Reader::start(GuestMemory::Paged(guest.clone()), guest.pages())?;
    reader.next()?;
    let started = Instant::now();
    memory.inject(errors)?;
    wait_for_event(&vm, memory.bad)?;
    let us = micros(started);
    let bytes_lost = memory.bytes_lost(&guest.volatile())?;
    let replaced = replace(&vm, memory, &guest, &reader)?;
    Ok(Sample {
        us,
        bytes_lost,
        replaced: Some(replaced),
    })
}

fn wait_for_event(vm: &Vm, bad: u64) -> Result<(), Error> {
    let mut events = Vec::new();
    if vm.wait_event(Some(PATIENCE))? {
        vm.read_events(&mut events, 1)?;
    }
    match events.as_slice() {
        [event] if event.kind == EventKind::Poisoned && event.page == bad => Ok(()),
        other => Err(kdp_vmm::Error::Invalid(format!(
            "there is a memory error in page {bad}, and these are the events: {other:?}"
        ))
        .into()),
    }
}

fn replace(
    vm: &Vm,
    memory: &Prepared,
    guest: &GuestMap,
    reader: &Reader,
) -> Result<ReplaceSample, Error> {
    // The huge page is mapped by its small ones since the error: until the guest has them all.
    let now = Instant::now();
    reader.longest(now, |stretch| stretch.begin > now)?;
    let started = Instant::now();
    let Replaced { copied, .. } = vm.replace(SLOT, 0)?;
    let us = micros(started);
    // Pages that were on their way come back at the guest's next visit: until it has been everywhere once more.
    let over = Instant::now();
    let (pause_us, end) = reader.longest(started, |stretch| stretch.begin > over)?;
    let until = end + (end - started);
    let (pause_without_us, _) = reader.longest(end, |stretch| stretch.end >= until)?;
    Ok(ReplaceSample {
        us,
        copied,
        bytes_lost: memory.bytes_lost(&guest.volatile())?,
        pause_us,
        pause_without_us,
    })
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

/// The rows of all samples of one kind: `poison-plain`, or `poison` and `replace`.
pub fn rows(backing: Backing, clock: Clock, samples: &[Sample]) -> Vec<Row> {
    let row = |mode: &str, pages: u64, us: Vec<f64>, lost: u64, pause| {
        let p50_us = median(us.iter().copied());
        let [_, p99_us] = range(us.iter().copied());
        let us_per_page = p50_us / pages as f64;
        Row {
            mode: mode.to_owned(),
            backing: backing_name(backing).to_owned(),
            pattern: "sequential".to_owned(),
            vcpus: 1,
            readers: 0,
            link_gbit: None,
            bytes: backing.page_size(),
            clock,
            us_per_page,
            pages_per_s: 1e6 / us_per_page,
            p50_us,
            p99_us,
            exits: 0,
            events: 0,
            pages,
            pages_fetched: 0,
            pages_unneeded: 0,
            fault_bytes: PAGE_SIZE,
            runs: us.len(),
            us_per_page_range: range(us.iter().map(|us| us / pages as f64)),
            cdf: Vec::new(),
            machine: None,
            parts: None,
            damage: Some(Damage {
                bytes_lost: lost,
                bytes_kept: backing.page_size() - lost,
                pause,
            }),
        }
    };
    let lost = samples.iter().map(|s| s.bytes_lost).max().unwrap_or(0);
    let us = samples.iter().map(|s| s.us).collect();
    let replaced: Vec<ReplaceSample> = samples.iter().filter_map(|s| s.replaced).collect();
    let Some(first) = replaced.first() else {
        return vec![row("poison-plain", 1, us, lost, None)];
    };
    let pauses = || replaced.iter().map(|s| s.pause_us);
    let without = || replaced.iter().map(|s| s.pause_without_us);
    let pause = Pause {
        us: median(pauses()),
        us_range: range(pauses()),
        without_us: median(without()),
        without_us_range: range(without()),
    };
    let poison = Row {
        events: 1,
        ..row("poison", 1, us, lost, None)
    };
    let us = replaced.iter().map(|s| s.us).collect();
    let lost = replaced.iter().map(|s| s.bytes_lost).max().unwrap_or(0);
    vec![poison, row("replace", first.copied, us, lost, Some(pause))]
}

/// What the first table of a report says.
pub const ERRORS: &str = "The same memory error in a huge page of plain hugetlb memory and in one of a memslot: bytes \
    that can no longer be read and, with us, those that can and are as they were; microseconds from the injection to \
    the end of the kernel's own handling, where nobody is told, and to the event.";

pub const ERRORS_HEAD: [&str; 6] = [
    "backing",
    "lost without us",
    "lost with us",
    "kept with us",
    "us to the end",
    "us to the event",
];

/// What the second one says.
pub const REPLACE: &str = "KDP_REPLACE of that huge page, in microseconds, and what the copying of 64 pages has of it; \
    the longest visit of a guest that reads the huge page over and over, meanwhile and over the same time without: \
    medians and ranges of the runs. A vCPU is to wait for the copying of 64 pages at most, and beside that for the lock \
    to be handed over and for its own fault.";

pub const REPLACE_HEAD: [&str; 10] = [
    "backing",
    "the call",
    "64 pages",
    "bytes kept",
    "bytes lost",
    "longest visit",
    "of runs",
    "without",
    "of runs",
    "ratio",
];

/// The lines of the first table: all backings of which both rows are there.
pub fn errors(rows: &[Row]) -> impl Iterator<Item = [String; 6]> + '_ {
    let ours = rows.iter().filter(|row| row.mode == "poison");
    ours.filter_map(|ours| {
        let plain =
            Key::new("poison-plain", &ours.backing, &ours.pattern, ours.clock).find(rows)?;
        let [without, with] = [plain.damage?, ours.damage?];
        Some([
            ours.backing.clone(),
            thousands(without.bytes_lost as i64),
            thousands(with.bytes_lost as i64),
            thousands(with.bytes_kept as i64),
            number(plain.p50_us),
            number(ours.p50_us),
        ])
    })
}

/// Those of the second one.
pub fn replacements(rows: &[Row]) -> impl Iterator<Item = [String; 10]> + '_ {
    rows.iter().filter_map(|row| {
        let damage = row.damage?;
        let pause = damage.pause?;
        let runs = |[least, greatest]: [f64; 2]| format!("{}–{}", number(least), number(greatest));
        Some([
            row.backing.clone(),
            number(row.p50_us),
            number(row.us_per_page * PART_PAGES as f64),
            thousands(damage.bytes_kept as i64),
            thousands(damage.bytes_lost as i64),
            number(pause.us),
            runs(pause.us_range),
            number(pause.without_us),
            runs(pause.without_us_range),
            number(pause.us / pause.without_us),
        ])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::check;

    const HUGE: u64 = 2 << 20;

    fn sample(us: f64, pause_us: f64) -> Sample {
        Sample {
            us,
            bytes_lost: PAGE_SIZE,
            replaced: Some(ReplaceSample {
                us: 100.0 * us,
                copied: 511,
                bytes_lost: PAGE_SIZE,
                pause_us,
                pause_without_us: pause_us / 2.0,
            }),
        }
    }

    #[test]
    fn rows_are_medians_and_the_worst_of_what_is_lost() {
        let plain = Sample {
            bytes_lost: HUGE,
            replaced: None,
            ..sample(40.0, 0.0)
        };
        let ours = [
            sample(70.0, 300.0),
            sample(50.0, 900.0),
            sample(60.0, 400.0),
        ];
        let plain = rows(Backing::Huge2M, Clock::Time, &[plain]);
        let ours = rows(Backing::Huge2M, Clock::Time, &ours);
        check(&[plain.clone(), ours.clone()].concat()).unwrap();
        let [plain] = &plain[..] else {
            panic!("{plain:?}")
        };
        let damage = plain.damage.unwrap();
        assert_eq!((damage.bytes_lost, damage.bytes_kept), (HUGE, 0));
        let [poison, replace] = &ours[..] else {
            panic!("{ours:?}")
        };
        assert_eq!((poison.p50_us, poison.events), (60.0, 1));
        assert_eq!((replace.p50_us, replace.pages), (6000.0, 511));
        let damage = replace.damage.unwrap();
        assert_eq!(
            (damage.bytes_lost, damage.bytes_kept),
            (PAGE_SIZE, HUGE - PAGE_SIZE)
        );
        let pause = damage.pause.unwrap();
        assert_eq!((pause.us, pause.us_range), (400.0, [300.0, 900.0]));
        assert_eq!(
            (pause.without_us, pause.without_us_range),
            (200.0, [150.0, 450.0])
        );
    }
}
