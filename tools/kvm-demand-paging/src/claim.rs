//! Filling pages past the module, as the only one who does.

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
};

use crate::{
    abi,
    sys::{self, Command},
    Error, PageRange, Result, Vm,
};

/// What a call made of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Claimed {
    /// What the call was for: it is claimed, or present, or given up.
    Done,
    /// It is present. Of a page to be committed: its bit was set by hand.
    Present,
    /// It is poisoned.
    Lost,
    /// Somebody has claimed it already, perhaps the same claimant.
    Taken,
    /// The claimant has no claim on it, or no longer: what it has written there does not count.
    Void,
}

impl Claimed {
    fn decode(raw: u8) -> Self {
        match u32::from(raw) {
            abi::KDP_CLAIM_DONE => Self::Done,
            abi::KDP_CLAIM_PRESENT => Self::Present,
            abi::KDP_CLAIM_LOST => Self::Lost,
            abi::KDP_CLAIM_TAKEN => Self::Taken,
            _ => Self::Void,
        }
    }
}

/// Who fills pages of a memslot through an [`AliasMap`](crate::AliasMap) or by a device, not by [`Vm::place`].
///
/// A page that it has claimed nobody else fills: to all others it is absent, also if it was zero or has a source. Claim,
/// write, commit:
///
/// ```no_run
/// # use kvm_demand_paging::{AliasMap, Claimed, PageRange, Vm};
/// # fn fill(vm: &Vm, alias: &AliasMap) -> Result<(), kvm_demand_paging::Error> {
/// let claimant = vm.claimant(0)?;
/// let range = PageRange::new(64, 32);
/// for (page, claimed) in range.iter().zip(claimant.claim(range)?) {
///     if claimed == Claimed::Done {
///         alias.write(page, &[0x5a; 4096])?;
///     }
/// }
/// claimant.commit(range)?;
/// # Ok(())
/// # }
/// ```
///
/// What is claimed and not committed when it is dropped, or when its process dies, is as before; with other descriptors of
/// it, when the last is closed.
#[derive(Debug)]
pub struct Claimant {
    fd: OwnedFd,
}

impl Vm {
    /// Make a claimant of a memslot.
    pub fn claimant(&self, slot_id: u32) -> Result<Claimant> {
        let mut argument = abi::kdp_claimant {
            slot_id,
            fd: -1,
            ..Command::sized()
        };
        sys::call(self, &mut argument).map_err(|errno| {
            Error::sys("KDP_CLAIMANT", format!("memslot {slot_id}"), errno)
                .advise(hint(errno).map(str::to_owned))
        })?;
        sys::returned_fd(argument.fd)
            .map(Claimant::from_fd)
            .ok_or_else(|| Error::Peer("the module returned no fd for a claimant".to_owned()))
    }
}

impl Claimant {
    /// Take over a claimant's fd, say one that came over a socket: who has it needs no fd of the VM.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Claim the pages of a range that are not present; what became of each.
    pub fn claim(&self, range: PageRange) -> Result<Vec<Claimed>> {
        self.call(sys::claim, "KDP_CLAIM", 0, range)
    }

    /// Make claimed pages present, with all that was written to them, and let go who waits for them; what became of each.
    pub fn commit(&self, range: PageRange) -> Result<Vec<Claimed>> {
        self.call(sys::commit, "KDP_COMMIT", 0, range)
    }

    /// Give claims up: the pages are what they were before. Nobody may be writing to them any more.
    pub fn abandon(&self, range: PageRange) -> Result<Vec<Claimed>> {
        self.call(sys::commit, "KDP_COMMIT", abi::KDP_COMMIT_ABANDON, range)
    }

    fn call(
        &self,
        call: Call,
        name: &'static str,
        flags: u32,
        range: PageRange,
    ) -> Result<Vec<Claimed>> {
        let mut results = vec![0; usize::try_from(range.count).unwrap_or(usize::MAX)];
        call(self.as_fd(), flags, range, &mut results).map_err(|(errno, done)| {
            let what = format!(
                "page {}, {} pages, of which {done} are done",
                range.first, range.count
            );
            Error::sys(name, what, errno).advise(hint(errno).map(str::to_owned))
        })?;
        Ok(results.into_iter().map(Claimed::decode).collect())
    }
}

impl AsFd for Claimant {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Claimant> for OwnedFd {
    fn from(claimant: Claimant) -> Self {
        claimant.fd
    }
}

/// A call of a claimant, with its flags and room for results; on failure, how many pages were dealt with.
type Call = fn(BorrowedFd<'_>, u32, PageRange, &mut [u8]) -> Result<(), (Errno, u64)>;

fn hint(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::NOENT => Some("the memslot is not there, or was removed"),
        Errno::NXIO => Some("demand paging of the memslot is off: all its pages are present"),
        Errno::INVAL => Some("there must be at least one page, and none past the memslot's end"),
        Errno::NOSPC => {
            Some("the memslot has as many claimants as it can have: drop some, or share one")
        }
        Errno::NOTTY => Some("the module is older than this program, or the fd is no claimant's"),
        _ => None,
    }
}
