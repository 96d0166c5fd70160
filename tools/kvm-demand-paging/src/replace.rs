//! Huge pages with memory errors, and fresh ones in their place.

use rustix::{
    fd::{AsFd, AsRawFd},
    io::Errno,
};

use crate::{
    abi,
    sys::{self, Command},
    Backing, Cause, Error, Memfd, Result, Vm, PAGE_SIZE,
};

/// What came of [`Vm::replace`], in pages of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// Pages that were copied.
    pub copied: u64,
    /// Pages that stay poisoned: their bytes are lost.
    pub lost: u64,
    /// Pages whose frames were bad and that were not present: they are poisoned no longer, and their content may come.
    pub healed: u64,
    /// Pages that turned out to be bad when they were copied.
    pub errors: u64,
}

impl Vm {
    /// Replace a huge page of a memslot, which has a memory error, by a fresh one of the system's, with the guest running.
    /// `first` is its first page.
    ///
    /// Every memslot of the memfd has the fresh one from then on, and so has who maps the memfd anew, or reads it. A
    /// mapping of the memfd that was made before has it once it is [refreshed](crate::AliasMap::refresh).
    ///
    /// # Errors
    ///
    /// ENXIO: the huge page has no memory error; ENOMEM: there is no free huge page; EBUSY: a device has it pinned.
    pub fn replace(&self, slot_id: u32, first: u64) -> Result<Replaced> {
        let bytes = self.memslot_info(slot_id)?.backing_page_size;
        let backing = match Backing::of_page_size(bytes) {
            Some(backing) if bytes > PAGE_SIZE as u64 => backing,
            _ => {
                return Err(Error::Argument(format!(
                    "memslot {slot_id} has pages of {bytes} bytes: only those of hugetlb can be replaced"
                )))
            }
        };
        let memfd = Memfd::create("kdp-replace", backing, bytes)?;
        self.replace_by(slot_id, first, &memfd, 0)
    }

    /// The same, by the huge page of a memfd of the caller's, at `offset` bytes: for one that is on a certain node, or was
    /// put aside.
    pub fn replace_by(
        &self,
        slot_id: u32,
        first: u64,
        memfd: &Memfd,
        offset: u64,
    ) -> Result<Replaced> {
        let mut argument = abi::kdp_replace {
            slot_id,
            memfd: memfd.as_fd().as_raw_fd(),
            first,
            offset,
            ..Command::sized()
        };
        sys::call(self, &mut argument).map_err(|errno| {
            let what = format!("memslot {slot_id}, page {first}, memfd offset {offset}");
            Error::sys("KDP_REPLACE", what, errno).advise(hint(errno).map(str::to_owned))
        })?;
        Ok(Replaced {
            copied: argument.copied,
            lost: argument.lost,
            healed: argument.healed,
            errors: argument.errors,
        })
    }

    /// The first pages of the huge pages of a memslot that have a memory error.
    pub fn damaged(&self, slot_id: u32) -> Result<Vec<u64>> {
        let huge = self.memslot_info(slot_id)?.backing_page_size / PAGE_SIZE as u64;
        let mut firsts: Vec<u64> = self
            .poisoned(slot_id)?
            .iter()
            .filter(|run| run.cause == Cause::Hardware)
            .flat_map(|run| (run.range.first / huge)..=((run.range.end() - 1) / huge))
            .map(|number| number * huge)
            .collect();
        firsts.dedup();
        Ok(firsts)
    }
}

fn hint(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::NOENT => Some("the VM has no such memslot"),
        Errno::NXIO => Some("the huge page has no memory error: there is nothing to replace it for"),
        Errno::NOMEM => Some(
            "there is no free huge page of this size: raise nr_hugepages in /sys/kernel/mm/hugepages, and try again",
        ),
        Errno::BUSY => Some(
            "a device or another process has the huge page pinned, or the fresh one is mapped or its memfd has memslots: they \
             must let it go first",
        ),
        Errno::INVAL => Some(
            "the memslot must be on hugetlb, the page the first of a huge page, and the memfd of the same page size, with a \
             whole huge page at an offset that is a multiple of that",
        ),
        _ => None,
    }
}
