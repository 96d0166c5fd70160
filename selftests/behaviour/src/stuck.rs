// SPDX-License-Identifier: GPL-2.0

//! What threads do that do not go on: for whoever has to find out why a test hangs.

use std::fs;
use std::thread;
use std::time::Duration;

/// How long KVM is watched.
const WATCHED: Duration = Duration::from_millis(200);

/// How many lines of a trace are told.
const LINES: usize = 60;

const TRACING: &str = "/sys/kernel/tracing";

/// Reads a file that may not be there any more.
fn read(path: impl AsRef<std::path::Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Where the threads of a process are, and how many clock ticks each has used, in user mode and in the kernel.
pub fn threads_of(pid: impl std::fmt::Display) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let mut lines = Vec::new();
    for task in tasks.into_iter().flatten().flatten() {
        let at = task.path();
        let stack = read(at.join("stack"));
        let frames: Vec<&str> = stack
            .lines()
            .take(8)
            .filter_map(|line| line.split_whitespace().nth(1))
            .collect();
        // What is behind the name in brackets: the state is word 0, utime and stime are 11 and 12 (proc_pid_stat(5)).
        let stat = read(at.join("stat"));
        let words: Vec<&str> = stat
            .rsplit(')')
            .next()
            .map_or_else(Vec::new, |rest| rest.split_whitespace().collect());
        let word = |n: usize| words.get(n).copied().unwrap_or("?");
        lines.push(format!(
            "  {} {} {} {}+{} ticks: {}",
            task.file_name().to_string_lossy(),
            read(at.join("comm")).trim(),
            word(0),
            word(11),
            word(12),
            frames.join(" < "),
        ));
    }
    lines.join("\n")
}

/// What KVM's and the module's tracepoints see in a moment.
pub fn trace_of_kvm() -> String {
    let events = trace(&["kvm", "kvm_demand_paging"]);
    let last = &events[events.len().saturating_sub(LINES)..];
    format!(
        "  KVM, in {WATCHED:?}: {} events, the last of them:\n{}",
        events.len(),
        last.join("\n")
    )
}

/// What these tracepoints (systems, or one of a system) see in a moment, a line for each event.
pub fn trace(tracepoints: &[&str]) -> Vec<String> {
    let set = |file: &str, text: &str| fs::write(format!("{TRACING}/{file}"), text);
    let switch = |on: &str| {
        for tracepoint in tracepoints {
            // One that is not there has nothing to tell.
            let _ = set(&format!("events/{tracepoint}/enable"), on);
        }
    };
    let _ = set("trace", "");
    switch("1");
    thread::sleep(WATCHED);
    switch("0");
    read(format!("{TRACING}/trace"))
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}
