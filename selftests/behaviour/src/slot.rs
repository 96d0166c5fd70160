// SPDX-License-Identifier: GPL-2.0

//! A VM with one memslot, and the views of it.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use kdp_vmm::Machine;
use kvm_demand_paging::{
    AliasMap, Backing, Event, GuestMap, Marked, Memfd, Memslot, MemslotBuilder, PageRange, State,
    Vm,
};

use crate::check::{skip, Result};
use crate::content::{self, WORDS};
use crate::sys::{self, Touched};
use crate::task::{Task, MOMENT, PATIENCE};

/// Where guests have the memslot.
pub const GPA: u64 = kdp_vmm::MIN_GPA;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Pages of a 2 MiB block.
pub const BLOCK: u64 = 512;

/// Pages of the window that a fault maps where they are present (the module's parameter fault_around_pages).
pub const WINDOW: u64 = 16;

/// Pages of a 1 GiB block.
pub const GIGANTIC: u64 = BLOCK * BLOCK;

/// Both backings, each with the pages that a small memslot on it has.
pub const BACKINGS: [(Backing, u64); 2] = [(Backing::Shmem, 64), (Backing::Huge2M, 2 * BLOCK)];

/// One memslot of a VM of its own. What it is for: tests touch `guest`, handlers fill `alias`.
pub struct Slot {
    /// The VM.
    pub vm: Vm,
    /// The memory.
    pub memfd: Memfd,
    /// The memslot.
    pub memslot: Memslot,
    /// Guest memory as the VMM has it mapped.
    pub guest: Arc<GuestMap>,
    /// The same memory, past the module.
    pub alias: AliasMap,
}

/// The memslot's id.
pub const ID: u32 = 5000;

impl Slot {
    /// So many pages, all absent.
    pub fn new(backing: Backing, pages: u64) -> Result<Arc<Self>> {
        Self::with(backing, pages, |builder| builder.paging(true))
    }

