// SPDX-License-Identifier: GPL-2.0

//! Pages that are fetched before a guest asks for them.

use std::sync::Arc;

use kdp_vmm::session::{self, Config, Pattern, Report};
use kdp_vmm::{Image, Mode, PAGE_SIZE};
use kvm_demand_paging::Backing;

use crate::check::Result;
use crate::slot::{need_huge_pages, need_kvm, BLOCK};

tests! {
    "prefetch-sequential-exits-once-a-window" => sequential,
    "prefetch-random-fetches-what-it-touches" => random,
    "prefetch-some-pages-of-many" => some_of_many,
    "prefetch-unneeded-pages-are-counted" => unneeded_are_counted,
    "prefetch-unneeded-pages-of-huge-faults" => unneeded_of_huge_faults,
}

fn run(config: Config) -> Result<Report> {
    need_kvm()?;
    if config.backing == Backing::Huge2M {
        need_huge_pages(config.bytes / PAGE_SIZE / BLOCK)?;
    }
    let image = Arc::new(Image::generate(config.bytes, 1)?);
    let report = session::run(&config, image)?;
    ensure!(report.correct(), "the guest saw wrong contents");
    Ok(report)
}

fn config(backing: Backing, pattern: Pattern) -> Config {
    Config {
        mode: Mode::Prefetch,
        backing,
        pattern,
        bytes: 8 * BLOCK * PAGE_SIZE,
        whole_pages: false,
        ..Config::default()
    }
}

/// Windows of 1, 1, 2, 4 pages and so on up to 256, which end with the first block; then whole blocks.
fn sequential() -> Result {
    for backing in [Backing::Shmem, Backing::Huge2M] {
        let report = run(config(backing, Pattern::Sequential))?;
        ensure_eq!(report.exits, 10 + 7, "exits for 8 blocks");
        ensure_eq!(
            (report.pages_fetched, report.pages_unneeded),
            (8 * BLOCK, 0),
            "pages fetched, and those never touched"
        );
    }
    Ok(())
}

/// A random guest exits for each page, but for a few that follow each other by chance.
fn random() -> Result {
    let report = run(config(Backing::Huge2M, Pattern::Random))?;
    let pages = 8 * BLOCK;
    ensure!(
        report.exits + 10 > pages,
        "{} exits for {pages} pages",
        report.exits
    );
    ensure_eq!(report.pages_unneeded, 0, "pages never touched");
    Ok(())
}

/// A guest that touches every kth page only: nothing else is fetched.
fn some_of_many() -> Result {
    for (pattern, stride) in [
        (Pattern::Sequential, 2),
        (Pattern::Sequential, 7),
        (Pattern::Random, 3),
    ] {
        let report = run(Config {
            stride,
            ..config(Backing::Huge2M, pattern)
        })?;
        ensure_eq!(
            (report.exits, report.pages_fetched, report.pages_unneeded),
            (report.visited, report.visited, 0),
            "exits, pages fetched, and those never touched, of every {stride}th page"
        );
    }
    Ok(())
}

/// A guest that stops after 100 pages has had 128 fetched by then: 1, 1, 2 and so on up to 64.
fn unneeded_are_counted() -> Result {
    let report = run(Config {
        extent: Some(100),
        ..config(Backing::Huge2M, Pattern::Sequential)
    })?;
    ensure_eq!(report.visited, 100, "pages visited");
    ensure_eq!(
        (report.exits, report.pages_fetched, report.pages_unneeded),
        (8, 128, 28),
        "exits, pages fetched, and those never touched"
    );
    Ok(())
}

/// userfaultfd fetches whole huge pages: what the guest does not touch of them is counted, too.
fn unneeded_of_huge_faults() -> Result {
    let report = run(Config {
        mode: Mode::UffdMissing,
        stride: 64,
        ..config(Backing::Huge2M, Pattern::Random)
    })?;
    let pages = 8 * BLOCK;
    ensure_eq!(
        (report.visited, report.pages_fetched, report.pages_unneeded),
        (pages / 64, pages, pages - pages / 64),
        "pages visited, pages fetched, and those never touched"
    );
    Ok(())
}
