//! What a VMM and its page handler, two processes, tell each other: postcard's bytes, behind their number.

use std::io::{self, Read, Write};

use kdp_migrate::{DestinationReport, Progress};
use serde::{de::DeserializeOwned, Deserialize, Serialize};

/// The longest message: a state of vCPUs and devices, and some.
const LONGEST: u32 = 65 << 20;

/// What the handler is to do.
#[derive(Serialize, Deserialize)]
pub struct Task {
    /// The memslot's id.
    pub slot: u32,
    /// The migration that another handler has begun, whose guest runs already.
    pub goes_on: Option<String>,
    /// See `--give-up`.
    pub give_up: Option<f64>,
    /// See `--answer`.
    pub answer: Option<f64>,
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

pub fn send(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let length = u32::try_from(bytes.len())
        .ok()
        .filter(|length| *length <= LONGEST)
        .ok_or_else(|| io::Error::other("a message is too long"))?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(&bytes)
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

    #[test]
    fn messages_come_through_and_no_more_than_fits() {
        let mut wire = Vec::new();
        send(&mut wire, &ToVmm::Load(vec![1, 2, 3])).unwrap();
        send(&mut wire, &ToVmm::Start).unwrap();
        let mut from = wire.as_slice();
        assert!(matches!(receive(&mut from), Ok(ToVmm::Load(state)) if state == [1, 2, 3]));
        assert!(matches!(receive(&mut from), Ok(ToVmm::Start)));
        assert!(receive::<ToVmm>(&mut from).is_err());
        assert!(receive::<ToVmm>(&u32::MAX.to_le_bytes()[..]).is_err());
    }
}
