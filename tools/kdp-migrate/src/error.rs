//! What can go wrong, and where the guest is then.

use std::fmt;

/// What a machine could not do.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// Why a migration failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Argument(String),
    /// The other side does not take part.
    #[error("the {peer} refuses (code {code}): {text}")]
    Refused {
        /// Who.
        peer: &'static str,
        /// Its code.
        code: u32,
        /// Its words.
        text: String,
    },
    /// The other side speaks another version of the protocol.
    #[error("the {peer} is of another release: {what}")]
    Version {
        /// Who.
        peer: &'static str,
        /// Which version, and which is spoken here.
        what: String,
    },
    /// The other side says what cannot be.
    #[error("the {peer} says what cannot be: {what}")]
    Malformed {
        /// Who.
        peer: &'static str,
        /// What.
        what: String,
    },
    /// There was no working connection for too long.
    #[error("the {peer} was not to be reached for {seconds:.1} s, the last time because: {why}")]
    Lost {
        /// Who.
        peer: &'static str,
        /// For how long.
        seconds: f64,
        /// What came of the last try.
        why: String,
    },
    /// The source answers, but not with a page that was asked for.
    #[error("page {page} was asked for {seconds:.1} s ago, and the source did not bring it")]
    NeverCame {
        /// The page.
        page: u64,
        /// For how long.
        seconds: f64,
    },
    /// This side's VMM failed.
    #[error("the VMM could not {doing}: {source}")]
    Machine {
        /// What it was to do.
        doing: &'static str,
        /// What it says.
        source: MachineError,
    },
    /// The socket that the destination listens on.
    #[error("the destination cannot listen: {0}")]
    Listen(std::io::Error),
}

impl Error {
    pub(crate) fn machine(doing: &'static str) -> impl FnOnce(MachineError) -> Self {
        move |source| Self::Machine { doing, source }
    }
}

/// Where the guest of a source is after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guest {
    /// It runs here, as before.
    RunsHere,
    /// It was handed over, and must not run here any more: it may run at the destination.
    HandedOver,
    /// It stopped here and could not be made to run again; it does not run at the destination either.
    StoppedHere,
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RunsHere => "the guest runs on here",
            Self::HandedOver => {
                "the guest was handed over and does not run here any more: look at the destination"
            }
            Self::StoppedHere => "the guest is stopped here, and runs nowhere",
        })
    }
}

/// A migration that failed, at its source.
#[derive(Debug)]
pub struct Failure {
    /// Why.
    pub error: Error,
    /// Where the guest is.
    pub guest: Guest,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.error, self.guest)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}
