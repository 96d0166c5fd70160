// SPDX-License-Identifier: GPL-2.0

//! The tests, by what they are about.

/// The tests of a module, each with its name.
macro_rules! tests {
    ($($name:literal => $run:expr,)*) => {
        pub const TESTS: &[$crate::harness::Test] = &[$(
            $crate::harness::Test { name: $name, run: $run },
        )*];
    };
}

mod around;
mod bitmap;
mod collapse;
mod consistency;
mod fault;
mod fault_kvm;
mod fault_vhost;
mod hint;
mod huge;
mod huge_1g;
mod lifetime;
mod lifetime_shared;
mod limit;
mod linux;
mod memory_error;
mod migrate;
mod native;
mod native_async;
mod native_memcg;
mod native_process;
mod native_ptrace;
mod nested;
mod notify;
mod notify_killed;
mod pin;
mod pin_fork;
mod pin_move;
mod pin_offline;
mod place;
mod place_race;
mod poison;
mod prefetch;
mod replace;
mod scale;
mod shmem;
mod source;
mod source_near;
mod vcpu;
mod vcpu_stress;

use crate::harness::Test;

/// All of them.
pub fn all() -> impl Iterator<Item = &'static Test> {
    [
        fault::TESTS,
        around::TESTS,
        fault_kvm::TESTS,
        fault_vhost::TESTS,
        vcpu::TESTS,
        vcpu_stress::TESTS,
        notify::TESTS,
        notify_killed::TESTS,
        lifetime::TESTS,
        lifetime_shared::TESTS,
        bitmap::TESTS,
        place::TESTS,
        pin::TESTS,
        pin_fork::TESTS,
        pin_move::TESTS,
        pin_offline::TESTS,
        place_race::TESTS,
        native::TESTS,
        nested::TESTS,
        native_process::TESTS,
        native_async::TESTS,
        native_ptrace::TESTS,
        native_memcg::TESTS,
        hint::TESTS,
        poison::TESTS,
        // Before the test after which the kernel makes no frame good any more.
        replace::TESTS,
        consistency::TESTS,
        memory_error::TESTS,
        huge::TESTS,
        huge_1g::TESTS,
        collapse::TESTS,
        shmem::TESTS,
        prefetch::TESTS,
        scale::TESTS,
        source::TESTS,
        source_near::TESTS,
        limit::TESTS,
        linux::TESTS,
        migrate::TESTS,
    ]
    .into_iter()
    .flatten()
}
