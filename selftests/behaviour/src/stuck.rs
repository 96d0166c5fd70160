// SPDX-License-Identifier: GPL-2.0

//! Whether processes make progress, and what threads do that make none.

use std::fs;
use std::path::Path;
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

/// The words of a `stat` file behind the name in brackets (proc_pid_stat(5)).
struct Stat(Vec<String>);

const STATE: usize = 0;
const PGRP: usize = 2;
const UTIME: usize = 11;
const STIME: usize = 12;

impl Stat {
    /// That of a process or thread, by its folder.
    fn of(folder: &Path) -> Self {
        let stat = read(folder.join("stat"));
        let rest = stat.rsplit(')').next().unwrap_or_default();
        Self(rest.split_whitespace().map(str::to_owned).collect())
    }

    fn word(&self, n: usize) -> &str {
        self.0.get(n).map_or("?", String::as_str)
    }

    fn number(&self, n: usize) -> u64 {
        self.word(n).parse().unwrap_or(0)
    }
}

/// The progress that a process group makes: the CPU time that it uses.
pub struct Progress {
    group: libc::pid_t,
    cpu_time: Duration,
}

impl Progress {
    /// Begins to watch a process group.
    pub fn of_group(group: libc::pid_t) -> Self {
        Self {
            group,
            cpu_time: cpu_time_of_group(group),
        }
    }

    /// Begins to watch the group of this process.
    pub fn of_this_group() -> Self {
        // SAFETY: it takes no pointer.
        Self::of_group(unsafe { libc::getpgrp() })
    }

    /// Whether the group has used a hundredth of `time` since the last call, or since the beginning.
    pub fn is_made(&mut self, time: Duration) -> bool {
        let before = self.cpu_time;
        self.cpu_time = cpu_time_of_group(self.group);
        // Processes that have ended are not counted any more: that is progress, too.
        self.cpu_time.abs_diff(before) >= time / 100
    }
}

/// The CPU time that the living processes of a process group have used.
fn cpu_time_of_group(group: libc::pid_t) -> Duration {
    // SAFETY: it takes no pointer.
    let ticks_per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let ticks: u64 = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .map(|process| Stat::of(&process.path()))
        .filter(|stat| stat.word(PGRP) == group.to_string())
        .map(|stat| stat.number(UTIME) + stat.number(STIME))
        .sum();
    Duration::from_millis(ticks * 1000 / u64::try_from(ticks_per_second).unwrap_or(100).max(1))
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
        let stat = Stat::of(&at);
        lines.push(format!(
            "  {} {} {} {}+{} ticks: {}",
            task.file_name().to_string_lossy(),
            read(at.join("comm")).trim(),
            stat.word(STATE),
            stat.word(UTIME),
            stat.word(STIME),
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
