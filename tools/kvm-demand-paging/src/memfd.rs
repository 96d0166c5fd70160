//! The memory itself: a memfd of shmem or hugetlb pages.

use crate::{
    abi,
    map::{huge_align, AliasMap, Mapping},
    sys::{self, Command},
    Error, PageRange, Result, Vm, PAGE_SIZE,
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{
        fallocate, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate, memfd_create,
        FallocateFlags, MemfdFlags, SealFlags,
    },
    io::{pread, Errno},
};

/// The seals of a memfd, as fcntl(2) has them.
pub use rustix::fs::SealFlags as Seals;

const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// What pages a memfd is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// shmem: pages of 4 KiB, ordinary memory of the kernel, not pinned.
    Shmem,
    /// hugetlb pages of 2 MiB.
    Huge2M,
    /// hugetlb pages of 1 GiB.
    Huge1G,
}

impl Backing {
    /// The page size of the backing, in bytes.
    pub const fn page_size(self) -> u64 {
        match self {
            Self::Shmem => PAGE_SIZE as u64,
            Self::Huge2M => 2 << 20,
            Self::Huge1G => 1 << 30,
        }
    }

    /// The one whose pages have this size, in bytes.
    pub fn of_page_size(bytes: u64) -> Option<Self> {
        [Self::Shmem, Self::Huge2M, Self::Huge1G]
            .into_iter()
            .find(|backing| backing.page_size() == bytes)
    }

    fn flags(self) -> MemfdFlags {
        match self {
            Self::Shmem => MemfdFlags::empty(),
            Self::Huge2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            Self::Huge1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        }
    }
}

/// A memfd.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    size: u64,
    page_size: u64,
}

impl Memfd {
    /// Create a memfd of `size` bytes, sealed against shrinking, as memslots demand it.
    ///
    /// `name` shows in /proc/PID/maps and need not be unique. `size` must be a multiple of the backing's
    /// page size. No memory is allocated; hugetlb pages are reserved when it is mapped.
    pub fn create(name: &str, backing: Backing, size: u64) -> Result<Self> {
        if size == 0 || size % backing.page_size() != 0 {
            return Err(Error::Argument(format!(
                "a memfd of {size} bytes: its size must be a multiple of its page size, {} bytes, and not 0",
                backing.page_size()
            )));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | backing.flags();
        let fd = memfd_create(name, flags).map_err(|errno| {
            let hint = matches!(errno, Errno::NODEV | Errno::INVAL | Errno::NOENT).then(|| {
                format!(
                    "this kernel has no hugetlb pages of {} bytes",
                    backing.page_size()
                )
            });
            Error::sys("memfd_create", format!("{name}, {backing:?}"), errno).advise(hint)
        })?;
        ftruncate(&fd, size).map_err(|errno| {
            Error::sys("ftruncate", format!("memfd {name}, {size} bytes"), errno)
        })?;
        let memfd = Self {
            fd,
            size,
            page_size: backing.page_size(),
        };
        memfd.add_seals(SealFlags::SHRINK)?;
        Ok(memfd)
    }

    /// Create a shmem file of `size` bytes, like a memfd, in folios of 2 MiB.
    ///
    /// Where the kernel can allocate no folio of 2 MiB, it allocates pages of 4 KiB. The host's
    /// settings of transparent huge pages have no effect on that, except `shmem_enabled` = `deny`.
    ///
    /// The call allocates no memory of the file. An access to a hole allocates, clears and charges
    /// 2 MiB. The file is sealed against shrinking. It stays valid when the VM is closed.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP: the kernel has no transparent huge pages.
    pub fn create_huge_shmem(vm: &Vm, size: u64) -> Result<Self> {
        if size == 0 || size % PAGE_SIZE as u64 != 0 {
            return Err(Error::Argument(format!(
                "a memfd of {size} bytes: its size must be a multiple of {PAGE_SIZE} bytes, and not 0"
            )));
        }
        let mut argument = abi::kdp_memfd {
            length: size,
            fd: -1,
            ..Command::sized()
        };
        sys::call(vm, &mut argument).map_err(|errno| {
            let hint = (errno == Errno::OPNOTSUPP).then(|| {
                "this kernel has no transparent huge pages: use ordinary shmem".to_owned()
            });
            Error::sys("KDP_MEMFD", format!("{size} bytes"), errno).advise(hint)
        })?;
        let fd = sys::returned_fd(argument.fd)
            .ok_or_else(|| Error::Peer("the module returned no fd for a memfd".to_owned()))?;
        Ok(Self {
            fd,
            size,
            page_size: PAGE_SIZE as u64,
        })
    }

    /// Take over a memfd that somebody else created.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let stat = fstat(&fd).map_err(|errno| Error::sys("fstat", "memfd", errno))?;
        let fs = fstatfs(&fd).map_err(|errno| Error::sys("fstatfs", "memfd", errno))?;
        let page_size = match fs.f_type as u64 {
            HUGETLBFS_MAGIC => fs.f_bsize as u64,
            _ => PAGE_SIZE as u64,
        };
        Ok(Self {
            fd,
            size: stat.st_size as u64,
            page_size,
        })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size of its pages in bytes: 4096 for shmem, the huge page's for hugetlb.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Its seals.
    pub fn seals(&self) -> Result<Seals> {
        fcntl_get_seals(&self.fd).map_err(|errno| Error::sys("F_GET_SEALS", "memfd", errno))
    }

    /// Add seals, for ever.
    pub fn add_seals(&self, seals: Seals) -> Result<()> {
        fcntl_add_seals(&self.fd, seals)
            .map_err(|errno| Error::sys("F_ADD_SEALS", format!("memfd, {seals:?}"), errno))
    }

    /// Read whole pages of 4 KiB, from `page` on, by pread(2). That also reads what is healthy in a huge page that has a
    /// memory error, where every mapping of it is lost.
    ///
    /// # Errors
    ///
    /// EIO: one of the pages has the error.
    pub fn read(&self, page: u64, data: &mut [u8]) -> Result<()> {
        let argument = format!("memfd, page {page}, {} bytes", data.len());
        let (mut at, mut done) = (page * PAGE_SIZE as u64, 0);
        while done < data.len() {
            match pread(&self.fd, &mut data[done..], at) {
                Ok(0) => return Err(Error::Argument(format!("{argument}: past its end"))),
                Ok(n) => (at, done) = (at + n as u64, done + n),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::sys("pread", argument, errno)),
            }
        }
        Ok(())
    }

