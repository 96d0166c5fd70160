//! The kernel tree's own benchmark of userfaultfd under KVM, demand_paging_test, as a check of ours.
//!
//! Its guest writes to each page in order, its handler's source is one page, its clock runs while its threads are
//! made, and each vCPU has a userfaultfd with one reader.

use std::path::Path;
use std::process::Command;

use kdp_vmm::PAGE_SIZE;

use crate::measure::Sample;
use crate::stats::QUANTILES;
use crate::Error;

/// Seconds that it may take.
const TIMEOUT: &str = "120";

/// How often it is tried.
const ATTEMPTS: usize = 3;

/// What it can measure: its argument, and the mode of the row.
pub const MODES: [(&str, &str); 2] = [
    ("MISSING", "kernel-demand-paging-test-missing"),
    ("MINOR", "kernel-demand-paging-test-minor"),
];

/// Run it once, on shmem. None if it failed again and again: that has been told then.
pub fn run(program: &Path, mode: &str, vcpus: u64, bytes: u64) -> Result<Option<Sample>, Error> {
    let each = (bytes / vcpus).to_string();
    let vcpu_count = vcpus.to_string();
    for attempt in 1..=ATTEMPTS {
        // It has no limit of its own, and a lost guest never ends.
        let output = Command::new("timeout")
            .args(["-k", "5", TIMEOUT])
            .arg(program)
            .args(["-u", mode, "-s", "shmem", "-b", &each, "-v", &vcpu_count])
            .output()
            .map_err(|source| Error::Io {
                what: format!("run {}", program.display()),
                source,
            })?;
        let text = String::from_utf8_lossy(&output.stdout);
        if let (true, Some(rate)) = (output.status.success(), rate(&text)) {
            let us = 1e6 / rate;
            let visited = bytes / PAGE_SIZE;
            return Ok(Some(Sample {
                us,
                visited,
                events: visited,
                fetched: visited,
                // It has no latencies.
                quantiles: QUANTILES.map(|_| us).to_vec(),
                ..Sample::default()
            }));
        }
        eprintln!(
            "demand_paging_test -u {mode} -v {vcpus}: attempt {attempt} of {ATTEMPTS} failed ({}):\n{text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(None)
}

/// Pages/s of all vCPUs together, as it prints them.
fn rate(output: &str) -> Option<f64> {
    let line = output
        .lines()
        .find_map(|line| line.strip_prefix("Overall demand paging rate:"))?;
    let rate: f64 = line.trim().strip_suffix(" pgs/sec")?.parse().ok()?;
    (rate > 0.0).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_of_all_vcpus_is_found() {
        let text = "All vCPU threads joined\n\
            Per-vcpu demand paging rate:\t1397.910551 pgs/sec/vcpu\n\
            Overall demand paging rate:\t2795.821101 pgs/sec\n";
        assert_eq!(rate(text), Some(2795.821101));
        assert_eq!(
            rate("Overall demand paging rate:\tinf pgs/sec/vcpu\n"),
            None
        );
        assert_eq!(rate(""), None);
    }
}
