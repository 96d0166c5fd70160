//! The command line.

use crate::units;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use kdp_cli::Generate;
use kvm_demand_paging::{
    source::{Address, Location},
    Backing, PageRange,
};
use std::path::PathBuf;

const EXIT_STATUS: &str = "Exit status:
  0  success, or ended by SIGTERM or SIGINT
  1  failure: one line on standard error gives the reason
  2  the command line is wrong

SIGUSR1 makes 'serve' and 'handle' print what they have counted until then.";

/// Demand paging for KVM guests: serve pages, handle the faults of a VM, show its counters.
#[derive(Parser)]
#[command(name = "kdp", version, after_help = EXIT_STATUS, after_long_help = EXIT_STATUS)]
pub struct Cli {
    /// Increase verbosity: -v events, -vv details
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    Serve(ServeArgs),
    // Larger than the others by far.
    Handle(Box<HandleArgs>),
    Restore(RestoreArgs),
    Keep(KeepArgs),
    Kept(KeptArgs),
    Stat(StatArgs),
    Doctor(DoctorArgs),
    Poison(PoisonArgs),
    Heal(HealArgs),
    List(ListArgs),
    Replace(ReplaceArgs),
    Migrate(MigrateArgs),
    #[command(flatten)]
    Generate(Generate),
}

/// Serve the pages of a file, such as the RAM of a snapshot, to handlers elsewhere
///
/// Any number of clients may be connected. Nothing is encrypted and nobody is authenticated: use it on a
/// network of your own, or through a tunnel.
#[derive(Args)]
pub struct ServeArgs {
    /// Where to listen: HOST:PORT (port 0: any free one) or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Address,
    /// Write this file when clients can connect; it holds the PID
    #[arg(long, value_name = "PATH")]
    pub ready_file: Option<PathBuf>,
    /// Print what was counted as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// The file, and where in it page 0 is, in bytes
    #[arg(value_name = "FILE[@OFFSET]")]
    pub file: String,
}

/// Handle the faults of a VM: fetch the pages that are touched from a source and place them
///
/// Obtain the VM in one of four ways: from the VMM through a socket (--listen-fd), by inheritance
/// (--fd), as a new VM with one memslot (--create), or from a keeper (--from-keeper).
///
/// It ends at SIGTERM or SIGINT, when the process that handed the VM over has ended, or when the process of
/// --until-pid has ended. Pages that are absent then are lost to their guest, unless a keeper keeps the VM.
#[derive(Args)]
#[command(group = ArgGroup::new("subject").required(true).args(["listen_fd", "fd", "create", "from_keeper"]))]
#[command(group = ArgGroup::new("backing").args(["hugetlb", "shmem", "shmem_huge"]))]
pub struct HandleArgs {
    /// Wait at this socket until the VMM hands its VM over
    #[arg(long, value_name = "unix:PATH", value_parser = units::unix)]
    pub listen_fd: Option<PathBuf>,
    /// The VM is this inherited file descriptor
    #[arg(long, value_name = "N")]
    pub fd: Option<u32>,
    /// Make a VM with one memslot, /dev/kdp/NAME, for a VMM that takes a path
    #[arg(long, value_name = "NAME", requires = "size", requires = "backing")]
    pub create: Option<String>,
    /// Take the VM from the keeper at this socket
    #[arg(long, value_name = "unix:PATH", value_parser = units::unix)]
    pub from_keeper: Option<PathBuf>,

    /// The size of the memslot that is made, in bytes (K, M, G)
    #[arg(long, value_name = "BYTES", value_parser = units::bytes, requires = "create")]
    pub size: Option<u64>,
    /// Make the memslot of hugetlb pages of this size
    #[arg(long, value_name = "SIZE", requires = "create")]
    pub hugetlb: Option<HugeSize>,
    /// Make the memslot of shmem
    #[arg(long, requires = "create")]
    pub shmem: bool,
    /// Make the memslot of shmem, in folios of 2 MiB where the kernel can allocate them
    #[arg(long, requires = "create")]
    pub shmem_huge: bool,
    /// Where in the source the memslot begins that is made, in bytes
    #[arg(long, value_name = "BYTES", value_parser = units::bytes, default_value = "0", requires = "create")]
    pub offset: u64,
    /// Where in the source a memslot begins, in bytes; without it, at its guest physical address
    #[arg(long, value_name = "SLOT:OFFSET", value_parser = units::layout, conflicts_with = "create")]
    pub slot: Vec<(u32, u64)>,

