//! `kdp migrate`: move a guest from one VMM to another.

use crate::{
    cli::MigrateArgs,
    failure::{Context, Failure},
    units,
};
use indicatif::{ProgressBar, ProgressStyle};
use kdp_migrate::{
    control::{receive, send, Command, Order, Reply},
    Phase, Progress, SourceReport,
};
use std::{io::BufReader, os::unix::net::UnixStream};

pub fn run(args: &MigrateArgs) -> Result<(), Failure> {
    let stream = UnixStream::connect(&args.from).on(format_args!(
        "cannot reach the VMM at {} (it listens there if it was started with --control)",
        args.from.display()
    ))?;
    let order = Order {
        to: args.to.clone(),
        bandwidth: args.bandwidth,
        downtime_ms: args.downtime,
        rounds: args.rounds,
        no_hints: args.no_hints,
        give_up_s: args.give_up,
    };
    let lost = "cannot talk to the VMM";
    send(&stream, &Command::Migrate(order)).on(lost)?;
    let mut replies = BufReader::new(&stream);
    let bar = Bar::new(args.quiet || args.json);
    let outcome = loop {
        match receive(&mut replies).on(lost)? {
            Some(Reply::Progress(progress)) => bar.show(&progress),
            Some(other) => break other,
            None => {
                return Err(Failure::Other(
                    "the VMM went away before it said how the migration ended: look whether the guest runs at \
                     the destination"
                        .to_owned(),
                ))
            }
        }
    };
    bar.clear();
    match outcome {
        Reply::Moved(report) if args.json => {
            let text = serde_json::to_string(&report).map_err(std::io::Error::from);
            println!("{}", text.on("cannot print the report")?);
            Ok(())
        }
        Reply::Moved(report) => {
            print!("{}", table(&report));
            Ok(())
        }
        Reply::Failed { error, guest } => Err(Failure::Other(format!("{error}; {guest}"))),
        Reply::Refused { why } => Err(Failure::Other(format!("the VMM does not do it: {why}"))),
        other => Err(Failure::Other(format!(
            "the VMM gave an answer that does not belong here: {other:?}"
        ))),
    }
}

/// The progress bar, on standard error if that is a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new(hidden: bool) -> Self {
        let bar = if hidden {
            ProgressBar::hidden()
        } else {
            ProgressBar::new(0)
        };
        let style = "{prefix:>19} [{bar:32}] {human_pos} of {human_len} pages, {msg}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar)
    }

    fn show(&self, progress: &Progress) {
        let prefix = match progress.phase {
            Phase::PreCopy if progress.round > 0 => format!("pre-copy, round {}", progress.round),
            phase => phase.name().to_owned(),
        };
        if prefix != self.0.prefix() {
            // What is left grows again with a round: what was fast before says nothing of it.
            self.0.reset_eta();
            self.0.set_prefix(prefix);
        }
        self.0.set_length(progress.pages);
        self.0.set_message(units::human(progress.bytes));
        self.0
            .set_position(progress.pages.saturating_sub(progress.remaining));
    }

    fn clear(&self) {
        self.0.finish_and_clear();
    }
}

/// What people read. Times are of the source's clock.
fn table(report: &SourceReport) -> String {
    let there = &report.destination;
    let mut rows: Vec<(&str, String)> = vec![
        ("total time", ms(report.total_ms)),
        ("the guest stood still", ms(report.downtime_ms)),
        ("pre-copy", {
            let rounds = match report.rounds {
                1 => "1 round".to_owned(),
                rounds => format!("{rounds} rounds"),
            };
            format!("{}, {rounds}", ms(report.precopy_ms))
        }),
        ("pages of the guest", report.pages.to_string()),
        ("  sent in pre-copy", report.sent.precopy.to_string()),
        ("  sent on request", report.sent.requested.to_string()),
        ("  sent in background", report.sent.background.to_string()),
        ("  of those, zero", report.sent.zero.to_string()),
        ("  of those, lost", report.sent.lost.to_string()),
        ("  not sent, by hints", report.pages_hinted_free.to_string()),
        ("bytes sent", units::human(report.bytes_sent)),
        ("pages waited for there", there.faults.to_string()),
        (
            "  latency",
            format!(
                "p50 {} us, p99 {} us, longest {} us",
                there.fault_p50_us, there.fault_p99_us, there.fault_max_us
            ),
        ),
    ];
    if report.reconnects > 0 {
        rows.push(("connections lost", report.reconnects.to_string()));
    }
    let mut text = String::new();
    for (name, value) in rows {
        text.push_str(&format!("{name:<22}  {value}\n"));
    }
    text
}

fn ms(ms: f64) -> String {
    format!("{ms:.1} ms")
}
