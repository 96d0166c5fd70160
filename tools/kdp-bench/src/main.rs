//! `kdp-bench`: what a page costs in each mode, all measured in one process, interleaved.

mod args;
mod case;
mod figures;
mod html;
mod kernel_test;
mod link;
mod machine;
mod measure;
mod memory_error;
mod migration;
mod plan;
mod plot;
mod profile;
mod report;
mod row;
mod setup;
mod stats;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command, RunArgs};
use crate::migration::MigrationArgs;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{what}: {source}")]
    Measure {
        what: String,
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
    #[error("the row of {row}: {why}")]
    Row { row: String, why: &'static str },
    #[error("migration: {0}")]
    Migration(String),
    #[error("{0}: what was counted of the module is not there")]
    Profile(String),
    #[error("a plot cannot be drawn: {0}")]
    Plot(String),
    #[error("{0} rows are missing, because what they stand for failed again and again; the others are written")]
    Missing(usize),
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
        None => bench(&args.run),
        Some(Command::Report {
            files,
            out,
            html,
            profile,
        }) => report(files, profile, out.as_deref(), html.as_deref()),
        Some(Command::Migration(args)) => migration(args),
        Some(Command::Measure { job }) => measure_one(job),
        Some(Command::Generate(generate)) => generate.run::<Args>().map_err(|error| Error::Io {
            what: error.what,
            source: error.source,
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &RunArgs) -> Result<(), Error> {
    let outcome = plan::run(args)?;
    row::check(&outcome.rows)?;
    row::save(&outcome.rows, &args.out)?;
    print!("{}", report::report(&outcome.rows));
    match outcome.missing {
        0 => Ok(()),
        missing => Err(Error::Missing(missing)),
    }
}

fn migration(args: &MigrationArgs) -> Result<(), Error> {
    print!("{}", migration::report(&migration::run(args)?));
    Ok(())
}

fn report(
    files: &[PathBuf],
    profiles: &[PathBuf],
    out: Option<&Path>,
    html: Option<&Path>,
) -> Result<(), Error> {
    let mut rows = row::load(files)?;
    for file in profiles {
        row::add(&mut rows, profile::row(file)?);
    }
    row::check(&rows)?;
    if let Some(out) = out {
        row::save(&rows, out)?;
    }
    if let Some(html) = html {
        row::write(html, &html::page(&rows)?)?;
    }
    print!("{}", report::report(&rows));
    Ok(())
}

fn measure_one(job: &str) -> Result<(), Error> {
    let json = |source| Error::Json {
        file: "the job".to_owned(),
        source,
    };
    let sample = measure::run(&serde_json::from_str(job).map_err(json)?)?;
    println!("{}", serde_json::to_string(&sample).map_err(json)?);
    Ok(())
}
