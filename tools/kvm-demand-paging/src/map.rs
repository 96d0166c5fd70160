//! Mappings of guest memory, of the memfd behind it, and of bare words.

use crate::{Error, PageRange, Result, PAGE_SIZE};
use rustix::{
    fd::BorrowedFd,
    mm::{madvise, mmap, mmap_anonymous, munmap, Advice, MapFlags, ProtFlags},
};
use std::{ffi::c_void, fmt, ptr, ptr::NonNull, slice, sync::atomic::AtomicU64};
use vm_memory::VolatileSlice;

/// A mapping that is unmapped when it is dropped.
pub(crate) struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; it is accessed through atomics and volatile
// copies only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map a file, shared, at an address that is a multiple of `align`, so that huge pages fit.
    pub(crate) fn file(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        align: usize,
    ) -> rustix::io::Result<Self> {
        let hole = Self::hole(len, align)?;
        // SAFETY: MAP_FIXED replaces `hole`, which is ours alone and as long.
        unsafe {
            mmap(
                hole.address.as_ptr().cast(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                offset,
            )?
        };
        Ok(hole)
    }

    /// Zeroed private memory that is only there where it was touched.
    pub(crate) fn anonymous(len: usize) -> rustix::io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let address = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )?
        };
        Self::own(address, len)
    }

    /// Aligned addresses with nothing behind them.
    fn hole(len: usize, align: usize) -> rustix::io::Result<Self> {
        let whole = len.checked_add(align).ok_or(rustix::io::Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let address = unsafe { mmap_anonymous(ptr::null_mut(), whole, ProtFlags::empty(), flags)? };
        let mut hole = Self::own(address, whole)?;
        let skip = hole.address.as_ptr().align_offset(align);
        let tail = hole.split(skip + len);
        let middle = hole.split(skip);
        drop((hole, tail));
        Ok(middle)
    }

    fn own(address: *mut c_void, len: usize) -> rustix::io::Result<Self> {
        let address = NonNull::new(address.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { address, len })
    }

    /// Keep the first `at` bytes, return the rest.
    fn split(&mut self, at: usize) -> Self {
        debug_assert!(at <= self.len);
        let rest = Self {
            // SAFETY: `at` is inside the mapping or one past it.
            address: unsafe { self.address.add(at) },
            len: self.len - at,
        };
        self.len = at;
        rest
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn volatile(&self) -> VolatileSlice<'_> {
        // SAFETY: the mapping is readable, writable and `len` bytes long, and lives as long as the borrow;
        // Rust references to its bytes are never made.
        unsafe { VolatileSlice::new(self.as_ptr(), self.len) }
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, readable and writable, and lives as long as the borrow; who
        // asks for words accesses it as atomics only.
        unsafe { slice::from_raw_parts(self.as_ptr().cast(), self.len / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the addresses are this mapping's own and no borrow of it is left. It cannot fail for
            // a mapping that exists, unless splitting one exceeds the limit of mappings: then it leaks.
            let _ = unsafe { munmap(self.as_ptr().cast(), self.len) };
        }
    }
}

/// The alignment that lets the kernel map blocks of 2 MiB by one entry, if `len` bytes hold one.
pub(crate) fn huge_align(len: usize) -> usize {
    const BLOCK: usize = 2 << 20;
    if len < BLOCK {
        PAGE_SIZE
    } else {
        BLOCK
    }
}

macro_rules! accessors {
    () => {
        /// Where it begins.
        pub fn as_ptr(&self) -> *mut u8 {
            self.0.as_ptr()
        }

        /// Its length in bytes.
        #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
        pub fn len(&self) -> usize {
            self.0.len()
        }

        /// Its length in pages.
        pub fn pages(&self) -> u64 {
            (self.0.len() / PAGE_SIZE) as u64
        }

        /// All of it, for copies that share no references with whoever else writes here.
        pub fn volatile(&self) -> VolatileSlice<'_> {
            self.0.volatile()
        }

        /// The bytes of some pages.
        pub fn slice(&self, range: PageRange) -> Result<VolatileSlice<'_>> {
            if range.is_empty()
                || range.first >= self.pages()
                || range.count > self.pages() - range.first
            {
                return Err(Error::Argument(format!(
                    "pages {} to {} are not in a mapping of {} pages",
                    range.first,
                    range.end(),
                    self.pages()
                )));
            }
            let bytes = self.0.volatile();
            bytes
                .subslice(
                    range.first as usize * PAGE_SIZE,
                    range.count as usize * PAGE_SIZE,
                )
                .map_err(|error| Error::Argument(error.to_string()))
        }

        /// Write `data`, a number of whole pages, to the pages from `page`.
        pub fn write(&self, page: u64, data: &[u8]) -> Result<()> {
            self.slice(whole_pages(page, data.len())?)?.copy_from(data);
            Ok(())
        }

        /// Read the pages from `page` into `data`, a number of whole pages.
        pub fn read(&self, page: u64, data: &mut [u8]) -> Result<()> {
            self.slice(whole_pages(page, data.len())?)?.copy_to(data);
            Ok(())
        }
    };
}

