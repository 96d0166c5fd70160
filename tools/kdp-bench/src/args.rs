//! The command line.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use kdp_cli::Generate;
use kdp_vmm::session::Pattern;
use kdp_vmm::{BackingArg, Mode};

use crate::migration::MigrationArgs;
use crate::row::Clock;

/// Measure what paging in one page costs, in every mode, in one process
///
/// The same guest visits the same pages: with everything in place (floor), with the device's fault exits
/// (exit), its wait queue (wait), and userfaultfd (uffd-missing, uffd-minor). limit is what any design costs
/// that exits once for each page: the floor, a round trip from the guest to the VMM, and a copy of 4 KiB.
/// Everything takes turns, and each measurement is a process of its own.
///
/// The result is a JSON array; tables of it, with the ratios that count, go to the terminal, and with plots to
/// an HTML page.
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
        /// Write a page with tables and plots to this file
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
        /// Take the module's instructions from what scripts/profile has left, MODE-BACKING-PATTERN.json
        #[arg(long, value_name = "FILE")]
        profile: Vec<PathBuf>,
    },

    /// Move a Linux guest by post-copy, in memory of the device and on userfaultfd, and compare
    Migration(MigrationArgs),

    /// Take one measurement and print it as JSON
    #[command(hide = true)]
    Measure {
        /// What to measure, as JSON
        job: String,
    },

    #[command(flatten)]
    Generate(Generate),
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

    /// What to measure; without this everything that there is time for, or with --modes base alone
    #[arg(long, value_enum, value_delimiter = ',', value_name = "SERIES,…")]
    pub series: Option<Vec<Series>>,

    /// The modes to measure; limit comes with floor
    #[arg(long, value_enum, value_delimiter = ',', value_name = "MODE,…")]
    pub modes: Option<Vec<Mode>>,

    /// The backings to measure; without this, those that there are huge pages for
    #[arg(long, value_enum, value_delimiter = ',', value_name = "BACKING,…")]
    pub backings: Option<Vec<BackingArg>>,

    /// The orders of visits to measure
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PATTERN,…")]
    pub patterns: Option<Vec<Pattern>>,

    /// Pages of 4 KiB that guests visit, a multiple of 4,096
    #[arg(long, default_value_t = 4096, value_name = "N")]
    pub pages: u64,

    /// The kernel tree's demand_paging_test, to be run beside; without this it is left out
    #[arg(long, value_name = "PROGRAM")]
    pub kernel_test: Option<PathBuf>,
}

/// A part of the benchmark.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Series {
    /// Every mode on every backing, one vCPU
    Base,
    /// 2, 4 and 8 vCPUs, and userfaultfd with a reader for each
    Vcpus,
    /// Memslots of 64 MiB to 8 GiB, of which the same number of pages is visited
    Sizes,
    /// Memory that is complete, visited again
    Loop,
    /// The first access to a huge page whose contents come over a link
    Link,
    /// The kernel tree's own benchmark
    Kernel,
    /// Making a memslot
    Setup,
    /// What a memory error takes, and replacing the huge page that has it
    MemoryErrors,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_sound() {
        Args::command().debug_assert();
        assert!(Args::try_parse_from(["kdp-bench", "report"]).is_err());
        assert!(Args::try_parse_from(["kdp-bench", "--modes", "exit,floor"]).is_ok());
    }
}
