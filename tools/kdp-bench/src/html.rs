//! The page: tables and plots of the rows, with nothing that is not in it. It is well-formed as XML, too.

use crate::figures::{figures, scope, Figure, Key, Verdict};
use crate::link::Link;
use crate::machine::Machine;
use crate::memory_error::{errors, replacements, ERRORS, ERRORS_HEAD, REPLACE, REPLACE_HEAD};
use crate::plot::{self, escape, Alt, Axis, Bar, Scale, Series};
use crate::report::{bound, measured};
use crate::row::{Clock, Row};
use crate::table::{number, thousands};
use crate::Error;

const STYLE: &str = "
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; } h3 { margin-top: 1.5rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d0d0d0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; }
.wide { overflow-x: auto; } .wide table { font-size: .75rem; }
.aim, .ok { color: #005a3c; font-weight: 600; } .missed { color: #a02c00; font-weight: 700; } .none { color: #595959; }
.small { font-size: .85rem; color: #444; }
figure { margin: 1rem 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } .wide table { font-size: 6pt; } h2, h3 { break-after: avoid; } }
";

/// The whole page.
pub fn page(rows: &[Row]) -> Result<String, Error> {
    let body = [
        head(rows),
        required(rows),
        how_to_read(),
        modes(rows)?,
        vcpus(rows)?,
        latencies(rows)?,
        sizes(rows)?,
        links(rows),
        complete(rows),
        memory_errors(rows),
        kernel_test(rows),
        all_rows(rows),
    ]
    .concat();
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>kvm-demand-paging: what a page fault costs</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         {body}</body>\n</html>\n"
    ))
}

fn clock_text(clock: Clock) -> &'static str {
    match clock {
        Clock::Time => "time",
        Clock::Icount => "instructions",
    }
}

fn head(rows: &[Row]) -> String {
    let mut machines: Vec<(Clock, &Machine)> = Vec::new();
    for row in rows {
        if let Some(machine) = &row.machine {
            if !machines.contains(&(row.clock, machine)) {
                machines.push((row.clock, machine));
            }
        }
    }
    let cells: Vec<Vec<String>> = machines
        .iter()
        .map(|(clock, machine)| {
            vec![
                clock_text(*clock).to_owned(),
                machine.cpu.clone(),
                machine.cpus.to_string(),
                thousands(machine.memory_mib as i64),
                format!("{} ({})", machine.kernel, machine.kernel_kind),
            ]
        })
        .collect();
    let table = match cells.as_slice() {
        [] => "<p>The rows do not say on which machine they were measured.</p>\n".to_owned(),
        _ => html_table(
            "Measured on",
            &["clock", "CPU", "CPUs", "memory, MiB", "kernel"],
            &[2, 3],
            &cells,
        ),
    };
    format!(
        "<h1>kvm-demand-paging: what a page fault costs</h1>\n\
         <p>A small guest visits pages of its memory, each for the first time; every way to page them in does the \
         same work. Everything on this page is computed from the rows of <code>latest.json</code>.</p>\n{table}\
         <p>Where the CPU is emulated (QEMU TCG), times are tens of times longer than on a real one: only ratios \
         within one run mean something. The clock <em>instructions</em> counts what the emulator executes, on one \
         CPU, and repeats to a fraction of a percent.</p>\n"
    )
}

fn required(rows: &[Row]) -> String {
    let figures = figures(rows);
    let cell = |figure: &Figure| {
        let verdict = figure.verdict();
        let class = match verdict {
            Verdict::Aim => "aim",
            Verdict::Ok => "ok",
            Verdict::Missed => "missed",
            Verdict::NotMeasured => "none",
        };
        format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
             <td class=\"n\">{}</td><td class=\"{class}\">{}</td><td class=\"small\">{}</td></tr>\n",
            escape(figure.name),
            escape(figure.first.backing),
            clock_text(figure.first.clock),
            escape(&bound(figure, figure.must)),
            escape(&bound(figure, figure.aim)),
            measured(figure).unwrap_or_else(|| "–".to_owned()),
            verdict.text(),
            escape(&figure.formula())
        )
    };
    let body: String = figures.iter().map(cell).collect();
    let counted = |verdict| figures.iter().filter(|f| f.verdict() == verdict).count();
    format!(
        "<h2>The required figures</h2>\n<p>{}</p>\n<p>{} of {} reach their aim, {} more are what they must be, {} are missed, \
         {} are not measured.</p>\n<table>\n<caption>Ratios within one run; medians</caption>\n\
         <thead><tr><th scope=\"col\">figure</th><th scope=\"col\">backing</th><th scope=\"col\">clock</th>\
         <th scope=\"col\" class=\"n\">must</th><th scope=\"col\" class=\"n\">aim</th>\
         <th scope=\"col\" class=\"n\">measured</th><th scope=\"col\">verdict</th>\
         <th scope=\"col\">computed as</th></tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n",
        escape(&scope(rows)),
        counted(Verdict::Aim),
        figures.len(),
        counted(Verdict::Ok),
        counted(Verdict::Missed),
        counted(Verdict::NotMeasured)
    )
}

