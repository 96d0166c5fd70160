//! The protocol: messages, how they become bytes, and how bytes that may be anything are read.
//!
//! A frame is a header of 12 bytes (length of the payload, kind, number, CRC-32 of all that and the payload; little
//! endian, as everything here) and a payload. It is the frame of the page sources' protocol, with other kinds, and numbers:
//! those of each way of a connection are counted from 0, modulo 65,536. A frame that is lost, or comes twice, ends its connection
//! as one that is damaged does: a peer that took it for what it is not would lose count of what the other side has.

use crate::{Layout, Slot};
use kvm_demand_paging::{PageRange, PAGE_SIZE};
use std::{fmt, str::FromStr};

/// The protocol's version. Both sides must speak the same.
pub const VERSION: u32 = 4;

/// The bytes before a frame's payload.
pub const HEADER: usize = 12;

/// Pages that one frame carries at most.
pub const MAX_PAGES: u64 = 64;

/// Ranges that one request names at most.
pub const MAX_RANGES: usize = 4096;

/// Words of each bitmap that one frame carries at most.
pub const MAX_WORDS: usize = 1024;

/// Bytes of the state that one frame carries at most.
pub const MAX_CHUNK: usize = 256 << 10;

/// The longest payload that a destination is sent, and that a source is.
pub const MAX_PAYLOAD: usize = 16 + MAX_PAGES as usize * PAGE_SIZE;

const MAGIC: [u8; 8] = *b"KDPMIGRT";
const MAX_TEXT: usize = 1024;

// The longest of the others fits.
const _: () = assert!(MAX_CHUNK + 8 <= MAX_PAYLOAD && MAX_RANGES * 16 <= MAX_PAYLOAD);
const _: () = assert!(crate::layout::MAX_SLOTS * 24 + 48 <= MAX_PAYLOAD);

/// Which migration a connection is of. It is random: a wrong peer is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    /// A new one.
    pub fn random() -> Self {
        let mut id = [0; 16];
        // It fails before the kernel's generator is seeded only if it is not to wait: it is.
        while rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()) != Ok(16) {}
        Self(id)
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for MigrationId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        u128::from_str_radix(text, 16)
            .ok()
            .filter(|_| digits)
            .map(|id| Self(id.to_be_bytes()))
            .ok_or_else(|| {
                format!("'{text}' is no id of a migration: it must be 32 hexadecimal digits")
            })
    }
}

/// The codes of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// Another version of the protocol.
    Version = 1,
    /// Bytes that mean nothing.
    Malformed = 2,
    /// Bytes that were damaged.
    Checksum = 3,
    /// Another migration.
    Identity = 4,
    /// Other memory.
    Layout = 5,
    /// The VMM could not.
    Machine = 6,
    /// The migration was given up.
    Cancelled = 7,
}

impl Code {
    /// Whether a new connection may help: bytes that were damaged on their way look like nonsense.
    pub fn is_transient(code: u32) -> bool {
        code == Self::Checksum as u32 || code == Self::Malformed as u32
    }
}

/// What is wrong with bytes that were received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    /// What kind of wrong.
    pub code: Code,
    /// In words.
    pub what: String,
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

fn malformed(what: impl Into<String>) -> Bad {
    Bad {
        code: Code::Malformed,
        what: what.into(),
    }
}

/// How far a destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Stage {
    /// It takes pages, again and again.
    Copying = 0,
    /// It has the state, and loads it.
    Loading = 1,
    /// It waits for the order to run the guest.
    Ready = 2,
    /// It runs the guest, or is about to.
    Running = 3,
}

impl Stage {
    fn from_u32(stage: u32) -> Option<Self> {
        [Self::Copying, Self::Loading, Self::Ready, Self::Running]
            .into_iter()
            .find(|known| *known as u32 == stage)
    }
}

