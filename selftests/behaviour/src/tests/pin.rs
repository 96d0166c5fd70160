// SPDX-License-Identifier: GPL-2.0

//! Memory under a busy guest that the kernel is asked to move: that of hugetlb stays put, that of
//! shmem moves, and no byte is lost.
//!
//! Each test has a *twin* beside the memslot, a memfd without one, mapped in the same process and written to all the
//! time: the test ends when the same request has moved the twin, so it cannot pass because nothing was moved at all. In
//! the end the memslot is removed: then the very pages that stayed put are moved, so it was the memslot that kept them.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kvm_demand_paging::{AliasMap, Backing, Memfd, PageRange, Paging};

use crate::busy::Busy;
use crate::cgroup::Cgroup;
use crate::check::{skip, Result};
use crate::numa::{self, Setting};
use crate::slot::{need_huge_pages, Slot, BLOCK, ID, PAGE};
use crate::sys::{self, Touched};
use crate::task::{until, Task};

tests! {
    "native-moved-by-move-pages" => || moves(move_pages),
    "pin-move-pages-hugetlb" => || stays(Backing::Huge2M, move_pages),
    "native-moved-by-migrate-pages" => || moves(migrate_pages),
    "pin-migrate-pages-hugetlb" => || stays(Backing::Huge2M, migrate_pages),
    "native-moved-by-cpuset" => || moves(cpuset),
    "pin-cpuset-hugetlb" => || stays(Backing::Huge2M, cpuset),
    "native-compaction-beside-a-guest" => compaction_beside_a_guest,
    "pin-compaction-hugetlb" => || stays_beside(Backing::Huge2M, Backing::Shmem, compaction),
    "native-moved-by-khugepaged" => || moves(khugepaged),
    "native-moved-by-numa-balancing" => || moves(balancing),
    "pin-numa-balancing-hugetlb" => || stays_beside(Backing::Huge2M, Backing::Shmem, balancing),
}

/// Where the memory is at first, and where it is asked to go.
const FROM: u32 = numa::NODES[0];
const TO: u32 = numa::NODES[1];

/// Pages of a memslot.
fn extent(backing: Backing) -> u64 {
    match backing {
        Backing::Shmem => BLOCK,
        Backing::Huge2M | Backing::Huge1G => 2 * backing.page_size() / PAGE,
    }
}

/// Memory that nobody pins. A thread on a CPU of the other node counts in it, and looks at the memslot's pages as it goes.
struct Twin {
    map: Arc<AliasMap>,
    each: u64,
    stop: Arc<AtomicBool>,
    counter: Task<()>,
}

impl Twin {
    fn start(backing: Backing, map: AliasMap, slot: &Arc<Slot>) -> Result<Self> {
        /// A CPU of the other node, with no vCPU.
        const CPU: u64 = 3;
        let (map, stop) = (Arc::new(map), Arc::new(AtomicBool::new(false)));
        let counter = {
            let (map, stop, slot) = (map.clone(), stop.clone(), slot.clone());
            Task::work(move || {
                sys::stay_on_cpu(CPU)?;
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    for page in 0..map.pages() {
                        let into = (page * PAGE) as usize;
                        let at = map.as_ptr().wrapping_add(into).cast::<u64>();
                        ensure_eq!(
                            sys::load(at),
                            Touched::Value(round),
                            "page {page} of the twin"
                        );
                        // SAFETY: the mapping is accessed as words only.
                        unsafe { sys::store(at, round + 1) };
                        sys::load(slot.address(page % slot.guest.pages()));
                    }
                    round += 1;
                    // The vCPUs have more to do.
                    thread::sleep(Duration::from_millis(5));
                }
                Ok(())
            })?
        };
        Ok(Self {
            map,
            each: backing.page_size(),
            stop,
            counter,
        })
    }

    fn frames(&self) -> Result<Vec<u64>> {
        numa::frames(self.map.as_ptr(), self.map.pages())
    }

    fn end(self) -> Result {
        self.stop.store(true, Ordering::Relaxed);
        self.counter.join("who counts in the twin")
    }
}

struct Scene {
    slot: Arc<Slot>,
    /// The memfd's allocations in the alias mapping.
    alias: Vec<u64>,
    twin: Twin,
    busy: Busy,
    /// The memslot's frames, when the guest had written to all.
    frames: Vec<u64>,
}

