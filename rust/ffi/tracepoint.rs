// SPDX-License-Identifier: GPL-2.0

//! KVM's tracepoints, as long as KVM is there and somebody wants them.
//!
//! KVM is a module that may come and go, or be built in. Its tracepoints are probed only while a
//! thread has exits on: other guests pay nothing.
//!
//! Lock order: `tracepoint_module_list_mutex` (held by the kernel when it calls the notifier), then
//! [`STATE`], then `tracepoints_mutex` (in `tracepoint_probe_register()`).

use super::{
    c,
    kvm, //
};
use crate::compat::eopnotsupp;
use core::ptr::{
    null_mut,
    NonNull, //
};
use kernel::{
    bindings,
    error::to_result,
    ffi::{
        c_int,
        c_ulong,
        c_void, //
    },
    prelude::*,
    str::CStr,
    types::Opaque, //
};

/// A tracepoint of KVM that we probe.
struct Site {
    name: &'static CStr,
    probe: *const c_void,
    /// Where it is, if KVM is loaded.
    point: Option<*mut bindings::tracepoint>,
    /// Whether the probe is registered.
    probed: bool,
}

struct State {
    /// In the order in which they are registered: nobody may be told of a fault without being told
    /// of the return from KVM_RUN.
    sites: [Site; 2],
    users: usize,
}

// SAFETY: The pointers are those of functions and of tracepoints, which no thread owns.
unsafe impl Send for State {}

// The probes have the types that probes.c compares with the tracepoints.
const _: c::kdp_kvm_page_fault_probe = Some(kvm::on_page_fault);
const _: c::kdp_kvm_userspace_exit_probe = Some(kvm::on_userspace_exit);

kernel::sync::global_lock! {
    // SAFETY: `init()` is called once, when the module is loaded.
    unsafe(uninit) static STATE: Mutex<State> = State {
        sites: [
            Site {
                name: c"kvm_userspace_exit",
                probe: kvm::on_userspace_exit as *const c_void,
                point: None,
                probed: false,
            },
            Site {
                name: c"kvm_page_fault",
                probe: kvm::on_page_fault as *const c_void,
                point: None,
                probed: false,
            },
        ],
        users: 0,
    };
}

impl Site {
    fn register(&mut self) -> Result {
        let point = self.point.ok_or_else(eopnotsupp)?;
        if !self.probed {
            // SAFETY: The tracepoint is valid as long as it is in `point`; the probe has the
            // prototype of the tracepoint of this name (rust/probes.c).
            to_result(unsafe {
                bindings::tracepoint_probe_register(point, self.probe.cast_mut(), null_mut())
            })?;
            self.probed = true;
        }
        Ok(())
    }

    fn unregister(&mut self) {
        if let (Some(point), true) = (self.point, self.probed) {
            // SAFETY: As in `register()`; it was registered.
            unsafe {
                bindings::tracepoint_probe_unregister(point, self.probe.cast_mut(), null_mut())
            };
            self.probed = false;
        }
    }
}

impl State {
    fn register(&mut self) -> Result {
        for i in 0..self.sites.len() {
            if let Err(e) = self.sites[i].register() {
                self.unregister();
                return Err(e);
            }
        }
        Ok(())
    }

    fn unregister(&mut self) {
        for site in self.sites.iter_mut().rev() {
            site.unregister();
        }
    }

    /// A tracepoint came.
    fn found(&mut self, point: *mut bindings::tracepoint) {
        // SAFETY: The kernel passes a valid tracepoint, whose name is a C string.
        let name = unsafe { CStr::from_char_ptr((*point).name) };
        for site in &mut self.sites {
            if site.name == name {
                site.point = Some(point);
            }
        }
        if self.users > 0 && self.sites.iter().all(|s| s.point.is_some()) {
            if let Err(e) = self.register() {
                pr_warn!("cannot probe KVM's tracepoints: {:?}\n", e);
            }
        }
    }

