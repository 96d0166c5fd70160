//! What /proc tells about memslots: the module's lines on its files in /proc/PID/fdinfo, and the
//! kernel's lines on mappings of memslots in /proc/PID/smaps.

use crate::failure::{Context, Failure};
use std::{fs, io, path::Path};

const PREFIX: &str = "kdp-";

/// The file of a mapping of a memslot on shmem, as /proc/PID/smaps names it.
const MAPPED: &str = "/kvm-demand-paging-memslot";

/// Sizes of a mapping, in KiB: the column of the table, and the fields of smaps whose sum it shows.
const SIZES: [(&str, &[&str]); 4] = [
    ("size-kib", &["Size"]),
    ("rss-kib", &["Rss"]),
    ("huge-kib", &["ShmemPmdMapped", "FilePmdMapped"]),
    ("swap-kib", &["Swap"]),
];

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Vm,
    Memslot,
    /// A mapping of a memslot on shmem.
    Mapping,
}

/// A file of the module that a process has open, or a mapping of a memslot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub kind: Kind,
    pub pid: u32,
    pub command: String,
    /// The file descriptor, or the address of the mapping, as /proc names it.
    pub at: String,
    /// Keys, without `kdp-`, and values, in the module's order.
    pub values: Vec<(String, String)>,
}

/// All entries, and how many processes could not be looked into.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scan {
    pub entries: Vec<Entry>,
    pub unreadable: usize,
}

/// Look into all processes, or into one.
pub fn scan(proc: &Path, only: Option<u32>) -> Result<Scan, Failure> {
    let mut scan = Scan::default();
    let pids = match only {
        Some(pid) => vec![pid],
        None => numbers(proc).on(proc.display())?,
    };
    for pid in pids {
        match process(proc, pid) {
            Ok(entries) => scan.entries.extend(entries),
            Err(error) if only.is_some() => {
                return Err(error).on(format_args!("cannot look into process {pid}"));
            }
            // It has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => scan.unreadable += 1,
        }
    }
    Ok(scan)
}

/// The names in a folder that are numbers, in order.
fn numbers(dir: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        if let Some(number) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn process(proc: &Path, pid: u32) -> io::Result<Vec<Entry>> {
    let dir = proc.join(pid.to_string());
    let fdinfo = dir.join("fdinfo");
    let mut entries = Vec::new();
    let command = || {
        let comm = fs::read_to_string(dir.join("comm")).unwrap_or_default();
        comm.trim_end().to_owned()
    };
    for fd in numbers(&fdinfo)? {
        // A file may be closed while we look.
        let Ok(text) = fs::read_to_string(fdinfo.join(fd.to_string())) else {
            continue;
        };
        if let Some((kind, values)) = parse(&text) {
            entries.push(Entry {
                kind,
                pid,
                command: command(),
                at: fd.to_string(),
                values,
            });
        }
    }
    // Reads smaps only if needed: the kernel walks all page tables for smaps, but not for maps.
    let maps = fs::read_to_string(dir.join("maps")).unwrap_or_default();
    if maps.contains(MAPPED) {
        // The process may end meanwhile.
        let smaps = fs::read_to_string(dir.join("smaps")).unwrap_or_default();
        entries.extend(mappings(&smaps).into_iter().map(|(at, values)| Entry {
            kind: Kind::Mapping,
            pid,
            command: command(),
            at,
            values,
        }));
    }
    Ok(entries)
}

/// The mappings of memslots in the text of smaps, each with its address and its sizes.
fn mappings(smaps: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut found: Vec<(String, [u64; SIZES.len()])> = Vec::new();
    let mut is_memslot = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else {
            continue;
        };
        let Some(field) = first.strip_suffix(':') else {
            // The heading: addresses, flags, offset, device, inode, path.
            is_memslot = line.contains(MAPPED);
            if is_memslot {
                let address = first.split('-').next().unwrap_or(first);
                found.push((format!("0x{address}"), [0; SIZES.len()]));
            }
            continue;
        };
        let (true, Some((_, sizes))) = (is_memslot, found.last_mut()) else {
            continue;
        };
        for (size, (_, fields)) in sizes.iter_mut().zip(SIZES) {
            if fields.contains(&field) {
                *size += second.parse().unwrap_or(0);
            }
        }
    }
    let named = |sizes: [u64; SIZES.len()]| {
        let pair = |((name, _), size): ((&str, _), u64)| (name.to_owned(), size.to_string());
        SIZES.into_iter().zip(sizes).map(pair).collect()
    };
    found
        .into_iter()
        .map(|(at, sizes)| (at, named(sizes)))
        .collect()
}