    /// Where the pages are: tcp:HOST:PORT, unix:PATH or file:PATH[@OFFSET]
    #[arg(long, value_name = "SOURCE")]
    pub source: Location,
    /// Fetch the pages that nobody touches, too
    #[arg(long)]
    pub background: bool,
    /// Bandwidth limit of background prefetch, in bytes per second (K, M, G)
    #[arg(long, value_name = "BYTES", value_parser = units::bytes, requires = "background")]
    pub bandwidth: Option<u64>,

    /// Give the VM to the keeper at this socket, so that another handler can go on after this one
    #[arg(long, value_name = "unix:PATH", value_parser = units::unix, conflicts_with = "from_keeper")]
    pub keeper: Option<PathBuf>,
    /// The VM's name at the keeper
    #[arg(long, value_name = "NAME", default_value = "vm")]
    pub vm: String,
    /// End when this process has ended
    #[arg(long, value_name = "PID")]
    pub until_pid: Option<i32>,

    /// Write this file when faults are handled (with --listen-fd: when the VM can be handed over)
    #[arg(long, value_name = "PATH")]
    pub ready_file: Option<PathBuf>,
    /// Write the report to this file, as JSON, at the end and with each report in between
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Report every so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub report: Option<u64>,
}

/// Make a memslot whose pages the kernel reads from a file when they are touched
///
/// There is no handler: nothing is copied before, and nobody but the kernel after. The VMM opens /dev/kdp/NAME, which is
/// there until SIGTERM or SIGINT. What the VMM has opened goes on without this command. The file must not change
/// as long as the VMM runs.
#[derive(Args)]
#[command(group = ArgGroup::new("backing").required(true).args(["hugetlb", "shmem", "shmem_huge"]))]
pub struct RestoreArgs {
    /// The memslot's name
    #[arg(long, value_name = "NAME")]
    pub create: String,
    /// Make the memslot of hugetlb pages of this size
    #[arg(long, value_name = "SIZE")]
    pub hugetlb: Option<HugeSize>,
    /// Make the memslot of shmem
    #[arg(long)]
    pub shmem: bool,
    /// Make the memslot of shmem, in folios of 2 MiB where the kernel can allocate them
    #[arg(long)]
    pub shmem_huge: bool,
    /// The size of the memslot, in bytes (K, M, G); without it, that of the file from its offset on
    #[arg(long, value_name = "BYTES", value_parser = units::bytes)]
    pub size: Option<u64>,
    /// Write this file when the memslot is there; it holds the PID
    #[arg(long, value_name = "PATH")]
    pub ready_file: Option<PathBuf>,
    /// The file, such as the RAM of a snapshot, and where in it page 0 is, in bytes
    #[arg(value_name = "FILE[@OFFSET]")]
    pub file: String,
}

// Lines of at most 72 columns: a man page breaks longer ones.
const SYSTEMD: &str = "Under systemd:
  Socket: the keeper serves the Unix socket that a socket unit passes in
  LISTEN_FDS. --listen is not needed then.
  Readiness: with NOTIFY_SOCKET, the keeper sends READY=1 and STOPPING=1.
  The service is of Type=notify.
  Restart: the keeper stores the descriptor of each VM in the fd store
  of systemd, and takes all of them back when it starts. Neither
  'systemctl restart' nor a crash of the keeper then loses a VM. The
  store has kdp-vm.NAME for a VM that a page handler gave. It has
  kdp-vm-of-giver.NAME and kdp-giver.NAME for a VM that a VMM gave.
  Size: set FileDescriptorStoreMax= of the service to 1 for each VM that
  a page handler gives, and 2 for each that a VMM gives. If that is too
  few, the keeper warns that a VM will not survive a restart.";

