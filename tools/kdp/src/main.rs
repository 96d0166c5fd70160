//! The `kdp` command: thin over the library, one file for each of its subcommands.

mod cli;
mod doctor;
mod failure;
mod fdinfo;
mod handle;
mod keep;
mod memory;
mod migrate;
mod poison;
mod ready;
mod restore;
mod serve;
mod signals;
mod stat;
mod systemd;
mod units;

use clap::Parser;
use cli::{Cli, Command};
use failure::Failure;
use std::{io, process::ExitCode};
use tracing::level_filters::LevelFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match cli.verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_target(false)
        .init();

    let result = match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Handle(args) => handle::run(&args),
        Command::Restore(args) => restore::run(&args),
        Command::Keep(args) => keep::run(&args),
        Command::Kept(args) => keep::kept(&args),
        Command::Stat(args) => stat::run(&args),
        Command::Doctor(args) => match doctor::run(&args) {
            Ok(false) => return ExitCode::FAILURE,
            other => other.map(drop),
        },
        Command::Poison(args) => poison::poison(&args),
        Command::Heal(args) => poison::heal(&args),
        Command::List(args) => poison::list(&args),
        Command::Replace(args) => poison::replace(&args),
        Command::Migrate(args) => migrate::run(&args),
        Command::Generate(generate) => generate.run::<Cli>().map_err(Failure::Generate),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kdp: {failure}");
            ExitCode::FAILURE
        }
    }
}