/// What a destination has of what was sent over the connections before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Had {
    /// So many frames of pages.
    Frames(u64),
    /// It took the place of one that runs the guest, and knows nothing of its frames; with this connection they are
    /// counted from 0. So many pages are here: those that [`Message::Here`] has told of, no more.
    Pages(u64),
}

/// Why pages are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Reason {
    /// The guest runs at the source.
    PreCopy = 0,
    /// They were asked for.
    Requested = 1,
    /// All must be sent some time.
    Background = 2,
}

impl Reason {
    fn from_u16(reason: u16) -> Option<Self> {
        [Self::PreCopy, Self::Requested, Self::Background]
            .into_iter()
            .find(|known| *known as u16 == reason)
    }
}

/// What a frame of pages carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data<'a> {
    /// Their bytes.
    Bytes(&'a [u8]),
    /// They are zeros.
    Zero,
    /// Their bytes are lost.
    Lost,
}

/// What only a destination can measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Pages that somebody touched and had to wait for.
    pub faults: u64,
    /// From a touch to the page: the median, in microseconds.
    pub fault_p50_us: u64,
    /// The same, the 99th percentile.
    pub fault_p99_us: u64,
    /// The same, the longest.
    pub fault_max_us: u64,
    /// Pages that came when they were present already.
    pub pages_too_late: u64,
    /// From the order to run to the last page, in microseconds.
    pub postcopy_us: u64,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// To the destination: the first of a connection.
    Hello {
        /// Which migration.
        id: MigrationId,
        /// Whether a destination must know it already.
        resume: bool,
        /// The guest's memory.
        layout: Layout,
    },
    /// To the source: these pages are here. Before the welcome, which tells how many those are in all.
    Here {
        /// Of which page the lowest bit of the first word tells: a multiple of 64.
        first: u64,
        /// A bit for each page that is here.
        words: Vec<u64>,
    },
    /// To the source: the answer.
    Welcome {
        /// The same.
        id: MigrationId,
        /// How far it is.
        stage: Stage,
        /// What it has. [`Had::Pages`] only if it has the guest's state, too.
        had: Had,
    },
    /// To the destination.
    Pages {
        /// Which.
        pages: PageRange,
        /// Why.
        reason: Reason,
        /// What they hold.
        data: Data<'a>,
    },
    /// To the destination: what it has of these pages is worth nothing; and these are free.
    Map {
        /// Of which page the lowest bit of the first words tells: a multiple of 64.
        first: u64,
        /// A bit for each page that is stale.
        stale: Vec<u64>,
        /// A bit for each page that is free, in as many words.
        free: Vec<u64>,
    },
    /// To the destination: a piece of the state.
    State {
        /// Where it begins.
        offset: u64,
        /// The piece.
        bytes: &'a [u8],
    },
    /// To the destination: that was all the state; load it.
    Prepare {
        /// Its bytes.
        len: u64,
        /// Their CRC-32.
        crc: u32,
    },
    /// To the source: loaded.
    Ready,
    /// To the destination: the guest is yours. Who has sent it never runs the guest again.
    Go,
    /// To the source: it runs.
    Started,
    /// To the source: pages are wanted.
    Request(Vec<PageRange>),
    /// To the source: how many frames of pages there have been, over all connections, or as [`Had::Pages`] says.
    Ack(u64),
    /// To the destination: every page was sent, or is free.
    AllSent,
    /// To the source: the guest runs at the destination, which has every page. It may arrive before
    /// [`Started`](Self::Started).
    Done(Figures),
    /// To the destination: seen.
    Bye,
    /// To the destination: tell that you are there, by an ack.
    Ping,
    /// To either: this connection, or this migration, is over.
    Error {
        /// A [`Code`], perhaps of a later version.
        code: u32,
        /// In words.
        text: String,
    },
}