/// Keep VMs when their page handlers end
///
/// A page handler gives its VM with 'kdp handle --keeper'. A VMM gives its VM through the library.
/// The next page handler takes it with 'kdp handle --from-keeper'. The keeper releases a VM that a
/// VMM gave when the VMM has ended. It releases a VM that a page handler gave on 'kdp kept
/// --release'.
#[derive(Args)]
#[command(after_long_help = SYSTEMD)]
pub struct KeepArgs {
    /// The socket to listen at. Omit it if systemd passes a socket
    #[arg(long, value_name = "unix:PATH", value_parser = units::unix)]
    pub listen: Option<PathBuf>,
    /// Write this file when VMs can be given; it holds the PID
    #[arg(long, value_name = "PATH")]
    pub ready_file: Option<PathBuf>,
}

/// List the VMs of a keeper, or release one of them
#[derive(Args)]
pub struct KeptArgs {
    /// The keeper's socket
    #[arg(long, value_name = "unix:PATH", value_parser = units::unix)]
    pub at: PathBuf,
    /// Release the VM with this name
    #[arg(long, value_name = "NAME")]
    pub release: Option<String>,
}

/// Show the VMs, memslots and mappings of all processes, or of one, with their counters
#[derive(Args)]
pub struct StatArgs {
    /// Only those of this process
    pub pid: Option<u32>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print again every so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub watch: Option<u64>,
    /// Where /proc is
    #[arg(long, value_name = "DIR", default_value = "/proc", hide = true)]
    pub proc: PathBuf,
}

const DOCTOR_STATUS: &str = "Exit status:
  0  demand paging works on this host for this user; there may be warnings
  1  demand paging does not work: at least one check is an error
  2  the command line is wrong";

/// Check whether demand paging works on this host, and print how to fix what does not
///
/// Prints each check: ok, warning or error, the name of the check, and the finding. Advice follows
/// on a line that begins with 'do:'. Permissions and limits are those of the user who runs the
/// command.
#[derive(Args)]
#[command(after_help = DOCTOR_STATUS, after_long_help = DOCTOR_STATUS)]
pub struct DoctorArgs {
    /// Print JSON: {"works": BOOL, "checks": [{"name", "status", "found", "advice"}, ...]}
    #[arg(long)]
    pub json: bool,
    /// The root directory of the host
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    pub root: PathBuf,
}

/// A memslot of a VM that another process has open
#[derive(Args)]
pub struct VmArgs {
    /// The process
    #[arg(long, value_name = "PID")]
    pub pid: u32,
    /// Its descriptor of the VM, if it has more than one open
    #[arg(long, value_name = "N")]
    pub fd: Option<u32>,
    /// The memslot, by its id in the VM
    #[arg(long, value_name = "ID", default_value = "0")]
    pub slot: u32,
}

/// Say that the bytes of pages are lost, 4 KiB each
///
/// Whoever touches such a page gets what an access to bad memory gets: a process SIGBUS (BUS_MCEERR_AR), a vCPU with exits on
/// an exit. 'kdp heal' takes it back. For tests, and for a guest that lost pages where it came from.
#[derive(Args)]
pub struct PoisonArgs {
    #[command(flatten)]
    pub vm: VmArgs,
    /// They were lost where the guest came from
    #[arg(long)]
    pub inherited: bool,
    /// Those that 'kdp list --json' printed where the guest came from: they are inherited
    #[arg(long, value_name = "FILE", conflicts_with = "pages")]
    pub list: Option<PathBuf>,
    /// A page of the memslot, or that page and those after it
    #[arg(value_name = "PAGE[+COUNT]", required_unless_present = "list", value_parser = units::pages)]
    pub pages: Vec<PageRange>,
}

/// Take the poison from pages whose memory is good
///
/// Before that, put right bytes there, or make the pages absent.
#[derive(Args)]
pub struct HealArgs {
    #[command(flatten)]
    pub vm: VmArgs,
    /// A page of the memslot, or that page and those after it
    #[arg(value_name = "PAGE[+COUNT]", required = true, value_parser = units::pages)]
    pub pages: Vec<PageRange>,
}

