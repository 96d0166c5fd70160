//! A row of the result: one mode, one backing, one pattern, one size.

use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::Error;

/// What the machine's clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// Time.
    Time,
    /// Instructions, a nanosecond each.
    Icount,
}

impl Clock {
    /// The name used on command lines and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Icount => "icount",
        }
    }
}

/// One object of the JSON array. Every figure is the median over the runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured: a mode of kdp-vmm; limit; loop-plain, loop-device (memory that is complete, visited again);
    /// setup (making and mapping a memslot); exit-module (the module's part of exit);
    /// kernel-demand-paging-test-missing, -minor; poison-plain, poison (a memory error without us and with us), replace
    /// (putting a fresh huge page in the place of the one that has it).
    pub mode: String,
    /// shmem, hugetlb-2M or hugetlb-1G.
    pub backing: String,
    /// random or sequential.
    pub pattern: String,
    /// vCPUs.
    pub vcpus: u64,
    /// Handler threads that faults went to.
    #[serde(default)]
    pub readers: u64,
    /// The simulated link that contents came over, in Gbit/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_gbit: Option<u64>,
    /// Guest memory in bytes.
    pub bytes: u64,
    /// What a microsecond is: time, or 1,000 instructions.
    pub clock: Clock,
    /// From the guest's first access to its last, for each page that it visited.
    pub us_per_page: f64,
    /// The reciprocal.
    pub pages_per_s: f64,
    /// What one access took, as the guest sees it.
    pub p50_us: f64,
    /// The same, at worst but for one in a hundred.
    pub p99_us: f64,
    /// KVM_RUN returns with KVM_EXIT_MEMORY_FAULT.
    pub exits: u64,
    /// Events that a handler read.
    pub events: u64,
    /// Pages that the guest visited: userfaultfd on huge pages resolves a whole one by each fault, so there
    /// it visits one page in each.
    pub pages: u64,
    /// Pages of 4 KiB that were fetched.
    #[serde(default)]
    pub pages_fetched: u64,
    /// Of those, pages that the guest never touched.
    #[serde(default)]
    pub pages_unneeded: u64,
    /// Bytes that one fault brings.
    pub fault_bytes: u64,
    /// How often it was measured.
    pub runs: usize,
    /// The least and the greatest `us_per_page` of those.
    pub us_per_page_range: [f64; 2],
    /// What single accesses took: a part of them from 0 to 1, and the microseconds that it stayed below or at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cdf: Vec<[f64; 2]>,
    /// On what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// Of the mode limit: what it is made of beside the floor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<Parts>,
    /// Of poison-plain, poison and replace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damage: Option<Damage>,
}

/// What `limit` adds to the floor, each in microseconds, the medians of measurements in the same runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Parts {
    /// From the guest to the VMM and back, by one write to a port.
    pub round_trip_us: f64,
    /// Copying 4 KiB to memory of the backing.
    pub copy_us: f64,
}

/// What there is of `bytes` after a memory error; in the worst of the runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Damage {
    /// Bytes of pages that cannot be read.
    pub bytes_lost: u64,
    /// Bytes that can be read, and are what they were.
    pub bytes_kept: u64,
    /// Of replace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
}

/// The longest visit of a guest that reads the huge page over and over, in microseconds: the median of the runs, and
/// their least and greatest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pause {
    /// While the huge page is replaced, until the guest has all of its pages again.
    pub us: f64,
    pub us_range: [f64; 2],
    /// Over the same time without that.
    pub without_us: f64,
    pub without_us_range: [f64; 2],
}

impl Damage {
    fn is_sound(&self, bytes: u64) -> bool {
        let mut pauses = self.pause.iter().flat_map(|pause| {
            [
                (pause.us, pause.us_range),
                (pause.without_us, pause.without_us_range),
            ]
        });
        self.bytes_lost.checked_add(self.bytes_kept) == Some(bytes)
            && pauses.all(|(us, [least, greatest])| {
                0.0 < least && least <= us && us <= greatest && greatest.is_finite()
            })
    }
}

impl Row {
    /// Do both describe the same thing?
    pub fn same_as(&self, other: &Self) -> bool {
        let key = |row: &Self| {
            (
                row.mode.clone(),
                row.backing.clone(),
                row.pattern.clone(),
                row.vcpus,
                row.readers,
                row.link_gbit,
                row.bytes,
                row.clock,
            )
        };
        key(self) == key(other)
    }
}