    /// A tracepoint goes.
    fn lost(&mut self, point: *mut bindings::tracepoint) {
        if self.sites.iter().any(|s| s.point == Some(point)) {
            self.unregister();
        }
        for site in &mut self.sites {
            if site.point == Some(point) {
                site.point = None;
            }
        }
    }
}

/// Whether KVM is loaded and has the tracepoints.
pub(crate) fn available() -> bool {
    STATE.lock().sites.iter().all(|s| s.point.is_some())
}

/// Somebody who wants the probes.
///
/// # Invariants
///
/// Is counted in `users`.
pub(crate) struct User(());

impl User {
    /// Wants them, from now on.
    pub(crate) fn new() -> Result<Self> {
        let mut state = STATE.lock();
        if state.users == 0 {
            state.register()?;
        } else if !state.sites.iter().all(|s| s.probed) {
            return Err(eopnotsupp());
        }
        state.users += 1;
        // INVARIANT: Just counted.
        Ok(Self(()))
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut state = STATE.lock();
        state.users -= 1;
        if state.users == 0 {
            state.unregister();
        }
    }
}

/// # Safety
///
/// `point` is a valid tracepoint.
unsafe extern "C" fn for_found(point: *mut bindings::tracepoint, _data: *mut c_void) {
    STATE.lock().found(point);
}

/// # Safety
///
/// `data` is the `struct tp_module` of a module that is being loaded or unloaded.
unsafe extern "C" fn notify(
    _nb: *mut bindings::notifier_block,
    action: c_ulong,
    data: *mut c_void,
) -> c_int {
    let mut state = STATE.lock();
    // SAFETY: The kernel passes a `struct tp_module` of a module that it is loading or unloading.
    let points = (0..).map_while(|i| unsafe {
        NonNull::new(c::kdp_module_tracepoint(data.cast(), i)).map(NonNull::as_ptr)
    });
    match action as u32 {
        bindings::module_state_MODULE_STATE_COMING => points.for_each(|p| state.found(p)),
        bindings::module_state_MODULE_STATE_GOING => points.for_each(|p| state.lost(p)),
        _ => (),
    }
    0
}

/// Follows KVM's coming and going, from load to unload of this module.
///
/// # Invariants
///
/// `block` is registered from `new()` to drop.
#[pin_data(PinnedDrop)]
pub(crate) struct Watch {
    #[pin]
    block: Opaque<bindings::notifier_block>,
}

// SAFETY: A notifier may be unregistered by any thread.
unsafe impl Send for Watch {}
// SAFETY: Nothing is accessed through a shared reference.
unsafe impl Sync for Watch {}

impl Watch {
    /// Begins to watch. To be called once, when the module is loaded.
    ///
    /// # Safety
    ///
    /// Called once.
    pub(crate) unsafe fn new() -> impl PinInit<Self, Error> {
        // SAFETY: Called once, by the caller's promise.
        unsafe { STATE.init() };
        try_pin_init!(Self {
            block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                let block = bindings::notifier_block {
                    notifier_call: Some(notify),
                    ..pin_init::zeroed()
                };
                // SAFETY: `slot` is valid for a write and pinned from here on. A KVM that is built in
                // has its tracepoints among the kernel's; one that is loaded is told of at once.
                unsafe {
                    slot.write(block);
                    bindings::for_each_kernel_tracepoint(Some(for_found), null_mut());
                    to_result(bindings::register_tracepoint_module_notifier(slot))
                }
            }),
        })
    }
}

#[pinned_drop]
impl PinnedDrop for Watch {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: It is registered (type invariant).
        unsafe { bindings::unregister_tracepoint_module_notifier(self.block.get()) };
        STATE.lock().unregister();
        // No probe of ours runs after this.
        // SAFETY: Always safe to call where sleeping is allowed.
        unsafe { c::kdp_tracepoint_synchronize() };
    }
}