impl Scene {
    fn new(backing: Backing, kind: Backing) -> Result<Self> {
        numa::need_nodes()?;
        let pages = extent(backing);
        if backing != Backing::Shmem {
            // Of both nodes there must be enough.
            need_huge_pages(32)?;
        }
        let slot = Slot::new(backing, pages)?;
        let twin = Memfd::create("kdp-twin", kind, BLOCK * PAGE)?.map_all()?;
        let gaps = Memfd::create("kdp-gaps", Backing::Shmem, 4 * BLOCK * PAGE)?;
        let between = gaps.map_all()?;
        // Side by side, with gaps after that: memory that compaction likes to move.
        numa::on_node(FROM, || {
            for page in 0..pages {
                touch(&slot.alias, page);
                touch(&between, 2 * page);
                if page < twin.pages() {
                    touch(&twin, page);
                    touch(&between, 2 * page + 1);
                }
            }
            Ok(())
        })?;
        gaps.punch_hole(PageRange::new(0, 4 * BLOCK))?;
        slot.vm.set_paging(ID, Paging::OnPresent)?;
        let busy = Busy::start(&slot)?;
        let alias = numa::addresses(&slot.alias, backing.page_size());
        let frames = numa::frames(slot.alias.as_ptr(), slot.alias.pages())?;
        ensure!(
            numa::are_on(FROM, &frames),
            "the memslot's memory is not on node {FROM} at first"
        );
        let twin = Twin::start(kind, twin, &slot)?;
        Ok(Self {
            slot,
            alias,
            twin,
            busy,
            frames,
        })
    }

    /// The memslot's pages are where they were. (Of the memslot's own mapping the kernel tells no frames; that it has the
    /// memfd's is seen by the bytes, in the end.)
    fn check_frames(&self) -> Result {
        let now = numa::frames(self.slot.alias.as_ptr(), self.slot.guest.pages())?;
        let moved = now
            .iter()
            .zip(&self.frames)
            .filter(|(now, then)| now != then);
        ensure_eq!(
            moved.count(),
            0,
            "pages of the memslot that have been moved"
        );
        Ok(())
    }

    /// Asks the kernel for what it has just refused, without a memslot: now it does it.
    fn end(self) -> Result {
        self.twin.end()?;
        let rounds = self.busy.end()?;
        println!("the guest's vCPUs have gone through the memory {rounds} times");
        self.slot.vm.remove_memslot(ID)?;
        until("the same pages are moved, without a memslot", || {
            numa::migrate(FROM, TO)?;
            is_moved(&self.slot.alias)
        })
    }
}

/// Whether all of a mapping's pages are on the other node.
fn is_moved(map: &AliasMap) -> Result<bool> {
    Ok(numa::are_on(TO, &numa::frames(map.as_ptr(), map.pages())?))
}

/// Writes to a page, so that it is there.
fn touch(map: &AliasMap, page: u64) {
    let at = map.as_ptr().wrapping_add((page * PAGE) as usize);
    // SAFETY: it is memory that is accessed as words only.
    unsafe { sys::store(at.cast(), 0) };
}

fn stays(backing: Backing, ask: fn(&Scene) -> Result) -> Result {
    stays_beside(backing, backing, ask)
}

/// The same with a twin of another kind, for what does not move memory of this kind at all.
fn stays_beside(backing: Backing, twin: Backing, ask: fn(&Scene) -> Result) -> Result {
    let scene = Scene::new(backing, twin)?;
    ask(&scene)?;
    scene.busy.goes_on(2)?;
    scene.check_frames()?;
    scene.end()
}

/// The kernel moves the memory of a memslot of shmem, and the guest goes on.
fn moves(ask: fn(&Scene) -> Result) -> Result {
    let scene = Scene::new(Backing::Shmem, Backing::Shmem)?;
    let alias = &scene.slot.alias;
    ask(&scene)?;
    until("pages of the memslot are moved", || {
        let now = numa::frames(alias.as_ptr(), alias.pages())?;
        Ok(now != scene.frames)
    })?;
    scene.busy.goes_on(2)?;
    scene.twin.end()?;
    let rounds = scene.busy.end()?;
    println!("the guest's vCPUs have gone through the memory {rounds} times");
    Ok(())
}

