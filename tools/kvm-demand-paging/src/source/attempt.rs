//! One attempt to reach a server: greeting it, asking it, and what its failures mean.

use super::{
    net::Stream,
    proto::{self, Bad, Code, Kind},
    Address, Error, Options,
};
use crate::PageRange;
use std::{io, io::Read, time::Instant};

/// Why an attempt failed: a network that may get better, or a peer that will not.
pub(super) enum Attempt {
    Again(io::Error),
    Fatal(Error),
}

pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

pub(super) fn unreachable(address: &Address, since: Instant, source: io::Error) -> Error {
    Error::Unreachable {
        address: address.to_string(),
        seconds: since.elapsed().as_secs().max(1),
        source,
    }
}

pub(super) fn refusal(address: &Address, payload: &[u8]) -> Attempt {
    let (code, text) = proto::parse_error(payload);
    if proto::Code::is_transient(code) {
        return Attempt::Again(io::Error::other(text));
    }
    Attempt::Fatal(Error::Refused {
        address: address.to_string(),
        code,
        text,
    })
}

/// Ask for ranges. If that fails the connection is broken: `recv` finds that out and asks again.
pub(super) fn ask(sender: &mut Option<Stream>, ranges: &[PageRange]) {
    let Some(stream) = sender else {
        return;
    };
    for chunk in ranges.chunks(proto::MAX_RANGES) {
        // One write, so that it leaves as one packet.
        let mut frame = Vec::with_capacity(proto::HEADER + chunk.len() * 16);
        let written = proto::write_frame(&mut frame, Kind::Request, &[&proto::request(chunk)])
            .and_then(|_| io::Write::write_all(&mut &*stream, &frame));
        if written.is_err() {
            stream.shutdown();
            *sender = None;
            return;
        }
    }
}

/// Connect and greet; the stream and the number of pages of the source.
pub(super) fn greet(address: &Address, options: &Options) -> Result<(Stream, u64), Attempt> {
    let stream = Stream::connect(address, options.connect_timeout).map_err(Attempt::Again)?;
    let timeout = Some(options.connect_timeout);
    stream
        .set_timeouts(timeout, timeout)
        .map_err(Attempt::Again)?;
    proto::write_frame(&mut &stream, Kind::Hello, &[&proto::hello()]).map_err(Attempt::Again)?;
    let mut input = Vec::new();
    loop {
        let bad = match proto::parse_frame(&input, proto::MAX_TO_CLIENT) {
            Ok(Some((Kind::Welcome, payload))) => match proto::parse_welcome(payload) {
                Ok(pages) => return Ok((stream, pages)),
                Err(bad) => bad,
            },
            Ok(Some((Kind::Error, payload))) => return Err(refusal(address, payload)),
            Ok(Some((kind, _))) => Bad {
                code: Code::Malformed,
                what: format!("it answers a greeting with {kind:?}"),
            },
            Ok(None) => {
                // No more than the answer is read: pages come only after a request.
                let mut chunk = [0; 4096];
                match (&stream).read(&mut chunk).map_err(Attempt::Again)? {
                    0 => return Err(Attempt::Again(io::ErrorKind::UnexpectedEof.into())),
                    len => input.extend_from_slice(&chunk[..len]),
                }
                continue;
            }
            Err(bad) => bad,
        };
        if bad.code == Code::Checksum {
            return Err(Attempt::Again(io::Error::new(
                io::ErrorKind::InvalidData,
                bad.what,
            )));
        }
        return Err(Attempt::Fatal(Error::Protocol {
            address: address.to_string(),
            what: bad.what,
        }));
    }
}
