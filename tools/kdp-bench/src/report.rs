//! The tables: every row, and the ratios that count, computed from the rows.

use crate::row::{Clock, Row};
use crate::table::{number, table, thousands};

/// A ratio of two rows that stand for the same work.
struct Ratio {
    name: &'static str,
    first: &'static str,
    second: &'static str,
    what: What,
}

enum What {
    /// Pages/s of the first over the second; in time, at least this is needed.
    Speed(f64),
    /// Cost of a page of the first over the second.
    Cost,
}

const RATIOS: [Ratio; 4] = [
    Ratio {
        name: "exit over uffd-missing, pages/s",
        first: "exit",
        second: "uffd-missing",
        what: What::Speed(2.2),
    },
    Ratio {
        name: "wait over uffd-missing, pages/s",
        first: "wait",
        second: "uffd-missing",
        what: What::Speed(1.0),
    },
    Ratio {
        name: "exit over limit, cost of a page",
        first: "exit",
        second: "limit",
        what: What::Cost,
    },
    Ratio {
        name: "exit-prefetch over floor, cost of a page",
        first: "exit-prefetch",
        second: "floor",
        what: What::Cost,
    },
];

/// Everything there is to say about these rows.
pub fn report(rows: &[Row]) -> String {
    let mut out = String::new();
    for clock in [Clock::Time, Clock::Icount] {
        let of_clock: Vec<&Row> = rows
            .iter()
            .filter(|row| row.clock == clock && row.mode != "setup")
            .collect();
        if !of_clock.is_empty() {
            out += &costs(clock, &of_clock);
            out.push('\n');
        }
    }
    let setups: Vec<&Row> = rows.iter().filter(|row| row.mode == "setup").collect();
    if !setups.is_empty() {
        out += &set_ups(&setups);
        out.push('\n');
    }
    out + &ratios(rows)
}

fn costs(clock: Clock, rows: &[&Row]) -> String {
    let (title, unit) = match clock {
        Clock::Time => ("Time: microseconds", "us/page"),
        Clock::Icount => ("Instructions (QEMU -icount)", "instr/page"),
    };
    // A microsecond of the counting clock is 1,000 instructions.
    let cost = |us: f64| match clock {
        Clock::Time => number(us),
        Clock::Icount => thousands((us * 1e3).round() as i64),
    };
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.mode.clone(),
                row.backing.clone(),
                row.pattern.clone(),
                row.vcpus.to_string(),
                thousands((row.bytes / 4096) as i64),
                thousands(row.pages as i64),
                format!("{} KiB", row.fault_bytes >> 10),
                cost(row.us_per_page),
                format!(
                    "{}–{}",
                    cost(row.us_per_page_range[0]),
                    cost(row.us_per_page_range[1])
                ),
                number(row.pages_per_s),
                cost(row.p50_us),
                cost(row.p99_us),
                thousands(row.exits as i64),
                thousands(row.events as i64),
            ]
        })
        .collect();
    let head = [
        "mode", "backing", "pattern", "vCPUs", "memory", "visited", "a fault", unit, "of runs",
        "pages/s", "p50", "p99", "exits", "events",
    ];
    let limits = rows.iter().filter_map(|row| {
        let parts = row.parts?;
        Some(format!(
            "limit on {}, {}, {} pages: a round trip to the VMM is {}, a copy of 4 KiB {}; the rest is floor.\n",
            row.backing,
            row.pattern,
            thousands((row.bytes / 4096) as i64),
            cost(parts.round_trip_us),
            cost(parts.copy_us)
        ))
    });
    let limits: String = limits.collect();
    format!(
        "{title}. Memory and visited in pages of 4 KiB; medians.\n\n{}\n{limits}",
        table(&head, 3, &cells)
    )
}

fn set_ups(rows: &[&Row]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let (scale, unit) = match row.clock {
                Clock::Time => (1.0, "us"),
                Clock::Icount => (1e3, "instructions"),
            };
            vec![
                unit.to_owned(),
                format!("{} MiB", thousands((row.bytes >> 20) as i64)),
                number(row.p50_us * scale),
                number(row.p99_us * scale),
            ]
        })
        .collect();
    let head = ["in", "size", "p50", "p99"];
    format!(
        "Making a memslot of sparse shmem and mapping it and its bitmap.\n\n{}",
        table(&head, 1, &cells)
    )
}

