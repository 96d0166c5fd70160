//! Passing a VM's fd to another process over a Unix socket.
//!
//! One message, answered by one message; each has [`MESSAGE_SIZE`] bytes:
//!
//! | bytes   | what                                                            |
//! |---------|-----------------------------------------------------------------|
//! | 0..8    | `KDPPASS` and the version, 1                                    |
//! | 8..12   | what is asked or answered ([`Op`]), little-endian               |
//! | 12..16  | flags, little-endian                                            |
//! | 16..48  | the VM's name, zero-padded                                      |
//! | 48..256 | for people: why a request was refused, UTF-8, zero-padded       |
//!
//! `Give` and the answer to `Take` carry the fd as SCM_RIGHTS.

use crate::{Error, Result, Vm};
use rustix::{
    cmsg_space,
    fd::{AsFd, BorrowedFd, OwnedFd},
    net::{
        recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    },
};
use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::unix::net::UnixStream,
    str,
};

/// The size of every message.
pub(crate) const MESSAGE_SIZE: usize = 256;

/// The most bytes that a VM's name may have.
const NAME_LEN: usize = 32;

const MAGIC: [u8; 8] = *b"KDPPASS\x01";

/// What a message asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Op {
    /// Here is a VM.
    Give = 1,
    /// Hand over the VM of this name.
    Take = 2,
    /// Let go of the VM of this name.
    Drop = 3,
    /// The next name in alphabetical order. After the last one, the answer has an empty name.
    Next = 5,
    /// Done.
    Done = 0x80,
    /// Not done, and why.
    Refused = 0x81,
}

impl Op {
    const ALL: [Self; 6] = [
        Self::Give,
        Self::Take,
        Self::Drop,
        Self::Next,
        Self::Done,
        Self::Refused,
    ];
}

/// A message without its fd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) op: Op,
    pub(crate) flags: u32,
    pub(crate) name: String,
    pub(crate) text: String,
}

impl Message {
    pub(crate) fn new(op: Op, name: &str) -> Self {
        Self {
            op,
            flags: 0,
            name: name.to_owned(),
            text: String::new(),
        }
    }

    pub(crate) fn refused(text: String) -> Self {
        Self {
            text,
            ..Self::new(Op::Refused, "")
        }
    }

    fn encode(&self) -> Result<[u8; MESSAGE_SIZE]> {
        if self.name.len() > NAME_LEN {
            return Err(Error::Argument(format!(
                "the VM's name '{}' has {} bytes: at most {NAME_LEN} are allowed",
                self.name,
                self.name.len()
            )));
        }
        let mut bytes = [0; MESSAGE_SIZE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&(self.op as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&self.flags.to_le_bytes());
        bytes[16..16 + self.name.len()].copy_from_slice(self.name.as_bytes());
        let text = &self.text.as_bytes()[..self.text.len().min(MESSAGE_SIZE - 48)];
        bytes[48..48 + text.len()].copy_from_slice(text);
        Ok(bytes)
    }

    fn decode(bytes: &[u8; MESSAGE_SIZE]) -> Result<Self> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let text = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes)
                .trim_end_matches('\0')
                .to_owned()
        };
        if bytes[..8] != MAGIC {
            return Err(Error::Peer(format!(
                "the peer on the socket does not pass VMs as version 1 has it: its message begins with {:02x?}",
                &bytes[..8]
            )));
        }
        let op = Op::ALL
            .into_iter()
            .find(|op| *op as u32 == word(8))
            .ok_or_else(|| {
                Error::Peer(format!(
                    "the peer on the socket asks for the unknown operation {}",
                    word(8)
                ))
            })?;
        let name = str::from_utf8(&bytes[16..48]).map_err(|_| {
            Error::Peer(format!(
                "the peer on the socket sent a VM's name that is not UTF-8: '{}'",
                bytes[16..48].escape_ascii()
            ))
        })?;
        Ok(Self {
            op,
            flags: word(12),
            name: name.trim_end_matches('\0').to_owned(),
            text: text(&bytes[48..]),
        })
    }
}

/// Send a message, with an fd if there is one to pass.
pub(crate) fn send(
    stream: &UnixStream,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
) -> Result<()> {
    let bytes = message.encode()?;
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let mut sent = 0;
    while sent < bytes.len() {
        sent += sendmsg(
            stream,
            &[IoSlice::new(&bytes[sent..])],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .map_err(|errno| Error::sys("sendmsg", "the socket that passes VMs", errno))?;
        control.clear();
    }
    Ok(())
}

/// Receive a message and the fd that came with it. `None` if the peer closed the socket instead.
pub(crate) fn receive(stream: &UnixStream) -> Result<Option<(Message, Option<OwnedFd>)>> {
    let mut bytes = [0; MESSAGE_SIZE];
    let mut fd = None;
    let mut received = 0;
    while received < bytes.len() {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut bytes[received..])];
        let len = recvmsg(stream, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)
            .map_err(|errno| Error::sys("recvmsg", "the socket that passes VMs", errno))?
            .bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                // An fd that is not asked for is closed.
                fd = fds.last().or(fd);
            }
        }
        if len == 0 {
            if received == 0 {
                return Ok(None);
            }
            return Err(Error::Peer(format!(
                "the peer on the socket closed it after {received} of {MESSAGE_SIZE} bytes of a message"
            )));
        }
        received += len;
    }
    Message::decode(&bytes).map(|message| Some((message, fd)))
}

