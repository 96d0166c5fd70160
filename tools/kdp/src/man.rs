//! `kdp man`: the man pages, made from the command line's definition.

use crate::{
    cli::{Cli, ManArgs},
    failure::{Context, Failure},
};
use clap::CommandFactory;
use std::fs;

pub fn run(args: &ManArgs) -> Result<(), Failure> {
    fs::create_dir_all(&args.dir).on(args.dir.display())?;
    let mut command = Cli::command().disable_help_subcommand(true);
    // Subcommands get their full names and the global options.
    command.build();
    clap_mangen::generate_to(command, &args.dir).on(format_args!(
        "cannot write man pages into {}",
        args.dir.display()
    ))
}
