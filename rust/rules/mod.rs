// SPDX-License-Identifier: GPL-2.0

//! The rules of the page states: what may follow what, decided without any kernel type.
//!
//! These files compile into the module and, unchanged, into a crate on the host, where they are
//! property-tested and model-checked. They hold no `unsafe`, take no lock and never sleep: the
//! caller owns the locks and says so where it calls.

pub mod around;
pub mod bits;
pub mod claim;
pub mod collapse;
pub mod fill;
pub mod name;
pub mod poison;
pub mod poll;
pub mod queue;
pub mod range;
pub mod replace;
pub mod stage2;
pub mod stream;
pub mod stripe;
pub mod touch;
