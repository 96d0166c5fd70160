//! `kdp poison`, `kdp heal`, `kdp list` and `kdp replace`: pages whose bytes are lost.

use crate::{
    cli::{HealArgs, ListArgs, PoisonArgs, ReplaceArgs, VmArgs},
    failure::{Context, Failure},
    fdinfo::{scan, Kind},
};
use kvm_demand_paging::{Cause, PageRange, Poisoned, Replaced, Vm, PAGE_SIZE};
use rustix::process::{pidfd_getfd, pidfd_open, Pid, PidfdFlags, PidfdGetfdFlags};
use serde_json::json;
use std::{fs, path::Path};

pub fn poison(args: &PoisonArgs) -> Result<(), Failure> {
    let cause = if args.inherited {
        Cause::Inherited
    } else {
        Cause::Emulated
    };
    let vm = vm_of(&args.vm)?;
    let changed = match &args.list {
        Some(path) => vm.inherit_poison(args.vm.slot, &read_list(path)?)?,
        None => vm.poison(args.vm.slot, &args.pages, cause)?,
    }
    .changed;
    println!("{changed} pages poisoned");
    Ok(())
}

/// What `kdp list --json` printed.
fn read_list(path: &Path) -> Result<Vec<Poisoned>, Failure> {
    let text = fs::read_to_string(path).on(format_args!("cannot read {}", path.display()))?;
    parse(&text).ok_or_else(|| {
        Failure::Other(format!(
            "{} is no list of poisoned pages: 'kdp list --json' prints one",
            path.display()
        ))
    })
}

fn parse(text: &str) -> Option<Vec<Poisoned>> {
    let list: serde_json::Value = serde_json::from_str(text).ok()?;
    list.as_array()?
        .iter()
        .map(|run| {
            let number = |key: &str| run.get(key)?.as_u64();
            Some(Poisoned {
                range: PageRange::new(number("first")?, number("count")?),
                cause: Cause::Inherited,
            })
        })
        .collect()
}

pub fn heal(args: &HealArgs) -> Result<(), Failure> {
    let changed = vm_of(&args.vm)?.heal(args.vm.slot, &args.pages)?.changed;
    println!("{changed} pages healed");
    Ok(())
}

pub fn list(args: &ListArgs) -> Result<(), Failure> {
    let poisoned = vm_of(&args.vm)?.poisoned(args.vm.slot)?;
    if args.json {
        println!("{}", json(&poisoned));
    } else {
        print!("{}", table(&poisoned));
    }
    Ok(())
}

pub fn replace(args: &ReplaceArgs) -> Result<(), Failure> {
    let vm = vm_of(&args.vm)?;
    let slot = args.vm.slot;
    let huge = vm.memslot_info(slot)?.backing_page_size / PAGE_SIZE as u64;
    let mut firsts = if args.pages.is_empty() {
        vm.damaged(slot)?
    } else {
        args.pages.iter().map(|page| page / huge * huge).collect()
    };
    firsts.sort_unstable();
    firsts.dedup();
    let mut done = Vec::new();
    let mut failed = None;
    for first in firsts {
        match vm.replace(slot, first) {
            Ok(replaced) => done.push((first, replaced)),
            Err(e) => {
                failed = Some(e);
                break;
            }
        }
    }
    // Also if one could not be replaced: those before it were.
    if args.json {
        println!("{}", replaced_json(&done));
    } else {
        print!("{}", replaced_table(&done));
    }
    failed.map_or(Ok(()), |e| Err(e.into()))
}

fn replaced_json(done: &[(u64, Replaced)]) -> serde_json::Value {
    done.iter()
        .map(|(first, replaced)| {
            json!({
                "first": first,
                "copied": replaced.copied,
                "lost": replaced.lost,
                "healed": replaced.healed,
                "errors": replaced.errors,
            })
        })
        .collect()
}

fn replaced_table(done: &[(u64, Replaced)]) -> String {
    if done.is_empty() {
        return "no huge page was replaced\n".to_owned();
    }
    let head = ["FIRST PAGE", "COPIED", "LOST", "HEALED", "NEW ERRORS"];
    let row = |cells: [String; 5]| {
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:>12}")).collect();
        cells.join("  ") + "\n"
    };
    done.iter()
        .fold(row(head.map(str::to_owned)), |text, (first, r)| {
            text + &row([*first, r.copied, r.lost, r.healed, r.errors].map(|n| n.to_string()))
        })
}

