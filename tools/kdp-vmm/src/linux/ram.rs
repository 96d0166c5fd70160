//! The memory of a Linux guest: one memslot of the device, from guest physical address 0 on.
//!
//! One memslot, so the number of a page and its guest frame number are the same everywhere. It ends below the
//! addresses of devices ([`MAX_MEMORY`]).

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use kvm_demand_paging::{Backing, GuestMap, Memfd, Memslot, PageRange, Paging, PresentBitmap, Vm};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::migration::Pages;
use crate::error::{Error, Result};
use crate::memory::PAGE_SIZE;

/// The most memory that a guest can have: below the devices' addresses.
pub const MAX_MEMORY: u64 = 0xc000_0000;

/// The least: a kernel and its decompressor must fit.
pub const MIN_MEMORY: u64 = 64 << 20;

/// The memslot's id, for whoever makes it by [`Ram::create`].
const SLOT: u32 = 0;

/// Guest memory as devices see it: what they write through it is noted as dirty.
pub(crate) type DeviceMemory = GuestMemoryMmap<AtomicBitmap>;

/// A guest's memory, and the page states that go with it.
pub struct Ram {
    // Before the mapping, of which it has the address.
    memory: DeviceMemory,
    guest: GuestMap,
    present: PresentBitmap,
    memslot: Memslot,
    memfd: Memfd,
    vm: Vm,
    slot_id: u32,
    /// How often pages were given back. Who gives some back has it for writing, and they are absent for a moment.
    discards: RwLock<u64>,
    pages: Pages,
    keeps: AtomicBool,
}

impl Ram {
    /// Memory that is all there, and can be given back.
    pub fn create(backing: Backing, bytes: u64) -> Result<Self> {
        let memfd = Memfd::create("kdp-vmm-linux", backing, check_size(bytes)?)?;
        Self::new(Vm::open()?, SLOT, memfd, Paging::OnPresent)
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
        let guest = memslot.map()?;
        Ok(Self {
            memory: device_memory(&guest)?,
            present: memslot.bitmap()?,
            guest,
            pages: Pages::of(&vm, slot_id)?,
            memslot,
            memfd,
            vm,
            slot_id,
            discards: RwLock::new(0),
            keeps: AtomicBool::new(false),
        })
    }

    /// The VM that the memslot is of.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Their states.
    pub(crate) fn states(&self) -> &Pages {
        &self.pages
    }

    /// The memslot's id.
    pub fn slot_id(&self) -> u32 {
        self.slot_id
    }

    /// The memslot.
    pub fn memslot(&self) -> &Memslot {
        &self.memslot
    }

    /// The memfd behind it.
    pub fn memfd(&self) -> &Memfd {
        &self.memfd
    }

    /// Which pages are there.
    pub fn present(&self) -> &PresentBitmap {
        &self.present
    }

    /// As the VMM has it mapped, and KVM.
    pub fn guest(&self) -> &GuestMap {
        &self.guest
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

    /// Do something to pages while none is given back: such a one is absent for a moment, and would seem to be one that has
    /// not come.
    pub(crate) fn undisturbed<T>(&self, work: impl FnOnce() -> T) -> T {
        let _same = self.discards.read().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    /// Give pages back, or take no notice of that the guest could do without them. It does not from the start if another
    /// process fills pages: that one knows of no [`Self::undisturbed`].
    pub fn give_pages_back(&self, on: bool) {
        // Each who gives some back looks once, and either is right.
        self.keeps.store(!on, Ordering::Relaxed);
    }

    /// Give pages back: they take no memory, and read as zeros when they are touched next. The guest has promised not
    /// to use what is in them.
    pub(crate) fn discard(&self, range: PageRange) -> Result<()> {
        if self.keeps.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut discards = self
            .discards
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *discards += 1;
        // A hole is punched while nobody has the page: what a touch brings in afterwards is in the memfd, too.
        self.pages.empty(range)?;
        self.pages.mark_zero(range)?;
        self.note_dirty(range);
        Ok(())
    }

    /// Whether pages were given back since `seen`, which becomes the number of now. A page that was found absent since
    /// then may have been one of them: to look again tells.
    pub(crate) fn discarded_since(&self, seen: &mut u64) -> bool {
        let now = *self.discards.read().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(seen, now) != now
    }

    /// Wake those who wait for a page that is there by its bit alone.
    pub(crate) fn wake(&self, page: u64) -> Result<()> {
        let _same = self.discards.read().unwrap_or_else(PoisonError::into_inner);
        if self.present.is_present(page) {
            self.vm
                .mark_present(self.slot_id, &[PageRange::page(page)])?;
        }
        Ok(())
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

fn device_memory(guest: &GuestMap) -> Result<DeviceMemory> {
    let pages = NonZeroUsize::new(PAGE_SIZE as usize).unwrap_or(NonZeroUsize::MIN);
    let bitmap = AtomicBitmap::new(guest.len(), pages);
    let prot = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    let flags = rustix::mm::MapFlags::SHARED;
    let builder = MmapRegionBuilder::new_with_bitmap(guest.len(), bitmap)
        .with_mmap_prot(prot.bits() as i32)
        .with_mmap_flags(flags.bits() as i32);
    // SAFETY: the mapping is as long, readable and writable, and outlives the region: `Ram` drops the region first, and
    // lends it for its own life only.
    let builder = unsafe { builder.with_raw_mmap_pointer(guest.as_ptr()) };
    let unfit =
        |e: &dyn std::fmt::Display| Error::invalid(format!("guest memory as it is mapped: {e}"));
    let region = builder.build().map_err(|e| unfit(&e))?;
    let region = GuestRegionMmap::new(region, GuestAddress(0)).map_err(|e| unfit(&e))?;
    GuestMemoryMmap::from_regions(vec![region]).map_err(|e| unfit(&e))
}
