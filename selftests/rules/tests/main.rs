// SPDX-License-Identifier: GPL-2.0

//! The tests of the rules. A test `a::b_c` is called `rules-a-b-c` by selftests/rules/run.

#![forbid(unsafe_code)]

mod host;
mod loomed;
mod ranges;

mod around;
mod bits;
mod claim;
mod collapse;
mod fill;
mod loom_bits;
mod loom_claim;
mod loom_pages;
mod loom_shards;
mod loom_wait;
mod loom_zero;
mod name;
mod poison;
mod poll;
mod queue;
mod range;
mod replace;
mod source;
mod stage2;
mod stream;
mod stripe;
mod touch;
