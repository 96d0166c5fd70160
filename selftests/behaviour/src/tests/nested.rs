// SPDX-License-Identifier: GPL-2.0

//! Nested guests. The memory and the control structures of the inner guest are pages of the
//! memslot.

use std::fs;
use std::sync::Arc;

use kdp_vmm::{Stop, Vcpu};
use kvm_demand_paging::Backing;

use super::poison::{heal, poison, run_into_loss};
use crate::check::{skip, Result};
use crate::content;
use crate::handler::Handler;
use crate::nested::{
    self, Store, Translation, CODE, ENTRIES, EXIT_IO, EXIT_MSR, EXIT_VMMCALL, HOST, IOPM, MSRPM,
    PAGES, RESULTS, SOURCES, TRANSLATIONS, VMCB,
};
use crate::slot::{Slot, BLOCK};
use crate::sys;
use crate::task::Task;

tests! {
    "native-nested-guest-waits-for-pages" => guest_waits_for_pages,
    "native-nested-guest-waits-with-exits-on" => guest_waits_with_exits_on,
    "native-nested-guest-meets-poison" => guest_meets_poison,
    "native-nested-guest-on-hugetlb-is-refused" => guest_on_hugetlb_is_refused,
}

/// A nested guest all of whose pages are absent at first.
struct Nested {
    slot: Arc<Slot>,
    store: Arc<Store>,
    handler: Handler,
    vcpu: Vcpu,
    translation: Translation,
}

impl Nested {
    fn new(translation: Translation) -> Result<Self> {
        let slot = Slot::new(Backing::Shmem, PAGES)?;
        let vcpu = nested::vcpu(&slot.machine()?, translation)?;
        let store = Store::new(&slot, translation)?;
        let fetching = store.clone();
        let handler = Handler::start(&slot, move |event| fetching.fetch(event.page))?;
        Ok(Self {
            slot,
            store,
            handler,
            vcpu,
            translation,
        })
    }

    /// Runs the outer and the inner guest. The vCPU must stop with these stops, in this order.
    fn expect(&mut self, stops: &[Stop], mut on_fault: impl FnMut(u64) -> Result) -> Result {
        for expected in stops {
            let stop = nested::next(&mut self.vcpu, &mut on_fault)?;
            ensure_eq!(
                stop,
                *expected,
                "what the VMM was told ({:?})",
                self.translation
            );
        }
        Ok(())
    }

    /// Fails unless exactly these pages were fetched since the last call, each once.
    fn check_fetched(&self, what: &str, pages: impl IntoIterator<Item = u64>) -> Result {
        let mut expected: Vec<u64> = pages.into_iter().collect();
        expected.sort_unstable();
        ensure_eq!(
            self.store.fetched(),
            expected,
            "pages that were fetched {what} ({:?})",
            self.translation
        );
        Ok(())
    }

    /// Runs one round of the inner guest, over this version of the pages that it reads.
    ///
    /// All pages are absent before the round and after it. They are made absent once more in
    /// between, while the inner guest is active.
    fn round(&mut self, version: u64, mut on_fault: impl FnMut(u64) -> Result) -> Result {
        let sum = nested::sum(version);
        self.expect(&[Stop::Tick(sum as u32)], &mut on_fault)?;
        let inner = self.translation.tables().chain([CODE]);
        let data = SOURCES.chain(RESULTS);
        let outer = [ENTRIES, VMCB, HOST, IOPM].into_iter().chain(MSRPM);
        self.check_fetched("up to the VMM's port", outer.chain(inner).chain(data))?;
        self.store.take_all()?;
        for page in RESULTS {
            let source = page - RESULTS.start + SOURCES.start;
            let mut expected = content::bytes(page, 1);
            expected[..8].copy_from_slice(&nested::hash(source, version).to_le_bytes());
            ensure!(
                self.store.bytes(page)? == expected,
                "page {page} is not what the inner guest wrote ({:?})",
                self.translation
            );
        }

        let reports = |code| [Stop::Report(code), Stop::Report(sum)];
        self.expect(&reports(EXIT_IO), &mut on_fault)?;
        let inner = self.translation.tables().chain([CODE]);
        self.check_fetched(
            "up to the intercepted port",
            inner.chain([VMCB, HOST, IOPM]),
        )?;
        self.expect(&reports(EXIT_MSR), &mut on_fault)?;
        self.expect(&reports(EXIT_VMMCALL), &mut on_fault)?;
        self.check_fetched("up to VMMCALL", MSRPM.chain([ENTRIES]))?;
        self.store.take_all()
    }

