//! Pages that are read from a file of this machine.

use super::{proto::MAX_DATA_PAGES, Content, Counters, Error, PageSource, RangeSet};
use crate::{PageRange, PAGE_SIZE};
use rustix::io::Errno;
use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicU64, Ordering},
        Condvar, Mutex, MutexGuard, PoisonError,
    },
    time::Duration,
};

const PAGE: u64 = PAGE_SIZE as u64;

/// Reads `PATH` or `PATH@OFFSET`, the offset being a number of bytes and of whole pages.
pub(super) fn parse_path_at(text: &str) -> Result<(PathBuf, u64), String> {
    let (path, offset) = match text
        .rsplit_once('@')
        .map(|(path, offset)| (path, offset.parse::<u64>()))
    {
        Some((path, Ok(offset))) => (path, offset),
        // The file's name has an @ of its own.
        _ => (text, 0),
    };
    if path.is_empty() {
        return Err(format!(
            "'{text}' names no file: it must be PATH or PATH@OFFSET"
        ));
    }
    if offset % PAGE != 0 {
        return Err(format!(
            "the offset {offset} of '{path}' is not a multiple of {PAGE} bytes"
        ));
    }
    Ok((path.into(), offset))
}

/// A file as an array of pages.
#[derive(Debug)]
pub struct PageFile {
    file: File,
    path: PathBuf,
    offset: u64,
    pages: u64,
}

