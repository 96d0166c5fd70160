// SPDX-License-Identifier: GPL-2.0

//! Huge pages with memory errors that are replaced by fresh ones: no healthy byte is lost, no write either, and the
//! kernel gets the bad one.

use std::fs;
use std::process::Command;
use std::time::Instant;

use kdp_vmm::frame_of;
use kvm_demand_paging::{
    Backing, Cause, Claimed, GuestMap, Memfd, PageRange, Paging, Poisoned, Replaced, Vm,
};

use super::memory_error::{alias_of, Errors};
use super::poison::{lost, present};
use crate::check::{skip, Result};
use crate::content;
use crate::slot::{Slot, BLOCK, GIGANTIC, ID, PAGE};
use crate::sys::{self, Touched};
use crate::task::{until, Task};

tests! {
    "poison-replace-keeps-what-is-healthy" => || keeps_what_is_healthy(Backing::Huge2M, 2 * BLOCK),
    "poison-replace-keeps-what-is-healthy-of-1g" => || keeps_what_is_healthy(Backing::Huge1G, GIGANTIC),
    "poison-replace-in-every-memslot" => in_every_memslot,
    "poison-replace-brings-absent-pages-back" => brings_absent_pages_back,
    "poison-replace-meets-another-error" => meets_another_error,
    "poison-replace-makes-claims-void" => makes_claims_void,
    "poison-replace-in-a-memslot-of-a-closed-vm" => in_a_memslot_of_a_closed_vm,
    "poison-replace-refused-while-others-pin-it" => refused_while_others_pin_it,
    "poison-replace-refused-changes-nothing" => refused_changes_nothing,
    "poison-replace-by-the-command" => by_the_command,
}

