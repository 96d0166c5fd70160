// SPDX-License-Identifier: GPL-2.0

//! What a touch of a page does: the table of the design, as one function.

/// The state of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its bytes are in the memfd.
    Present,
    /// It is known to hold nothing: reads as zeros.
    Zero,
    /// Its bytes are in the memslot's source, which the kernel reads by itself.
    Sourced,
    /// Its bytes are elsewhere.
    Absent,
    /// Its bytes are lost.
    Poisoned,
    /// Its memslot was removed.
    Removed,
}

/// The ways in which the touching thread may be kept waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Toucher {
    /// It is a stage-2 fault of a vCPU whose thread asked for exits.
    pub exits: bool,
    /// The fault may be retried, so its lock can be dropped.
    pub may_retry: bool,
    /// It must not sleep.
    pub no_wait: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Map the page.
    Map,
    /// Fill it with zeros, make it present, look again.
    FillZero,
    /// Read it from the source, without the fault's lock, and look again.
    Fetch,
    /// Return from KVM_RUN and name the page.
    Exit,
    /// Queue an event and sleep until the page is resolved.
    Wait,
    /// Come back without having slept.
    Retry,
    /// The machine check that an access to lost memory is.
    Poison,
    /// An error, never a page of zeros.
    Fail,
}

/// Decides. `served` says whether anybody can resolve events any more.
pub fn decide(state: State, who: Toucher, served: bool) -> Verdict {
    match state {
        State::Present => Verdict::Map,
        State::Zero => Verdict::FillZero,
        State::Removed => Verdict::Fail,
        // Nobody need serve it: nobody can.
        State::Poisoned if who.exits => Verdict::Exit,
        State::Poisoned => Verdict::Poison,
        // Nobody need serve it, and nobody is asked.
        State::Sourced if !who.may_retry => Verdict::Fail,
        State::Sourced if who.no_wait => Verdict::Retry,
        State::Sourced => Verdict::Fetch,
        State::Absent if !served => Verdict::Fail,
        State::Absent if who.exits => Verdict::Exit,
        State::Absent if !who.may_retry => Verdict::Fail,
        State::Absent if who.no_wait => Verdict::Retry,
        State::Absent => Verdict::Wait,
    }
}
