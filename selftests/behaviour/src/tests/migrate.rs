// SPDX-License-Identifier: GPL-2.0

//! Linux that moves from one VMM to another, each a program of its own, while its load checks every page that it has.

use kdp_migrate::control::Whereabouts;
use kdp_migrate::Phase;

use crate::check::Result;
use crate::linux::MEMORY;
use crate::slot::{need_huge_pages, PAGE};
use crate::vmm::{check_all, Vmm};

tests! {
    "migrate-moves-and-moves-on" => moves_and_moves_on,
    "migrate-by-post-copy-alone" => by_post_copy_alone,
    "migrate-hinted-pages-do-not-travel" => hinted_pages_do_not_travel,
    "migrate-lost-pages-stay-lost" => lost_pages_stay_lost,
    "migrate-refused-orders-change-nothing" => refused_orders_change_nothing,
}

/// So slow that there is time to do something in each phase.
const SLOW: [&str; 2] = ["--bandwidth", "6M"];

/// From memory of one kind to memory of another, and on.
fn moves_and_moves_on() -> Result {
    need_huge_pages(MEMORY >> 21)?;
    let mut a = Vmm::waiting("shmem", &[])?;
    let first = a.bring()?;
    a.console.wait_rounds(1)?;
    let b = Vmm::waiting("hugetlb-2M", &[])?;
    let report = a.move_to(&b.address()?, &[])?.report()?;
    ensure!(report.rounds > 0, "there was no pre-copy");
    ensure!(
        report.downtime_ms < report.total_ms,
        "the guest stood still for all of the time"
    );
    ensure_eq!(report.pages, MEMORY / PAGE, "pages of the guest");
    ensure_eq!(a.wait_end()?.0, Some(0), "the source's exit status");
    b.wait_arrival()?;
    b.console.wait_whole_check()?;
    let mut b = b;
    let c = Vmm::waiting("shmem", &[])?;
    b.move_to(&c.address()?, &[])?.report()?;
    ensure_eq!(b.wait_end()?.0, Some(0), "the second source's exit status");
    c.console.wait_whole_check()?;
    check_all(&[&first, &a.console, &b.console, &c.console])
}

/// With no page there when it goes on.
fn by_post_copy_alone() -> Result {
    let mut a = Vmm::waiting("shmem", &[])?;
    let first = a.bring()?;
    let b = Vmm::waiting("shmem", &[])?;
    let report = a.move_to(&b.address()?, &["--rounds", "0"])?.report()?;
    ensure_eq!(report.sent.precopy, 0, "pages sent in pre-copy");
    ensure!(report.sent.requested > 0, "no page was asked for");
    let arrival = b.status()?.arrival;
    ensure!(
        arrival.is_some_and(|there| there.faults > 0 && there.fault_p50_us > 0),
        "no page was waited for"
    );
    a.wait_end()?;
    b.console.wait_whole_check()?;
    check_all(&[&first, &a.console, &b.console])
}

/// Pages that the guest says are free are not sent, and without its help they are.
fn hinted_pages_do_not_travel() -> Result {
    let mut a = Vmm::waiting("shmem", &[])?;
    let first = a.bring()?;
    let mut b = Vmm::waiting("shmem", &[])?;
    let with = a.move_to(&b.address()?, &[])?.report()?;
    ensure!(with.pages_hinted_free > 0, "no page was hinted");
    ensure_eq!(
        b.status()?.arrival.map(|there| there.pages_hinted_free),
        Some(with.pages_hinted_free),
        "pages hinted free, at the destination"
    );
    a.wait_end()?;
    b.console.wait_whole_check()?;
    let c = Vmm::waiting("shmem", &[])?;
    let without = b.move_to(&c.address()?, &["--no-hints"])?.report()?;
    ensure_eq!(without.pages_hinted_free, 0, "pages hinted free");
    b.wait_end()?;
    c.console.wait_whole_check()?;
    check_all(&[&first, &a.console, &b.console, &c.console])
}

/// A page that is lost at the source is lost at the destination, and nothing else is.
fn lost_pages_stay_lost() -> Result {
    // Where a PC has no memory: the guest touches it at neither place.
    const PAGES: [u64; 2] = [0xc8, 0xc9];
    let mut a = Vmm::waiting("shmem", &[])?;
    let first = a.bring()?;
    a.poison(PAGES[0])?;
    let b = Vmm::waiting("shmem", &[])?;
    let moving = a.move_to(&b.address()?, &SLOW)?;
    a.wait_phase(Phase::PreCopy)?;
    // Sent by now, as what it was.
    a.poison(PAGES[1])?;
    let report = moving.report()?;
    ensure!(
        report.sent.lost >= 2,
        "{} lost pages were sent",
        report.sent.lost
    );
    a.wait_end()?;
    b.console.wait_whole_check()?;
    ensure_eq!(
        b.poisoned()?,
        PAGES.to_vec(),
        "pages that are lost at the destination"
    );
    check_all(&[&first, &a.console, &b.console])
}

/// An order that cannot be carried out leaves the guest where it is, and it can be moved after that.
fn refused_orders_change_nothing() -> Result {
    let mut a = Vmm::waiting("shmem", &[])?;
    let refusal = a.move_to("127.0.0.1:1", &[])?.failure()?;
    ensure!(
        refusal.contains("there is no guest here yet"),
        "it says {refusal}"
    );
    let first = a.bring()?;
    let refusal = a.move_to("127.0.0.1:1", &["--give-up", "0.5"])?.failure()?;
    ensure!(
        refusal.contains("runs on here"),
        "with nobody there it says {refusal}"
    );
    let small = Vmm::with_memory(64 << 20, "shmem", &[])?;
    let refusal = a.move_to(&small.address()?, &[])?.failure()?;
    ensure!(
        refusal.contains("16384 pages") && refusal.contains("runs on here"),
        "of a VMM with other memory it says {refusal}"
    );
    a.console.wait_rounds(1)?;
    let b = Vmm::waiting("shmem", &[])?;
    let moving = a.move_to(&b.address()?, &SLOW)?;
    a.wait_phase(Phase::PreCopy)?;
    let refusal = a.move_to(&b.address()?, &[])?.failure()?;
    ensure!(refusal.contains("already"), "asked twice it says {refusal}");
    moving.report()?;
    ensure_eq!(b.status()?.guest, Whereabouts::Here, "where the guest is");
    a.wait_end()?;
    b.console.wait_whole_check()?;
    check_all(&[&first, &a.console, &b.console])
}
