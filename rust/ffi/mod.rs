// SPDX-License-Identifier: GPL-2.0

//! The thin layer between the module's policy and the kernel's C.
//!
//! All `unsafe` of the module is in here. Each file wraps one thing that the `kernel` crate does not
//! wrap yet, in a type whose safe methods cannot be misused.

pub(crate) mod bit_lock;
pub(crate) mod bounce;
pub(crate) mod file;
pub(crate) mod hugetlb;
pub(crate) mod kvm;
pub(crate) mod memfd;
pub(crate) mod memory_failure;
pub(crate) mod mm;
pub(crate) mod native;
pub(crate) mod percpu;
pub(crate) mod remap;
pub(crate) mod rwsem;
pub(crate) mod shared_page;
pub(crate) mod shmem;
pub(crate) mod source_file;
pub(crate) mod task;
pub(crate) mod trace;
pub(crate) mod tracepoint;
pub(crate) mod tree;
pub(crate) mod uapi;
pub(crate) mod vma;
pub(crate) mod wait;
pub(crate) mod work;

/// What `helpers.c` offers, by bindgen.
#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]
pub(crate) mod c {
    include!(concat!(env!("KDP_GENERATED"), "/helpers_generated.rs"));
}
