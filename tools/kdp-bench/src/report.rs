//! The tables: every row, and the ratios that count, computed from the rows.

use crate::figures::{figures, scope, Figure, Key};
use crate::memory_error::{errors, replacements, ERRORS, ERRORS_HEAD, REPLACE, REPLACE_HEAD};
use crate::row::{Clock, Row};
use crate::table::{number, table, thousands};

/// Ratios of two rows that stand for the same work: the name, the first, the second, what is compared.
const RATIOS: [(&str, &str, &str, What); 4] = [
    (
        "exit over uffd-missing, pages/s",
        "exit",
        "uffd-missing",
        What::Speed,
    ),
    (
        "wait over uffd-missing, pages/s",
        "wait",
        "uffd-missing",
        What::Speed,
    ),
    (
        "exit over limit, cost of a page",
        "exit",
        "limit",
        What::Cost,
    ),
    (
        "exit-prefetch over floor, cost of a page",
        "exit-prefetch",
        "floor",
        What::Cost,
    ),
];

#[derive(Clone, Copy)]
enum What {
    Speed,
    Cost,
}

/// Everything there is to say about these rows.
pub fn report(rows: &[Row]) -> String {
    let mut out = String::new();
    for clock in [Clock::Time, Clock::Icount] {
        let of_clock: Vec<&Row> = rows
            .iter()
            .filter(|row| row.clock == clock && row.mode != "setup" && row.damage.is_none())
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
    out += &memory_errors(rows);
    out += &ratios(rows);
    out.push('\n');
    out + &required(rows)
}

/// The figures that are required.
fn required(rows: &[Row]) -> String {
    let cells: Vec<Vec<String>> = figures(rows)
        .iter()
        .map(|figure| {
            vec![
                figure.name.to_owned(),
                figure.first.backing.to_owned(),
                figure.first.clock.name().to_owned(),
                bound(figure, figure.must),
                bound(figure, figure.aim),
                measured(figure).unwrap_or_else(|| "-".to_owned()),
                figure.verdict().text().to_owned(),
            ]
        })
        .collect();
    let head = ["figure", "backing", "clock", "must", "aim", "measured", ""];
    format!(
        "The figures that are required. \"over\" is a ratio of what a page costs, or of pages/s.\n{}\n\n{}",
        scope(rows),
        table(&head, 3, &cells)
    )
}

/// A bound as it is written: at most, at least, a fraction.
pub fn bound(figure: &Figure, bound: f64) -> String {
    let sign = if figure.at_most() { "≤" } else { "≥" };
    format!("{sign} {}", written(figure, bound))
}

/// The figure's value, written as its bounds are.
pub fn measured(figure: &Figure) -> Option<String> {
    figure.value.map(|value| written(figure, value))
}

fn written(figure: &Figure, value: f64) -> String {
    match figure.must < 0.05 {
        true => format!("1/{:.0}", 1.0 / value),
        false => number(value),
    }
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
                row.readers.to_string(),
                row.link_gbit.map_or(String::new(), |gbit| gbit.to_string()),
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
                thousands(row.pages_unneeded as i64),
            ]
        })
        .collect();
    let head = [
        "mode", "backing", "pattern", "vCPUs", "readers", "Gbit/s", "memory", "visited", "a fault",
        unit, "of runs", "pages/s", "p50", "p99", "exits", "events", "unneeded",
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
        "{title}. Memory, visited and unneeded (fetched, not visited) in pages of 4 KiB; medians.\n\n{}\n{limits}",
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

fn memory_errors(rows: &[Row]) -> String {
    let mut out = String::new();
    let errors: Vec<Vec<String>> = errors(rows).map(Vec::from).collect();
    if !errors.is_empty() {
        out += &format!("{ERRORS}\n\n{}\n", table(&ERRORS_HEAD, 1, &errors));
    }
    let moves: Vec<Vec<String>> = replacements(rows).map(Vec::from).collect();
    if !moves.is_empty() {
        out += &format!("{REPLACE}\n\n{}\n", table(&REPLACE_HEAD, 1, &moves));
    }
    out
}

fn ratios(rows: &[Row]) -> String {
    let mut cells = Vec::new();
    for clock in [Clock::Time, Clock::Icount] {
        for &(name, first, second, what) in &RATIOS {
            let firsts = rows
                .iter()
                .filter(|row| row.mode == first && row.clock == clock);
            cells.extend(firsts.filter_map(|row| ratio_of(name, row, second, what, rows)));
        }
        cells.extend(set_up_ratio(clock, rows));
    }
    if cells.is_empty() {
        return String::new();
    }
    let head = [
        "ratio", "clock", "backing", "pattern", "a fault", "readers", "vCPUs", "memory", "Gbit/s",
        "value",
    ];
    format!(
        "Ratios, computed from the rows above.\n\n{}",
        table(&head, 5, &cells)
    )
}

fn ratio_of(
    name: &str,
    first: &Row,
    second: &str,
    what: What,
    rows: &[Row],
) -> Option<Vec<String>> {
    let second = Key {
        vcpus: first.vcpus,
        bytes: Some(first.bytes),
        link_gbit: first.link_gbit,
        ..Key::new(second, &first.backing, &first.pattern, first.clock)
    }
    .find(rows)?;
    let value = match what {
        What::Speed => first.pages_per_s / second.pages_per_s,
        What::Cost => first.us_per_page / second.us_per_page,
    };
    let faults = if first.fault_bytes == second.fault_bytes {
        String::new()
    } else {
        let [ours, theirs] = [first, second].map(|row| row.fault_bytes >> 10);
        format!("{ours} KiB against {theirs} KiB")
    };
    Some(vec![
        name.to_owned(),
        first.clock.name().to_owned(),
        first.backing.clone(),
        first.pattern.clone(),
        faults,
        second.readers.to_string(),
        first.vcpus.to_string(),
        thousands((first.bytes / 4096) as i64),
        first
            .link_gbit
            .map_or(String::new(), |gbit| gbit.to_string()),
        number(value),
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
        String::new(),
        String::new(),
        number(large.p50_us / small.p50_us),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::{memory_error_rows, row};

    #[test]
    fn ratios_are_computed_and_figures_judged() {
        let rows = [
            row("exit", Clock::Time, 100.0),
            row("wait", Clock::Time, 300.0),
            Row {
                backing: "hugetlb-2M".into(),
                ..row("exit", Clock::Time, 100.0)
            },
            Row {
                backing: "hugetlb-2M".into(),
                ..row("uffd-missing", Clock::Time, 17_400.0)
            },
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
        assert!(exit.ends_with("2.80"), "{exit}");
        let wait = line("wait over uffd-missing");
        assert!(wait.ends_with("0.933"), "{wait}");
        let wait = line("wait queue over userfaultfd");
        assert!(wait.contains("0.933") && wait.ends_with("MISSED"), "{wait}");
        let fault = line("a fault of 4 KiB over");
        assert!(
            fault.contains("≤ 1/250") && fault.contains("1/174"),
            "{fault}"
        );
        let source = line("source in the kernel over the floor");
        assert!(source.ends_with("not measured"), "{source}");
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
    fn memory_errors_stand_beside_those_without_us() {
        let rows = memory_error_rows();
        let text = report(&rows);
        let line = |head: &str| {
            let at = text.find(head).unwrap_or_else(|| panic!("{head}: {text}"));
            let mut lines = text[at..].lines().skip_while(|line| !line.contains("──"));
            lines.nth(1).unwrap().split_whitespace().collect::<Vec<_>>()
        };
        assert_eq!(
            line("The same memory error"),
            [
                "hugetlb-2M",
                "2,097,152",
                "4,096",
                "2,093,056",
                "40.0",
                "60.0"
            ]
        );
        // 5110 us for 511 pages.
        assert_eq!(
            line("KDP_REPLACE"),
            [
                "hugetlb-2M",
                "5,110",
                "640",
                "2,093,056",
                "4,096",
                "300",
                "250–900",
                "200",
                "150–210",
                "1.50"
            ]
        );
        assert!(!text.contains("us/page"), "{text}");
        assert!(!report(&rows[..1]).contains("KDP_REPLACE"));
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
