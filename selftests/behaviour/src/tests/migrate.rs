// SPDX-License-Identifier: GPL-2.0

//! Linux that moves from one VMM to another, each a program of its own, while its load checks every page that it has.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{mpsc, Arc};
use std::thread;
use std::time::Duration;

use kdp_migrate::control::Whereabouts;
use kdp_migrate::wire::{Message, Reason};
use kdp_migrate::Phase;

use crate::check::{skip, Result};
use crate::harness::{broke, on_debug_kernel, rounds};
use crate::link::{Fate, Link};
use crate::linux::{Console, MEMORY};
use crate::slot::{need_huge_pages, PAGE};
use crate::task::PATIENCE;
use crate::vmm::{check_all, Vmm};

tests! {
    "migrate-moves-and-moves-on" => moves_and_moves_on,
    "migrate-by-post-copy-alone" => by_post_copy_alone,
    "migrate-by-userfaultfd" => by_userfaultfd,
    "migrate-by-userfaultfd-to-hugetlb" => by_userfaultfd_to_hugetlb,
    "migrate-by-userfaultfd-fails-closed" => by_userfaultfd_fails_closed,
    "migrate-by-userfaultfd-lost-pages-stay-lost" => by_userfaultfd_lost_pages_stay_lost,
    "migrate-hinted-pages-do-not-travel" => hinted_pages_do_not_travel,
    "migrate-lost-pages-stay-lost" => lost_pages_stay_lost,
    "migrate-refused-orders-change-nothing" => refused_orders_change_nothing,
    "migrate-cut-connections-are-resumed" => cut_connections_are_resumed,
    "migrate-wrong-pages-are-asked-for-again" => wrong_pages_are_asked_for_again,
    "migrate-destination-killed-before-the-switch" => destination_killed_before_the_switch,
    "migrate-handler-killed-at-the-switch" => handler_killed_at_the_switch,
    "migrate-handler-killed-after-the-switch" => handler_killed_after_the_switch,
    "migrate-handler-killed-before-the-switch" => handler_killed_before_the_switch,
    "migrate-handler-that-never-lives-fails-closed" => handler_that_never_lives_fails_closed,
    "migrate-source-killed-while-the-state-is-loaded" => source_killed_while_the_state_is_loaded,
    "migrate-source-killed-after-the-switch" => source_killed_after_the_switch,
}

/// So slow that there is time to do something in each phase.
const SLOW: [&str; 2] = ["--bandwidth", "16M"];

/// What a debug kernel is to find is found by a few of these tests, each of which takes a minute or more there.
fn need_fast_kernel() -> Result {
    if on_debug_kernel() {
        return skip("it takes minutes on the debug kernel");
    }
    Ok(())
}

