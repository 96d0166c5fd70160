//! Where pages come from: a snapshot's file, read here or served by another machine.
//!
//! A source is an array of pages of 4096 bytes that does not change. Which page of a source belongs to which
//! page of a memslot is the handler's matter (see [`handler`](crate::handler)).
//!
//! [`PageSource`] is what a handler needs: ask for ranges, receive pages, in any order. [`Client`] asks a
//! [`Server`] over TCP or a Unix socket; [`FileSource`] reads a file of this machine.
//!
//! # The protocol
//!
//! All integers are little-endian. Both sides send *frames*:
//!
//! | bytes  | what                                                                    |
//! |--------|-------------------------------------------------------------------------|
//! | 0..4   | length of the payload in bytes                                          |
//! | 4..6   | kind                                                                    |
//! | 6..8   | 0                                                                       |
//! | 8..12  | CRC-32 (IEEE) of the 8 bytes before and of the payload                  |
//! | 12..   | the payload                                                             |
//!
//! The client speaks first, with `hello`; the server answers with `welcome`; from then on the client sends
//! `request`s, as many as it likes without waiting, and the server answers them with `pages`, each of which
//! names the pages that it carries.
//!
//! | kind | name    | payload                                                                       |
//! |------|---------|-------------------------------------------------------------------------------|
//! | 1    | hello   | the 8 bytes `KDPPAGES`, version (u32, 1), page size in bytes (u32, 4096)      |
//! | 2    | welcome | the same 16 bytes, number of pages in the source (u64)                        |
//! | 3    | request | 1 to 4096 ranges, each first page (u64) and number of pages (u64, not 0)      |
//! | 4    | pages   | first page (u64), number of pages (u32), encoding (u32), what encoding says   |
//! | 5    | error   | code (u32), the reason as UTF-8 for people (at most 1024 bytes)               |
//!
//! Encodings: 0, the bytes of the pages follow (at most 64 pages); 1, the pages are all zeros, nothing
//! follows; 2, the source cannot read the pages, its errno follows (u32).
//!
//! After an `error` the server closes the connection. Codes: 1, unknown version or page size; 2, a frame or
//! request that makes no sense; 3, a checksum that is wrong; 4, too many clients. After 3 and 4 it is
//! sensible to connect again.
//!
//! Nothing is encrypted and nobody is authenticated: use it on a network of your own, or through a tunnel.

mod attempt;
mod client;
mod file;
mod net;
mod proto;
mod ranges;
mod server;

pub use client::{Client, Options};
pub use file::{FileSource, PageFile};
pub use net::{bind_unix, Address};
pub use ranges::RangeSet;
pub use server::{Control, Server, ServerCounters};

use crate::PageRange;
use std::{io, path::PathBuf, str::FromStr, time::Duration};

/// The version of the protocol that this crate speaks.
pub const VERSION: u32 = 1;

/// Why pages could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or a socket failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The server refused, and said why.
    #[error("the page source at {address} refuses (code {code}): {text}")]
    Refused {
        /// The server.
        address: String,
        /// The code of its error.
        code: u32,
        /// The reason it gave.
        text: String,
    },
    /// The other side does not keep to the protocol.
    #[error("the peer at {address} does not keep to the protocol: {what}")]
    Protocol {
        /// The peer.
        address: String,
        /// What it did.
        what: String,
    },
    /// No connection could be made for too long.
    #[error("no page source could be reached at {address} for {seconds} s: {source}: start 'kdp serve' there, or check the address")]
    Unreachable {
        /// The server.
        address: String,
        /// How long it was tried.
        seconds: u64,
        /// How the last attempt failed.
        source: io::Error,
    },
    /// An argument makes no sense.
    #[error("{0}")]
    Argument(String),
    /// [`PageSource::stop`] was called.
    #[error("stopped")]
    Stopped,
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// What a source says about some pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// Their bytes.
    Data(&'a [u8]),
    /// All zeros.
    Zero,
    /// They cannot be read: the errno.
    Failed(i32),
}

/// What a source has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Bytes received (of a file: read).
    pub bytes: u64,
    /// Times that a broken connection was made again.
    pub reconnects: u64,
    /// Pages that arrived though nobody waited for them (any more).
    pub unwanted: u64,
}

/// Pages that can be asked for.
///
/// One thread calls [`recv`](PageSource::recv); any may ask.
pub trait PageSource: Send + Sync {
    /// How many pages the source has.
    fn pages(&self) -> u64;

    /// Ask for some pages. It does not wait for them. Pages that were asked for and have not come yet are
    /// not asked for twice.
    fn request(&self, ranges: &[PageRange]) -> Result<(), Error>;

    /// Wait until something that was asked for is there, but at most `timeout`, and give all that is there
    /// to `sink`. How many runs those were.
    fn recv(
        &self,
        timeout: Duration,
        sink: &mut dyn FnMut(PageRange, Content<'_>),
    ) -> Result<usize, Error>;

    /// Make [`recv`](PageSource::recv) and all that follows fail with [`Error::Stopped`].
    fn stop(&self);

    /// What was counted.
    fn counters(&self) -> Counters;
}

/// Refuse ranges that are not in a source of `pages` pages.
fn check_ranges(ranges: &[PageRange], pages: u64) -> Result<(), Error> {
    match ranges
        .iter()
        .find(|range| range.is_empty() || range.first >= pages || range.count > pages - range.first)
    {
        None => Ok(()),
        Some(range) => Err(Error::Argument(format!(
            "{} pages from page {} of a source of {pages} pages",
            range.count, range.first
        ))),
    }
}

/// Where a source is, as it is written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// `tcp:HOST:PORT` or `unix:PATH`: a server.
    Server(Address),
    /// `file:PATH` or `file:PATH@OFFSET`: a file of this machine, from an offset in bytes.
    File {
        /// The file.
        path: PathBuf,
        /// Where in it page 0 is, in bytes.
        offset: u64,
    },
}

impl Location {
    /// Connect to it, or open it.
    pub fn open(&self, options: &Options) -> Result<Box<dyn PageSource>, Error> {
        match self {
            Self::Server(address) => {
                Ok(Box::new(Client::connect(address.clone(), options.clone())?))
            }
            Self::File { path, offset } => {
                Ok(Box::new(FileSource::new(PageFile::open(path, *offset)?)))
            }
        }
    }
}

impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("file:") {
            Some(file) => {
                let (path, offset) = file::parse_path_at(file)?;
                Ok(Self::File { path, offset })
            }
            None if text.starts_with("tcp:") || text.starts_with("unix:") => {
                text.parse().map(Self::Server)
            }
            None => Err(format!(
                "'{text}' is no source: it must be tcp:HOST:PORT, unix:PATH or file:PATH[@OFFSET]"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations() {
        assert_eq!(
            "tcp:10.0.0.1:7000".parse(),
            Ok(Location::Server(Address::Tcp("10.0.0.1:7000".into())))
        );
        assert_eq!(
            "unix:/run/x".parse(),
            Ok(Location::Server(Address::Unix("/run/x".into())))
        );
        let file = |path: &str, offset| Location::File {
            path: path.into(),
            offset,
        };
        assert_eq!("file:ram".parse(), Ok(file("ram", 0)));
        assert_eq!("file:ram@8192".parse(), Ok(file("ram", 8192)));
        assert_eq!("file:a@b".parse(), Ok(file("a@b", 0)));
        for bad in [
            "",
            "ram",
            "http:x",
            "tcp:",
            "tcp:host",
            "unix:",
            "file:",
            "file:x@100",
        ] {
            assert!(bad.parse::<Location>().is_err(), "{bad}");
        }
    }
}
