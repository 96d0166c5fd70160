//! A machine that runs Linux in the memory of a memslot.
//!
//! It has only what a kernel needs: vCPUs, KVM's interrupt controllers and timer, a serial port for
//! the console, and a virtio balloon. ACPI tables describe them. There is no firmware, no PCI and
//! no disk: the guest runs from its initramfs.
//!
//! The kernel is a bzImage or an ELF file (vmlinux). It must have CONFIG_ACPI and a driver for an
//! 8250 serial port. It needs drivers for virtio-mmio and the virtio balloon, which may be modules
//! in the initramfs. Distributions' kernels have all of these.
//!
//! ```no_run
//! use std::sync::Arc;
//! use kdp_vmm::linux::{Kernel, Machine, Ram, Setup};
//! use kdp_vmm::Backing;
//!
//! # fn main() -> Result<(), kdp_vmm::Error> {
//! let ram = Arc::new(Ram::create(Backing::Shmem, 128 << 20)?);
//! let kernel = Kernel {
//!     image: "vmlinux".into(),
//!     initrd: Some("initrd".into()),
//!     append: String::new(),
//! };
//! let setup = Setup { console: Box::new(std::io::stdout()), requester: None };
//! let mut machine = Machine::boot(ram, 1, &kernel, setup)?;
//! machine.start()?;
//! println!("{:?}", machine.wait(None)?);
//! # Ok(())
//! # }
//! ```

mod acpi;
mod boot;
mod cpuid;
mod devices;
mod dirty;
mod events;
mod gate;
mod kernel;
mod layout;
mod machine;
mod migration;
mod ram;
mod state;
mod vcpu;

pub use boot::Kernel;
pub use devices::{Balloon, Console, HintSink, Statistics};
pub use machine::{Ending, Machine, Setup};
pub use migration::{Incoming, IncomingPager, Outgoing, Pages};
pub use ram::{Paged, Ram, MAX_MEMORY, MIN_MEMORY};

/// Who fetches the pages of a guest whose memory is elsewhere.
pub trait PageRequester: Send + Sync {
    /// The page will be fetched: time to begin, but not to wait.
    fn ask(&self, page: u64) {
        let _ = page;
    }

    /// Returns when the page is there, whoever has brought it, or says why it never will be: then the guest is stopped.
    ///
    /// It is called by several threads at once, for one page, too.
    fn fetch(&self, page: u64) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// How a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// It has reset its machine: by reboot(2), or after a panic.
    Reset,
    /// A triple fault: also a way to reset a machine, but not this one's.
    TripleFault,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reset => "the guest has reset its machine",
            Self::TripleFault => "the guest took a triple fault",
        })
    }
}
