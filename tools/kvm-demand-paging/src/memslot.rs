//! Memslots: how they are created, described and mapped.

use crate::{
    abi,
    map::{huge_align, GuestMap, Mapping},
    sys::{self, Command},
    Error, Memfd, PageRange, PresentBitmap, Result, Vm, PAGE_SIZE,
};
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{open, seek, Mode, OFlags, SeekFrom},
    io::Errno,
};
use std::path::PathBuf;

const PAGE: u64 = PAGE_SIZE as u64;

/// Describes a memslot to be created: see [`Vm::create_memslot`].
///
/// Unless told otherwise it begins at GFN 0, takes all of the memfd, has no name, and demand paging is off.
#[derive(Clone, Debug)]
#[must_use = "it does nothing until create() is called"]
pub struct MemslotBuilder<'a> {
    vm: &'a Vm,
    memfd: BorrowedFd<'a>,
    slot_id: u32,
    base_gfn: u64,
    nr_pages: u64,
    offset: u64,
    paging: bool,
    poison_signals: bool,
    name: String,
}

impl<'a> MemslotBuilder<'a> {
    pub(crate) fn new(vm: &'a Vm, slot_id: u32, memfd: &'a Memfd) -> Self {
        Self {
            vm,
            memfd: memfd.as_fd(),
            slot_id,
            base_gfn: 0,
            nr_pages: memfd.size() / PAGE,
            offset: 0,
            paging: false,
            poison_signals: false,
            name: String::new(),
        }
    }

    /// The guest frame number of page 0. Fault exits need it to be where KVM has the memslot.
    pub fn base_gfn(mut self, gfn: u64) -> Self {
        self.base_gfn = gfn;
        self
    }

    /// Take `pages` pages of the memfd, from `offset` bytes.
    pub fn part(mut self, offset: u64, pages: u64) -> Self {
        self.offset = offset;
        self.nr_pages = pages;
        self
    }

    /// Whether demand paging is on at once, with every page absent.
    pub fn paging(mut self, on: bool) -> Self {
        self.paging = on;
        self
    }

    /// Whether a vCPU that touches a poisoned page gets the SIGBUS of a memory error, as elsewhere: for VMMs that do not
    /// know us. Else a thread with exits on gets an exit, and KVM_RUN of others fails.
    pub fn poison_signals(mut self, on: bool) -> Self {
        self.poison_signals = on;
        self
    }

    /// Give it a path, /dev/kdp/NAME. The name has 1 to 31 of `[A-Za-z0-9._-]` and no dot in front.
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Create the memslot.
    pub fn create(self) -> Result<Memslot> {
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let flags = flag(self.paging, abi::KDP_MEMSLOT_PAGING)
            | flag(self.poison_signals, abi::KDP_MEMSLOT_POISON_SIGNAL);
        let mut argument = abi::kdp_memslot_create {
            flags,
            slot_id: self.slot_id,
            memfd: self.memfd.as_raw_fd(),
            base_gfn: self.base_gfn,
            nr_pages: self.nr_pages,
            memfd_offset: self.offset,
            ..Command::sized()
        };
        // One byte is left for the NUL.
        let room = argument.name.len() - 1;
        if self.name.len() > room {
            return Err(Error::Argument(format!(
                "the memslot's name '{}' has {} bytes: at most {room} are allowed",
                self.name,
                self.name.len()
            )));
        }
        argument.name[..self.name.len()].copy_from_slice(self.name.as_bytes());
        sys::call(self.vm, &mut argument).map_err(|errno| self.error(errno))?;
        Memslot::returned(argument.fd, self.nr_pages)
    }

    fn error(&self, errno: Errno) -> Error {
        let argument = format!(
            "memslot {}, name '{}', GFN {:#x}, {} pages, memfd offset {}",
            self.slot_id, self.name, self.base_gfn, self.nr_pages, self.offset
        );
        let hint = match errno {
            Errno::PERM => "the memfd must have F_SEAL_SHRINK and neither F_SEAL_WRITE nor F_SEAL_FUTURE_WRITE",
            Errno::ACCESS => "the memfd must be open for writing",
            Errno::EXIST => "the VM has this id or a part of this GFN range, or the name is taken (see 'kdp stat')",
            Errno::INVAL => {
                "the memfd must be of shmem or hugetlb, offset and length multiples of its page size and inside \
                 it, the name 1 to 31 of [A-Za-z0-9._-] without a dot in front"
            }
            Errno::NOSPC => "the VM has as many memslots as it can have",
            _ => return Error::sys("KDP_MEMSLOT_CREATE", argument, errno),
        };
        Error::sys("KDP_MEMSLOT_CREATE", argument, errno).advise(Some(hint.to_owned()))
    }
}

/// A memslot's file descriptor. It lives on until it is dropped, but serves no page once the memslot is
/// removed or its VM is closed.
#[derive(Debug)]
pub struct Memslot {
    fd: OwnedFd,
    pages: u64,
}

