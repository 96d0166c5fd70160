//! What can go wrong, each with what was tried and, where there is one, the way out.

use std::io;

use kvm_demand_paging::source;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A parameter that cannot be served; the text says which, why and what would do.
    #[error("{0}")]
    Invalid(String),

    /// A system call failed.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// The errno.
        source: io::Error,
    },

    /// The device failed, or a memfd.
    #[error(transparent)]
    Paging(#[from] kvm_demand_paging::Error),

    /// The source of pages failed.
    #[error(transparent)]
    Source(#[from] source::Error),

    /// The guest left KVM_RUN in a way that none of the programs does on purpose.
    #[error("vCPU {vcpu} stopped at rip {rip:#x}: {what}")]
    Guest {
        /// Which vCPU.
        vcpu: u64,
        /// Its instruction pointer.
        rip: u64,
        /// How it stopped.
        what: String,
    },

    /// The guest did not end in time.
    #[error("the guest did not end within {seconds} s: {waiting}")]
    TimedOut {
        /// The limit.
        seconds: u64,
        /// Who was still running.
        waiting: String,
    },
}

impl Error {
    pub(crate) fn os(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Os {
            what: what.into(),
            source: source.into(),
        }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid(what.into())
    }
}

/// kvm-ioctls has an errno type of its own.
pub(crate) fn kvm(what: &str) -> impl FnOnce(kvm_ioctls::Error) -> Error + '_ {
    move |e| Error::os(what, io::Error::from_raw_os_error(e.errno()))
}
