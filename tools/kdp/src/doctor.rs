//! `kdp doctor`: gathers facts about the host, judges them, and prints the result.

mod checks;
mod facts;

use crate::{
    cli::DoctorArgs,
    failure::{Context, Failure},
};
use checks::{checks, Check, Status};
use facts::Facts;
use serde::Serialize;
use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

/// The width of the table.
const COLUMNS: usize = 100;

/// Checks the host and prints the result. Returns whether demand paging works.
pub fn run(args: &DoctorArgs) -> Result<bool, Failure> {
    let checks = checks(&Facts::gather(&args.root));
    let works = count(&checks, Status::Error) == 0;
    let text = match args.json {
        true => json(works, &checks)?,
        false => table(&checks),
    };
    match io::stdout().write_all(text.as_bytes()) {
        // The reader closed the pipe early, as `head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(works),
        other => other.on("standard output").map(|()| works),
    }
}

fn count(checks: &[Check], status: Status) -> usize {
    checks.iter().filter(|check| check.status == status).count()
}

fn table(checks: &[Check]) -> String {
    let names = checks
        .iter()
        .map(|check| check.name.len())
        .max()
        .unwrap_or(0);
    let mut out = String::new();
    for check in checks {
        let status = match check.status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Error => "error",
        };
        let first = format!("{status:<7}  {:<names$}  ", check.name);
        print_wrapped(&mut out, &first, &check.found);
        if let Some(advice) = &check.advice {
            print_wrapped(&mut out, "         do: ", advice);
        }
    }
    let (errors, warnings) = (count(checks, Status::Error), count(checks, Status::Warning));
    let works = match errors {
        0 => "demand paging works here",
        _ => "demand paging does not work here",
    };
    let _ = writeln!(out, "{works} (errors: {errors}, warnings: {warnings})");
    out
}

/// Prints a text after `first`. Words that do not fit go to the next lines, indented.
fn print_wrapped(out: &mut String, first: &str, text: &str) {
    let mut line = first.to_owned();
    let mut is_empty = true;
    for word in text.split_whitespace() {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            let _ = writeln!(out, "{line}");
            line = " ".repeat(first.len());
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(word);
        is_empty = false;
    }
    let _ = writeln!(out, "{line}");
}

fn json(works: bool, checks: &[Check]) -> Result<String, Failure> {
    #[derive(Serialize)]
    struct Report<'a> {
        works: bool,
        checks: &'a [Check],
    }
    serde_json::to_string(&Report { works, checks })
        .map(|text| text + "\n")
        .map_err(io::Error::from)
        .on("report")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doctor_prints_a_table() {
        let mut facts = checks::tests::good();
        facts.device_open = facts::Open::Denied;
        facts.huge_1g = None;
        let text = table(&checks(&facts));
        let expected = "\
ok       kernel                  7.3.4+deb13-amd64
ok       config-rust             CONFIG_RUST=y in /boot/config-7.3.4+deb13-amd64
ok       module-file             version 0.9.0,
                                 /lib/modules/7.3.4+deb13-amd64/updates/dkms/kvm_demand_paging.ko.xz
ok       module                  version 0.9.0 is loaded
ok       signatures              the kernel also loads modules without a signature
error    device                  /dev/kvm-demand-paging is 0660 root:kdp; alice may not open it for
                                 reading and writing
         do: usermod -aG kdp alice, then log in again
";
        assert!(text.starts_with(expected), "{text}");
        let end = "demand paging does not work here (errors: 1, warnings: 1)\n";
        assert!(text.ends_with(end), "{text}");
        assert!(
            text.lines().all(|line| line.chars().count() <= COLUMNS),
            "{text}"
        );
    }

    #[test]
    fn doctor_says_when_all_is_well() {
        let text = table(&checks(&checks::tests::good()));
        let end = "demand paging works here (errors: 0, warnings: 0)\n";
        assert!(text.ends_with(end), "{text}");
    }
}