/// The rows of all these files; of two rows for the same thing the later one.
pub fn load(files: &[PathBuf]) -> Result<Vec<Row>, Error> {
    let mut rows: Vec<Row> = Vec::new();
    for file in files {
        let text = fs::read_to_string(file).map_err(|source| Error::Io {
            what: format!("read {}", file.display()),
            source,
        })?;
        let more: Vec<Row> = serde_json::from_str(&text).map_err(|source| Error::Json {
            file: file.display().to_string(),
            source,
        })?;
        for row in more {
            add(&mut rows, row);
        }
    }
    Ok(rows)
}

/// Add a row, or put it in the place of another one for the same.
pub fn add(rows: &mut Vec<Row>, row: Row) {
    match rows.iter_mut().find(|old| old.same_as(&row)) {
        Some(old) => *old = row,
        None => rows.push(row),
    }
}

/// Does every row hold what all rows must, and no two stand for the same? The first that does not is told.
pub fn check(rows: &[Row]) -> Result<(), Error> {
    for (n, row) in rows.iter().enumerate() {
        let figures = [
            row.us_per_page,
            row.pages_per_s,
            row.p50_us,
            row.p99_us,
            row.us_per_page_range[0],
            row.us_per_page_range[1],
        ];
        let sound = figures.iter().all(|x| x.is_finite() && *x > 0.0)
            && (row.us_per_page * row.pages_per_s / 1e6 - 1.0).abs() < 1e-6
            && row.p50_us <= row.p99_us
            && row.us_per_page_range[0] <= row.us_per_page
            && row.us_per_page <= row.us_per_page_range[1]
            && row
                .cdf
                .windows(2)
                .all(|w| w[0][0] < w[1][0] && w[0][1] <= w[1][1])
            && [
                row.vcpus,
                row.bytes,
                row.pages,
                row.fault_bytes,
                row.runs as u64,
            ]
            .iter()
            .all(|&x| x > 0)
            && row.damage.is_none_or(|damage| damage.is_sound(row.bytes));
        let why = if !sound {
            "its figures contradict each other"
        } else if rows[..n].iter().any(|other| other.same_as(row)) {
            "there is another one for the same"
        } else {
            continue;
        };
        return Err(Error::Row {
            row: format!(
                "{} on {}, {}, {}",
                row.mode,
                row.backing,
                row.pattern,
                row.clock.name()
            ),
            why,
        });
    }
    Ok(())
}

/// Write the rows, one on each line, all or nothing.
pub fn save(rows: &[Row], file: &Path) -> Result<(), Error> {
    let json = |source| Error::Json {
        file: file.display().to_string(),
        source,
    };
    let lines: Result<Vec<String>, _> = rows.iter().map(serde_json::to_string).collect();
    write(
        file,
        &format!("[\n{}\n]\n", lines.map_err(json)?.join(",\n")),
    )
}

