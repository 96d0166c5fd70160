//! A connection: messages in and out, and how its end is told.

use crate::{
    lock,
    wire::{self, Bad, Code, Message},
};
use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{
        atomic::{AtomicU64, Ordering},
        Mutex,
    },
    time::Duration,
};

/// How often who waits for bytes looks at what else there is.
pub(crate) const TICK: Duration = Duration::from_millis(10);

/// Why a connection is over.
#[derive(Debug)]
pub(crate) enum End {
    /// The network, or bytes that make no sense: a new connection may help.
    Broken(String),
    /// The other side speaks another version of the protocol.
    Version(String),
    /// The other side said so.
    Refused { code: u32, text: String },
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<Bad> for End {
    fn from(bad: Bad) -> Self {
        match bad.code {
            Code::Version => Self::Version(bad.what),
            _ => Self::Broken(bad.what),
        }
    }
}

/// The half that writes. Threads may share it.
pub(crate) struct Sender {
    stream: TcpStream,
    output: Mutex<Output>,
    bytes: AtomicU64,
}

#[derive(Default)]
struct Output {
    buffer: Vec<u8>,
    // Of the next frame.
    number: u16,
}

/// The half that reads.
pub(crate) struct Receiver {
    stream: TcpStream,
    input: Vec<u8>,
    // Bytes in `input` that are used up, and that are there.
    used: usize,
    filled: usize,
    // Of the next frame.
    number: u16,
    bytes: u64,
}

/// What comes of waiting for a message.
pub(crate) enum Received<'a> {
    Message(Message<'a>),
    /// Nothing yet.
    Nothing,
}

/// Make messages of a connection. A write that does not get on for `stall` breaks it.
pub(crate) fn split(stream: TcpStream, stall: Duration) -> io::Result<(Sender, Receiver)> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(stall.max(TICK)))?;
    stream.set_read_timeout(Some(TICK))?;
    let sender = Sender {
        stream: stream.try_clone()?,
        output: Mutex::default(),
        bytes: AtomicU64::new(0),
    };
    let receiver = Receiver {
        stream,
        input: vec![0; 2 * (wire::HEADER + wire::MAX_PAYLOAD)],
        used: 0,
        filled: 0,
        number: 0,
        bytes: 0,
    };
    Ok((sender, receiver))
}

impl Sender {
    /// Send a message; how long its frame was. After an error the connection is over for everybody.
    pub(crate) fn send(&self, message: &Message<'_>) -> Result<u64, End> {
        let mut output = lock(&self.output);
        let Output { buffer, number } = &mut *output;
        buffer.clear();
        wire::encode(message, *number, buffer);
        *number = number.wrapping_add(1);
        (&self.stream)
            .write_all(buffer)
            .inspect_err(|_| self.close())?;
        let len = buffer.len() as u64;
        self.bytes.fetch_add(len, Ordering::Relaxed);
        Ok(len)
    }

    /// Tell the other side that it is over, if that can be done.
    pub(crate) fn refuse(&self, code: Code, text: &str) {
        let text = text.to_owned();
        let code = code as u32;
        let _ = self.send(&Message::Error { code, text });
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// End the connection. That it may have ended already is fine.
    pub(crate) fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Receiver {
    /// The next message, or nothing if none comes within a tick.
    pub(crate) fn receive(&mut self) -> Result<Received<'_>, End> {
        // What borrows must not be kept over a read: a frame is decoded when it is whole.
        while !wire::is_whole(&self.input[self.used..self.filled])? {
            if self.used > 0 {
                self.input.copy_within(self.used..self.filled, 0);
                self.filled -= self.used;
                self.used = 0;
            }
            // There is room: what is there is less than the longest frame, and the buffer is twice that.
            match self.stream.read(&mut self.input[self.filled..]) {
                Ok(0) => return Err(End::Broken("the other side closed the connection".into())),
                Ok(count) => {
                    self.filled += count;
                    self.bytes += count as u64;
                }
                Err(error) if is_timeout(&error) => return Ok(Received::Nothing),
                Err(error) => return Err(error.into()),
            }
        }
        let bytes = &self.input[self.used..self.filled];
        let Some((message, len)) = wire::decode(bytes, self.number)? else {
            return Ok(Received::Nothing);
        };
        self.used += len;
        self.number = self.number.wrapping_add(1);
        match message {
            Message::Error { code, text } if Code::is_transient(code) => Err(End::Broken(format!(
                "the other side could not read what it got: {text}"
            ))),
            Message::Error { code, text } => Err(End::Refused { code, text }),
            message => Ok(Received::Message(message)),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