/// The kernel compacts memory while a guest writes to a memslot of shmem. Whether it moves pages of it
/// depends on what else is in memory.
fn compaction_beside_a_guest() -> Result {
    let scene = Scene::new(Backing::Shmem, Backing::Shmem)?;
    for _ in 0..5 {
        fs::write("/proc/sys/vm/compact_memory", "1")?;
    }
    scene.busy.goes_on(2)?;
    let alias = &scene.slot.alias;
    let now = numa::frames(alias.as_ptr(), alias.pages())?;
    let moved = now
        .iter()
        .zip(&scene.frames)
        .filter(|(now, then)| now != then);
    println!("{} pages of the memslot were moved", moved.count());
    scene.twin.end()?;
    scene.busy.end().map(drop)
}

impl Scene {
    /// Whether its memslot is on shmem.
    fn is_native(&self) -> bool {
        self.slot.memfd.page_size() == PAGE
    }

    /// Asks again and again until the twin has been moved, all of it.
    fn until_twin_is_moved(&self, mut ask: impl FnMut() -> Result) -> Result {
        until("the twin is on the other node", || {
            ask()?;
            is_moved(&self.twin.map)
        })
    }
}

/// The pages of the memslot, by their address in either mapping.
fn move_pages(scene: &Scene) -> Result {
    let twin = numa::addresses(&scene.twin.map, scene.twin.each);
    if scene.is_native() {
        numa::move_pages(&scene.alias, TO)?;
        return scene.until_twin_is_moved(|| numa::move_pages(&twin, TO).map(drop));
    }
    let device = scene.slot.address(1) as u64;
    ensure_eq!(
        numa::refusal(device, TO)?,
        libc::EFAULT,
        "move_pages(2) of the memslot's mapping"
    );
    for _ in 0..3 {
        let left = numa::move_pages(&scene.alias, TO)?;
        ensure_eq!(left, scene.alias.len() as u64, "pages that stay");
    }
    scene.until_twin_is_moved(|| numa::move_pages(&twin, TO).map(drop))
}

/// All memory of the process.
fn migrate_pages(scene: &Scene) -> Result {
    scene.until_twin_is_moved(|| Ok(numa::migrate(FROM, TO)?))
}

/// The process is confined to the memory of the other node.
fn cpuset(scene: &Scene) -> Result {
    let cgroup = Cgroup::new("cpuset")?;
    cgroup.set("cpuset.mems", FROM)?;
    cgroup.enter()?;
    scene.until_twin_is_moved(|| {
        // What is set already is no request; the move is done in the kernel's own time.
        cgroup.set("cpuset.mems", FROM)?;
        cgroup.set("cpuset.mems", TO)?;
        thread::sleep(Duration::from_millis(200));
        Ok(())
    })
}

/// Compaction of all zones.
fn compaction(scene: &Scene) -> Result {
    let twin = &scene.twin;
    let before = twin.frames()?;
    until("pages of the twin are moved", || {
        fs::write("/proc/sys/vm/compact_memory", "1")?;
        Ok(twin.frames()? != before)
    })?;
    for _ in 0..3 {
        fs::write("/proc/sys/vm/compact_memory", "1")?;
    }
    Ok(())
}

/// Whether each 2 MiB of a mapping is one huge page.
fn is_huge(frames: &[u64]) -> bool {
    frames
        .chunks(BLOCK as usize)
        .all(|block| block[0] % BLOCK == 0 && block.windows(2).all(|pair| pair[1] == pair[0] + 1))
}

/// Small pages of shmem are collected into huge ones: by khugepaged, which may compact memory for that, and on request.
fn khugepaged(scene: &Scene) -> Result {
    const THP: &str = "/sys/kernel/mm/transparent_hugepage";
    let twin = &scene.twin;
    let _settings = [
        ("shmem_enabled", "advise"),
        ("defrag", "always"),
        ("khugepaged/defrag", "1"),
        ("khugepaged/pages_to_scan", "65536"),
        ("khugepaged/scan_sleep_millisecs", "10"),
        ("khugepaged/alloc_sleep_millisecs", "10"),
    ]
    .into_iter()
    .map(|(name, value)| Setting::set(format!("{THP}/{name}"), value))
    .collect::<Result<Vec<_>>>()?;
    ensure!(!is_huge(&twin.frames()?), "the twin is huge at first");
    for map in [&scene.slot.alias, &*twin.map] {
        sys::advise(map.as_ptr(), map.len(), libc::MADV_HUGEPAGE)?;
    }
    until("the twin is huge", || Ok(is_huge(&twin.frames()?)))?;
    let alias = &scene.slot.alias;
    // By the memfd's own mapping. It fails while a page is just being moved.
    let _ = sys::advise(alias.as_ptr(), alias.len(), libc::MADV_COLLAPSE);
    Ok(())
}