const HELLO: u16 = 1;
const WELCOME: u16 = 2;
const PAGES: u16 = 3;
const MAP: u16 = 4;
const STATE: u16 = 5;
const PREPARE: u16 = 6;
const READY: u16 = 7;
const GO: u16 = 8;
const STARTED: u16 = 9;
const REQUEST: u16 = 10;
const ACK: u16 = 11;
const ALL_SENT: u16 = 12;
const DONE: u16 = 13;
const BYE: u16 = 14;
const PING: u16 = 15;
const ERROR: u16 = 16;
const HERE: u16 = 17;

/// Writes a payload behind a header that is filled in at the end.
struct Writer<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
}

impl Writer<'_> {
    fn u16(&mut self, value: u16) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }
    fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }
    fn finish(self, kind: u16, number: u16) {
        let (start, len) = (self.start, self.out.len() - self.start - HEADER);
        self.out[start..start + 4].copy_from_slice(&(len as u32).to_le_bytes());
        self.out[start + 4..start + 6].copy_from_slice(&kind.to_le_bytes());
        self.out[start + 6..start + 8].copy_from_slice(&number.to_le_bytes());
        let crc = checksum(&self.out[start..start + 8], &self.out[start + HEADER..]);
        self.out[start + 8..start + 12].copy_from_slice(&crc.to_le_bytes());
    }
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    crc.update(payload);
    crc.finalize()
}

/// Reads a payload from its beginning on.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}

/// Put a message's frame behind what is in `out`. So many frames went this way over the connection before.
pub fn encode(message: &Message<'_>, number: u16, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER]);
    let mut to = Writer { out, start };
    let kind = match message {
        Message::Hello { id, resume, layout } => {
            to.bytes(&MAGIC);
            to.u32(VERSION);
            to.u32(PAGE_SIZE as u32);
            to.bytes(&id.0);
            to.u32((*resume).into());
            to.u32(layout.0.len() as u32);
            for slot in &layout.0 {
                to.u32(slot.id);
                to.u32(slot.backing_shift);
                to.u64(slot.gfn);
                to.u64(slot.pages);
            }
            HELLO
        }
        Message::Welcome { id, stage, had } => {
            to.bytes(&MAGIC);
            to.u32(VERSION);
            to.u32(*stage as u32);
            to.bytes(&id.0);
            let (kind, count) = match had {
                Had::Frames(count) => (0, count),
                Had::Pages(count) => (1, count),
            };
            to.u32(kind);
            to.u64(*count);
            WELCOME
        }
        Message::Here { first, words } => {
            to.u64(*first);
            words.iter().for_each(|word| to.u64(*word));
            HERE
        }
        Message::Pages {
            pages,
            reason,
            data,
        } => {
            let (encoding, bytes): (u16, &[u8]) = match data {
                Data::Bytes(bytes) => (0, bytes),
                Data::Zero => (1, &[]),
                Data::Lost => (2, &[]),
            };
            to.u64(pages.first);
            to.u32(pages.count as u32);
            to.u16(*reason as u16);
            to.u16(encoding);
            to.bytes(bytes);
            PAGES
        }
        Message::Map { first, stale, free } => {
            to.u64(*first);
            stale.iter().chain(free).for_each(|word| to.u64(*word));
            MAP
        }
        Message::State { offset, bytes } => {
            to.u64(*offset);
            to.bytes(bytes);
            STATE
        }
        Message::Prepare { len, crc } => {
            to.u64(*len);
            to.u32(*crc);
            PREPARE
        }
        Message::Ready => READY,
        Message::Go => GO,
        Message::Started => STARTED,
        Message::Request(ranges) => {
            for range in ranges {
                to.u64(range.first);
                to.u64(range.count);
            }
            REQUEST
        }
        Message::Ack(had) => {
            to.u64(*had);
            ACK
        }
        Message::AllSent => ALL_SENT,
        Message::Done(figures) => {
            to.u64(figures.faults);
            to.u64(figures.fault_p50_us);
            to.u64(figures.fault_p99_us);
            to.u64(figures.fault_max_us);
            to.u64(figures.pages_too_late);
            to.u64(figures.postcopy_us);
            DONE
        }
        Message::Bye => BYE,
        Message::Ping => PING,
        Message::Error { code, text } => {
            to.u32(*code);
            to.bytes(&text.as_bytes()[..text.len().min(MAX_TEXT)]);
            ERROR
        }
    };
    to.finish(kind, number);
}

