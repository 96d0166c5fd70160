//! The figures that the project must show: each a ratio of two rows, computed here and nowhere else.

use kdp_vmm::PAGE_SIZE;

use crate::row::{Clock, Row};

/// Which row.
#[derive(Clone, Copy, Debug)]
pub struct Key<'a> {
    pub mode: &'a str,
    pub backing: &'a str,
    pub pattern: &'a str,
    pub vcpus: u64,
    /// Handler threads; those of the mode's own kind if this is nothing.
    pub readers: Option<u64>,
    /// The memslot's size; the smallest there is if this is nothing.
    pub bytes: Option<u64>,
    pub link_gbit: Option<u64>,
    pub clock: Clock,
}

impl<'a> Key<'a> {
    pub fn new(mode: &'a str, backing: &'a str, pattern: &'a str, clock: Clock) -> Self {
        Self {
            mode,
            backing,
            pattern,
            vcpus: 1,
            readers: None,
            bytes: None,
            link_gbit: None,
            clock,
        }
    }

    /// The row, if it was measured.
    pub fn find<'r>(&self, rows: &'r [Row]) -> Option<&'r Row> {
        let fits = |row: &&Row| {
            row.mode == self.mode
                && row.backing == self.backing
                && row.pattern == self.pattern
                && row.vcpus == self.vcpus
                && row.clock == self.clock
                && row.link_gbit == self.link_gbit
                && self.readers.is_none_or(|readers| row.readers == readers)
                && self.bytes.is_none_or(|bytes| row.bytes == bytes)
        };
        let found = rows.iter().filter(fits);
        found.min_by_key(|row| (row.bytes, row.readers))
    }

    fn text(&self) -> String {
        let mut text = format!("{} on {}, {}", self.mode, self.backing, self.pattern);
        if self.vcpus > 1 {
            text += &format!(", {} vCPUs", self.vcpus);
        }
        match self.readers {
            Some(1) if self.vcpus > 1 => text += ", 1 reader",
            Some(readers) if self.vcpus > 1 => text += &format!(", {readers} readers"),
            _ => {}
        }
        if let Some(bytes) = self.bytes {
            text += &format!(", {} MiB", bytes >> 20);
        }
        text
    }
}

/// What is taken from the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// What a page costs, first over second.
    Cost,
    /// Pages/s, first over second.
    Speed,
    /// The median of single accesses, first over second.
    Median,
    /// Bytes that an error takes, first over second.
    Lost,
    /// Instructions, of the first alone.
    Instructions,
}

/// Whether a figure is what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As good as is aimed at.
    Aim,
    /// As good as it must be.
    Ok,
    Missed,
    NotMeasured,
}

impl Verdict {
    pub fn text(self) -> &'static str {
        match self {
            Self::Aim => "ok, aim reached",
            Self::Ok => "ok",
            Self::Missed => "MISSED",
            Self::NotMeasured => "not measured",
        }
    }
}

/// The kernel of scripts/kernel for which the bounds are set.
pub const KERNEL: &str = "fast";

/// States which kernel the bounds are for, and on which one the rows were measured.
pub fn scope(rows: &[Row]) -> String {
    let mut measured: Vec<String> = Vec::new();
    let mut others = false;
    for machine in rows.iter().filter_map(|row| row.machine.as_ref()) {
        let name = format!("'{}' ({})", machine.kernel_kind, machine.kernel);
        others |= machine.kernel_kind != KERNEL;
        if !measured.contains(&name) {
            measured.push(name);
        }
    }
    let bounds = format!("The bounds are for the kernel '{KERNEL}'.");
    match measured.is_empty() {
        true => bounds,
        false => format!(
            "{bounds} These rows were measured on {}.{}",
            measured.join(" and "),
            if others {
                " Its instruction counts differ."
            } else {
                ""
            }
        ),
    }
}

/// A required figure.
#[derive(Clone, Debug)]
pub struct Figure<'a> {
    pub name: &'static str,
    pub quantity: Quantity,
    pub first: Key<'a>,
    pub second: Option<Key<'a>>,
    pub must: f64,
    pub aim: f64,
    pub value: Option<f64>,
}

impl Figure<'_> {
    /// Is less better?
    pub fn at_most(&self) -> bool {
        self.aim <= self.must
    }

    pub fn verdict(&self) -> Verdict {
        let reaches = |value: f64, bound: f64| match self.at_most() {
            true => value <= bound,
            false => value >= bound,
        };
        match self.value {
            None => Verdict::NotMeasured,
            Some(value) if reaches(value, self.aim) => Verdict::Aim,
            Some(value) if reaches(value, self.must) => Verdict::Ok,
            Some(_) => Verdict::Missed,
        }
    }

    /// How it is computed.
    pub fn formula(&self) -> String {
        let what = match (self.quantity, self.first.clock) {
            (Quantity::Cost, Clock::Time) => "µs a page",
            (Quantity::Cost, Clock::Icount) | (Quantity::Instructions, _) => "instructions a page",
            (Quantity::Speed, _) => "pages/s",
            (Quantity::Median, _) => "p50",
            (Quantity::Lost, _) => "bytes lost",
        };
        let second = self.second.map(|key| format!(" / {}", key.text()));
        format!(
            "{what}: {}{}",
            self.first.text(),
            second.unwrap_or_default()
        )
    }
}

