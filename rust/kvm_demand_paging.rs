// SPDX-License-Identifier: GPL-2.0

//! Demand paging for KVM guests, 4 KiB at a time on any backing.
//!
//! The map of the house is in Documentation/internals.md.

// Reached from two crates; each uses its part.
#[expect(
    unreachable_pub,
    reason = "the rules are a crate of their own on the host"
)]
mod rules;

mod ahead;
mod around;
mod backing;
mod claims;
mod collapse;
mod compat;
mod device;
mod events;
mod fault;
mod ffi;
mod ioctl;
mod lost;
mod memory_error;
mod memslot;
mod moving;
mod native;
mod notices;
mod pages;
mod path;
mod poison;
mod replace;
mod source;
mod stats;
mod vcpu;
mod vm;

use kernel::{
    prelude::*,
    InPlaceModule, //
};

module! {
    type: KvmDemandPaging,
    name: "kvm_demand_paging",
    authors: ["The kvm-demand-paging developers"],
    description: "Demand paging for KVM guests, 4 KiB at a time on any backing",
    license: "GPL",
    params: {
        wait_poll_us: u32 {
            default: 200,
            description: "Longest time that a thread looks out for its page, or for an event to read, before it sleeps, in microseconds; 0: sleep at once",
        },
        fault_around_pages: u32 {
            default: 16,
            description: "Pages that a fault of a present page maps at most, itself among them: a power of two up to 512; 0: itself alone",
        },
    },
}

/// Longest time that a thread looks out for its page, or for an event, before it sleeps.
fn max_poll_ns() -> u64 {
    u64::from(compat::parameter(module_parameters::wait_poll_us.value())) * 1000
}

/// The pages of the window that a fault maps.
fn fault_around_pages() -> u64 {
    u64::from(compat::parameter(
        module_parameters::fault_around_pages.value(),
    ))
}

/// The loaded module. The device goes first: it is what brings users in.
#[pin_data]
struct KvmDemandPaging {
    #[pin]
    device: ffi::file::Node<device::Control>,
    #[pin]
    kvm: ffi::tracepoint::Watch,
    memory: ffi::memory_failure::Watch<memory_error::Memslots>,
    shmem: ffi::shmem::Shmem,
    work: ffi::work::WorkQueue,
}

impl InPlaceModule for KvmDemandPaging {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        // SAFETY: This runs once in the life of the loaded module, before anything else of it.
        unsafe { path::NAMES.init() };
        // SAFETY: As above.
        unsafe { memory_error::INDEX.init() };
        // SAFETY: As above.
        unsafe { replace::TURN.init() };
        // SAFETY: As above.
        let kvm = unsafe { ffi::tracepoint::Watch::new() };
        try_pin_init!(Self {
            _: {
                if !rules::around::is_size(compat::parameter(module_parameters::fault_around_pages.value())) {
                    return Err(EINVAL);
                }
            },
            kvm <- kvm,
            work: ffi::work::WorkQueue::new()?,
            memory: ffi::memory_failure::Watch::new()?,
            // SAFETY: This runs once in the life of the loaded module. The device, through which
            // files are opened, is registered after it.
            shmem: unsafe { ffi::shmem::Shmem::new()? },
            device <- device::Control::node(),
        })
    }
}