fn ratios(rows: &[Row]) -> String {
    let mut cells = Vec::new();
    for clock in [Clock::Time, Clock::Icount] {
        for ratio in &RATIOS {
            let firsts = rows
                .iter()
                .filter(|row| row.mode == ratio.first && row.clock == clock);
            cells.extend(firsts.filter_map(|first| ratio_of(ratio, first, rows)));
        }
        cells.extend(set_up_ratio(clock, rows));
    }
    if cells.is_empty() {
        return String::new();
    }
    let head = [
        "ratio", "clock", "backing", "pattern", "a fault", "vCPUs", "memory", "value", "needed", "",
    ];
    format!(
        "Ratios, computed from the rows above.\n\n{}",
        table(&head, 5, &cells)
    )
}

fn ratio_of(ratio: &Ratio, first: &Row, rows: &[Row]) -> Option<Vec<String>> {
    let twin = Row {
        mode: ratio.second.to_owned(),
        ..first.clone()
    };
    let second = rows.iter().find(|row| row.same_as(&twin))?;
    let (value, needed, verdict) = match ratio.what {
        What::Speed(needed) if first.clock == Clock::Time => {
            let value = first.pages_per_s / second.pages_per_s;
            let verdict = if value >= needed { "ok" } else { "MISSED" };
            (value, format!(">= {needed:.1}"), verdict)
        }
        What::Speed(_) => (first.pages_per_s / second.pages_per_s, String::new(), ""),
        What::Cost => (first.us_per_page / second.us_per_page, String::new(), ""),
    };
    let faults = if first.fault_bytes == second.fault_bytes {
        String::new()
    } else {
        let [ours, theirs] = [first, second].map(|row| row.fault_bytes >> 10);
        format!("{ours} KiB against {theirs} KiB")
    };
    Some(vec![
        ratio.name.to_owned(),
        first.clock.name().to_owned(),
        first.backing.clone(),
        first.pattern.clone(),
        faults,
        first.vcpus.to_string(),
        thousands((first.bytes / 4096) as i64),
        number(value),
        needed,
        verdict.to_owned(),
    ])
}

/// The largest memslot's set-up over the smallest one's.
fn set_up_ratio(clock: Clock, rows: &[Row]) -> Option<Vec<String>> {
    let mut setups: Vec<&Row> = rows
        .iter()
        .filter(|row| row.mode == "setup" && row.clock == clock)
        .collect();
    setups.sort_by_key(|row| row.bytes);
    let (small, large) = (setups.first()?, setups.last()?);
    if small.bytes == large.bytes {
        return None;
    }
    Some(vec![
        format!(
            "setup, {} MiB over {} MiB",
            thousands((large.bytes >> 20) as i64),
            small.bytes >> 20
        ),
        clock.name().to_owned(),
        large.backing.clone(),
        String::new(),
        String::new(),
        String::new(),
        String::new(),
        number(large.p50_us / small.p50_us),
        String::new(),
        String::new(),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::row;

    #[test]
    fn ratios_are_computed_and_judged() {
        let rows = [
            row("exit", Clock::Time, 100.0),
            row("wait", Clock::Time, 300.0),
            row("uffd-missing", Clock::Time, 280.0),
            row("exit", Clock::Icount, 12.0),
            row("limit", Clock::Icount, 10.0),
        ];
        let text = report(&rows);
        let line = |name: &str| {
            let found = text.lines().find(|line| line.starts_with(name));
            found
                .unwrap_or_else(|| panic!("no line '{name}' in\n{text}"))
                .to_owned()
        };
        let exit = line("exit over uffd-missing");
        assert!(exit.contains("2.80") && exit.ends_with("ok"), "{exit}");
        let wait = line("wait over uffd-missing");
        assert!(wait.contains("0.933") && wait.ends_with("MISSED"), "{wait}");
        let limit = line("exit over limit");
        assert!(
            limit.contains("icount") && limit.contains("1.20"),
            "{limit}"
        );
    }

    #[test]
    fn rows_of_other_work_are_not_compared() {
        let mut other = row("uffd-missing", Clock::Time, 280.0);
        other.backing = "hugetlb-2M".into();
        let text = report(&[row("exit", Clock::Time, 100.0), other]);
        assert!(!text.contains("Ratios"), "{text}");
    }

    #[test]
    fn setup_is_compared_between_sizes() {
        let mut large = row("setup", Clock::Time, 50.0);
        large.bytes = 64 << 30;
        let text = report(&[row("setup", Clock::Time, 40.0), large]);
        assert!(
            text.contains("setup, 65,536 MiB over 16 MiB") && text.contains("1.25"),
            "{text}"
        );
    }
}