    /// So many pages, with a memslot that is described further by `describe`.
    pub fn with(
        backing: Backing,
        pages: u64,
        describe: impl FnOnce(MemslotBuilder<'_>) -> MemslotBuilder<'_>,
    ) -> Result<Arc<Self>> {
        match backing {
            Backing::Shmem => {}
            Backing::Huge2M => need_huge_pages(pages.div_ceil(BLOCK))?,
            Backing::Huge1G => need_gigantic_pages(pages.div_ceil(GIGANTIC))?,
        }
        let memfd = Memfd::create("kdp-behaviour", backing, pages * PAGE)?;
        Self::of(Vm::open()?, memfd, describe)
    }

    /// Creates a memslot over a memfd. `describe` may limit it to a part of the memfd.
    pub fn of(
        vm: Vm,
        memfd: Memfd,
        describe: impl FnOnce(MemslotBuilder<'_>) -> MemslotBuilder<'_>,
    ) -> Result<Arc<Self>> {
        let memslot = describe(vm.create_memslot(ID, &memfd).base_gfn(GPA / PAGE)).create()?;
        let guest = Arc::new(memslot.map()?);
        let alias = memfd.map_all()?;
        Ok(Arc::new(Self {
            vm,
            memfd,
            memslot,
            guest,
            alias,
        }))
    }

    /// A machine that has the memslot at [`GPA`].
    pub fn machine(&self) -> Result<Machine> {
        need_kvm()?;
        let machine = Machine::new(0)?;
        machine.map(GPA, self.guest_memory())?;
        Ok(machine)
    }

    /// The mapping, to give to a machine.
    pub fn guest_memory(&self) -> kdp_vmm::GuestMemory {
        kdp_vmm::GuestMemory::Paged(self.guest.clone())
    }

    /// The address of a page in the VMM's mapping.
    pub fn address(&self, page: u64) -> *mut u64 {
        assert!(page < self.guest.pages());
        self.guest
            .as_ptr()
            .wrapping_add((page * PAGE) as usize)
            .cast()
    }

    /// Puts a version of a page's contents into the memory, past the module.
    pub fn fill(&self, page: u64, version: u64) -> Result {
        Ok(self.alias.write(page, &content::bytes(page, version))?)
    }

    /// Changes the state of one page; how many pages that changed.
    pub fn mark(&self, state: State, page: u64) -> Result<u64> {
        Ok(self.mark_range(state, PageRange::page(page))?.changed)
    }

    /// Changes the state of a range.
    pub fn mark_range(&self, state: State, range: PageRange) -> Result<Marked> {
        Ok(self.vm.mark(ID, state, &[range])?)
    }

    /// Fills a page and makes it present.
    pub fn place(&self, page: u64, version: u64) -> Result {
        self.fill(page, version)?;
        self.mark(State::Present, page)?;
        Ok(())
    }

    /// Reads a whole page through the VMM's mapping.
    pub fn words(&self, page: u64) -> Result<[u64; WORDS]> {
        words_at(self.address(page))
    }

    /// Reads a page through the VMM's mapping and checks all of it.
    pub fn check(&self, page: u64, version: u64) -> Result {
        match content::check(&self.words(page)?, page, version) {
            Ok(()) => Ok(()),
            Err(wrong) => fail!("{wrong}"),
        }
    }

    /// A thread that reads the whole page and checks it.
    pub fn checker(self: &Arc<Self>, page: u64, version: u64) -> Result<Task<()>> {
        let slot = self.clone();
        Task::work(move || slot.check(page, version))
    }

    /// A thread that reads one word of the page.
    pub fn toucher(self: &Arc<Self>, page: u64) -> Result<Task<Touched>> {
        let slot = self.clone();
        Task::spawn(move || sys::load(slot.address(page)))
    }

    /// The next event.
    pub fn event(&self) -> Result<Event> {
        next_event(&self.vm)
    }

    /// Fails if an event comes within a moment.
    pub fn no_event(&self) -> Result {
        if self.vm.wait_event(Some(MOMENT))? {
            fail!("an event that should not be: {:?}", self.event()?);
        }
        Ok(())
    }

    /// A counter of the memslot.
    pub fn counter(&self, name: &str) -> Result<u64> {
        counter(self.memslot.as_fd(), name)
    }

    /// A counter of the VM.
    pub fn vm_counter(&self, name: &str) -> Result<u64> {
        counter(self.vm.as_fd(), name)
    }
}

/// Reads a whole page of a mapping of guest memory.
pub fn words_at(at: *const u64) -> Result<[u64; WORDS]> {
    let mut words = [0; WORDS];
    for (i, word) in words.iter_mut().enumerate() {
        match sys::load(at.wrapping_add(i)) {
            Touched::Value(value) => *word = value,
            signal => fail!("word {i} of a page cannot be read: {signal:x?}"),
        }
    }
    Ok(words)
}

/// The next event of a VM.
pub fn next_event(vm: &Vm) -> Result<Event> {
    ensure!(vm.wait_event(Some(PATIENCE))?, "no event came");
    let mut events = Vec::new();
    vm.read_events(&mut events, 1)?;
    match events.pop() {
        Some(event) => Ok(event),
        None => fail!("an event of an unknown type"),
    }
}

/// A number in the description of an open file.
pub fn counter(fd: BorrowedFd<'_>, name: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let key = format!("kdp-{name}:");
    let value = text.lines().find_map(|line| line.strip_prefix(&key));
    match value.and_then(|value| value.trim().parse().ok()) {
        Some(value) => Ok(value),
        None => fail!("no number '{key}' in fdinfo:\n{text}"),
    }
}

/// Skips the test where there is no KVM.
pub fn need_kvm() -> Result {
    if !fs::exists("/dev/kvm")? {
        return skip("there is no /dev/kvm");
    }
    Ok(())
}

/// Skips the test if so many 1 GiB pages are not free: they are reserved at boot.
pub fn need_gigantic_pages(count: u64) -> Result {
    const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages";
    let deadline = std::time::Instant::now() + Duration::from_secs(2);
    loop {
        let free = match fs::exists(FREE)? {
            true => fs::read_to_string(FREE)?.trim().parse()?,
            false => 0_u64,
        };
        if free >= count {
            return Ok(());
        }
        // Those of a test that was just killed may not be back yet.
        if std::time::Instant::now() > deadline {
            return skip(format!(
                "there are {free} free huge pages of 1 GiB, not {count}"
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Skips the test if so many 2 MiB pages are not to be had.
pub fn need_huge_pages(count: u64) -> Result {
    const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let number = |name: &str| -> Result<u64> {
        let text = fs::read_to_string(format!("{DIR}/{name}"))?;
        Ok(text.trim().parse()?)
    };
    if !fs::exists(DIR)? {
        return skip("this kernel has no huge pages of 2 MiB");
    }
    let free = || -> Result<u64> {
        Ok(number("free_hugepages")?.saturating_sub(number("resv_hugepages")?))
    };
    if free()? < count {
        let more = number("nr_hugepages")? + count - free()?;
        fs::write(format!("{DIR}/nr_hugepages"), more.to_string())?;
    }
    // Those of a test that was just killed may not be back yet.
    let deadline = std::time::Instant::now() + Duration::from_secs(2);
    while free()? < count {
        if std::time::Instant::now() > deadline {
            return skip(format!("there are not {count} free huge pages of 2 MiB"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