/// From memory of one kind to memory of another, and on.
fn moves_and_moves_on() -> Result {
    need_fast_kernel()?;
    need_huge_pages(MEMORY >> 21)?;
    let mut a = Vmm::waiting("shmem", &[])?;
    let first = a.bring()?;
    a.console.wait_rounds(1)?;
    let b = Vmm::waiting("hugetlb-2M", &[])?;
    let report = a.move_to(&b.address()?, &[])?.report()?;
    ensure!(report.rounds > 0, "there was no pre-copy");
    let longer = report.total_ms - report.downtime_ms;
    ensure!(
        longer.is_sign_positive(),
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

const USERFAULTFD: [&str; 2] = ["--pager", "userfaultfd"];

/// Without the device at the destination: first with rounds, whose pages become stale again; on from there, where the guest
/// gives pages back meanwhile; and with no page there when it goes on.
fn with_userfaultfd(backing: &str) -> Result {
    let mut a = Vmm::waiting("shmem", &[])?;
    let first = a.bring()?;
    let mut b = Vmm::waiting(backing, &USERFAULTFD)?;
    let report = a.move_to(&b.address()?, &SLOW)?.report()?;
    ensure!(
        report.rounds > 1,
        "there was {} round of pre-copy",
        report.rounds
    );
    a.wait_end()?;
    b.wait_arrival()?;
    b.console.wait_whole_check()?;
    let mut c = Vmm::waiting("shmem", &[])?;
    b.move_to(&c.address()?, &[])?.report()?;
    b.wait_end()?;
    c.wait_arrival()?;
    c.console.wait_whole_check()?;
    let d = Vmm::waiting(backing, &USERFAULTFD)?;
    let more = ["--rounds", "0", "--no-hints"];
    let report = c.move_to(&d.address()?, &more)?.report()?;
    ensure_eq!(report.sent.precopy, 0, "pages sent in pre-copy");
    let there = report.destination;
    ensure!(
        there.faults > 0 && there.fault_p50_us > 0,
        "no page was waited for"
    );
    if backing != "shmem" {
        ensure!(
            there.faults <= MEMORY >> 21,
            "{} faults on {} huge pages: parts were counted",
            there.faults,
            MEMORY >> 21
        );
    }
    c.wait_end()?;
    d.wait_arrival()?;
    d.console.wait_whole_check()?;
    check_all(&[&first, &a.console, &b.console, &c.console, &d.console])
}

fn by_userfaultfd() -> Result {
    need_fast_kernel()?;
    with_userfaultfd("shmem")
}

fn by_userfaultfd_to_hugetlb() -> Result {
    need_fast_kernel()?;
    need_huge_pages(2 * (MEMORY >> 21))?;
    with_userfaultfd("hugetlb-2M")
}

/// When the rest will never come the guest ends with an error: it has seen no zeros.
fn by_userfaultfd_fails_closed() -> Result {
    need_fast_kernel()?;
    for backing in ["shmem", "hugetlb-2M"] {
        let mut a = Vmm::waiting("shmem", &[])?;
        let first = a.bring()?;
        let mut b = Vmm::waiting(backing, &["--pager", "userfaultfd", "--give-up", "1"])?;
        let slow = ["--rounds", "0", "--bandwidth", "1M"];
        let moving = a.move_to(&b.address()?, &slow)?;
        b.wait_here()?;
        a.kill();
        let (status, said) = b.wait_end()?;
        ensure_eq!(status, Some(2), "the destination's exit status");
        ensure!(said.contains("will never come"), "it says {said}");
        drop(moving);
        check_all(&[&first, &a.console, &b.console])?;
    }
    Ok(())
}

/// A page that is lost is lost there, too, and where the guest goes next.
fn by_userfaultfd_lost_pages_stay_lost() -> Result {
    need_fast_kernel()?;
    // Where a PC has no memory: the guest touches it nowhere.
    const PAGES: [u64; 2] = [0xc8, 0xc9];
    let mut a = Vmm::waiting("shmem", &[])?;
    let first = a.bring()?;
    a.poison(PAGES[0])?;
    let mut b = Vmm::waiting("shmem", &USERFAULTFD)?;
    let moving = a.move_to(&b.address()?, &SLOW)?;
    a.wait_phase(Phase::PreCopy)?;
    a.poison(PAGES[1])?;
    moving.report()?;
    a.wait_end()?;
    b.wait_arrival()?;
    b.console.wait_whole_check()?;
    let c = Vmm::waiting("shmem", &[])?;
    b.move_to(&c.address()?, &["--rounds", "0"])?.report()?;
    b.wait_end()?;
    c.wait_arrival()?;
    c.console.wait_whole_check()?;
    ensure_eq!(
        c.poisoned()?,
        PAGES.to_vec(),
        "pages that are lost at the last destination"
    );
    check_all(&[&first, &a.console, &b.console, &c.console])
}

/// Pages that the guest says are free are not sent, and without its help they are.
fn hinted_pages_do_not_travel() -> Result {
    need_fast_kernel()?;
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
    need_fast_kernel()?;
    // Where a PC has no memory: the guest touches it at neither place.
    const BEFORE: [u64; 2] = [0xc8, 0xca];
    const MEANWHILE: [u64; 2] = [0xc9, 0xcc];
    let mut a = Vmm::waiting("shmem", &[])?;
    let first = a.bring()?;
    for page in BEFORE {
        a.poison(page)?;
    }
    let b = Vmm::waiting("shmem", &[])?;
    let moving = a.move_to(&b.address()?, &SLOW)?;
    a.wait_phase(Phase::PreCopy)?;
    // Sent by now, as what it was.
    for page in MEANWHILE {
        a.poison(page)?;
    }
    let mut lost = [BEFORE, MEANWHILE].concat();
    lost.sort_unstable();
    let report = moving.report()?;
    ensure!(
        report.sent.lost >= lost.len() as u64,
        "{} lost pages were sent",
        report.sent.lost
    );
    broke("pages lost at the source", lost.len() as u64);
    a.wait_end()?;
    b.console.wait_whole_check()?;
    ensure_eq!(
        b.poisoned()?,
        lost,
        "pages that are lost at the destination"
    );
    check_all(&[&first, &a.console, &b.console])
}

/// An order that cannot be carried out leaves the guest where it is, and it can be moved after that.
fn refused_orders_change_nothing() -> Result {
    /// The least that a VMM takes for a Linux guest, in bytes.
    const SMALL: u64 = 64 << 20;
    need_fast_kernel()?;
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
    let small = Vmm::with_memory(SMALL, "shmem", &[])?;
    let refusal = a.move_to(&small.address()?, &[])?.failure()?;
    ensure!(
        refusal.contains(&format!("{} pages", SMALL / PAGE)) && refusal.contains("runs on here"),
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

/// A guest that is at the end of a chain of VMMs: what all of them said.
struct Journey {
    at: Vmm,
    consoles: Vec<Console>,
}

impl Journey {
    fn begin() -> Result<Self> {
        let at = Vmm::waiting("shmem", &[])?;
        let consoles = vec![at.bring()?];
        Ok(Self { at, consoles })
    }

    /// The guest is there now, with all its pages.
    fn goes_on_at(&mut self, next: Vmm) -> Result {
        let mut left = std::mem::replace(&mut self.at, next);
        ensure_eq!(left.wait_end()?.0, Some(0), "the source's exit status");
        self.consoles.push(left.console.clone());
        self.at.console.wait_whole_check()?;
        self.check()
    }

    fn check(&self) -> Result {
        let mut consoles: Vec<&Console> = self.consoles.iter().collect();
        consoles.push(&self.at.console);
        check_all(&consoles)
    }
}

/// The connection breaks in every phase, again and again: it costs time.
fn cut_connections_are_resumed() -> Result {
    need_fast_kernel()?;
    let mut journey = Journey::begin()?;
    for round in 0..rounds(2) {
        let there = Vmm::waiting("shmem", &[])?;
        let link = Link::to(&there.address()?)?;
        let mut moving = journey.at.move_to(link.address(), &SLOW)?;
        // Not a fixed number of bytes: another point of the protocol each time.
        let mut far = 700_000 + 97_001 * round;
        let mut cuts = 0;
        while !moving.has_ended()? {
            if link.bytes() > far && link.cut() {
                cuts += 1;
                far = link.bytes() + 2_000_000 + 333_333 * cuts;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let report = moving.report()?;
        broke("connections cut", cuts);
        ensure!(
            cuts > 2 && report.reconnects >= cuts - 1,
            "{} new connections after {cuts} cuts",
            report.reconnects
        );
        journey.goes_on_at(there)?;
    }
    Ok(())
}

/// A source that answers with another page than was asked for, twice, never, or with rubbish, is asked again; and so is one
/// whose pages get lost, or come twice, while the guest still runs there and makes them stale.
fn wrong_pages_are_asked_for_again() -> Result {
    need_fast_kernel()?;
    let mut journey = Journey::begin()?;
    for round in 0..2 * rounds(1) {
        let there = Vmm::waiting("shmem", &["--answer", "0.5"])?;
        let link = Link::to(&there.address()?)?;
        let mut frames = 0;
        link.meddle(Box::new(move |message| {
            let Message::Pages { reason, .. } = message else {
                return Fate::Pass;
            };
            frames += 1;
            match (reason, frames % 150) {
                (Reason::Requested, 7) | (Reason::Background, 20) => Fate::Replace,
                (_, 40) => Fate::Drop,
                (_, 75) => Fate::Repeat,
                (_, 110) => Fate::Damage,
                _ => Fate::Pass,
            }
        }));
        let by_precopy = round % 2 == 1;
        let more = if by_precopy {
            &SLOW
        } else {
            &["--rounds", "0"]
        };
        let report = journey.at.move_to(link.address(), more)?.report()?;
        for (fate, what) in [
            (Fate::Replace, "answers that were another page"),
            (Fate::Drop, "frames of pages that never came"),
            (Fate::Repeat, "frames of pages that came twice"),
            (Fate::Damage, "frames of pages that were damaged"),
        ] {
            let times = link.meddled(fate);
            broke(what, times);
            let may_be_none = by_precopy && fate == Fate::Replace;
            ensure!(times > 0 || may_be_none, "there were no {what}");
        }
        ensure!(report.reconnects > 0, "no connection was given up");
        journey.goes_on_at(there)?;
    }
    Ok(())
}

/// Before the switch the guest is the source's: a destination that dies costs nothing, and another one takes it.
fn destination_killed_before_the_switch() -> Result {
    need_fast_kernel()?;
    let mut journey = Journey::begin()?;
    for round in 0..rounds(2) {
        let mut there = Vmm::waiting("shmem", &[])?;
        let more = [&SLOW[..], &["--give-up", "0.5"]].concat();
        let moving = journey.at.move_to(&there.address()?, &more)?;
        journey.at.wait("some is sent", |status| {
            status
                .progress
                .is_some_and(|now| now.phase == Phase::PreCopy && now.bytes > 500_000 * round)
        })?;
        there.kill();
        broke("destinations killed before the switch", 1);
        let failure = moving.failure()?;
        ensure!(failure.contains("runs on here"), "it says {failure}");
        ensure_eq!(
            journey.at.status()?.guest,
            Whereabouts::Here,
            "where the guest is"
        );
        journey.at.console.wait_rounds(2)?;
    }
    journey.check()?;
    let there = Vmm::waiting("shmem", &[])?;
    journey.at.move_to(&there.address()?, &[])?.report()?;
    journey.goes_on_at(there)
}

/// After the switch only the source has the pages that are missing: without it the guest stops at the first of them, with
/// an error that names it, and reads no zeros.
fn source_killed_after_the_switch() -> Result {
    need_fast_kernel()?;
    for round in 0..rounds(1) {
        let mut journey = Journey::begin()?;
        let mut there = Vmm::waiting("shmem", &["--give-up", "1"])?;
        let more = ["--rounds", "0", "--bandwidth", "1M"];
        let moving = journey.at.move_to(&there.address()?, &more)?;
        there.wait_here()?;
        thread::sleep(Duration::from_millis(50 * round));
        journey.at.kill();
        broke("sources killed after the switch", 1);
        let failure = moving.failure()?;
        ensure!(failure.contains("went away"), "kdp migrate says {failure}");
        let (status, said) = there.wait_end()?;
        ensure_eq!(status, Some(2), "the destination's exit status");
        ensure!(
            said.contains("will never come: "),
            "the destination says {said}"
        );
        journey.consoles.push(journey.at.console.clone());
        journey.at = there;
        journey.check()?;
    }
    Ok(())
}

/// SIGKILL.
fn kill(pid: u32) {
    // SAFETY: it ends a process that was started for this test.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
}

/// The process that brings the pages to a VMM, which starts it after it has begun to listen.
fn handler_of(vmm: &Vmm) -> Result<u32> {
    let status = vmm.wait("it has a handler", |status| status.handler.is_some())?;
    match status.handler {
        Some(pid) => Ok(pid),
        None => fail!("there is no handler"),
    }
}

/// The source has sent the order to run the guest, and cannot take it back. The process that it was sent to dies before it
/// can read it: the next one is sent it again.
fn handler_killed_at_the_switch() -> Result {
    need_fast_kernel()?;
    let mut journey = Journey::begin()?;
    for _ in 0..rounds(1) {
        let there = Vmm::waiting("shmem", &["--handler-process"])?;
        let link = Link::to(&there.address()?)?;
        let (mut handler, kills) = (Some(handler_of(&there)?), Arc::new(AtomicU64::new(0)));
        let killed = kills.clone();
        link.meddle(Box::new(move |message| {
            if matches!(message, Message::Go) {
                if let Some(pid) = handler.take() {
                    kill(pid);
                    killed.fetch_add(1, Ordering::Relaxed);
                }
            }
            Fate::Pass
        }));
        let more = ["--rounds", "0"];
        let report = journey.at.move_to(link.address(), &more)?.report()?;
        let kills = kills.load(Ordering::Relaxed);
        broke("handlers killed at the switch", kills);
        ensure_eq!(kills, 1, "handlers killed");
        ensure!(report.reconnects > 0, "no connection was given up");
        there.wait_arrival()?;
        journey.goes_on_at(there)?;
    }
    Ok(())
}

/// The process that brings the pages dies again and again while the guest runs there, and each time another one goes on
/// where it was: it costs time.
fn handler_killed_after_the_switch() -> Result {
    need_fast_kernel()?;
    let mut journey = Journey::begin()?;
    for round in 0..rounds(1) {
        let there = Vmm::waiting("shmem", &["--handler-process", "--answer", "1"])?;
        let more = ["--rounds", "0", "--bandwidth", "4M"];
        let mut moving = journey.at.move_to(&there.address()?, &more)?;
        there.wait_here()?;
        let (mut kills, mut before) = (0, None);
        while !moving.has_ended()? {
            thread::sleep(Duration::from_millis(300 + 37 * (round + kills)));
            let handler = there.status()?.handler;
            if let Some(pid) = handler.filter(|_| handler != before) {
                kill(pid);
                kills += 1;
                before = handler;
            }
        }
        let report = moving.report()?;
        broke("handlers killed after the switch", kills);
        // The last one may have been killed when all was there.
        ensure!(
            kills > 2 && report.reconnects >= kills - 1,
            "{} new connections after {kills} handlers were killed",
            report.reconnects
        );
        there.wait_arrival()?;
        journey.goes_on_at(there)?;
    }
    Ok(())
}

/// Before the switch there is nothing to go on with: the VMM says so and ends, and the guest runs on at the source.
fn handler_killed_before_the_switch() -> Result {
    need_fast_kernel()?;
    let mut journey = Journey::begin()?;
    for _ in 0..rounds(1) {
        let mut there = Vmm::waiting("shmem", &["--handler-process"])?;
        let more = [&SLOW[..], &["--give-up", "0.5"]].concat();
        let moving = journey.at.move_to(&there.address()?, &more)?;
        journey.at.wait_phase(Phase::PreCopy)?;
        kill(handler_of(&there)?);
        broke("handlers killed before the switch", 1);
        let (status, said) = there.wait_end()?;
        ensure_eq!(status, Some(2), "the destination's exit status");
        ensure!(
            said.contains("the page handler died before the guest was here"),
            "the destination says {said}"
        );
        let failure = moving.failure()?;
        ensure!(failure.contains("runs on here"), "it says {failure}");
        journey.at.console.wait_rounds(2)?;
    }
    journey.check()?;
    let there = Vmm::waiting("shmem", &["--handler-process"])?;
    journey.at.move_to(&there.address()?, &[])?.report()?;
    journey.goes_on_at(there)
}

/// When none lives long enough to say a word the guest ends with an error: it does not wait for ever.
fn handler_that_never_lives_fails_closed() -> Result {
    need_fast_kernel()?;
    let mut journey = Journey::begin()?;
    let mut there = Vmm::waiting("shmem", &["--handler-process", "--give-up", "2"])?;
    let more = ["--rounds", "0", "--bandwidth", "1M", "--give-up", "5"];
    let moving = journey.at.move_to(&there.address()?, &more)?;
    there.wait_here()?;
    let (mut kills, mut before) = (0, None);
    while let Ok(status) = there.status() {
        if let Some(pid) = status.handler.filter(|_| status.handler != before) {
            kill(pid);
            kills += 1;
            before = status.handler;
        }
        thread::sleep(Duration::from_millis(1));
    }
    ensure!(kills > 2, "{kills} handlers were killed");
    let (status, said) = there.wait_end()?;
    ensure_eq!(status, Some(2), "the destination's exit status");
    ensure!(
        said.contains("will never come: page handlers have died without a word for 2 s"),
        "the destination says {said}"
    );
    moving.failure()?;
    journey.consoles.push(journey.at.console.clone());
    journey.at = there;
    journey.check()
}

/// What loads the state waits for pages in the kernel. If the source dies then, no guest comes, and the VMM says so and ends.
fn source_killed_while_the_state_is_loaded() -> Result {
    need_fast_kernel()?;
    for more in [
        &["--give-up", "1"][..],
        &["--give-up", "1", "--handler-process"],
    ] {
        let mut journey = Journey::begin()?;
        let mut there = Vmm::waiting("shmem", more)?;
        let link = Link::to(&there.address()?)?;
        let (tell, told) = mpsc::channel();
        link.meddle(Box::new(move |message| {
            let is_loading = matches!(message, Message::Prepare { .. });
            if is_loading {
                // The test may have failed meanwhile.
                let _ = tell.send(());
            }
            Fate::Pass
        }));
        // Nothing of the guest is there, so the load needs what the source is to send.
        let moving = journey.at.move_to(link.address(), &["--rounds", "0"])?;
        told.recv_timeout(PATIENCE)?;
        journey.at.kill();
        broke("sources killed at the switch", 1);
        moving.failure()?;
        let (status, said) = there.wait_end()?;
        // It may have been loaded, and even started, before the source died.
        ensure_eq!(status, Some(2), "the destination's exit status");
        println!("it says {said}");
        journey.check()?;
    }
    Ok(())
}