impl AsFd for PageFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl PageFile {
    /// Open a file whose page 0 is at `offset` bytes.
    pub fn open(path: &Path, offset: u64) -> Result<Self, Error> {
        let io = |error| Error::io(path.display().to_string(), error);
        let file = File::open(path).map_err(io)?;
        // A block device tells its size at its end only.
        let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
            .map_err(|errno| io(errno.into()))?;
        if offset % PAGE != 0 || size % PAGE != 0 || offset >= size {
            return Err(Error::Argument(format!(
                "{} has {size} bytes: size and offset ({offset}) must be multiples of {PAGE}, and the offset smaller",
                path.display()
            )));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            offset,
            pages: (size - offset) / PAGE,
        })
    }

    /// Open `PATH` or `PATH@OFFSET`, as it is written on the command line.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let (path, offset) = parse_path_at(text).map_err(Error::Argument)?;
        Self::open(&path, offset)
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where its page 0 is, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Read pages, which must be in the file, and give them to `sink` in runs of at most
    /// [`MAX_DATA_PAGES`]. What cannot be read is given as failed, page by page. `buffer` is scratch.
    pub(super) fn read(
        &self,
        range: PageRange,
        buffer: &mut Vec<u8>,
        sink: &mut dyn FnMut(PageRange, Content<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut first = range.first;
        while first < range.end() {
            let block = PageRange::new(first, MAX_DATA_PAGES.min(range.end() - first));
            first = block.end();
            match self.read_block(block, buffer) {
                Ok(()) => give_runs(block, buffer, sink)?,
                Err(_) => {
                    for page in block.iter() {
                        match self.read_block(PageRange::page(page), buffer) {
                            Ok(()) => give_runs(PageRange::page(page), buffer, sink)?,
                            Err(error) => {
                                let errno =
                                    error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
                                tracing::error!("page {page} of {}: {error}", self.path.display());
                                sink(PageRange::page(page), Content::Failed(errno))?;
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn read_block(&self, block: PageRange, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.resize(block.count as usize * PAGE_SIZE, 0);
        // A file that became shorter is an error, never zeros.
        self.file
            .read_exact_at(buffer, self.offset + block.first * PAGE)
    }
}

/// Give the pages of a block in runs of zeros and of data.
fn give_runs(
    block: PageRange,
    data: &[u8],
    sink: &mut dyn FnMut(PageRange, Content<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut first = block.first;
    for run in data
        .chunks_exact(PAGE_SIZE)
        .map(is_zero)
        .collect::<Vec<bool>>()
        .chunk_by(|left, right| left == right)
    {
        let range = PageRange::new(first, run.len() as u64);
        let start = (first - block.first) as usize * PAGE_SIZE;
        let content = match run {
            [true, ..] => Content::Zero,
            _ => Content::Data(&data[start..start + run.len() * PAGE_SIZE]),
        };
        sink(range, content)?;
        first = range.end();
    }
    Ok(())
}

/// A file of this machine as a source.
pub struct FileSource {
    file: PageFile,
    state: Mutex<State>,
    wake: Condvar,
    bytes: AtomicU64,
}

#[derive(Default)]
struct State {
    wanted: RangeSet,
    stopped: bool,
}

impl FileSource {
    /// Serve the pages of this file.
    pub fn new(file: PageFile) -> Self {
        Self {
            file,
            state: Mutex::default(),
            wake: Condvar::new(),
            bytes: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two of its calls.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PageSource for FileSource {
    fn pages(&self) -> u64 {
        self.file.pages
    }

    fn request(&self, ranges: &[PageRange]) -> Result<(), Error> {
        super::check_ranges(ranges, self.file.pages)?;
        let mut state = self.state();
        if state.stopped {
            return Err(Error::Stopped);
        }
        for range in ranges {
            state.wanted.insert(*range);
        }
        self.wake.notify_one();
        Ok(())
    }

    fn recv(
        &self,
        timeout: Duration,
        sink: &mut dyn FnMut(PageRange, Content<'_>),
    ) -> Result<usize, Error> {
        let waiting = |state: &mut State| state.wanted.is_empty() && !state.stopped;
        let (mut state, _) = self
            .wake
            .wait_timeout_while(self.state(), timeout, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            return Err(Error::Stopped);
        }
        // One block at a time: what is asked for next must not wait for all of this.
        let Some(range) = state.wanted.iter().next() else {
            return Ok(0);
        };
        let range = PageRange::new(range.first, range.count.min(MAX_DATA_PAGES));
        state.wanted.remove(range);
        drop(state);
        let mut runs = 0;
        let mut give = |range, content: Content<'_>| {
            if let Content::Data(data) = content {
                self.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
            }
            runs += 1;
            sink(range, content);
            Ok(())
        };
        self.file
            .read(range, &mut Vec::new(), &mut give)
            .map_err(|error| Error::io(self.file.path.display().to_string(), error))?;
        Ok(runs)
    }

    fn stop(&self) {
        self.state().stopped = true;
        self.wake.notify_all();
    }

    fn counters(&self) -> Counters {
        Counters {
            bytes: self.bytes.load(Ordering::Relaxed),
            ..Counters::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(pages: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for page in pages {
            file.write_all(&[*page; PAGE_SIZE]).unwrap();
        }
        file
    }

    fn recv(source: &FileSource) -> Vec<(PageRange, Option<u8>)> {
        let mut got = Vec::new();
        source
            .recv(Duration::from_secs(5), &mut |range, content| {
                got.push((
                    range,
                    match content {
                        Content::Data(data) => Some(data[0]),
                        Content::Zero => Some(0),
                        Content::Failed(_) => None,
                    },
                ));
            })
            .unwrap();
        got
    }

    #[test]
    fn runs_of_zeros_and_data() {
        let file = file(&[1, 1, 0, 0, 2]);
        let source = FileSource::new(PageFile::open(file.path(), PAGE).unwrap());
        assert_eq!(source.pages(), 4);
        source.request(&[PageRange::new(0, 4)]).unwrap();
        let expected = [(0, 1, 1), (1, 2, 0), (3, 1, 2)];
        let expected =
            expected.map(|(first, count, byte)| (PageRange::new(first, count), Some(byte)));
        assert_eq!(recv(&source), expected);
        assert!(source.request(&[PageRange::new(3, 2)]).is_err());
    }

    #[test]
    fn a_file_that_became_shorter_fails_and_is_never_zeros() {
        let file = file(&[1, 2, 3]);
        let source = FileSource::new(PageFile::open(file.path(), 0).unwrap());
        file.as_file().set_len(PAGE).unwrap();
        source.request(&[PageRange::new(0, 3)]).unwrap();
        let expected =
            [(0, Some(1)), (1, None), (2, None)].map(|(page, byte)| (PageRange::page(page), byte));
        assert_eq!(recv(&source), expected);
    }

    #[test]
    fn files_that_are_no_arrays_of_pages_are_refused() {
        let mut odd = file(&[1]);
        odd.write_all(b"x").unwrap();
        assert!(PageFile::open(odd.path(), 0)
            .unwrap_err()
            .to_string()
            .contains("4097 bytes"));
        let even = file(&[1]);
        assert!(PageFile::open(even.path(), PAGE).is_err());
        assert!(PageFile::open(even.path(), 1).is_err());
        assert!(PageFile::open(Path::new("/does/not/exist"), 0)
            .unwrap_err()
            .to_string()
            .contains("/does/not/exist"));
    }

    #[test]
    fn stopping_ends_a_wait() {
        let file = file(&[1]);
        let source = FileSource::new(PageFile::open(file.path(), 0).unwrap());
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| source.recv(Duration::from_secs(60), &mut |_, _| ()));
            source.stop();
            assert!(matches!(waiter.join().unwrap(), Err(Error::Stopped)));
        });
        assert!(matches!(
            source.request(&[PageRange::page(0)]),
            Err(Error::Stopped)
        ));
    }
}
