// SPDX-License-Identifier: GPL-2.0

//! The module's own work queue, which ends before the module does.
//!
//! C header: `include/linux/workqueue.h`.

use super::c;
use core::ptr::NonNull;
use kernel::{
    bindings,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    workqueue::{
        Queue,
        RawWorkItem,
        Work, //
    }, //
};

/// The queue's address; 0 before [`WorkQueue::new()`] and after its end. Relaxed: it is set before there is a
/// device to open, and cleared when no file of ours is open.
static QUEUE: Atomic<usize> = Atomic::new(0);

/// The queue. To be held by the module.
///
/// # Invariants
///
/// Owns the workqueue that [`QUEUE`] names.
pub(crate) struct WorkQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue may be used and destroyed by any thread.
unsafe impl Send for WorkQueue {}
// SAFETY: As above.
unsafe impl Sync for WorkQueue {}

impl WorkQueue {
    /// To be called once in the life of the module.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: It takes nothing.
        let queue = NonNull::new(unsafe { c::kdp_alloc_workqueue() }).ok_or(ENOMEM)?;
        QUEUE.store(queue.as_ptr().expose_provenance(), Relaxed);
        // INVARIANT: Just allocated, and stored.
        Ok(Self(queue))
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        QUEUE.store(0, Relaxed);
        // SAFETY: The queue is ours (type invariant). This waits until no work of it runs; no more comes,
        // because no file of ours is open when the module ends.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// Has an item worked on, unless it waits for that already.
pub(crate) fn enqueue<W, const ID: u64>(item: W)
where
    W: RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    let address = core::ptr::with_exposed_provenance_mut(QUEUE.load(Relaxed));
    if let Some(queue) = NonNull::new(address) {
        // SAFETY: The queue ends with the module, when all that is left of the module is work on this very
        // queue, which ends first.
        let queue = unsafe { Queue::from_raw(queue.as_ptr()) };
        // An item that waits finds what it is for.
        drop(queue.enqueue(item));
    }
}

/// Waits until an item that was enqueued before has been worked on. Not to be called by that work.
pub(crate) fn flush<T: ?Sized, const ID: u64>(work: &Work<T, ID>) {
    // SAFETY: The item is valid, and was initialised when it was made.
    unsafe { bindings::flush_work(Work::raw_get(work)) };
}

/// Lets others run, if they want to.
pub(crate) fn yield_now() {
    // SAFETY: Called where sleeping is allowed: all of the module's work is.
    unsafe { c::kdp_cond_resched() };
}
