//! Fetches all pages of a source into a file, which may be on hugetlbfs: `kdp-demo-fetch SOURCE FILE`.
//!
//! This is what a VMM without demand paging must do before its guest can run. It takes the pages from the same
//! server by the same protocol as `kdp handle`, with requests as large as they can be, so that the demo compares
//! the two ways of restoring and nothing else. Prints one line of JSON.

use std::{
    env, error::Error, fs::File, num::NonZeroU64, process::ExitCode, ptr, slice, time::Duration,
};

use kvm_demand_paging::{
    source::{Content, Location, Options},
    PageRange, PAGE_SIZE,
};
use rustix::mm::{mmap, MapFlags, ProtFlags};

/// How long a page may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let [source, file] = &args[..] else {
        eprintln!("usage: kdp-demo-fetch SOURCE FILE");
        return ExitCode::from(2);
    };
    match fetch(source, file) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: fetch {source} into {file}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn fetch(source: &str, path: &str) -> Result<serde_json::Value, Box<dyn Error>> {
    let source = source.parse::<Location>()?.open(&Options::default())?;
    let pages = NonZeroU64::new(source.pages())
        .ok_or("the source has no pages")?
        .get();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    file.set_len(pages * PAGE_SIZE as u64)?;
    let memory = map(&file, usize::try_from(pages)? * PAGE_SIZE)?;

    source.request(&[PageRange::new(0, pages)])?;
    let (mut left, mut zero, mut failed) = (pages, 0, None);
    while left > 0 && failed.is_none() {
        let runs = source.recv(PATIENCE, &mut |range, content| {
            left -= range.count;
            let at = range.first as usize * PAGE_SIZE;
            match content {
                Content::Data(data) => memory[at..at + data.len()].copy_from_slice(data),
                // The file is new: it reads as zeros, and huge pages of nothing need not be allocated.
                Content::Zero => zero += range.count,
                Content::Failed(errno) => failed = Some((range.first, errno)),
            }
        })?;
        if runs == 0 {
            return Err(format!("no page came for {} s", PATIENCE.as_secs()).into());
        }
    }
    if let Some((page, errno)) = failed {
        return Err(format!("the source cannot read page {page}: errno {errno}").into());
    }
    Ok(serde_json::json!({
        "pages": pages,
        "pages_zero": zero,
        "bytes_received": source.counters().bytes,
    }))
}

/// The whole file: hugetlbfs takes no write(2), so it is filled through a mapping.
fn map(file: &File, bytes: usize) -> Result<&'static mut [u8], rustix::io::Errno> {
    // SAFETY: The kernel chooses the address (the hint is null), so no mapping of ours is replaced.
    let start = unsafe {
        mmap(
            ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            file,
            0,
        )
    }?;
    // SAFETY: mmap gave `bytes` readable and writable bytes that are never unmapped; the file was created by this
    // process just now and is not shrunk; this is the only reference to them.
    Ok(unsafe { slice::from_raw_parts_mut(start.cast(), bytes) })
}
