//! The names of a keeper's entries in an fd store.
//!
//! | entry                     | descriptor                                                       |
//! |---------------------------|------------------------------------------------------------------|
//! | `kdp-vm.NAME`             | a VM that is kept [until it is released](Until::Released)        |
//! | `kdp-vm-of-giver.NAME`    | a VM that is kept [until its giver ends](Until::GiverEnds)       |
//! | `kdp-giver.NAME`          | the pidfd of the process that gave the VM of this name           |
//!
//! systemd allows at most 255 printable ASCII characters other than ':' in a name. Letters, digits
//! and `_-.` of a VM's name are not changed. Each other byte becomes `%` and two hexadecimal
//! digits.

use super::Until;
use std::{fmt, io, str};

/// Holds file descriptors by name while no keeper runs: the fd store of a service manager.
pub trait FdStore: Send + Sync {
    /// Stores a duplicate of `fd` under this name. No other stored descriptor has this name.
    fn store(&self, name: &str, fd: rustix::fd::BorrowedFd<'_>) -> io::Result<()>;

    /// Removes the descriptor of this name. Removing one that is not stored succeeds.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// The kind of a stored descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A VM.
    Vm(Until),
    /// The pidfd of the process that gave the VM.
    Giver,
}

impl Kind {
    const ALL: [Self; 3] = [
        Self::Vm(Until::Released),
        Self::Vm(Until::GiverEnds),
        Self::Giver,
    ];

    const fn prefix(self) -> &'static str {
        match self {
            Self::Vm(Until::Released) => "kdp-vm.",
            Self::Vm(Until::GiverEnds) => "kdp-vm-of-giver.",
            Self::Giver => "kdp-giver.",
        }
    }
}

/// A stored descriptor. `Display` prints its name in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    /// The VM's name.
    pub(super) vm: String,
}

impl Entry {
    pub(super) fn new(kind: Kind, vm: &str) -> Self {
        Self {
            kind,
            vm: vm.to_owned(),
        }
    }

    /// Reads a name of the store. `None` if it is not a keeper's name.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let (kind, encoded) = Kind::ALL
            .into_iter()
            .find_map(|kind| Some((kind, name.strip_prefix(kind.prefix())?)))?;
        Some(Self {
            kind,
            vm: decode(encoded)?,
        })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.prefix())?;
        for byte in self.vm.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' => {
                    write!(f, "{}", char::from(byte))?;
                }
                _ => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

fn decode(encoded: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = encoded.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = str::from_utf8(rest.get(..2)?).ok()?;
        // from_str_radix() would accept a sign.
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names() {
        let entry = |kind, vm| Entry::new(kind, vm).to_string();
        assert_eq!(entry(Kind::Vm(Until::Released), "web1"), "kdp-vm.web1");
        assert_eq!(
            entry(Kind::Vm(Until::GiverEnds), "a:b c"),
            "kdp-vm-of-giver.a%3Ab%20c"
        );
        assert_eq!(entry(Kind::Giver, "ü%"), "kdp-giver.%C3%BC%25");
    }

    #[test]
    fn names_of_others() {
        for other in [
            "",
            "stored",
            "kdp-keeper.socket",
            "kdp-vm",
            "kdp-vm.%",
            "kdp-vm.%4",
            "kdp-vm.%+1",
            "kdp-vm.%ü",
            "kdp-vm.%FF",
        ] {
            assert_eq!(Entry::parse(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn every_name_survives(vm in "\\PC{1,8}|[\\x01-\\xff]{1,16}", kind in 0usize..3) {
            let entry = Entry::new(Kind::ALL[kind], &vm);
            let name = entry.to_string();
            prop_assert!(name.len() <= 255, "{name} has {} characters", name.len());
            let is_allowed = |byte: u8| byte.is_ascii_graphic() && byte != b':';
            prop_assert!(name.bytes().all(is_allowed), "{name}");
            prop_assert_eq!(Entry::parse(&name), Some(entry));
        }
    }
}
