//! Giving absent pages their bytes by a call.

use rustix::io::Errno;

use crate::{abi, sys, Error, PageRange, Result, Vm, PAGE_SIZE};

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placed {
    /// It has its bytes by this call, and is present.
    Now,
    /// It was present: it was left alone.
    Present,
    /// It is poisoned: it was left alone.
    Lost,
    /// A [`Claimant`](crate::Claimant) is filling it: it was left alone. Should that give it up, there is an event for who
    /// waits for it.
    Claimed,
}

impl Placed {
    fn decode(raw: u8) -> Self {
        match u32::from(raw) {
            abi::KDP_PLACED_NOW => Self::Now,
            abi::KDP_PLACED_LOST => Self::Lost,
            abi::KDP_PLACED_CLAIMED => Self::Claimed,
            _ => Self::Present,
        }
    }
}

impl Vm {
    /// Give the pages from `first` on their bytes, a number of whole pages, where they are absent, and make them present.
    /// Who waits for them goes on. A page that is present, poisoned or claimed is left alone: what became of each
    /// page is returned.
    ///
    /// It needs no mapping of the memfd, and works in a huge page that has a memory error, which cannot be mapped.
    ///
    /// # Errors
    ///
    /// After an error some pages may have been placed; to place all again is harmless.
    pub fn place(&self, slot_id: u32, first: u64, data: &[u8]) -> Result<Vec<Placed>> {
        let mut results = vec![0; data.len() / PAGE_SIZE];
        let count = results.len() as u64;
        if data.len() % PAGE_SIZE != 0 {
            return Err(Error::Argument(format!(
                "{} bytes are not a number of whole pages of {PAGE_SIZE}",
                data.len()
            )));
        }
        sys::place(
            self,
            slot_id,
            PageRange::new(first, count),
            data,
            &mut results,
        )
        .map_err(|(errno, done)| {
            let what =
                format!("memslot {slot_id}, page {first}, {count} pages, of which {done} are done");
            Error::sys("KDP_PLACE", what, errno).advise(hint(errno).map(str::to_owned))
        })?;
        Ok(results.into_iter().map(Placed::decode).collect())
    }
}

fn hint(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::NOENT => Some("the VM has no such memslot"),
        Errno::NXIO => Some("demand paging of the memslot is off: all its pages are present"),
        Errno::INVAL => Some("there must be at least one page, and none past the memslot's end"),
        Errno::NOMEM => Some("there is no memory for a page"),
        _ => None,
    }
}