/// List the poisoned pages of a memslot, with the cause of each
#[derive(Args)]
pub struct ListArgs {
    #[command(flatten)]
    pub vm: VmArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Move a running guest to another VMM: pre-copy, then post-copy
///
/// It goes from a VMM that listens at a control socket (kdp-vmm linux --control) to one that waits for it
/// (kdp-vmm linux --incoming). What is left after a few rounds follows while the guest runs there already. To end this
/// command does not end the migration. Nothing is encrypted and nobody is authenticated: use a network of your own, or a
/// tunnel.
#[derive(Args)]
pub struct MigrateArgs {
    /// The control socket of the VMM that has the guest
    #[arg(long, value_name = "unix:PATH", value_parser = units::unix)]
    pub from: PathBuf,
    /// Where the other VMM waits for it, as that VMM is reached from the first one
    #[arg(long, value_name = "HOST:PORT")]
    pub to: String,
    /// The most bytes a second that are sent (K, M, G); pages that the guest waits for do not wait for it
    #[arg(long, value_name = "BYTES", value_parser = units::bytes)]
    pub bandwidth: Option<u64>,
    /// Stop the guest when the rest can be sent in so many milliseconds [default: 100]
    #[arg(long, value_name = "MS")]
    pub downtime: Option<u64>,
    /// Rounds of pre-copy at most; 0: every page follows after the guest [default: 8]
    #[arg(long, value_name = "N")]
    pub rounds: Option<u32>,
    /// Do not ask the guest which pages are free
    #[arg(long)]
    pub no_hints: bool,
    /// Seconds without a connection that works after which it is given up [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub give_up: Option<f64>,
    /// Print the report as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// Show no progress bar
    #[arg(short, long)]
    pub quiet: bool,
}

/// Replace huge pages that have memory errors by fresh ones, with the guest running
///
/// Every byte that can be read is kept; pages whose bytes are lost stay poisoned, in good memory. The fresh huge pages are
/// the system's: there must be as many free ones.
#[derive(Args)]
pub struct ReplaceArgs {
    #[command(flatten)]
    pub vm: VmArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Any page of a huge page; all of the memslot that have an error if there is none
    #[arg(value_name = "PAGE")]
    pub pages: Vec<u64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum HugeSize {
    #[value(name = "2M")]
    Huge2M,
    #[value(name = "1G")]
    Huge1G,
}

impl From<HugeSize> for Backing {
    fn from(size: HugeSize) -> Self {
        match size {
            HugeSize::Huge2M => Self::Huge2M,
            HugeSize::Huge1G => Self::Huge1G,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_restore_is_on_one_backing() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(drop);
        assert!(parse("kdp restore --create ram --hugetlb 2M ram.img@4096").is_ok());
        assert!(parse("kdp restore --create ram --shmem --size 64M ram.img").is_ok());
        assert!(parse("kdp restore --create ram ram.img").is_err());
        assert!(parse("kdp restore --create ram --shmem-huge ram.img").is_ok());
        assert!(parse("kdp restore --create ram --shmem --hugetlb 2M ram.img").is_err());
        assert!(parse("kdp restore --create ram --shmem --shmem-huge ram.img").is_err());
        assert!(parse("kdp restore --shmem ram.img").is_err());
    }

    #[test]
    fn a_vm_is_had_in_one_way() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(drop);
        for good in [
            "kdp handle --fd 5 --source tcp:h:1",
            "kdp handle --create ram --size 64M --hugetlb 2M --source file:ram --background --bandwidth 8M",
            "kdp handle --from-keeper unix:/k --source unix:/s --slot 0:0 --slot 1:2G",
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in [
            "kdp handle --source tcp:h:1",
            "kdp handle --fd 5 --listen-fd unix:/x --source tcp:h:1",
            "kdp handle --create ram --size 64M --source tcp:h:1",
            "kdp handle --create ram --shmem --source tcp:h:1",
            "kdp handle --create ram --size 64M --shmem --hugetlb 2M --source tcp:h:1",
            "kdp handle --fd 5 --shmem --source tcp:h:1",
            "kdp handle --fd 5 --source h:1",
            "kdp handle --fd 5 --source tcp:h:1 --bandwidth 5M",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