fn how_to_read() -> String {
    "<h2>The modes</h2>\n<table>\n<caption>What pages memory in</caption>\n<tbody>\n\
     <tr><th scope=\"row\">floor</th><td>nobody: everything is there; what is left is that KVM maps 4 KiB</td></tr>\n\
     <tr><th scope=\"row\">limit</th><td>floor, one return from KVM_RUN to the VMM, one copy of 4 KiB, each measured \
     alone: any design that exits once a page costs that</td></tr>\n\
     <tr><th scope=\"row\">exit</th><td>this module: KVM_RUN returns, the vCPU's thread gets the page</td></tr>\n\
     <tr><th scope=\"row\">exit-prefetch</th><td>the same; a guest that goes on in order gets pages ahead</td></tr>\n\
     <tr><th scope=\"row\">wait</th><td>this module: the vCPU sleeps, a handler thread gets the page</td></tr>\n\
     <tr><th scope=\"row\">source</th><td>this module reads the page from a file, in the fault</td></tr>\n\
     <tr><th scope=\"row\">uffd-missing, uffd-minor</th><td>userfaultfd with UFFDIO_COPY, with UFFDIO_CONTINUE: on \
     hugetlb one fault brings a whole huge page. With several readers each has a userfaultfd of its own</td></tr>\n\
     </tbody>\n</table>\n"
        .to_owned()
}

/// What a microsecond of this clock is for people.
fn cost(clock: Clock, us: f64) -> String {
    match clock {
        Clock::Time => format!("{} µs", number(us)),
        Clock::Icount => format!("{} instructions", thousands((us * 1e3).round() as i64)),
    }
}

fn figure(caption: &str, svg: &str) -> String {
    format!(
        "<figure>\n<figcaption>{}</figcaption>\n{svg}</figure>\n",
        escape(caption)
    )
}

/// The name of a row's mode, and how many readers it had if that is not as usual.
fn label(row: &Row) -> String {
    match row.readers {
        0 | 1 => row.mode.clone(),
        readers => format!("{}, {readers} readers", row.mode),
    }
}

/// Different values in the order in which they come first.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut all = Vec::new();
    for value in values {
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

/// Rows of guests that page their memory in: one for each mode there is, of the smallest memory.
fn base<'r>(
    rows: &'r [Row],
    backing: &str,
    pattern: &str,
    vcpus: u64,
    clock: Clock,
) -> Vec<&'r Row> {
    let mut modes = distinct(rows.iter().filter(|row| is_mode(row)).map(|row| &row.mode));
    modes.sort_by_key(|mode| style(mode));
    let found = modes.iter().filter_map(|mode| {
        Key {
            vcpus,
            ..Key::new(mode, backing, pattern, clock)
        }
        .find(rows)
    });
    found.collect()
}

/// The modes in the order in which they are shown. Each has its colour, in every plot; what is not here comes last.
const ORDER: [&str; 8] = [
    "floor",
    "limit",
    "exit",
    "exit-prefetch",
    "wait",
    "source",
    "uffd-missing",
    "uffd-minor",
];

fn style(mode: &str) -> usize {
    let place = ORDER.iter().position(|&known| known == mode);
    place.unwrap_or(ORDER.len())
}

/// Is it a guest's first visit, by one of the modes?
fn is_mode(row: &Row) -> bool {
    let other = ["setup", "loop-plain", "loop-device"].contains(&row.mode.as_str());
    !other
        && row.damage.is_none()
        && !row.mode.ends_with("-module")
        && !row.mode.starts_with("kernel-")
}

