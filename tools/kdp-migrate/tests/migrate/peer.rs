//! A source that does what its test tells it, message by message.

use crate::{guest::PAGE, vm};
use kdp_migrate::wire::{self, Data, Had, Message, MigrationId, Reason, Stage};
use kvm_demand_paging::PageRange;
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

pub struct Peer {
    stream: TcpStream,
    input: Vec<u8>,
    // Numbers of the next frames.
    out: u16,
    next: u16,
    pinged: Instant,
    /// The last ack.
    pub acked: u64,
}

/// What a test looks for.
#[derive(Debug, PartialEq)]
pub enum Heard {
    Here(u64, Vec<u64>),
    Welcome(Stage, Had),
    Ready,
    Started,
    Request(Vec<PageRange>),
    Done,
    Error(u32),
    Closed,
}

impl Peer {
    pub fn connect(address: SocketAddr) -> Self {
        Self::try_connect(address).unwrap()
    }

    /// Nothing if nobody listens any more.
    pub fn try_connect(address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_millis(20)))?;
        Ok(Self {
            stream,
            input: Vec::new(),
            out: 0,
            next: 0,
            pinged: Instant::now(),
            acked: 0,
        })
    }

    pub fn greet(address: SocketAddr, id: MigrationId, resume: bool) -> (Self, Heard) {
        let mut peer = Self::connect(address);
        peer.hello(id, resume);
        let heard = peer.hear();
        (peer, heard)
    }

    pub fn hello(&mut self, id: MigrationId, resume: bool) {
        self.send(&Message::Hello {
            id,
            resume,
            layout: vm::layout(12),
        });
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        // The other side may have closed it.
        let _ = self.stream.write_all(bytes);
    }

    /// The next frame, for a test that does something to it.
    pub fn frame(&mut self, message: &Message<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        wire::encode(message, self.out, &mut bytes);
        self.out = self.out.wrapping_add(1);
        bytes
    }

    pub fn send(&mut self, message: &Message<'_>) {
        let bytes = self.frame(message);
        self.bytes(&bytes);
    }

    pub fn page(&mut self, page: u64, bytes: &[u8; PAGE]) {
        self.send(&Message::Pages {
            pages: PageRange::page(page),
            reason: Reason::Requested,
            data: Data::Bytes(bytes),
        });
    }

    /// The guest's state: one vCPU, which has page 0 and has done nothing.
    pub fn switch(&mut self) {
        let mut state = 0u32.to_le_bytes().to_vec();
        crate::guest::Vcpu::new(0, 1, 1).save(&mut state);
        self.send(&Message::State {
            offset: 0,
            bytes: &state,
        });
        self.send(&Message::Prepare {
            len: state.len() as u64,
            crc: crc(&state),
        });
        // The device's page is read by who loads the state.
        assert_eq!(
            self.hear(),
            Heard::Request(vec![PageRange::page(vm::DEVICE)])
        );
        self.page(vm::DEVICE, &[0; PAGE]);
        assert_eq!(self.hear(), Heard::Ready);
        self.send(&Message::Go);
        assert_eq!(self.hear(), Heard::Started);
    }

    /// The next message that is neither an ack nor nothing.
    pub fn hear(&mut self) -> Heard {
        let start = Instant::now();
        let mut buffer = [0; 65536];
        loop {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "nothing was heard"
            );
            if self.pinged.elapsed() > Duration::from_millis(100) {
                self.pinged = Instant::now();
                self.send(&Message::Ping);
            }
            if let Some((message, len)) = wire::decode(&self.input, self.next).unwrap() {
                let heard = match message {
                    Message::Welcome { stage, had, .. } => Some(Heard::Welcome(stage, had)),
                    Message::Here { first, words } => Some(Heard::Here(first, words)),
                    Message::Ready => Some(Heard::Ready),
                    Message::Started => Some(Heard::Started),
                    Message::Request(ranges) => Some(Heard::Request(ranges)),
                    Message::Done(_) => Some(Heard::Done),
                    Message::Error { code, .. } => Some(Heard::Error(code)),
                    Message::Ack(had) => {
                        self.acked = had;
                        None
                    }
                    _ => None,
                };
                self.input.drain(..len);
                self.next = self.next.wrapping_add(1);
                match heard {
                    // The vCPU's only page is no test's subject.
                    Some(Heard::Request(ranges))
                        if ranges.iter().any(|range| range.contains(0)) =>
                    {
                        self.page(0, &[0; PAGE]);
                        if ranges != [PageRange::page(0)] {
                            return Heard::Request(ranges);
                        }
                    }
                    Some(heard) => return heard,
                    None => {}
                }
                continue;
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return Heard::Closed,
                Ok(count) => self.input.extend(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Heard::Closed
                }
                Err(_) => {}
            }
        }
    }
}

/// A message as a peer of another release would send it: its version is the first number behind the magic.
pub fn of_version(message: &Message<'_>, version: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    wire::encode(message, 0, &mut bytes);
    bytes[wire::HEADER + 8..][..4].copy_from_slice(&version.to_le_bytes());
    let crc = crc(&[&bytes[..8], &bytes[wire::HEADER..]].concat());
    bytes[8..wire::HEADER].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// CRC-32, bit by bit: that the library's is that one is worth knowing.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
