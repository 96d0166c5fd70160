//! The memory of a Linux guest: one memslot, from guest physical address 0 on, of the device or of plain memory.
//!
//! One memslot, so the number of a page and its guest frame number are the same everywhere. It ends below the
//! addresses of devices ([`MAX_MEMORY`]).

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use kdp_migrate::PageSet;
use kvm_demand_paging::{AliasMap, Backing, Memfd, Memslot, PageRange, Paging, PresentBitmap, Vm};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::migration::Pages;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::paging::uffd_sys::{Allowed, Faults, Userfaultfd};

/// The most memory that a guest can have: below the devices' addresses.
pub const MAX_MEMORY: u64 = 0xc000_0000;

/// The least: a kernel and its decompressor must fit.
pub const MIN_MEMORY: u64 = 64 << 20;

/// The memslot's id, for whoever does not choose one.
const SLOT: u32 = 0;

/// The memfd's name.
const NAME: &str = "kdp-vmm-linux";

/// Guest memory as devices see it: what they write through it is noted as dirty.
pub(crate) type DeviceMemory = GuestMemoryMmap<AtomicBitmap>;

/// A guest's memory, and the page states that go with it.
pub struct Ram {
    // Before the mapping, of which it has the address.
    memory: DeviceMemory,
    guest: GuestMemory,
    kind: Kind,
    memfd: Memfd,
}

enum Kind {
    Paged(Paged),
    Plain(Plain),
}

/// What there is of memory that the device pages.
pub struct Paged {
    present: PresentBitmap,
    /// How often pages were given back. Who gives some back has it for writing, and they are absent for a moment.
    discards: RwLock<u64>,
    states: Pages,
    /// Whether pages that the guest gives back are taken.
    takes_back: AtomicBool,
}

/// What there is of memory that the device knows nothing of.
struct Plain {
    /// Whether pages that the guest gives back are taken.
    takes_back: Mutex<bool>,
    /// Who watches it. It is closed when nobody can touch the memory any more: pages that are still missing then would
    /// read as zeros.
    watch: OnceLock<Arc<Userfaultfd>>,
    lost: Mutex<PageSet>,
}

impl Paged {
    /// The VM that the memslot is of.
    pub fn vm(&self) -> &Vm {
        self.states.vm()
    }

    /// The memslot's id.
    pub fn slot_id(&self) -> u32 {
        self.states.slot_id()
    }

    /// The memslot.
    pub fn memslot(&self) -> &Memslot {
        self.states.memslot()
    }

    /// Which pages are there.
    pub fn present(&self) -> &PresentBitmap {
        &self.present
    }

    /// The states of pages, to change them.
    pub(crate) fn states(&self) -> &Pages {
        &self.states
    }

    /// Do something to pages while none is given back: such a one is absent for a moment, and would seem to be one that has
    /// not come.
    pub(crate) fn undisturbed<T>(&self, work: impl FnOnce() -> T) -> T {
        let _same = self.discards.read().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    fn discard(&self, range: PageRange) -> Result<()> {
        let mut discards = self
            .discards
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *discards += 1;
        // A hole is punched while nobody has the page: what a touch brings in afterwards is in the memfd, too.
        self.states.empty(range)?;
        self.states.mark_zero(range)
    }

    /// Wake those who wait for a page that is there by its bit alone.
    pub(crate) fn wake(&self, page: u64) -> Result<()> {
        let _same = self.discards.read().unwrap_or_else(PoisonError::into_inner);
        if self.present.is_present(page) {
            self.vm()
                .mark_present(self.slot_id(), &[PageRange::page(page)])?;
        }
        Ok(())
    }
}

impl Ram {
    /// Memory that is all there, and can be given back.
    pub fn create(backing: Backing, bytes: u64) -> Result<Self> {
        let memfd = Memfd::create(NAME, backing, check_size(bytes)?)?;
        Self::new(Vm::open()?, SLOT, memfd, Paging::OnPresent)
    }

    /// Memory that is all still to come, by the device. Huge pages are the VMM's alone in any case: they are allocated
    /// now, so that no page that the guest waits for waits until a huge page is cleared.
    pub(crate) fn absent(backing: Backing, bytes: u64) -> Result<Self> {
        let memfd = Memfd::create(NAME, backing, check_size(bytes)?)?;
        if backing != Backing::Shmem {
            memfd.allocate()?;
        }
        Self::new(Vm::open()?, SLOT, memfd, Paging::On)
    }