fn modes(rows: &[Row]) -> Result<String, Error> {
    let mut out = "<h2>What a page costs in each mode</h2>\n\
        <p>One vCPU; medians. Behind each bar: the cost of a page that the guest visits, and its ratio to the \
        floor.</p>\n"
        .to_owned();
    let guests = || {
        rows.iter()
            .filter(|row| is_mode(row) && row.link_gbit.is_none())
    };
    for clock in [Clock::Icount, Clock::Time] {
        for backing in distinct(guests().map(|row| &row.backing)) {
            for pattern in distinct(guests().map(|row| &row.pattern)) {
                let found = base(rows, backing, pattern, 1, clock);
                let Some(floor) = found.iter().find(|row| row.mode == "floor") else {
                    continue;
                };
                let bars: Vec<Bar> = found
                    .iter()
                    .map(|row| {
                        let ratio = row.us_per_page / floor.us_per_page;
                        let fault = match row.fault_bytes {
                            4096 => String::new(),
                            bytes => format!(", {} KiB a fault", thousands((bytes >> 10) as i64)),
                        };
                        Bar {
                            style: style(&row.mode),
                            label: row.mode.clone(),
                            value: row.us_per_page,
                            text: format!(
                                "{} ({} × floor{fault})",
                                cost(clock, row.us_per_page),
                                number(ratio)
                            ),
                        }
                    })
                    .collect();
                let most = bars.iter().map(|bar| bar.value).fold(0.0, f64::max);
                let least = bars
                    .iter()
                    .map(|bar| bar.value)
                    .fold(f64::INFINITY, f64::min);
                let (scale, note) = match most / least {
                    ratio if ratio > 40.0 => (Scale::Log10, "; logarithmic scale"),
                    _ => (Scale::Linear, ""),
                };
                let title = format!(
                    "{backing}, {pattern}, in {}{note}",
                    match clock {
                        Clock::Time => "microseconds a page",
                        Clock::Icount => "instructions a page",
                    }
                );
                let text: Vec<String> = bars
                    .iter()
                    .map(|bar| format!("{}: {}", bar.label, bar.text))
                    .collect();
                let alt = Alt {
                    id: format!("modes-{backing}-{pattern}-{}", clock.name()),
                    title: title.clone(),
                    text: text.join("; "),
                };
                out += &figure(&title, &plot::bars(&alt, &bars, scale)?);
            }
        }
    }
    Ok(out)
}

fn alt_of(id: String, title: &str, all: &[Series], x: &Axis, y: &Axis) -> Alt {
    let series: Vec<String> = all
        .iter()
        .map(|series| {
            let points: Vec<String> = series
                .points
                .iter()
                .map(|&(a, b)| format!("{} at {}", (y.label)(b), (x.label)(a)))
                .collect();
            format!("{}: {}", series.label, points.join(", "))
        })
        .collect();
    Alt {
        id,
        title: title.to_owned(),
        text: format!("{} by {}. {}", y.text, x.text, series.join("; ")),
    }
}