/// Send a request and receive its answer. A refusal is an error.
pub(crate) fn ask(
    stream: &UnixStream,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(Message, Option<OwnedFd>)> {
    send(stream, message, fd)?;
    match receive(stream)? {
        Some((answer, fd)) if answer.op == Op::Done => Ok((answer, fd)),
        Some((answer, _)) if answer.op == Op::Refused => Err(Error::Peer(answer.text)),
        Some((answer, _)) => Err(Error::Peer(format!(
            "the peer on the socket answered with {:?}",
            answer.op
        ))),
        None => Err(Error::Peer(
            "the peer closed the socket without an answer".to_owned(),
        )),
    }
}

/// Hand a VM to whoever is at the other end: a handler that waits for it, or a keeper. Returns when it has
/// been taken.
pub fn send_vm(stream: &UnixStream, vm: &Vm, name: &str) -> Result<()> {
    ask(stream, &Message::new(Op::Give, name), Some(vm.as_fd())).map(drop)
}

/// Receive the VM that [`send_vm`] hands over at the other end, and its name there.
pub fn receive_vm(stream: &UnixStream) -> Result<(Vm, String)> {
    let (message, fd) = receive(stream)?.ok_or_else(|| {
        Error::Peer("the peer closed the socket without handing a VM over".to_owned())
    })?;
    let vm = match (message.op, fd) {
        (Op::Give, Some(fd)) => Vm::from_fd(fd),
        (Op::Give, None) => Err(Error::Peer(
            "the peer handed over no file descriptor".to_owned(),
        )),
        (op, _) => Err(Error::Peer(format!(
            "a VM was to be handed over here, the peer asks to {op:?}"
        ))),
    };
    match vm {
        Ok(vm) => {
            send(stream, &Message::new(Op::Done, &message.name), None)?;
            Ok((vm, message.name))
        }
        Err(error) => {
            send(stream, &Message::refused(error.to_string()), None)?;
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Seek, Write};

    #[test]
    fn an_fd_arrives_with_its_message() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"same file").unwrap();
        send(&here, &Message::new(Op::Give, "vm-1"), Some(file.as_fd())).unwrap();
        let (message, fd) = receive(&there).unwrap().unwrap();
        assert_eq!(message, Message::new(Op::Give, "vm-1"));
        let mut other = std::fs::File::from(fd.unwrap());
        other.rewind().unwrap();
        let mut text = String::new();
        other.read_to_string(&mut text).unwrap();
        assert_eq!(text, "same file");
        let flags = rustix::io::fcntl_getfd(&other).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn what_is_no_vm_is_refused_on_both_sides() {
        let (here, there) = UnixStream::pair().unwrap();
        let receiver = std::thread::spawn(move || receive_vm(&there).unwrap_err().to_string());
        let file = tempfile::tempfile().unwrap();
        let error = ask(&here, &Message::new(Op::Give, "x"), Some(file.as_fd())).unwrap_err();
        assert!(error.to_string().contains("not a VM's"), "{error}");
        assert!(receiver.join().unwrap().contains("not a VM's"));
    }

    #[test]
    fn a_peer_that_goes_away() {
        let (here, there) = UnixStream::pair().unwrap();
        (&here).write_all(b"KDPPASS").unwrap();
        drop(here);
        assert!(receive(&there)
            .unwrap_err()
            .to_string()
            .contains("after 7 of 256 bytes"));
        let (here, there) = UnixStream::pair().unwrap();
        drop(here);
        assert!(receive(&there).unwrap().is_none());
    }

    #[test]
    fn a_name_is_utf_8() {
        let mut bytes = Message::new(Op::Give, "vm").encode().unwrap();
        bytes[18] = 0xff;
        let error = Message::decode(&bytes).unwrap_err().to_string();
        assert!(error.contains("not UTF-8: 'vm\\xff\\x00"), "{error}");
    }

    proptest! {
        #[test]
        fn messages_survive(name in "[a-z]{0,32}", text in "[ -~]{0,208}", flags: u32, op in 0usize..6) {
            let message = Message { op: Op::ALL[op], flags, name, text };
            prop_assert_eq!(Message::decode(&message.encode().unwrap()).unwrap(), message);
        }

        #[test]
        fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), MESSAGE_SIZE)) {
            let bytes: [u8; MESSAGE_SIZE] = bytes.try_into().unwrap();
            prop_assume!(bytes[..8] != MAGIC);
            prop_assert!(Message::decode(&bytes).is_err());
        }
    }
}
