//! Pages whose bytes are lost.

use rustix::io::Errno;

use crate::{
    abi,
    sys::{self, Command},
    Error, Marked, PageRange, Result, Vm,
};

/// Why a page is poisoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// A memory error: its frame is bad, and it cannot be healed where it is.
    Hardware,
    /// A call said so.
    Emulated,
    /// It was lost where the guest came from.
    Inherited,
    /// A cause of a newer module that this crate does not know.
    Unknown(u32),
}

impl Cause {
    fn decode(raw: u32) -> Self {
        match raw {
            abi::KDP_CAUSE_HARDWARE => Self::Hardware,
            abi::KDP_CAUSE_EMULATED => Self::Emulated,
            abi::KDP_CAUSE_INHERITED => Self::Inherited,
            other => Self::Unknown(other),
        }
    }

    fn encode(self) -> u32 {
        match self {
            Self::Hardware => abi::KDP_CAUSE_HARDWARE,
            Self::Emulated => abi::KDP_CAUSE_EMULATED,
            Self::Inherited => abi::KDP_CAUSE_INHERITED,
            Self::Unknown(other) => other,
        }
    }
}

/// Poisoned pages side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poisoned {
    /// The pages.
    pub range: PageRange,
    /// Why.
    pub cause: Cause,
}

/// Entries of one KDP_POISON_LIST.
const ROOM: usize = 256;

impl Vm {
    /// Say that the bytes of pages are lost: they are unmapped from everybody before this returns, and who touches one
    /// gets what an access to lost memory gets, 4 KiB of it. `cause` is [`Cause::Emulated`] or [`Cause::Inherited`].
    pub fn poison(&self, slot_id: u32, ranges: &[PageRange], cause: Cause) -> Result<Marked> {
        self.change_poison(slot_id, ranges, 0, cause.encode())
    }

    /// Poison what was poisoned where the guest came from ([`Vm::poisoned`] there): it is lost to the guest here, too.
    pub fn inherit_poison(&self, slot_id: u32, list: &[Poisoned]) -> Result<Marked> {
        let ranges: Vec<PageRange> = list.iter().map(|run| run.range).collect();
        let mut sum = Marked {
            done: 0,
            changed: 0,
        };
        for ranges in ranges.chunks(abi::KDP_MAX_RANGES as usize) {
            let marked = self.poison(slot_id, ranges, Cause::Inherited)?;
            sum.done += marked.done;
            sum.changed += marked.changed;
        }
        Ok(sum)
    }

    /// Take the poison from pages, after right bytes were put there, or they were made absent.
    ///
    /// # Errors
    ///
    /// EHWPOISON: the frame of one of them is bad.
    pub fn heal(&self, slot_id: u32, ranges: &[PageRange]) -> Result<Marked> {
        self.change_poison(slot_id, ranges, abi::KDP_POISON_HEAL, 0)
    }

    fn change_poison(
        &self,
        slot_id: u32,
        ranges: &[PageRange],
        flags: u32,
        cause: u32,
    ) -> Result<Marked> {
        let mut argument = abi::kdp_poison {
            flags,
            slot_id,
            cause,
            ranges: ranges.as_ptr() as u64,
            nr_ranges: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
            ..Command::sized()
        };
        // `PageRange` has the layout of `struct kdp_range`, and the call only reads the ranges.
        sys::call(self, &mut argument).map_err(|errno| {
            let what = format!(
                "memslot {slot_id}, {} ranges, of which {} are done",
                ranges.len(),
                argument.done
            );
            Error::sys("KDP_POISON", what, errno).advise(hint(errno).map(str::to_owned))
        })?;
        Ok(Marked {
            done: argument.done,
            changed: argument.changed,
        })
    }

    /// The poisoned pages of a memslot, in rising order: what a VMM hands on with the guest.
    pub fn poisoned(&self, slot_id: u32) -> Result<Vec<Poisoned>> {
        let mut all = Vec::new();
        let mut room = [abi::kdp_poisoned::default(); ROOM];
        let mut from = 0;
        loop {
            let (found, next) =
                sys::poison_list(self, slot_id, from, &mut room).map_err(|errno| {
                    Error::sys("KDP_POISON_LIST", format!("memslot {slot_id}"), errno)
                        .advise(hint(errno).map(str::to_owned))
                })?;
            all.extend(found.iter().map(|raw| Poisoned {
                range: PageRange::new(raw.first, raw.count),
                cause: Cause::decode(raw.cause),
            }));
            if found.len() < ROOM {
                return Ok(all);
            }
            from = next;
        }
    }
}

fn hint(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::NOENT => Some("the VM has no such memslot"),
        Errno::HWPOISON => Some("a page has a bad frame: it cannot be healed where it is"),
        Errno::INVAL => Some(
            "there must be 1 to max_ranges ranges, none of them empty or past the memslot's end, and a cause that a call \
             can say",
        ),
        _ => None,
    }
}