fn vcpus(rows: &[Row]) -> Result<String, Error> {
    let mut out = String::new();
    let x = Axis {
        text: "vCPUs",
        scale: Scale::Log2,
        label: number_of_vcpus,
    };
    let y = Axis {
        text: "pages/s, all vCPUs together",
        scale: Scale::Linear,
        label: number,
    };
    let several = |row: &&Row| is_mode(row) && row.clock == Clock::Time && row.vcpus > 1;
    for backing in distinct(rows.iter().filter(several).map(|row| &row.backing)) {
        let here = || {
            rows.iter()
                .filter(several)
                .filter(|row| row.backing == *backing)
        };
        let counts = {
            let mut counts = distinct(here().map(|row| row.vcpus));
            counts.push(1);
            counts.sort_unstable();
            counts
        };
        let mut all = Vec::new();
        for mode in distinct(here().map(|row| &row.mode)) {
            // With one reader, or as many as the mode has; and with one for each vCPU.
            for each in [false, true] {
                let point = |&vcpus: &u64| {
                    let readers = each.then_some(vcpus);
                    let key = Key {
                        vcpus,
                        readers,
                        ..Key::new(mode, backing, "random", Clock::Time)
                    };
                    Some((vcpus as f64, key.find(rows)?.pages_per_s))
                };
                let points: Vec<(f64, f64)> = counts.iter().filter_map(point).collect();
                let label = match each {
                    false => mode.clone(),
                    true => format!("{mode}, reader a vCPU"),
                };
                if points.len() > 1 {
                    let style = style(mode) + if each { ORDER.len() } else { 0 };
                    all.push(Series {
                        style,
                        label,
                        points,
                    });
                }
            }
        }
        if !all.is_empty() {
            let title = format!("Throughput against vCPUs, {backing}, random");
            let alt = alt_of(format!("vcpus-{backing}"), &title, &all, &x, &y);
            out += &figure(&title, &plot::lines(&alt, &x, &y, &all)?);
        }
    }
    Ok(match out.as_str() {
        "" => "<h2>Throughput against vCPUs</h2>\n<p>Not measured.</p>\n".to_owned(),
        _ => format!(
            "<h2>Throughput against vCPUs</h2>\n<p>Each vCPU visits its own part of the memory. vCPUs beyond the \
             machine's CPUs share them. On hugetlb a page of userfaultfd is a whole huge page, of which the guest \
             needs one word.</p>\n{out}"
        ),
    })
}

fn number_of_vcpus(value: f64) -> String {
    format!("{value:.0}")
}

fn latencies(rows: &[Row]) -> Result<String, Error> {
    let mut out = String::new();
    let x = Axis {
        text: "microseconds",
        scale: Scale::Log10,
        label: number,
    };
    let y = Axis {
        text: "part of all accesses",
        scale: Scale::Linear,
        label: |part| format!("{:.0} %", part * 100.0),
    };
    let guests = || {
        rows.iter()
            .filter(|row| is_mode(row) && row.link_gbit.is_none())
    };
    for backing in distinct(guests().map(|row| &row.backing)) {
        for pattern in distinct(guests().map(|row| &row.pattern)) {
            let found = base(rows, backing, pattern, 1, Clock::Time);
            let all: Vec<Series> = found
                .iter()
                .filter(|row| !row.cdf.is_empty())
                .map(|row| Series {
                    style: style(&row.mode),
                    label: label(row),
                    // A logarithm has no zero.
                    points: row
                        .cdf
                        .iter()
                        .map(|&[part, us]| (us.max(0.1), part))
                        .collect(),
                })
                .collect();
            if all.is_empty() {
                continue;
            }
            let title = format!("Latency of a first access, {backing}, {pattern}, 1 vCPU");
            let alt = Alt {
                id: format!("latency-{backing}-{pattern}"),
                title: title.clone(),
                text: found
                    .iter()
                    .map(|row| {
                        format!(
                            "{}: p50 {} µs, p99 {} µs",
                            label(row),
                            number(row.p50_us),
                            number(row.p99_us)
                        )
                    })
                    .collect::<Vec<_>>()
                    .join("; "),
            };
            out += &figure(&title, &plot::lines(&alt, &x, &y, &all)?);
        }
    }
    Ok(match out.as_str() {
        "" => "<h2>Latencies</h2>\n<p>Not measured.</p>\n".to_owned(),
        _ => format!(
            "<h2>Latencies</h2>\n<p>What single accesses took, by the guest's own clock: the part of them that took \
             at most so long. Each point is the median of its quantile over the runs.</p>\n{out}"
        ),
    })
}

