// SPDX-License-Identifier: GPL-2.0

//! Tests of behaviour, on the real module: what a touch of a page does, whoever touches it.
//!
//! `behaviour --list` prints the tests' names, `behaviour NAME...` runs those, `behaviour` runs all. Every
//! test runs in a process of its own with a time limit. The invariants that the tests' comments name are
//! those of the design: 1 data, then bit; 2 placed once; 3 no lost wake-up; 4 no event lost with its
//! reader; 6 fail closed; 7 cost independent of size; 8 pins are charged and sealed.
//!
//! KDP_SOAK=N makes the tests that repeat something do so N times as often.

#[macro_use]
mod check;
mod busy;
mod cgroup;
mod content;
mod emulator;
mod guest;
mod handler;
mod harness;
mod kernel_log;
mod link;
mod linux;
mod loop_device;
mod nested;
mod numa;
mod shared;
mod slot;
mod slow_fs;
mod stuck;
mod sys;
mod tables;
mod task;
mod tests;
mod tun;
mod vhost;
mod vmm;
mod xdp;

use std::process::ExitCode;

fn main() -> ExitCode {
    let all: Vec<&harness::Test> = tests::all().collect();
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "--list") {
        for test in all {
            println!("{}", test.name);
        }
        return ExitCode::SUCCESS;
    }
    let mut chosen = Vec::new();
    for arg in &args {
        match all.iter().find(|test| test.name == arg) {
            Some(test) => chosen.push(*test),
            None => {
                eprintln!(
                    "behaviour: there is no test '{arg}': 'behaviour --list' prints them all"
                );
                return ExitCode::from(2);
            }
        }
    }
    harness::run(if chosen.is_empty() { &all } else { &chosen })
}
