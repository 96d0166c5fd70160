//! On what it was measured.

use std::fs;

use serde::{Deserialize, Serialize};

/// The machine, as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// Which of the project's kernels that is (KDP_KERNEL): stock, fast, ...; empty elsewhere.
    #[serde(default)]
    pub kernel_kind: String,
    /// The CPU's name: emulators have theirs there.
    pub cpu: String,
    /// How many CPUs.
    pub cpus: usize,
    /// Its memory in MiB.
    pub memory_mib: u64,
}

impl Machine {
    /// This one. What it does not say stays empty.
    pub fn here() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let of = |name| {
            let found = cpuinfo.lines().filter_map(move |line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim().to_owned())
            });
            found.collect::<Vec<_>>()
        };
        let meminfo = read("/proc/meminfo");
        let total = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            kernel_kind: std::env::var("KDP_KERNEL").unwrap_or_default(),
            cpu: of("model name").into_iter().next().unwrap_or_default(),
            cpus: of("processor").len(),
            memory_mib: total.and_then(|kib| kib.parse().ok()).unwrap_or(0_u64) / 1024,
        }
    }
}
