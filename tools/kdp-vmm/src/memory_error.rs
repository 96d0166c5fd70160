//! Memory errors, made on purpose in frames of one's own by the kernel's means for that (hwpoison-inject).

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use kvm_demand_paging::Backing;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::memory::PAGE_SIZE;

const INJECT: &str = "/sys/kernel/debug/hwpoison";

/// How the kernel speaks of a page that stays in use, or has had an error before: the error is there all the same.
const IN_USE: [i32; 2] = [Errno::BUSY.raw_os_error(), Errno::HWPOISON.raw_os_error()];

/// What lets go of a frame may do so in its own time.
const PATIENCE: Duration = Duration::from_secs(10);

/// The frame of the page at an address of this process, which must be in memory.
///
/// # Errors
///
/// Without CAP_SYS_ADMIN the kernel names no frame.
pub fn frame_of(at: *const u8) -> Result<u64> {
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")
        .and_then(|file| file.read_exact_at(&mut entry, at as u64 / PAGE_SIZE * 8))
        .map_err(|e| Error::os("read /proc/self/pagemap", e))?;
    let entry = u64::from_le_bytes(entry);
    let frame = entry & ((1 << 55) - 1);
    if entry >> 63 == 0 || frame == 0 {
        return Err(Error::invalid(format!(
            "the page at {at:p} is not in memory, or this process may not know its frame (CAP_SYS_ADMIN)"
        )));
    }
    Ok(frame)
}

/// Memory errors.
///
/// To be made before the memory: when this is dropped the frames must be free again, and are made good, or the huge
/// pages would be lacking from then on.
#[derive(Default)]
pub struct MemoryErrors(RefCell<Vec<u64>>);

impl MemoryErrors {
    /// None so far.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether this kernel can make any.
    pub fn are_possible() -> bool {
        Path::new(INJECT).exists()
    }

    /// An error in this frame, which is of memory of this kind.
    pub fn inject(&self, backing: Backing, frame: u64) -> Result<()> {
        // The kernel knows of an error in a huge page by the first frame of that.
        let known_by = frame & !(backing.page_size() / PAGE_SIZE - 1);
        self.0.borrow_mut().push(known_by);
        match fs::write(format!("{INJECT}/corrupt-pfn"), frame.to_string()) {
            Err(e) if !e.raw_os_error().is_some_and(|no| IN_USE.contains(&no)) => Err(Error::os(
                format!("inject an error into frame {frame:#x}"),
                e,
            )),
            _ => Ok(()),
        }
    }
}

impl Drop for MemoryErrors {
    fn drop(&mut self) {
        let mut frames = self.0.take();
        frames.sort_unstable();
        frames.dedup();
        for frame in frames {
            if let Err(e) = make_good(frame) {
                eprintln!("frame {frame:#x} stays bad: {e}");
            }
        }
    }
}

fn make_good(frame: u64) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match fs::write(format!("{INJECT}/unpoison-pfn"), frame.to_string()) {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
            result => return result,
        }
    }
}