    fn rounds(&mut self, mut on_fault: impl FnMut(u64) -> Result) -> Result {
        for version in 1..=3 {
            for page in SOURCES {
                self.store.renew(page, version);
            }
            self.round(version, &mut on_fault)?;
        }
        let entries = self.store.bytes(ENTRIES)?;
        ensure_eq!(
            entries[..8],
            9_u64.to_le_bytes(),
            "entries of the inner guest"
        );
        Ok(())
    }
}

/// Each page that the inner guest needs causes an event when it is needed:
///
/// - pages that the CPU reads,
/// - pages that KVM maps or copies,
/// - pages that the inner guest reads and writes.
///
/// A page that is made absent again causes an event again.
fn guest_waits_for_pages() -> Result {
    for translation in TRANSLATIONS {
        let mut nested = Nested::new(translation)?;
        let task = Task::work(move || {
            nested.rounds(|page| fail!("KVM_RUN returned for page {page}"))?;
            Ok(nested)
        })?;
        let nested = task.join("the vCPU")?;
        nested.handler.stop()?;
    }
    Ok(())
}

/// With exits on, accesses of the outer guest exit. Accesses of the inner guest, and KVM's accesses
/// for it, wait.
fn guest_waits_with_exits_on() -> Result {
    for translation in TRANSLATIONS {
        let mut nested = Nested::new(translation)?;
        let task = Task::work(move || {
            nested.slot.vm.set_vcpu_exits(true)?;
            let fetching = nested.store.clone();
            let mut exits = Vec::new();
            nested.rounds(|page| {
                exits.push(page);
                fetching.fetch(page)
            })?;
            Ok((nested, exits))
        })?;
        let (nested, mut exits) = task.join("the vCPU")?;
        // It depends on the CPU whether VMSAVE and VMLOAD are accesses of the outer guest, which
        // exit, or of KVM, which wait. VMLOAD of the control block is in the first half of each
        // round. In the second half, KVM needs the block first, at #VMEXIT.
        let blocks = exits.iter().filter(|&&page| page == VMCB).count();
        ensure!(
            blocks <= 3,
            "KVM_RUN returned {blocks} times for the control block"
        );
        exits.retain(|&page| page != HOST && page != VMCB);
        ensure_eq!(exits, [ENTRIES; 6], "pages that KVM_RUN returned for");
        ensure!(nested.handler.events() > 0, "there was no event");
        nested.handler.stop()?;
    }
    Ok(())
}

/// A poisoned page of the inner guest stops KVM_RUN with a signal, as for any guest, until the page
/// is healed.
fn guest_meets_poison() -> Result {
    sys::note_bus_errors();
    for translation in TRANSLATIONS {
        for page in [SOURCES.start + 1, RESULTS.end - 1] {
            let mut nested = Nested::new(translation)?;
            poison(&nested.slot, page)?;
            let task = Task::work(move || {
                for _ in 0..2 {
                    run_into_loss(&mut nested.vcpu, &nested.slot, page)?;
                }
                heal(&nested.slot, page)?;
                nested.round(1, |page| fail!("KVM_RUN returned for page {page}"))?;
                Ok(nested)
            })?;
            let nested = task.join("the vCPU")?;
            nested.handler.stop()?;
        }
    }
    Ok(())
}

/// On hugetlb, KVM with its default parameters refuses to map the pages of VMSAVE, VMLOAD and
/// VMRUN. KVM_RUN ends with an internal error at the first of these instructions that KVM emulates.
/// That is so even if all pages are present.
fn guest_on_hugetlb_is_refused() -> Result {
    if fs::read_to_string("/sys/module/kvm/parameters/allow_unsafe_mappings")?.trim() != "N" {
        return skip("KVM was loaded with allow_unsafe_mappings");
    }
    let slot = Slot::new(Backing::Huge2M, BLOCK)?;
    let mut vcpu = nested::vcpu(&slot.machine()?, Translation::Same)?;
    let store = Store::new(&slot, Translation::Same)?;
    (0..PAGES).try_for_each(|page| store.fetch(page))?;
    let stop = nested::next(&mut vcpu, |page| fail!("KVM_RUN returned for page {page}"));
    ensure!(
        matches!(&stop, Err(e) if e.to_string().contains("InternalError")),
        "KVM_RUN came to {:?}",
        stop.map_err(|e| e.to_string())
    );
    store.take(ENTRIES)?;
    let entries = store.bytes(ENTRIES)?;
    ensure_eq!(
        entries[..8],
        1_u64.to_le_bytes(),
        "how far the outer guest came"
    );
    Ok(())
}