/// The module's lines of one fdinfo; `None` if it has none.
fn parse(text: &str) -> Option<(Kind, Vec<(String, String)>)> {
    let values: Vec<(String, String)> = text
        .lines()
        .filter_map(|line| line.strip_prefix(PREFIX)?.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect();
    let has = |key: &str| values.iter().any(|(name, _)| name == key);
    match (has("memslots"), has("slot")) {
        (true, _) => Some((Kind::Vm, values)),
        (_, true) => Some((Kind::Memslot, values)),
        _ => None,
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    const VM: &str = "pos:\t0\nflags:\t02\nkdp-memslots:\t1\nkdp-faults:\t12\n";
    const MEMSLOT: &str =
        "pos:\t0\nkdp-slot:\t0\nkdp-base-gfn:\t0x100\nkdp-name:\tram\nkdp-new-key:\ta b\n";

    const SMAPS: &str = "\
7f0000000000-7f0000400000 rw-s 00000000 00:01 12    /kvm-demand-paging-memslot (deleted)
Size:               4096 kB
Rss:                3072 kB
FilePmdMapped:         0 kB
ShmemPmdMapped:     2048 kB
Swap:                 16 kB
VmFlags: rd wr sh
7f0000400000-7f0000401000 rw-p 00000000 00:00 0
Size:                  4 kB
Rss:                   4 kB
";

    pub fn fake_proc() -> tempfile::TempDir {
        let proc = tempfile::tempdir().unwrap();
        for (pid, fd, text) in [
            (7, 3, VM),
            (7, 10, MEMSLOT),
            (7, 11, "pos:\t0\n"),
            (12, 4, MEMSLOT),
        ] {
            let dir = proc.path().join(format!("{pid}/fdinfo"));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(fd.to_string()), text).unwrap();
            fs::write(
                proc.path().join(format!("{pid}/comm")),
                format!("prog-{pid}\n"),
            )
            .unwrap();
        }
        fs::create_dir(proc.path().join("self")).unwrap();
        for name in ["maps", "smaps"] {
            fs::write(proc.path().join(format!("12/{name}")), SMAPS).unwrap();
        }
        proc
    }

    #[test]
    fn files_of_the_module_are_found() {
        let proc = fake_proc();
        let found = scan(proc.path(), None).unwrap();
        let places: Vec<_> = found
            .entries
            .iter()
            .map(|entry| (entry.pid, entry.at.as_str(), entry.kind))
            .collect();
        assert_eq!(
            places,
            [
                (7, "3", Kind::Vm),
                (7, "10", Kind::Memslot),
                (12, "4", Kind::Memslot),
                (12, "0x7f0000000000", Kind::Mapping),
            ]
        );
        assert_eq!(found.entries[0].command, "prog-7");
        assert_eq!(
            found.entries[1].values[3],
            ("new-key".to_owned(), "a b".to_owned())
        );
        assert_eq!(scan(proc.path(), Some(12)).unwrap().entries.len(), 2);
        assert!(scan(proc.path(), Some(13))
            .unwrap_err()
            .to_string()
            .contains("process 13"));
    }

    #[test]
    fn other_files_are_not() {
        assert_eq!(parse("pos:\t0\nkdp\nkdp-\nkdp-x\n"), None);
        assert_eq!(parse(""), None);
    }
}