fn sizes(rows: &[Row]) -> Result<String, Error> {
    let guests = || {
        rows.iter()
            .filter(|row| is_mode(row) && row.bytes >= 64 << 20 && row.link_gbit.is_none())
    };
    let is_sized = |row: &&Row| row.backing == "shmem" && row.vcpus == 1;
    let mut out = String::new();
    for clock in [Clock::Time, Clock::Icount] {
        let here = || {
            guests()
                .filter(is_sized)
                .filter(move |row| row.clock == clock)
        };
        let sizes = {
            let mut sizes = distinct(here().map(|row| row.bytes));
            sizes.sort_unstable();
            sizes
        };
        let (Some(&least), Some(&most)) = (sizes.first(), sizes.last()) else {
            continue;
        };
        let cells: Vec<Vec<String>> = distinct(here().map(|row| &row.mode))
            .into_iter()
            .map(|mode| {
                let us = |bytes: u64| {
                    let key = Key::new(mode, "shmem", "random", clock);
                    let key = Key {
                        bytes: Some(bytes),
                        ..key
                    };
                    key.find(rows).map(|row| row.us_per_page)
                };
                let each = sizes
                    .iter()
                    .map(|&bytes| us(bytes).map_or("–".to_owned(), |us| cost(clock, us)));
                let ratio = us(most)
                    .zip(us(least))
                    .map(|(most, least)| number(most / least));
                let mut cells = vec![mode.clone()];
                cells.extend(each);
                cells.push(ratio.unwrap_or_else(|| "–".to_owned()));
                cells
            })
            .collect();
        let names: Vec<String> = sizes
            .iter()
            .map(|bytes| format!("{} MiB", thousands((bytes >> 20) as i64)))
            .collect();
        let mut head = vec!["mode"];
        head.extend(names.iter().map(String::as_str));
        head.push("largest over smallest");
        let right: Vec<usize> = (1..head.len()).collect();
        let caption = format!(
            "What a page costs in memslots of these sizes, shmem, random, {}",
            clock_text(clock)
        );
        out += &html_table(&caption, &head, &right, &cells);
    }
    Ok(match out.as_str() {
        "" => "<h2>Size of the memslot</h2>\n<p>Not measured.</p>\n".to_owned(),
        _ => format!(
            "<h2>Size of the memslot</h2>\n<p>The guest visits the same number of pages in each, in whole blocks of \
             2 MiB that are spread over the memslot: so all need as many page tables, and what is left is what the \
             size costs.</p>\n{out}"
        ),
    })
}

fn links(rows: &[Row]) -> String {
    let linked = || rows.iter().filter(|row| row.link_gbit.is_some());
    let mut cells = Vec::new();
    for backing in distinct(linked().map(|row| &row.backing)) {
        for gbit in distinct(linked().filter_map(|row| row.link_gbit)) {
            let of = |mode| {
                let key = Key::new(mode, backing, "random", Clock::Time);
                Key {
                    link_gbit: Some(gbit),
                    ..key
                }
                .find(rows)
            };
            let (Some(ours), Some(theirs)) = (of("exit"), of("uffd-missing")) else {
                continue;
            };
            let pure = |row: &Row| number(Link::us(row.fault_bytes, gbit));
            cells.push(vec![
                backing.clone(),
                gbit.to_string(),
                number(ours.p50_us),
                pure(ours),
                number(theirs.p50_us),
                pure(theirs),
                number(theirs.p50_us / ours.p50_us),
            ]);
        }
    }
    if cells.is_empty() {
        return "<h2>Time to the first useful byte</h2>\n<p>Not measured.</p>\n".to_owned();
    }
    let head = [
        "backing",
        "link, Gbit/s",
        "exit, 4 KiB: µs",
        "of it the link",
        "userfaultfd, whole page: µs",
        "of it the link",
        "userfaultfd over exit",
    ];
    format!(
        "<h2>Time to the first useful byte</h2>\n<p>A guest reads a word of a huge page whose contents come over a \
         link: by 4 KiB with exits, as a whole by userfaultfd (UFFDIO_COPY). The link is simulated in the handler: \
         each fetch waits for its bits at the link's rate, in pieces of 64 KiB that are copied as they come, with no \
         latency and no protocol. \"Of it the link\" is what those bits take alone. On an emulated CPU the rest of \
         both, copying above all, is far slower than on a real one.</p>\n{}",
        html_table("Median of first accesses", &head, &[1, 2, 3, 4, 5, 6], &cells)
    )
}

fn complete(rows: &[Row]) -> String {
    let mut cells = Vec::new();
    for row in rows.iter().filter(|row| row.mode == "loop-device") {
        let key = Key::new("loop-plain", &row.backing, &row.pattern, row.clock);
        let Some(plain) = key.find(rows) else {
            continue;
        };
        cells.push(vec![
            row.backing.clone(),
            clock_text(row.clock).to_owned(),
            cost(row.clock, row.us_per_page),
            cost(row.clock, plain.us_per_page),
            number(row.us_per_page / plain.us_per_page),
        ]);
    }
    if cells.is_empty() {
        return "<h2>After completion</h2>\n<p>Not measured.</p>\n".to_owned();
    }
    let head = [
        "backing",
        "clock",
        "device, a page",
        "plain memfd, a page",
        "device over plain",
    ];
    format!(
        "<h2>After completion</h2>\n<p>The guest has paged in all of its memory and visits it again and again, a \
         word in each page, in the same random order; beside it a guest on a plain memfd of the same backing.</p>\n{}",
        html_table("Median round over complete memory", &head, &[2, 3, 4], &cells)
    )
}

