//! Where the contents of guest memory are before the guest asks for them.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_demand_paging::source::{Content, Location, Options, PageSource};
use kvm_demand_paging::{AliasMap, PageRange};
use vm_memory::volatile_memory::VolatileSlice;

use crate::error::{Error, Result};
use crate::guest::HASH_FACTOR;
use crate::memory::{buffer, PAGE_SIZE};

/// Pages by their number. Several threads fetch at once.
pub trait Source: Send + Sync {
    /// How many pages there are.
    fn pages(&self) -> u64;

    /// Copy these pages to `to`, which is as long as they are.
    fn fetch(&self, pages: PageRange, to: &VolatileSlice<'_>) -> Result<()>;

    /// The same pages in memory, if this source has them there anyway: saves a copy to those who copy on.
    fn direct(&self, pages: PageRange) -> Option<VolatileSlice<'_>> {
        let _ = pages;
        None
    }
}

/// An image in memory, of known content.
pub struct Image {
    memory: AliasMap,
    pages: u64,
}

/// Pages after which [`Image::repeating`] begins again: a prime number, so that no block of a power of two has the
/// contents of another one near it.
const PERIOD: u64 = 4099;

impl Image {
    /// An image of `bytes` bytes in which no two words are equal. Each seed gives another one.
    pub fn generate(bytes: u64, seed: u64) -> Result<Self> {
        if bytes == 0 || bytes % PAGE_SIZE != 0 {
            return Err(Error::invalid(format!(
                "an image of {bytes} bytes: it must be a multiple of {PAGE_SIZE} and not 0"
            )));
        }
        if let Some(available) = available_memory().filter(|&available| bytes > available) {
            return Err(Error::invalid(format!(
                "an image of {bytes} bytes: this machine has {available} bytes of memory left. Take a smaller \
                 --memory, or keep the contents in a file (--source file:PATH)"
            )));
        }
        let memory = buffer(bytes)?;
        let mut page = [0_u8; PAGE_SIZE as usize];
        for n in 0..memory.pages() {
            fill_page(n, seed, &mut page);
            memory.write(n, &page)?;
        }
        Ok(Self {
            pages: memory.pages(),
            memory,
        })
    }

    /// An image of `bytes` bytes that takes little memory: its contents repeat.
    pub fn repeating(bytes: u64, seed: u64) -> Result<Self> {
        let image = Self::generate(bytes.min(PERIOD * PAGE_SIZE), seed)?;
        Ok(Self {
            pages: bytes / PAGE_SIZE,
            ..image
        })
    }

    /// The first of these pages in memory, with those that follow it there.
    #[inline]
    fn stored(&self, pages: PageRange) -> PageRange {
        let first = pages.first % self.memory.pages();
        PageRange::new(first, pages.count.min(self.memory.pages() - first))
    }
}

/// Bytes that can be had without pushing others out, as the kernel sees it.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

/// The contents of page `n` of the image of this seed.
pub fn fill_page(n: u64, seed: u64, page: &mut [u8; PAGE_SIZE as usize]) {
    let first = n * (PAGE_SIZE / 8) + 1;
    for (index, word) in (first..).zip(page.chunks_exact_mut(8)) {
        let mixed = index.wrapping_mul(HASH_FACTOR) ^ seed;
        // Low bits of a product repeat from page to page: fold the high ones in.
        word.copy_from_slice(&(mixed ^ (mixed >> 29)).to_le_bytes());
    }
}

impl Source for Image {
    fn pages(&self) -> u64 {
        self.pages
    }

    #[inline]
    fn fetch(&self, pages: PageRange, to: &VolatileSlice<'_>) -> Result<()> {
        let stored = self.stored(pages);
        self.memory.slice(stored)?.copy_to_volatile_slice(*to);
        if stored.count == pages.count {
            return Ok(());
        }
        let rest = PageRange::new(pages.first + stored.count, pages.count - stored.count);
        let done = (stored.count * PAGE_SIZE) as usize;
        let to = to.offset(done).map_err(|e| Error::invalid(e.to_string()))?;
        self.fetch(rest, &to)
    }

    fn direct(&self, pages: PageRange) -> Option<VolatileSlice<'_>> {
        let stored = self.stored(pages);
        let whole = stored.count == pages.count;
        whole.then(|| self.memory.slice(stored).ok()).flatten()
    }
}

/// Pages of a file, or of a server: one fetch at a time.
pub struct Remote {
    source: Mutex<Box<dyn PageSource>>,
    pages: u64,
    patience: Duration,
}