/// The frame at the beginning of `bytes`: its message, and how long it is. `None` if it is not complete yet. So many frames
/// came this way over the connection before.
///
/// # Errors
///
/// Whatever `bytes` are, they are either that or an error. It allocates no more than a frame may be long.
pub fn decode(bytes: &[u8], number: u16) -> Result<Option<(Message<'_>, usize)>, Bad> {
    let Some(head) = head(bytes)? else {
        return Ok(None);
    };
    let Some(payload) = bytes[HEADER..].get(..head.len as usize) else {
        return Ok(None);
    };
    let found = checksum(&bytes[..8], payload);
    if found != head.checksum {
        return Err(Bad {
            code: Code::Checksum,
            what: format!(
                "the checksum of a frame is {found:#010x}, it says {:#010x}",
                head.checksum
            ),
        });
    }
    if head.number != number {
        return Err(malformed(format!(
            "frame {} came where {number} was next: frames were lost, or came twice",
            head.number
        )));
    }
    let message = parse(head.kind, payload)?.ok_or_else(|| {
        malformed(format!(
            "a frame of kind {} with {} bytes",
            head.kind, head.len
        ))
    })?;
    Ok(Some((message, HEADER + head.len as usize)))
}

/// Whether `bytes` begin with all of a frame, be it a right one or not: cheaper than to decode it.
pub(crate) fn is_whole(bytes: &[u8]) -> Result<bool, Bad> {
    Ok(head(bytes)?.is_some_and(|head| bytes.len() - HEADER >= head.len as usize))
}

struct Head {
    len: u32,
    kind: u16,
    number: u16,
    checksum: u32,
}

/// The header of a frame, if it is all there.
fn head(bytes: &[u8]) -> Result<Option<Head>, Bad> {
    let mut header = Fields(bytes);
    let (Some(len), Some(kind), Some(number), Some(checksum)) =
        (header.u32(), header.u16(), header.u16(), header.u32())
    else {
        return Ok(None);
    };
    // Checked before the payload is waited for: garbage must not make anybody wait for gigabytes.
    if len as usize > MAX_PAYLOAD {
        return Err(malformed(format!(
            "a frame of {len} bytes, at most {MAX_PAYLOAD} are allowed"
        )));
    }
    if !(HELLO..=HERE).contains(&kind) {
        return Err(malformed(format!("there is no frame of kind {kind}")));
    }
    Ok(Some(Head {
        len,
        kind,
        number,
        checksum,
    }))
}

fn versioned(from: &mut Fields<'_>) -> Result<Option<u32>, Bad> {
    if from.take() != Some(MAGIC) {
        return Err(malformed("this is not the greeting of a migration's peer"));
    }
    match from.u32() {
        Some(VERSION) => Ok(from.u32()),
        Some(version) => Err(Bad {
            code: Code::Version,
            what: format!(
                "version {version} is not spoken here, version {VERSION} is: use the same release on both sides"
            ),
        }),
        None => Ok(None),
    }
}