fn memory_errors(rows: &[Row]) -> String {
    let errors: Vec<Vec<String>> = errors(rows).map(Vec::from).collect();
    let replacements: Vec<Vec<String>> = replacements(rows).map(Vec::from).collect();
    let tables = [
        ("An error in one page", ERRORS, &ERRORS_HEAD[..], errors),
        (
            "A fresh huge page in the place of a bad one",
            REPLACE,
            &REPLACE_HEAD,
            replacements,
        ),
    ];
    let mut out = "<h2>Memory errors</h2>\n".to_owned();
    for (caption, text, head, cells) in tables {
        if !cells.is_empty() {
            let right: Vec<usize> = (1..head.len()).collect();
            out += &format!(
                "<p>{}</p>\n{}",
                escape(text),
                html_table(caption, head, &right, &cells)
            );
        }
    }
    match out.contains("<table>") {
        true => out,
        false => out + "<p>Not measured.</p>\n",
    }
}

fn kernel_test(rows: &[Row]) -> String {
    let mut cells = Vec::new();
    let name = "kernel-demand-paging-test-";
    for row in rows.iter().filter(|row| row.mode.starts_with(name)) {
        let ours = format!("uffd-{}", row.mode.trim_start_matches(name));
        // Several vCPUs of ours were measured in random order only, which userfaultfd does not mind.
        let ours = ["sequential", "random"].iter().find_map(|&pattern| {
            Key {
                vcpus: row.vcpus,
                readers: Some(row.readers),
                ..Key::new(&ours, &row.backing, pattern, row.clock)
            }
            .find(rows)
        });
        cells.push(vec![
            row.mode.clone(),
            clock_text(row.clock).to_owned(),
            row.vcpus.to_string(),
            cost(row.clock, row.us_per_page),
            ours.map_or("–".to_owned(), |ours| {
                format!("{} ({})", cost(ours.clock, ours.us_per_page), ours.pattern)
            }),
            ours.map_or("–".to_owned(), |ours| {
                number(row.us_per_page / ours.us_per_page)
            }),
        ]);
    }
    if cells.is_empty() {
        return "<h2>The kernel's own demand_paging_test</h2>\n<p>Not measured.</p>\n".to_owned();
    }
    let head = [
        "test",
        "clock",
        "vCPUs",
        "a page",
        "ours, a page",
        "test over ours",
    ];
    format!(
        "<h2>The kernel's own demand_paging_test</h2>\n<p>The program with which the kernel tree measures \
         userfaultfd under KVM, built from its source without a change and run beside ours: a check of the figures \
         of userfaultfd here. Its guest writes to the pages in order; its handler copies the same page each time, \
         and with UFFDIO_CONTINUE none at all; its clock runs while its threads are made; each vCPU has a \
         userfaultfd with one reader.</p>\n{}",
        html_table("Beside our figures of userfaultfd, shmem", &head, &[2, 3, 4, 5], &cells)
    )
}

