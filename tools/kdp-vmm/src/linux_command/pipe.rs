//! What a VMM and its page handler, two processes, tell each other: postcard's bytes, behind their number.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use kdp_migrate::{DestinationReport, Progress};
use serde::{de::DeserializeOwned, Deserialize, Serialize};

/// The longest message: a state of vCPUs and devices, and some.
const LONGEST: u32 = 65 << 20;

/// What the handler is to do.
#[derive(Serialize, Deserialize)]
pub struct Task {
    /// The memslot's id.
    pub slot: u32,
    /// What another handler has begun.
    pub goes_on: Option<GoesOn>,
    /// See `--give-up`.
    pub give_up: Option<f64>,
    /// See `--answer`.
    pub answer: Option<f64>,
}

/// A migration whose state is loaded.
#[derive(Serialize, Deserialize)]
pub struct GoesOn {
    /// Its id.
    pub migration: String,
    /// Whether the guest runs.
    pub started: bool,
}

/// From the VMM.
#[derive(Serialize, Deserialize)]
pub enum ToHandler {
    /// First.
    Take(Task),
    /// To [`ToVmm::Load`] and [`ToVmm::Start`]: done, or why not.
    Answer(Result<(), String>),
}

/// To the VMM.
#[derive(Serialize, Deserialize)]
pub enum ToVmm {
    /// A migration comes, with this id.
    Comes(String),
    /// How far it is.
    Progress(Progress),
    /// Load this state.
    Load(Vec<u8>),
    /// Let the guest run.
    Start,
    /// It will never have all its pages.
    Fail(String),
    /// It has them.
    Arrived(DestinationReport),
    /// It does not come, or not whole.
    Failed(String),
}

/// The end that sends: for several threads, whose messages must not get into each other.
pub struct Sender(Mutex<UnixStream>);

impl Sender {
    /// To whoever has the other end.
    pub fn to(stream: &UnixStream) -> io::Result<Self> {
        Ok(Self(Mutex::new(stream.try_clone()?)))
    }

    pub fn send(&self, message: &impl Serialize) -> io::Result<()> {
        let bytes = encode(message)?;
        // After a panic there, half of a message may have been sent: who reads it will see.
        let mut to = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        to.write_all(&bytes)
    }
}

fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = postcard::to_extend(message, vec![0; 4]).map_err(io::Error::other)?;
    let length = u32::try_from(bytes.len() - 4)
        .ok()
        .filter(|length| *length <= LONGEST)
        .ok_or_else(|| io::Error::other("a message is too long"))?;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

pub fn receive<T: DeserializeOwned>(mut from: impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > LONGEST {
        return Err(io::Error::other("a message is too long"));
    }
    let mut bytes = vec![0; length as usize];
    from.read_exact(&mut bytes)?;
    postcard::from_bytes(&bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    #[test]
    fn messages_come_through_and_no_more_than_fits() {
        let wire = [
            encode(&ToVmm::Load(vec![1, 2, 3])).unwrap(),
            encode(&ToVmm::Start).unwrap(),
        ]
        .concat();
        let mut from = wire.as_slice();
        assert!(matches!(receive(&mut from), Ok(ToVmm::Load(state)) if state == [1, 2, 3]));
        assert!(matches!(receive(&mut from), Ok(ToVmm::Start)));
        assert!(receive::<ToVmm>(&mut from).is_err());
        assert!(receive::<ToVmm>(&u32::MAX.to_le_bytes()[..]).is_err());
    }

    #[test]
    fn messages_of_several_threads_come_through_whole() {
        const LOADS: usize = 40;
        // Much more than a socket takes at once.
        let state = vec![0xa5; 1 << 20];
        let load = ToVmm::Load(state.clone());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sender = Sender::to(&theirs).unwrap();
        drop(theirs);
        let receiver = thread::spawn(move || {
            let (mut loads, mut starts) = (0, 0);
            loop {
                match receive(&ours) {
                    Ok(ToVmm::Load(came)) => {
                        assert!(came == state);
                        loads += 1;
                    }
                    Ok(ToVmm::Start) => starts += 1,
                    Ok(_) => panic!("nobody sent that"),
                    Err(e) => {
                        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
                        return (loads, starts);
                    }
                }
            }
        });
        let done = AtomicBool::new(false);
        let starts = thread::scope(|scope| {
            // Beside the large ones, for as long as those are sent.
            let start = || {
                let mut sent = 0;
                while !done.load(Ordering::Relaxed) {
                    sender.send(&ToVmm::Start).unwrap();
                    sent += 1;
                }
                sent
            };
            let starters = [scope.spawn(start), scope.spawn(start)];
            let sent = (0..LOADS).try_for_each(|_| sender.send(&load));
            done.store(true, Ordering::Relaxed);
            sent.unwrap();
            starters.map(|thread| thread.join().unwrap()).iter().sum()
        });
        drop(sender);
        assert_eq!(receiver.join().unwrap(), (LOADS, starts));
    }
}