    /// All of a memfd, as a new memslot of this VM: with every page present, or absent and still to come.
    ///
    /// Demand paging may not be off: no page could be given back.
    pub fn new(vm: Vm, slot_id: u32, memfd: Memfd, paging: Paging) -> Result<Self> {
        check_size(memfd.size())?;
        if paging == Paging::Off {
            return Err(Error::invalid(
                "the memory of a Linux guest needs demand paging: take Paging::OnPresent",
            ));
        }
        let memslot = vm
            .create_memslot(slot_id, &memfd)
            .paging(paging == Paging::On)
            .create()?;
        if paging == Paging::OnPresent {
            vm.set_paging(slot_id, paging)?;
        }
        let guest = memslot.map()?.into();
        let kind = Kind::Paged(Paged {
            present: memslot.bitmap()?,
            states: Pages::of(vm, slot_id)?,
            discards: RwLock::new(0),
            takes_back: AtomicBool::new(true),
        });
        Self::of(memfd, guest, kind)
    }

    /// Memory that the device knows nothing of: a memfd, mapped as it is. Pages that the guest gives back are not taken
    /// ([`Self::take_back`]).
    pub fn plain(backing: Backing, bytes: u64) -> Result<Self> {
        let memfd = Memfd::create(NAME, backing, check_size(bytes)?)?;
        let guest = memfd.map_all()?.into();
        let kind = Kind::Plain(Plain {
            takes_back: Mutex::new(false),
            watch: OnceLock::new(),
            lost: Mutex::new(PageSet::new(bytes / PAGE_SIZE)),
        });
        Self::of(memfd, guest, kind)
    }

    fn of(memfd: Memfd, guest: GuestMemory, kind: Kind) -> Result<Self> {
        Ok(Self {
            memory: device_memory(&guest)?,
            guest,
            kind,
            memfd,
        })
    }

    /// What the device has of it; nothing of plain memory.
    pub fn paged(&self) -> Option<&Paged> {
        match &self.kind {
            Kind::Paged(paged) => Some(paged),
            Kind::Plain(_) => None,
        }
    }

    /// Plain memory all of which is still to come, its mapping, and who is told of touches.
    pub(crate) fn watched(
        backing: Backing,
        bytes: u64,
    ) -> Result<(Self, Arc<AliasMap>, Arc<Userfaultfd>, Allowed)> {
        let ram = Self::plain(backing, bytes)?;
        let (Kind::Plain(plain), GuestMemory::Plain(map)) = (&ram.kind, &ram.guest) else {
            return Err(Error::invalid("the memory is not plain"));
        };
        let uffd = Arc::new(Userfaultfd::new(Faults::Missing)?);
        let allowed = uffd.register(Faults::Missing, map, 0, bytes)?;
        let (map, uffd) = (map.clone(), plain.watch.get_or_init(|| uffd).clone());
        Ok((ram, map, uffd, allowed))
    }

    /// The memfd behind it.
    pub fn memfd(&self) -> &Memfd {
        &self.memfd
    }

    /// As the VMM has it mapped, and KVM.
    pub fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// The memslot's id.
    pub fn slot_id(&self) -> u32 {
        self.paged().map_or(SLOT, Paged::slot_id)
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.memfd.size()
    }

    /// Its length in pages.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    pub(crate) fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// Whole pages in `bytes` bytes of guest physical addresses from `gpa` on, as far as they are memory.
    pub(crate) fn pages_in(&self, gpa: u64, bytes: u64) -> Option<PageRange> {
        let first = gpa.div_ceil(PAGE_SIZE);
        let end = (gpa.saturating_add(bytes) / PAGE_SIZE).min(self.pages());
        (first < end).then(|| PageRange::from(first..end))
    }

    /// Give pages back: they take no memory, and read as zeros when they are touched next. The guest has promised not
    /// to use what is in them.
    pub(crate) fn discard(&self, range: PageRange) -> Result<()> {
        match &self.kind {
            Kind::Paged(paged) if paged.takes_back.load(Ordering::Relaxed) => {
                paged.discard(range)?;
            }
            Kind::Paged(_) => return Ok(()),
            Kind::Plain(plain) => {
                let takes_back = lock(&plain.takes_back);
                if !*takes_back {
                    return Ok(());
                }
                punch(&self.memfd, range)?;
            }
        }
        self.note_dirty(range);
        Ok(())
    }