/// `None`: the payload is too short, too long, or has a value that there is not.
fn parse(kind: u16, payload: &[u8]) -> Result<Option<Message<'_>>, Bad> {
    let mut from = Fields(payload);
    let message = match kind {
        HELLO => {
            let page_size = versioned(&mut from)?;
            if page_size.is_some_and(|size| size as usize != PAGE_SIZE) {
                return Err(malformed("pages are of 4096 bytes"));
            }
            hello(&mut from)
        }
        WELCOME => {
            let stage = versioned(&mut from)?.and_then(Stage::from_u32);
            welcome(&mut from, stage)
        }
        HERE => here(&mut from),
        PAGES => pages(&mut from),
        MAP => map(&mut from),
        STATE => from.u64().map(|offset| Message::State {
            offset,
            bytes: from.rest(),
        }),
        PREPARE => match (from.u64(), from.u32()) {
            (Some(len), Some(crc)) => Some(Message::Prepare { len, crc }),
            _ => None,
        },
        READY => Some(Message::Ready),
        GO => Some(Message::Go),
        STARTED => Some(Message::Started),
        REQUEST => request(&mut from),
        ACK => from.u64().map(Message::Ack),
        ALL_SENT => Some(Message::AllSent),
        DONE => done(&mut from),
        BYE => Some(Message::Bye),
        PING => Some(Message::Ping),
        ERROR => from.u32().map(|code| {
            let text = from.rest();
            let text = String::from_utf8_lossy(&text[..text.len().min(MAX_TEXT)]);
            // It is shown to people: no control characters of a stranger's.
            let text = text.replace(char::is_control, " ");
            Message::Error { code, text }
        }),
        _ => None,
    };
    Ok(message.filter(|_| from.0.is_empty()))
}

fn hello<'a>(from: &mut Fields<'a>) -> Option<Message<'a>> {
    let id = MigrationId(from.take()?);
    let resume = match from.u32()? {
        0 => false,
        1 => true,
        _ => return None,
    };
    let slots = from.u32()? as usize;
    // Before anything is allocated for them.
    if from.0.len() != slots.checked_mul(24)? {
        return None;
    }
    let slots: Option<Vec<Slot>> = (0..slots)
        .map(|_| {
            Some(Slot {
                id: from.u32()?,
                backing_shift: from.u32()?,
                gfn: from.u64()?,
                pages: from.u64()?,
            })
        })
        .collect();
    let layout = Layout(slots?);
    layout.pages()?;
    Some(Message::Hello { id, resume, layout })
}

fn welcome<'a>(from: &mut Fields<'a>, stage: Option<Stage>) -> Option<Message<'a>> {
    let (stage, id) = (stage?, MigrationId(from.take()?));
    let had = match (from.u32()?, from.u64()?) {
        (0, frames) => Had::Frames(frames),
        (1, pages) if stage >= Stage::Ready => Had::Pages(pages),
        _ => return None,
    };
    Some(Message::Welcome { id, stage, had })
}

fn here<'a>(from: &mut Fields<'a>) -> Option<Message<'a>> {
    let first = from.u64()?;
    let bytes = from.rest();
    let fits = bytes.len() % 8 == 0 && bytes.len() <= MAX_WORDS * 8 && first % 64 == 0;
    fits.then(|| Message::Here {
        first,
        words: words(bytes),
    })
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let mut from = Fields(bytes);
    std::iter::from_fn(|| from.u64()).collect()
}

fn done<'a>(from: &mut Fields<'a>) -> Option<Message<'a>> {
    Some(Message::Done(Figures {
        faults: from.u64()?,
        fault_p50_us: from.u64()?,
        fault_p99_us: from.u64()?,
        fault_max_us: from.u64()?,
        pages_too_late: from.u64()?,
        postcopy_us: from.u64()?,
    }))
}

fn pages<'a>(from: &mut Fields<'a>) -> Option<Message<'a>> {
    let pages = PageRange::new(from.u64()?, from.u32()?.into());
    let reason = Reason::from_u16(from.u16()?)?;
    let encoding = from.u16()?;
    let bytes = from.rest();
    let data = match (encoding, bytes.len()) {
        (0, len) if len as u64 == pages.count * PAGE_SIZE as u64 => Data::Bytes(bytes),
        (1, 0) => Data::Zero,
        (2, 0) => Data::Lost,
        _ => return None,
    };
    let fits = pages.count > 0 && pages.first.checked_add(pages.count).is_some();
    fits.then_some(Message::Pages {
        pages,
        reason,
        data,
    })
}

