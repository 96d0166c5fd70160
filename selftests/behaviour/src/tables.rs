// SPDX-License-Identifier: GPL-2.0

//! What the page tables of this process and of its guests hold.

use std::fs;

use crate::check::Result;

/// Page tables of this process, in bytes.
pub fn page_tables() -> Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmPTE:"));
    match line.and_then(|line| line.trim().strip_suffix(" kB")) {
        Some(kib) => Ok(kib.trim().parse::<u64>()? << 10),
        None => fail!("/proc/self/status says nothing of VmPTE"),
    }
}

/// What KVM has mapped for the guests of this process, in entries of 4 KiB, of 2 MiB and of 1 GiB.
pub fn kvm_pages() -> Result<(u64, u64, u64)> {
    let dir = "/sys/kernel/debug/kvm";
    if !fs::exists(dir)? {
        return crate::check::skip("debugfs is not mounted: KVM's counters cannot be read");
    }
    let mut sum = (0, 0, 0);
    let mine = format!("{}-", std::process::id());
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(&mine) {
            continue;
        }
        let read = |name: &str| -> Result<u64> {
            let text = fs::read_to_string(entry.path().join(name))?;
            Ok(text.trim().parse()?)
        };
        sum.0 += read("pages_4k")?;
        sum.1 += read("pages_2m")?;
        sum.2 += read("pages_1g")?;
    }
    Ok(sum)
}