fn all_rows(rows: &[Row]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let scale = match row.clock {
                Clock::Time => 1.0,
                Clock::Icount => 1e3,
            };
            vec![
                row.mode.clone(),
                row.backing.clone(),
                row.pattern.clone(),
                clock_text(row.clock).to_owned(),
                row.vcpus.to_string(),
                row.readers.to_string(),
                row.link_gbit.map_or(String::new(), |gbit| gbit.to_string()),
                thousands((row.bytes >> 20) as i64),
                thousands(row.pages as i64),
                thousands((row.fault_bytes >> 10) as i64),
                number(row.us_per_page * scale),
                format!(
                    "{}–{}",
                    number(row.us_per_page_range[0] * scale),
                    number(row.us_per_page_range[1] * scale)
                ),
                row.runs.to_string(),
                number(row.pages_per_s),
                number(row.p50_us * scale),
                number(row.p99_us * scale),
                thousands(row.exits as i64),
                thousands(row.events as i64),
                thousands(row.pages_unneeded as i64),
            ]
        })
        .collect();
    let head = [
        "mode",
        "backing",
        "pattern",
        "clock",
        "vCPUs",
        "readers",
        "Gbit/s",
        "memory, MiB",
        "pages visited",
        "a fault, KiB",
        "cost of a page",
        "of the runs",
        "runs",
        "pages/s",
        "p50",
        "p99",
        "exits",
        "events",
        "pages unneeded",
    ];
    let right: Vec<usize> = (4..head.len()).collect();
    format!(
        "<h2>All rows</h2>\n<p>Costs and latencies are microseconds where the clock is time, and instructions where \
         it counts instructions. Unneeded pages were fetched and not visited.</p>\n<div class=\"wide\">\n{}</div>\n",
        html_table("Every row of latest.json", &head, &right, &cells)
    )
}