impl Remote {
    /// Open a source that must have at least `bytes` bytes.
    ///
    /// A fetch fails when its pages have not come after `patience`.
    pub fn open(location: &Location, bytes: u64, patience: Duration) -> Result<Self> {
        let source = location.open(&Options::default())?;
        let pages = source.pages();
        if pages < bytes / PAGE_SIZE {
            return Err(Error::invalid(format!(
                "the source has {} bytes, fewer than the {bytes} of guest memory: take a smaller --memory, or \
                 make a file of that size with 'kdp-vmm image'",
                pages * PAGE_SIZE
            )));
        }
        Ok(Self {
            source: Mutex::new(source),
            pages,
            patience,
        })
    }
}

impl Source for Remote {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn fetch(&self, pages: PageRange, to: &VolatileSlice<'_>) -> Result<()> {
        let source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + self.patience;
        let mut missing = pages.count;
        let mut result = Ok(());
        source.request(&[pages])?;
        while missing > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::invalid(format!(
                    "{missing} pages from page {} on did not come within {} s",
                    pages.first,
                    self.patience.as_secs()
                )));
            }
            source.recv(left, &mut |run, content| {
                missing -= run.count.min(missing);
                if result.is_ok() {
                    result = store(run, content, pages, to);
                }
            })?;
        }
        result
    }
}

/// Put a run of pages where it belongs in `to`, which begins with the first of `wanted`.
fn store(
    run: PageRange,
    content: Content<'_>,
    wanted: PageRange,
    to: &VolatileSlice<'_>,
) -> Result<()> {
    let at = run.first.wrapping_sub(wanted.first) * PAGE_SIZE;
    let part = to
        .subslice(at as usize, (run.count * PAGE_SIZE) as usize)
        .map_err(|e| {
            Error::invalid(format!(
                "the source sent {} pages from page {} on, which nobody asked for: {e}",
                run.count, run.first
            ))
        })?;
    match content {
        Content::Data(bytes) => part.copy_from(bytes),
        Content::Zero => part.copy_from(&vec![0_u8; part.len()]),
        Content::Failed(errno) => {
            return Err(Error::os(
                format!("the source could not read page {}", run.first),
                std::io::Error::from_raw_os_error(errno),
            ))
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_has_no_two_equal_words_in_a_page_or_its_neighbour() {
        let mut seen = std::collections::HashSet::new();
        let mut page = [0; PAGE_SIZE as usize];
        for n in 0..2 {
            fill_page(n, 9, &mut page);
            for word in page.chunks_exact(8) {
                assert!(seen.insert(word.to_vec()));
            }
        }
    }

    #[test]
    fn a_repeating_image_is_as_long_as_it_says_and_begins_again() {
        let image = Image::repeating(3 * PERIOD * PAGE_SIZE, 5).unwrap();
        assert_eq!(image.pages(), 3 * PERIOD);
        let to = buffer(4 * PAGE_SIZE).unwrap();
        let across = PageRange::new(2 * PERIOD - 2, 4);
        image.fetch(across, &to.volatile()).unwrap();
        assert!(image.direct(across).is_none());
        for (at, page) in [PERIOD - 2, PERIOD - 1, 0, 1].into_iter().enumerate() {
            let (mut got, mut expected) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
            to.read(at as u64, &mut got).unwrap();
            fill_page(page, 5, &mut expected);
            assert!(got == expected, "page {at}");
        }
    }

    #[test]
    fn an_image_beyond_all_memory_is_refused() {
        let error = Image::generate(1 << 50, 1).err().unwrap().to_string();
        assert!(error.contains("bytes of memory left"), "{error}");
    }

    #[test]
    fn a_file_gives_its_pages_and_is_refused_when_it_is_too_short() {
        let image = Image::generate(3 * PAGE_SIZE, 5).unwrap();
        let mut bytes = vec![0; 3 * PAGE_SIZE as usize];
        image.memory.read(0, &mut bytes).unwrap();
        let path = std::env::temp_dir().join(format!("kdp-vmm-test-{}", std::process::id()));
        std::fs::write(&path, &bytes).unwrap();
        let location = Location::File {
            path: path.clone(),
            offset: 0,
        };
        let patience = Duration::from_secs(10);
        let remote = Remote::open(&location, 3 * PAGE_SIZE, patience).unwrap();
        let short = Remote::open(&location, 4 * PAGE_SIZE, patience).err();
        std::fs::remove_file(path).unwrap();
        assert!(short.unwrap().to_string().contains("has 12288 bytes"));

        let to = buffer(2 * PAGE_SIZE).unwrap();
        remote.fetch(PageRange::new(1, 2), &to.volatile()).unwrap();
        let mut got = vec![0; 2 * PAGE_SIZE as usize];
        to.read(0, &mut got).unwrap();
        assert!(got == bytes[PAGE_SIZE as usize..]);
    }
}
