// SPDX-License-Identifier: GPL-2.0

//! Huge pages with memory errors that are replaced by fresh ones: no healthy byte is lost, no write either, and the
//! kernel gets the bad one.

use std::fs;
use std::time::Instant;

use kvm_demand_paging::{Backing, Cause, PageRange, Paging, Poisoned, Replaced};

use super::memory_error::{alias_of, Errors};
use super::poison::lost;
use super::source::frame;
use crate::check::Result;
use crate::content;
use crate::slot::{Slot, BLOCK, GIGANTIC, ID, PAGE};
use crate::sys;

tests! {
    "poison-replace-keeps-what-is-healthy" => || keeps_what_is_healthy(Backing::Huge2M, 2 * BLOCK),
    "poison-replace-keeps-what-is-healthy-of-1g" => || keeps_what_is_healthy(Backing::Huge1G, GIGANTIC),
}

fn emulated(page: u64) -> Poisoned {
    Poisoned {
        range: PageRange::page(page),
        cause: Cause::Emulated,
    }
}

/// A figure of /proc/meminfo, in its unit.
fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    match line.and_then(|line| {
        line.strip_prefix(':')?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    }) {
        Some(figure) => Ok(figure),
        None => fail!("no {name} in /proc/meminfo"),
    }
}

/// Free huge pages of a kind.
fn free_huge_pages(backing: Backing) -> Result<u64> {
    let kind = backing.page_size() >> 10;
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{kind}kB/free_hugepages");
    Ok(fs::read_to_string(path)?.trim().parse()?)
}

/// Of 1 GiB some pages are looked at, in each block: the others are zeros.
fn looked_at(pages: u64) -> impl Iterator<Item = u64> {
    let step = if pages < GIGANTIC { 1 } else { 97 };
    (0..pages).step_by(step)
}

fn keeps_what_is_healthy(backing: Backing, pages: u64) -> Result {
    let errors = Errors::new()?;
    let huge = backing.page_size() / PAGE;
    let slot = Slot::new(backing, pages)?;
    for page in looked_at(pages) {
        slot.fill(page, 1)?;
    }
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    for page in looked_at(pages) {
        slot.check(page, 1)?;
    }
    let bad = [2 * 97, huge - 200 - (huge - 200) % 97];
    let frames = bad.map(|page| frame(alias_of(&slot.alias, page)));
    for frame in frames {
        errors.inject(backing, frame?)?;
        slot.event()?;
    }
    let (free, corrupted) = (free_huge_pages(backing)?, meminfo("HardwareCorrupted")?);
    let start = Instant::now();
    let replaced = slot.vm.replace(ID, 0)?;
    println!("{backing:?}: replaced in {:?}", start.elapsed());
    ensure_eq!(
        replaced,
        Replaced {
            copied: huge - 2,
            lost: 2,
            healed: 0,
            errors: 0
        },
        "what came of it"
    );
    ensure_eq!(slot.vm.poisoned(ID)?, bad.map(emulated), "the list");
    for page in looked_at(pages).filter(|page| !bad.contains(page)) {
        slot.check(page, 1)?;
    }
    for page in bad {
        let at = slot.address(page);
        ensure_eq!(sys::load(at), lost(at), "a read of a lost page");
    }
    // The memfd has it, too; and its frames are good.
    slot.alias.refresh(PageRange::new(0, huge))?;
    for page in bad {
        slot.fill(page, 2)?;
        slot.vm.heal(ID, &[PageRange::page(page)])?;
        slot.check(page, 2)?;
    }
    // SAFETY: it is guest memory.
    unsafe { sys::store(slot.address(97), 0x1234) };
    let mut words = [0; PAGE as usize];
    slot.alias.read(97, &mut words)?;
    ensure_eq!(
        words[..8],
        0x1234_u64.to_le_bytes(),
        "what was written to the memslot, in the memfd"
    );
    ensure_eq!(
        content::bytes(97, 1)[8..],
        words[8..],
        "the rest of that page"
    );
    // Nobody pins the bad one: once it is made good it is free.
    ensure_eq!(free_huge_pages(backing)?, free - 1, "free huge pages");
    ensure_eq!(
        meminfo("HardwareCorrupted")?,
        corrupted,
        "bad memory, in kB"
    );
    drop(errors);
    ensure_eq!(
        free_huge_pages(backing)?,
        free,
        "free huge pages, with the frames made good"
    );
    ensure_eq!(
        meminfo("HardwareCorrupted")?,
        corrupted - 8,
        "bad memory, in kB, with the frames made good"
    );
    Ok(())
}