fn name(cause: Cause) -> String {
    match cause {
        Cause::Hardware => "hardware".to_owned(),
        Cause::Emulated => "emulated".to_owned(),
        Cause::Inherited => "inherited".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn json(poisoned: &[Poisoned]) -> serde_json::Value {
    poisoned
        .iter()
        .map(|run| {
            json!({
                "first": run.range.first,
                "count": run.range.count,
                "cause": name(run.cause),
            })
        })
        .collect()
}

fn table(poisoned: &[Poisoned]) -> String {
    if poisoned.is_empty() {
        return "no poisoned pages\n".to_owned();
    }
    let mut text = format!("{:>12}  {:>12}  CAUSE\n", "FIRST PAGE", "PAGES");
    for run in poisoned {
        text += &format!(
            "{:>12}  {:>12}  {}\n",
            run.range.first,
            run.range.count,
            name(run.cause)
        );
    }
    text
}

/// The VM that a process has open: its only one, or the one of a descriptor.
fn vm_of(args: &VmArgs) -> Result<Vm, Failure> {
    let pid = args.pid;
    let scan = scan(Path::new("/proc"), Some(pid))?;
    let vms = scan.entries.iter().filter(|entry| entry.kind == Kind::Vm);
    let fds: Vec<u32> = vms.filter_map(|entry| entry.at.parse().ok()).collect();
    let fd = match (args.fd, fds.as_slice()) {
        (Some(fd), fds) if fds.contains(&fd) => fd,
        (Some(fd), _) => {
            return Err(Failure::Other(format!(
                "descriptor {fd} of process {pid} is no VM: 'kdp stat {pid}' lists those that are"
            )))
        }
        (None, &[fd]) => fd,
        (None, []) => {
            return Err(Failure::Other(format!(
                "process {pid} has no VM open: 'kdp stat' lists the processes that have"
            )))
        }
        (None, fds) => {
            return Err(Failure::Other(format!(
                "process {pid} has {} VMs open: choose one of the descriptors {fds:?} with --fd",
                fds.len()
            )))
        }
    };
    let wrong = || Failure::Other(format!("{pid} is no process"));
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(wrong)?;
    let process = pidfd_open(pid, PidfdFlags::empty())
        .on(format_args!("cannot open process {}", args.pid))?;
    let fd = pidfd_getfd(process, fd as i32, PidfdGetfdFlags::empty()).on(format_args!(
        "cannot take descriptor {fd} from process {} (it takes root, or the right to trace the process)",
        args.pid
    ))?;
    Ok(Vm::from_fd(fd)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_for_people_and_for_programs() {
        let poisoned = [
            Poisoned {
                range: PageRange::new(7, 1),
                cause: Cause::Hardware,
            },
            Poisoned {
                range: PageRange::new(512, 20),
                cause: Cause::Inherited,
            },
        ];
        assert_eq!(
            table(&poisoned),
            "  FIRST PAGE         PAGES  CAUSE\n           7             1  hardware\n         512            20  inherited\n"
        );
        assert_eq!(table(&[]), "no poisoned pages\n");
        let replaced = Replaced {
            copied: 511,
            lost: 1,
            healed: 0,
            errors: 0,
        };
        assert_eq!(
            replaced_table(&[(1024, replaced)]).lines().last(),
            Some("        1024           511             1             0             0")
        );
        assert_eq!(
            replaced_json(&[(1024, replaced)]).to_string(),
            r#"[{"copied":511,"errors":0,"first":1024,"healed":0,"lost":1}]"#
        );
        assert_eq!(
            json(&poisoned).to_string(),
            r#"[{"cause":"hardware","count":1,"first":7},{"cause":"inherited","count":20,"first":512}]"#
        );
    }

    #[test]
    fn a_list_that_was_printed_can_be_read() {
        let printed = r#"[{"cause":"hardware","count":1,"first":7},{"cause":"emulated","count":20,"first":512}]"#;
        let ranges =
            parse(printed).map(|list| list.iter().map(|run| run.range).collect::<Vec<_>>());
        assert_eq!(
            ranges,
            Some(vec![PageRange::new(7, 1), PageRange::new(512, 20)])
        );
        assert_eq!(parse("[]"), Some(vec![]));
        for wrong in [
            "",
            "{}",
            "[1]",
            r#"[{"first":7}]"#,
            r#"[{"first":-1,"count":1}]"#,
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
