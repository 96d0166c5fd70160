//! The error of everything that talks to the module or maps memory.

use std::io;

/// What went wrong, with which argument, and what to do about it where that is known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error("{call}({argument}): {source}{}", next_step(.hint))]
    Sys {
        /// The system call or ioctl.
        call: &'static str,
        /// Its argument, as a reader would write it.
        argument: String,
        /// What the kernel answered.
        source: io::Error,
        /// What to do about it, if that is known.
        hint: Option<String>,
    },
    /// A change of page states failed, maybe half-way.
    #[error(
        "KDP_MARK({argument}): {source}, after {done} ranges with {changed} pages changed{}",
        next_step(.hint)
    )]
    Mark {
        /// The memslot, the state and the ranges.
        argument: String,
        /// Ranges that were done wholly.
        done: u32,
        /// Pages whose state was changed.
        changed: u64,
        /// What the kernel answered.
        source: io::Error,
        /// What to do about it, if that is known.
        hint: Option<String>,
    },
    /// The module speaks another version of the ABI.
    #[error(
        "the module has version {module} of the ABI, this program was built for {program}: \
         install both from the same release"
    )]
    Version {
        /// The module's version.
        module: u32,
        /// The version that this crate was built with.
        program: u32,
    },
    /// An argument was refused before it reached the kernel.
    #[error("{0}")]
    Argument(String),
    /// A peer on a socket sent what it should not, or nothing.
    #[error("{0}")]
    Peer(String),
}

impl Error {
    /// The errno, where a system call failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Sys { source, .. } | Self::Mark { source, .. } => source.raw_os_error(),
            Self::Version { .. } | Self::Argument(_) | Self::Peer(_) => None,
        }
    }

    /// An error without a known next step.
    pub(crate) fn sys(
        call: &'static str,
        argument: impl Into<String>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Sys {
            call,
            argument: argument.into(),
            source: source.into(),
            hint: None,
        }
    }

    /// The same error with a next step, if there is one.
    pub(crate) fn advise(mut self, next: Option<String>) -> Self {
        if let Self::Sys { hint, .. } | Self::Mark { hint, .. } = &mut self {
            *hint = next;
        }
        self
    }
}

fn next_step(hint: &Option<String>) -> String {
    hint.as_ref()
        .map(|hint| format!(": {hint}"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn one_line_with_call_argument_value_and_next_step() {
        let error = Error::sys("KDP_MEMSLOT_REMOVE", "memslot 7", Errno::NOENT)
            .advise(Some("there is none of this id".into()));
        assert_eq!(
            error.to_string(),
            "KDP_MEMSLOT_REMOVE(memslot 7): No such file or directory (os error 2): there is none of this id"
        );
        assert_eq!(error.errno(), Some(2));
    }
}