fn whole_pages(page: u64, len: usize) -> Result<PageRange> {
    if len % PAGE_SIZE != 0 {
        return Err(Error::Argument(format!(
            "{len} bytes are not a number of whole pages of {PAGE_SIZE}"
        )));
    }
    Ok(PageRange::new(page, (len / PAGE_SIZE) as u64))
}

/// Guest memory: a memslot, mapped as a VMM maps it for KVM.
///
/// Touching an absent page waits until it is present. Touching it when nobody can make it present any more
/// (the VM is closed, the memslot removed) raises SIGBUS.
pub struct GuestMap(pub(crate) Mapping);

impl GuestMap {
    accessors!();
}

/// The memfd behind a memslot, mapped directly: how a handler fills pages.
///
/// It is mapped at the backing's own page size and consults no page state. Page 0 is the page at the
/// offset that was asked for. Write absent pages only: a present one may have been written by the guest.
pub struct AliasMap(pub(crate) Mapping);

impl AliasMap {
    accessors!();

    /// Have what the memfd has at these pages now, whole pages of its own size: after [`Vm::replace`](crate::Vm::replace)
    /// this mapping has errors there still, which the kernel has put where the old huge page was mapped.
    pub fn refresh(&self, range: PageRange) -> Result<()> {
        let bytes = self.slice(range)?;
        // SAFETY: the bytes are of this mapping, which is one of a file, shared: it is mapped anew at the next touch.
        unsafe {
            madvise(
                bytes.ptr_guard_mut().as_ptr().cast(),
                bytes.len(),
                Advice::LinuxDontNeed,
            )
        }
        .map_err(|errno| {
            Error::sys(
                "madvise",
                format!("MADV_DONTNEED, pages {} to {}", range.first, range.end()),
                errno,
            )
        })
    }

    /// Fill some pages with zeros.
    pub fn zero(&self, range: PageRange) -> Result<()> {
        const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        self.slice(range)?;
        for page in range.iter() {
            self.write(page, &ZEROS)?;
        }
        Ok(())
    }
}

impl fmt::Debug for GuestMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestMap({:p}, {} bytes)", self.as_ptr(), self.len())
    }
}

impl fmt::Debug for AliasMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AliasMap({:p}, {} bytes)", self.as_ptr(), self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backing, Memfd};

    #[test]
    fn pages_are_written_and_read_inside_the_mapping_only() {
        let memfd = Memfd::create("test", Backing::Shmem, 4 << 20).unwrap();
        let map = memfd.map(1 << 20, 3 << 20).unwrap();
        assert_eq!(map.as_ptr() as usize % (2 << 20), 0);
        assert_eq!(map.pages(), 768);
        map.write(767, &[7; PAGE_SIZE]).unwrap();
        let mut page = [0; PAGE_SIZE];
        memfd.map_all().unwrap().read(1023, &mut page).unwrap();
        assert_eq!(page, [7; PAGE_SIZE]);
        map.zero(PageRange::new(766, 2)).unwrap();
        map.read(767, &mut page).unwrap();
        assert_eq!(page, [0; PAGE_SIZE]);
        for (page, len) in [
            (767, 2 * PAGE_SIZE),
            (768, PAGE_SIZE),
            (u64::MAX, PAGE_SIZE),
            (0, 5),
            (0, 0),
        ] {
            assert!(
                map.write(page, &vec![0; len]).is_err(),
                "page {page}, {len} bytes"
            );
        }
    }

    #[test]
    fn anonymous_words_are_zero() {
        let map = Mapping::anonymous(PAGE_SIZE).unwrap();
        assert!(map
            .words()
            .iter()
            .all(|word| word.load(std::sync::atomic::Ordering::Relaxed) == 0));
        assert_eq!(map.words().len(), 512);
    }
}
