//! The tables, and the figures that are required.

use super::{MigrationRow, Sample, BACK};
use crate::figures::Verdict;
use crate::table::{number, table, thousands};

/// A required figure.
struct Figure {
    name: &'static str,
    backing: &'static str,
    at_most: bool,
    must: f64,
    value: Option<f64>,
}

impl Figure {
    fn verdict(&self) -> Verdict {
        match self.value {
            None => Verdict::NotMeasured,
            Some(value) if self.at_most && value <= self.must => Verdict::Ok,
            Some(value) if !self.at_most && value >= self.must => Verdict::Ok,
            Some(_) => Verdict::Missed,
        }
    }
}

fn find<'a>(
    rows: &'a [MigrationRow],
    pager: &str,
    backing: &str,
    hints: bool,
) -> Option<&'a Sample> {
    let fits =
        |row: &&MigrationRow| row.pager == pager && row.backing == backing && row.hints == hints;
    rows.iter().find(fits).map(|row| &row.median)
}

fn figures(rows: &[MigrationRow]) -> Vec<Figure> {
    let of = |backing, value: fn(&Sample, &Sample) -> f64| {
        let ours = find(rows, "device", backing, true)?;
        let theirs = find(rows, "userfaultfd", backing, false)?;
        Some(value(ours, theirs))
    };
    let mut figures = Vec::new();
    for (backing, at_most, must) in [("shmem", true, 1.0), ("hugetlb-2M", true, 1.0 / 20.0)] {
        figures.push(Figure {
            name: "fault p99 over userfaultfd's",
            backing,
            at_most,
            must,
            value: of(backing, |ours, theirs| {
                ours.fault_p99_us / theirs.fault_p99_us
            }),
        });
    }
    for backing in ["shmem", "hugetlb-2M"] {
        figures.push(Figure {
            name: "bytes saved, of free memory that is not zeros",
            backing,
            at_most: false,
            must: 0.95,
            value: of(backing, |ours, theirs| {
                // Zeros are sent as a word in any case: what of them nobody has sent here was free.
                let zeros = theirs.zero_bytes - ours.zero_bytes;
                (theirs.bytes - ours.bytes) / (ours.free_bytes - zeros)
            }),
        });
    }
    figures
}

/// Everything there is to say about these rows.
pub fn report(rows: &[MigrationRow]) -> String {
    let Some(first) = rows.first() else {
        return String::new();
    };
    let link = match first.link_mbit {
        0 => "loopback".to_owned(),
        mbit => format!("a link of {mbit} Mbit/s"),
    };
    let limit = match first.bandwidth {
        0 => String::new(),
        bytes => format!(", at most {} MiB/s in the background", bytes >> 20),
    };
    let mut out = format!(
        "Post-copy of a guest of {} MiB over {link}{limit}: medians of {}, and in brackets the least and the \
         greatest.\nback: from the guest's stop until it was as fast again as {:.0} % of before.\nfault: from the touch until \
         what it waits for is there, with userfaultfd the whole page of the backing.\n\n",
        first.guest_bytes >> 20,
        first.runs,
        BACK * 100.0
    );
    let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
    let head = [
        "pager",
        "backing",
        "hints",
        "downtime ms",
        "back ms",
        "fault p50 us",
        "fault p99 us",
        "faults",
        "MiB sent",
        "MiB free",
    ];
    out += &table(&head, 3, &cells);
    let cells: Vec<Vec<String>> = figures(rows)
        .iter()
        .map(|figure| {
            let sign = if figure.at_most { "≤" } else { "≥" };
            vec![
                figure.name.to_owned(),
                figure.backing.to_owned(),
                format!("{sign} {}", number(figure.must)),
                figure.value.map_or_else(|| "-".to_owned(), number),
                figure.verdict().text().to_owned(),
            ]
        })
        .collect();
    let head = ["figure", "backing", "must", "measured", ""];
    out += "\nThe figures that are required: the device with hints over userfaultfd without.\n\n";
    out + &table(&head, 2, &cells)
}

fn cells(row: &MigrationRow) -> Vec<String> {
    let spread = |value: fn(&Sample) -> f64| {
        let [median, least, greatest] = [&row.median, &row.least, &row.greatest]
            .map(|sample| thousands(value(sample).round() as i64));
        format!("{median} [{least}, {greatest}]")
    };
    let mib = |bytes: f64| number(bytes / f64::from(1 << 20));
    vec![
        row.pager.clone(),
        row.backing.clone(),
        if row.hints { "yes" } else { "no" }.to_owned(),
        spread(|sample| sample.downtime_ms),
        spread(|sample| sample.back_ms),
        spread(|sample| sample.fault_p50_us),
        spread(|sample| sample.fault_p99_us),
        thousands(row.median.faults.round() as i64),
        mib(row.median.bytes),
        match row.hints {
            true => mib(row.median.free_bytes),
            false => "?".to_owned(),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    fn row(pager: &str, backing: &str, hints: bool, p99: f64, mib: f64) -> MigrationRow {
        let sample = Sample {
            fault_p99_us: p99,
            bytes: mib * f64::from(1 << 20),
            free_bytes: if hints { f64::from(100 << 20) } else { 0.0 },
            ..Sample::default()
        };
        MigrationRow {
            pager: pager.into(),
            backing: backing.into(),
            hints,
            guest_bytes: 256 << 20,
            link_mbit: 100,
            bandwidth: 0,
            runs: 1,
            median: sample,
            least: sample,
            greatest: sample,
            machine: Machine::here(),
        }
    }

    #[test]
    fn figures_are_ratios_of_the_rows() {
        let rows = [
            row("device", "shmem", true, 90.0, 100.0),
            row("userfaultfd", "shmem", false, 100.0, 200.0),
            row("device", "hugetlb-2M", true, 100.0, 100.0),
            row("userfaultfd", "hugetlb-2M", true, 9000.0, 100.0),
            row("userfaultfd", "hugetlb-2M", false, 1000.0, 180.0),
        ];
        let figures = figures(&rows);
        let values: Vec<_> = figures.iter().filter_map(|figure| figure.value).collect();
        assert_eq!(values, [0.9, 0.1, 1.0, 0.8]);
        let verdicts: Vec<_> = figures.iter().map(Figure::verdict).collect();
        use Verdict::{Missed, Ok};
        assert_eq!(verdicts, [Ok, Missed, Ok, Missed]);
        let text = report(&rows[..2]);
        assert!(text.contains("not measured"), "{text}");
    }
}