    /// Whether pages that the guest gives back are taken from now on. Not while a userfaultfd watches the memory: they would
    /// be missing again. Not while another process fills pages of the device either: for a moment they are absent, and that one
    /// cannot know.
    pub fn take_back(&self, on: bool) {
        match &self.kind {
            // Nothing hangs on who sees it when: relaxed. It is off before there is a guest.
            Kind::Paged(paged) => paged.takes_back.store(on, Ordering::Relaxed),
            Kind::Plain(plain) => *lock(&plain.takes_back) = on,
        }
    }

    /// Whether pages were given back since `seen`, which becomes the number of now. A page that was found absent since
    /// then may have been one of them: to look again tells.
    pub(crate) fn discarded_since(&self, seen: &mut u64) -> bool {
        let Kind::Paged(paged) = &self.kind else {
            return false;
        };
        let now = *paged
            .discards
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(seen, now) != now
    }

    /// These pages of plain memory are lost by a memory error.
    pub(crate) fn lose(&self, range: PageRange) {
        if let Kind::Plain(plain) = &self.kind {
            lock(&plain.lost).insert_range(range);
        }
    }

    /// Pages that are lost by a memory error.
    pub(crate) fn lost(&self) -> Result<Vec<PageRange>> {
        Ok(match &self.kind {
            Kind::Paged(paged) => {
                let poisoned = paged.vm().poisoned(paged.slot_id())?;
                poisoned.iter().map(|run| run.range).collect()
            }
            Kind::Plain(plain) => lock(&plain.lost).runs().collect(),
        })
    }

    /// These pages are not what they were, by somebody other than a vCPU.
    pub(crate) fn note_dirty(&self, range: PageRange) {
        for region in self.memory.iter() {
            region.bitmap().mark_dirty(
                (range.first * PAGE_SIZE) as usize,
                (range.count * PAGE_SIZE) as usize,
            );
        }
    }

    /// What was noted since the last call, a bit for each page, is added to `into`.
    pub(crate) fn take_noted(&self, into: &mut [u64]) {
        for region in self.memory.iter() {
            for (word, noted) in into.iter_mut().zip(region.bitmap().get_and_reset()) {
                *word |= noted;
            }
        }
    }
}

fn check_size(bytes: u64) -> Result<u64> {
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) {
        return Err(Error::invalid(format!(
            "{bytes} bytes of memory for a Linux guest: it must be from {} MiB to {} MiB",
            MIN_MEMORY >> 20,
            MAX_MEMORY >> 20
        )));
    }
    Ok(bytes)
}

/// Give the memory of pages back. Of a huge page a part cannot be: that part keeps what is in it, for nobody to see.
pub(crate) fn punch(memfd: &Memfd, range: PageRange) -> Result<()> {
    let unit = memfd.page_size() / PAGE_SIZE;
    let (first, end) = (
        range.first.next_multiple_of(unit),
        range.end() / unit * unit,
    );
    if first < end {
        memfd.punch_hole(PageRange::from(first..end))?;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn device_memory(guest: &GuestMemory) -> Result<DeviceMemory> {
    let pages = NonZeroUsize::new(PAGE_SIZE as usize).unwrap_or(NonZeroUsize::MIN);
    let len = guest.len() as usize;
    let bitmap = AtomicBitmap::new(len, pages);
    let prot = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    let flags = rustix::mm::MapFlags::SHARED;
    let builder = MmapRegionBuilder::new_with_bitmap(len, bitmap)
        .with_mmap_prot(prot.bits() as i32)
        .with_mmap_flags(flags.bits() as i32);
    // SAFETY: the mapping is as long, readable and writable, and outlives the region: `Ram` drops the region first, and
    // lends it for its own life only.
    let builder = unsafe { builder.with_raw_mmap_pointer(guest.addr() as *mut u8) };
    let unfit =
        |e: &dyn std::fmt::Display| Error::invalid(format!("guest memory as it is mapped: {e}"));
    let region = builder.build().map_err(|e| unfit(&e))?;
    let region = GuestRegionMmap::new(region, GuestAddress(0)).map_err(|e| unfit(&e))?;
    GuestMemoryMmap::from_regions(vec![region]).map_err(|e| unfit(&e))
}
