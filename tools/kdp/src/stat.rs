//! `kdp stat`.

use crate::{
    cli::StatArgs,
    failure::{Context, Failure},
    fdinfo::{scan, Entry, Kind, Scan},
};
use serde_json::{json, Map, Value};
use std::{fmt::Write as _, io, io::Write as _, thread, time::Duration};

pub fn run(args: &StatArgs) -> Result<(), Failure> {
    loop {
        let scan = scan(&args.proc, args.pid)?;
        let text = match args.json {
            true => format!("{}\n", json(&scan)),
            false => table(&scan),
        };
        match io::stdout().write_all(text.as_bytes()) {
            // Whoever read it has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other.on("standard output")?,
        }
        let Some(seconds) = args.watch else {
            return Ok(());
        };
        thread::sleep(Duration::from_secs(seconds));
    }
}

fn json(scan: &Scan) -> Value {
    let of = |kind| -> Vec<Value> {
        scan.entries
            .iter()
            .filter(|entry| entry.kind == kind)
            .map(entry_json)
            .collect()
    };
    json!({
        "vms": of(Kind::Vm),
        "memslots": of(Kind::Memslot),
        "mappings": of(Kind::Mapping),
        "unreadable_processes": scan.unreadable,
    })
}

fn entry_json(entry: &Entry) -> Value {
    let number = |text: &str| match text.parse::<u64>() {
        Ok(number) => Value::from(number),
        Err(_) => Value::from(text),
    };
    let values: Map<String, Value> = entry
        .values
        .iter()
        .map(|(key, value)| (key.clone(), number(value)))
        .collect();
    let place = match entry.kind {
        Kind::Vm | Kind::Memslot => "fd",
        Kind::Mapping => "address",
    };
    json!({ "pid": entry.pid, "command": entry.command, place: number(&entry.at), "values": values })
}

fn table(scan: &Scan) -> String {
    let mut out = String::new();
    for (title, kind, place) in [
        ("VMs", Kind::Vm, "fd"),
        ("memslots", Kind::Memslot, "fd"),
        ("mappings", Kind::Mapping, "address"),
    ] {
        let entries: Vec<&Entry> = scan
            .entries
            .iter()
            .filter(|entry| entry.kind == kind)
            .collect();
        if entries.is_empty() {
            let _ = writeln!(out, "no {title}");
        } else {
            let _ = writeln!(out, "{title}");
            rows(&entries, place).iter().for_each(|row| {
                let _ = writeln!(out, "  {row}");
            });
        }
    }
    if scan.unreadable > 0 {
        let _ = writeln!(
            out,
            "{} processes could not be looked into: run it as root",
            scan.unreadable
        );
    }
    out
}

/// A heading and one row for each entry, in columns. A key that an entry lacks is shown as '-'.
fn rows(entries: &[&Entry], place: &str) -> Vec<String> {
    let mut keys: Vec<&str> = Vec::new();
    for (key, _) in entries.iter().flat_map(|entry| &entry.values) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    let mut cells: Vec<Vec<String>> = vec![["pid", "command", place]
        .iter()
        .chain(&keys)
        .map(|heading| heading.to_uppercase())
        .collect()];
    for entry in entries {
        let value = |key: &&str| {
            let found = entry.values.iter().find(|(name, _)| name == key);
            found
                .map(|(_, value)| value.clone())
                .filter(|value| !value.is_empty())
                .unwrap_or_else(|| "-".to_owned())
        };
        let fixed = [
            entry.pid.to_string(),
            entry.command.clone(),
            entry.at.clone(),
        ];
        cells.push(fixed.into_iter().chain(keys.iter().map(value)).collect());
    }
    let width = |column: usize| {
        cells
            .iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..keys.len() + 3).map(width).collect();
    cells
        .iter()
        .map(|row| {
            let padded: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            padded.join("  ").trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fdinfo::tests::fake_proc;

    #[test]
    fn a_table() {
        let proc = fake_proc();
        let text = table(&scan(proc.path(), None).unwrap());
        let expected = "\
VMs
  PID  COMMAND  FD  MEMSLOTS  FAULTS
  7    prog-7   3   1         12
memslots
  PID  COMMAND  FD  SLOT  BASE-GFN  NAME  NEW-KEY
  7    prog-7   10  0     0x100     ram   a b
  12   prog-12  4   0     0x100     ram   a b
mappings
  PID  COMMAND  ADDRESS         SIZE-KIB  RSS-KIB  HUGE-KIB  SWAP-KIB
  12   prog-12  0x7f0000000000  4096      3072     2048      16
";
        assert_eq!(text, expected);
        assert_eq!(
            table(&Scan::default()),
            "no VMs\nno memslots\nno mappings\n"
        );
    }

    #[test]
    fn json_has_numbers_where_there_are_numbers() {
        let proc = fake_proc();
        let value = json(&scan(proc.path(), None).unwrap());
        assert_eq!(value["vms"][0]["values"]["faults"], 12);
        assert_eq!(value["memslots"][0]["values"]["base-gfn"], "0x100");
        assert_eq!(value["memslots"].as_array().unwrap().len(), 2);
        assert_eq!(value["mappings"][0]["address"], "0x7f0000000000");
        assert_eq!(value["mappings"][0]["values"]["huge-kib"], 2048);
    }
}
