//! The state of a stopped machine, but for its memory, as bytes: for a machine that goes on elsewhere.
//!
//! The bytes are a header, which says what they are, and what the parts make of themselves in postcard's format. They
//! name a version: whoever changes what is saved counts it up.

mod vcpu;
mod vm;

use serde::{Deserialize, Serialize};

pub(super) use self::vcpu::VcpuState;
pub(super) use self::vm::VmState;
use super::devices::DevicesState;
use crate::error::{Error, Result};

const MAGIC: [u8; 8] = *b"KDPLINUX";
const VERSION: u32 = 1;

/// Magic, version, length and checksum of what follows.
const HEADER: usize = 8 + 4 + 4 + 4;

/// All of it.
#[derive(Serialize, Deserialize)]
pub(super) struct State {
    /// Bytes of guest memory.
    pub(super) memory: u64,
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) vm: VmState,
    pub(super) devices: DevicesState,
}

impl State {
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let body = postcard::to_stdvec(self)
            .map_err(|e| Error::invalid(format!("the machine's state: {e}")))?;
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(crc32fast::hash(&body).to_le_bytes());
        bytes.extend(body);
        Ok(bytes)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let wrong = |why: String| Error::invalid(format!("the state of a machine: {why}"));
        let Some((header, body)) = bytes.split_at_checked(HEADER) else {
            return Err(wrong(format!(
                "{} bytes are fewer than its header has",
                bytes.len()
            )));
        };
        let (magic, numbers) = header.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(wrong("these bytes are not one".to_owned()));
        }
        let mut numbers = numbers.chunks_exact(4).map(|number| {
            let number = number.iter().rev();
            number.fold(0, |sum, byte| (sum << 8) | u32::from(*byte))
        });
        let mut next = || numbers.next().unwrap_or_default();
        let (version, len, sum) = (next(), next(), next());
        if version != VERSION {
            return Err(wrong(format!(
                "it has version {version}, and this program reads {VERSION}: take the same release on both sides"
            )));
        }
        if len as usize != body.len() {
            return Err(wrong(format!(
                "it should have {len} bytes behind its header, and has {}",
                body.len()
            )));
        }
        if crc32fast::hash(body) != sum {
            return Err(wrong("its checksum is wrong: it was damaged".to_owned()));
        }
        match postcard::take_from_bytes(body) {
            Ok((state, [])) => Ok(state),
            Ok((_, rest)) => Err(wrong(format!("{} bytes are too many", rest.len()))),
            Err(e) => Err(wrong(format!("it cannot be read: {e}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> State {
        State {
            memory: 64 << 20,
            vcpus: vec![VcpuState::default()],
            vm: VmState::default(),
            devices: DevicesState::default(),
        }
    }

    fn refused(bytes: &[u8], why: &str) {
        let error = State::decode(bytes).err().map(|e| e.to_string());
        assert!(
            error.as_ref().is_some_and(|text| text.contains(why)),
            "{error:?} does not say '{why}'"
        );
    }

    #[test]
    fn what_is_saved_is_read() {
        let bytes = empty().encode().unwrap();
        let state = State::decode(&bytes).unwrap();
        assert_eq!((state.memory, state.vcpus.len()), (64 << 20, 1));
        assert_eq!(state.encode().unwrap(), bytes);
    }

    #[test]
    fn what_is_not_one_is_refused() {
        let bytes = empty().encode().unwrap();
        let with = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            bytes[at] ^= byte;
            bytes
        };
        refused(&bytes[..10], "fewer than its header");
        refused(&with(0, 1), "not one");
        refused(&with(8, 3), "version 2, and this program reads 1");
        refused(&bytes[..bytes.len() - 1], "behind its header");
        refused(&with(bytes.len() - 1, 1), "damaged");
        refused(&[], "0 bytes");
    }
}