/// What the kernel does with part of this process's memory, by tracepoints of its own.
struct Trace {
    dir: PathBuf,
}

impl Trace {
    /// Faults of user mode in a mapping, and whether automatic balancing passes over it.
    fn start(name: &str, at: *const u8, len: usize) -> Result<Self> {
        const INSTANCES: &str = "/sys/kernel/tracing/instances";
        if !fs::exists(INSTANCES)? {
            return skip("tracefs is not mounted");
        }
        let dir = PathBuf::from(format!("{INSTANCES}/kdp-{name}-{}", std::process::id()));
        fs::create_dir(&dir)?;
        let this = Self { dir };
        let (start, end) = (at as u64, at as u64 + len as u64);
        for (event, filter) in [
            (
                "exceptions/page_fault_user",
                format!("address >= {start:#x} && address < {end:#x}"),
            ),
            (
                "sched/sched_skip_vma_numa",
                // "unsuitable": not for what it has been touched by, or when.
                format!("vm_start >= {start:#x} && vm_end <= {end:#x} && reason == 0"),
            ),
        ] {
            let event = this.dir.join("events").join(event);
            fs::write(event.join("filter"), filter)?;
            fs::write(event.join("enable"), "1")?;
        }
        Ok(this)
    }

    /// Lines of an event.
    fn lines(&self, event: &str) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.dir.join("trace"))?;
        let is_it = |line: &&str| !line.starts_with('#') && line.contains(event);
        Ok(text.lines().filter(is_it).map(str::to_owned).collect())
    }

    fn faults(&self) -> Result<Vec<String>> {
        self.lines("page_fault_user:")
    }

    fn passed_over(&self) -> Result<usize> {
        Ok(self.lines("sched_skip_vma_numa:")?.len())
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join("events/enable"), "0");
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Automatic balancing takes access away from a process's page table entries, to see by the faults who uses what.
///
/// The twin's thread touches every page of the twin and of the memslot all the time: an entry without access is a fault of
/// user mode, which the kernel traces with its address. The twin has them, and is moved for them; the memslot's mapping
/// has none if it is of hugetlb, and the kernel says each time that it passes over it.
fn balancing(scene: &Scene) -> Result {
    const SCAN: &str = "/sys/kernel/debug/sched/numa_balancing";
    let twin = &scene.twin;
    let guest = &scene.slot.guest;
    let before = twin.frames()?;
    let memslot = Trace::start("memslot", guest.as_ptr(), guest.len())?;
    let other = Trace::start("twin", twin.map.as_ptr(), twin.map.len())?;
    let _settings = [
        (format!("{SCAN}/scan_delay_ms"), "10"),
        (format!("{SCAN}/scan_period_min_ms"), "10"),
        (format!("{SCAN}/scan_period_max_ms"), "100"),
        (format!("{SCAN}/scan_size_mb"), "64"),
        ("/proc/sys/kernel/numa_balancing".to_owned(), "1"),
    ]
    .into_iter()
    .map(|(path, value)| Setting::set(path, value))
    .collect::<Result<Vec<_>>>()?;
    let native = scene.is_native();
    until(
        "balancing has moved the twin, and passed over the memslot if it is of hugetlb",
        || {
            Ok(other.faults()?.len() as u64 >= BLOCK
                && twin.frames()? != before
                && (native || memslot.passed_over()? >= 3))
        },
    )?;
    if native {
        until("there are hinting faults in the memslot", || {
            Ok(memslot.faults()?.len() as u64 >= BLOCK)
        })?;
        return scene.busy.goes_on(2);
    }
    scene.busy.goes_on(2)?;
    println!(
        "hinting faults in the twin: {} or more; the memslot was passed over {} times",
        other.faults()?.len(),
        memslot.passed_over()?
    );
    let faults = memslot.faults()?;
    ensure!(
        faults.is_empty(),
        "the memslot's mapping had faults, as if access was taken from its entries: {}",
        faults.join("\n")
    );
    ensure_eq!(
        other.passed_over()?,
        0,
        "how often the twin was passed over"
    );
    Ok(())
}