/// A table; the columns in `right` hold numbers.
fn html_table(caption: &str, head: &[&str], right: &[usize], rows: &[Vec<String>]) -> String {
    let class = |column| {
        if right.contains(&column) {
            " class=\"n\""
        } else {
            ""
        }
    };
    let line = |cells: &[String], tag: &str, scope: &str| {
        let cells = cells.iter().enumerate();
        let cells: Vec<String> = cells
            .map(|(n, cell)| format!("<{tag}{scope}{}>{}</{tag}>", class(n), escape(cell)))
            .collect();
        format!("<tr>{}</tr>\n", cells.concat())
    };
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let body: String = rows.iter().map(|row| line(row, "td", "")).collect();
    format!(
        "<table>\n<caption>{}</caption>\n<thead>\n{}</thead>\n<tbody>\n{body}</tbody>\n</table>\n",
        escape(caption),
        line(&head, "th", " scope=\"col\"")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::{memory_error_rows, row};

    /// Rows of every kind.
    fn rows() -> Vec<Row> {
        let mut rows = Vec::new();
        let modes = [
            "floor",
            "limit",
            "exit",
            "exit-prefetch",
            "wait",
            "uffd-missing",
            "uffd-minor",
        ];
        for clock in [Clock::Time, Clock::Icount] {
            for backing in ["shmem", "hugetlb-2M"] {
                for pattern in ["random", "sequential"] {
                    for (n, mode) in modes.iter().enumerate() {
                        rows.push(Row {
                            backing: backing.into(),
                            pattern: pattern.into(),
                            readers: mode.starts_with("uffd").into(),
                            cdf: vec![[0.0, 0.0], [0.5, 40.0], [1.0, 900.0]],
                            machine: Some(Machine {
                                kernel: "7.3.4".into(),
                                kernel_kind: "stock".into(),
                                cpu: "a <CPU> & \"more\"".into(),
                                cpus: 2,
                                memory_mib: 4000,
                            }),
                            ..row(mode, clock, 40.0 + 30.0 * n as f64)
                        });
                    }
                }
            }
            for mode in ["loop-device", "loop-plain"] {
                let backing = "hugetlb-2M".into();
                rows.push(Row {
                    backing,
                    ..row(mode, clock, 0.5)
                });
            }
            for (bytes, us) in [(64 << 20, 100.0), (8 << 30, 101.0)] {
                rows.push(Row {
                    bytes,
                    ..row("exit", clock, us)
                });
            }
        }
        for vcpus in [2, 8] {
            rows.push(Row {
                vcpus,
                ..row("exit", Clock::Time, 60.0)
            });
            for readers in [1, vcpus] {
                rows.push(Row {
                    vcpus,
                    readers,
                    ..row("uffd-missing", Clock::Time, 240.0)
                });
            }
        }
        for (mode, fault_bytes, us) in [("exit", 4096, 100.0), ("uffd-missing", 2 << 20, 30_000.0)]
        {
            rows.push(Row {
                backing: "hugetlb-2M".into(),
                link_gbit: Some(10),
                fault_bytes,
                ..row(mode, Clock::Time, us)
            });
        }
        rows.push(Row {
            pattern: "sequential".into(),
            readers: 1,
            ..row("kernel-demand-paging-test-missing", Clock::Time, 380.0)
        });
        rows.extend(memory_error_rows());
        rows
    }

    fn parsed(page: &str) -> roxmltree::Document<'_> {
        let options = roxmltree::ParsingOptions {
            allow_dtd: true,
            ..Default::default()
        };
        roxmltree::Document::parse_with_options(page, options).unwrap()
    }

    #[test]
    fn the_page_is_well_formed_and_needs_nothing_from_elsewhere() {
        for rows in [rows(), Vec::new()] {
            let page = page(&rows).unwrap();
            for part in [
                "http", "url(", "@import", "<script", "<link", "src=", "href=", "NaN", "inf",
            ] {
                let at = page.find(part);
                assert_eq!(
                    at.map(|at| &page[at..page.len().min(at + 60)]),
                    None,
                    "{part}"
                );
            }
            parsed(&page);
        }
    }

    #[test]
    fn every_plot_says_what_it_shows_and_no_id_stands_twice() {
        let page = page(&rows()).unwrap();
        let document = parsed(&page);
        let plots = document
            .descendants()
            .filter(|node| node.has_tag_name("svg"));
        let mut count = 0;
        for plot in plots {
            count += 1;
            assert_eq!(plot.attribute("role"), Some("img"));
            for id in plot.attribute("aria-labelledby").unwrap().split(' ') {
                let text = plot
                    .children()
                    .find(|node| node.attribute("id") == Some(id));
                assert!(!text.unwrap().text().unwrap().is_empty(), "{id}");
            }
        }
        // Bars for two clocks, two backings and two patterns; throughput of one backing; latencies.
        assert_eq!(count, 8 + 1 + 4);
        let ids: Vec<&str> = document
            .descendants()
            .filter_map(|node| node.attribute("id"))
            .collect();
        assert_eq!(distinct(ids.iter()).len(), ids.len());
    }

    fn figure_cells(page: &str, name: &str, backing: &str) -> Vec<String> {
        let document = parsed(page);
        let lines = document
            .descendants()
            .filter(|node| node.has_tag_name("tr"));
        let cells = lines.map(|line| {
            let cells = line.children().filter(|node| node.is_element());
            cells
                .map(|cell| cell.text().unwrap_or("").to_owned())
                .collect::<Vec<_>>()
        });
        let mut found =
            cells.filter(|cells| cells.first().is_some_and(|c| c == name) && cells[1] == backing);
        found
            .next()
            .unwrap_or_else(|| panic!("no figure '{name}' on {backing}"))
    }

    #[test]
    fn ratios_are_those_of_the_rows() {
        let mut rows = rows();
        let cells = |rows: &[Row]| {
            let page = page(rows).unwrap();
            figure_cells(&page, "exits over userfaultfd", "shmem")[5..7].to_vec()
        };
        // 40 + 30 * 5 over 40 + 30 * 2.
        assert_eq!(cells(&rows), ["1.90", "MISSED"]);
        let ours = rows.iter_mut().find(|row| row.mode == "exit").unwrap();
        ours.pages_per_s *= 2.0;
        assert_eq!(cells(&rows), ["3.80", "ok, aim reached"]);
        rows.retain(|row| row.mode != "uffd-missing");
        assert_eq!(cells(&rows), ["–", "not measured"]);
    }

    #[test]
    fn memory_errors_are_there_if_they_were_measured() {
        let all = rows();
        let with = page(&all).unwrap();
        let cells = |name: &str| figure_cells(&with, "hugetlb-2M", name);
        assert_eq!(cells("2,097,152")[2..4], ["4,096", "2,093,056"]);
        assert_eq!(cells("5,110")[5..7], ["300", "250–900"]);
        let without: Vec<Row> = all.into_iter().filter(|row| row.damage.is_none()).collect();
        let without = page(&without).unwrap();
        assert!(without.contains("<h2>Memory errors</h2>\n<p>Not measured.</p>"));
    }

    #[test]
    fn the_machine_is_named() {
        let page = page(&rows()).unwrap();
        assert!(
            page.contains("7.3.4 (stock)") && page.contains("a &lt;CPU&gt; &amp; &quot;more&quot;")
        );
        assert!(page.contains("The bounds are for the kernel 'fast'."));
        assert!(page.contains("on 'stock' (7.3.4). Its instruction counts differ."));
    }
}
