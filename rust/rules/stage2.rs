// SPDX-License-Identifier: GPL-2.0

//! Which faults are a guest's stage-2 faults, and may therefore end in an exit.
//!
//! An error that KVM gets for an access of its own is swallowed and breaks the guest in silence, so
//! an exit is right for one kind of fault only. Waiting is right for every kind: in doubt, wait.

/// What KVM's tracepoint told about the vCPU that this thread runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastFault {
    /// The guest frame number of the thread's last stage-2 fault.
    pub gfn: u64,
    /// How often the vCPU had left its guest when the fault was told.
    pub guest_exits: u64,
}

/// What is so at the moment when a touch of a page asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// The guest frame number of the page that is touched.
    pub gfn: u64,
    /// How often the vCPU has left its guest by now.
    pub guest_exits: u64,
    /// KVM is refreshing one of the pages that it shares with the guest (kvmclock, Xen).
    pub in_pfn_cache: bool,
}

/// Whether a touch is the stage-2 fault that KVM told of last.
///
/// - Another page: KVM's own access, on the way to the fault or after it.
/// - Another count of exits: the guest has run since, so the fault is over.
/// - A pfn cache refresh: it uses the very same calls as a stage-2 fault, and may come for the same
///   page between a fault that had to be retried and the next entry.
pub fn is_stage2(last: LastFault, now: Now) -> bool {
    last.gfn == now.gfn && last.guest_exits == now.guest_exits && !now.in_pfn_cache
}
