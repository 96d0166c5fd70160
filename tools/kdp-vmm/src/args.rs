//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand};
use kdp_cli::Generate;
use kdp_vmm::linux::IncomingPager;
use kdp_vmm::session::{Config, Pattern};
use kdp_vmm::{BackingArg, Mode, MIN_GPA, PAGE_SIZE};
use kvm_demand_paging::source::Location;

/// Run a tiny KVM guest in memory that is paged in on demand, and verify what it saw.
#[derive(Parser)]
#[command(version, about, long_about = None)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run a guest whose memory is elsewhere, and verify its memory's checksum
    ///
    /// The guest visits every page of its memory once, reads it and computes a checksum. The same checksum
    /// is computed on the host from the source. The exit status is 0 if both agree and the memory is, byte
    /// for byte, what it should be; 1 if not; 2 if the guest could not be run.
    Run(RunArgs),

    /// Write a file of known content, for --source or for 'kdp serve'
    Image {
        /// The file to write
        file: PathBuf,
        /// Its size in bytes; K, M and G may follow
        #[arg(long, value_parser = parse_size, default_value = "64M")]
        memory: u64,
        /// Another seed gives other content
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },

    /// Run a guest whose kvmclock is in memory that is elsewhere
    ///
    /// KVM itself writes to that page: such an access never exits, it waits. The exit status is 0 if the clock
    /// works, 1 if not, 2 if the guest could not be run.
    Clock {
        /// How guest memory is filled
        #[arg(long, value_enum, default_value_t = Mode::Exit)]
        mode: Mode,
        /// What guest memory is made of
        #[arg(long, value_enum, default_value_t = BackingArg::Shmem)]
        backing: BackingArg,
        /// The page of guest memory that holds the clock, of 512
        #[arg(long, default_value_t = 7, value_name = "PAGE")]
        page: u64,
    },

    /// Run Linux, and print what its console says
    ///
    /// The guest has a serial console and a virtio balloon, and lives in its initramfs: there is no disk. Its memory is a
    /// memslot of the device; pages that it reports as free are given back. The exit status is 0 if the guest resets its
    /// machine (reboot, or a panic), or has moved to another VMM; 1 if it ends in another way, or was lost on the way; 2 if it
    /// could not be run, lacks a page that will never come, or did not end in time.
    Linux(LinuxArgs),

    /// Place the pages of a guest for the kdp-vmm that has started this
    #[command(hide = true)]
    PageHandler,

    #[command(flatten)]
    Generate(Generate),
}

#[derive(ClapArgs)]
pub struct RunArgs {
    /// How guest memory is filled
    #[arg(long, value_enum, default_value_t = Mode::Exit)]
    mode: Mode,

    /// What guest memory is made of
    #[arg(long, value_enum, default_value_t = BackingArg::Shmem)]
    backing: BackingArg,

    /// Guest memory in bytes; K, M and G may follow
    #[arg(long, value_parser = parse_size, default_value = "64M", value_name = "SIZE")]
    pub memory: u64,

    /// vCPUs; each visits its own share of the pages
    #[arg(long, default_value_t = 1, value_name = "N")]
    vcpus: u64,

    /// The order in which each vCPU visits its pages
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pattern: Pattern,

    /// Visit only every Nth page
    #[arg(long, default_value_t = 1, value_name = "N")]
    stride: u64,

    /// Visit only the first so many pages
    #[arg(long, value_name = "PAGES")]
    extent: Option<u64>,

    /// Write a word to each page, too
    #[arg(long)]
    write: bool,

    /// Where the contents are: tcp:HOST:PORT or unix:PATH (see 'kdp serve'), or file:PATH[@OFFSET]; without
    /// this, the contents are made in this process
    #[arg(long, value_name = "SOURCE")]
    pub source: Option<Location>,

    /// Another seed gives another order, and other content where it is made here
    #[arg(long, default_value_t = 1)]
    pub seed: u64,

    /// Visit all pages this many times; only the first round pages them in
    #[arg(long, default_value_t = 1, value_name = "N")]
    rounds: u64,