    /// Map `len` bytes from `offset`, at the memfd's own page size. Both must be multiples of that.
    pub fn map(&self, offset: u64, len: u64) -> Result<AliasMap> {
        let argument = || format!("memfd, offset {offset}, {len} bytes");
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.size);
        if len == 0 || !fits || offset % self.page_size != 0 || len % self.page_size != 0 {
            return Err(Error::Argument(format!(
                "mapping {}: offset and length must be multiples of the page size, {} bytes, and inside the memfd's {} bytes",
                argument(),
                self.page_size,
                self.size
            )));
        }
        let align = huge_align(len as usize).max(self.page_size as usize);
        Mapping::file(self.fd.as_fd(), offset, len as usize, align)
            .map(AliasMap)
            .map_err(|errno| {
                Error::sys("mmap", argument(), errno).advise(self.pool_hint(errno, len))
            })
    }

    /// Map all of it.
    pub fn map_all(&self) -> Result<AliasMap> {
        self.map(0, self.size)
    }

    fn pool_hint(&self, errno: Errno, len: u64) -> Option<String> {
        let is_short = matches!(errno, Errno::NOMEM | Errno::NOSPC);
        (is_short && self.page_size > PAGE_SIZE as u64).then(|| {
            let kib = self.page_size >> 10;
            format!(
                "{} more free hugetlb pages of {kib} KiB are needed: add them to \
                 /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages",
                len / self.page_size
            )
        })
    }

    /// Allocate all of its memory now. Otherwise the first touch of each page waits until it is allocated and cleared,
    /// which of a huge page takes much longer than to bring 4 KiB.
    ///
    /// # Errors
    ///
    /// ENOSPC: hugetlb has not as many free pages. Some may have been allocated.
    pub fn allocate(&self) -> Result<()> {
        fallocate(&self.fd, FallocateFlags::empty(), 0, self.size).map_err(|errno| {
            Error::sys("fallocate", format!("memfd, {} bytes", self.size), errno)
                .advise(self.pool_hint(errno, self.size))
        })
    }

    /// Give the memory of `range` (in pages of 4096 bytes from the memfd's start) back. It reads as zeros
    /// afterwards. Of a memslot, do this with absent pages only.
    pub fn punch_hole(&self, range: PageRange) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (offset, len) = (
            range.first * PAGE_SIZE as u64,
            range.count * PAGE_SIZE as u64,
        );
        fallocate(&self.fd, flags, offset, len).map_err(|errno| {
            Error::sys(
                "fallocate",
                format!("PUNCH_HOLE, offset {offset}, {len} bytes"),
                errno,
            )
        })
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Memfd> for OwnedFd {
    fn from(memfd: Memfd) -> Self {
        memfd.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shmem_is_sealed_and_sized() {
        let memfd = Memfd::create("test", Backing::Shmem, 1 << 20).unwrap();
        assert!(memfd.seals().unwrap().contains(Seals::SHRINK));
        assert_eq!(ftruncate(&memfd, 4096), Err(Errno::PERM));
        let again = Memfd::from_fd(memfd.into()).unwrap();
        assert_eq!((again.size(), again.page_size()), (1 << 20, 4096));
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        for (backing, size) in [
            (Backing::Shmem, 0),
            (Backing::Shmem, 4097),
            (Backing::Huge2M, 1 << 20),
        ] {
            let error = Memfd::create("test", backing, size)
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("{size} bytes")), "{error}");
        }
        let memfd = Memfd::create("test", Backing::Shmem, 1 << 20).unwrap();
        for (offset, len) in [
            (0, 0),
            (1, 4096),
            (0, 100),
            (1 << 20, 4096),
            (u64::MAX - 4095, 4096),
        ] {
            assert!(memfd.map(offset, len).is_err(), "{offset} {len}");
        }
    }

    #[test]
    fn memory_is_allocated_when_it_is_asked_for() {
        let memfd = Memfd::create("test", Backing::Shmem, 1 << 20).unwrap();
        let blocks = || fstat(&memfd).unwrap().st_blocks;
        assert_eq!(blocks(), 0);
        memfd.allocate().unwrap();
        assert_eq!(blocks() * 512, 1 << 20);
    }

    #[test]
    fn punched_memory_reads_zero() {
        let memfd = Memfd::create("test", Backing::Shmem, 1 << 20).unwrap();
        let map = memfd.map_all().unwrap();
        map.write(3, &[1; PAGE_SIZE]).unwrap();
        memfd.punch_hole(PageRange::page(3)).unwrap();
        let mut page = [1; PAGE_SIZE];
        map.read(3, &mut page).unwrap();
        assert_eq!(page, [0; PAGE_SIZE]);
    }
}