const SHMEM: &str = "shmem";
const HUGE: &str = "hugetlb-2M";
const GIGANTIC: &str = "hugetlb-1G";

/// All of them, in the order of the requirement; a value is nothing if a row for it is missing.
pub fn figures(rows: &[Row]) -> Vec<Figure<'static>> {
    use Clock::{Icount, Time};
    use Quantity::{Cost, Instructions, Lost, Median, Speed};

    let random = |mode, backing, clock| Key::new(mode, backing, "random", clock);
    let sequential = |mode, backing, clock| Key::new(mode, backing, "sequential", clock);
    let mut all = Vec::new();
    let mut add = |name, quantity, first: Key<'static>, second: Option<Key<'static>>, must, aim| {
        let value = value(rows, quantity, &first, second.as_ref());
        all.push(Figure {
            name,
            quantity,
            first,
            second,
            must,
            aim,
            value,
        });
    };

    // KVM asks for an absent page of shmem twice, the first time without waiting.
    for (backing, must, aim) in [(HUGE, 1.20, 1.08), (SHMEM, 2.20, 1.90)] {
        let name = "exits over the limit";
        let [ours, limit] = ["exit", "limit"].map(|mode| random(mode, backing, Icount));
        add(name, Cost, ours, Some(limit), must, aim);
    }
    for backing in [SHMEM, HUGE] {
        let name = "exits over userfaultfd";
        let [ours, theirs] = ["exit", "uffd-missing"].map(|mode| random(mode, backing, Time));
        add(name, Speed, ours, Some(theirs), 2.7, 3.3);
    }
    for backing in [SHMEM, HUGE] {
        for (name, readers, must, aim) in [
            (
                "exits over userfaultfd with one reader, 8 vCPUs",
                1,
                3.0,
                6.0,
            ),
            (
                "exits over userfaultfd with a reader for each of 8 vCPUs",
                8,
                2.7,
                3.3,
            ),
        ] {
            let [ours, theirs] = ["exit", "uffd-missing"].map(|mode| Key {
                vcpus: 8,
                ..random(mode, backing, Time)
            });
            let readers = Some(readers);
            add(
                name,
                Speed,
                ours,
                Some(Key { readers, ..theirs }),
                must,
                aim,
            );
        }
    }
    for backing in [SHMEM, HUGE] {
        let name = "in order, with prefetch, over the floor";
        let [ours, floor] = ["exit-prefetch", "floor"].map(|mode| sequential(mode, backing, Time));
        add(name, Cost, ours, Some(floor), 1.3, 0.7);
    }
    let source = random("source", HUGE, Icount);
    let floor = random("floor", HUGE, Icount);
    add(
        "source in the kernel over the floor",
        Cost,
        source,
        Some(floor),
        2.2,
        1.7,
    );
    // 4 KiB against 4 KiB: what userfaultfd has for that is shmem.
    let theirs = random("uffd-missing", SHMEM, Icount);
    let name = "userfaultfd over the source in the kernel";
    add(name, Cost, theirs, Some(source), 3.3, 4.3);
    let [source, floor] = ["source", "floor"].map(|mode| sequential(mode, HUGE, Icount));
    let name = "source in the kernel, in order, over the floor";
    add(name, Cost, source, Some(floor), 1.0, 0.4);
    let name = "instructions for a page of a source, shmem";
    add(
        name,
        Instructions,
        random("source", SHMEM, Icount),
        None,
        8_217.0,
        7_579.0,
    );
    let [wait, theirs] = ["wait", "uffd-missing"].map(|mode| random(mode, SHMEM, Icount));
    let name = "cost of a wait over userfaultfd";
    add(name, Cost, wait, Some(theirs), 0.88, 0.75);
    let [wait, theirs] = ["wait", "uffd-missing"].map(|mode| random(mode, SHMEM, Time));
    add(
        "wait queue over userfaultfd",
        Speed,
        wait,
        Some(theirs),
        1.5,
        2.2,
    );
    let [ours, theirs] = ["exit", "uffd-missing"].map(|mode| random(mode, HUGE, Time));
    let name = "a fault of 4 KiB over userfaultfd's of 2 MiB";
    add(name, Median, ours, Some(theirs), 1.0 / 100.0, 1.0 / 250.0);
    for clock in [Time, Icount] {
        let [large, small] = [8 << 30, 64 << 20].map(|bytes| Key {
            bytes: Some(bytes),
            ..random("exit", SHMEM, clock)
        });
        let name = "a page of 8 GiB over one of 64 MiB";
        add(name, Cost, large, Some(small), 1.10, 1.02);
    }
    for backing in [HUGE, SHMEM] {
        let ours = random("exit-module", backing, Icount);
        let name = "instructions inside the module for an exit, probe included";
        add(name, Instructions, ours, None, 600.0, 250.0);
    }
    for (name, backing) in [
        ("complete memory over a plain hugetlb memfd", HUGE),
        ("complete memory over a plain shmem memfd", SHMEM),
    ] {
        for clock in [Time, Icount] {
            let loops = ["loop-device", "loop-plain"];
            let [ours, plain] = loops.map(|mode| random(mode, backing, clock));
            add(name, Cost, ours, Some(plain), 1.05, 1.00);
        }
    }
    for (backing, bytes) in [(HUGE, 2 << 20), (GIGANTIC, 1 << 30)] {
        let [ours, plain] = ["poison", "poison-plain"].map(|mode| sequential(mode, backing, Time));
        // 4 KiB, and nothing else will do.
        let must = PAGE_SIZE as f64 / f64::from(bytes);
        let name = "what a memory error takes, over plain hugetlb";
        add(name, Lost, ours, Some(plain), must, must);
    }
    all
}

