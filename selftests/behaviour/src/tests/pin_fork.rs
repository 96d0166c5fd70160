// SPDX-License-Identifier: GPL-2.0

//! fork(2) in a VMM with a guest that runs: what the child has, and what is left when it is gone.

use std::sync::atomic::Ordering;

use kvm_demand_paging::{Backing, Paging};

use crate::busy::Busy;
use crate::check::Result;
use crate::numa;
use crate::shared::Shared;
use crate::slot::{Slot, BLOCK, ID, PAGE};
use crate::sys::{self, Child, Ended, Touched};
use crate::task::{until, PATIENCE};

tests! {
    "native-fork-under-a-guest" => || fork(Backing::Shmem, BLOCK, Some(libc::SIGKILL)),
    "pin-fork-hugetlb" => || fork(Backing::Huge2M, 2 * BLOCK, None),
}

/// What the child tells the parent, and is told.
const DONE: usize = 0;
const GO: usize = 1;

/// Words of each page: one that the child writes, one that the parent has written before and writes once more.
const CHILDS: usize = 100;
const PARENTS: usize = 101;

const BEFORE: u64 = 0x1111;
const AFTER: u64 = 0x2222;
const BY_CHILD: u64 = 0x3333;

/// A fork while vCPUs write. The child has the same pages: what one of the two writes, the other reads. Neither gets a copy,
/// where private memory beside it (the twin) is copied at the first write. The child's end takes nothing from the
/// guest: no page, and no pin.
fn fork(backing: Backing, pages: u64, signal: Option<i32>) -> Result {
    let slot = Slot::new(backing, pages)?;
    kdp_vmm::populate(&slot.alias)?;
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    let busy = Busy::start(&slot)?;
    let words = Shared::new(2)?;
    // Private memory of the parent's.
    let mut twin = vec![BEFORE; (pages * PAGE / 8) as usize];
    let twin_at = twin.as_mut_ptr();
    let at = |page: u64, word: usize| slot.address(page).wrapping_add(word);
    let twin_word = |page: u64| twin_at.wrapping_add((page * PAGE / 8) as usize + PARENTS);
    // SAFETY: it is guest memory, or the twin's, which no reference is used to meanwhile.
    let store = |at: *mut u64, value: u64| unsafe { sys::store(at, value) };
    for page in 0..pages {
        ensure_eq!(
            store(at(page, PARENTS), BEFORE),
            Touched::Value(0),
            "the parent's write"
        );
    }
    let frames = numa::frames(slot.alias.as_ptr(), pages)?;

    let in_child = || -> i32 {
        for page in 0..pages {
            let fine = sys::load(at(page, PARENTS)) == Touched::Value(BEFORE)
                && store(at(page, CHILDS), BY_CHILD + page) == Touched::Value(0)
                && store(twin_word(page), BY_CHILD) == Touched::Value(0);
            if !fine {
                return 10;
            }
        }
        words.at(DONE).store(1, Ordering::Release);
        while words.at(GO).load(Ordering::Acquire) == 0 {
            std::hint::spin_loop();
        }
        for page in 0..pages {
            if sys::load(at(page, PARENTS)) != Touched::Value(AFTER) {
                return 11;
            }
            // Its own copy.
            if sys::load(twin_word(page)) != Touched::Value(BY_CHILD) {
                return 12;
            }
        }
        words.at(DONE).store(2, Ordering::Release);
        while signal.is_some() {
            std::hint::spin_loop();
        }
        0
    };
    // SAFETY: the child touches memory and ends: it takes no lock that another thread may hold.
    let mut child = unsafe { Child::fork_beside_threads(in_child) }?;
    let done = |step: u64| {
        until("the child is done", || {
            Ok(words.at(DONE).load(Ordering::Acquire) >= step)
        })
    };
    done(1)?;
    busy.goes_on(1)?;
    for page in 0..pages {
        ensure_eq!(
            sys::load(at(page, CHILDS)),
            Touched::Value(BY_CHILD + page),
            "page {page}: what the child wrote"
        );
        store(at(page, PARENTS), AFTER);
        ensure_eq!(
            sys::load(twin_word(page)),
            Touched::Value(BEFORE),
            "page {page} of the twin, which the child has a copy of"
        );
        store(twin_word(page), AFTER);
    }
    words.at(GO).store(1, Ordering::Release);
    done(2)?;
    busy.goes_on(1)?;
    let same = |when: &str| -> Result {
        let now = numa::frames(slot.alias.as_ptr(), pages)?;
        ensure!(
            now == frames,
            "{when}: the memslot's pages have other frames"
        );
        Ok(())
    };
    same("with the child there")?;
    if let Some(signal) = signal {
        child.kill(signal)?;
        ensure_eq!(
            child.wait(PATIENCE)?,
            Ended::Signal(signal),
            "the child's end"
        );
    } else {
        child.join(PATIENCE)?;
    }
    busy.goes_on(2)?;
    same("after the child's end")?;
    for page in 0..pages {
        ensure_eq!(
            sys::load(at(page, CHILDS)),
            Touched::Value(BY_CHILD + page),
            "page {page}, after the child's end"
        );
    }
    // The pins are there still. Shmem has none, and moves.
    for node in numa::NODES
        .into_iter()
        .filter(|_| backing != Backing::Shmem)
    {
        let alias = numa::addresses(&slot.alias, backing.page_size());
        numa::move_pages(&alias, node)?;
        same("asked to move")?;
    }
    busy.end()?;
    drop(twin);
    Ok(())
}
