// SPDX-License-Identifier: GPL-2.0

//! Memory errors, as the kernel finds them.
//!
//! memory_failure() tells of each by the tracepoint `memory_failure_event`, where nobody may sleep. The frames are kept
//! until the module's work queue has handed them on.
//!
//! C sources: `mm/memory-failure.c` (`action_result()`), `include/trace/events/memory-failure.h`.

use super::{
    c,
    memfd::Pfn,
    work, //
};
use core::{
    ffi::{
        c_int,
        c_void, //
    },
    marker::PhantomData,
    ptr::null_mut, //
};
use kernel::{
    bindings,
    error::to_result,
    ffi::c_ulong,
    new_spinlock,
    new_work,
    prelude::*,
    str::CStr,
    sync::{
        Arc,
        ArcBorrow,
        SpinLock, //
    },
    workqueue::{
        impl_has_work,
        Work,
        WorkItem, //
    }, //
};

/// Errors that wait to be handed on, at most. memory_failure() is done with one before it begins the next, and keeps
/// fewer.
const MAX: usize = 128;

/// A page frame with an error.
pub(crate) struct BadFrame {
    pub(super) number: usize,
}

impl BadFrame {
    /// How many frames it is after another one, if it is not before it.
    pub(crate) fn since(&self, first: Pfn<'_>) -> Option<u64> {
        self.number.checked_sub(first.number).map(|n| n as u64)
    }

    /// The identity of the file whose page it is, and which one; none if it is in no page cache.
    pub(crate) fn place(&self) -> Option<(usize, u64)> {
        let (mut file, mut index) = (0, 0);
        // SAFETY: The others are places for the answer; any number will do.
        let found = unsafe { c::kdp_pfn_place(self.number, &mut file, &mut index) };
        found.then_some((file, index as u64))
    }
}

/// Who is told.
pub(crate) trait Listener: Send + Sync + 'static {
    /// There is an error. May sleep.
    fn on_error(frame: BadFrame);
}

struct Ring {
    frames: [usize; MAX],
    first: usize,
    len: usize,
}

/// Errors that were found and not handed on.
#[pin_data]
struct Found<L: Listener> {
    #[pin]
    ring: SpinLock<Ring>,
    #[pin]
    work: Work<Self>,
    _listener: PhantomData<L>,
}

impl_has_work! {
    impl{L: Listener} HasWork<Self> for Found<L> { self.work }
}

impl<L: Listener> Found<L> {
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                ring <- new_spinlock!(
                    Ring {
                        frames: [0; MAX],
                        first: 0,
                        len: 0,
                    },
                    "kdp_memory_errors"
                ),
                work <- new_work!("kdp_memory_errors"),
                _listener: PhantomData,
            }),
            GFP_KERNEL,
        )
    }

    fn push(&self, frame: usize) {
        let mut ring = self.ring.lock();
        if ring.len == MAX {
            drop(ring);
            pr_err!("too many memory errors at once: frame {frame:#x} is left out\n");
            return;
        }
        let at = (ring.first + ring.len) % MAX;
        ring.frames[at] = frame;
        ring.len += 1;
    }

    fn pop(&self) -> Option<usize> {
        let mut ring = self.ring.lock();
        if ring.len == 0 {
            return None;
        }
        let frame = ring.frames[ring.first];
        ring.first = (ring.first + 1) % MAX;
        ring.len -= 1;
        Some(frame)
    }
}

impl<L: Listener> WorkItem for Found<L> {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        while let Some(number) = this.pop() {
            L::on_error(BadFrame { number });
            work::yield_now();
        }
    }
}

/// The probe.
///
/// # Safety
///
/// `data` is a [`Found<L>`] that an `Arc` holds.
unsafe extern "C" fn on_event<L: Listener>(
    data: *mut c_void,
    frame: c_ulong,
    _kind: c_int,
    _result: c_int,
) {
    // SAFETY: By the caller's promise.
    let found = unsafe { ArcBorrow::from_raw(data.cast::<Found<L>>()) };
    found.push(frame);
    work::enqueue(Arc::from(found));
}

/// Listens for errors, if the kernel looks for any.
///
/// # Invariants
///
/// If there is a `point` the probe is registered there, for `found`.
pub(crate) struct Watch<L: Listener> {
    point: Option<*mut bindings::tracepoint>,
    found: Arc<Found<L>>,
}

// SAFETY: The pointer is that of a tracepoint of the kernel's, which no thread owns.
unsafe impl<L: Listener> Send for Watch<L> {}
// SAFETY: As above.
unsafe impl<L: Listener> Sync for Watch<L> {}

impl<L: Listener> Watch<L> {
    fn probe() -> *mut c_void {
        let probe: unsafe extern "C" fn(*mut c_void, c_ulong, c_int, c_int) = on_event::<L>;
        // The type that probes.c compares with the tracepoint.
        let _: c::kdp_memory_failure_event_probe = Some(probe);
        (probe as *const c_void).cast_mut()
    }

    /// From now on. The module's work queue must outlive it.
    pub(crate) fn new() -> Result<Self> {
        let found = Found::new()?;
        let point = find();
        if let Some(point) = point {
            let data = Arc::as_ptr(&found).cast_mut().cast();
            // SAFETY: The tracepoint is the kernel's own; the probe has its prototype
            // (rust/probes.c), and its data stays until it is unregistered.
            to_result(unsafe { bindings::tracepoint_probe_register(point, Self::probe(), data) })?;
        }
        // INVARIANT: Just registered.
        Ok(Self { point, found })
    }
}

impl<L: Listener> Drop for Watch<L> {
    fn drop(&mut self) {
        if let Some(point) = self.point {
            let data = Arc::as_ptr(&self.found).cast_mut().cast();
            // SAFETY: It was registered so (type invariant). No probe of ours runs after the second call.
            unsafe {
                bindings::tracepoint_probe_unregister(point, Self::probe(), data);
                c::kdp_tracepoint_synchronize();
            }
        }
    }
}

/// The tracepoint; none where the kernel has no memory_failure().
fn find() -> Option<*mut bindings::tracepoint> {
    let mut found: *mut bindings::tracepoint = null_mut();
    // SAFETY: The callback is given valid tracepoints, and the address of `found`.
    unsafe { bindings::for_each_kernel_tracepoint(Some(look), (&raw mut found).cast()) };
    (!found.is_null()).then_some(found)
}

/// Whether there is one.
pub(crate) fn available() -> bool {
    find().is_some()
}

/// # Safety
///
/// `point` is a valid tracepoint, `data` a place for one.
unsafe extern "C" fn look(point: *mut bindings::tracepoint, data: *mut c_void) {
    // SAFETY: By the caller's promise; a tracepoint's name is a C string.
    unsafe {
        if CStr::from_char_ptr((*point).name) == c"memory_failure_event" {
            *data.cast() = point;
        }
    }
}
