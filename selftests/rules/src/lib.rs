// SPDX-License-Identifier: GPL-2.0

//! The rules of the page states: the very files that compile into the module.
//!
//! Everything else of this package is in tests/: properties (proptest) of each file, and models
//! (loom) of what the module does with them concurrently.

#![forbid(unsafe_code)]

#[path = "../../../rust/rules/mod.rs"]
pub mod rules;
