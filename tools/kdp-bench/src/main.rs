//! `kdp-bench`: what a page costs in each mode, all measured in one process, interleaved.

mod args;
mod measure;
mod plan;
mod report;
mod row;
mod setup;
mod stats;
mod table;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{Args, Command};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{mode} on {backing}, {pattern}, {pages} pages: {source}")]
    Measure {
        mode: &'static str,
        backing: &'static str,
        pattern: &'static str,
        pages: u64,
        source: Box<kdp_vmm::Error>,
    },
    #[error("{what}: the guest saw wrong contents, so its time means nothing")]
    Wrong { what: String },
    #[error(transparent)]
    Vmm(Box<kdp_vmm::Error>),
    #[error(transparent)]
    Paging(Box<kvm_demand_paging::Error>),
    #[error("{what}: {source}")]
    Io {
        what: String,
        source: std::io::Error,
    },
    #[error("{file} is no result of kdp-bench: {source}")]
    Json {
        file: String,
        source: serde_json::Error,
    },
}

impl From<kdp_vmm::Error> for Error {
    fn from(e: kdp_vmm::Error) -> Self {
        Self::Vmm(Box::new(e))
    }
}

impl From<kvm_demand_paging::Error> for Error {
    fn from(e: kvm_demand_paging::Error) -> Self {
        Self::Paging(Box::new(e))
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.command {
        None => plan::run(&args.run).and_then(|rows| publish(&rows, Some(&args.run.out))),
        Some(Command::Report { files, out }) => {
            row::load(files).and_then(|rows| publish(&rows, out.as_deref()))
        }
        Some(Command::Man { dir }) => {
            let write = std::fs::create_dir_all(dir)
                .and_then(|()| clap_mangen::generate_to(Args::command(), dir));
            write.map_err(|source| Error::Io {
                what: format!("write man pages to {}", dir.display()),
                source,
            })
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn publish(rows: &[row::Row], out: Option<&Path>) -> Result<(), Error> {
    if let Some(out) = out {
        row::save(rows, out)?;
    }
    print!("{}", report::report(rows));
    Ok(())
}
