//! `kdp-vmm`: run a tiny guest in memory that is paged in on demand, and verify what it saw.

mod args;
mod linux_command;
mod output;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use kdp_cli::Generate;
use kdp_vmm::{
    fill_page, session, Backing, Error, Image, Mode, Remote, Source, MIN_GPA, PAGE_SIZE,
};

use crate::args::{Args, Command, RunArgs};

/// How long a page of a source may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Guest memory of the guest with a clock: one huge page.
const CLOCK_PAGES: u64 = 512;
const CLOCK_READS: u64 = 10_000;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_max_level(tracing::level_filters::LevelFilter::WARN)
        .with_writer(io::stderr)
        .with_target(false)
        .init();
    let result = match Args::parse().command {
        Command::Run(run) => run_guest(&run),
        Command::Image { file, memory, seed } => write_image(&file, memory, seed),
        Command::Clock {
            mode,
            backing,
            page,
        } => run_clock(mode, backing.into(), page),
        Command::Linux(linux) => linux_command::run(linux),
        Command::PageHandler => linux_command::run_handler(),
        Command::Generate(generate) => generate_files(&generate),
    };
    match result {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(2)
        }
    }
}

fn run_guest(args: &RunArgs) -> Result<ExitCode, Error> {
    let source: Arc<dyn Source> = match &args.source {
        None => Arc::new(Image::generate(args.memory, args.seed)?),
        Some(location) => Arc::new(Remote::open(location, args.memory, PATIENCE)?),
    };
    let config = args.config();
    let report = session::run(&config, source)?;
    if args.json {
        println!("{}", output::json(&config, &report));
    } else {
        print!("{}", output::table(&config, &report));
    }
    Ok(if report.correct() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_clock(mode: Mode, backing: Backing, page: u64) -> Result<ExitCode, Error> {
    let source = Arc::new(Image::generate(CLOCK_PAGES * PAGE_SIZE, 1)?);
    let outcome = session::run_clock(mode, backing, MIN_GPA, page, CLOCK_READS, source, PATIENCE)?;
    print!("{}", output::clock(&outcome));
    Ok(if outcome.clock.works() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn write_image(path: &Path, bytes: u64, seed: u64) -> Result<ExitCode, Error> {
    let write = || -> io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        let mut page = [0; PAGE_SIZE as usize];
        for n in 0..bytes / PAGE_SIZE {
            fill_page(n, seed, &mut page);
            file.write_all(&page)?;
        }
        file.flush()
    };
    write().map_err(|source| Error::Os {
        what: format!("write {}", path.display()),
        source,
    })?;
    Ok(ExitCode::SUCCESS)
}

fn generate_files(generate: &Generate) -> Result<ExitCode, Error> {
    generate.run::<Args>().map_err(|error| Error::Os {
        what: error.what,
        source: error.source,
    })?;
    Ok(ExitCode::SUCCESS)
}
