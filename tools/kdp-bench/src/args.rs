//! The command line.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use kdp_vmm::session::Pattern;
use kdp_vmm::{Backing, Mode};

use crate::row::Clock;

/// Measure what paging in one page costs, in every mode, in one process
///
/// The same guest visits the same pages: with everything in place (floor), with the device's fault exits
/// (exit), its wait queue (wait), and userfaultfd (uffd-missing, uffd-minor). limit is what any design costs
/// that exits once for each page: the floor, a round trip from the guest to the VMM, and a copy of 4 KiB.
///
/// The result is a JSON array; a table of it, with the ratios that count, goes to the terminal.
#[derive(Parser)]
#[command(version, about, args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,

    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Subcommand)]
pub enum Command {
    /// Print the table of one or several results together
    Report {
        /// Results of earlier runs; of two rows for the same thing the later file's counts
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Write all rows to this file, too
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },

    /// Write the man pages
    #[command(hide = true)]
    Man {
        /// The folder to write them to
        dir: PathBuf,
    },
}

#[derive(ClapArgs)]
pub struct RunArgs {
    /// Where to write the result
    #[arg(long, default_value = "build/bench/latest.json", value_name = "FILE")]
    pub out: PathBuf,

    /// Fewer pages and fewer runs
    #[arg(long)]
    pub quick: bool,

    /// What this machine's clock counts: with icount, the VM was started with QEMU's -icount shift=0, and a
    /// nanosecond is an instruction
    #[arg(long, value_enum, default_value_t = Clock::Time)]
    pub clock: Clock,

    /// How often everything is measured; the medians count
    #[arg(long, value_name = "N")]
    pub runs: Option<usize>,

    /// The modes to measure
    #[arg(long, value_enum, value_delimiter = ',', value_name = "MODE,…")]
    pub modes: Option<Vec<ModeArg>>,

    /// The backings to measure
    #[arg(long, value_enum, value_delimiter = ',', value_name = "BACKING,…")]
    pub backings: Option<Vec<BackingArg>>,

    /// The orders of visits to measure
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PATTERN,…")]
    pub patterns: Option<Vec<PatternArg>>,

    /// Numbers of pages of 4 KiB to measure, multiples of 512
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    pub pages: Option<Vec<u64>>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    Floor,
    Limit,
    Exit,
    ExitPrefetch,
    Wait,
    UffdMissing,
    UffdMinor,
    Setup,
}

impl ModeArg {
    /// The mode of a guest's run, if it is one.
    pub fn session(self) -> Option<Mode> {
        match self {
            Self::Floor => Some(Mode::Floor),
            Self::Exit => Some(Mode::Exit),
            Self::ExitPrefetch => Some(Mode::Prefetch),
            Self::Wait => Some(Mode::Wait),
            Self::UffdMissing => Some(Mode::UffdMissing),
            Self::UffdMinor => Some(Mode::UffdMinor),
            Self::Limit | Self::Setup => None,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum BackingArg {
    #[value(name = "shmem")]
    Shmem,
    #[value(name = "hugetlb-2M")]
    Huge2M,
}

impl From<BackingArg> for Backing {
    fn from(backing: BackingArg) -> Self {
        match backing {
            BackingArg::Shmem => Self::Shmem,
            BackingArg::Huge2M => Self::Huge2M,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum PatternArg {
    Random,
    Sequential,
}

impl From<PatternArg> for Pattern {
    fn from(pattern: PatternArg) -> Self {
        match pattern {
            PatternArg::Random => Self::Random,
            PatternArg::Sequential => Self::Sequential,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_sound() {
        Args::command().debug_assert();
        assert!(Args::try_parse_from(["kdp-bench", "report"]).is_err());
        assert!(Args::try_parse_from(["kdp-bench", "--modes", "exit,limit"]).is_ok());
    }
}
