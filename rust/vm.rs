// SPDX-License-Identifier: GPL-2.0

//! A VM: its memslots, its event queue, its threads with exits on. Its file is the notification fd.
//!
//! `slots` and `threads` are taken by ioctls alone and are outermost; nothing of a memslot's changes
//! under `slots`. When the last descriptor is closed nobody can resolve events any more: the VM is
//! emptied, and lives on only as long as files of its memslots do.

use crate::{
    events::Events,
    ffi::{
        file::{
            FileOps,
            RawFile, //
        },
        uapi::KDP_MAX_MEMSLOTS,
        vma::NewMapping, //
    },
    ioctl,
    memslot::Memslot,
    path::Path,
    rules::queue::Owner,
    stats::Stats,
    vcpu::Threads, //
};
use kernel::{
    bindings::{
        POLLIN,
        POLLRDNORM, //
    },
    debugfs,
    fmt,
    fs::File,
    new_mutex,
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNode, //
    },
    seq_file::SeqFile,
    seq_print,
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        poll::PollTable,
        Arc,
        ArcBorrow,
        Mutex, //
    },
    uaccess::{
        UserPtr,
        UserSliceWriter, //
    }, //
};

/// A memslot in the table.
pub(crate) struct Slot {
    /// Goes first: while it is there the memslot has a file.
    pub(crate) path: Option<Path>,
    pub(crate) memslot: Arc<Memslot>,
    /// Holds the memslot as well: a cycle, until the memslot leaves the table.
    pub(crate) file: RawFile,
}

/// The table.
pub(crate) struct Slots {
    by_id: RBTree<u32, Slot>,
    /// First GFN by last GFN, to find overlaps.
    by_last_gfn: RBTree<u64, u64>,
    count: u32,
    next_serial: u32,
}

/// A VM.
#[pin_data]
pub(crate) struct Vm {
    serial: u64,
    #[pin]
    slots: Mutex<Slots>,
    #[pin]
    threads: Mutex<Threads>,
    #[pin]
    pub(crate) events: Events,
    /// What removed memslots have counted, and the VM itself.
    pub(crate) stats: Stats,
    #[pin]
    debugfs: Mutex<Option<DebugFile>>,
}

/// The VM's file in debugfs. It holds the VM: a cycle, until the last descriptor is closed.
type DebugFile = Pin<KBox<debugfs::File<Arc<Vm>>>>;

/// Numbers VMs; only uniqueness counts: relaxed.
static NEXT_SERIAL: Atomic<u64> = Atomic::new(1);