    /// Where the guest has the memory: a guest physical address
    #[arg(long, value_parser = parse_size, default_value_t = MIN_GPA, value_name = "GPA")]
    gpa: u64,

    /// Seconds that the guest may take
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,

    /// Print JSON, not a table
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs)]
pub struct LinuxArgs {
    /// The kernel: a bzImage or an ELF file (vmlinux)
    #[arg(long, value_name = "FILE", required_unless_present = "incoming")]
    pub kernel: Option<PathBuf>,

    /// Its initramfs
    #[arg(long, value_name = "FILE", conflicts_with = "incoming")]
    pub initrd: Option<PathBuf>,

    /// Do not boot: wait here for a guest from another kdp-vmm, which 'kdp migrate' moves. Port 0: any free one. vCPUs come
    /// with the guest; memory must be of the same size, and may be made of something else
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "kernel")]
    pub incoming: Option<String>,

    /// With --incoming: what pages the guest's memory in while it runs here already
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "PAGER",
        requires = "incoming"
    )]
    pub pager: IncomingPager,

    /// Listen at this Unix socket for 'kdp migrate' and others: commands and replies are lines of JSON
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// With --incoming: a process of its own places the pages. If it dies while the guest runs here already, another one is
    /// started, which goes on where it was
    #[arg(long, requires = "incoming", conflicts_with = "pager")]
    pub handler_process: bool,

    /// With --incoming: seconds without a connection, without a page that was asked for, or without a --handler-process that
    /// lives, after which the rest of a guest is given up [default: 60]
    #[arg(long, value_name = "SECONDS", requires = "incoming", value_parser = parse_seconds)]
    pub give_up: Option<f64>,

    /// With --incoming: seconds after which a page that was asked for is asked for again, over a new connection [default: 5]
    #[arg(long, value_name = "SECONDS", requires = "incoming", value_parser = parse_seconds)]
    pub answer: Option<f64>,

    /// Guest memory in bytes; K, M and G may follow
    #[arg(long, value_parser = parse_size, default_value = "256M", value_name = "SIZE")]
    pub memory: u64,

    /// What guest memory is made of
    #[arg(long, value_enum, default_value_t = BackingArg::Shmem)]
    pub backing: BackingArg,

    /// vCPUs
    #[arg(
        long,
        default_value_t = 1,
        value_name = "N",
        conflicts_with = "incoming"
    )]
    pub vcpus: u8,

    /// What comes behind the kernel command line that the machine itself needs
    #[arg(
        long,
        default_value = "",
        value_name = "TEXT",
        conflicts_with = "incoming"
    )]
    pub append: String,

    /// Seconds that the guest may take; without this, any number
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
}

impl RunArgs {
    pub fn config(&self) -> Config {
        Config {
            mode: self.mode,
            backing: self.backing.into(),
            bytes: self.memory,
            vcpus: self.vcpus,
            pattern: self.pattern,
            seed: self.seed,
            stride: self.stride,
            extent: self.extent,
            write: self.write,
            rounds: self.rounds,
            gpa: self.gpa,
            timeout: Duration::from_secs(self.timeout),
            ..Config::default()
        }
    }
}

/// A number of seconds, with a fraction or without.
fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=1e6).contains(&seconds) => Ok(seconds),
        _ => Err("seconds are a number such as 0.5 or 60, at most 1000000".to_owned()),
    }
}

/// A number of bytes: decimal or 0x…, with K, M or G for the powers of 1024; a multiple of a page.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1 << 10),
        Some((at, 'M' | 'm')) => (&text[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&text[..at], 1 << 30),
        _ => (text, 1_u64),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    let bytes = number
        .map_err(|_| "a size is a number of bytes such as 4096, 64M or 0x40000000".to_owned())?
        .checked_mul(factor)
        .ok_or_else(|| "more than 2^64 bytes".to_owned())?;
    if bytes == 0 || bytes % PAGE_SIZE != 0 {
        return Err(format!(
            "it must be a multiple of {PAGE_SIZE} bytes and not 0"
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("0x40000000"), Ok(1 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "M", "0", "4097", "64X", "99999999999G", "-4096"] {
            assert!(parse_size(bad).is_err(), "{bad:?} was taken");
        }
    }
}
