//! What `kdp-vmm run` prints.

use std::fmt::Write;

use kdp_vmm::backing_name;
use kdp_vmm::session::{ClockOutcome, Config, Report};
use serde_json::json;

/// One JSON object on one line.
pub fn json(config: &Config, report: &Report) -> String {
    json!({
        "mode": config.mode.name(),
        "backing": backing_name(config.backing),
        "pattern": config.pattern.name(),
        "vcpus": config.vcpus,
        "bytes": config.bytes,
        "pages": report.visited,
        "fault_bytes": config.mode.fault_bytes(config.backing),
        "fetched": report.fetched,
        "pages_fetched": report.pages_fetched,
        "pages_unneeded": report.pages_unneeded,
        "exits": report.exits,
        "events": report.events,
        "seconds": report.elapsed.as_secs_f64(),
        "us_per_page": report.us_per_page(),
        "pages_per_s": 1e6 / report.us_per_page(),
        "p50_us": report.latency(0.50),
        "p99_us": report.latency(0.99),
        "later_rounds_seconds": report.later.iter().map(|t| t.as_secs_f64()).collect::<Vec<_>>(),
        "checksum": report.checksums.iter().map(|sum| format!("{sum:016x}")).collect::<Vec<_>>(),
        "expected": format!("{:016x}", report.expected),
        "memory_ok": report.memory_ok,
        "ok": report.correct(),
    })
    .to_string()
}

/// A table of two columns.
pub fn table(config: &Config, report: &Report) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<16} {value}");
    };
    row(
        "mode",
        format!("{} on {}", config.mode.name(), backing_name(config.backing)),
    );
    row(
        "guest",
        format!(
            "{} MiB, {} vCPU{}, {} {}",
            config.bytes >> 20,
            config.vcpus,
            if config.vcpus == 1 { "" } else { "s" },
            config.pattern.name(),
            if config.write {
                "writes and reads"
            } else {
                "reads"
            }
        ),
    );
    row(
        "pages",
        format!(
            "{} visited; {} fetches of {} KiB; {} pages fetched and never touched",
            report.visited,
            report.fetched,
            config.mode.fault_bytes(config.backing) >> 10,
            report.pages_unneeded
        ),
    );
    row("exits", report.exits.to_string());
    row("events", report.events.to_string());
    row(
        "time",
        format!(
            "{:.3} s, {:.1} us a page, {:.0} pages/s",
            report.elapsed.as_secs_f64(),
            report.us_per_page(),
            1e6 / report.us_per_page()
        ),
    );
    for time in &report.later {
        row("next round", format!("{:.3} s", time.as_secs_f64()));
    }
    if let (Some(p50), Some(p99)) = (report.latency(0.50), report.latency(0.99)) {
        row(
            "latency",
            format!("p50 {p50:.1} us, p99 {p99:.1} us, as the guest sees it"),
        );
    }
    let (sum, expected) = (
        report.checksums.last().copied().unwrap_or(0),
        report.expected,
    );
    row(
        "checksum",
        if report.checksums.iter().all(|&sum| sum == expected) {
            format!("ok ({sum:016x})")
        } else {
            format!("WRONG: the guest saw {sum:016x}, the source has {expected:016x}")
        },
    );
    row(
        "memory",
        if report.memory_ok {
            "ok (equal to the source, byte for byte, but for what the guest wrote)".to_owned()
        } else {
            "WRONG: guest memory differs from what it should be".to_owned()
        },
    );
    out
}

/// What the guest with a clock saw.
pub fn clock(outcome: &ClockOutcome) -> String {
    let clock = &outcome.clock;
    format!(
        "clock            {}\n\
         advanced         {} ns, from {} to {}\n\
         went backwards   {} times\n\
         version, flags   {:#x}, {:#x}\n\
         exits            {}\n\
         events           {}\n",
        if clock.works() { "works" } else { "BROKEN" },
        clock.last_ns.wrapping_sub(clock.first_ns),
        clock.first_ns,
        clock.last_ns,
        clock.backwards,
        clock.version,
        clock.flags,
        outcome.exits,
        outcome.events,
    )
}