impl Vm {
    pub(crate) fn new(debugfs: &debugfs::Dir) -> Result<Arc<Self>> {
        let serial = NEXT_SERIAL.fetch_add(1, Relaxed);
        let this = Arc::pin_init(
            pin_init!(Self {
                serial,
                slots <- new_mutex!(
                    Slots {
                        by_id: RBTree::new(),
                        by_last_gfn: RBTree::new(),
                        count: 0,
                        next_serial: 0,
                    },
                    "kdp_slots"
                ),
                threads <- new_mutex!(Threads::new(), "kdp_threads"),
                events <- Events::new(),
                stats: Stats::new()?,
                debugfs <- new_mutex!(None, "kdp_debugfs"),
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )?;
        let name =
            CString::try_from_fmt(fmt!("{}-{serial}", kernel::current!().group_leader().pid()))?;
        let file = debugfs.read_callback_file(&name, this.clone(), &show);
        *this.debugfs.lock() = Some(KBox::pin_init(file, GFP_KERNEL)?);
        Ok(this)
    }

    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    pub(crate) fn threads(&self) -> &Mutex<Threads> {
        &self.threads
    }

    /// A number that no other memslot of this VM has or had.
    pub(crate) fn next_slot_serial(&self) -> Result<u32> {
        let mut slots = self.slots.lock();
        let serial = slots.next_serial;
        slots.next_serial = serial.checked_add(1).ok_or(ENOSPC)?;
        Ok(serial)
    }

    /// Puts a memslot into the table, if neither its id nor a part of its GFN range is taken.
    pub(crate) fn insert(&self, slot: Slot) -> Result {
        let place = &slot.memslot.place;
        let (id, first, last) = (
            place.id,
            place.base_gfn,
            place.base_gfn + (place.nr_pages - 1),
        );
        // Made before the lock is taken, and on failure dropped after it is given up: a memslot's end
        // takes locks of its own.
        let by_id = RBTreeNode::new(id, slot, GFP_KERNEL_ACCOUNT)?;
        let by_last_gfn = RBTreeNode::new(last, first, GFP_KERNEL_ACCOUNT)?;
        let mut slots = self.slots.lock();
        let overlaps = slots
            .by_last_gfn
            .cursor_lower_bound(&first)
            .is_some_and(|c| *c.current().1 <= last);
        if slots.by_id.get(&id).is_some() || overlaps {
            return Err(EEXIST);
        }
        if slots.count >= KDP_MAX_MEMSLOTS {
            return Err(ENOSPC);
        }
        slots.by_last_gfn.insert(by_last_gfn);
        slots.by_id.insert(by_id);
        slots.count += 1;
        Ok(())
    }

    /// Takes a memslot out of the table and away from everybody.
    pub(crate) fn remove(&self, id: u32) -> Result {
        let slot = {
            let mut slots = self.slots.lock();
            let slot = slots.by_id.remove(&id).ok_or(ENOENT)?;
            let place = &slot.memslot.place;
            slots
                .by_last_gfn
                .remove(&(place.base_gfn + (place.nr_pages - 1)));
            slots.count -= 1;
            slot
        };
        // First the path: nobody opens it any more.
        drop(slot.path);
        slot.memslot.remove();
        self.stats.add(&slot.memslot.stats.totals());
        Ok(())
    }

    /// A memslot by its id.
    pub(crate) fn slot(&self, id: u32) -> Result<Arc<Memslot>> {
        let slots = self.slots.lock();
        Ok(slots.by_id.get(&id).ok_or(ENOENT)?.memslot.clone())
    }

    /// A memslot and its file by its id, or by the next one.
    pub(crate) fn slot_file(&self, id: u32, or_next: bool) -> Result<(Arc<Memslot>, RawFile)> {
        let slots = self.slots.lock();
        let found = slots.by_id.cursor_lower_bound(&id).ok_or(ENOENT)?;
        let (&found_id, slot) = found.current();
        if found_id != id && !or_next {
            return Err(ENOENT);
        }
        Ok((slot.memslot.clone(), slot.file.clone()))
    }

    /// Calls `f` with the name and the value of everything that is counted.
    fn describe(&self, mut f: impl FnMut(&'static str, u64)) {
        let mut sum = self.stats.totals();
        let (pending, unread) = self.events.counts();
        let slots = self.slots.lock();
        for slot in slots.by_id.values() {
            sum.add(&slot.memslot.stats.totals());
        }
        f("memslots", slots.count.into());
        drop(slots);
        f("vcpu-threads", self.threads.lock().len() as u64);
        f("events-unread", unread.into());
        f("events-pending", pending.into());
        sum.for_each(f);
    }
}

/// The VM's file in debugfs.
fn show(vm: &Arc<Vm>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut result = Ok(());
    vm.describe(|name, value| result = result.and_then(|()| writeln!(f, "{name} {value}")));
    result
}

impl FileOps for Vm {
    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: UserPtr) -> Result<isize> {
        ioctl::dispatch(this, cmd, arg)
    }

    fn read(this: ArcBorrow<'_, Self>, out: UserSliceWriter, nonblock: bool) -> Result<usize> {
        let read = this.events.read(out, nonblock)?;
        this.stats
            .events_read()
            .add((read / size_of::<crate::ffi::uapi::kdp_event>()) as u64);
        Ok(read)
    }

    fn poll(this: ArcBorrow<'_, Self>, file: &File, table: &PollTable<'_>) -> u32 {
        if this.events.poll(file, table) {
            POLLIN | POLLRDNORM
        } else {
            0
        }
    }

    fn mmap(_this: ArcBorrow<'_, Self>, _mapping: NewMapping<'_, Self>) -> Result {
        Err(ENODEV)
    }

    fn size(_this: ArcBorrow<'_, Self>) -> u64 {
        0
    }

    fn left_by(this: ArcBorrow<'_, Self>, reader: Owner) {
        this.events.left_by(reader);
    }

    fn release(this: Arc<Self>) {
        this.threads.lock().clear();
        this.events.close();
        let (by_id, by_last_gfn) = {
            let mut slots = this.slots.lock();
            slots.count = 0;
            (
                core::mem::take(&mut slots.by_id),
                core::mem::take(&mut slots.by_last_gfn),
            )
        };
        drop((by_id, by_last_gfn));
        let debugfs = this.debugfs.lock().take();
        drop(debugfs);
    }

    fn fdinfo(this: ArcBorrow<'_, Self>, m: &SeqFile) {
        this.describe(|name, value| seq_print!(m, "kdp-{}:\t{}\n", name, value));
    }
}
