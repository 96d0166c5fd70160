//! The frames of the protocol: how they are written, and how bytes that may be anything are read.

use super::{Content, VERSION};
use crate::{PageRange, PAGE_SIZE};
use std::{fmt, io, io::Write};

/// The bytes before a frame's payload.
pub(super) const HEADER: usize = 12;

/// Pages that one frame of data carries at most.
pub(super) const MAX_DATA_PAGES: u64 = 64;

/// Ranges that one request names at most.
pub(super) const MAX_RANGES: usize = 4096;

/// The longest payload that a client may send.
pub(super) const MAX_TO_SERVER: usize = MAX_RANGES * 16;

/// The longest payload that a server may send.
pub(super) const MAX_TO_CLIENT: usize = 16 + MAX_DATA_PAGES as usize * PAGE_SIZE;

const MAGIC: [u8; 8] = *b"KDPPAGES";
const MAX_TEXT: usize = 1024;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Kind {
    Hello = 1,
    Welcome = 2,
    Request = 3,
    Pages = 4,
    Error = 5,
}

impl Kind {
    fn from_u16(kind: u16) -> Option<Self> {
        [
            Self::Hello,
            Self::Welcome,
            Self::Request,
            Self::Pages,
            Self::Error,
        ]
        .into_iter()
        .find(|known| *known as u16 == kind)
    }
}

/// The codes of error frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Code {
    Version = 1,
    Malformed = 2,
    Checksum = 3,
    Busy = 4,
}

impl Code {
    /// Whether connecting again makes sense.
    pub(super) fn is_transient(code: u32) -> bool {
        code == Self::Checksum as u32 || code == Self::Busy as u32
    }
}

/// What is wrong with bytes that were received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bad {
    pub(super) code: Code,
    pub(super) what: String,
}

impl Bad {
    fn malformed(what: impl Into<String>) -> Self {
        Self {
            code: Code::Malformed,
            what: what.into(),
        }
    }
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// Write a frame whose payload is `parts` put together.
pub(super) fn write_frame(out: &mut impl Write, kind: Kind, parts: &[&[u8]]) -> io::Result<u64> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&(len as u32).to_le_bytes());
    header[4..6].copy_from_slice(&(kind as u16).to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[..8]);
    parts.iter().for_each(|part| crc.update(part));
    header[8..].copy_from_slice(&crc.finalize().to_le_bytes());
    out.write_all(&header)?;
    parts.iter().try_for_each(|part| out.write_all(part))?;
    Ok((HEADER + len) as u64)
}

/// The frame at the beginning of `bytes`: its kind and payload. `None` if it is not complete yet.
pub(super) fn parse_frame(bytes: &[u8], max: usize) -> Result<Option<(Kind, &[u8])>, Bad> {
    let Some((header, rest)) = bytes.split_at_checked(HEADER) else {
        return Ok(None);
    };
    let len = u32_at(header, 0) as usize;
    let kind = u16::from_le_bytes([header[4], header[5]]);
    // Checked before the payload is waited for: garbage must not make anybody wait for gigabytes.
    let known = Kind::from_u16(kind)
        .ok_or_else(|| Bad::malformed(format!("there is no frame of kind {kind}")))?;
    if len > max {
        return Err(Bad::malformed(format!(
            "a frame of {len} bytes, at most {max} are allowed"
        )));
    }
    if header[6..8] != [0, 0] {
        return Err(Bad::malformed("the reserved bytes of a frame are not zero"));
    }
    let Some(payload) = rest.get(..len) else {
        return Ok(None);
    };
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[..8]);
    crc.update(payload);
    let (found, named) = (crc.finalize(), u32_at(header, 8));
    if found != named {
        return Err(Bad {
            code: Code::Checksum,
            what: format!("the checksum of a frame is {found:#010x}, it says {named:#010x}"),
        });
    }
    Ok(Some((known, payload)))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..]
        .iter()
        .take(4)
        .rev()
        .fold(0, |word, byte| (word << 8) | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}

/// The payload of hello, and the first 16 bytes of welcome.
pub(super) fn hello() -> [u8; 16] {
    let mut payload = [0; 16];
    payload[..8].copy_from_slice(&MAGIC);
    payload[8..12].copy_from_slice(&VERSION.to_le_bytes());
    payload[12..].copy_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
    payload
}