/// Who has claimed pages of the huge page writes to where they were: the claims are void, and the pages come anew.
fn makes_claims_void() -> Result {
    let errors = Errors::new()?;
    let slot = Slot::new(Backing::Huge2M, 2 * BLOCK)?;
    slot.place(9, 1)?;
    slot.check(9, 1)?;
    let claimant = slot.vm.claimant(ID)?;
    let range = PageRange::new(0, 2 * BLOCK);
    let claimed = claimant.claim(range)?;
    ensure_eq!(claimed[9], Claimed::Present, "a page that is present");
    let frame = frame_of(alias_of(&slot.alias, 9))?;
    errors.inject(Backing::Huge2M, frame)?;
    slot.event()?;
    ensure_eq!(slot.vm.replace(ID, 0)?.lost, 1, "pages lost");
    for (page, ended) in range.iter().zip(claimant.commit(range)?) {
        let expected = match page {
            9 => Claimed::Lost,
            0..BLOCK => Claimed::Void,
            _ => Claimed::Done,
        };
        ensure_eq!(ended, expected, "the end of the claim on page {page}");
    }
    ensure_eq!(
        claimant.claim(PageRange::page(3))?,
        [Claimed::Done],
        "a claim after that"
    );
    slot.alias.refresh(PageRange::new(0, BLOCK))?;
    slot.fill(3, 2)?;
    claimant.commit(PageRange::page(3))?;
    slot.check(3, 2)
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

/// A number of huge pages of a kind.
fn huge_pages(backing: Backing, which: &str) -> Result<u64> {
    let kind = backing.page_size() >> 10;
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{kind}kB/{which}_hugepages");
    Ok(fs::read_to_string(path)?.trim().parse()?)
}

fn free_huge_pages(backing: Backing) -> Result<u64> {
    huge_pages(backing, "free")
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
    let frames = bad.map(|page| frame_of(alias_of(&slot.alias, page)));
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

/// Its VM is closed, so nobody can move it by a call; who has it mapped goes along all the same.
fn in_a_memslot_of_a_closed_vm() -> Result {
    let errors = Errors::new()?;
    let slot = present(Backing::Huge2M, BLOCK, Paging::Off)?;
    let vm = Vm::open()?;
    let map = vm.create_memslot(1, &slot.memfd).create()?.map()?;
    let at = |page: u64| -> *const u64 { map.as_ptr().wrapping_add((page * PAGE) as usize).cast() };
    let healthy = |page: u64| Touched::Value(content::word(page, 1, 0));
    ensure_eq!(
        sys::load(at(1)),
        healthy(1),
        "a read of another VM's memslot"
    );
    drop(vm);
    let page = 9;
    errors.inject_into(Backing::Huge2M, &slot, page)?;
    slot.event()?;
    until("the closed VM's memslot has lost it", || {
        Ok(sys::load(at(page)) == lost(at(page)))
    })?;
    let replaced = slot.vm.replace(ID, 0)?;
    ensure_eq!(
        (replaced.copied, replaced.lost),
        (BLOCK - 1, 1),
        "what came of it"
    );
    for page in (0..BLOCK).filter(|&other| other != page) {
        slot.check(page, 1)?;
        ensure_eq!(
            sys::load(at(page)),
            healthy(page),
            "page {page}, of the closed VM"
        );
    }
    ensure_eq!(sys::load(at(page)), lost(at(page)), "the lost page");
    // SAFETY: it is guest memory.
    unsafe { sys::store(slot.address(1), 0x1234) };
    ensure_eq!(
        sys::load(at(1)),
        Touched::Value(0x1234),
        "what was written through the other memslot"
    );
    Ok(())
}

/// A device that reads and writes there would not go along.
fn refused_while_others_pin_it() -> Result {
    let errors = Errors::new()?;
    let slot = present(Backing::Huge2M, BLOCK, Paging::Off)?;
    let pinned = sys::register_buffer(alias_of(&slot.alias, 0), PAGE as usize)?;
    errors.inject_into(Backing::Huge2M, &slot, 9)?;
    slot.event()?;
    let refused = slot.vm.replace(ID, 0);
    ensure!(
        refused
            .as_ref()
            .is_err_and(|e| e.errno() == Some(libc::EBUSY)),
        "KDP_REPLACE, with a buffer there, came to {refused:?}"
    );
    slot.check(1, 1)?;
    drop(pinned);
    // io_uring lets go of what it has pinned when its last work is over.
    until("it can be replaced", || match slot.vm.replace(ID, 0) {
        Ok(replaced) => Ok((replaced.copied, replaced.lost) == (BLOCK - 1, 1)),
        Err(e) if e.errno() == Some(libc::EBUSY) => Ok(false),
        Err(e) => Err(e.into()),
    })?;
    slot.check(1, 1)
}

/// Those of another VM, and of another part of the memfd; also one that has never touched the huge page.
fn in_every_memslot() -> Result {
    let errors = Errors::new()?;
    let slot = present(Backing::Huge2M, 3 * BLOCK, Paging::Off)?;
    let other = Vm::open()?;
    let part = |id: u32, first: u64, pages: u64| -> Result<_> {
        let memslot = other
            .create_memslot(id, &slot.memfd)
            .base_gfn(u64::from(id) << 20)
            .part(first * PAGE, pages)
            .create()?;
        Ok(memslot.map()?)
    };
    let (second, third) = (part(1, BLOCK, 2 * BLOCK)?, part(2, BLOCK, BLOCK)?);
    let at = |map: &GuestMap, page: u64| -> *mut u64 {
        map.as_ptr().wrapping_add((page * PAGE) as usize).cast()
    };
    let page = BLOCK + 9;
    for page in 0..3 * BLOCK {
        slot.check(page, 1)?;
    }
    ensure_eq!(
        sys::load(at(&second, 9)),
        Touched::Value(content::word(page, 1, 0)),
        "a read of the second memslot"
    );
    errors.inject_into(Backing::Huge2M, &slot, page)?;
    slot.event()?;
    let known = || Ok(other.poisoned(1)?.len() + other.poisoned(2)?.len() == 2);
    until("the other VM knows of the error", known)?;
    // By the other VM, whose memslot begins there.
    let replaced = other.replace(1, 0)?;
    ensure_eq!(
        (replaced.copied, replaced.lost),
        (BLOCK - 1, 1),
        "what came of it"
    );
    ensure_eq!(slot.vm.poisoned(ID)?, [emulated(page)], "the first list");
    for id in [1, 2] {
        ensure_eq!(
            other.poisoned(id)?,
            [emulated(9)],
            "the list of memslot {id}"
        );
    }
    for map in [&second, &third] {
        ensure_eq!(
            sys::load(at(map, 9)),
            lost(at(map, 9)),
            "a read of the lost page"
        );
    }
    // What one writes all read.
    for (number, page) in (0..BLOCK).filter(|&page| page != 9).enumerate() {
        let maps = [
            slot.address(BLOCK + page),
            at(&second, page),
            at(&third, page),
        ];
        let value = content::word(page, 7, 0);
        // SAFETY: it is guest memory.
        let stored = unsafe { sys::store(maps[number % 3], value) };
        ensure_eq!(stored, Touched::Value(0), "a write");
        for map in maps {
            ensure_eq!(sys::load(map), Touched::Value(value), "page {page}");
            let last = PAGE as usize / 8 - 1;
            let expected = Touched::Value(content::word(BLOCK + page, 1, last));
            ensure_eq!(
                sys::load(map.wrapping_add(last)),
                expected,
                "the end of page {page}"
            );
        }
    }
    Ok(())
}

/// A page whose content was still to come when its frame went bad: it is absent, and not lost.
fn brings_absent_pages_back() -> Result {
    let errors = Errors::new()?;
    let slot = Slot::new(Backing::Huge2M, 2 * BLOCK)?;
    let page = 11;
    for page in (0..BLOCK).filter(|page| page % 2 == 0) {
        slot.place(page, 1)?;
        slot.check(page, 1)?;
    }
    errors.inject_into(Backing::Huge2M, &slot, page)?;
    slot.event()?;
    ensure_eq!(
        sys::load(slot.address(page)),
        lost(slot.address(page)),
        "a read before"
    );
    let replaced = slot.vm.replace(ID, 0)?;
    ensure_eq!(
        replaced,
        Replaced {
            copied: BLOCK - 1,
            lost: 0,
            healed: 1,
            errors: 0
        },
        "what came of it"
    );
    ensure_eq!(slot.vm.poisoned(ID)?, [], "the list");
    let mut toucher = slot.checker(page, 3)?;
    ensure_eq!(slot.event()?.page, page, "the page that is waited for");
    toucher.still_waits("who touches the absent page")?;
    slot.alias.refresh(PageRange::new(0, BLOCK))?;
    slot.place(page, 3)?;
    toucher.join("who touches the absent page")?;
    for page in (0..BLOCK).filter(|page| page % 2 == 0) {
        slot.check(page, 1)?;
    }
    // The others are as absent as before, and can be filled.
    for page in (0..BLOCK).filter(|&other| other % 2 == 1 && other != page) {
        slot.place(page, 2)?;
        slot.check(page, 2)?;
    }
    Ok(())
}

/// A second error in the old huge page while it is being copied: if it hits what is not copied yet that is lost as well,
/// and the call goes on; in what is copied it costs nothing. All else is kept.
fn meets_another_error() -> Result {
    let errors = Errors::new()?;
    let slot = Slot::new(Backing::Huge1G, GIGANTIC)?;
    let looked_at: Vec<u64> = looked_at(GIGANTIC).collect();
    for &page in &looked_at {
        slot.fill(page, 1)?;
    }
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    slot.check(0, 1)?;
    let (first, copied, behind) = (looked_at[3], looked_at[0], looked_at[looked_at.len() - 2]);
    let start = frame_of(alias_of(&slot.alias, 0))?;
    errors.inject(Backing::Huge1G, start + first)?;
    slot.event()?;
    let call = {
        let slot = slot.clone();
        Task::work(move || -> Result<Replaced> { Ok(slot.vm.replace(ID, 0)?) })?
    };
    // Once the first pages have been copied the lost one is in a good frame.
    let begun = || Ok(slot.vm.poisoned(ID)? == [emulated(first)]);
    until("copying has begun", begun)?;
    for page in [copied, behind] {
        errors.inject(Backing::Huge1G, start + page)?;
    }
    ensure_eq!(slot.event()?.page, behind, "the page of the second event");
    let replaced = call.join("the call")?;
    ensure_eq!(
        replaced,
        Replaced {
            copied: GIGANTIC - 2,
            lost: 2,
            healed: 0,
            errors: 0
        },
        "what came of it"
    );
    let bad = [first, behind];
    ensure_eq!(slot.vm.poisoned(ID)?, bad.map(emulated), "the list");
    for &page in looked_at.iter().filter(|page| !bad.contains(page)) {
        slot.check(page, 1)?;
    }
    slot.no_event()
}

/// Each refusal leaves all as it was; in the end it can be done.
fn refused_changes_nothing() -> Result {
    let errors = Errors::new()?;
    let slot = present(Backing::Huge2M, 2 * BLOCK, Paging::OnPresent)?;
    let page = 5;
    for page in 0..2 * BLOCK {
        slot.check(page, 1)?;
    }
    errors.inject_into(Backing::Huge2M, &slot, page)?;
    slot.event()?;
    let bad = Poisoned {
        range: PageRange::page(page),
        cause: Cause::Hardware,
    };
    let refused = |memfd: &Memfd, offset: u64, errno: i32, why: &str| -> Result {
        let free = free_huge_pages(Backing::Huge2M)?;
        let result = slot.vm.replace_by(ID, 0, memfd, offset);
        ensure!(
            result.as_ref().is_err_and(|e| e.errno() == Some(errno)),
            "{why}: {result:?}"
        );
        ensure_eq!(slot.vm.poisoned(ID)?, [bad], "the list ({why})");
        for page in (0..2 * BLOCK).filter(|&other| other != page) {
            slot.check(page, 1)?;
        }
        ensure_eq!(
            free_huge_pages(Backing::Huge2M)?,
            free,
            "free huge pages ({why})"
        );
        Ok(())
    };
    let memfd = |pages: u64| Memfd::create("fresh", Backing::Huge2M, pages * PAGE);

    // Somebody uses what is there.
    let used = memfd(2 * BLOCK)?;
    let map = used.map_all()?;
    map.write(0, &content::bytes(0, 9))?;
    refused(&used, 0, libc::EBUSY, "the fresh huge page is mapped")?;
    let mut bytes = [0; PAGE as usize];
    map.read(0, &mut bytes)?;
    ensure_eq!(bytes, content::bytes(0, 9), "what the caller had there");
    drop(map);
    let vm = Vm::open()?;
    let memslot = vm.create_memslot(1, &used).create()?;
    refused(&used, 0, libc::EBUSY, "the memfd has memslots")?;
    refused(
        &used,
        BLOCK * PAGE,
        libc::EBUSY,
        "the memfd has memslots, a hole",
    )?;
    drop((memslot, vm));

    // There is no free huge page.
    let free = free_huge_pages(Backing::Huge2M)? - huge_pages(Backing::Huge2M, "resv")?;
    let hog = memfd(free * BLOCK)?;
    let hog_map = hog.map_all()?;
    refused(&memfd(BLOCK)?, 0, libc::ENOMEM, "no free huge page")?;
    drop((hog_map, hog));

    // The other huge page has no error.
    let result = slot.vm.replace(ID, BLOCK);
    ensure!(
        result
            .as_ref()
            .is_err_and(|e| e.errno() == Some(libc::ENXIO)),
        "a healthy huge page: {result:?}"
    );

    // One that is there already, and was used, will do.
    let replaced = slot.vm.replace_by(ID, 0, &used, 0)?;
    ensure_eq!(
        (replaced.copied, replaced.lost),
        (BLOCK - 1, 1),
        "what came of it"
    );
    for page in (0..2 * BLOCK).filter(|&other| other != page) {
        slot.check(page, 1)?;
    }
    let mut bytes = [1; PAGE as usize];
    used.map_all()?.read(0, &mut bytes)?;
    ensure_eq!(
        bytes,
        [0; PAGE as usize],
        "what the caller's memfd has there now: a hole"
    );
    Ok(())
}

/// `kdp list`, `kdp replace` and `kdp list` again, in another process than the VMM.
fn by_the_command() -> Result {
    /// Where the tools are, from where tests are run.
    const KDP: &str = "build/bin/kdp";
    if !fs::exists(KDP)? {
        return skip("the tools are not built");
    }
    let errors = Errors::new()?;
    let slot = present(Backing::Huge2M, 3 * BLOCK, Paging::OnPresent)?;
    let bad = [BLOCK + 7, 2 * BLOCK + 9];
    for page in 0..3 * BLOCK {
        slot.check(page, 1)?;
    }
    for page in bad {
        errors.inject_into(Backing::Huge2M, &slot, page)?;
        slot.event()?;
    }
    let run = |command: &str, more: &[String]| -> Result<String> {
        let (pid, id) = (std::process::id().to_string(), ID.to_string());
        let done = Command::new(KDP)
            .args([command, "--json", "--pid", &pid, "--slot", &id])
            .args(more)
            .output()?;
        let complaint = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "kdp {command}: {complaint}");
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    };
    let listed = |cause: &str| {
        let runs = bad.map(|page| format!(r#"{{"cause":"{cause}","count":1,"first":{page}}}"#));
        format!("[{}]", runs.join(","))
    };
    let replaced = |first: u64| {
        format!(r#"[{{"copied":511,"errors":0,"first":{first},"healed":0,"lost":1}}]"#)
    };
    ensure_eq!(run("list", &[])?, listed("hardware"), "the list before");
    // One by any page of it, then all that there are.
    let some = [(BLOCK + 100).to_string()];
    ensure_eq!(run("replace", &some)?, replaced(BLOCK), "the first");
    ensure_eq!(run("replace", &[])?, replaced(2 * BLOCK), "the others");
    ensure_eq!(run("list", &[])?, listed("emulated"), "the list after");
    ensure_eq!(run("replace", &[])?, "[]", "when there are none");
    for page in (0..3 * BLOCK).filter(|page| !bad.contains(page)) {
        slot.check(page, 1)?;
    }
    Ok(())
}
