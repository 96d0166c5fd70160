//! Moves a running guest to another VMM: pre-copy, then post-copy, over TCP.
//!
//! [`Source`] and [`Destination`] are the two engines. What they know of a VMM is [`SourceMachine`] and
//! [`DestinationMachine`]; nothing here touches KVM, so both run in the tests with a guest made of threads.
//!
//! ```text
//!   source                                   destination (listens; the source connects, and connects again)
//!   hello: id, layout                  ──►   welcome: stage, how many frames of pages it has had
//!   pages, round after round           ──►   acks
//!   the guest stops
//!   pages that are stale, free; state  ──►   loads the state (pages that it needs are asked for)
//!                                      ◄──   ready
//!   go: the point of no return         ──►   the guest runs
//!   pages, requested ones first        ◄─►   requests, acks
//!   all sent                           ──►   done, with what only the destination can measure
//! ```
//!
//! A destination's engine that dies while the guest runs there, and only the engine, has its place taken by another one
//! ([`Destination::replace`]): that one tells with the welcome which pages are there.
//!
//! The rules are pure logic, a file each: [`hints`] (what a free-page hint is worth), [`rounds`] (when pre-copy ends),
//! [`bucket`] (bandwidth), [`ledbat`] (how much is on its way in the background), [`schedule`] (which page is sent next, and
//! what a cut connection has lost), [`wire`] (bytes).
//! Documentation/migration.md explains them, and who may fail when.

#![deny(missing_docs)]

pub mod bucket;
pub mod control;
mod destination;
mod error;
pub mod hints;
mod layout;
pub mod ledbat;
mod link;
mod machine;
mod misses;
mod options;
mod pages;
mod report;
pub mod rounds;
pub mod schedule;
mod source;
pub mod wire;

pub use destination::{Destination, Known};
pub use error::{Error, Failure, Guest, MachineError};
pub use hints::{Epoch, Hint};
pub use layout::{Layout, Slot};
pub use machine::{Content, DestinationMachine, Placed, SourceMachine};
pub use misses::Misses;
pub use options::{DestinationOptions, SourceOptions};
pub use pages::PageSet;
pub use report::{DestinationFigures, DestinationReport, Paths, Phase, Progress, SourceReport};
pub use source::Source;
pub use wire::MigrationId;

/// What most of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lock what is whole between any two calls that change it, also after a panic elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
