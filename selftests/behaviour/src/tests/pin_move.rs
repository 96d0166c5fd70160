// SPDX-License-Identifier: GPL-2.0

//! The other side of memory that stays put: it is moved to another node where its VMM wants that, with the guest running.

use std::sync::Arc;

use kvm_demand_paging::{Backing, Memfd, PageRange, Paging, State, Vm};

use crate::busy::Busy;
use crate::check::Result;
use crate::numa;
use crate::slot::{need_huge_pages, Slot, BLOCK, ID, PAGE};

tests! {
    "pin-move-on-request-hugetlb" => || on_request(Backing::Huge2M, 2 * BLOCK),
    "native-mbind-decides-the-node" => mbind_decides,
}

/// After mbind(2) on the mapping of a memslot, absent pages are allocated on the bound node when
/// they are placed. The memslot begins in the middle of its memfd.
fn mbind_decides() -> Result {
    const PAGES: u64 = 64;
    const OFFSET: u64 = 16;
    numa::need_nodes()?;
    let memfd = Memfd::create("kdp-behaviour", Backing::Shmem, (OFFSET + PAGES) * PAGE)?;
    let slot = Slot::of(Vm::open()?, memfd, |builder| {
        builder.part(OFFSET * PAGE, PAGES).paging(true)
    })?;
    let [one, other] = numa::NODES;
    let halves = [(0, one), (PAGES / 2, other)];
    for (first, node) in halves {
        numa::bind(slot.address(first), PAGES / 2 * PAGE, node)?;
        ensure_eq!(
            numa::bound(slot.address(first))?,
            Some(node),
            "the node that is bound"
        );
    }
    for page in 0..PAGES {
        slot.place(page, 1)?;
    }
    for (first, node) in halves {
        let frames = numa::frames(slot.address(first).cast(), PAGES / 2)?;
        ensure!(
            numa::are_on(node, &frames),
            "not all pages from page {first} on are on node {node}"
        );
    }
    Ok(())
}

/// Moves a range: absent pages are not pinned, and nobody writes to them; what they hold stays in the memfd. Who touches one
/// meanwhile waits as for any absent page.
fn move_range(slot: &Slot, range: PageRange, each: u64, node: u32) -> Result {
    slot.mark_range(State::Absent, range)?;
    let start = slot.alias.as_ptr() as u64 + range.first * PAGE;
    let addresses: Vec<u64> = (0..range.count * PAGE)
        .step_by(each as usize)
        .map(|at| start + at)
        .collect();
    let left = numa::move_pages(&addresses, node)?;
    slot.mark_range(State::Present, range)?;
    ensure_eq!(left, 0, "pages {} and on that stay", range.first);
    Ok(())
}

/// There and back, range by range, while vCPUs write: no write is lost.
fn on_request(backing: Backing, pages: u64) -> Result {
    numa::need_nodes()?;
    need_huge_pages(32)?;
    let slot: Arc<Slot> = Slot::new(backing, pages)?;
    let each = backing.page_size();
    let step = each / PAGE;
    let [from, to] = numa::NODES;
    numa::on_node(from, || Ok(kdp_vmm::populate(&slot.alias)?))?;
    slot.vm.set_paging(ID, Paging::OnPresent)?;
    let busy = Busy::start(&slot)?;
    let alias = numa::addresses(&slot.alias, each);
    // Pinned, they are not moved by the same call.
    ensure_eq!(
        numa::move_pages(&alias, to)?,
        alias.len() as u64,
        "pages that stay, present"
    );
    for node in [to, from, to] {
        for first in (0..pages).step_by(step as usize) {
            move_range(&slot, PageRange::new(first, step), each, node)?;
        }
        let frames = numa::frames(slot.alias.as_ptr(), pages)?;
        ensure!(
            numa::are_on(node, &frames),
            "not all pages are on node {node}"
        );
        busy.goes_on(1)?;
    }
    // Where they are pinned again they stay.
    ensure_eq!(
        numa::move_pages(&alias, from)?,
        alias.len() as u64,
        "pages that stay, present again"
    );
    let rounds = busy.end()?;
    println!("the guest's vCPUs have gone through the memory {rounds} times");
    Ok(())
}
