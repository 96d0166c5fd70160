// SPDX-License-Identifier: GPL-2.0

//! How long who waits for a page, or for an event to read, looks out for it before it sleeps.
//!
//! To be woken, and to wake, costs more than a page that comes at once. So a waiter looks out as long as the last waits
//! say that it pays, as KVM does for halted vCPUs (`halt_poll_ns` in virt/kvm/kvm_main.c).

/// What it begins with, in nanoseconds.
pub const START_NS: u64 = 10_000;

/// How long the next waiter looks out, when this one did so for `now` and its page came after `took`
/// nanoseconds. More than `max` never pays: after a page that took longer it is half as long, and nothing in the
/// end. Were it nothing at once, one late page would undo what many early ones have shown.
pub fn next(now: u64, took: u64, max: u64) -> u64 {
    if took > max {
        let half = now.min(max) / 2;
        if half < START_NS {
            0
        } else {
            half
        }
    } else if took <= now {
        now.min(max)
    } else {
        now.saturating_mul(2).max(START_NS).min(max)
    }
}