/// Write a file, all or nothing.
pub fn write(file: &Path, text: &str) -> Result<(), Error> {
    let io = |source| Error::Io {
        what: format!("write {}", file.display()),
        source,
    };
    if let Some(dir) = file.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::create_dir_all(dir).map_err(io)?;
    }
    let part = file.with_extension("part");
    fs::write(&part, text).map_err(io)?;
    fs::rename(&part, file).map_err(io)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn row(mode: &str, clock: Clock, us: f64) -> Row {
        Row {
            mode: mode.into(),
            backing: "shmem".into(),
            pattern: "random".into(),
            vcpus: 1,
            readers: 0,
            link_gbit: None,
            bytes: 16 << 20,
            clock,
            us_per_page: us,
            pages_per_s: 1e6 / us,
            p50_us: us,
            p99_us: us,
            exits: 0,
            events: 0,
            pages: 4096,
            pages_fetched: 4096,
            pages_unneeded: 0,
            fault_bytes: 4096,
            runs: 1,
            us_per_page_range: [us, us],
            cdf: Vec::new(),
            machine: None,
            parts: None,
            damage: None,
        }
    }

    /// A row of a memory error that takes so many bytes of 2 MiB.
    pub fn damaged(mode: &str, us: f64, bytes_lost: u64, pause: Option<Pause>) -> Row {
        let bytes = 2 << 20;
        Row {
            backing: "hugetlb-2M".into(),
            pattern: "sequential".into(),
            bytes,
            damage: Some(Damage {
                bytes_lost,
                bytes_kept: bytes - bytes_lost,
                pause,
            }),
            ..row(mode, Clock::Time, us)
        }
    }

    /// One without us, one with us, and the replacement: pauses of 300 and of 200 us.
    pub fn memory_error_rows() -> [Row; 3] {
        let pause = Pause {
            us: 300.0,
            us_range: [250.0, 900.0],
            without_us: 200.0,
            without_us_range: [150.0, 210.0],
        };
        [
            damaged("poison-plain", 40.0, 2 << 20, None),
            damaged("poison", 60.0, 4096, None),
            Row {
                pages: 511,
                p50_us: 5110.0,
                p99_us: 6000.0,
                ..damaged("replace", 10.0, 4096, Some(pause))
            },
        ]
    }

    #[test]
    fn files_are_merged_and_the_later_one_counts() {
        let dir = std::env::temp_dir().join(format!("kdp-bench-test-{}", std::process::id()));
        let (a, b) = (dir.join("a.json"), dir.join("b.json"));
        let (time, icount) = (Clock::Time, Clock::Icount);
        save(&[row("exit", time, 100.0), row("wait", time, 200.0)], &a).unwrap();
        save(&[row("exit", icount, 12.5), row("wait", time, 150.0)], &b).unwrap();
        let rows = load(&[a, b]).unwrap();
        fs::remove_dir_all(dir).unwrap();
        let expected = [
            row("exit", time, 100.0),
            row("wait", time, 150.0),
            row("exit", icount, 12.5),
        ];
        assert_eq!(rows, expected);
    }

    #[test]
    fn rows_that_cannot_be_are_refused() {
        let good = row("exit", Clock::Time, 100.0);
        check(&[good.clone(), row("exit", Clock::Icount, 12.0)]).unwrap();
        let refused = |bad: Row| check(&[good.clone(), bad]).unwrap_err().to_string();
        assert!(refused(good.clone()).contains("another one"));
        let other = row("wait", Clock::Time, 100.0);
        let bad = [
            Row {
                us_per_page: 0.0,
                ..other.clone()
            },
            Row {
                pages_per_s: f64::NAN,
                ..other.clone()
            },
            Row {
                pages_per_s: 5.0,
                ..other.clone()
            },
            Row {
                p99_us: 1.0,
                ..other.clone()
            },
            Row {
                us_per_page_range: [101.0, 102.0],
                ..other.clone()
            },
            Row {
                cdf: vec![[0.5, 2.0], [0.9, 1.0]],
                ..other.clone()
            },
            Row {
                vcpus: 0,
                ..other.clone()
            },
        ];
        let damaged = memory_error_rows();
        check(&damaged).unwrap();
        let with_damage = |change: fn(&mut Damage)| {
            let mut row = damaged[2].clone();
            row.damage.iter_mut().for_each(change);
            row
        };
        let bad = bad.into_iter().chain([
            with_damage(|damage| damage.bytes_kept += 1),
            with_damage(|damage| damage.bytes_lost = u64::MAX),
            with_damage(|damage| {
                if let Some(pause) = &mut damage.pause {
                    pause.without_us_range = [220.0, 230.0];
                }
            }),
        ]);
        for bad in bad {
            let why = refused(bad.clone());
            assert!(why.contains("contradict"), "{why}: {bad:?}");
        }
        check(&[good, other]).unwrap();
    }

    #[test]
    fn rows_have_the_fields_that_are_promised() {
        let json = serde_json::to_value(row("exit", Clock::Icount, 12.0)).unwrap();
        let promised = [
            "mode",
            "backing",
            "pattern",
            "vcpus",
            "bytes",
            "clock",
            "us_per_page",
            "pages_per_s",
            "p50_us",
            "p99_us",
            "exits",
            "events",
            "readers",
            "pages_unneeded",
            "runs",
        ];
        for field in promised {
            assert!(json.get(field).is_some(), "{field}");
        }
        assert_eq!(json["clock"], "icount");
    }

    #[test]
    fn a_file_that_is_no_result_is_named() {
        let file = std::env::temp_dir().join(format!("kdp-bench-bad-{}", std::process::id()));
        fs::write(&file, "{}").unwrap();
        let error = load(&[file.clone()]).unwrap_err().to_string();
        fs::remove_file(&file).unwrap();
        assert!(error.starts_with(&file.display().to_string()), "{error}");
    }
}
