// SPDX-License-Identifier: GPL-2.0

//! NUMA nodes: where memory is, and requests to move it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

use kvm_demand_paging::AliasMap;
use libc::{c_int, c_ulong};

use crate::check::{skip, Result};
use crate::slot::PAGE;
use crate::sys;
use crate::task::until;

/// The nodes of the test VM.
pub const NODES: [u32; 2] = [0, 1];

const MPOL_DEFAULT: c_int = 0;
const MPOL_BIND: c_int = 2;
const MPOL_MF_MOVE_ALL: c_int = 4;

/// Skips the test where there are no two nodes with memory.
pub fn need_nodes() -> Result {
    for node in NODES {
        if !fs::exists(format!("/sys/devices/system/node/node{node}/meminfo"))? {
            return skip(format!(
                "there is no NUMA node {node} (scripts/vm has --nodes)"
            ));
        }
    }
    Ok(())
}

/// Whether a call of the kernel's succeeded; what it returned.
fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ret)
}

/// Does something while what the thread allocates comes from one node.
pub fn on_node<T>(node: u32, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let set = |mode: c_int, mask: c_ulong| {
        // SAFETY: the mask is one word, of which 63 bits are said to be nodes.
        check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &raw const mask, 64_u64) })
    };
    set(MPOL_BIND, 1 << node)?;
    let done = f();
    set(MPOL_DEFAULT, 0)?;
    done
}

/// mbind(2): the kernel allocates pages of a mapping on one node from now on.
pub fn bind(at: *const u64, bytes: u64, node: u32) -> io::Result<()> {
    let mask: c_ulong = 1 << node;
    // SAFETY: the kernel reads one word of the mask, and accesses no other memory.
    check(unsafe {
        libc::syscall(
            libc::SYS_mbind,
            at,
            bytes,
            MPOL_BIND,
            &raw const mask,
            64_u64,
            0,
        )
    })
    .map(drop)
}

/// get_mempolicy(2): the node that the policy of an address binds to, if it binds to a single one.
pub fn bound(at: *const u64) -> io::Result<Option<u32>> {
    const MPOL_F_ADDR: c_ulong = 2;
    let (mut mode, mut mask): (c_int, c_ulong) = (0, 0);
    // SAFETY: the kernel writes `mode` and the 64 bits of `mask`.
    check(unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            &raw mut mask,
            64_u64,
            at,
            MPOL_F_ADDR,
        )
    })?;
    Ok((mode == MPOL_BIND && mask.count_ones() == 1).then(|| mask.trailing_zeros()))
}

/// move_pages(2): asks for pages of this process to be moved. What the kernel says of each page, and how many it could
/// not move.
fn call_move_pages(addresses: &[u64], node: u32) -> Result<(Vec<c_int>, u64)> {
    let mut status = vec![0; addresses.len()];
    let nodes = vec![node as c_int; addresses.len()];
    // SAFETY: all arrays are as long as is said; a move leaves the bytes as they are.
    let left = check(unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            addresses.len(),
            addresses.as_ptr(),
            nodes.as_ptr(),
            status.as_mut_ptr(),
            MPOL_MF_MOVE_ALL,
        )
    })?;
    Ok((status, left as u64))
}

/// Asks the kernel to move the pages at these addresses; how many it left where they were.
pub fn move_pages(addresses: &[u64], node: u32) -> Result<u64> {
    Ok(call_move_pages(addresses, node)?.1)
}

/// What it says of a page of a mapping that it does not move at all: an errno.
pub fn refusal(address: u64, node: u32) -> Result<i32> {
    Ok(-call_move_pages(&[address], node)?.0[0])
}

/// migrate_pages(2): asks for all memory of this process to leave a node for another one.
pub fn migrate(from: u32, to: u32) -> io::Result<()> {
    let masks: [c_ulong; 2] = [1 << from, 1 << to];
    // SAFETY: the masks are a word each, of which 63 bits are said to be nodes.
    check(unsafe {
        libc::syscall(
            libc::SYS_migrate_pages,
            0,
            64_u64,
            &raw const masks[0],
            &raw const masks[1],
        )
    })
    .map(drop)
}

/// The addresses of a mapping's allocations of so many bytes.
pub fn addresses(map: &AliasMap, each: u64) -> Vec<u64> {
    (0..map.len() as u64)
        .step_by(each as usize)
        .map(|at| map.as_ptr() as u64 + at)
        .collect()
}

/// Whether all of these frames are on a node.
pub fn are_on(node: u32, frames: &[u64]) -> bool {
    let blocks: BTreeSet<u64> = frames.iter().map(|frame| memory_block(*frame)).collect();
    let is_on = |block| {
        Path::new(&format!(
            "/sys/devices/system/node/node{node}/memory{block}"
        ))
        .exists()
    };
    blocks.into_iter().all(is_on)
}

/// Frames of a memory block: of what is taken offline at once.
pub fn memory_block_frames() -> u64 {
    static FRAMES: OnceLock<u64> = OnceLock::new();
    *FRAMES.get_or_init(|| {
        let text = fs::read_to_string("/sys/devices/system/memory/block_size_bytes");
        let bytes = text.map(|text| u64::from_str_radix(text.trim(), 16));
        // Where it is not said there are none.
        let bytes = bytes.ok().and_then(std::result::Result::ok);
        bytes.map_or(u64::MAX, |bytes| bytes / PAGE)
    })
}

/// The memory block of a frame, by the kernel's number.
pub fn memory_block(frame: u64) -> u64 {
    frame / memory_block_frames()
}

/// The words of a file that has one for each page.
pub fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|word| {
        let mut eight = [0; 8];
        eight.copy_from_slice(word);
        u64::from_ne_bytes(eight)
    })
}

/// The frames of adjacent pages, by the page tables of this process; 0 for a page that is not
/// mapped.
pub fn mapped_frames(at: *const u8, pages: u64) -> Result<Vec<u64>> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let mut entries = vec![0; pages as usize * 8];
    let pagemap = fs::File::open("/proc/self/pagemap")?;
    pagemap.read_exact_at(&mut entries, at as u64 / PAGE * 8)?;
    Ok(words(&entries)
        .map(|entry| match entry & PRESENT {
            0 => 0,
            _ => entry & FRAME,
        })
        .collect())
}

/// The frames of adjacent pages of this process. Reads each page that is not mapped, until all of
/// them are mapped. A page has no frame for a moment while the kernel moves it.
pub fn frames(at: *const u8, pages: u64) -> Result<Vec<u64>> {
    let mut frames = Vec::new();
    until("all pages are in memory", || {
        frames = mapped_frames(at, pages)?;
        let missing = (0..pages).filter(|&page| frames[page as usize] == 0);
        let mut all = true;
        for page in missing {
            all = false;
            sys::load(at.wrapping_add((page * PAGE) as usize).cast());
        }
        Ok(all)
    })?;
    Ok(frames)
}

/// A setting of the kernel's, for as long as this lives.
pub struct Setting {
    path: String,
    before: String,
}

impl Setting {
    /// Skips the test where there is no such setting.
    pub fn set(path: impl Into<String>, value: &str) -> Result<Self> {
        let path = path.into();
        if !Path::new(&path).exists() {
            return skip(format!("this kernel has no {path}"));
        }
        let text = fs::read_to_string(&path)?;
        // Of a choice the one in brackets.
        let before = text.split(['[', ']']).nth(1).unwrap_or(text.trim());
        let before = before.to_owned();
        fs::write(&path, value)?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // Who depends on it sets it.
        let _ = fs::write(&self.path, &self.before);
    }
}
