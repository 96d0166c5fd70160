// SPDX-License-Identifier: GPL-2.0

//! The tracepoints `kvm_demand_paging:kdp_*`. They are defined in trace.h.

use super::c;
use kernel::{
    bindings::tracepoint,
    jump_label::static_branch_unlikely, //
};

/// A page, or a block of `1 << order` pages, was mapped. What is to be told is asked for if somebody listens.
#[inline(always)]
pub(crate) fn fault(slot: u32, page: u64, access: impl FnOnce() -> u32, order: u32) {
    // SAFETY: The key is the tracepoint's own.
    if unsafe { static_branch_unlikely!(c::__tracepoint_kdp_fault, tracepoint, key) } {
        // SAFETY: A tracepoint takes any values.
        unsafe { c::kdp_trace_fault(slot, page, access(), order) };
    }
}

/// A stage-2 fault ends in an exit, which `exit` gives the address and the flags of.
#[inline(always)]
pub(crate) fn exit(slot: u32, page: u64, exit: impl FnOnce() -> (u64, u64)) {
    // SAFETY: The key is the tracepoint's own.
    if unsafe { static_branch_unlikely!(c::__tracepoint_kdp_exit, tracepoint, key) } {
        let (gpa, flags) = exit();
        // SAFETY: A tracepoint takes any values.
        unsafe { c::kdp_trace_exit(slot, page, gpa, flags) };
    }
}

/// A thread begins to wait.
pub(crate) fn wait(slot: u32, page: u64, access: u32) {
    // SAFETY: A tracepoint takes any values.
    unsafe { c::kdp_trace_wait(slot, page, access) };
}

/// A range was resolved.
pub(crate) fn resolve(slot: u32, first: u64, count: u64, changed: u64, woken: u64) {
    // SAFETY: A tracepoint takes any values.
    unsafe { c::kdp_trace_resolve(slot, first, count, changed, woken) };
}

/// Pages were read from a source, or could not be: `error` is 0 or a negative errno.
pub(crate) fn source(slot: u32, first: u64, count: u64, error: i32) {
    // SAFETY: A tracepoint takes any values.
    unsafe { c::kdp_trace_source(slot, first, count, error) };
}

/// A range was mapped anew.
pub(crate) fn collapse(slot: u32, first: u64, count: u64) {
    // SAFETY: A tracepoint takes any values.
    unsafe { c::kdp_trace_collapse(slot, first, count) };
}
