// SPDX-License-Identifier: GPL-2.0

//! Requests to take memory offline, which moves everything out of a memory block first.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use kvm_demand_paging::{AliasMap, Backing, Memfd, Paging};

use crate::busy::Busy;
use crate::check::{skip, Result};
use crate::numa::{self, memory_block};
use crate::slot::{Slot, BLOCK, ID};
use crate::sys;
use crate::task::Task;

tests! {
    "native-leaves-a-block-that-goes-offline" => leaves_a_block,
}

/// The node whose memory is taken away: the kernel started from the other one.
const NODE: u32 = numa::NODES[1];

/// A memory block, online again when this is dropped.
struct Block(u64);

impl Block {
    fn path(&self) -> String {
        format!("/sys/devices/system/memory/memory{}/state", self.0)
    }

    /// Asks for something, until it is done, refused, or that time is over: a signal ends a request that goes on trying.
    fn ask(&self, what: &'static str, within: Duration) -> Result<io::Result<()>> {
        sys::catch_idly(libc::SIGUSR1)?;
        let file = fs::File::options().write(true).open(self.path())?;
        let mut request =
            Task::spawn(move || sys::write_from(file.as_fd(), what.as_ptr(), what.len()))?;
        if !request.ends_within(within)? {
            while !request.ends_within(Duration::from_millis(100))? {
                sys::signal_thread(request.tid, libc::SIGUSR1)?;
            }
        }
        Ok(request.join("the request")?.map(drop))
    }

    fn is_offline(&self) -> Result<bool> {
        Ok(fs::read_to_string(self.path())?.trim() == "offline")
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.is_offline().unwrap_or(false) {
            // What cannot be brought back is lacking from now on, which other tests will say.
            let _ = fs::write(self.path(), "online");
        }
    }
}

/// Frames in a block that cannot be moved by anybody, as far as the kernel tells.
fn unmovable(block: u64) -> Result<usize> {
    /// Of /proc/kpageflags: slab, huge, offline, page table, reserved (include/uapi/linux/kernel-page-flags.h and
    /// include/linux/kernel-page-flags.h).
    const FLAGS: [u32; 5] = [7, 17, 23, 26, 32];
    let frames = numa::memory_block_frames();
    let mut bytes = vec![0; frames as usize * 8];
    fs::File::open("/proc/kpageflags")?.read_exact_at(&mut bytes, block * frames * 8)?;
    let is_one = |flags: &u64| FLAGS.iter().any(|flag| (flags >> flag) & 1 == 1);
    Ok(numa::words(&bytes).filter(is_one).count())
}

/// How many of these frames are in a block.
fn within(block: u64, frames: &[u64]) -> usize {
    frames
        .iter()
        .filter(|&&frame| memory_block(frame) == block)
        .count()
}

fn frames(map: &AliasMap) -> Result<Vec<u64>> {
    numa::frames(map.as_ptr(), map.pages())
}

/// Memory on the node, taken until what comes next is in a memory block with nothing but memory of processes: the kernel's
/// own, which nobody can move, is in the first ones.
fn take_up_to_a_clean_block() -> Result<Option<Vec<AliasMap>>> {
    const EACH: u64 = 16 << 20;
    const MOST: usize = 40;
    let mut taken = Vec::new();
    for _ in 0..MOST {
        let map = Memfd::create("kdp-taken", Backing::Shmem, EACH)?.map_all()?;
        numa::on_node(NODE, || Ok(kdp_vmm::populate(&map)?))?;
        let block = memory_block(numa::frames(map.as_ptr(), 1)?[0]);
        let is_one = within(block, &frames(&map)?) == map.pages() as usize;
        taken.push(map);
        if is_one && unmovable(block)? == 0 {
            return Ok(Some(taken));
        }
    }
    Ok(None)
}

/// Memory of a memslot of shmem leaves a block that is taken offline, and the guest goes on.
fn leaves_a_block() -> Result {
    numa::need_nodes()?;
    let pages = BLOCK;
    let Some(taken) = take_up_to_a_clean_block()? else {
        return skip("there is no memory block that has nothing but memory of processes");
    };
    let slot = Slot::new(Backing::Shmem, pages)?;
    numa::on_node(NODE, || Ok(kdp_vmm::populate(&slot.alias)?))?;
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    let busy = Busy::start(&slot)?;
    let number = memory_block(frames(&slot.alias)?[pages as usize - 1]);
    if unmovable(number)? > 0 {
        return skip("the kernel has taken memory for itself there meanwhile");
    }
    // Room for what is to be moved.
    drop(taken);
    let block = Block(number);
    let asked = block.ask("offline", Duration::from_secs(60))?;
    ensure!(
        asked.is_ok() && block.is_offline()?,
        "taking the block offline came to {asked:?}"
    );
    ensure_eq!(
        within(number, &frames(&slot.alias)?),
        0,
        "pages in a block that is offline"
    );
    busy.goes_on(2)?;
    busy.end().map(drop)
}