fn map<'a>(from: &mut Fields<'a>) -> Option<Message<'a>> {
    let first = from.u64()?;
    let bytes = from.rest();
    let half = bytes.len() / 2;
    if bytes.len() % 16 != 0 || half > MAX_WORDS * 8 || first % 64 != 0 {
        return None;
    }
    Some(Message::Map {
        first,
        stale: words(&bytes[..half]),
        free: words(&bytes[half..]),
    })
}

fn request<'a>(from: &mut Fields<'a>) -> Option<Message<'a>> {
    let count = from.0.len() / 16;
    if from.0.len() % 16 != 0 || count == 0 || count > MAX_RANGES {
        return None;
    }
    (0..count)
        .map(|_| {
            let range = PageRange::new(from.u64()?, from.u64()?);
            let fits = range.count > 0 && range.first.checked_add(range.count).is_some();
            fits.then_some(range)
        })
        .collect::<Option<_>>()
        .map(Message::Request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot() -> impl Strategy<Value = Slot> {
        (any::<u32>(), any::<u64>(), 1u64..1 << 30, any::<u32>()).prop_map(
            |(id, gfn, pages, backing_shift)| Slot {
                id,
                gfn,
                pages,
                backing_shift,
            },
        )
    }

    fn range() -> impl Strategy<Value = PageRange> {
        (0u64..1 << 40, 1u64..1 << 40).prop_map(|(first, count)| PageRange::new(first, count))
    }

    fn message() -> impl Strategy<Value = Message<'static>> {
        static BYTES: [u8; 3 * PAGE_SIZE] = [7; 3 * PAGE_SIZE];
        let id = || any::<[u8; 16]>().prop_map(MigrationId);
        let reason = prop_oneof![
            Just(Reason::PreCopy),
            Just(Reason::Requested),
            Just(Reason::Background)
        ];
        let stage = prop_oneof![
            Just(Stage::Copying),
            Just(Stage::Loading),
            Just(Stage::Ready),
            Just(Stage::Running)
        ];
        let words = || prop::collection::vec(any::<u64>(), 5);
        let bare = prop_oneof![
            Just(Message::Ready),
            Just(Message::Go),
            Just(Message::Started),
            Just(Message::AllSent),
            Just(Message::Bye),
            Just(Message::Ping),
        ];
        prop_oneof![
            bare,
            (id(), any::<bool>(), prop::collection::vec(slot(), 1..5)).prop_map(
                |(id, resume, slots)| Message::Hello {
                    id,
                    resume,
                    layout: Layout(slots)
                }
            ),
            (id(), stage, any::<u64>(), any::<bool>()).prop_map(|(id, stage, had, pages)| {
                let had = match pages && stage >= Stage::Ready {
                    true => Had::Pages(had),
                    false => Had::Frames(had),
                };
                Message::Welcome { id, stage, had }
            }),
            (0u64..1000, words()).prop_map(|(at, words)| Message::Here {
                first: at * 64,
                words
            }),
            (0u64..1 << 40, 1u64..4, reason, 0..3).prop_map(|(first, count, reason, data)| {
                let data = match data {
                    0 => Data::Bytes(&BYTES[..count as usize * PAGE_SIZE]),
                    1 => Data::Zero,
                    _ => Data::Lost,
                };
                Message::Pages {
                    pages: PageRange::new(first, count),
                    reason,
                    data,
                }
            }),
            (0u64..1000, words(), words()).prop_map(|(at, stale, free)| Message::Map {
                first: at * 64,
                stale,
                free
            }),
            (any::<u64>(), 0..PAGE_SIZE).prop_map(|(offset, len)| Message::State {
                offset,
                bytes: &BYTES[..len]
            }),
            (any::<u64>(), any::<u32>()).prop_map(|(len, crc)| Message::Prepare { len, crc }),
            prop::collection::vec(range(), 1..20).prop_map(Message::Request),
            any::<u64>().prop_map(Message::Ack),
            any::<[u64; 6]>().prop_map(|[faults, p50, p99, max, late, postcopy]| {
                Message::Done(Figures {
                    faults,
                    fault_p50_us: p50,
                    fault_p99_us: p99,
                    fault_max_us: max,
                    pages_too_late: late,
                    postcopy_us: postcopy,
                })
            }),
            (any::<u32>(), "[ -~]{0,40}").prop_map(|(code, text)| Message::Error { code, text }),
        ]
    }

    /// Any bytes, and small numbers, of which more mean something.
    fn garbage() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            prop::collection::vec(0u32..3, 0..20).prop_map(|numbers| numbers
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect()),
        ]
    }

    proptest! {
        #[test]
        fn messages_survive(message in message(), number: u16, other: u16, tail in prop::collection::vec(any::<u8>(), 0..20)) {
            let mut bytes = Vec::new();
            encode(&message, number, &mut bytes);
            let len = bytes.len();
            bytes.extend(tail);
            prop_assert_eq!(decode(&bytes, number), Ok(Some((message, len))));
            for short in [0, 1, HEADER - 1, HEADER, len - 1] {
                if short < len {
                    prop_assert_eq!(decode(&bytes[..short], number), Ok(None));
                }
            }
            if other != number {
                prop_assert_eq!(decode(&bytes, other).unwrap_err().code, Code::Malformed);
            }
        }

        #[test]
        fn a_changed_byte_is_found(message in message(), at: prop::sample::Index, flip in 1u8..) {
            let mut bytes = Vec::new();
            encode(&message, 0, &mut bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            // A length that grew makes the frame incomplete; everything else is an error.
            prop_assert!(!matches!(decode(&bytes, 0), Ok(Some(_))));
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes, 0);
        }

        /// A peer that means harm sends right checksums.
        #[test]
        fn well_framed_garbage_never_panics(kind in 0u16..20, payload in garbage(), greeting: Option<bool>) {
            let payload = match greeting {
                None => payload,
                Some(hello) => {
                    let third = if hello { PAGE_SIZE as u32 } else { Stage::Running as u32 };
                    [&MAGIC[..], &VERSION.to_le_bytes(), &third.to_le_bytes(), &payload].concat()
                }
            };
            let mut bytes = vec![0; HEADER];
            bytes.extend_from_slice(&payload);
            Writer { out: &mut bytes, start: 0 }.finish(kind, 0);
            if let Ok(Some((message, len))) = decode(&bytes, 0) {
                prop_assert_eq!(len, bytes.len());
                let mut again = Vec::new();
                encode(&message, 0, &mut again);
                // An error's text is made readable, so it may change.
                let is_error = matches!(&message, Message::Error { .. });
                prop_assert!(is_error || again == bytes);
            }
        }
    }

    #[test]
    fn other_versions_are_told_so() {
        let mut bytes = Vec::new();
        encode(
            &Message::Welcome {
                id: MigrationId([0; 16]),
                stage: Stage::Copying,
                had: Had::Frames(0),
            },
            0,
            &mut bytes,
        );
        bytes[HEADER + 8] = 9;
        Writer {
            out: &mut bytes,
            start: 0,
        }
        .finish(WELCOME, 0);
        let bad = decode(&bytes, 0).unwrap_err();
        assert_eq!(bad.code, Code::Version);
        assert!(bad.what.contains("version 9"), "{bad}");
    }

    #[test]
    fn only_who_has_the_state_took_the_place_of_another() {
        for stage in [Stage::Copying, Stage::Loading] {
            let mut bytes = Vec::new();
            let id = MigrationId([0; 16]);
            let had = Had::Pages(0);
            encode(&Message::Welcome { id, stage, had }, 0, &mut bytes);
            assert_eq!(decode(&bytes, 0).unwrap_err().code, Code::Malformed);
        }
    }

    #[test]
    fn ids_are_different_and_can_be_written_down() {
        let id = MigrationId::random();
        assert_ne!(id, MigrationId::random());
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("+1".parse::<MigrationId>().unwrap_err().contains("'+1'"));
    }
}