fn value(rows: &[Row], quantity: Quantity, first: &Key, second: Option<&Key>) -> Option<f64> {
    let first = first.find(rows)?;
    let ratio = |of: fn(&Row) -> f64| Some(of(first) / of(second?.find(rows)?));
    match quantity {
        Quantity::Cost => ratio(|row| row.us_per_page),
        Quantity::Speed => ratio(|row| row.pages_per_s),
        Quantity::Median => ratio(|row| row.p50_us),
        Quantity::Lost => {
            let lost = |row: &Row| Some(row.damage?.bytes_lost as f64);
            Some(lost(first)? / lost(second?.find(rows)?)?)
        }
        // A microsecond of the counting clock is 1,000 instructions.
        Quantity::Instructions => Some(first.us_per_page * 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::{damaged, memory_error_rows, row};

    fn named<'a>(all: &'a [Figure<'static>], name: &str, backing: &str) -> &'a Figure<'static> {
        let fits = |f: &&Figure| f.name == name && f.first.backing == backing;
        all.iter().find(fits).unwrap()
    }

    #[test]
    fn without_rows_nothing_is_measured() {
        let all = figures(&[]);
        assert!(all.len() > 15);
        assert!(all.iter().all(|f| f.verdict() == Verdict::NotMeasured));
    }

    #[test]
    fn figures_are_ratios_of_the_rows_that_they_name() {
        let rows = [
            row("exit", Clock::Icount, 20.0),
            row("limit", Clock::Icount, 10.0),
            row("exit", Clock::Time, 100.0),
            row("uffd-missing", Clock::Time, 260.0),
            Row {
                vcpus: 8,
                ..row("exit", Clock::Time, 50.0)
            },
            Row {
                vcpus: 8,
                readers: 1,
                ..row("uffd-missing", Clock::Time, 400.0)
            },
            Row {
                vcpus: 8,
                readers: 8,
                ..row("uffd-missing", Clock::Time, 140.0)
            },
            row("exit-module", Clock::Icount, 0.25),
            Row {
                bytes: 64 << 20,
                ..row("exit", Clock::Time, 102.0)
            },
            Row {
                bytes: 8 << 30,
                ..row("exit", Clock::Time, 120.0)
            },
        ];
        let all = figures(&rows);
        let check = |name, value: f64, verdict| {
            let figure = named(&all, name, SHMEM);
            let got = figure.value.unwrap();
            assert!((got - value).abs() < 1e-9, "{name}: {got}");
            assert_eq!(figure.verdict(), verdict, "{name}");
        };
        check("exits over the limit", 2.0, Verdict::Ok);
        // The rows of other sizes and other numbers of vCPUs are not taken for these.
        check("exits over userfaultfd", 2.6, Verdict::Missed);
        check(
            "exits over userfaultfd with one reader, 8 vCPUs",
            8.0,
            Verdict::Aim,
        );
        check(
            "exits over userfaultfd with a reader for each of 8 vCPUs",
            2.8,
            Verdict::Ok,
        );
        let module = "instructions inside the module for an exit, probe included";
        check(module, 250.0, Verdict::Aim);
        check(
            "a page of 8 GiB over one of 64 MiB",
            120.0 / 102.0,
            Verdict::Missed,
        );
        let other = named(&all, "exits over the limit", HUGE);
        assert_eq!(other.verdict(), Verdict::NotMeasured);
    }

    #[test]
    fn an_error_must_take_4_kib_and_nothing_else() {
        let verdict = |rows: &[Row]| {
            let all = figures(rows);
            named(&all, "what a memory error takes, over plain hugetlb", HUGE).verdict()
        };
        let mut rows = memory_error_rows();
        assert_eq!(verdict(&rows), Verdict::Aim);
        rows[1] = damaged("poison", 60.0, 8192, None);
        assert_eq!(verdict(&rows), Verdict::Missed);
        assert_eq!(verdict(&rows[1..]), Verdict::NotMeasured);
    }

    #[test]
    fn half_a_ratio_is_not_measured() {
        let all = figures(&[row("wait", Clock::Time, 100.0)]);
        let wait = named(&all, "wait queue over userfaultfd", SHMEM);
        assert_eq!(wait.verdict(), Verdict::NotMeasured);
    }
}