/// Check a hello, or the first 16 bytes of a welcome.
pub(super) fn parse_hello(payload: &[u8]) -> Result<(), Bad> {
    if payload.len() != 16 || payload[..8] != MAGIC {
        return Err(Bad::malformed(
            "this is not the greeting of a page source's peer",
        ));
    }
    let (version, page_size) = (u32_at(payload, 8), u32_at(payload, 12));
    if version != VERSION || page_size as usize != PAGE_SIZE {
        return Err(Bad {
            code: Code::Version,
            what: format!(
                "version {version} with pages of {page_size} bytes is not spoken here, version {VERSION} with \
                 pages of {PAGE_SIZE} bytes is: use the same release on both sides"
            ),
        });
    }
    Ok(())
}

/// The number of pages that a welcome tells.
pub(super) fn parse_welcome(payload: &[u8]) -> Result<u64, Bad> {
    if payload.len() != 24 {
        return Err(Bad::malformed(format!(
            "a welcome of {} bytes, not 24",
            payload.len()
        )));
    }
    parse_hello(&payload[..16])?;
    match u64_at(payload, 16) {
        // Page numbers times the page size must not overflow.
        pages if pages <= u64::MAX / PAGE_SIZE as u64 => Ok(pages),
        pages => Err(Bad::malformed(format!("a source of {pages} pages"))),
    }
}