impl Memslot {
    /// Open a memslot that has a name.
    pub fn open(name: &str) -> Result<Self> {
        let path = Self::path(name);
        let fd = open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| Error::sys("open", path.display().to_string(), errno))?;
        Self::from_fd(fd)
    }

    /// The path of a memslot of this name.
    pub fn path(name: &str) -> PathBuf {
        let dir = abi::KDP_MEMSLOT_DIR
            .strip_suffix(b"\0")
            .unwrap_or(abi::KDP_MEMSLOT_DIR);
        PathBuf::from(String::from_utf8_lossy(dir).into_owned()).join(name)
    }

    /// Take over a memslot's fd, say one that came over a socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let size = seek(&fd, SeekFrom::End(0))
            .map_err(|errno| Error::sys("lseek", "a memslot, SEEK_END", errno))?;
        Ok(Self {
            fd,
            pages: size / PAGE,
        })
    }

    pub(crate) fn returned(fd: i32, pages: u64) -> Result<Self> {
        let fd = sys::returned_fd(fd)
            .ok_or_else(|| Error::Peer("the module returned no fd for a memslot".to_owned()))?;
        Ok(Self { fd, pages })
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.pages * PAGE
    }

    /// Map all of it as guest memory, at an address that huge pages fit to.
    pub fn map(&self) -> Result<GuestMap> {
        self.map_range(PageRange::new(0, self.pages))
    }

    /// Map some of its pages; page 0 of the mapping is the range's first.
    pub fn map_range(&self, range: PageRange) -> Result<GuestMap> {
        if range.is_empty() || range.first >= self.pages || range.count > self.pages - range.first {
            return Err(Error::Argument(format!(
                "pages {} to {} are not in a memslot of {} pages",
                range.first,
                range.end(),
                self.pages
            )));
        }
        let (offset, len) = (range.first * PAGE, (range.count * PAGE) as usize);
        Mapping::file(self.fd.as_fd(), offset, len, huge_align(len))
            .map(GuestMap)
            .map_err(|errno| {
                Error::sys(
                    "mmap",
                    format!("a memslot, offset {offset}, {len} bytes"),
                    errno,
                )
            })
    }

    /// Map its present bitmap. Demand paging must be on.
    pub fn bitmap(&self) -> Result<PresentBitmap> {
        PresentBitmap::map(self.fd.as_fd(), self.pages)
    }
}

impl AsFd for Memslot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Memslot> for OwnedFd {
    fn from(memslot: Memslot) -> Self {
        memslot.fd
    }
}

/// What a memslot is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemslotInfo {
    /// Its id, unique in the VM.
    pub slot_id: u32,
    /// Whether demand paging is on.
    pub paging: bool,
    /// The guest frame number of page 0.
    pub base_gfn: u64,
    /// Its length in pages.
    pub pages: u64,
    /// Where in the memfd page 0 is, in bytes.
    pub memfd_offset: u64,
    /// The page size of the memfd, in bytes.
    pub backing_page_size: u64,
    /// Its name, if it has one.
    pub name: Option<String>,
}

impl MemslotInfo {
    pub(crate) fn decode(get: &abi::kdp_memslot_get) -> Self {
        let end = get
            .name
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(get.name.len());
        let name = String::from_utf8_lossy(&get.name[..end]).into_owned();
        Self {
            slot_id: get.slot_id,
            paging: get.paging != abi::KDP_PAGING_OFF,
            base_gfn: get.base_gfn,
            pages: get.nr_pages,
            memfd_offset: get.memfd_offset,
            backing_page_size: get.backing_page_size,
            name: Some(name).filter(|name| !name.is_empty()),
        }
    }

    /// The page of this memslot that is at a guest frame number, if it is here.
    pub fn page_of_gfn(&self, gfn: u64) -> Option<u64> {
        gfn.checked_sub(self.base_gfn)
            .filter(|page| *page < self.pages)
    }
}

/// The memslots of a VM, by ascending id: see [`Vm::memslots`].
#[derive(Debug)]
pub struct Memslots<'a> {
    vm: &'a Vm,
    next: Option<u32>,
}

impl<'a> Memslots<'a> {
    pub(crate) fn new(vm: &'a Vm) -> Self {
        Self { vm, next: Some(0) }
    }
}

impl Iterator for Memslots<'_> {
    type Item = Result<MemslotInfo>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.vm.get(self.next.take()?, abi::KDP_GET_NEXT) {
            Ok(get) => {
                self.next = get.slot_id.checked_add(1);
                Some(Ok(MemslotInfo::decode(&get)))
            }
            Err(error) if error.errno() == Some(Errno::NOENT.raw_os_error()) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_decoded() {
        let mut get = abi::kdp_memslot_get {
            slot_id: 4,
            paging: abi::KDP_PAGING_ON,
            base_gfn: 0x100,
            nr_pages: 16,
            memfd_offset: 4096,
            backing_page_size: 4096,
            ..Command::sized()
        };
        assert_eq!(MemslotInfo::decode(&get).name, None);
        get.name[..3].copy_from_slice(b"ram");
        let info = MemslotInfo::decode(&get);
        assert_eq!(
            (info.name.as_deref(), info.paging, info.pages),
            (Some("ram"), true, 16)
        );
        assert_eq!(info.page_of_gfn(0xff), None);
        assert_eq!(info.page_of_gfn(0x10f), Some(15));
        assert_eq!(info.page_of_gfn(0x110), None);
        // A name that fills the field has no NUL.
        get.name = [b'x'; 32];
        assert_eq!(MemslotInfo::decode(&get).name, Some("x".repeat(32)));
    }

    #[test]
    fn paths() {
        assert_eq!(Memslot::path("ram"), PathBuf::from("/dev/kdp/ram"));
    }
}
