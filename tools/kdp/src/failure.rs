//! What ends the command with status 1: one line that says what, which value, and what to do next.

use kvm_demand_paging::{handler, source};
use std::{fmt::Display, io};

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Module(#[from] kvm_demand_paging::Error),
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error(transparent)]
    Handler(#[from] handler::Error),
    #[error(transparent)]
    Generate(kdp_cli::Error),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{0}")]
    Other(String),
}

/// Says on what an I/O operation failed.
pub trait Context<T> {
    fn on(self, what: impl Display) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn on(self, what: impl Display) -> Result<T, Failure> {
        self.map_err(|source| Failure::Io {
            what: what.to_string(),
            source: source.into(),
        })
    }
}