/// The payload of a request.
pub(super) fn request(ranges: &[PageRange]) -> Vec<u8> {
    ranges
        .iter()
        .flat_map(|range| [range.first, range.count])
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// The ranges of a request to a source of `pages` pages.
pub(super) fn parse_request(payload: &[u8], pages: u64) -> Result<Vec<PageRange>, Bad> {
    if payload.is_empty() || payload.len() % 16 != 0 {
        return Err(Bad::malformed(format!(
            "a request of {} bytes: it must have 16 for each range, and at least one range",
            payload.len()
        )));
    }
    payload
        .chunks_exact(16)
        .map(|chunk| PageRange::new(u64_at(chunk, 0), u64_at(chunk, 8)))
        .map(|range| match range {
            PageRange { count: 0, .. } => Err(Bad::malformed(format!(
                "a range of 0 pages, at page {}",
                range.first
            ))),
            _ if range.first >= pages || range.count > pages - range.first => {
                Err(Bad::malformed(format!(
                    "{} pages from page {}: the source has {pages}",
                    range.count, range.first
                )))
            }
            _ => Ok(range),
        })
        .collect()
}

/// Write a frame of pages.
pub(super) fn write_pages(
    out: &mut impl Write,
    range: PageRange,
    content: Content<'_>,
) -> io::Result<u64> {
    let errno;
    let (encoding, data): (u32, &[u8]) = match content {
        Content::Data(data) => (0, data),
        Content::Zero => (1, &[]),
        Content::Failed(code) => {
            errno = code.to_le_bytes();
            (2, &errno)
        }
    };
    let mut head = [0; 16];
    head[..8].copy_from_slice(&range.first.to_le_bytes());
    head[8..12].copy_from_slice(&(range.count as u32).to_le_bytes());
    head[12..].copy_from_slice(&encoding.to_le_bytes());
    write_frame(out, Kind::Pages, &[&head, data])
}

/// What a frame of pages from a source of `pages` pages says.
pub(super) fn parse_pages(payload: &[u8], pages: u64) -> Result<(PageRange, Content<'_>), Bad> {
    let Some((head, data)) = payload.split_at_checked(16) else {
        return Err(Bad::malformed(format!(
            "pages in a frame of {} bytes",
            payload.len()
        )));
    };
    let range = PageRange::new(u64_at(head, 0), u32_at(head, 8).into());
    if range.is_empty() || range.first >= pages || range.count > pages - range.first {
        return Err(Bad::malformed(format!(
            "{} pages from page {}: the source has {pages}",
            range.count, range.first
        )));
    }
    let content = match (u32_at(head, 12), data.len()) {
        (0, len) if len as u64 == range.count * PAGE_SIZE as u64 => Content::Data(data),
        (1, 0) => Content::Zero,
        (2, 4) => Content::Failed(u32_at(data, 0) as i32),
        (encoding, len) => {
            return Err(Bad::malformed(format!(
                "{} pages of encoding {encoding} with {len} bytes",
                range.count
            )))
        }
    };
    Ok((range, content))
}

/// Write an error frame.
pub(super) fn write_error(out: &mut impl Write, bad: &Bad) -> io::Result<u64> {
    let text = &bad.what.as_bytes()[..bad.what.len().min(MAX_TEXT)];
    write_frame(out, Kind::Error, &[&(bad.code as u32).to_le_bytes(), text])
}

/// The code and the text of an error frame.
pub(super) fn parse_error(payload: &[u8]) -> (u32, String) {
    let text = payload.get(4..).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[..text.len().min(MAX_TEXT)]);
    // It is shown to people: no control characters of a stranger's.
    (u32_at(payload, 0), text.replace(char::is_control, " "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write_frame(&mut out, kind, &[payload]).unwrap();
        out
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), pages: u64) {
            let _ = parse_frame(&bytes, MAX_TO_SERVER);
            let _ = parse_hello(&bytes);
            let _ = parse_welcome(&bytes);
            let _ = parse_request(&bytes, pages);
            let _ = parse_pages(&bytes, pages);
            let _ = parse_error(&bytes);
        }

        #[test]
        fn a_changed_byte_is_found(payload in prop::collection::vec(any::<u8>(), 0..100), at: prop::sample::Index, flip in 1u8..) {
            let good = frame(Kind::Request, &payload);
            prop_assert_eq!(parse_frame(&good, 100), Ok(Some((Kind::Request, &payload[..]))));
            for short in 0..good.len() {
                prop_assert_eq!(parse_frame(&good[..short], 100), Ok(None));
            }
            let mut bad = good.clone();
            bad[at.index(good.len())] ^= flip;
            // A length that grew makes the frame incomplete; everything else is an error.
            prop_assert!(!matches!(parse_frame(&bad, 100), Ok(Some(_))));
        }

        #[test]
        fn requests_survive(ranges in prop::collection::vec((0u64..1000, 1u64..1000), 1..20)) {
            let ranges: Vec<PageRange> = ranges.into_iter().map(|(first, count)| PageRange::new(first, count)).collect();
            prop_assert_eq!(parse_request(&request(&ranges), 2000), Ok(ranges));
        }
    }

    #[test]
    fn requests_outside_the_source_are_refused_with_their_values() {
        for (first, count) in [
            (10, 0),
            (100, 1),
            (99, 2),
            (u64::MAX, u64::MAX),
            (0, u64::MAX),
        ] {
            let bad = parse_request(&request(&[PageRange::new(first, count)]), 100).unwrap_err();
            assert_eq!(bad.code, Code::Malformed);
            assert!(bad.what.contains(&first.to_string()), "{bad}");
        }
        assert!(parse_request(&[], 100).is_err());
        assert!(parse_request(&[0; 15], 100).is_err());
    }

    #[test]
    fn versions() {
        let mut other = hello();
        other[8] = 9;
        let bad = parse_hello(&other).unwrap_err();
        assert_eq!(bad.code, Code::Version);
        assert!(bad.what.contains("version 9"), "{bad}");
        assert_eq!(parse_hello(&hello()), Ok(()));
    }

    #[test]
    fn contents_survive() {
        let data = [7; 2 * PAGE_SIZE];
        for content in [Content::Data(&data), Content::Zero, Content::Failed(5)] {
            let mut out = Vec::new();
            write_pages(&mut out, PageRange::new(3, 2), content).unwrap();
            let (kind, payload) = parse_frame(&out, MAX_TO_CLIENT).unwrap().unwrap();
            assert_eq!(kind, Kind::Pages);
            assert_eq!(parse_pages(payload, 5), Ok((PageRange::new(3, 2), content)));
            assert!(parse_pages(payload, 4).is_err());
            assert!(parse_pages(&payload[..payload.len() - 1], 5).is_err());
        }
    }
}
